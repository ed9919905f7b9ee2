"""Decoders that yield blocks of float32 samples: libsndfile, and ffmpeg for other formats."""

import contextlib
import io
import os
from collections.abc import Iterator
from io import BufferedIOBase
from typing import Any, Protocol, runtime_checkable

import numpy as np
import soundfile
from jaxtyping import Float32

from aatjax.audio.containers import Container
from aatjax.errors import UnavailableError
from aatjax.io.optional import need

_BLOCK_SAMPLES = 1 << 17

SoundFile = str | os.PathLike[str] | bytes
"""The path of a sound file, or its content."""


class DecoderError(Exception):
    """A decoder failed; blocks before it are good."""


@runtime_checkable
class Stream(Protocol):
    """A clip being decoded.

    Attributes:
        rate: sampling rate in Hz.
        channels: number of channels.
        frames: sample frames that the decoder expects, None if not known.
    """

    rate: int
    channels: int
    frames: int | None

    def blocks(self) -> Iterator[Float32[np.ndarray, "n k"]]:
        """Yield (frames, channels) in [-1, 1]; raise DecoderError after the last good block."""
        ...

    def close(self) -> None: ...


def open_stream(file: BufferedIOBase, container: Container, source: SoundFile) -> Stream:
    """Open a decoder by content.

    Raises:
        DecoderError: no decoder reads the content.
    """
    try:
        return _Sndfile(SplicedFile(file, *(container.splice or (b"", 0))))
    except (soundfile.SoundFileError, RuntimeError, TypeError, ValueError) as error:
        file.seek(0)
        if not _needs_ffmpeg(file.read(16), container):
            raise DecoderError(_clean(error)) from error
    return _open_ffmpeg(source)


class _Sndfile:
    """libsndfile on a Python file object."""

    def __init__(self, file: Any) -> None:
        self._sound = soundfile.SoundFile(file)
        self.rate: int = self._sound.samplerate
        self.channels: int = self._sound.channels
        frames = self._sound.frames
        self.frames: int | None = frames if 0 < frames < 1 << 62 else None

    def blocks(self) -> Iterator[Float32[np.ndarray, "n k"]]:
        size = max(1024, _BLOCK_SAMPLES // self.channels)
        while True:
            block = np.full((size, self.channels), np.nan, np.float32)
            try:
                # Not `read`: it stops at the frame count, an estimate for some MP3 files.
                got = self._sound.buffer_read_into(block, "float32")
            except (soundfile.SoundFileError, RuntimeError) as error:
                # Only integer codecs end with an error: what is still NaN was not decoded.
                bad = np.isnan(block).any(axis=1)
                good = int(bad.argmax()) if bad.any() else size
                if good:
                    yield block[:good]
                raise DecoderError(_clean(error)) from error
            if got:
                yield block[:got]
            if got < size:
                return

    def close(self) -> None:
        self._sound.close()


class SplicedFile(BufferedIOBase):
    """A file whose first bytes are replaced: `head`, then the file from `start` on.

    It never raises for a bad offset: libsndfile seeks to some in damaged files, and an exception
    cannot pass through its callbacks.
    """

    def __init__(self, file: BufferedIOBase, head: bytes, start: int) -> None:
        self._file, self._head, self._start = file, head, start
        self._size = len(head) + file.seek(0, io.SEEK_END) - start
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_CUR: self._at, io.SEEK_END: self._size}.get(whence, 0)
        self._at = min(max(0, base + offset), self._size)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        data = self._head[self._at : self._at + len(buffer)]
        if len(data) < len(buffer):
            self._file.seek(self._start + self._at + len(data) - len(self._head))
            data += self._file.read(len(buffer) - len(data))
        memoryview(buffer)[: len(data)] = data
        self._at += len(data)
        return len(data)


def _needs_ffmpeg(head: bytes, container: Container) -> bool:
    """Whether a format needs ffmpeg; no other reaches it, since it also follows playlists."""
    return (
        head[4:8] == b"ftyp"  # MP4, M4A
        or head[:4] == b"\x1a\x45\xdf\xa3"  # Matroska, WebM
        or head[:4] == b"\x30\x26\xb2\x75"  # WMA
        or (len(head) > 1 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0)  # AAC
        or (container.kind == "wav" and container.share == 1.0 and container.frames is None)
    )


def _open_ffmpeg(source: SoundFile) -> Stream:
    if isinstance(source, bytes):
        raise DecoderError("this format needs ffmpeg, which reads files only: save it to a file")
    try:
        need("audioread", extra="formats")
    except UnavailableError as error:
        raise DecoderError(str(error)) from error
    from audioread import ffdec

    if not ffdec.available():
        raise DecoderError(
            "this format needs ffmpeg: install it, or convert the file to FLAC or WAV"
        )
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
