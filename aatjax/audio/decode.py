"""Decodes sound files to mono int16 waveforms, with a reason for every file that cannot be used.

libsndfile (through soundfile) reads WAV, FLAC, OGG, MP3, AIFF and more by their content; file names
are not used. AAC, WMA and Matroska need the extra `formats` and ffmpeg. Resampling is soxr at high
quality. Files are read, mixed and resampled in blocks, so that memory grows with the result only:
two bytes per sample, bounded by `max_seconds`.
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

from aatjax.audio.listing import list_audio
from aatjax.audio.sound import Sound
from aatjax.audio.streams import DecoderError, ForeignError, SoundFile
from aatjax.audio.waveform import (
    FRAME,
    HIGHEST_RATE,
    LOUDEST,
    LOWEST_RATE,
    SILENCE,
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

_HUGE = 1e6
_CLIPPED_SHARE = 0.01
"""Share of samples at full scale from which on a clip is called clipped."""


@dataclasses.dataclass(frozen=True)
class Decoded:
    """A decoded clip.

    Attributes:
        waveform: mono int16 samples at the requested rate, at least one frame of 400.
        source_rate: sampling rate of the file in Hz.
        channels: number of channels of the file.
        frames: sample frames read from the file.
        notes: 'clipped' (samples beyond full scale, or at least 1 % of them at full scale),
            'full scale is 1, the loudest sample 1e+30', 'padded from 37 samples', 'silent'
            (constant within 2 steps of int16), 'channels cancel out' (no channel is silent),
            'truncated 80000/160000 frames' (the second estimated for compressed WAV, or '?'),
            '1 of 16000 frames missing' (at most 1 % of the clip and 0.1 s), 'data chunk of 32000
            bytes states 16000' (all were read), '5,000 bytes after the sound not decoded', '5,000
            bytes of another sound joined to this one not decoded (44100 Hz, 1 channel)'.
    """

    waveform: Int16[np.ndarray, " n"]
    source_rate: int
    channels: int
    frames: int
    notes: tuple[str, ...] = ()


def decode(
    path_or_bytes: SoundFile,
    *,
    rate: int = 16000,
    channels: Channels = "mean",
    max_seconds: float | None = None,
    truncated: Literal["skip", "keep"] = "skip",
    min_samples: int = 1,
) -> Decoded:
    """Decode one clip.

    The content decides what a file is, behind any tags of metadata. Files that were joined are
    decoded one after the other if they have one rate and the same channels.

    Missing sound is detected where the file states its length (WAV, RF64, W64, AIFF, AU, CAF, FLAC,
    Ogg, and MP3 with a frame count), at the end of an Ogg (its end-of-stream flag) and between the
    frames of an MP3; not after `max_seconds`. What is there is read. A small shortage, of at most
    1 % and 0.1 s, is a note; a larger one makes the clip truncated.

    Args:
        path_or_bytes: path of a file, or its content.
        rate: sampling rate of the result in Hz.
        channels: 'mean' of all channels, 'left', or the index of a channel.
        max_seconds: decode only the first seconds.
        truncated: 'skip' raises for a truncated file, 'keep' returns what is left, with a note.
        min_samples: least number of samples (at `rate`). Shorter clips than one frame (400
            samples) that pass are zero-padded to one frame.

    Raises:
        AudioError: the clip cannot be used; `reason` is the kind of problem, the message names the
            file.
        UsageError: an invalid argument, or a channel that the file does not have.
    """
    if truncated not in ("skip", "keep"):
        raise UsageError(f"truncated is {truncated!r}, give 'skip' or 'keep'")
    if max_seconds is not None and not (math.isfinite(max_seconds) and max_seconds > 0):
        raise UsageError(f"max_seconds is {max_seconds!r}, give a number above 0")
    limit = None if max_seconds is None else math.ceil(max_seconds * rate)
    with _open_reader(path_or_bytes, rate, channels, limit) as reader:
        waveform = np.concatenate(list(reader.blocks()))[:limit]
    name, notes = reader.name, reader.find_notes(waveform.size)
    loss, is_truncated = reader.check_end()
    if is_truncated and truncated == "skip":
        raise AudioError("truncated", f"{name}: {loss}; pass truncated='keep' to use the rest")
    notes += filter(None, [loss])
    if waveform.size < min_samples and not (waveform.size == 0 and min_samples == 1):
        raise AudioError(
            "too short", f"{name}: {waveform.size} samples, but at least {min_samples} are wanted"
        )
    sound, padded = reader.sound, pad_to_frame(waveform)
    return Decoded(padded, sound.rate, sound.channels, reader.frames, tuple(notes))


def decode_blocks(
    path_or_bytes: SoundFile,
    *,
    rate: int = 16000,
    channels: Channels = "mean",
    notes: list[str] | None = None,
) -> Iterator[Int16[np.ndarray, " n"]]:
    """Decode a clip of any length block by block, in constant memory.

    Args:
        path_or_bytes, rate, channels: as in `decode`.
        notes: gets the notes of `Decoded` once the clip ends.

    Yields:
        Mono samples; concatenated, they are the waveform of `decode`. No block is empty.

    Raises:
        AudioError: the clip cannot be used, or not to its end: a truncated clip (reason
            'truncated') raises after its last sample.
        UsageError: an invalid argument, or a channel that the file does not have.
    """
    samples = 0
    with _open_reader(path_or_bytes, rate, channels, None) as reader:
        start = np.zeros(0, np.int16)  # blocks are held back up to one frame, to pad if need be
        for block in reader.blocks():
            samples += block.size
            if start.size < FRAME:
                block = start = np.concatenate([start, block])
            if start.size >= FRAME and block.size:
                yield block
    loss, is_truncated = reader.check_end()
    if notes is not None:
        notes += reader.find_notes(samples)
        notes += [loss] if loss and not is_truncated else []
    if start.size < FRAME:
        yield pad_to_frame(start)
    if is_truncated:
        raise AudioError("truncated", f"{reader.name}: {loss}")


@contextlib.contextmanager
def _open_reader(
    source: SoundFile, rate: int, channels: Channels, limit: int | None
) -> Iterator["_Reader"]:
    check_rate(rate)
    check_channels(channels)
    name = "<bytes>" if isinstance(source, bytes) else printable(source)
    with _open(source, name) as (file, size):
        if size == 0:
            raise AudioError("undecodable", f"{name}: has 0 bytes")
        seconds = None if limit is None else limit / rate
        try:
            sound = Sound(file, size, source, seconds)
        except ForeignError as error:
            raise AudioError("undecodable", f"{name}: {error}") from error
        except DecoderError as error:
            reason = "truncated" if error.truncated else "undecodable"
            raise AudioError(reason, f"{name}: cannot be decoded as sound: {error}") from error
        try:
            if not LOWEST_RATE <= sound.rate <= HIGHEST_RATE:
                raise AudioError("undecodable", f"{name}: states a rate of {sound.rate} Hz")
            yield _Reader(sound, rate, channels, limit, name)
        finally:
            sound.close()


@dataclasses.dataclass
class _Reader:
    """Mixes down, resamples and rounds a sound block by block."""

    sound: Sound
    rate: int
    channels: Channels
    limit: int | None
    name: str
    frames: int = 0
    stopped: bool = False
    at_full_scale: int = 0
    beyond: int = 0
    loudest: float = 0.0
    channel_range: float = 0.0
    low: int = 2**15
    high: int = -(2**15)

    def blocks(self) -> Iterator[Int16[np.ndarray, " n"]]:
        """Yield mono blocks at the wanted rate, until the stream or the limit ends."""
        rate_in = self.sound.rate
        resampler = soxr.ResampleStream(rate_in, self.rate, 1, dtype="float32", quality="HQ")
        count, blocks = 0, self.sound.blocks()
        while not self.stopped:
            block = next(blocks, None)
            if block is not None:
                self._check(block)
            mono = np.zeros(0, np.float32) if block is None else mix_down(block, self.channels)
            if rate_in != self.rate:
                mono = resampler.resample_chunk(mono, last=block is None)
            samples = to_int16(mono)
            if samples.size:
                self.low = min(self.low, int(samples.min()))
                self.high = max(self.high, int(samples.max()))
            yield samples
            if block is None:
                return
            count += mono.size
            self.stopped = self.limit is not None and count >= self.limit

    def _check(self, block: Float32[np.ndarray, "n k"]) -> None:
        if not np.isfinite(block).all():
            row = int(np.flatnonzero(~np.isfinite(block).all(axis=1))[0]) + self.frames
            text = f"{self.name}: sample {row} is NaN or infinite; repair the file"
            raise AudioError("non-finite", text)
        size = np.abs(block)
        self.loudest = max(self.loudest, float(size.max(initial=0.0)))
        if self.loudest > _HUGE:  # differences and sums of such samples overflow
            np.clip(block, -_HUGE, _HUGE, out=block)
        self.channel_range = max(self.channel_range, float(np.ptp(block, axis=0).max(initial=0.0)))
        self.beyond += int(np.count_nonzero(size > 1.0))
        self.at_full_scale += int(np.count_nonzero(size >= 32767 / 32768))
        self.frames += len(block)

    @property
    def clipped(self) -> bool:
        """Whether samples are beyond full scale, or many at it."""
        samples = self.frames * self.sound.channels
        return self.beyond > 0 or self.at_full_scale >= max(1.0, _CLIPPED_SHARE * samples)

    def find_notes(self, samples: int) -> list[str]:
        """Return what is odd with a clip that was read, of `samples` samples at the wanted rate."""
        notes = ["clipped"] if self.clipped else []
        if self.loudest > LOUDEST:
            notes.append(f"full scale is 1, the loudest sample {self.loudest:.3g}")
        if samples < FRAME:
            notes.append(f"padded from {samples} samples")
        if self.high - self.low <= SILENCE:
            notes.append("silent")
            if self.channel_range > SILENCE / 2**15:
                notes.append("channels cancel out")
        return notes + self.sound.notes

    def check_end(self) -> tuple[str, bool]:
        """Return what is missing and whether that is much; see `Sound.describe_loss`.

        Raises:
            AudioError: no sample was read.
        """
        if self.frames == 0:
            if (error := self.sound.error) is None:
                raise AudioError("empty", f"{self.name}: has no samples")
            text = f"{self.name}: cannot be decoded as sound: {error}"
            raise AudioError("undecodable", text)
        return ("", False) if self.stopped else self.sound.describe_loss()


@contextlib.contextmanager
def _open(source: SoundFile, name: str) -> Iterator[tuple[BufferedIOBase, int]]:
    """Open content or a regular file; never blocks on a pipe, a device or a loop of links."""
    if isinstance(source, bytes):
        yield io.BytesIO(source), len(source)
        return
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        _check_regular(os.stat(source).st_mode, name)
        handle = os.open(source, flags)
    except PermissionError as error:
        raise AudioError("permission denied", f"{name}: permission denied") from error
    except (OSError, ValueError) as error:
        if isinstance(error, AudioError):
            raise
        loop = getattr(error, "errno", None) == errno.ELOOP
        text = "a loop of symbolic links" if loop else getattr(error, "strerror", None) or error
        raise AudioError("not a regular file", f"{name}: {text}") from error
    with open(handle, "rb") as file:
        status = os.fstat(file.fileno())
        _check_regular(status.st_mode, name)  # it may have been replaced since
        yield file, status.st_size


def _check_regular(mode: int, name: str) -> None:
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a device or a socket"
        raise AudioError("not a regular file", f"{name}: is {kind}, not a regular file")
