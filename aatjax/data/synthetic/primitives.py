"""The building blocks of synthetic sounds: noise, tones, envelopes, resonators, grains.

Everything is float64 NumPy and a pure function of its arguments and of the random stream of a
`Take`. Filters work in the frequency domain and oscillators by accumulated phase, so that no
feedback can amplify the last-bit differences between two processors.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TypeAlias

import numpy as np
from jaxtyping import Float

Samples: TypeAlias = Float[np.ndarray, " s"]
_TABLE = 2048


@dataclass(frozen=True)
class Take:
    """One recording in the making.

    Attributes:
        rng: The random stream that every draw of this recording comes from.
        rate: Sample rate in Hz.
        size: Length in samples.
    """

    rng: np.random.Generator
    rate: int
    size: int

    @property
    def seconds(self) -> float:
        """Length in seconds."""
        return self.size / self.rate

    @cached_property
    def time(self) -> Samples:
        """The instant of each sample in seconds, shape (s,)."""
        return np.arange(self.size) / self.rate

    def samples(self, seconds: float) -> int:
        """The nearest number of samples to a duration, at least one."""
        return max(1, round(seconds * self.rate))

    def uniform(self, low: float, high: float) -> float:
        """A number drawn evenly between two bounds."""
        return float(self.rng.uniform(low, high))

    def spread(self, low: float, high: float) -> float:
        """A number drawn evenly on a logarithmic scale between two positive bounds."""
        return low * (high / low) ** self.uniform(0.0, 1.0)

    def count(self, low: int, high: int) -> int:
        """A whole number between two bounds, both included."""
        return int(self.rng.integers(low, high + 1))

    def chance(self, probability: float) -> bool:
        """True with a probability."""
        return self.uniform(0.0, 1.0) < probability


@lru_cache(maxsize=512)
def fast_length(size: int) -> int:
    """The smallest length of the form 2^a 3^b 5^c, not below `size`: a quick FFT length."""
    best = 1 << max(0, size - 1).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            length = three << max(0, -(-size // three) - 1).bit_length()
            best = min(best, length)
            three *= 3
        five *= 5
    return best


@lru_cache(maxsize=16)
def _frequencies(length: int, rate: int) -> Float[np.ndarray, " bins"]:
    frequencies = np.fft.rfftfreq(length, 1.0 / rate)
    frequencies.setflags(write=False)
    return frequencies


def band(
    frequencies: Float[np.ndarray, " bins"], low: float, high: float, order: int = 4
) -> Float[np.ndarray, " bins"]:
    """Magnitude of a smooth band-pass at each frequency (Hz), 1 well inside `low`..`high` Hz.

    Each edge falls by about 6 * order dB an octave.
    """
    below = (np.maximum(frequencies, 1.0) / low) ** order
    above = (frequencies / high) ** order
    return below / (1.0 + below) / (1.0 + above)


def unit(signal: Samples) -> Samples:
    """The signal scaled to a root mean square of one (silence stays silence)."""
    return signal / max(float(np.sqrt(np.mean(signal * signal))), 1e-12)


def noise(
    take: Take, low: float, high: float, *, size: int | None = None, slope: float = 0.0
) -> Samples:
    """Gaussian noise between `low` and `high` Hz, tilted by `slope` dB an octave, at unit RMS.

    Returns:
        `size` samples (default: the length of the take), shape (s,).
    """
    size = take.size if size is None else size
    length = fast_length(max(size, 16))
    frequencies = _frequencies(length, take.rate)
    shape = band(frequencies, low, high)
    if slope:
        shape = shape * (np.maximum(frequencies, 20.0) / 1000.0) ** (slope / 6.0206)
    draws = take.rng.standard_normal((2, frequencies.size))
    return unit(np.fft.irfft((draws[0] + 1j * draws[1]) * shape, length)[:size])


def convolve(
    signal: Samples, response: Float[np.ndarray, " taps"], size: int | None = None
) -> Samples:
    """Linear convolution by FFT, cut to `size` samples (default: the length of the signal)."""
    size = signal.size if size is None else size
    length = fast_length(signal.size + response.size - 1)
    spectrum = np.fft.rfft(signal, length) * np.fft.rfft(response, length)
    out = np.fft.irfft(spectrum, length)[:size]
    return out if out.size == size else np.pad(out, (0, size - out.size))


def formants(
    take: Take,
    signal: Samples,
    peaks: list[tuple[float, float, float]],
    floor: float = 0.05,
) -> Samples:
    """The signal through spectral peaks (centre Hz, width Hz, gain) above a flat floor."""
    length = fast_length(signal.size + 64)
    frequencies = _frequencies(length, take.rate)
    gain = np.full(frequencies.size, floor)
    for centre, width, height in peaks:
        gain += height / (1.0 + ((frequencies - centre) / width) ** 2)
    return np.fft.irfft(np.fft.rfft(signal, length) * gain, length)[: signal.size]


def tone(
    take: Take,
    frequency: float | Samples,
    amplitudes: list[float] | Float[np.ndarray, " partials"],
    *,
    size: int | None = None,
) -> Samples:
    """A harmonic tone by table lookup; partials above the Nyquist frequency are left out.

    Args:
        take: The take, for the rate and the phases of the partials.
        frequency: The fundamental in Hz: one number, or one a sample, shape (s,).
        amplitudes: The amplitude of each partial, the fundamental first, shape (partials,).
        size: The length where `frequency` is one number (default: that of the take).

    Returns:
        The tone, shape (s,).
    """
    weights = np.asarray(amplitudes, dtype=np.float64)
    if isinstance(frequency, np.ndarray):
        phase, top = np.cumsum(frequency / take.rate), float(frequency.max())
    else:
        phase = np.arange(take.size if size is None else size) * (frequency / take.rate)
        top = frequency
    starts = np.exp(2j * np.pi * take.rng.uniform(size=weights.size))
    heard = np.arange(1, weights.size + 1) * top < 0.47 * take.rate
    spectrum = np.zeros(_TABLE // 2 + 1, dtype=np.complex128)
    spectrum[1 : weights.size + 1] = weights * heard * starts
    table = np.fft.irfft(spectrum, _TABLE) * (_TABLE / 2)
    position = (phase + take.uniform(0.0, 1.0)) * _TABLE
    whole = position.astype(np.int64)
    rest = position - whole
    index = whole & (_TABLE - 1)
    left = table[index]
    return left + rest * (table[(index + 1) & (_TABLE - 1)] - left)


def rolloff(count: int, slope: float) -> Float[np.ndarray, " partials"]:
    """Amplitudes of `count` harmonics that fall by `slope` dB an octave."""
    return np.arange(1, count + 1) ** (-slope / 6.0206)


def decay(take: Take, seconds: float, attack: float, fall: float) -> Samples:
    """An envelope: a linear attack (s), then an exponential fall by 1/e every `fall` seconds."""
    time = np.arange(take.samples(seconds)) / take.rate
    return np.minimum((time + 0.5 / take.rate) / attack, 1.0) * np.exp(-time / fall)


def swell(take: Take, seconds: float, attack: float, release: float) -> Samples:
    """An envelope: raised-cosine attack and release (s) around a level of one."""
    size = take.samples(seconds)
    time = (np.arange(size) + 0.5) / take.rate
    edge = np.minimum(np.minimum(time / attack, (size / take.rate - time) / release), 1.0)
    return 0.5 - 0.5 * np.cos(np.pi * np.maximum(edge, 0.0))


def drift(take: Take, pace: float, *, size: int | None = None) -> Samples:
    """A smooth random curve of about unit deviation that changes `pace` times a second."""
    size = take.size if size is None else size
    turns = size / take.rate * pace
    points = take.rng.standard_normal(int(turns) + 3)
    position = np.linspace(0.0, turns, size) + take.uniform(0.0, 1.0)
    whole = np.minimum(position.astype(np.int64), points.size - 2)
    rest = np.minimum(position - whole, 1.0)
    rest = rest * rest * (3.0 - 2.0 * rest)
    return points[whole] * (1.0 - rest) + points[whole + 1] * rest


def path(take: Take, seconds: float, points: list[float]) -> Samples:
    """Straight lines through evenly spaced points, over a duration."""
    size = take.samples(seconds)
    return np.interp(np.linspace(0.0, 1.0, size), np.linspace(0.0, 1.0, len(points)), points)


def place_at(track: Samples, grain: Float[np.ndarray, " grain"], start: int) -> None:
    """Add a grain to a track, in place, from a sample on; what hangs over an end is cut."""
    first, stop = max(start, 0), min(start + grain.size, track.size)
    if first < stop:
        track[first:stop] += grain[first - start : stop - start]


def struck(
    take: Take, modes: list[tuple[float, float, float]], seconds: float, attack: float = 0.0005
) -> Samples:
    """What a struck body sounds: a sum of modes (Hz, fall time in s, amplitude), shape (s,)."""
    time = np.arange(take.samples(seconds)) / take.rate
    heard = [mode for mode in modes if mode[0] < 0.47 * take.rate]
    if not heard:
        return np.zeros(time.size)
    pitch, fall, height = (np.array(column)[:, None] for column in zip(*heard, strict=True))
    phase = take.rng.uniform(0.0, 2.0 * np.pi, size=(len(heard), 1))
    body = (height * np.exp(-time / fall) * np.sin(2.0 * np.pi * pitch * time + phase)).sum(0)
    return body * np.minimum((time + 0.5 / take.rate) / attack, 1.0)


def showers(take: Take, per_second: float, tail: float = 1.0) -> Samples:
    """Impulses at random instants with log-normal heights of deviation `tail`, shape (s,)."""
    track = np.zeros(take.size)
    number = max(1, int(take.rng.poisson(per_second * take.seconds)))
    where = take.rng.integers(0, take.size, size=number)
    signs = take.rng.choice(np.array([-1.0, 1.0]), size=number)
    np.add.at(track, where, signs * np.exp(tail * take.rng.standard_normal(number)))
    return track


def beats(take: Take, per_second: float, jitter: float, start: float = 0.0) -> list[float]:
    """Instants (s) of a pulse from `start` to the end, each gap varied by a share `jitter`."""
    instants, now = [], start
    while now < take.seconds and len(instants) < 4000:
        instants.append(now)
        now += max(0.2, 1.0 + jitter * float(take.rng.standard_normal())) / per_second
    return instants
