"""Kaldi-compatible log-mel filter bank: a float64 NumPy reference and its batched JAX version.

Both compute what Kaldi's `compute-fbank-feats` does with a symmetric Hann window, no dither,
`snip_edges`, power spectrum and no energy coefficient: the front end of the Audio Spectrogram
Transformer (Gong et al. 2021, arXiv 2104.01778, section 2.1).

A frame has 400 samples, the hop is 160 samples: 25 ms and 10 ms at 16 kHz. They are the same at any
other `rate`, which only moves the mel filters.

With 128 filters at 16 kHz, the filter of index 3 covers no FFT bin, so its feature is always
`LOG_FLOOR`. Pretrained weights expect this.
"""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from aatjax.audio.waveform import FRAME
from aatjax.errors import UsageError

HOP = 160
"""Samples between the starts of two frames."""
FFT = 512
"""Length of the zero-padded Fourier transform."""
PRE_EMPHASIS = 0.97
LOW_HZ = 20.0
ENERGY_FLOOR = float(np.finfo(np.float32).eps)
"""Smallest filter energy before the logarithm, 2^-23."""
LOG_FLOOR = float(np.log(ENERGY_FLOOR))
"""Smallest log-mel value, -15.942385: that of digital silence."""


def count_frames(samples: int) -> int:
    """Return the number of whole frames in a number of samples."""
    return 0 if samples < FRAME else 1 + (samples - FRAME) // HOP


def count_samples(frames: int) -> int:
    """Return the least number of samples with `frames` frames (at least 1)."""
    if frames < 1:
        raise UsageError(f"frames is {frames}, but a spectrogram has at least 1 frame")
    return FRAME + HOP * (frames - 1)


def hertz_to_mel(hertz: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    """Return the HTK/Kaldi mel scale, 1127 ln(1 + f / 700)."""
    return 1127.0 * np.log1p(hertz / 700.0)


@lru_cache(maxsize=16)
def mel_bank(rate: int = 16000, mels: int = 128) -> Float[np.ndarray, "k f"]:
    """Return filters from 20 Hz to half the rate, triangular on the mel scale, with a peak of 1.

    Args:
        rate: sampling rate in Hz, above 40.
        mels: number of filters.

    Returns:
        Float64 weights `[257 FFT bins, mels]`, read-only. The last bin (half the rate) has no
        weight in any filter.

    Raises:
        UsageError: no filter, or a rate too low to hold any.
    """
    if mels < 1:
        raise UsageError(f"mels is {mels}, but at least 1 mel filter is needed")
    if rate <= 2 * LOW_HZ:
        raise UsageError(f"rate is {rate} Hz, but the mel filters start at {LOW_HZ:g} Hz")
    edges = hertz_to_mel(np.array([LOW_HZ, rate / 2]))
    step = (edges[1] - edges[0]) / (mels + 1)
    left = edges[0] + step * np.arange(mels)
    bins = hertz_to_mel(np.arange(FFT // 2 + 1) * (rate / FFT))
    rising = (bins[:, None] - left[None]) / step
    bank = np.maximum(0.0, np.minimum(rising, 2.0 - rising))
    bank[-1] = 0.0
    bank.setflags(write=False)
    return bank


def log_mel_reference(
    waveform: Float[np.ndarray, " s"],
    *,
    rate: int = 16000,
    mels: int = 128,
    subtract_mean: bool = False,
) -> Float[np.ndarray, "t f"]:
    """Compute log-mel features of one clip in float64, step by step from the formulas.

    Args:
        waveform: mono samples in [-1, 1], at least 400.
        rate: sampling rate in Hz.
        mels: number of mel filters.
        subtract_mean: subtract the mean of the whole clip first, as AST does. The mean of each
            frame is subtracted too, so this changes only the rounding.

    Returns:
        Natural logarithm of the filter energies, `[frames, mels]`, at least `LOG_FLOOR`.

    Raises:
        UsageError: less than one frame of samples.
    """
    count = _count(waveform.shape[-1])
    wave = waveform.astype(np.float64)
    if subtract_mean:
        wave = wave - wave.mean()
    starts = HOP * np.arange(count)
    frames = wave[starts[:, None] + np.arange(FRAME)[None]]
    frames = frames - frames.mean(axis=1, keepdims=True)
    previous = np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
    frames = (frames - PRE_EMPHASIS * previous) * np.hanning(FRAME)
    power = np.abs(np.fft.rfft(frames, FFT)) ** 2
    return np.log(np.maximum(power @ mel_bank(rate, mels), ENERGY_FLOOR))


def log_mel(
    waveform: Float[Array, "*b s"], *, rate: int = 16000, mels: int = 128
) -> Float[Array, "*b t f"]:
    """Compute log-mel features of a batch in float32; see `log_mel_reference`. Differentiable.

    Args:
        waveform: mono samples in [-1, 1], at least 400 in the last axis.
        rate: sampling rate in Hz (static).
        mels: number of mel filters (static).

    Returns:
        Natural logarithm of the filter energies, `[..., frames, mels]`, float32. On CPU and GPU the
        spectrum is computed in double precision; the result agrees with `log_mel_reference` to
        1e-5. TPUs have no double-precision transform. Single precision resolves about 100 dB below
        the loudest FFT bin of a frame: next to a full-scale tone, filters at the floor are exact
        to about 1e-2, values above -8 to about 1e-4.

    Raises:
        UsageError: less than one frame of samples.
    """
    power = _power(_frames(waveform.astype(jnp.float32)))
    bank = jnp.asarray(mel_bank(rate, mels), jnp.float32)
    energy = jnp.matmul(power, bank, precision=jax.lax.Precision.HIGHEST)
    return jnp.log(jnp.maximum(energy, ENERGY_FLOOR))


def _power_single(frames: Float[Array, "*b t 400"]) -> Float[Array, "*b t 257"]:
    """Power spectrum after mean subtraction, pre-emphasis and window, in the type of the frames."""
    frames = frames - jnp.mean(frames, axis=-1, keepdims=True)
    previous = jnp.concatenate([frames[..., :1], frames[..., :-1]], axis=-1)
    window = np.hanning(FRAME).astype(frames.dtype).reshape((1,) * (frames.ndim - 1) + (FRAME,))
    spectrum = jnp.fft.rfft((frames - PRE_EMPHASIS * previous) * window, FFT)
    return jnp.square(spectrum.real) + jnp.square(spectrum.imag)


def _power_double(frames: Float[Array, "*b t 400"]) -> Float[Array, "*b t 257"]:
    with jax.enable_x64(True):
        return _power_single(frames.astype(jnp.float64)).astype(jnp.float32)


@jax.custom_jvp
def _power(frames: Float[Array, "*b t 400"]) -> Float[Array, "*b t 257"]:
    """The power spectrum in double precision where the platform has it; its gradient in single."""
    return jax.lax.platform_dependent(frames, tpu=_power_single, default=_power_double)


@_power.defjvp
def _power_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return _power(*primals), jax.jvp(_power_single, primals, tangents)[1]


def _frames(waveform: Float[Array, "*b s"]) -> Float[Array, "*b t 400"]:
    """Overlapping frames by slices instead of a gather: a frame is two and a half hops."""
    count = _count(waveform.shape[-1])
    length = (count + 2) * HOP
    pad = max(0, length - waveform.shape[-1])
    waveform = jnp.pad(waveform, [(0, 0)] * (waveform.ndim - 1) + [(0, pad)])[..., :length]
    blocks = waveform.reshape(*waveform.shape[:-1], count + 2, HOP)
    parts = [blocks[..., i : i + count, :] for i in range(3)]
    return jnp.concatenate([*parts[:2], parts[2][..., : FRAME - 2 * HOP]], axis=-1)


def _count(samples: int) -> int:
    count = count_frames(samples)
    if count == 0:
        raise UsageError(
            f"{samples} samples are less than one frame: pad the clip to at least {FRAME} samples"
        )
    return count
