"""The parity gate: the model and its export hear the same sounds and must say the same."""

import os
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int16

from aatjax.audio.frontend import FrontEnd
from aatjax.data.synthetic.synthesize import synthesize
from aatjax.errors import AatjaxError, UsageError, printable

Sound = tuple[str, Int16[np.ndarray, " s"]]
Sounds = list[Sound]

TOLERANCE = 1e-4
"""How far a logit may move, in units of the largest logit's size (of 1 if none is that large)."""

SOUNDS = (("siren", 1, 1.0), ("bark", 2, 1.0), ("fire", 3, 0.2), ("clock", 4, 0.8))
"""Sound, seed, and how much of the model's length it fills."""


class Moved(AatjaxError):
    """An export does not compute what its model does."""


def synthetic_sounds(frontend: FrontEnd) -> Sounds:
    """A few synthetic sounds, some shorter than the model's length."""
    window = frontend.samples / frontend.rate
    return [synthetic(frontend, sound, seed, seconds=part * window) for sound, seed, part in SOUNDS]


def synthetic(frontend: FrontEnd, sound: str, seed: int, seconds: float) -> Sound:
    """A synthetic sound with its name."""
    name = f"{sound} (synthetic, seed {seed})"
    return name, synthesize(sound, seed, seconds=seconds, rate=frontend.rate)


def sounds_of(files: Sequence[str | os.PathLike[str]]) -> Sounds:
    """Sound files by their names.

    Raises:
        AudioError: a file cannot be decoded.
    """
    from aatjax.audio.decode import decode

    return [(printable(os.path.basename(file)), decode(file).waveform) for file in files]


def compare(
    want: Float[np.ndarray, "n c"],
    found: Mapping[str, Float[np.ndarray, "_ c"]],
    tolerance: float = TOLERANCE,
    *,
    what: str,
) -> dict[str, float]:
    """The largest difference of every way the export was run.

    Args:
        want: the model's logits.
        found: the export's, by what it was given; of the first clips, where they are fewer.
        tolerance: see `TOLERANCE`.
        what: the export, for the message.

    Raises:
        Moved: a logit is further away than the tolerance, or is not finite.
        UsageError: the tolerance is not a positive number.
    """
    if not tolerance > 0 or not np.isfinite(tolerance):
        raise UsageError(f"tolerance={tolerance} must be a number above 0")
    most = tolerance * max(1.0, float(np.abs(want).max()))
    largest: dict[str, float] = {}
    for given, logits in found.items():
        if logits.shape[1:] != want.shape[1:] or not 0 < len(logits) <= len(want):
            raise Moved(f"{what}: {list(logits.shape)} logits from {given}: not exported")
        apart = np.abs(logits - want[: len(logits)])
        if not np.isfinite(apart).all() or apart.max() > most:
            raise Moved(
                f"{what}: logits from {given} are {float(apart.max()):.2g} away from the model's, "
                f"{most:.2g} is allowed (tolerance {tolerance:g}): not exported"
            )
        largest[given] = float(apart.max())
    return largest
