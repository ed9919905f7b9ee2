"""Decoders that yield blocks of float32 samples: libsndfile, and ffmpeg for other formats."""

import contextlib
import io
import os
from collections.abc import Iterator
from io import BufferedIOBase
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import soundfile
from jaxtyping import Float32

from aatjax.audio.containers import FFMPEG, Container, SplicedFile
from aatjax.audio.quiet import silence_libraries
from aatjax.errors import UnavailableError
from aatjax.io.optional import need

_BLOCK_SAMPLES = 1 << 17

SoundFile = str | os.PathLike[str] | bytes
"""The path of a sound file, or its content."""


class DecoderError(Exception):
    """A decoder failed; blocks before it are good.

    Attributes:
        truncated: the file is cut.
    """

    truncated: bool = False


class ForeignError(DecoderError):
    """The content is no sound, whatever the file is called."""


@runtime_checkable
class Stream(Protocol):
    """A clip being decoded.

    Attributes:
        rate: sampling rate in Hz.
        channels: number of channels.
        frames: sample frames that the decoder expects, None if not known.
        position: bytes that the decoder has read.
    """

    rate: int
    channels: int
    frames: int | None

    @property
    def position(self) -> int: ...

    def blocks(self) -> Iterator[Float32[np.ndarray, "n k"]]:
        """Yield (frames, channels) in [-1, 1]; raise DecoderError after the last good block."""
        ...

    def close(self) -> None: ...


def open_stream(file: BufferedIOBase, container: Container, source: SoundFile) -> Stream:
    """Open a decoder by content.

    Raises:
        DecoderError: no decoder reads the content.
    """
    if container.kind in FFMPEG:
        return _open_ffmpeg(source, FFMPEG[container.kind])
    pieces = container.pieces
    spliced = SplicedFile(file, ((0, file.seek(0, io.SEEK_END)),) if pieces is None else pieces)
    try:
        return _Sndfile(spliced, container.kind)
    except (soundfile.SoundFileError, RuntimeError, TypeError, ValueError) as error:
        if not container.needs_ffmpeg:
            raise DecoderError(_clean(error)) from error
    return _open_ffmpeg(source, "WAV of this codec")


class _Sndfile:
    """libsndfile on a Python file object."""

    def __init__(self, file: SplicedFile, kind: str) -> None:
        self._file = file
        is_quiet = kind not in ("mp3", "other")
        self._screen = contextlib.nullcontext if is_quiet else silence_libraries
        with self._screen():
            self._sound = soundfile.SoundFile(cast(Any, file))
        if kind == "other" and self._sound.format == "MP3":
            self._sound.close()
            raise ValueError("no two MP3 frames follow one another")
        self.rate: int = self._sound.samplerate
        self.channels: int = self._sound.channels
        frames = self._sound.frames
        self.frames: int | None = frames if 0 < frames < 1 << 62 else None
        # Behind its last frame libsndfile would take a tag for a damaged one.
        self._last = self.frames if kind == "flac" else None

    @property
    def position(self) -> int:
        return self._file.tell()

    def blocks(self) -> Iterator[Float32[np.ndarray, "n k"]]:
        size = max(1024, _BLOCK_SAMPLES // self.channels)
        done = 0
        while self._last is None or done < self._last:
            size = size if self._last is None else min(size, self._last - done)
            block = np.full((size, self.channels), np.nan, np.float32)
            try:
                # Not `read`: it stops at the frame count, an estimate for some MP3 files.
                with self._screen():
                    got = self._sound.buffer_read_into(block, "float32")
            except (soundfile.SoundFileError, RuntimeError) as error:
                # Only integer codecs end with an error: what is still NaN was not decoded.
                bad = np.isnan(block).any(axis=1)
                good = int(bad.argmax()) if bad.any() else size
                if good:
                    yield block[:good]
                raise DecoderError(_clean(error)) from error
            done += got
            if got:
                yield block[:got]
            if got < size:
                return

    def close(self) -> None:
        self._sound.close()


def _open_ffmpeg(source: SoundFile, name: str) -> Stream:
    """Open ffmpeg; no other format reaches it, since it also follows playlists."""
    if isinstance(source, bytes):
        raise DecoderError(f"{name} needs ffmpeg, which reads files only: save it to a file")
    try:
        need("audioread", extra="formats")
    except UnavailableError as error:
        raise DecoderError(str(error)) from error
    from audioread import ffdec

    if not ffdec.available():
        raise DecoderError(f"{name} needs ffmpeg: install it, or convert the file to FLAC or WAV")
    try:
        return _Ffmpeg(ffdec.FFmpegAudioFile(os.path.abspath(source)))
    except (ffdec.FFmpegError, OSError, ValueError) as error:
        raise DecoderError(f"ffmpeg: {_clean(error)}") from error


class _Ffmpeg:
    """16-bit PCM from an ffmpeg process, through audioread."""

    def __init__(self, process: Any) -> None:
        self._process = process
        self.rate = int(process.samplerate)
        self.channels = int(process.channels)
        self.frames: int | None = None
        self.position = 0
        if self.channels < 1:
            self.close()
            raise ValueError("no sound in the file")

    def blocks(self) -> Iterator[Float32[np.ndarray, "n k"]]:
        step = 2 * self.channels
        rest = b""
        from audioread import DecodeError

        try:
            for data in self._process.read_data():
                data = rest + data
                whole = len(data) // step * step
                rest = data[whole:]
                pcm = np.frombuffer(data[:whole], "<i2").reshape(-1, self.channels)
                yield pcm.astype(np.float32) / 32768.0
        except (DecodeError, OSError) as error:
            raise DecoderError(f"ffmpeg: {_clean(error)}") from error

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._process.close()


def _clean(error: Exception) -> str:
    """Return a decoder's message without the address of the file object."""
    text = getattr(error, "error_string", None) or str(error) or type(error).__name__
    text = " ".join(str(text).split()).rstrip(".")
    # libsndfile's message for an MP3 that is too short.
    return "Format not recognised" if text.startswith("File does not exist") else text
