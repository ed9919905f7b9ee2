"""Converts samples of any usual form to mono int16 at the rate of the front end."""

import operator
from typing import Any

import numpy as np
import soxr
from jaxtyping import Float, Float32, Int16

from aatjax.errors import DataError, UsageError

FRAME = 400
"""Samples in one frame of the front end (25 ms): the shortest clip."""

LOWEST_RATE = 1000
HIGHEST_RATE = 1_000_000
MAX_CHANNELS = 8
"""An axis of at most this many entries holds the channels of an array."""
LOUDEST = 4.0
"""Floats beyond this are taken for unscaled integers; full scale is 1."""
SILENCE = 2
"""Range of int16 samples up to which they are silent: digital silence, an offset, or dither."""
Channels = str | int
"""'mean' of all channels, 'left' (the first), or the index of one channel."""


class AudioError(DataError):
    """One clip that cannot be used; the rest of the data set can.

    Attributes:
        reason: 'undecodable', 'truncated', 'non-finite', 'too short', 'empty',
            'not a regular file' or 'permission denied'.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:  # for the way back from a worker process
        return type(self), (self.reason, str(self))


def check_rate(rate: int, name: str = "rate") -> None:
    """Raise a UsageError unless `rate` is a whole number of Hz from 1000 to 1000000."""
    whole = isinstance(rate, int | np.integer) and not isinstance(rate, bool)
    if not whole or not LOWEST_RATE <= rate <= HIGHEST_RATE:
        raise UsageError(f"{name} is {rate!r}, give whole Hz from {LOWEST_RATE} to {HIGHEST_RATE}")


def check_channels(channels: Channels) -> None:
    """Raise a UsageError unless `channels` is 'mean', 'left' or an index from 0 on."""
    index = isinstance(channels, int) and not isinstance(channels, bool) and channels >= 0
    if not index and channels not in ("mean", "left"):
        raise UsageError(f"channels is {channels!r}, give 'mean', 'left' or a channel number")


def mix_down(samples: Float32[np.ndarray, "n k"], channels: Channels) -> Float32[np.ndarray, " n"]:
    """Reduce `k` channels to one: 'mean', 'left', or the channel of an index.

    Raises:
        UsageError: there is no channel of that index.
    """
    if channels == "mean":
        return samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1, dtype=np.float32)
    index = 0 if channels == "left" else operator.index(channels)  # type: ignore[arg-type]
    if index >= samples.shape[1]:
        raise UsageError(
            f"channel {index} is requested, but there are {samples.shape[1]} (counted from 0); "
            "give channels='mean' or 'left'"
        )
    return np.ascontiguousarray(samples[:, index])


def to_int16(samples: Float[np.ndarray, " n"]) -> Int16[np.ndarray, " n"]:
    """Round floats in [-1, 1] to int16; values beyond are clipped."""
    return np.clip(np.rint(samples * 32768.0), -32768, 32767).astype(np.int16)


def pad_to_frame(samples: Int16[np.ndarray, " n"]) -> Int16[np.ndarray, " m"]:
    """Zero-pad a clip that is shorter than one frame of 400 samples to one frame."""
    return np.pad(samples, (0, max(0, FRAME - samples.size)))


def as_waveform(
    array: Any, rate_in: int, *, rate: int = 16000, channels: Channels = "mean"
) -> Int16[np.ndarray, " n"]:
    """Convert an array of samples to mono int16 at `rate`.

    The data type gives the scale: int16, int32 and uint8 are full-scale integers; floats are in
    [-1, 1] and clipped there. In two dimensions the axis of at most 8 entries holds the channels,
    so (n, 2) and (2, n) are both accepted.

    Args:
        array: samples, anything `numpy.asarray` takes.
        rate_in: sampling rate of `array` in Hz.
        rate: sampling rate of the result in Hz.
        channels: 'mean', 'left' or the index of a channel.

    Returns:
        Mono samples, zero-padded to one frame of 400 if there are fewer.

    Raises:
        UsageError: an invalid rate or channel, an unknown data type, an ambiguous shape.
        AudioError: no samples ('empty') or NaN/Inf ('non-finite').
        DataError: floats beyond 4: unscaled integers.
    """
    check_rate(rate_in, "rate_in")
    check_rate(rate)
    check_channels(channels)
    samples = _arrange(np.asarray(array))
    if samples.size == 0:
        raise AudioError("empty", "the waveform has no samples")
    if samples.dtype == np.int16 and samples.shape[1] == 1 and rate_in == rate:
        return pad_to_frame(samples[:, 0].copy())
    mono = mix_down(_scale(samples), channels)
    if rate_in != rate:
        mono = soxr.resample(mono, rate_in, rate, quality="HQ")
    return pad_to_frame(to_int16(mono))


def _arrange(array: np.ndarray) -> np.ndarray:
    """Reshape to (samples, channels)."""
    if array.ndim == 1:
        return array[:, None]
    if array.ndim == 2:
        rows, columns = array.shape
        if columns <= MAX_CHANNELS < rows or (columns == 1 and rows > 0):
            return array
        if rows <= MAX_CHANNELS < columns or (rows == 1 and columns > 0):
            return array.T
        if array.size == 0:
            return array.reshape(0, 1)
    raise UsageError(
        f"a waveform of shape {array.shape} is ambiguous: give (samples,), (samples, channels) or "
        f"(channels, samples) with at most {MAX_CHANNELS} channels and more samples than that"
    )


def _scale(samples: np.ndarray) -> Float32[np.ndarray, "n k"]:
    """Scale to float32 in [-1, 1] by the data type."""
    if samples.dtype in (np.int16, np.int32):
        return (samples / -float(np.iinfo(samples.dtype).min)).astype(np.float32)
    if samples.dtype == np.uint8:
        return ((samples - 128.0) / 128.0).astype(np.float32)
    if not np.issubdtype(samples.dtype, np.floating):
        raise UsageError(
            f"samples of type {samples.dtype} have no known scale: give int16, int32, uint8, or "
            "floats in [-1, 1]"
        )
    if not np.isfinite(samples).all():
        raise AudioError(
            "non-finite", "the waveform has NaN or infinite samples; repair the source"
        )
    peak = float(np.abs(samples).max())
    if peak > LOUDEST:
        raise DataError(
            f"float samples reach {peak:.6g}, but full scale is 1: these look like unscaled "
            "integers, divide by 32768 or pass them as int16"
        )
    return samples.astype(np.float32)
