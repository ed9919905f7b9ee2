"""What one file tells: is it sound, how much, how loud, and how much of it a model hears."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int16

from aatjax.audio.containers import inspect_container
from aatjax.audio.decode import AudioError, decode
from aatjax.audio.fbank import FRAME, HOP, count_frames
from aatjax.audio.streams import DecoderError, open_stream
from aatjax.audio.waveform import mix_down
from aatjax.data.source import Source
from aatjax.doctor.findings import Finding, Item, Measures
from aatjax.errors import AatjaxError, printable

RATE = 16000
CEILING = 8000  # Hz, half of the front end's rate
LISTEN = 60  # seconds of a file that are listened to at its own rate
WINDOW = 2048  # samples of a spectrum
FULL = 32767 / 32768
QUIET_DB = -60.0  # a stretch below is silence

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
"""Extensions of the formats that are known by their first bytes."""


@dataclass(frozen=True)
class Heard:
    """What the first minute of a file is like at its own rate; fields as in `Measures`."""

    format: str
    peak: float
    flat: bool  # all samples within one step of 16 bits
    full_scale: float
    offset: float
    high: float
    kept: float


def measure(
    source: Source, index: int, frames: int
) -> tuple[Measures, Int16[np.ndarray, " s"] | None]:
    """Reads one clip of a source and measures it; a clip that cannot be read is told as such.

    Args:
        source: the clips.
        index: which one.
        frames: input length of the model in 10 ms frames.

    Returns:
        The measures, and the samples at 16 kHz that training gets; None where there are none.
    """
    clip = source.clips[index]
    facts = {"id": clip.id, "path": clip.path}
    problem = detail = ""
    short: int | None = None
    try:
        if clip.path is None:
            samples = source.waveform(index)
            told = tuple(note for id, note in source.notes if id == clip.id)
            rate, channels, heard = RATE, 1, None
        else:
            decoded = decode(clip.path, truncated="keep")
            samples, told = decoded.waveform, decoded.notes
            rate, channels = decoded.source_rate, decoded.channels
            heard = listen(clip.path)
    except MemoryError:
        raise
    except Exception as error:  # one file must not end the visit
        reason = error.reason if isinstance(error, AudioError) else "undecodable"
        kind = reason if reason in ("truncated", "non-finite") else "undecodable"
        text = str(error) if isinstance(error, AatjaxError) else repr(error)
        text = text.removeprefix(f"{printable(clip.path or clip.id)}: ").partition("; pass ")[0]
        return Measures(**facts, problem=kind, detail=text), None
    for note in told:
        if note.startswith("truncated"):
            problem, detail = "truncated", note.removeprefix("truncated ") + " are there"
        elif note.startswith("padded from "):
            short = int(note.split()[2])
    size = samples.size if short is None else short
    scaled = samples.astype(np.float32) / 32768
    there = max(1, count_frames(samples.size))
    mean = float(np.mean(scaled, dtype=np.float64))
    level = _decibels(float(np.mean(np.square(scaled, dtype=np.float64))))
    flat = bool(samples.min() == samples.max())
    if heard is not None:  # resampling a constant leaves a ripple at its ends
        flat = flat or (heard.flat and size <= LISTEN * RATE)
    full = float(np.mean(np.abs(scaled) >= FULL))
    own = heard or Heard("", float(np.abs(scaled).max()), flat, full, mean, 0.0, 1.0)
    return Measures(
        **facts,
        problem=problem,
        detail=detail,
        format=own.format or None,
        seconds=size / RATE,
        rate=rate,
        channels=channels,
        peak=own.peak,
        level=level,
        full_scale=own.full_scale,
        offset=own.offset,
        silence=_silence(scaled),
        high=own.high,
        kept=own.kept,
        padding=max(0.0, 1.0 - there / frames),
        unheard=max(0.0, (there - frames) * HOP / RATE),
        constant=flat,
        short=short,
    ), samples


def listen(path: str) -> Heard:
    """Listens to the first minute of a file at its own rate, before it is mixed and resampled.

    Raises:
        DecoderError: no decoder knows it.
        OSError: it cannot be opened.
    """
    with open(path, "rb") as file:
        container = inspect_container(file, os.fstat(file.fileno()).st_size)
        stream = open_stream(file, container, path)
        try:
            total = full = 0.0
            lowest, highest = np.inf, -np.inf
            frames = 0
            mixed = apart = above = spectrum = 0.0
            blocks = stream.blocks()
            while frames < LISTEN * stream.rate:
                try:
                    block = next(blocks, None)
                except DecoderError:  # what came before it was good
                    break
                if block is None or not len(block):
                    break
                mono = mix_down(block, "mean")
                size = np.abs(block)
                lowest, highest = min(lowest, float(block.min())), max(highest, float(block.max()))
                full += np.count_nonzero(size >= FULL) / block.shape[1]
                total += float(mono.sum(dtype=np.float64))
                mixed += float(np.square(mono, dtype=np.float64).sum())
                apart += float(np.square(block, dtype=np.float64).sum()) / block.shape[1]
                low, high = _bands(mono, stream.rate)
                above += high
                spectrum += low + high
                frames += len(block)
        finally:
            stream.close()
    return Heard(
        format=container.kind,
        peak=max(-lowest, highest, 0.0),
        flat=highest - lowest < 1 / 32768,
        full_scale=full / max(frames, 1),
        offset=total / max(frames, 1),
        high=above / spectrum if spectrum else 0.0,
        kept=mixed / apart if apart else 1.0,
    )


def file_findings(measures: tuple[Measures, ...]) -> list[Finding]:
    """What is wrong with single files."""
    cases: dict[str, list[Item]] = {}

    def add(kind: str, m: Measures, detail: str) -> None:
        cases.setdefault(kind, []).append(Item(m.id, detail, (m.id,)))

    for m in measures:
        if m.problem:
            add(m.problem, m, m.detail)
        if m.seconds is None:
            continue
        cancels = m.kept is not None and m.kept < CANCELLED and (m.channels or 1) > 1
        if cancels:
            add("cancels", m, f"{100 * (m.kept or 0):.1f} % of the energy is left in the mix")
        elif m.short is not None:
            add("too-short", m, f"{m.short} samples at 16 kHz, {1000 * m.seconds:.1f} ms")
        elif m.constant:
            add("silent", m, "every sample is the same")
        elif m.peak is not None and m.peak < FAINT:
            add("quiet", m, f"peak {20 * np.log10(max(m.peak, 1e-10)):.0f} dB")
        if m.peak is not None and m.peak > UNSCALED:
            add(
                "unscaled", m, f"reaches {m.peak:.6g} times full scale; divide it, or save integers"
            )
        elif m.full_scale is not None and m.full_scale >= CLIPPED:
            add("clipped", m, f"{100 * m.full_scale:.1f} % of the samples")
        usual = not m.constant and m.short is None and (m.peak or 0.0) <= UNSCALED
        if m.offset is not None and abs(m.offset) >= OFFSET and usual:
            add("offset", m, f"{100 * m.offset:.1f} % of full scale")
        if m.high is not None and m.high > HIGH:
            add("high-band", m, f"{100 * m.high:.0f} % of the energy")
        if m.rate is not None and m.rate < RATE:
            add("low-rate", m, f"{m.rate} Hz")
        suffix = os.path.splitext(m.path or "")[1].lower()
        if suffix and m.format in FORMATS and suffix not in FORMATS[m.format]:
            add("extension", m, f"is {m.format}")
    return [Finding(kind, tuple(items)) for kind, items in cases.items()]


def sounds_itself(m: Measures) -> bool:
    """Whether a clip can be told by its sound: it is whole, and neither silent nor damaged."""
    if m.problem or m.constant or m.seconds is None or m.short is not None:
        return False
    return (m.peak or 0.0) <= UNSCALED and (m.kept is None or m.kept >= CANCELLED)


def _decibels(power: float) -> float:
    return 10 * float(np.log10(max(power, 1e-20)))


def _silence(scaled: Float32[np.ndarray, " s"]) -> float:
    """Share of 25 ms stretches below -60 dB; of a constant signal, all of it."""
    whole = scaled[: scaled.size // FRAME * FRAME].reshape(-1, FRAME)
    power = np.var(whole, axis=1, dtype=np.float64)
    return float(np.mean(power < 10 ** (QUIET_DB / 10)))


def _bands(mono: Float32[np.ndarray, " n"], rate: int) -> tuple[float, float]:
    """Energy from 20 Hz to 8 kHz, and above."""
    if rate <= 2 * CEILING:
        return 1.0, 0.0
    window = np.hanning(WINDOW).astype(np.float32)
    padded = np.pad(mono, (0, -mono.size % WINDOW)).reshape(-1, WINDOW)
    power = np.square(np.abs(np.fft.rfft(padded * window))).sum(axis=0, dtype=np.float64)
    hertz = np.arange(power.size) * (rate / WINDOW)
    heard = power[(hertz >= 20) & (hertz <= CEILING)].sum()
    return float(heard), float(power[hertz > CEILING].sum())
