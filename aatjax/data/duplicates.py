"""Duplicate sounds in two parts of a data set, exact or nearly so: such clips leak.

A clip is described by 256 bits: the sign of the difference between neighbouring bands and
neighbouring stretches of time of its log energy, as in Haitsma and Kalker, "A Highly Robust Audio
Fingerprinting System" (ISMIR 2002), but with 17 bands (100-3600 Hz) by 17 stretches laid over the
whole clip. Loudness and a fixed equalisation cancel in those differences. Copies are searched by
locality-sensitive hashing (Indyk and Motwani, STOC 1998): bits drawn at random must agree, then
all are counted.

The threshold of 0.2 was measured on ESC-10 (folds 1-4), ESC-50's other classes (fold 4), Speech
Commands v0.01 (300 clips) and the Free Spoken Digit Dataset (2500). Of the 5.9 million pairs among
them it reports one, two clips of ESC-10 with different names for their recording and samples that
correlate by 0.97; the next nearest have distance 0.21 (one digit, one speaker, two recordings),
0.29 (different speakers) and 0.33 (environmental sounds). Of 100 clips of each set, changed, it
finds 99-100 % after -6 dB, -20 dB or 8 kHz and back; 99-100 % after Ogg Vorbis and 96-100 % after
MP3 (at the lowest quality 95-100 % and 94-99 %); 97-100 % without the first 10 ms; but only 14-66 %
with noise at 20 dB, where quiet ends no longer differ from the sound. A shorter excerpt of a clip,
or one moved by more than about a hundredth of its length, is often not found.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float64, Int, Int16, UInt8

from aatjax.audio.fbank import hertz_to_mel
from aatjax.data.source import Progress, Source
from aatjax.errors import UsageError
from aatjax.io.digest import hash_bytes
from aatjax.io.threads import map_threads

THRESHOLD = 0.2
"""Share of differing bits up to which two clips count as the same."""
HIGHEST_THRESHOLD = 0.3
HASH_BYTES = 32

RATE = 16000
FRAME = 512
HOP = 64
BLOCK = 4096  # frames transformed at a time, so that memory does not grow with the clip
CELLS = 17  # bands, and stretches of time; one fewer difference along each
LOW_HZ, HIGH_HZ = 100.0, 3600.0  # what survives 8 kHz and lossy coding
QUIET = 1e-5  # frames 50 dB below the loudest one are cut off at both ends
FLOOR = 1e-6  # energy added everywhere: 60 dB below the strongest cell
SHORTEST = 1 + (RATE // 10 - FRAME) // HOP  # frames in 0.1 s
LEVEL = 1e-3  # smallest informative difference of log energies
MOST_LEVEL = 0.25  # a hash with a larger share of smaller differences is not compared
MOST_SIMPLE = 0.75  # nor one whose first two singular vectors hold more (beeps); real: up to 0.71

MISSED = 1e-3  # chance that the search misses a pair that lies exactly at the threshold
WINDOW = 32  # clips of one bucket that each clip is compared with
NEAREST = 16  # near pairs kept for each distinct hash
FEW = 32  # of up to 32 equal clips, all pairs are reported


@dataclass(frozen=True, slots=True)
class Duplicate:
    """Two clips of different parts that hold the same sound.

    Attributes:
        first, second: clip ids, in the order of the source.
        parts: the part of the first and of the second.
        distance: share of differing bits, from 0; two unrelated sounds are near 0.5.
        exact: whether the samples are identical, zeros at the ends apart.
    """

    first: str
    second: str
    parts: tuple[str, str]
    distance: float
    exact: bool


def hash_audio(samples: Int16[np.ndarray, " s"]) -> bytes | None:
    """Return bits that stay nearly the same under gain, lossy coding and resampling.

    Args:
        samples: mono, 16 kHz.

    Returns:
        32 bytes, or None for sounds that cannot be distinguished: silence, less than 0.1 s of
        sound, a spectrum that does not change, or one as simple as that of clean beeps.
    """
    energy = _compute_band_energy(_trim_zeros(samples))
    total = energy.sum(axis=1)
    loud = np.flatnonzero(total > QUIET * total.max(initial=0.0))
    if not loud.size or loud[-1] - loud[0] + 1 < SHORTEST:
        return None
    energy = energy[loud[0] : loud[-1] + 1]
    cells = _weigh_stretches(len(energy)) @ energy
    level = np.log(cells + FLOOR * cells.max())
    change = np.diff(np.diff(level, axis=1), axis=0)
    if np.mean(np.abs(change) < LEVEL) > MOST_LEVEL:
        return None
    bits = change > 0
    strength = np.linalg.svd(np.where(bits, 1.0, -1.0), compute_uv=False) ** 2
    if strength[:2].sum() > MOST_SIMPLE * bits.size:
        return None
    return np.packbits(bits).tobytes()


def hash_samples(samples: Int16[np.ndarray, " s"]) -> str:
    """Return a SHA-256 of the samples without zeros at the ends; '' for silence or under 32 ms."""
    inner = _trim_zeros(samples)
    if inner.size < FRAME or np.all(inner == inner[0]):
        return ""
    return hash_bytes(inner.astype("<i2").tobytes())


def fingerprint_clips(
    source: Source, *, workers: int = 2, progress: Progress | None = None
) -> tuple[list[bytes | None], list[str]]:
    """Read every clip once and hash its sound.

    Args:
        source: the clips.
        workers: number of threads.
        progress: called after each clip, with the stage `compare`.

    Returns:
        `hash_audio` and `hash_samples` of each clip, in the order of the source.

    Raises:
        UsageError: fewer than one worker.
        DataError: a sound cannot be read; the message names it.
    """

    def hash_clip(i: int) -> tuple[bytes | None, str]:
        samples = source.waveform(i)
        return hash_audio(samples), hash_samples(samples)

    hashes: list[bytes | None] = []
    exact: list[str] = []
    for near, same in map_threads(hash_clip, len(source), workers=workers):
        hashes.append(near)
        exact.append(same)
        if progress is not None:
            progress("compare", len(exact), len(source))
    return hashes, exact


def find_duplicates(
    ids: Sequence[str],
    parts: Sequence[str | None],
    hashes: Sequence[bytes | None],
    exact: Sequence[str],
    *,
    threshold: float = THRESHOLD,
) -> list[Duplicate]:
    """Return pairs of clips in different parts that sound the same, the nearest first.

    The list stays short however many clips are alike: of more than 32 clips with equal hashes each
    is reported once, against the first clip of another part, and each distinct hash is compared
    with its 16 nearest. A pair at the threshold is missed with probability 0.001, closer ones less.

    Args:
        ids: clip ids.
        parts: the fold or split of each clip; a clip with None is in no pair.
        hashes: from `hash_audio`; None matches nothing.
        exact: from `hash_samples`; '' matches nothing.
        threshold: share of differing bits up to which two clips are the same, from 0 to 0.3.

    Raises:
        UsageError: lists or hashes of different lengths, or a threshold out of range.
    """
    counts = [len(column) for column in (ids, parts, hashes, exact)]
    if len(set(counts)) > 1:
        text = "{} ids, {} parts, {} hashes and {} exact hashes; give one of each for every clip"
        raise UsageError(text.format(*counts))
    if not 0 <= threshold <= HIGHEST_THRESHOLD:
        raise UsageError(f"threshold is {threshold:g}; it must be from 0 to {HIGHEST_THRESHOLD:g}")
    if any(h is not None and len(h) != HASH_BYTES for h in hashes):
        raise UsageError(f"a hash is not {HASH_BYTES} bytes long; use hash_audio")

    equal: dict[bytes, list[int]] = defaultdict(list)
    same: dict[str, list[int]] = defaultdict(list)
    for i, (part, sound, digest) in enumerate(zip(parts, hashes, exact, strict=True)):
        if part is not None and sound is not None:
            equal[sound].append(i)
        if part is not None and digest:
            same[digest].append(i)
    pairs: set[tuple[int, int]] = set()
    for clips in [*same.values(), *equal.values()]:
        pairs.update(_pair_clips(clips, clips, parts))

    groups = list(equal.values())
    if len(groups) > 1:
        bits = np.frombuffer(b"".join(equal), np.uint8).reshape(-1, HASH_BYTES)
        for u, v in _search_near(bits, _number_parts(groups, parts), threshold):
            pairs.update(_pair_clips(groups[u], groups[v], parts))

    found: list[tuple[bool, float, int, int]] = []
    for i, j in pairs:
        differ = exact[i] == "" or exact[i] != exact[j]
        found.append((differ, _compute_distance(hashes[i], hashes[j]) if differ else 0.0, i, j))
    return [
        Duplicate(ids[i], ids[j], (str(parts[i]), str(parts[j])), distance, not differ)
        for differ, distance, i, j in sorted(found)
    ]


def _trim_zeros(samples: Int16[np.ndarray, " s"]) -> Int16[np.ndarray, " n"]:
    sound = np.flatnonzero(samples)
    return samples[sound[0] : sound[-1] + 1] if sound.size else samples[:0]


@lru_cache(maxsize=1)
def _make_filters() -> Float64[np.ndarray, "f k"]:
    """Triangular filters on the mel axis, (FFT bins, bands)."""
    low, high = hertz_to_mel(np.array([LOW_HZ, HIGH_HZ]))
    edges = np.linspace(low, high, CELLS + 2)
    bins = hertz_to_mel(np.arange(FRAME // 2 + 1) * (RATE / FRAME))
    rising = (bins[:, None] - edges[None, :-2]) / (edges[1] - edges[0])
    return np.maximum(0.0, np.minimum(rising, 2.0 - rising))


def _compute_band_energy(samples: Int16[np.ndarray, " s"]) -> Float64[np.ndarray, "t k"]:
    count = 0 if samples.size < FRAME else 1 + (samples.size - FRAME) // HOP
    energy = np.zeros((count, CELLS))
    for start in range(0, count, BLOCK):
        stop = min(start + BLOCK, count)
        block = samples[start * HOP : (stop - 1) * HOP + FRAME].astype(np.float64)
        frames = np.lib.stride_tricks.sliding_window_view(block, FRAME)[::HOP]
        frames = (frames - frames.mean(axis=1, keepdims=True)) * np.hanning(FRAME)
        energy[start:stop] = np.abs(np.fft.rfft(frames)) ** 2 @ _make_filters()
    return energy


def _weigh_stretches(frames: int) -> Float64[np.ndarray, "k t"]:
    """Weights of the frames in each stretch of time: triangles that reach the next centres."""
    position = (np.arange(frames) + 0.5) * (CELLS / frames)
    centre = np.arange(CELLS)[:, None] + 0.5
    weights = np.maximum(0.0, 1.0 - np.abs(position[None] - centre))
    return weights / weights.sum(axis=1, keepdims=True)


def _pair_clips(
    left: Sequence[int], right: Sequence[int], parts: Sequence[str | None]
) -> Iterator[tuple[int, int]]:
    """Pairs (i < j) across parts: all of few, else each clip with the first of another part."""
    if len(left) * len(right) <= FEW * FEW:
        chosen = [(i, j) for i in left for j in right]
    else:
        chosen = []
        for clips, others in ((left, right), (right, left)):
            first = others[0]
            second = next((j for j in others if parts[j] != parts[first]), first)
            chosen += [(i, first if parts[i] != parts[first] else second) for i in clips]
    return ((min(i, j), max(i, j)) for i, j in chosen if parts[i] != parts[j])


def _number_parts(
    groups: Sequence[Sequence[int]], parts: Sequence[str | None]
) -> Int[np.ndarray, " g"]:
    """A number for the part of each group of clips; -1 for a group in several parts."""
    numbers = {part: k for k, part in enumerate(dict.fromkeys(parts))}
    found = [{numbers[parts[i]] for i in clips} for clips in groups]
    return np.array([where.pop() if len(where) == 1 else -1 for where in found])


def _search_near(
    bits: UInt8[np.ndarray, "g w"], part: Int[np.ndarray, " g"], threshold: float
) -> list[tuple[int, int]]:
    """Pairs of distinct hashes, not all of one part, that differ in few enough bits.

    Random choices of about log2(hashes) bits are repeated until a pair at the threshold is missed
    with probability `MISSED`. Within one bucket a hash is compared with the next `WINDOW` only,
    which bounds time and memory.
    """
    count = len(bits)
    order = np.lexsort(bits.T[::-1])  # neighbours in a bucket are then close to each other
    bits, part = bits[order], part[order]
    flags = np.unpackbits(bits, axis=1)
    width = int(np.clip(math.ceil(math.log2(count)), 8, 20))
    agree = (1 - threshold) ** width
    tables = math.ceil(math.log(MISSED) / math.log1p(-agree)) if agree < 1 else 1
    rng = np.random.default_rng(0)
    weights = 1 << np.arange(width, dtype=np.int32)
    found = np.zeros(0, np.int64)
    for _ in range(tables):
        keys = flags[:, rng.choice(flags.shape[1], width, replace=False)] @ weights
        within = np.argsort(keys, kind="stable")
        keys = keys[within]
        new = [found]
        for step in range(1, min(WINDOW, count - 1) + 1):
            together = np.flatnonzero(keys[step:] == keys[:-step])
            if not together.size:
                break
            u, v = within[together], within[together + step]
            apart = (part[u] != part[v]) | (part[u] < 0)
            u, v = u[apart], v[apart]
            close = _count_differing(bits, u, v) <= threshold * flags.shape[1] + 1e-9
            new.append(u[close] * count + v[close])
        found = np.unique(np.concatenate(new))
        if found.size > NEAREST * count:
            found = found[_keep_nearest(bits, found)]
    found = found[_keep_nearest(bits, found)]
    return list(zip(order[found // count].tolist(), order[found % count].tolist(), strict=True))


def _count_differing(
    bits: UInt8[np.ndarray, "g w"], u: Int[np.ndarray, " p"], v: Int[np.ndarray, " p"]
) -> Int[np.ndarray, " p"]:
    return np.bitwise_count(bits[u] ^ bits[v]).sum(axis=1, dtype=np.int64)


def _keep_nearest(
    bits: UInt8[np.ndarray, "g w"], found: Int[np.ndarray, " p"]
) -> Bool[np.ndarray, " p"]:
    """Which pairs are among the `NEAREST` of one of their two hashes."""
    u, v = found // len(bits), found % len(bits)
    distance = _count_differing(bits, u, v)
    keep = np.zeros(found.size, bool)
    ends = np.concatenate([u, v])
    order = np.lexsort((np.concatenate([distance, distance]), ends))
    ends = ends[order]
    rank = np.arange(ends.size) - np.searchsorted(ends, ends)
    keep[order[rank < NEAREST] % max(1, found.size)] = True
    return keep


def _compute_distance(one: bytes | None, other: bytes | None) -> float:
    if one is None or other is None:
        return 1.0
    differing = int.from_bytes(one, "big") ^ int.from_bytes(other, "big")
    return differing.bit_count() / (8 * HASH_BYTES)
