"""Sounds of weather, water and fire, and of animals."""

import numpy as np

from aatjax.data.synthetic.primitives import Samples, Take, convolve, place_at, rolloff, unit


def rain(take: Take) -> Samples:
    """A broad hiss with many small drops."""
    hiss = take.noise(take.spread(300.0, 1500.0), 8000.0, slope=take.uniform(-4.0, 1.0))
    ping = take.noise(take.spread(800.0, 3000.0), 8000.0, size=take.samples(0.012))
    ping *= take.decay(0.012, 0.0003, take.spread(0.001, 0.004))
    drops = unit(convolve(take.showers(take.spread(80.0, 900.0), 0.7), ping))
    flow = 1.0 + 0.1 * take.drift(2.0)
    return hiss * flow + take.spread(0.2, 1.5) * drops


def wind(take: Take) -> Samples:
    """Low noise in gusts, at times with a howl."""
    gust = np.exp(take.uniform(0.3, 0.8) * take.drift(take.spread(0.6, 3.0)))
    air = take.noise(40.0, take.spread(300.0, 2500.0), slope=take.uniform(-6.0, -2.0)) * gust
    if take.chance(0.5):
        centre = take.spread(350.0, 1200.0)
        howl = take.noise(centre * 0.93, centre * 1.07) * gust**2
        air = air + take.uniform(0.1, 0.8) * unit(howl)
    return air


def waves(take: Take) -> Samples:
    """Noise that swells, breaks brightly and draws back."""
    period = take.spread(1.2, 5.0)
    turn = (take.time / period + take.uniform(0.0, 1.0)) % 1.0
    rise = take.uniform(0.35, 0.75)
    crest = np.where(turn < rise, (turn / rise) ** 2, ((1.0 - turn) / (1.0 - rise)) ** 1.3)
    body = take.noise(60.0, take.spread(500.0, 1500.0), slope=-3.0) * (0.15 + crest)
    foam = take.noise(take.spread(700.0, 2000.0), 8000.0, slope=-2.0) * (0.05 + crest**2)
    return body + take.spread(0.4, 1.4) * foam


def thunder(take: Take) -> Samples:
    """A crack and a rumble that rolls away."""
    onset = take.uniform(0.0, 0.35) * take.seconds
    since = take.time - onset
    after = np.where(since > 0.0, np.exp(-np.maximum(since, 0.0) / take.spread(0.3, 1.5)), 0.0)
    roll = np.exp(take.uniform(0.5, 1.0) * take.drift(take.spread(3.0, 9.0)))
    rumble = take.noise(30.0, take.spread(100.0, 400.0), slope=-3.0) * roll * after
    crack = take.noise(200.0, take.spread(1500.0, 6000.0), slope=-3.0)
    crack *= np.where(since > 0.0, np.exp(-np.maximum(since, 0.0) / take.spread(0.03, 0.2)), 0.0)
    return rumble + take.spread(0.1, 2.0) * crack


def fire(take: Take) -> Samples:
    """A soft roar with irregular crackles of very different strength."""
    roar = take.noise(60.0, take.spread(400.0, 3000.0), slope=take.uniform(-5.0, -1.0))
    roar *= np.exp(0.25 * take.drift(take.spread(2.0, 8.0)))
    track = np.zeros(take.size)
    for _ in range(3):
        centre = take.spread(1200.0, 5000.0)
        snap = take.noise(centre * 0.6, centre * 1.6, size=take.samples(0.03))
        snap *= take.decay(0.03, 0.0003, take.spread(0.001, 0.008))
        track += convolve(take.showers(take.spread(1.0, 9.0), 0.9), snap)
    return unit(track) + take.spread(0.1, 1.5) * roar


def drops(take: Take) -> Samples:
    """Water drops: short blips of rising pitch at irregular instants."""
    track = np.zeros(take.size)
    pitch = take.spread(550.0, 1400.0)
    for instant in take.beats(take.spread(1.5, 7.0), 0.5, take.uniform(0.0, 0.4)):
        length, fall = 0.16, take.spread(0.008, 0.04)
        start = pitch * take.spread(0.7, 1.5)
        glide = start * take.path(length, [1.0, take.uniform(1.1, 2.0)])
        blip = take.tone(glide, [1.0, 0.1]) * take.decay(length, 0.002, fall)
        height = take.spread(0.25, 1.0)
        place_at(track, height * blip, take.samples(instant))
        if take.chance(0.5):
            splash = take.noise(1500.0, 7000.0, size=take.samples(0.01))
            splash *= take.decay(0.01, 0.0005, 0.002)
            place_at(track, 0.3 * height * splash, take.samples(instant))
    return track


def bark(take: Take) -> Samples:
    """Barks: short harmonic bursts whose pitch arches up and down."""
    track = np.zeros(take.size)
    pitch, size = take.spread(280.0, 750.0), take.spread(0.8, 1.25)
    peaks = [(650.0 * size, 220.0, 1.0), (1500.0 * size, 400.0, take.uniform(0.3, 0.9))]
    rough, steep = take.uniform(0.1, 0.9), take.uniform(3.0, 8.0)
    start = take.uniform(0.0, 0.5) * take.seconds
    for instant in take.beats(take.spread(1.4, 4.0), 0.15, start)[: take.count(1, 5)]:
        length = take.spread(0.08, 0.24)
        top = take.uniform(1.1, 1.7)
        glide = pitch * take.path(length, [1.0, top, top * 0.95, take.uniform(0.6, 0.9)])
        voice = take.tone(glide, rolloff(24, steep))
        voice = unit(voice) + rough * take.noise(300.0, 5000.0, size=voice.size, slope=-3.0)
        voice *= take.swell(length, 0.015, length * 0.6)
        place_at(track, take.spread(0.5, 1.0) * voice, take.samples(instant))
    return take.formants(track, peaks, 0.08)


def crow(take: Take) -> Samples:
    """Caws: longer, harsh, slowly falling calls."""
    track = np.zeros(take.size)
    pitch, size = take.spread(300.0, 600.0), take.spread(0.8, 1.25)
    peaks = [(1100.0 * size, 300.0, 1.0), (1900.0 * size, 400.0, take.uniform(0.3, 1.0))]
    flutter, harsh = take.spread(35.0, 110.0), take.uniform(0.2, 0.9)
    steep = take.uniform(1.0, 4.0)
    start = take.uniform(0.0, 0.5) * take.seconds
    for instant in take.beats(take.spread(1.2, 2.5), 0.12, start)[: take.count(1, 4)]:
        length = take.spread(0.16, 0.5)
        glide = pitch * take.path(length, [0.95, 1.05, 1.0, take.uniform(0.75, 0.95)])
        glide = glide * np.exp(0.02 * take.drift(60.0, size=glide.size))
        voice = unit(take.tone(glide, rolloff(24, steep)))
        voice *= 1.0 + 0.8 * take.tone(flutter, [1.0], size=voice.size)
        voice += harsh * take.noise(500.0, 5000.0, size=voice.size, slope=-2.0)
        voice *= take.swell(length, 0.04, length * 0.4)
        place_at(track, take.spread(0.6, 1.0) * voice, take.samples(instant))
    return take.formants(track, peaks, 0.08)


def frog(take: Take) -> Samples:
    """Croaks: a resonant voice broken into quick pulses."""
    track = np.zeros(take.size)
    centre, pulses = take.spread(350.0, 1200.0), take.spread(14.0, 50.0)
    sharp, hiss = take.uniform(1.0, 5.0), take.uniform(0.0, 0.5)
    bend, spacing = take.uniform(0.9, 1.25), take.spread(0.9, 3.5)
    long = take.uniform(0.35, 0.9) / spacing
    for instant in take.beats(spacing, 0.1, take.uniform(0.0, 0.4) * take.seconds):
        length = long * take.uniform(0.85, 1.15)
        glide = centre * take.path(length, [1.0, bend])
        voice = take.tone(glide, [1.0, 0.3, 0.15])
        voice += hiss * take.noise(centre * 0.6, centre * 2.0, size=voice.size)
        rhythm = pulses * take.path(length, [1.0, take.uniform(0.7, 1.1)])
        voice *= np.exp(sharp * (take.tone(rhythm, [1.0]) - 1.0))
        voice *= take.swell(length, length * 0.3, length * 0.2)
        place_at(track, take.spread(0.6, 1.0) * voice, take.samples(instant))
    return track


def bird(take: Take) -> Samples:
    """A song of quick gliding syllables."""
    track = np.zeros(take.size)
    centre, pace = take.spread(1700.0, 5200.0), take.spread(2.5, 11.0)
    shape = [take.uniform(0.75, 1.3) for _ in range(take.count(2, 4))]
    start = take.uniform(0.0, 0.4) * take.seconds
    for instant in take.beats(pace, 0.15, start)[: take.count(3, 16)]:
        if take.chance(0.3):
            shape = [take.uniform(0.75, 1.3) for _ in range(take.count(2, 4))]
        length = take.uniform(0.4, 0.9) / pace
        note = take.tone(centre * take.path(length, shape), [1.0, take.uniform(0.0, 0.2)])
        note *= take.swell(length, length * 0.3, length * 0.4)
        place_at(track, take.spread(0.4, 1.0) * note, take.samples(instant))
    return track


def cricket(take: Take) -> Samples:
    """Chirps: groups of quick pulses of one high pitch, or one long trill."""
    pitch, pulses = take.spread(2300.0, 6000.0), take.spread(18.0, 55.0)
    voice = take.tone(pitch * (1.0 + 0.005 * take.drift(5.0)), [1.0, 0.1])
    voice *= np.exp(take.uniform(2.0, 5.0) * (take.tone(pulses, [1.0]) - 1.0))
    if take.chance(0.3):
        return voice
    gate = np.zeros(take.size)
    spacing = take.spread(1.2, 4.0)
    share = take.uniform(0.3, 0.7)
    for instant in take.beats(spacing, 0.08, take.uniform(0.0, 0.4)):
        place_at(gate, take.swell(share / spacing, 0.02, 0.02), take.samples(instant))
    return voice * gate


def glass(take: Take) -> Samples:
    """A break: a burst, then many small shards that ring high."""
    track = np.zeros(take.size)
    onset = take.uniform(0.0, 0.5) * take.seconds
    burst = take.noise(800.0, 8000.0, size=take.samples(0.12))
    burst *= take.decay(0.12, 0.001, take.spread(0.01, 0.04))
    place_at(track, take.spread(0.4, 1.5) * burst, take.samples(onset))
    fall = take.spread(0.1, 0.5)
    for _ in range(take.count(6, 26)):
        later = onset + float(take.rng.exponential(fall))
        pitch = take.spread(1800.0, 7000.0)
        modes = [(pitch * k, take.spread(0.01, 0.1), 1.0) for k in (1.0, take.uniform(1.2, 1.9))]
        shard = take.struck(modes, 0.2) * np.exp(-(later - onset) / fall)
        place_at(track, take.spread(0.15, 0.8) * shard, take.samples(later))
    return track
