"""Sounds of machines, hands and feet."""

import numpy as np

from aatjax.data.synthetic.primitives import Samples, Take, convolve, place_at, rolloff, unit


def clock_ticks(take: Take) -> Samples:
    """Even ticks, as a rule in pairs of two sounds."""
    sounds = []
    for _ in range(2):
        pitch = take.spread(1500.0, 4500.0)
        modes = [
            (pitch * ratio, take.spread(0.003, 0.022), take.uniform(0.3, 1.0))
            for ratio in (1.0, take.uniform(1.3, 1.8), take.uniform(2.1, 3.2))
        ]
        tick = take.struck(modes, 0.12)
        click = take.noise(1000.0, 7000.0, size=tick.size) * take.decay(0.12, 0.0003, 0.002)
        sounds.append(tick + take.uniform(0.1, 0.7) * click)
    if take.chance(0.3):
        sounds[1] = sounds[0]
    sounds[1] = sounds[1] * take.spread(0.35, 1.0)
    track = np.zeros(take.size)
    pace = take.spread(1.8, 6.0)
    for number, instant in enumerate(take.beats(pace, 0.008, take.uniform(0.0, 1.0 / pace))):
        place_at(track, take.spread(0.85, 1.0) * sounds[number % 2], take.samples(instant))
    return track


def knock(take: Take) -> Samples:
    """A group of two to seven knocks on wood."""
    pitch = take.spread(130.0, 500.0)
    ratios = [1.0] + [take.uniform(1.3, 5.0) for _ in range(3)]
    modes = [(pitch * ratio, take.spread(0.006, 0.035), take.spread(0.3, 1.0)) for ratio in ratios]
    pace, dull = take.spread(2.2, 8.0), take.spread(800.0, 5000.0)
    track = np.zeros(take.size)
    start = take.uniform(0.0, 0.45) * take.seconds
    for instant in take.beats(pace, 0.07, start)[: take.count(2, 7)]:
        hit = take.struck(modes, 0.2)
        thud = take.noise(80.0, dull, size=hit.size, slope=-2.0)
        hit += take.uniform(0.3, 0.9) * thud * take.decay(0.2, 0.001, 0.006)
        place_at(track, take.spread(0.5, 1.0) * hit, take.samples(instant))
    return track


def steps(take: Take) -> Samples:
    """Footsteps: a dull heel, then a scuff, at walking pace."""
    track = np.zeros(take.size)
    pace, body = take.spread(1.4, 3.4), take.spread(60.0, 250.0)
    grit, bright = take.spread(0.1, 1.2), take.spread(1500.0, 7000.0)
    late = take.uniform(0.03, 0.11)
    for instant in take.beats(pace, 0.05, take.uniform(0.0, 1.0 / pace)):
        heel = take.struck([(body * take.spread(0.9, 1.1), take.spread(0.012, 0.04), 1.0)], 0.2)
        heel += 0.3 * take.noise(100.0, 2500.0, size=heel.size) * take.decay(0.2, 0.001, 0.006)
        scuff = take.noise(400.0, bright, size=take.samples(0.16))
        scuff *= take.decay(0.16, take.spread(0.005, 0.03), take.spread(0.015, 0.05))
        place_at(track, take.spread(0.6, 1.0) * heel, take.samples(instant))
        place_at(track, grit * take.spread(0.3, 0.6) * scuff, take.samples(instant + late))
    return track


def typing(take: Take) -> Samples:
    """Key strokes in uneven bursts, each a press and a softer release."""
    track = np.zeros(take.size)
    pitch, soft = take.spread(900.0, 3500.0), take.spread(0.2, 0.7)
    for instant in take.beats(take.spread(4.0, 12.0), 0.45, take.uniform(0.0, 0.4)):
        if take.chance(0.12):
            continue
        centre = pitch * take.spread(0.8, 1.25)
        press = take.noise(centre * 0.5, centre * 2.5, size=take.samples(0.03))
        press *= take.decay(0.03, 0.0005, take.spread(0.002, 0.006))
        height = take.spread(0.4, 1.0)
        place_at(track, height * press, take.samples(instant))
        place_at(track, soft * height * press, take.samples(instant + take.uniform(0.04, 0.1)))
    return track


def applause(take: Take) -> Samples:
    """Many hands: a dense shower of claps."""
    track = np.zeros(take.size)
    density = take.spread(12.0, 120.0)
    for _ in range(4):
        centre = take.spread(600.0, 2600.0)
        clap = take.noise(centre * 0.6, centre * 2.2, size=take.samples(0.06))
        clap *= take.decay(0.06, 0.001, take.spread(0.004, 0.015))
        track += convolve(take.showers(density / 4.0, 0.5), clap)
    crowd = take.noise(400.0, 6000.0, slope=-2.0)
    return unit(track) + take.uniform(0.05, 0.5) * crowd


def helicopter(take: Take) -> Samples:
    """Rotor beats over the noise of a turbine."""
    rotor = take.spread(7.0, 22.0) * (1.0 + 0.02 * take.drift(1.0))
    slap = np.exp(take.uniform(1.5, 5.0) * (take.tone(rotor, [1.0]) - 1.0))
    beat = unit(take.noise(40.0, take.spread(200.0, 1500.0), slope=-4.0) * slap)
    turbine = take.noise(200.0, take.spread(1500.0, 7000.0), slope=-2.0) * (0.6 + 0.4 * slap)
    whine = take.tone(take.spread(400.0, 2500.0) * (1.0 + 0.01 * take.drift(2.0)), [1.0, 0.4])
    mix = beat + take.spread(0.1, 0.8) * turbine + take.spread(0.02, 0.3) * whine
    return mix * np.exp(take.uniform(-0.5, 0.5) * take.time / max(take.seconds, 1e-9))


def _motor(take: Take, idle: float, wander: float, steep: float, count: int) -> Samples:
    """Firing pulses of a motor, with uneven strength, at unit RMS."""
    pace = idle * np.exp(wander * take.drift(take.spread(0.8, 3.0)))
    uneven = 1.0 + take.uniform(0.1, 0.5) * take.tone(pace * 0.5, [1.0, 0.5])
    return unit(take.tone(pace, rolloff(count, steep)) * uneven)


def engine(take: Take) -> Samples:
    """A motor that idles or turns up a little."""
    motor = _motor(take, take.spread(22.0, 90.0), 0.12, take.uniform(2.0, 6.0), 48)
    hiss = take.noise(100.0, take.spread(800.0, 5000.0), slope=-3.0)
    peaks = [(take.spread(90.0, 250.0), 80.0, 1.0), (take.spread(350.0, 1200.0), 200.0, 0.6)]
    return take.formants(motor + take.spread(0.1, 0.8) * hiss, peaks, 0.15)


def chainsaw(take: Take) -> Samples:
    """A small, fast motor that revs, bright and rough."""
    motor = _motor(take, take.spread(75.0, 210.0), 0.3, take.uniform(0.0, 3.0), 40)
    hiss = take.noise(500.0, 7000.0)
    peaks = [(take.spread(500.0, 1500.0), 300.0, 1.0), (take.spread(2000.0, 4000.0), 600.0, 0.7)]
    return take.formants(motor + take.spread(0.1, 0.7) * hiss, peaks, 0.2)
