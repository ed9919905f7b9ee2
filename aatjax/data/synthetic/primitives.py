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
Partials: TypeAlias = Float[np.ndarray, " partials"]
_TABLE = 2048


@dataclass(frozen=True)
class Take:
    """One recording in the making.

    Signals have the length of the take unless `size` gives another.

    Attributes:
        rng: random stream of every draw of this recording.
        rate: sample rate in Hz.
        size: length in samples.
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
        """The instant of each sample in seconds."""
        return np.arange(self.size) / self.rate

    def samples(self, seconds: float) -> int:
        """Return the nearest number of samples to a duration, at least one."""
        return max(1, round(seconds * self.rate))

    def uniform(self, low: float, high: float) -> float:
        """Draw a number between two bounds."""
        return float(self.rng.uniform(low, high))

    def spread(self, low: float, high: float) -> float:
        """Draw a number between two positive bounds, uniform on a logarithmic scale."""
        return low * (high / low) ** self.uniform(0.0, 1.0)

    def count(self, low: int, high: int) -> int:
        """Draw a whole number between two bounds, both included."""
        return int(self.rng.integers(low, high + 1))

    def chance(self, probability: float) -> bool:
        """Return True with a probability."""
        return self.uniform(0.0, 1.0) < probability

    def noise(
        self, low: float, high: float, *, size: int | None = None, slope: float = 0.0
    ) -> Samples:
        """Gaussian noise between `low` and `high` Hz, tilted by `slope` dB/octave, at unit RMS."""
        size = self.size if size is None else size
        length = fast_length(max(size, 16))
        frequencies = _make_frequencies(length, self.rate)
        shape = band(frequencies, low, high)
        if slope:
            shape = shape * (np.maximum(frequencies, 20.0) / 1000.0) ** (slope / 6.0206)
        draws = self.rng.standard_normal((2, frequencies.size))
        return unit(np.fft.irfft((draws[0] + 1j * draws[1]) * shape, length)[:size])

    def formants(
        self, signal: Samples, peaks: list[tuple[float, float, float]], floor: float = 0.05
    ) -> Samples:
        """The signal through spectral peaks (centre Hz, width Hz, gain) above a flat floor."""
        length = fast_length(signal.size + 64)
        frequencies = _make_frequencies(length, self.rate)
        gain = np.full(frequencies.size, floor)
        for centre, width, height in peaks:
            gain += height / (1.0 + ((frequencies - centre) / width) ** 2)
        return np.fft.irfft(np.fft.rfft(signal, length) * gain, length)[: signal.size]

    def tone(
        self,
        frequency: float | Samples,
        amplitudes: list[float] | Partials,
        *,
        size: int | None = None,
    ) -> Samples:
        """A harmonic tone by table lookup; partials near the Nyquist frequency are omitted.

        Args:
            frequency: the fundamental in Hz: one number, or one per sample.
            amplitudes: amplitude of each partial, the fundamental first.
            size: the length where `frequency` is one number.
        """
        weights = np.asarray(amplitudes, dtype=np.float64)
        if isinstance(frequency, np.ndarray):
            phase, top = np.cumsum(frequency / self.rate), float(frequency.max())
        else:
            phase = np.arange(self.size if size is None else size) * (frequency / self.rate)
            top = frequency
        starts = np.exp(2j * np.pi * self.rng.uniform(size=weights.size))
        audible = np.arange(1, weights.size + 1) * top < 0.47 * self.rate
        spectrum = np.zeros(_TABLE // 2 + 1, dtype=np.complex128)
        spectrum[1 : weights.size + 1] = weights * audible * starts
        table = np.fft.irfft(spectrum, _TABLE) * (_TABLE / 2)
        position = (phase + self.uniform(0.0, 1.0)) * _TABLE
        whole = position.astype(np.int64)
        rest = position - whole
        index = whole & (_TABLE - 1)
        left = table[index]
        return left + rest * (table[(index + 1) & (_TABLE - 1)] - left)

    def decay(self, seconds: float, attack: float, fall: float) -> Samples:
        """An envelope: linear attack (s), then exponential fall by 1/e every `fall` seconds."""
        time = np.arange(self.samples(seconds)) / self.rate
        return np.minimum((time + 0.5 / self.rate) / attack, 1.0) * np.exp(-time / fall)

    def swell(self, seconds: float, attack: float, release: float) -> Samples:
        """An envelope: raised-cosine attack and release (s) around a level of one."""
        size = self.samples(seconds)
        time = (np.arange(size) + 0.5) / self.rate
        edge = np.minimum(np.minimum(time / attack, (size / self.rate - time) / release), 1.0)
        return 0.5 - 0.5 * np.cos(np.pi * np.maximum(edge, 0.0))

    def drift(self, pace: float, *, size: int | None = None) -> Samples:
        """A smooth random curve of about unit deviation that changes `pace` times per second."""
        size = self.size if size is None else size
        turns = size / self.rate * pace
        points = self.rng.standard_normal(int(turns) + 3)
        position = np.linspace(0.0, turns, size) + self.uniform(0.0, 1.0)
        whole = np.minimum(position.astype(np.int64), points.size - 2)
        rest = np.minimum(position - whole, 1.0)
        rest = rest * rest * (3.0 - 2.0 * rest)
        return points[whole] * (1.0 - rest) + points[whole + 1] * rest

    def path(self, seconds: float, points: list[float]) -> Samples:
        """Straight lines through evenly spaced points, over a duration."""
        size = self.samples(seconds)
        return np.interp(np.linspace(0.0, 1.0, size), np.linspace(0.0, 1.0, len(points)), points)

    def struck(
        self, modes: list[tuple[float, float, float]], seconds: float, attack: float = 0.0005
    ) -> Samples:
        """The sound of a struck body: a sum of modes (Hz, fall time in s, amplitude)."""
        time = np.arange(self.samples(seconds)) / self.rate
        audible = [mode for mode in modes if mode[0] < 0.47 * self.rate]
        if not audible:
            return np.zeros(time.size)
        pitch, fall, height = (np.array(column)[:, None] for column in zip(*audible, strict=True))
        phase = self.rng.uniform(0.0, 2.0 * np.pi, size=(len(audible), 1))
        body = (height * np.exp(-time / fall) * np.sin(2.0 * np.pi * pitch * time + phase)).sum(0)
        return body * np.minimum((time + 0.5 / self.rate) / attack, 1.0)

    def showers(self, per_second: float, tail: float = 1.0) -> Samples:
        """Impulses at random instants with log-normal heights of deviation `tail`."""
        track = np.zeros(self.size)
        number = max(1, int(self.rng.poisson(per_second * self.seconds)))
        where = self.rng.integers(0, self.size, size=number)
        signs = self.rng.choice(np.array([-1.0, 1.0]), size=number)
        np.add.at(track, where, signs * np.exp(tail * self.rng.standard_normal(number)))
        return track

    def beats(self, per_second: float, jitter: float, start: float = 0.0) -> list[float]:
        """Instants (s) of a pulse from `start` to the end, each gap varied by a share `jitter`."""
        instants, now = [], start
        while now < self.seconds and len(instants) < 4000:
            instants.append(now)
            now += max(0.2, 1.0 + jitter * float(self.rng.standard_normal())) / per_second
        return instants


@lru_cache(maxsize=512)
def fast_length(size: int) -> int:
    """Return the smallest 2^a 3^b 5^c that is not below `size`: a quick FFT length."""
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
def _make_frequencies(length: int, rate: int) -> Float[np.ndarray, " bins"]:
    frequencies = np.fft.rfftfreq(length, 1.0 / rate)
    frequencies.setflags(write=False)
    return frequencies


def band(
    frequencies: Float[np.ndarray, " bins"], low: float, high: float, order: int = 4
) -> Float[np.ndarray, " bins"]:
    """Return the magnitude of a smooth band-pass (Hz): 1 inside, falling by 6 * order dB/octave."""
    below = (np.maximum(frequencies, 1.0) / low) ** order
    above = (frequencies / high) ** order
    return below / (1.0 + below) / (1.0 + above)


def unit(signal: Samples) -> Samples:
    """Return the signal scaled to a root mean square of one (silence stays silence)."""
    return signal / max(float(np.sqrt(np.mean(signal * signal))), 1e-12)


def convolve(
    signal: Samples, response: Float[np.ndarray, " taps"], size: int | None = None
) -> Samples:
    """Convolve by FFT, cut to `size` samples (default: the length of the signal)."""
    size = signal.size if size is None else size
    length = fast_length(signal.size + response.size - 1)
    spectrum = np.fft.rfft(signal, length) * np.fft.rfft(response, length)
    out = np.fft.irfft(spectrum, length)[:size]
    return out if out.size == size else np.pad(out, (0, size - out.size))


def rolloff(count: int, slope: float) -> Partials:
    """Return the amplitudes of `count` harmonics that fall by `slope` dB/octave."""
    return np.arange(1, count + 1) ** (-slope / 6.0206)


def place_at(track: Samples, grain: Float[np.ndarray, " grain"], start: int) -> None:
    """Add a grain to a track, in place, from a sample on; it is cut at the ends of the track."""
    first, stop = max(start, 0), min(start + grain.size, track.size)
    if first < stop:
        track[first:stop] += grain[first - start : stop - start]
