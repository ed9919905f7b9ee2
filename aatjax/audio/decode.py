"""Sound files to mono int16 waveforms, with a clear word on every file that is not sound.

libsndfile (through soundfile) reads WAV, FLAC, OGG, MP3, AIFF and more by their content; the name
of a file is never looked at. AAC, WMA and Matroska need `ffmpeg` on the path. Resampling is soxr
at high quality. Files are read, mixed and resampled in blocks, so memory grows only with the
result: two bytes a sample, bounded by `max_seconds`.
"""

import contextlib
import dataclasses
import errno
import io
import math
import os
import stat
from collections.abc import Iterator
from io import BufferedIOBase
from typing import Literal

import numpy as np
import soxr
from jaxtyping import Float32, Int16

from aatjax.audio.containers import Container, inspect_container
from aatjax.audio.fbank import FRAME
from aatjax.audio.listing import list_audio
from aatjax.audio.streams import DecoderError, Stream, open_stream
from aatjax.audio.waveform import (
    HIGHEST_RATE,
    LOWEST_RATE,
    AudioError,
    Channels,
    as_waveform,
    check_channels,
    check_rate,
    mix_down,
    pad_to_frame,
    to_int16,
)
from aatjax.errors import UsageError, printable

__all__ = ["AudioError", "Decoded", "as_waveform", "decode", "decode_blocks", "list_audio"]

_MP3_SLACK = 2 * 1152
"""Sample frames an MP3 decoder may drop at the ends of a whole file."""
_CLIPPED_SHARE = 0.01
"""A clip with this share of samples at full scale is called clipped."""


@dataclasses.dataclass(frozen=True)
class Decoded:
    """A decoded clip.

    Attributes:
        waveform: mono int16 samples at the rate that was asked for, at least one frame of 400.
        source_rate: sampling rate of the file in Hz.
        channels: channels of the file.
        frames: sample frames read from the file.
        notes: what is odd about the clip: 'clipped' (samples beyond full scale, or at least 1 % of
            them at full scale), 'silent' (only zeros or a constant), 'padded from 37 samples',
            'truncated 80000/160000 frames' (the second number is an estimate in compressed WAV
            and '?' where nothing tells it).
    """

    waveform: Int16[np.ndarray, " n"]
    source_rate: int
    channels: int
    frames: int
    notes: tuple[str, ...] = ()


def decode(
    path_or_bytes: str | os.PathLike[str] | bytes,
    *,
    rate: int = 16000,
    channels: Channels = "mean",
    max_seconds: float | None = None,
    truncated: Literal["skip", "keep"] = "skip",
    min_samples: int = 1,
) -> Decoded:
    """Decodes one clip.

    Truncation is found where the file says how long it should be: WAV, RF64, W64, AIFF, AU, FLAC,
    OGG (the end-of-stream flag), and MP3 with a frame count (Xing, Info or VBRI). An MP3 without
    one, or a file cut before `max_seconds` ended the reading, cannot be told from a short clip.

    Args:
        path_or_bytes: path of a file, or the content of one.
        rate: wanted sampling rate in Hz.
        channels: 'mean' of all channels, 'left', or the index of a channel.
        max_seconds: stop after this much sound; the result is the start of the whole clip.
        truncated: 'skip' raises for a cut file, 'keep' returns what is left with a note.
        min_samples: fewest samples (at `rate`) of a clip. Clips of less than one frame (400
            samples) that pass are zero-padded to one frame.

    Returns:
        The waveform and what is known of its source.

    Raises:
        AudioError: the clip cannot be used; `reason` says why, the message names the path.
        UsageError: a wrong argument, or a channel that the file does not have.
    """
    check_rate(rate)
    check_channels(channels)
    if truncated not in ("skip", "keep"):
        raise UsageError(f"truncated is {truncated!r}, give 'skip' or 'keep'")
    if max_seconds is not None and not (math.isfinite(max_seconds) and max_seconds > 0):
        raise UsageError(f"max_seconds is {max_seconds!r}, give a number above 0")
    name = "<bytes>" if isinstance(path_or_bytes, bytes) else printable(path_or_bytes)
    limit = None if max_seconds is None else math.ceil(max_seconds * rate)

    with _stream(path_or_bytes, name) as (container, stream):
        read = _Reader(stream, rate, channels, limit, name)
        waveform = np.concatenate(list(read.blocks()))

    read.refuse_nothing()
    notes: list[str] = ["clipped"] if read.clipped else []
    cut = "" if read.stopped else _missing(container, stream, read)
    if cut:
        if truncated == "skip":
            raise AudioError("truncated", f"{name}: {cut}; pass truncated='keep' to use the rest")
        notes.append(cut)
    waveform = waveform[:limit]
    if waveform.size < min_samples and not (waveform.size == 0 and min_samples == 1):
        raise AudioError(
            "too short", f"{name}: {waveform.size} samples, but at least {min_samples} are wanted"
        )
    if waveform.size < FRAME:
        notes.append(f"padded from {waveform.size} samples")
    if waveform.size == 0 or waveform.min() == waveform.max():
        notes.append("silent")
    return Decoded(pad_to_frame(waveform), stream.rate, stream.channels, read.frames, tuple(notes))


def decode_blocks(
    path_or_bytes: str | os.PathLike[str] | bytes,
    *,
    rate: int = 16000,
    channels: Channels = "mean",
) -> Iterator[Int16[np.ndarray, " n"]]:
    """Decodes a clip of any length block by block, in memory that does not grow with it.

    Args:
        path_or_bytes: path of a file, or the content of one.
        rate: wanted sampling rate in Hz.
        channels: 'mean' of all channels, 'left', or the index of a channel.

    Yields:
        Mono samples; one after the other they are the waveform of `decode`, padded to one frame
        of 400 samples where it is shorter. No block is empty.

    Raises:
        AudioError: the clip cannot be used, or not to its end. A clip that is cut off (reason
            'truncated') raises after its last sample was given.
        UsageError: a wrong argument, or a channel that the file does not have.
    """
    check_rate(rate)
    check_channels(channels)
    name = "<bytes>" if isinstance(path_or_bytes, bytes) else printable(path_or_bytes)
    with _stream(path_or_bytes, name) as (container, stream):
        read = _Reader(stream, rate, channels, None, name)
        short = np.zeros(0, np.int16)
        begun = False
        for block in read.blocks():
            if not begun:
                block = short = np.concatenate([short, block])
                begun = short.size >= FRAME
            if begun and block.size:
                yield block
    read.refuse_nothing()
    if not begun:
        yield pad_to_frame(short)
    if cut := _missing(container, stream, read):
        raise AudioError("truncated", f"{name}: {cut}")


@contextlib.contextmanager
def _stream(
    source: str | os.PathLike[str] | bytes, name: str
) -> Iterator[tuple[Container, Stream]]:
    """What a file says about itself, and its decoder, which is closed in the end."""
    with _open(source, name) as (file, size):
        if size == 0:
            raise AudioError("undecodable", f"{name}: has 0 bytes")
        container = inspect_container(file, size)
        try:
            stream = open_stream(file, container, source)
        except DecoderError as error:
            reason = "truncated" if container.share < 1.0 else "undecodable"
            raise AudioError(reason, f"{name}: cannot be decoded as sound: {error}") from error
        try:
            if not LOWEST_RATE <= stream.rate <= HIGHEST_RATE:
                raise AudioError("undecodable", f"{name}: claims a rate of {stream.rate} Hz")
            yield container, stream
        finally:
            stream.close()


class _Reader:
    """Pulls a stream through downmix, resampler and rounding, block by block."""

    def __init__(
        self, stream: Stream, rate: int, channels: Channels, limit: int | None, name: str
    ) -> None:
        self.frames = 0
        self.stopped = False
        self.broken: DecoderError | None = None
        self._full = self._over = 0
        self._stream, self._rate = stream, rate
        self._channels: Channels = channels
        self._limit, self._name = limit, name

    def blocks(self) -> Iterator[Int16[np.ndarray, " n"]]:
        """Mono blocks at the wanted rate, until the stream or the limit ends."""
        stream = self._stream
        same = stream.rate == self._rate
        resampler = soxr.ResampleStream(stream.rate, self._rate, 1, dtype="float32", quality="HQ")
        count = 0
        blocks = stream.blocks()
        while True:
            try:
                block = next(blocks, None)
            except DecoderError as error:
                self.broken, block = error, None
            if block is not None:
                self._check(block, self._name)
            mono = np.zeros(0, np.float32) if block is None else mix_down(block, self._channels)
            part = to_int16(mono if same else resampler.resample_chunk(mono, last=block is None))
            yield part
            count += part.size
            if block is None:
                break
            if self._limit is not None and count >= self._limit:
                self.stopped = True
                break

    @property
    def clipped(self) -> bool:
        """Whether samples lie beyond full scale, or many at it."""
        samples = self.frames * self._stream.channels
        return self._over > 0 or self._full >= max(1.0, _CLIPPED_SHARE * samples)

    def refuse_nothing(self) -> None:
        """Raises AudioError where not one sample was read."""
        if self.frames == 0:
            if self.broken:
                text = f"{self._name}: cannot be decoded as sound: {self.broken}"
                raise AudioError("undecodable", text)
            raise AudioError("empty", f"{self._name}: has no samples")

    def _check(self, block: Float32[np.ndarray, "n k"], name: str) -> None:
        if not np.isfinite(block).all():
            row = int(np.flatnonzero(~np.isfinite(block).all(axis=1))[0]) + self.frames
            raise AudioError(
                "non-finite", f"{name}: sample {row} is NaN or infinite; repair the file"
            )
        size = np.abs(block)
        self._over += int(np.count_nonzero(size > 1.0))
        self._full += int(np.count_nonzero(size >= 32767 / 32768))
        self.frames += len(block)


def _missing(container: Container, stream: Stream, read: _Reader) -> str:
    """'' for a whole clip, else the note about what is missing."""
    promised = container.frames
    slack = 0
    if container.counted and stream.frames is not None:
        promised = stream.frames
        slack = _MP3_SLACK if container.kind == "mp3" else 0
    elif promised is None and 0.0 < container.share < 1.0:
        promised = round(read.frames / container.share)
    short = container.counted and promised is not None and read.frames + slack < promised
    if container.share == 1.0 and not short and read.broken is None:
        return ""
    if container.share < 1.0 and promised is not None and promised <= read.frames:
        return ""
    whole = promised if promised is not None and promised > read.frames else "?"
    return f"truncated {read.frames}/{whole} frames"


@contextlib.contextmanager
def _open(
    source: str | os.PathLike[str] | bytes, name: str
) -> Iterator[tuple[BufferedIOBase, int]]:
    """Opens content or a regular file; never blocks on a pipe, a device or a loop of links."""
    if isinstance(source, bytes):
        yield io.BytesIO(source), len(source)
        return
    with _access(name):
        mode = os.stat(source).st_mode
    _check_regular(mode, name)
    with _access(name):
        handle = os.open(source, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _BINARY)
    with open(handle, "rb") as file:
        status = os.fstat(file.fileno())
        _check_regular(status.st_mode, name)  # it may have been replaced since
        yield file, status.st_size


@contextlib.contextmanager
def _access(name: str) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise AudioError("permission denied", f"{name}: permission denied") from error
    except (OSError, ValueError) as error:
        loop = isinstance(error, OSError) and error.errno == errno.ELOOP
        text = "a loop of symbolic links" if loop else getattr(error, "strerror", None) or error
        raise AudioError("not a regular file", f"{name}: {text}") from error


_BINARY = getattr(os, "O_BINARY", 0)


def _check_regular(mode: int, name: str) -> None:
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a device or a socket"
        raise AudioError("not a regular file", f"{name}: is {kind}, not a regular file")
