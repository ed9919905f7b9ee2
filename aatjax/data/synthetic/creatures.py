"""Sounds of more animals, of people without words, and of more machines."""

from collections.abc import Callable, Sequence

import numpy as np

from aatjax.data.synthetic.primitives import Samples, Take, convolve, place_at, rolloff, unit
from aatjax.data.synthetic.speech import CONSONANTS, VOWELS, Phone, utter


def _repeat(take: Take, make: Callable[[], Samples], pace: float, most: int) -> Samples:
    """One to `most` sounds at an uneven pace, each made on its own."""
    track = np.zeros(take.size)
    start = take.uniform(0.0, 0.4) * take.seconds
    for instant in take.beats(pace, 0.15, start)[: take.count(1, most)]:
        place_at(track, take.spread(0.5, 1.0) * unit(make()), take.samples(instant))
    return track


def _call(
    take: Take,
    letters: str,
    lengths: Sequence[float],
    tract: float,
    pitch: float,
    bends: tuple[float, float],
) -> Samples:
    """Sounds of speech by the tract and pitch of an animal or a child."""
    phones: list[Phone] = []
    times: list[float] = []
    for letter, seconds in zip(letters, lengths, strict=True):
        found = CONSONANTS.get(letter) or (VOWELS[letter],)
        phones += found
        times += [seconds * take.spread(0.8, 1.25) / len(found)] * len(found)
    return utter(take, phones, np.array(times), tract, pitch, bends)


def cat(take: Take) -> Samples:
    """Meows: a voice that opens, then closes."""
    tract, pitch = take.spread(1.4, 2.1), take.spread(350.0, 800.0)
    long = take.spread(0.6, 1.4)
    lengths = [0.08 * long, 0.15 * long, 0.25 * long, 0.2 * long]
    return _repeat(
        take, lambda: _call(take, "miau", lengths, tract, pitch, (0.7, 1.3)), 1.0 / long, 3
    )


def cow(take: Take) -> Samples:
    """A long low call that opens slowly."""
    tract, pitch = take.spread(0.5, 0.75), take.spread(80.0, 220.0)
    long = take.spread(0.7, 1.6)
    lengths = [0.2 * long, 0.7 * long, 0.3 * long]
    return _repeat(
        take, lambda: _call(take, "muo", lengths, tract, pitch, (0.85, 1.25)), 0.7 / long, 2
    )


def sheep(take: Take) -> Samples:
    """Bleats: a voice that trembles quickly."""
    tract, pitch = take.spread(0.9, 1.3), take.spread(160.0, 420.0)
    long, tremble = take.spread(0.4, 1.1), take.spread(7.0, 14.0)

    def bleat() -> Samples:
        voice = _call(take, "mE", [0.1 * long, 0.8 * long], tract, pitch, (0.9, 1.1))
        return voice * (1.0 + 0.7 * take.tone(tremble, [1.0], size=voice.size))

    return _repeat(take, bleat, 1.0 / long, 3)


def rooster(take: Take) -> Samples:
    """A crow in four notes, the third of them the highest and longest."""
    pitch, harsh = take.spread(450.0, 950.0), take.uniform(0.05, 0.5)
    peaks = [(take.spread(900.0, 1400.0), 300.0, 1.0), (take.spread(2200.0, 3200.0), 500.0, 0.8)]
    long = take.spread(0.9, 1.8)

    def crow() -> Samples:
        track = np.zeros(take.samples(long))
        at = 0.0
        for share, height in ((0.13, 0.85), (0.13, 1.0), (0.42, 1.3), (0.3, 1.05)):
            seconds = share * long
            fall = take.uniform(0.75, 0.95) if height == 1.05 else 1.0
            glide = pitch * height * take.path(seconds, [0.9, take.spread(0.95, 1.1), 1.0, fall])
            note = unit(take.tone(glide, rolloff(20, 4.0)))
            note += harsh * take.noise(600.0, 6000.0, size=note.size)
            place_at(track, note * take.swell(seconds, 0.02, 0.05), take.samples(at))
            at += seconds
        return track

    return take.formants(_repeat(take, crow, 0.8 / long, 2), peaks, 0.1)


def hen(take: Take) -> Samples:
    """Clucks: short nasal notes, now and then a longer one."""
    pitch = take.spread(350.0, 800.0)
    peaks = [(take.spread(900.0, 1500.0), 250.0, 1.0), (take.spread(2000.0, 3000.0), 500.0, 0.6)]

    def cluck() -> Samples:
        seconds = take.spread(0.05, 0.12) * (4.0 if take.chance(0.15) else 1.0)
        glide = pitch * take.path(seconds, [take.uniform(0.8, 1.0), 1.2, take.uniform(0.7, 1.0)])
        return take.tone(glide, rolloff(16, 3.0)) * take.swell(seconds, 0.01, 0.03)

    return take.formants(_repeat(take, cluck, take.spread(2.5, 6.0), 12), peaks, 0.1)


def pig(take: Take) -> Samples:
    """Grunts: breath chopped at a low rate."""
    chop, tract = take.spread(25.0, 70.0), take.spread(0.6, 1.0)
    peaks = [(500.0 * tract, 200.0, 1.0), (1500.0 * tract, 400.0, 0.6)]

    def grunt() -> Samples:
        seconds = take.spread(0.12, 0.45)
        air = take.noise(100.0, 3500.0, size=take.samples(seconds), slope=-4.0)
        rhythm = chop * take.path(seconds, [1.0, take.uniform(0.7, 1.2)])
        air *= np.exp(3.0 * (take.tone(rhythm, [1.0]) - 1.0))
        return air * take.swell(seconds, 0.03, 0.08)

    return take.formants(_repeat(take, grunt, take.spread(1.5, 4.0), 6), peaks, 0.08)


def baby(take: Take) -> Samples:
    """Cries: long open vowels, with a breath between them."""
    tract, pitch = take.spread(1.5, 2.0), take.spread(300.0, 600.0)
    long = take.spread(0.5, 1.2)

    def cry() -> Samples:
        vowel = ("aE", "Ea", "ae")[take.count(0, 2)]
        return _call(
            take, "A" + vowel, [0.1 * long, 0.4 * long, 0.4 * long], tract, pitch, (0.8, 1.4)
        )

    return _repeat(take, cry, 0.9 / long, 4)


def laugh(take: Take) -> Samples:
    """A run of short breathy vowels that falls in pitch."""
    tract, pitch = take.spread(1.0, 1.5), take.spread(120.0, 420.0)
    pace, vowel = take.spread(3.5, 6.5), ("a", "E", "i")[take.count(0, 2)]
    track = np.zeros(take.size)
    start = take.uniform(0.0, 0.4) * take.seconds
    for number, instant in enumerate(take.beats(pace, 0.06, start)[: take.count(3, 10)]):
        tone = pitch * 0.96**number
        note = _call(take, "h" + vowel, [0.4 / pace, 0.4 / pace], tract, tone, (0.9, 1.1))
        place_at(track, 0.93**number * unit(note), take.samples(instant))
    return track


def cough(take: Take) -> Samples:
    """Bursts of breath with a short hoarse end."""
    tract, pitch = take.spread(0.95, 1.4), take.spread(90.0, 260.0)

    def burst() -> Samples:
        lengths = [take.spread(0.04, 0.08), take.spread(0.06, 0.12), take.spread(0.04, 0.15)]
        return _call(take, "kHA", lengths, tract, pitch, (0.7, 1.1))

    return _repeat(take, burst, take.spread(1.5, 3.5), 5)


def sneeze(take: Take) -> Samples:
    """A breath drawn in, then a burst of hiss."""
    tract, pitch = take.spread(0.95, 1.5), take.spread(110.0, 380.0)

    def burst() -> Samples:
        air = take.noise(400.0, take.spread(2000.0, 6000.0), size=take.samples(0.4))
        air *= take.spread(0.05, 0.4) * np.linspace(0.0, 1.0, air.size) ** 2
        ends = ("TSu", "tSi", "tSc")[take.count(0, 2)]
        out = unit(
            _call(take, ends, [0.05, take.spread(0.12, 0.3), 0.12], tract, pitch, (0.8, 1.2))
        )
        return np.concatenate([air, out])

    return _repeat(take, burst, take.spread(0.5, 1.2), 2)


def snore(take: Take) -> Samples:
    """Slow breaths that rattle."""
    chop, period = take.spread(18.0, 60.0), take.spread(1.2, 3.5)
    turn = (take.time / period + take.uniform(0.0, 1.0)) % 1.0
    breath = np.exp(-(((turn - 0.35) / 0.16) ** 2))
    out = take.spread(0.05, 0.6) * np.exp(-(((turn - 0.8) / 0.12) ** 2))
    rattle = np.exp(
        take.uniform(1.5, 4.0) * (take.tone(chop * (1 + 0.08 * take.drift(3.0)), [1.0]) - 1)
    )
    low = take.noise(60.0, take.spread(800.0, 2500.0), slope=-4.0) * rattle * breath
    return unit(low) + take.spread(0.2, 1.0) * take.noise(300.0, 4000.0, slope=-2.0) * out


def vacuum(take: Take) -> Samples:
    """A steady hum of a motor below a broad rush of air."""
    pitch = take.spread(90.0, 420.0) * (1.0 + 0.004 * take.drift(1.0))
    hum = take.tone(pitch, rolloff(24, take.uniform(4.0, 9.0)))
    whine = take.tone(take.spread(1200.0, 4000.0) * (1.0 + 0.003 * take.drift(1.0)), [1.0, 0.3])
    air = take.noise(take.spread(150.0, 600.0), take.spread(3000.0, 8000.0), slope=-2.0)
    return air + take.spread(0.2, 1.2) * unit(hum) + take.spread(0.02, 0.4) * whine


def train(take: Take) -> Samples:
    """Pairs of beats of wheels on rails over a rumble."""
    rumble = take.noise(40.0, take.spread(300.0, 1200.0), slope=-4.0)
    rumble *= np.exp(0.3 * take.drift(2.0))
    track, gap = np.zeros(take.size), take.spread(0.08, 0.22)
    body = [(take.spread(80.0, 300.0), take.spread(0.02, 0.07), 1.0) for _ in range(3)]
    for instant in take.beats(take.spread(0.9, 2.4), 0.03, take.uniform(-0.4, 0.3)):
        for late in (0.0, gap):
            hit = take.struck(body, 0.3)
            hit += 0.5 * take.noise(300.0, 4000.0, size=hit.size) * take.decay(0.3, 0.002, 0.02)
            place_at(track, take.spread(0.6, 1.0) * hit, take.samples(instant + late))
    return unit(rumble) + take.spread(0.3, 1.5) * unit(track)


def saw(take: Take) -> Samples:
    """Strokes of a hand saw: rough noise, to and fro."""
    pace, teeth = take.spread(1.5, 5.0), take.spread(40.0, 180.0)
    turn = (take.time * pace + take.uniform(0.0, 1.0)) % 1.0
    push = np.sin(np.pi * np.clip(turn / 0.55, 0.0, 1.0)) ** 2
    pull = take.spread(0.2, 1.0) * np.sin(np.pi * np.clip((turn - 0.55) / 0.45, 0.0, 1.0)) ** 2
    rough = np.exp(2.0 * (take.tone(teeth * (0.3 + push + pull), [1.0]) - 1.0))
    centre = take.spread(900.0, 3500.0)
    wood = take.noise(centre * 0.4, centre * 2.2) * rough * (push + pull)
    return take.formants(wood, [(centre * take.uniform(0.7, 1.3), 250.0, 1.0)], 0.3)


def creak(take: Take) -> Samples:
    """A door on a dry hinge: clicks that speed up and slow down, and ring."""
    centre = take.spread(350.0, 1500.0)
    modes = [(centre * take.uniform(0.7, 3.0), take.spread(0.004, 0.02), 1.0) for _ in range(4)]
    click = take.struck(modes, 0.15)

    def hinge() -> Samples:
        seconds = take.spread(0.4, 1.2)
        rates = take.path(seconds, [take.spread(20.0, 160.0) for _ in range(4)])
        turns = np.cumsum(rates / take.rate)
        impulses = np.diff(np.floor(turns), prepend=0.0) * take.swell(seconds, 0.1, 0.1)
        return convolve(impulses, click)

    return _repeat(take, hinge, take.spread(0.6, 1.4), 2)


def fireworks(take: Take) -> Samples:
    """Bangs, some after a whistle, some with a crackle after them."""
    track = np.zeros(take.size)
    for instant in take.beats(take.spread(0.7, 3.0), 0.5, take.uniform(0.0, 0.5)):
        if take.chance(0.3):
            rise = take.path(0.5, [take.spread(1200.0, 2500.0), take.spread(2000.0, 5000.0)])
            whistle = take.tone(rise, [1.0, 0.2]) * take.swell(0.5, 0.1, 0.05)
            place_at(track, 0.2 * whistle, take.samples(max(0.0, instant - 0.5)))
        bang = take.noise(40.0, take.spread(800.0, 5000.0), size=take.samples(0.8), slope=-3.0)
        bang *= take.decay(0.8, 0.001, take.spread(0.04, 0.25))
        place_at(track, take.spread(0.3, 1.0) * bang, take.samples(instant))
        for _ in range(take.count(0, 12)):
            snap = take.noise(1500.0, 7000.0, size=take.samples(0.02)) * take.decay(
                0.02, 0.0003, 0.003
            )
            later = instant + 0.15 + float(take.rng.exponential(0.25))
            place_at(track, take.spread(0.1, 0.5) * snap, take.samples(later))
    return track


def pour(take: Take) -> Samples:
    """Water into a vessel: bubbles whose pitch rises as it fills."""
    low, high = take.spread(300.0, 700.0), take.spread(1.3, 3.0)
    track = np.zeros(take.size)
    for _ in range(int(take.spread(30.0, 120.0) * take.seconds)):
        at = take.uniform(0.0, take.seconds)
        pitch = low * high ** (at / take.seconds) * take.spread(0.6, 2.2)
        bubble = take.struck([(pitch, take.spread(0.006, 0.03), 1.0)], 0.1, 0.003)
        place_at(track, take.spread(0.1, 1.0) * bubble, take.samples(at))
    hiss = take.noise(take.spread(400.0, 1500.0), 8000.0, slope=-3.0)
    return unit(track) + take.spread(0.1, 0.8) * hiss * (1.0 + 0.2 * take.drift(6.0))


def plane(take: Take) -> Samples:
    """A jet that passes: a roar and a whine that sink in pitch."""
    middle, speed = take.uniform(0.2, 0.8), take.spread(0.5, 4.0)
    bend = -np.tanh(speed * (take.time / take.seconds - middle))
    near = 0.3 + np.exp(-((speed * (take.time / take.seconds - middle)) ** 2))
    roar = take.noise(50.0, take.spread(700.0, 3000.0), slope=-3.0) * near
    whine = take.tone(take.spread(700.0, 2500.0) * (1.0 + 0.12 * bend), rolloff(4, 8.0))
    return roar + take.spread(0.03, 0.4) * whine * near


def washer(take: Take) -> Samples:
    """A drum that turns: a hum, and a slosh once a turn."""
    pace = take.spread(0.6, 2.5)
    turn = take.time * pace + take.uniform(0.0, 1.0)
    slosh = np.exp(take.uniform(1.0, 3.0) * (np.cos(2.0 * np.pi * turn) - 1.0))
    water = take.noise(150.0, take.spread(1500.0, 5000.0), slope=-3.0) * slosh
    hum = take.tone(
        take.spread(50.0, 200.0) * (1.0 + 0.02 * np.cos(2.0 * np.pi * turn)), rolloff(16, 5.0)
    )
    return unit(water) + take.spread(0.2, 1.5) * unit(hum)


def brush(take: Take) -> Samples:
    """Quick strokes of bristles."""
    pace = take.spread(3.0, 9.0)
    turn = take.time * pace * (1.0 + 0.05 * take.drift(2.0)) + take.uniform(0.0, 1.0)
    stroke = np.abs(np.sin(np.pi * turn)) ** take.uniform(1.0, 3.0)
    other = 1.0 - take.uniform(0.0, 0.6) * (np.floor(turn) % 2)
    bright = take.noise(take.spread(800.0, 2500.0), take.spread(4000.0, 8000.0))
    return bright * stroke * other
