"""Sounds of signals and musical instruments."""

import numpy as np

from aatjax.data.synthetic.primitives import Samples, Take, convolve, place_at, rolloff, unit


def bell(take: Take) -> Samples:
    """Strikes of a bell: inharmonic partials that die away slowly."""
    pitch, fall = take.spread(300.0, 1600.0), take.spread(0.2, 1.6)
    ratios = (0.5, 1.0, 1.19, 1.5, 2.0, 2.51, 2.66, 3.01, 4.1)
    modes = [
        (pitch * ratio * take.uniform(0.98, 1.02), fall / ratio**0.7, take.spread(0.15, 1.0))
        for ratio in ratios
    ]
    strike = take.struck(modes, min(take.seconds, 4.0 * fall), take.spread(0.0005, 0.004))
    impulses = np.zeros(take.size)
    start = take.uniform(0.0, 0.45) * take.seconds
    for instant in take.beats(take.spread(0.7, 3.5), 0.08, start)[: take.count(1, 4)]:
        place_at(impulses, np.array([take.spread(0.5, 1.0)]), take.samples(instant))
    return convolve(impulses, strike)


def _voice(take: Take) -> list[float]:
    """Partials of an electric sounder: from nearly pure to buzzing."""
    return list(rolloff(take.count(2, 12), take.uniform(5.0, 16.0)))


def siren(take: Take) -> Samples:
    """A pitch that wails up and down, or steps between two notes, without a pause."""
    low = take.spread(450.0, 900.0)
    width = take.spread(1.25, 2.3)
    pace = take.spread(0.25, 3.2)
    turn = take.time * pace + take.uniform(0.0, 1.0)
    kind = take.count(0, 3)
    if kind == 0:  # wail
        course = 0.5 - 0.5 * np.cos(2.0 * np.pi * turn)
    elif kind == 1:  # rise, then fall at another speed
        rise = take.uniform(0.15, 0.85)
        share = turn % 1.0
        course = np.where(share < rise, share / rise, (1.0 - share) / (1.0 - rise))
    elif kind == 2:  # two notes
        course = np.clip(0.5 + 8.0 * np.sin(2.0 * np.pi * turn), 0.0, 1.0)
    else:  # slow rise and hold
        course = np.clip(1.5 * np.sin(np.pi * turn) ** 2, 0.0, 1.0)
    fade = np.exp(take.uniform(-0.7, 0.7) * take.time / max(take.seconds, 1e-9))
    return take.tone(low * width**course, _voice(take)) * fade


def alarm(take: Take) -> Samples:
    """Beeps of a steady pitch at a quick even pace, or two notes that alternate quickly."""
    pitch, pace = take.spread(1200.0, 3200.0), take.spread(2.0, 9.0)
    voice = _voice(take)
    turn = take.time * pace + take.uniform(0.0, 1.0)
    if take.chance(0.35):
        step = np.clip(0.5 + 10.0 * np.sin(2.0 * np.pi * turn), 0.0, 1.0)
        return take.tone(pitch * take.spread(1.12, 1.6) ** step, voice)
    sound = take.tone(pitch, voice)
    duty = take.uniform(0.3, 0.75)
    share = turn % 1.0
    gate = np.clip(np.minimum(share, duty - share) / (0.0125 * pace), 0.0, 1.0)
    if take.chance(0.4):  # groups with a pause
        group = take.count(3, 5)
        gate = gate * (np.floor(turn) % group < group - 1)
    return sound * gate


def phone(take: Take) -> Samples:
    """Rings: two pitches that warble quickly, in bursts."""
    pitch, warble = take.spread(600.0, 2600.0), take.spread(11.0, 30.0)
    wave = take.tone(warble, [1.0])
    course = np.clip(0.5 + 3.0 * wave, 0.0, 1.0)
    sound = take.tone(pitch * take.spread(1.1, 1.5) ** course, _voice(take))
    sound *= 1.0 + take.uniform(0.0, 0.7) * wave
    gate = np.zeros(take.size)
    length, pause = take.spread(0.25, 1.2), take.spread(0.15, 1.0)
    for instant in take.beats(1.0 / (length + pause), 0.02, take.uniform(-0.3, 0.5)):
        place_at(gate, take.swell(length, 0.01, 0.03), round(instant * take.rate))
    return sound * gate


def horn(take: Take) -> Samples:
    """Honks: two steady notes at once."""
    pitch, interval = take.spread(260.0, 650.0), take.uniform(1.15, 1.35)
    voice = rolloff(20, take.uniform(2.0, 8.0))
    sound = take.tone(pitch, voice) + take.uniform(0.4, 1.0) * take.tone(pitch * interval, voice)
    gate = np.zeros(take.size)
    start = take.uniform(0.0, 0.4) * take.seconds
    for instant in take.beats(take.spread(0.8, 3.0), 0.2, start)[: take.count(1, 3)]:
        length = take.spread(0.15, 1.0)
        place_at(gate, take.swell(length, 0.02, 0.04), take.samples(instant))
    return sound * np.minimum(gate, 1.0)


def whistle(take: Take) -> Samples:
    """A nearly pure pitch with breath: glides of lips, or the trill of a pea."""
    pitch, breath = take.spread(1100.0, 3000.0), take.spread(0.05, 0.4)
    track = np.zeros(take.size)
    pea = take.spread(15.0, 40.0) if take.chance(0.35) else 0.0
    start = take.uniform(0.0, 0.35) * take.seconds
    for instant in take.beats(take.spread(0.8, 3.5), 0.25, start)[: take.count(1, 4)]:
        length = take.spread(0.18, 1.3)
        bends = [take.spread(0.75, 1.35) for _ in range(take.count(2, 4))]
        glide = pitch * take.path(length, bends)
        vibrato = take.tone(take.spread(4.0, 7.0), [1.0], size=glide.size)
        if pea:
            trill = take.tone(pea, [1.0], size=glide.size)
            note = take.tone(pitch * (1.0 + 0.05 * trill), [1.0, 0.1]) * (1.0 + 0.6 * trill)
        else:
            note = take.tone(glide * (1.0 + 0.015 * vibrato), [1.0, take.uniform(0.0, 0.15)])
        note = note + breath * take.noise(pitch * 0.7, pitch * 2.0, size=note.size)
        note *= take.swell(length, 0.04, 0.06)
        place_at(track, take.spread(0.6, 1.0) * note, take.samples(instant))
    return track


_SCALE = (0, 2, 4, 5, 7, 9, 11, 12)


def _melody(take: Take, low: float, high: float) -> list[tuple[float, float, float]]:
    """Notes as (start s, length s, pitch Hz): a short walk on a scale."""
    base, pace = take.spread(low, high), take.spread(0.8, 5.0)
    notes = []
    for instant in take.beats(pace, 0.05, take.uniform(0.0, 0.3) * take.seconds)[:10]:
        degree = _SCALE[take.count(0, len(_SCALE) - 1)]
        notes.append((instant, take.uniform(0.6, 1.0) / pace, base * 2.0 ** (degree / 12.0)))
    return notes


def pluck(take: Take) -> Samples:
    """Plucked strings: harmonics that die away, the high ones sooner."""
    track = np.zeros(take.size)
    fall, spot = take.spread(0.08, 0.7), take.uniform(0.1, 0.45)
    count = take.count(6, 14)
    for start, _, pitch in _melody(take, 110.0, 600.0):
        modes = [
            (pitch * k, fall / k**0.7, abs(float(np.sin(np.pi * spot * k))) / k)
            for k in range(1, count)
        ]
        place_at(track, take.struck(modes, min(1.2, 3.0 * fall), 0.002), take.samples(start))
    return track


def organ(take: Take) -> Samples:
    """A held chord of pipes, with stops at octaves and fifths."""
    stops = np.zeros(16)
    stops[[0, 1, 2, 3, 5, 7, 11, 15]] = [take.spread(0.1, 1.0) for _ in range(8)]
    base = take.spread(110.0, 500.0)
    chord = sum(
        (take.tone(base * 2.0 ** (step / 12.0), stops) for step in (0, take.count(3, 5), 7)),
        np.zeros(take.size),
    )
    if take.chance(0.5):
        chord = chord * (1.0 + 0.25 * take.tone(take.spread(4.0, 7.5), [1.0]))
    start = take.uniform(0.0, 0.3) * take.seconds
    gate = np.zeros(take.size)
    place_at(gate, take.swell(take.seconds, 0.06, 0.1), round(start * take.rate))
    return chord * gate


def flute(take: Take) -> Samples:
    """Soft notes with breath and vibrato."""
    track = np.zeros(take.size)
    voice = [1.0, take.spread(0.1, 0.6), take.spread(0.03, 0.25), take.spread(0.01, 0.1)]
    breath, shake = take.spread(0.03, 0.3), take.uniform(0.0, 0.015)
    for start, length, pitch in _melody(take, 260.0, 1000.0):
        size = take.samples(length)
        wave = take.tone(5.5, [1.0], size=size)
        note = take.tone(pitch * (1.0 + shake * wave), voice) * (1.0 + 10.0 * shake * wave)
        note += breath * take.noise(pitch * 0.8, pitch * 6.0, size=size)
        place_at(track, note * take.swell(length, 0.05, 0.06), take.samples(start))
    return track


def brass(take: Take) -> Samples:
    """Bright notes whose high partials come after the low ones."""
    track = np.zeros(take.size)
    dull, bright = rolloff(6, 10.0), rolloff(20, take.uniform(1.5, 5.0))
    rise = take.spread(0.03, 0.12)
    for start, length, pitch in _melody(take, 120.0, 480.0):
        size = take.samples(length)
        scoop = pitch * (1.0 - 0.04 * take.decay(length, 0.001, 0.03)[:size])
        soft, sharp = (unit(take.tone(scoop, voice)) for voice in (dull, bright))
        late = take.swell(length, rise * 2.0, rise * 2.0)
        note = (1.0 - 0.6 * late) * soft + late * sharp
        place_at(track, note * take.swell(length, rise, 0.06), take.samples(start))
    return track
