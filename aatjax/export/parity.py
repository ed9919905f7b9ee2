"""Parity check: a model and its export are run on the same clips and must give equal logits."""

import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int16

from aatjax.audio.frontend import FrontEnd
from aatjax.data.synthetic.synthesize import synthesize
from aatjax.errors import AatjaxError, UsageError, printable
from aatjax.train.golden import find_limit

NamedSound = tuple[str, Int16[np.ndarray, " s"]]

TOLERANCE = 1e-4
"""Largest difference of a logit, see `find_limit`."""

SOUNDS = (("siren", 1, 1.0), ("bark", 2, 1.0), ("fire", 3, 0.2), ("clock", 4, 0.8))
"""Sound, seed, and its length as a share of the model's."""


class ExportMismatchError(AatjaxError):
    """Files do not compute what their model does, or what they did when they were written."""


LONG = 2.4
"""Windows in the longest of the synthetic sounds."""

MOST_WINDOWS = 32
"""Windows of a sound file that are compared, from its start."""


def synthesize_clips(frontend: FrontEnd) -> list[NamedSound]:
    """Return a few synthetic sounds, some shorter than the model's length."""
    window = frontend.samples / frontend.rate
    sounds = [synthesize_clip(frontend, name, seed, part * window) for name, seed, part in SOUNDS]
    return [*sounds, _make_long_sound(frontend)]


def _make_long_sound(frontend: FrontEnd) -> NamedSound:
    """Return a sound of three windows, the second silent, the third short."""
    seconds = LONG * frontend.samples / frontend.rate
    name, sound = synthesize_clip(frontend, "siren", 5, seconds)
    sound = sound.copy()
    sound[frontend.samples : 2 * frontend.samples] = 0
    return f"{name}, {LONG} windows, one silent", sound


def synthesize_clip(frontend: FrontEnd, sound: str, seed: int, seconds: float) -> NamedSound:
    """Return a synthetic sound with its name."""
    name = f"{sound} (synthetic, seed {seed})"
    return name, synthesize(sound, seed, seconds=seconds, rate=frontend.rate)


def read_clips(files: Sequence[str | os.PathLike[str]]) -> list[NamedSound]:
    """Return sound files with their names.

    Raises:
        AudioError: a file cannot be decoded.
    """
    from aatjax.audio.decode import decode

    return [(printable(os.path.basename(file)), decode(file).waveform) for file in files]


def compare_files(
    want: Float[np.ndarray, "n c"],
    found: Mapping[str, Float[np.ndarray, "_ c"]],
    pool: Callable[[np.ndarray], list[tuple[str, np.ndarray]]],
    tolerance: float = TOLERANCE,
    *,
    what: str,
) -> float:
    """Return the largest difference of a file's probability; refuse another label.

    Args:
        want: the expected logits of all windows.
        found: the logits of the export by kind of input; those of all windows count.
        pool: name and probabilities of each file, from the logits of all windows.
        tolerance: largest difference of a probability.
        what: the files, for the message.

    Raises:
        ExportMismatchError: a probability differs by more, or the most probable class.
    """
    largest, expected = 0.0, pool(want)
    for given, logits in found.items():
        if len(logits) != len(want):
            continue
        for (name, p), (_, q) in zip(expected, pool(logits), strict=True):
            apart = float(np.abs(p - q).max())
            largest = max(largest, apart)
            other = p.argmax() != q.argmax() and p.max() - p[q.argmax()] > tolerance
            if not apart <= tolerance or other:
                raise ExportMismatchError(
                    f"{what}: the probabilities of {name} from {given} are {apart:.2g} away from "
                    f"those of `aatjax predict`, {tolerance:g} is allowed: not exported"
                )
    return largest


def compare_outputs(
    want: Float[np.ndarray, "n c"],
    found: Mapping[str, Float[np.ndarray, "_ c"]],
    tolerance: float = TOLERANCE,
    *,
    what: str,
    reference: str = "the model's",
    consequence: str = "not exported",
) -> dict[str, float]:
    """Return the largest difference of logits by kind of input.

    Args:
        want: the expected logits.
        found: the logits of the files by kind of input; of the first clips, where they are fewer.
        tolerance: see `TOLERANCE`.
        what, reference, consequence: the files, whose logits are expected, and what a mismatch
            means, for the message.

    Raises:
        ExportMismatchError: a logit differs by more than the tolerance, or is not finite.
        UsageError: the tolerance is not a positive number.
    """
    if not tolerance > 0 or not np.isfinite(tolerance):
        raise UsageError(f"--tolerance {tolerance} must be a number above 0")
    limit = find_limit(want, tolerance)
    largest: dict[str, float] = {}
    for given, logits in found.items():
        if logits.shape[1:] != want.shape[1:] or not 0 < len(logits) <= len(want):
            raise ExportMismatchError(
                f"{what}: {list(logits.shape)} logits from {given}: {consequence}"
            )
        difference = float(np.abs(logits - want[: len(logits)]).max())
        if not difference <= limit:  # nan too
            raise ExportMismatchError(
                f"{what}: logits from {given} are {difference:.2g} away from {reference}, "
                f"{limit:.2g} is allowed (tolerance {tolerance:g}): {consequence}"
            )
        largest[given] = difference
    return largest
