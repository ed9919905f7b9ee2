"""Spoken words of no language, by another voice in every clip.

A source (a buzz and breath) passes through a vocal tract whose resonances glide from sound to
sound. Every voice has its own pitch, melody, tract length, pace and breathiness, so that a model
which tells the words apart has learnt the sounds, not a speaker.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from aatjax.data.synthetic.primitives import Samples, Take, place_at, rolloff

Frames = Float[np.ndarray, " frames"]
HOP, WINDOW = 0.004, 0.016  # seconds between the spectra that shape the source, and their length


@dataclass(frozen=True)
class Phone:
    """One sound of speech.

    Attributes:
        formants: the first three resonances of a long vocal tract, Hz.
        seconds: its usual length.
        voice: level of the buzz.
        breath: level of noise through the resonances.
        hiss: level of noise of its own, around `centre` Hz with a deviation of `width` Hz.
        trill: depth of a beat at some 25 Hz.
    """

    formants: tuple[float, float, float]
    seconds: float
    voice: float = 0.0
    breath: float = 0.0
    hiss: float = 0.0
    centre: float = 3000.0
    width: float = 1000.0
    trill: float = 0.0


_VOWELS = {  # near the averages of men in Peterson and Barney (1952) and Catford (1988)
    "i": (280, 2250, 2950),
    "e": (400, 2050, 2600),
    "E": (560, 1800, 2500),
    "a": (780, 1250, 2550),
    "o": (420, 780, 2450),
    "u": (300, 750, 2300),
    "y": (270, 1850, 2150),
    "c": (500, 1450, 2450),
}
_LIPS, _GUMS, _PALATE, _THROAT = (
    (300, 850, 2200),
    (320, 1750, 2650),
    (300, 2050, 2450),
    (600, 1250, 2500),
)
_GAP = 0.055  # seconds of closure before the burst of a stop

VOWELS: dict[str, Phone] = {
    name: Phone(formants, 0.13, voice=1.0) for name, formants in _VOWELS.items()
}
CONSONANTS: dict[str, tuple[Phone, ...]] = {
    "p": (Phone(_LIPS, _GAP), Phone(_LIPS, 0.03, breath=0.5, hiss=0.25, centre=900, width=700)),
    "t": (Phone(_GUMS, _GAP), Phone(_GUMS, 0.035, breath=0.4, hiss=0.7, centre=4300, width=1400)),
    "k": (
        Phone(_PALATE, _GAP),
        Phone(_PALATE, 0.045, breath=0.5, hiss=0.6, centre=1900, width=600),
    ),
    "q": (
        Phone(_THROAT, _GAP),
        Phone(_THROAT, 0.035, breath=0.4, hiss=0.5, centre=1100, width=500),
    ),
    "b": (Phone(_LIPS, _GAP, voice=0.12), Phone(_LIPS, 0.012, voice=0.3, hiss=0.2, centre=800)),
    "d": (Phone(_GUMS, _GAP, voice=0.12), Phone(_GUMS, 0.014, voice=0.3, hiss=0.4, centre=3800)),
    "g": (Phone(_PALATE, _GAP, voice=0.12), Phone(_PALATE, 0.02, voice=0.3, hiss=0.4, centre=1800)),
    "f": (Phone(_LIPS, 0.11, hiss=0.25, centre=5500, width=3500),),
    "T": (Phone(_GUMS, 0.1, hiss=0.25, centre=6200, width=2500),),
    "s": (Phone(_GUMS, 0.12, hiss=0.8, centre=6000, width=1300),),
    "S": (Phone(_PALATE, 0.12, hiss=0.9, centre=3100, width=900),),
    "x": (Phone(_PALATE, 0.11, breath=0.4, hiss=0.5, centre=1500, width=500),),
    "h": (Phone((600, 1400, 2500), 0.08, breath=0.7),),
    "H": (Phone((750, 1300, 2500), 0.11, breath=1.0),),
    "v": (Phone(_LIPS, 0.08, voice=0.4, hiss=0.15, centre=5000, width=3000),),
    "z": (Phone(_GUMS, 0.09, voice=0.35, hiss=0.5, centre=6000, width=1300),),
    "A": (Phone((700, 1200, 2500), 0.08, voice=0.6, trill=0.5),),
    "m": (Phone((250, 1000, 2200), 0.08, voice=0.3),),
    "n": (Phone((250, 1550, 2500), 0.08, voice=0.3),),
    "l": (Phone((350, 1150, 2700), 0.075, voice=0.5),),
    "r": (Phone((450, 1300, 1750), 0.08, voice=0.5, trill=0.6),),
    "w": (Phone((300, 650, 2200), 0.07, voice=0.6),),
    "j": (Phone((260, 2150, 2950), 0.07, voice=0.6),),
}


def _spell(count: int) -> tuple[str, ...]:
    """Return distinct words of one to three syllables, always the same."""
    rng = np.random.Generator(np.random.PCG64(20241130))
    vowels, consonants = sorted(VOWELS), sorted(CONSONANTS)
    words: dict[str, None] = {}
    while len(words) < count:
        syllables = int(rng.choice(3, p=(0.35, 0.5, 0.15))) + 1
        word = ""
        for _ in range(syllables):
            start = consonants[rng.integers(len(consonants))] if rng.random() < 0.9 else ""
            word += start + vowels[rng.integers(len(vowels))]
        if rng.random() < 0.6:
            word += consonants[rng.integers(len(consonants))]
        if len(word) > 1:
            words[word] = None
    return tuple(words)


WORDS: tuple[str, ...] = _spell(80)
"""Words for pretraining, a letter for each sound."""


def say(take: Take, word: str) -> Samples:
    """Return a word, said by a new voice somewhere in the take."""
    phones = [phone for letter in word for phone in CONSONANTS.get(letter) or (VOWELS[letter],)]
    pace = take.spread(0.7, 1.5)
    lengths = np.array([one.seconds * pace * take.spread(0.75, 1.35) for one in phones])
    lengths[-1] *= take.spread(1.0, 1.6)
    lengths *= min(1.0, 0.9 * take.seconds / lengths.sum())
    tract = take.spread(0.95, 1.45)  # resonances of children lie higher
    pitch = min(420.0, take.spread(75.0, 160.0) * tract**2.0 * take.spread(0.8, 1.3))
    sound = utter(take, phones, lengths, tract, pitch)
    track = np.zeros(take.size)
    place_at(track, sound, take.count(0, max(0, take.size - sound.size)))
    return track


def utter(
    take: Take,
    phones: list[Phone],
    lengths: Float[np.ndarray, " phones"],
    tract: float,
    pitch: float,
    bends: tuple[float, float] = (0.8, 1.3),
) -> Samples:
    """Return sounds one after another.

    Args:
        take: the recording.
        phones: the sounds.
        lengths: of each, seconds.
        tract: factor on all resonances.
        pitch: at the start, Hz.
        bends: bounds of the factors on the pitch, three of them drawn over the whole length.
    """
    margin = 0.03
    seconds = float(lengths.sum()) + 2 * margin
    size, hop = take.samples(seconds), take.samples(HOP)
    times = np.arange(-(-size // hop) + 1) * hop / take.rate - margin
    which = np.clip(np.searchsorted(np.cumsum(lengths), times), 0, len(phones) - 1)
    inside = (times >= 0.0) & (times <= lengths.sum())

    def track(values: list[float], smooth: float, silent: bool = True) -> Frames:
        course = np.array(values)[which] * (inside if silent else 1.0)
        reach = max(1, round(3 * smooth / HOP))
        weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) * HOP / smooth) ** 2)
        return np.convolve(np.pad(course, reach, mode="edge"), weights / weights.sum(), "valid")

    glide = take.spread(0.018, 0.035)
    shifts = np.exp(0.06 * take.rng.standard_normal((len(phones), 3)))
    formants = [
        track([p.formants[k] * shifts[n, k] * tract for n, p in enumerate(phones)], glide, False)
        for k in range(3)
    ]
    voice = track([p.voice for p in phones], 0.008)
    breathy = take.spread(0.01, 0.15)
    breath = track([p.breath + breathy * p.voice for p in phones], 0.006)
    hiss = track([p.hiss for p in phones], 0.005)
    trill = track([p.trill for p in phones], 0.008)
    voice *= 1.0 - trill * (0.5 + 0.5 * np.sin(2 * np.pi * take.uniform(20.0, 30.0) * times))

    at = np.arange(size) / take.rate - margin
    melody = take.path(seconds, [1.0, *(take.spread(*bends) for _ in range(3))])
    wobble = np.exp(0.02 * take.drift(12.0, size=size))
    buzz = take.tone(pitch * melody * wobble, rolloff(120, take.uniform(1.0, 6.0)))
    frequencies = np.fft.rfftfreq(2 * take.samples(WINDOW), 1.0 / take.rate)
    throat = _resonate(
        frequencies, [*formants, *(np.full(times.size, f * tract) for f in (3400, 4300))]
    )
    centres = track([p.centre * tract**0.5 for p in phones], 0.005, False)[:, None]
    widths = track([p.width for p in phones], 0.005, False)[:, None]
    teeth = np.exp(-0.5 * ((frequencies - centres) / widths) ** 2)
    white = take.rng.standard_normal((2, size)) * take.spread(0.4, 1.0)

    def level(course: Frames) -> Samples:
        return np.interp(at, times, course)

    spoken = _shape(buzz * level(voice), throat, hop)
    spoken += _shape(0.35 * white[0] * level(breath), throat, hop)
    return spoken + _shape(0.6 * white[1] * level(hiss), teeth, hop)


def _resonate(
    frequencies: Float[np.ndarray, " bins"], formants: list[Frames]
) -> Float[np.ndarray, "frames bins"]:
    """Gain of resonances in a row (Fant, 1960), each frame's largest one."""
    gain = np.ones((formants[0].size, frequencies.size))
    for centre in formants:
        square, width = centre[:, None] ** 2, (50.0 + 0.05 * centre)[:, None]
        gap = np.abs(square - frequencies**2)
        gain *= square / np.sqrt(gap**2 + (width * frequencies) ** 2)
    return gain / gain.max(axis=1, keepdims=True)


def _shape(source: Samples, gains: Float[np.ndarray, "frames bins"], hop: int) -> Samples:
    """The source through a filter that changes from frame to frame: overlapping windows."""
    length = 2 * (gains.shape[1] - 1)
    half = length // 4
    padded = np.pad(source, (half, length + hop * gains.shape[0]))
    window = 0.5 - 0.5 * np.cos(2.0 * np.pi * (np.arange(2 * half) + 0.5) / (2 * half))
    starts = np.arange(gains.shape[0]) * hop
    pieces = padded[starts[:, None] + np.arange(2 * half)] * window
    shaped = np.fft.irfft(np.fft.rfft(pieces, length, axis=1) * gains, length, axis=1)
    out = np.zeros(padded.size)
    for start, piece in zip(starts, shaped, strict=True):
        out[start : start + length] += piece
    return out[half : half + source.size] * (hop / half)
