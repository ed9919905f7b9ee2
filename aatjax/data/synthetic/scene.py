"""Recording of a clean sound: room, stray events, background, microphone, level."""

import numpy as np

from aatjax.data.synthetic.primitives import (
    Samples,
    Take,
    band,
    convolve,
    fast_length,
    place_at,
    rolloff,
    unit,
)

QUIETEST_BED, LOUDEST_BED = 34.0, 2.0  # signal to noise, dB


def _reverberate(take: Take, sound: Samples) -> Samples:
    """The sound in a random small room: a direct path and an exponentially decaying tail."""
    if take.chance(0.25):
        return sound
    fall = take.spread(0.015, 0.16)
    tail = take.noise(80.0, take.spread(1500.0, 7000.0), size=take.samples(4.0 * fall))
    tail *= np.exp(-np.arange(tail.size) / (take.rate * fall))
    response = tail * (take.spread(0.1, 0.8) / max(float(np.sqrt(np.sum(tail**2))), 1e-12))
    response[0] += 1.0
    return convolve(sound, response)


def _make_background(take: Take) -> Samples:
    """A bed of noise at unit RMS: a random colour, slowly moving, now and then with a hum."""
    bed = take.noise(
        take.spread(30.0, 300.0), take.spread(1200.0, 9000.0), slope=take.uniform(-7.0, 1.0)
    )
    if take.chance(0.5):
        pace, depth = take.spread(0.5, 8.0), take.uniform(0.1, 0.6)
        bed = bed * np.exp(depth * take.drift(pace))
    if take.chance(0.3):
        murmur = take.noise(take.spread(200.0, 800.0), take.spread(900.0, 3500.0))
        lull = np.maximum(take.drift(take.spread(2.0, 6.0)), 0.0)
        bed = bed + take.uniform(0.3, 1.5) * murmur * lull
    if take.chance(0.25):
        mains = take.spread(45.0, 130.0)
        bed = bed + take.uniform(0.2, 0.8) * unit(take.tone(mains, rolloff(12, 9.0)))
    return unit(bed)


def _make_stray(take: Take) -> Samples:
    """A short event that belongs to no class, with a peak of about one."""
    kind = take.count(0, 5)
    if kind == 0:  # a click
        event = take.noise(500.0, 7000.0, size=take.samples(0.02))
        event *= take.decay(0.02, 0.0005, take.spread(0.001, 0.005))
    elif kind == 1:  # a thump
        event = take.struck([(take.spread(50.0, 200.0), take.spread(0.02, 0.08), 1.0)], 0.3)
    elif kind == 2:  # a rustle
        length = take.spread(0.1, 0.6)
        event = take.noise(800.0, take.spread(3000.0, 8000.0), size=take.samples(length))
        event *= take.swell(length, length / 2, length / 2)
    elif kind == 3:  # a hum
        length = take.spread(0.2, 1.0)
        hum = take.tone(take.spread(80.0, 400.0), rolloff(8, 8.0), size=take.samples(length))
        event = hum * take.swell(length, 0.08, 0.08)
    elif kind == 4:  # a blip
        length = take.spread(0.04, 0.25)
        blip = take.tone(take.spread(400.0, 4000.0), [1.0, 0.2], size=take.samples(length))
        event = blip * take.swell(length, 0.01, 0.02)
    else:  # a syllable
        length = take.spread(0.08, 0.35)
        size = take.samples(length)
        pitch = take.spread(90.0, 350.0) * np.exp(0.1 * take.drift(6.0, size=size))
        event = take.tone(pitch, rolloff(16, take.uniform(3.0, 9.0)))
        event *= take.swell(length, length / 3, length / 2)
    return event / max(float(np.abs(event).max()), 1e-12)


def _apply_microphone(take: Take, sound: Samples) -> Samples:
    """The sound through a random microphone: tilt, band limits and three broad bumps or dips."""
    length = fast_length(sound.size + 256)
    frequencies = np.fft.rfftfreq(length, 1.0 / take.rate)
    octaves = np.log2(np.maximum(frequencies, 40.0) / 1000.0)
    level = take.uniform(-1.5, 1.5) * octaves
    for _ in range(3):
        centre, width = take.uniform(-3.5, 3.0), take.uniform(0.2, 0.8)
        level += take.uniform(-3.0, 3.0) * np.exp(-(((octaves - centre) / width) ** 2))
    shape = 10.0 ** (np.clip(level, -30.0, 30.0) / 20.0)
    shape *= band(frequencies, take.spread(25.0, 200.0), take.spread(3500.0, 9000.0), order=3)
    return np.fft.irfft(np.fft.rfft(sound, length) * shape, length)[: sound.size]


def record_scene(take: Take, sound: Samples) -> Samples:
    """Return a recording of a clean sound, between -1 and 1.

    The sound is put into a room, sometimes joined by stray events, laid on background noise at a
    random ratio, filtered by a random microphone, and scaled to a random peak level of -30 to -3 dB
    of full scale; one recording in twelve is overdriven first. Low ratios of signal to noise are
    rarer than high ones.
    """
    scene = unit(_reverberate(take, sound))
    peak = float(np.abs(scene).max())
    if take.chance(0.25):
        for _ in range(take.count(1, 2)):
            start = take.count(-take.size // 10, take.size - 1)
            place_at(scene, _make_stray(take) * (peak * take.spread(0.15, 0.9)), start)
    share = take.uniform(0.0, 1.0) ** 0.6
    ratio = LOUDEST_BED + (QUIETEST_BED - LOUDEST_BED) * share
    scene = _apply_microphone(take, scene + _make_background(take) * 10.0 ** (-ratio / 20.0))
    scene = scene / max(float(np.abs(scene).max()), 1e-12)
    if take.chance(1.0 / 12.0):
        drive = take.uniform(1.5, 4.0)
        scene = np.tanh(drive * scene) / np.tanh(drive)
    return scene * 10.0 ** (take.uniform(-30.0, -3.0) / 20.0)
