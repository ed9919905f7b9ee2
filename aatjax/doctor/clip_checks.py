"""Measurements and findings of single clips."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float32, Int16

from aatjax.audio.decode import AudioError, decode
from aatjax.audio.fbank import FRAME, HOP, count_frames
from aatjax.audio.sound import Sound
from aatjax.audio.waveform import mix_down
from aatjax.data.source import Clip, Source
from aatjax.doctor.findings import ClipMeasurements, Finding, Item
from aatjax.errors import AatjaxError, printable

RATE = 16000
BAND_END = 8000  # Hz, half of the front end's rate
LONGEST = 60  # seconds of a file that are measured at its own rate
WINDOW = 2048  # samples of a spectrum
FULL = 32767 / 32768
SILENCE = 1e-6  # power of a frame at -60 dB of full scale

CLIPPED = 1e-3
UNSCALED = 4.0
OFFSET = 0.05
FAINT = 10 ** (-50 / 20)
CANCELLED = 0.01
HIGH = 0.5

FORMATS = {
    "wav": {".wav", ".wave", ".rf64", ".bwf"},
    "w64": {".w64"},
    "flac": {".flac"},
    "ogg": {".ogg", ".oga", ".opus"},
    "mp3": {".mp3"},
    "aiff": {".aif", ".aiff", ".aifc"},
    "au": {".au", ".snd"},
}
"""Extensions of the formats that are recognised by their first bytes."""


def measure_clip(
    source: Source, index: int
) -> tuple[ClipMeasurements, Int16[np.ndarray, " s"] | None]:
    """Decode and measure one clip; one that cannot be decoded has a problem instead.

    Args:
        source: the clips.
        index: of the clip.

    Returns:
        The measurements, without those of `fit_measurements`, and the samples at 16 kHz used in
        training; None where there are none.
    """
    clip = source.clips[index]
    try:
        samples, notes, measured = _decode_clip(source, index)
    except MemoryError:
        raise
    except Exception as error:  # one file must not stop the checks
        return _describe_failure(clip, error), None
    problem, detail, short = _parse_notes(notes)
    size = samples.size if short is None else short
    scaled = samples.astype(np.float32) / 32768
    power = float(np.mean(np.square(scaled, dtype=np.float64)))
    # Resampling a constant leaves a ripple at its ends, so the original counts too.
    constant = bool(samples.min() == samples.max())
    constant = (measured.pop("constant") and size <= LONGEST * RATE) or constant
    return ClipMeasurements(
        id=clip.id,
        path=clip.path,
        problem=problem,
        detail=detail,
        seconds=size / RATE,
        level=10 * float(np.log10(max(power, 1e-20))),
        silence=_measure_silence(scaled),
        constant=constant,
        short=short,
        **measured,
    ), samples


def fit_measurements(measured: ClipMeasurements, frames: int) -> ClipMeasurements:
    """Add what depends on the input of the model: how much of it is padding, and what is cut.

    Args:
        measured: from `measure_clip`.
        frames: input length of the model in 10 ms frames.
    """
    if measured.seconds is None:
        return measured
    present = max(1, count_frames(round(RATE * measured.seconds)))
    padding = max(0.0, 1.0 - present / frames)
    return replace(measured, padding=padding, beyond=max(0.0, (present - frames) * HOP / RATE))


def _decode_clip(
    source: Source, index: int
) -> tuple[Int16[np.ndarray, " s"], tuple[str, ...], dict[str, Any]]:
    """A clip as training reads it, notes of the decoder, and measurements of the original."""
    clip = source.clips[index]
    if clip.path is not None:
        found = decode(clip.path, truncated="keep")
        measured = {"rate": found.source_rate, "channels": found.channels}
        return found.waveform, found.notes, measured | measure_original(clip.path)
    samples = source.waveform(index)
    notes = tuple(note for id, note in source.notes if id == clip.id)
    blocks = iter([samples[:, None].astype(np.float32) / 32768])
    return samples, notes, {"rate": RATE, "channels": 1, **_measure_blocks(blocks, RATE)}


def _describe_failure(clip: Clip, error: Exception) -> ClipMeasurements:
    reason = error.reason if isinstance(error, AudioError) else "undecodable"
    problem = reason if reason in ("truncated", "non-finite") else "undecodable"
    text = str(error) if isinstance(error, AatjaxError) else repr(error)
    text = text.removeprefix(f"{printable(clip.path or clip.id)}: ")
    return ClipMeasurements(clip.id, clip.path, problem=problem, detail=text)


def _parse_notes(notes: Sequence[str]) -> tuple[str, str, int | None]:
    """(problem, detail, samples of a clip padded to one frame) from the notes of the decoder."""
    problem = detail = ""
    short: int | None = None
    for note in notes:
        if note.startswith("truncated"):
            problem, detail = "truncated", note.removeprefix("truncated ") + " present"
        elif note.startswith("padded from "):
            short = int(note.split()[2])
    return problem, detail, short


def measure_original(path: str) -> dict[str, Any]:
    """Measure the first minute of a file at its own rate, before mixing and resampling.

    Returns:
        Fields of `ClipMeasurements`.

    Raises:
        DecoderError: no decoder reads it.
        OSError: it cannot be opened.
    """
    with open(path, "rb") as file:
        sound = Sound(file, os.fstat(file.fileno()).st_size, path, LONGEST)
        try:
            return {"format": sound.kind, **_measure_blocks(sound.blocks(), sound.rate)}
        finally:
            sound.close()


@np.errstate(over="ignore", invalid="ignore")
def _measure_blocks(blocks: Iterator[Float32[np.ndarray, "n c"]], rate: int) -> dict[str, Any]:
    """Measurements of a minute of blocks, or up to the first that cannot be decoded."""
    frames, lowest, highest = 0, np.inf, -np.inf
    sums = np.zeros(6)
    while frames < LONGEST * rate:
        block = next(blocks, None)
        if block is None or not len(block):
            break
        mono = mix_down(block, "mean")
        frames += len(block)
        lowest, highest = min(lowest, float(block.min())), max(highest, float(block.max()))
        low, high = _split_energy(mono, rate)
        sums += (
            np.count_nonzero(np.abs(block) >= FULL) / block.shape[1],
            mono.sum(dtype=np.float64),
            np.square(mono, dtype=np.float64).sum(),
            np.square(block, dtype=np.float64).sum() / block.shape[1],
            high,
            low + high,
        )
    clipped, total, mixed, apart, above, spectrum = map(float, sums)
    return {
        "peak": max(-lowest, highest, 0.0),
        "constant": highest - lowest < 1 / 32768,
        "full_scale": clipped / max(frames, 1),
        "offset": total / max(frames, 1),
        "high": above / spectrum if spectrum else 0.0,
        "kept": mixed / apart if apart else 1.0,
    }


def find_clip_problems(measurements: Sequence[ClipMeasurements]) -> list[Finding]:
    """Find the problems of single files."""
    cases: dict[str, list[Item]] = {}
    for m in measurements:
        for kind, detail in _check_clip(m):
            cases.setdefault(kind, []).append(Item(m.id, detail, (m.id,)))
    return [Finding(kind, tuple(items)) for kind, items in cases.items()]


def _check_clip(m: ClipMeasurements) -> Iterator[tuple[str, str]]:
    """Kind and detail of each finding of one clip."""
    if m.problem:
        yield m.problem, m.detail
    if m.seconds is None:
        return
    peak, channels = m.peak or 0.0, m.channels or 1
    if m.kept is not None and m.kept < CANCELLED and channels > 1:
        yield "cancels", f"{100 * m.kept:.1f} % of the energy is left in the mix"
    elif m.short is not None:
        yield "too-short", f"{m.short} samples at 16 kHz, {1000 * m.seconds:.1f} ms"
    elif m.constant:
        yield "silent", "all samples are equal"
    elif peak < FAINT:
        yield "quiet", f"peak {20 * np.log10(max(peak, 1e-10)):.0f} dB"
    if peak > UNSCALED:
        yield "unscaled", f"peak {peak:.6g} times full scale; divide it, or save integers"
    elif m.full_scale is not None and m.full_scale >= CLIPPED:
        yield "clipped", f"{100 * m.full_scale:.1f} % of the samples"
    usual = not m.constant and m.short is None and peak <= UNSCALED
    if m.offset is not None and abs(m.offset) >= OFFSET and usual:
        yield "offset", f"{100 * m.offset:.1f} % of full scale"
    if m.high is not None and m.high > HIGH:
        yield "high-band", f"{100 * m.high:.0f} % of the energy"
    if m.rate is not None and m.rate < RATE:
        yield "low-rate", f"{m.rate} Hz"
    suffix = os.path.splitext(m.path or "")[1].lower()
    if suffix and m.format in FORMATS and suffix not in FORMATS[m.format]:
        yield "extension", f"is {m.format}"


def is_usable(m: ClipMeasurements) -> bool:
    """Whether the sound of a clip can show its class: complete, neither silent nor damaged."""
    if m.problem or m.constant or m.seconds is None or m.short is not None:
        return False
    return (m.peak or 0.0) <= UNSCALED and (m.kept is None or m.kept >= CANCELLED)


def _measure_silence(scaled: Float32[np.ndarray, " s"]) -> float:
    """Share of 25 ms frames below -60 dB; 1 for a constant signal."""
    whole = scaled[: scaled.size // FRAME * FRAME].reshape(-1, FRAME)
    return float(np.mean(np.var(whole, axis=1, dtype=np.float64) < SILENCE))


def _split_energy(mono: Float32[np.ndarray, " n"], rate: int) -> tuple[float, float]:
    """Energy from 20 Hz to 8 kHz, and above."""
    if rate <= 2 * BAND_END:
        return 1.0, 0.0
    window = np.hanning(WINDOW).astype(np.float32)
    padded = np.pad(mono, (0, -mono.size % WINDOW)).reshape(-1, WINDOW)
    power = np.square(np.abs(np.fft.rfft(padded * window))).sum(axis=0, dtype=np.float64)
    hertz = np.arange(power.size) * (rate / WINDOW)
    low = power[(hertz >= 20) & (hertz <= BAND_END)].sum()
    return float(low), float(power[hertz > BAND_END].sum())
