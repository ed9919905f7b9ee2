"""Windows: a waveform cut to the length of the model's input.

Windows start every hop from the start of the clip until one reaches its end. The last one is
shorter where the length does not divide; one of less than a frame (25 ms) is omitted.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Int16

from aatjax.audio.frontend import FrontEnd
from aatjax.audio.scoring import is_silent
from aatjax.audio.waveform import FRAME
from aatjax.errors import UsageError

RATE = 16000


@dataclasses.dataclass(frozen=True)
class Window:
    """One input of the model.

    Attributes:
        audio: `frontend.samples` int16 samples at 16 kHz.
        length: number of valid samples.
        span: first and last sample, counted from the start of the file.
        silent: whether it holds no sound.
    """

    audio: Int16[np.ndarray, " s"]
    length: int
    span: tuple[int, int]
    silent: bool = False


def compute_step(size: int, hop: float | None) -> int:
    """Return the samples between the starts of windows of `size` samples.

    Args:
        size: samples of a window.
        hop: seconds; None for windows that do not overlap.

    Raises:
        UsageError: less than one sample, or not finite.
    """
    if hop is None:
        return size
    if not (math.isfinite(hop) and round(hop * RATE) >= 1):
        raise UsageError(f"a hop of {hop} s: it must be a number of seconds above 0")
    return round(hop * RATE)


def find_starts(samples: int, size: int, step: int, shortest: int = FRAME) -> range:
    """Return the first sample of every window of a clip; one window for a short clip.

    Args:
        samples: of the clip.
        size: samples of a window.
        step: samples between the starts of windows.
        shortest: samples of the shortest window that is not the first.
    """
    count = 1 - (size - samples) // step if samples > size else 1
    count = min(count, 1 + max(0, samples - min(shortest, size)) // step)
    return range(0, count * step, step)


def count_windows(samples: int, size: int, step: int) -> int:
    """Return the number of windows that `cut_windows` makes of at least one sample."""
    return len(find_starts(samples, size, step))


def cut_windows(
    blocks: Iterable[Int16[np.ndarray, " n"]], frontend: FrontEnd, step: int
) -> Iterator[Window]:
    """Yield the windows of a waveform in blocks, with one window and one block in memory."""
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
            part = kept[start - first :][:size]
            yield Window(*frontend.fit(part), (start, start + size), is_silent(part))
            start += step
        past = min(start, total) - first
        kept, first = kept[past:].copy(), first + past
    rest = total - start
    if rest > 0 and (start == 0 or (start - step + size < total and rest >= min(FRAME, size))):
        part = np.concatenate([kept, *parts])[start - first :]
        yield Window(*frontend.fit(part), (start, total), is_silent(part))
