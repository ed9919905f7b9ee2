"""Windows: a waveform cut to the length of the model's input."""

import dataclasses
import math
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Int16

from aatjax.audio.frontend import FrontEnd
from aatjax.errors import UsageError

RATE = 16000


@dataclasses.dataclass(frozen=True)
class Window:
    """One input of the model.

    Attributes:
        audio: `frontend.samples` int16 samples at 16 kHz.
        length: number of valid samples.
        span: first and last sample, counted from the start of the file.
    """

    audio: Int16[np.ndarray, " s"]
    length: int
    span: tuple[int, int]


def compute_step(frontend: FrontEnd, hop: float | None) -> int:
    """Return the samples between window starts for `hop` seconds; None: no overlap.

    Raises:
        UsageError: less than one sample, or not finite.
    """
    if hop is None:
        return frontend.samples
    if not (math.isfinite(hop) and round(hop * RATE) >= 1):
        raise UsageError(f"hop={hop} must be a number of seconds above 0")
    return round(hop * RATE)


def count_windows(samples: int, size: int, step: int) -> int:
    """Return the number of windows that `cut_windows` makes of at least one sample."""
    return min(1 - (size - samples) // step if samples > size else 1, -(-samples // step))


def cut_windows(
    blocks: Iterable[Int16[np.ndarray, " n"]], frontend: FrontEnd, step: int
) -> Iterator[Window]:
    """Yield the windows of a waveform in blocks, with one window and one block in memory.

    Windows start every `step` samples until one reaches the end. The last one is shorter where the
    length does not divide.
    """
    size = frontend.samples
    kept = np.zeros(0, np.int16)
    parts: list[np.ndarray] = []
    first = start = total = 0  # samples: of what is kept, of the next window, read so far
    for block in blocks:
        parts.append(block)
        total += len(block)
        if start + size > total:
            continue
        kept, parts = np.concatenate([kept, *parts]), []
        while start + size <= total:
            audio, length = frontend.fit(kept[start - first :][:size])
            yield Window(audio, length, (start, start + size))
            start += step
        past = min(start, total) - first
        kept, first = kept[past:].copy(), first + past
    if total > start and (start == 0 or start - step + size < total):
        kept = np.concatenate([kept, *parts])
        audio, length = frontend.fit(kept[start - first :])
        yield Window(audio, length, (start, total))
