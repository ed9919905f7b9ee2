"""Clips cut into windows of the model's length: each window is a clip of its own in a source.

A source of clips that fit is returned as it is. Caches, batches and length buckets then work on
windows as they do on clips.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float32, Int, Int16

from aatjax.audio.fbank import count_samples
from aatjax.audio.frontend import FrontEnd
from aatjax.audio.scoring import SILENCE, Scoring, explain_unscored, is_silent, pool_clips
from aatjax.audio.waveform import FRAME
from aatjax.audio.windows import RATE, compute_step, find_starts
from aatjax.data.source import Clip, Reader, Source

TrainWindows = Literal["every", "start", "random"]
"""What training reads of a clip longer than the input, see `Data.windows`."""

HELD = 2**28
"""Bytes of samples that are held after the first reading, 2.3 hours: reading may decode a file."""
LATEST = 4
"""Clips beyond these bytes that are held while their windows are read."""


@dataclasses.dataclass(frozen=True)
class _Part:
    """One window: the clip it is of, and its first and last sample (frames of log-mel)."""

    clip: Clip
    start: int
    end: int


class _WindowReader(Reader):
    """Reads windows, and clips that fit; holds the samples of the first and the latest clips."""

    def __init__(self, reader: Reader) -> None:
        self.parts: dict[str, _Part] = {}
        self._reader = reader
        self._first: dict[str, np.ndarray] = {}
        self._latest: collections.OrderedDict[str, np.ndarray] = collections.OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def read(self, clip: Clip) -> Int16[np.ndarray, " s"]:
        part = self.parts.get(clip.id)
        if part is None:
            return self._read_whole(clip)
        return self._read_whole(part.clip)[part.start : part.end]

    def _read_whole(self, clip: Clip) -> np.ndarray:
        with self._lock:
            held = self._first.get(clip.id, self._latest.get(clip.id))
        if held is not None:
            return held
        found = self._reader.read(clip)
        with self._lock:
            if isinstance(found, np.memmap):  # holding it would hold an open file
                return found
            if self._bytes + found.nbytes <= HELD:
                self._first[clip.id] = found
                self._bytes += found.nbytes
                return found
            self._latest[clip.id] = found
            if len(self._latest) > LATEST:
                self._latest.popitem(last=False)
        return found

    def read_log_mel(self, clip: Clip) -> Float32[np.ndarray, "t f"] | None:
        part = self.parts.get(clip.id)
        if part is None:
            return self._reader.read_log_mel(clip)
        whole = self._reader.read_log_mel(part.clip)
        return None if whole is None else whole[part.start : part.end]

    def key(self, clip: Clip) -> str | None:
        part = self.parts.get(clip.id)
        if part is None:
            return self._reader.key(clip)
        whole = self._reader.key(part.clip)
        return None if whole is None else f"{whole} {part.start}:{part.end}"


@dataclasses.dataclass(frozen=True)
class ClipWindows:
    """The windows of the clips of a source.

    Attributes:
        clips: the source that was cut.
        windows: its windows, in the order of clips and time; the source itself where every clip
            is one window.
        owner: the clip of each window.
        lengths: samples of each window.
        sounding: whether each window holds sound.
        samples: samples of each clip.
        covered: samples of each clip that lie in a window.
    """

    clips: Source
    windows: Source
    owner: Int[np.ndarray, " w"]
    lengths: Int[np.ndarray, " w"]
    sounding: Bool[np.ndarray, " w"]
    samples: Int[np.ndarray, " n"]
    covered: Int[np.ndarray, " n"]

    @property
    def scored(self) -> Bool[np.ndarray, " n"]:
        """Whether each clip has a score."""
        found = np.zeros(len(self.clips), bool)
        found[self.owner[self.sounding]] = True
        pairs = zip(self.samples, found, strict=True)
        return np.array([explain_unscored(int(n), bool(has)) is None for n, has in pairs])

    def pool(self, logits: Float32[np.ndarray, "w c"], scoring: Scoring) -> np.ndarray:
        """Return the logits of the clips `[n, c]` from those of the windows; NaN for unscored."""
        pooled = pool_clips(
            scoring,
            logits,
            self.owner,
            self.lengths,
            self.sounding,
            len(self.clips),
            self.clips.multi_label,
        )
        pooled[~self.scored] = np.nan
        return pooled

    def list_logits(
        self, logits: Float32[np.ndarray, "w c"]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return logits and lengths of the windows with sound, per clip."""
        borders = np.searchsorted(self.owner, np.arange(1, len(self.clips)))
        parts = np.split(np.arange(len(self.owner)), borders)
        rows = [part[self.sounding[part]] for part in parts]
        return [(logits[row], self.lengths[row]) for row in rows]

    def average(self, vectors: Float32[np.ndarray, "w d"]) -> Float32[np.ndarray, "n d"]:
        """Return the mean over the windows of each clip, weighted by their length."""
        total = np.zeros((len(self.clips), vectors.shape[1]))
        np.add.at(total, self.owner, vectors * self.lengths[:, None])
        sizes = np.bincount(self.owner, self.lengths, len(self.clips))
        return (total / sizes[:, None]).astype(np.float32)

    def measure_used(self, scoring: Scoring) -> float:
        """Return the share of the samples of all clips that lies in windows that are scored."""
        if scoring.pooling == "first":
            used = self.lengths[np.unique(self.owner, return_index=True)[1]]
        else:
            used = self.covered
        return float(used.sum() / max(1, self.samples.sum()))

    def compute_weights(self) -> Float32[np.ndarray, " w"]:
        """Return the weight of each window in training, 1 on average; a clip counts once."""
        total = np.bincount(self.owner, self.lengths, len(self.clips))
        share = self.lengths / total[self.owner]
        return (share * len(share) / len(self.clips)).astype(np.float32)


def cut_clips(
    source: Source, frontend: FrontEnd, scoring: Scoring, *, train: bool = False
) -> ClipWindows:
    """Cut the clips of a source into windows of the front end's length.

    Each clip is read once, to find its length and the windows without sound; where its reader keeps
    what is known of it (`Reader.recall`), it is not read again at the next start.

    Args:
        source: clips of any length.
        frontend: gives the length of a window.
        scoring: gives the hop, and whether only the first window counts.
        train: for training: no overlap, and no windows without sound of clips that have others.
    """
    step = compute_step(frontend.samples, None if train else scoring.hop)
    first = scoring.pooling == "first" and not train
    reader = _WindowReader(source.reader)
    whole = source.with_clips(source.clips, reader=reader)
    clips: list[Clip] = []
    owner, lengths, sounding = [], [], []
    samples, covered = (np.zeros(len(source), np.int64) for _ in range(2))
    name = f"sound in windows of {frontend.samples} every {step}, above {SILENCE}"
    known = source.reader.recall(name, source.clips)
    fresh: dict[str, list[Any]] = {}
    read: dict[str, list[Any]] = {}  # by what identifies the samples, of which copies have one
    for row, clip in enumerate(source.clips):
        to_samples, rate = _identity, RATE
        key = source.reader.key(clip) if clip.id not in known else None
        if (fact := known.get(clip.id) or read.get(key or "")) is not None:
            length, audible = fact
            spans = _find_spans(length, frontend.samples, step, FRAME)
        elif (log_mel := whole.log_mel(row)) is not None:
            length, to_samples, rate = len(log_mel), count_samples, LOG_MEL_RATE
            frames = max(1, round(step * frontend.frames / frontend.samples))
            spans = _find_spans(length, frontend.frames, frames, 1)
            audible = [True] * len(spans)
        else:
            sound = whole.waveform(row)
            length = len(sound)
            spans = _find_spans(length, frontend.samples, step, FRAME)
            audible = [not is_silent(sound[start:end]) for start, end in spans]
            fresh[clip.id] = [length, audible]
            if key is not None:
                read[key] = fresh[clip.id]
        samples[row] = to_samples(length)
        if (train or first) and any(audible):
            spans = [span for span, has in zip(spans, audible, strict=True) if has]
            audible = [True] * len(spans)
        if first:
            spans, audible = spans[:1], audible[:1]
        covered[row] = to_samples(_measure_union(spans))
        sounding += audible
        owner += [row] * len(spans)
        lengths += [to_samples(end - start) for start, end in spans]
        for start, end in spans:
            part = clip
            if (start, end) != (0, length):
                part = dataclasses.replace(clip, id=f"{clip.id}@{start / rate:.3f}s")
                reader.parts[part.id] = _Part(clip, start, end)
            clips.append(part)
    source.reader.remember(name, fresh)
    windows = whole.with_clips(clips) if reader.parts else whole
    arrays = (np.array(owner), np.array(lengths), np.array(sounding))
    return ClipWindows(source, windows, *arrays, samples, covered)


LOG_MEL_RATE = 100  # frames per second


def _identity(samples: int) -> int:
    return samples


def _find_spans(length: int, size: int, step: int, shortest: int) -> list[tuple[int, int]]:
    """Return the windows of a clip, as first and last sample (frame of log-mel)."""
    starts = find_starts(length, size, step, shortest)
    return [(start, min(start + size, length)) for start in starts]


def _measure_union(spans: Sequence[tuple[int, int]]) -> int:
    """Return the samples that lie in one of the windows, which are in the order of time."""
    if len(spans) == 1:
        return spans[0][1] - spans[0][0]
    following = [start for start, _ in spans[1:]] + [spans[-1][1]]
    return sum(
        min(end, after) - start for (start, end), after in zip(spans, following, strict=True)
    )
