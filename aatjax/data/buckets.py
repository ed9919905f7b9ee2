"""Length buckets: short clips in batches of their own length, so that less padding is computed.

A clip goes into the shortest bucket that holds every patch with sound in it. Where padding is
masked (`mask_padding`) only masked patches are cut off, so a clip's logits are the same in any
bucket. One program is compiled per bucket.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from aatjax.audio.frontend import FrontEnd
from aatjax.data.source import Source
from aatjax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Clips that are read at one length.

    Attributes:
        frontend: the front end at that length.
        rows: the clips' numbers in their source.
    """

    frontend: FrontEnd
    rows: Int[np.ndarray, " n"]


def check_buckets(frames: Iterable[int], frontend: FrontEnd, patch: int) -> tuple[int, ...]:
    """Return the lengths in frames, ascending, the model's own last.

    Raises:
        UsageError: a length that is not between a patch and the model's, or padding by repetition.
    """
    lengths = tuple(sorted({*frames, frontend.frames}))
    for length in lengths:
        if not patch <= length <= frontend.frames:
            raise UsageError(
                f"training.buckets: {length} frames is not between a patch's {patch} and the "
                f"model's {frontend.frames}"
            )
    if frontend.pad == "repeat":
        raise UsageError(
            "training.buckets: data.pad='repeat' fills every clip with sound, so none is short: "
            "choose another pad, or omit the buckets"
        )
    return lengths


def sort_into_buckets(
    source: Source, frontend: FrontEnd, lengths: Sequence[int], *, patch: int, stride: int
) -> tuple[Bucket, ...]:
    """Sort the clips of a source into buckets; empty buckets are omitted.

    Args:
        source: clips; each is read once to find its length.
        frontend: at the model's length.
        lengths: of the buckets in frames, ascending, the model's own last.
        patch: frames per patch.
        stride: frames from a patch to the next.
    """
    samples = [min(len(source.waveform(i)), frontend.samples) for i in range(len(source))]
    sounding = np.asarray(frontend.count_frames(jnp.array(samples, jnp.int32)))
    last = stride * ((np.maximum(sounding, 1) - 1) // stride)  # start of the last patch with sound
    places = np.searchsorted(lengths, np.minimum(last + patch, lengths[-1]))
    return tuple(
        Bucket(dataclasses.replace(frontend, frames=length), np.flatnonzero(places == place))
        for place, length in enumerate(lengths)
        if (places == place).any()
    )
