"""The sound of a file: one container, or several that were joined."""

import itertools
from collections.abc import Iterator
from io import BufferedIOBase

import numpy as np
from jaxtyping import Float32

from aatjax.audio.content import find_end, find_sound, inspect_container
from aatjax.audio.streams import DecoderError, ForeignError, SoundFile, Stream, open_stream
from aatjax.audio.tags import skip_tags
from aatjax.errors import format_count
from aatjax.io.foreign import HEAD, describe_foreign

_MOST_PARTS = 1000
_SMALL_SHARE = 0.01
_SMALL_SECONDS = 0.1


class Sound:
    """The sounds that a file holds one after the other, as one stream.

    Joined files are decoded whole if they have one rate and the same channels; what is not decoded
    is noted.

    Args:
        file: an open file, of `size` bytes.
        source: its path, or its content.
        seconds: length after which decoding ends, if any.

    Attributes:
        kind: see `detect_kind`, of the first sound.
        rate: sampling rate in Hz.
        channels: number of channels.
        read: sample frames decoded so far.
        missing: sample frames known to be missing.
        complete: False if something is missing, of a length that is not known.
        error: of the decoder.
        notes: what is odd with the file.

    Raises:
        DecoderError: no decoder reads the file; `truncated` says whether it is cut.
    """

    def __init__(
        self, file: BufferedIOBase, size: int, source: SoundFile, seconds: float | None = None
    ) -> None:
        self._file, self._size, self._source, self._seconds = file, size, source, seconds
        self.read: int = 0
        self.missing: int = 0
        self.complete: bool = True
        self.error: DecoderError | None = None
        self.notes: list[str] = []
        kind, self._start = find_sound(file, size)
        if kind == "other":
            _refuse_foreign(file)
        self._container = inspect_container(file, size, kind, self._start, seconds)
        try:
            self._stream: Stream = open_stream(file, self._container, source)
        except DecoderError as error:
            error.truncated = self._container.share < 1.0
            raise
        self.kind: str = kind
        self.rate: int = self._stream.rate
        self.channels: int = self._stream.channels

    def blocks(self) -> Iterator[Float32[np.ndarray, "n k"]]:
        """Yield (frames, channels) in [-1, 1] of all parts."""
        for part in itertools.count(1):
            before = self.read
            error: DecoderError | None = None
            try:
                for block in self._stream.blocks():
                    self.read += len(block)
                    yield block
            except DecoderError as failure:
                self.error = error = failure
            self._account(self.read - before, error)
            if not self._open_next(part):
                return

    def close(self) -> None:
        self._stream.close()

    def describe_loss(self) -> tuple[str, bool]:
        """Return what is missing, '' for nothing, and whether the clip counts as truncated.

        At most 1 % of the clip and 0.1 s do not.
        """
        if not self.complete:
            return f"truncated {self.read}/? frames", True
        if self.missing == 0:
            return "", False
        whole = self.read + self.missing
        if self.missing <= min(_SMALL_SHARE * whole, _SMALL_SECONDS * self.rate):
            return f"{self.missing} of {whole} frames missing", False
        return f"truncated {self.read}/{whole} frames", True

    def _account(self, read: int, error: DecoderError | None) -> None:
        """Compare the frames read of a part with those that its container states."""
        container, stated = self._container, self._container.frames
        self.notes += container.notes
        if container.counted and self._stream.frames is not None:
            stated = self._stream.frames
        elif stated is None and 0.0 < container.share < 1.0:
            stated = round(read / container.share)
        is_cut = container.share < 1.0 or error is not None
        if stated is not None and stated > read:
            if is_cut or container.counted:
                self.missing += stated - read
        elif is_cut and (stated is None or error is not None or container.kind == "ogg"):
            self.complete = False

    def _open_next(self, part: int) -> bool:
        """Open the sound behind the one that was read, if there is one."""
        position = self._stream.position
        end = find_end(self._file, self._size, self._container, self._start, position)
        end = skip_tags(self._file, max(end, self._start + 1), self._size)
        rest = self._size - end
        if rest <= 0:
            return False
        kind, start = find_sound(self._file, self._size, end)
        if kind == "other":
            self.notes.append(f"{format_count(rest, 'byte')} after the sound not decoded")
            return False
        container = inspect_container(self._file, self._size, kind, start, self._seconds)
        stream: Stream | None = None
        try:
            stream = open_stream(self._file, container, self._source)
            reason = self._find_difference(stream, part)
        except DecoderError as error:
            reason = str(error)
        if stream is None or reason:
            if stream is not None:
                stream.close()
            self.notes.append(
                f"{format_count(rest, 'byte')} of another sound joined to this one not decoded "
                f"({reason})"
            )
            return False
        self._stream.close()
        self._container, self._stream, self._start = container, stream, start
        return True

    def _find_difference(self, stream: Stream, part: int) -> str:
        """Why a sound cannot be joined to those before it, or ''."""
        if part >= _MOST_PARTS:
            return f"more than {format_count(_MOST_PARTS, 'part')}"
        if (stream.rate, stream.channels) != (self.rate, self.channels):
            return f"{stream.rate} Hz, {format_count(stream.channels, 'channel')}"
        return ""


def _refuse_foreign(file: BufferedIOBase) -> None:
    """Refuse what is known to be no sound.

    Raises:
        DecoderError: it names what was found.
    """
    file.seek(0)
    head = file.read(HEAD)
    if head[:3] == b"ID3":
        raise DecoderError("no sound behind its ID3 tag")
    if foreign := describe_foreign(head, "a sound"):
        raise ForeignError(foreign)
