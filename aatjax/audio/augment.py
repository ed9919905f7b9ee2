"""Training augmentation on the device: pure functions of a random key and a batch.

The order is that of AST's training (Gong et al. 2021, arXiv 2104.01778, section 3; mixup after
Tokozume et al. 2018, masks after Park et al. 2019): mixup of the waveforms, log-mel, warp of the
frequencies, cut-off and gain (not in AST), one frequency and one time mask, normalisation, additive
noise, circular roll. Each clip has random numbers of its own. The same key gives the same result on
any number of devices.

One difference from AST: the mixup partner is another clip of the same batch, where AST draws it
from the whole training list. Batches are uniform samples of that list, so each partner is as
likely, but a batch with a single real clip is never mixed.
"""

import dataclasses
import math
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int16, Integer, Key, UInt32

from aatjax.audio.fbank import LOG_FLOOR, LOW_HZ, hertz_to_mel
from aatjax.audio.frontend import FrontEnd
from aatjax.errors import Range, check_fields

PRNGKey = Key[Array, ""] | UInt32[Array, "2"]


@dataclasses.dataclass(frozen=True)
class Augment:
    """Augmentation of a training batch; none by default.

    Attributes:
        mixup: probability in [0, 1] that a clip is mixed with another.
        mixup_alpha: the mixing factor is drawn from Beta(alpha, alpha).
        freq_mask: the frequency mask is narrower than this many mel bins; 0 is no mask.
        time_mask: the time mask is shorter than this many frames; 0 is no mask.
        gain: make each clip louder or softer by up to this many dB; 0 leaves the level.
        warp: stretch the frequencies of each clip by a factor of up to 1 + warp, or divide them by
            it, as by another length of the vocal tract (Jaitly and Hinton 2013); 0 leaves them.
        lowpass: probability in [0, 1] that a clip loses the frequencies above 1/4 to 1 of the
            highest one, as in recordings of a lower sampling rate.
        noise: add uniform noise to the normalised features.
        roll: roll the normalised features along time by -10 to 9 frames.
        spec_after_norm: mask after normalisation (with the mean level of the data set), as the
            parameter-efficient transfer learning papers on AST do, instead of before it (with
            0.0 in the log-mel domain, which is a loud sound).
    """

    mixup: Annotated[float, Range(0, 1)] = 0.0
    mixup_alpha: Annotated[float, Range(above=0)] = 10.0
    freq_mask: Annotated[int, Range(0)] = 0
    time_mask: Annotated[int, Range(0)] = 0
    noise: bool = False
    roll: bool = False
    spec_after_norm: bool = False
    gain: Annotated[float, Range(0)] = 0.0
    warp: Annotated[float, Range(0, 1)] = 0.0
    lowpass: Annotated[float, Range(0, 1)] = 0.0

    def __post_init__(self) -> None:
        check_fields(self, "augment.")

    def __call__(
        self,
        key: PRNGKey,
        frontend: FrontEnd,
        audio: Int16[Array, "b s"] | Float[Array, "b *s"],
        length: Integer[Array, " b"],
        target: Float[Array, "b c"],
        weight: Float[Array, " b"],
    ) -> tuple[Float[Array, "b t f"], Float[Array, "b c"]]:
        """Return augmented, normalised features `[b, t, f]` and (mixed) targets of fitted clips.

        The arguments are those of `mixup`; without mixup `audio` may be what the front end takes in
        place of sounds. Switching one augmentation on or off does not change the random numbers of
        the others.
        """
        mix_key, mask_key, noise_key, roll_key = jax.random.split(key, 4)
        if self.mixup > 0.0:
            audio, target = mixup(
                mix_key, audio, length, target, weight, prob=self.mixup, alpha=self.mixup_alpha
            )
        masks = dict(freq=self.freq_mask, time=self.time_mask)
        x = frontend.features(audio, length)
        if self.warp > 0.0:
            x = warp_frequencies(jax.random.fold_in(key, 5), x, limit=self.warp, rate=frontend.rate)
        if self.lowpass > 0.0:
            x = cut_off(jax.random.fold_in(key, 6), x, prob=self.lowpass, rate=frontend.rate)
        if self.gain > 0.0:
            valid = frontend.valid_frames(length)
            x = change_gain(jax.random.fold_in(key, 4), x, valid, limit=self.gain)
        if self.spec_after_norm:
            x = mask_spectrogram(mask_key, frontend.normalise(x), **masks)
        else:
            x = frontend.normalise(mask_spectrogram(mask_key, x, **masks))
        if self.noise:
            x = add_noise(noise_key, x)
        if self.roll:
            x = roll_time(roll_key, x)
        return x, target


def mixup(
    key: PRNGKey,
    audio: Int16[Array, "b s"] | Float[Array, "b s"],
    length: Integer[Array, " b"],
    target: Float[Array, "b c"],
    weight: Float[Array, " b"],
    *,
    prob: float,
    alpha: float = 10.0,
) -> tuple[Float[Array, "b s"], Float[Array, "b c"]]:
    """Mix waveforms and targets of different clips, each clip with probability `prob`.

    mixed = l * clip + (1 - l) * partner with l ~ Beta(alpha, alpha). The partner is cut or
    zero-padded to the length of the clip. The mean is subtracted from both waveforms and from the
    mixture.

    Args:
        key: random key.
        audio: fitted clips, int16 or float in [-1, 1].
        length: valid samples of each clip.
        target: targets, any real-valued rows.
        weight: weight of each clip; a clip of weight 0 is padding of the batch: it is not mixed
            and is no partner.
        prob: probability that a clip is mixed.
        alpha: both parameters of the Beta distribution.

    Returns:
        Float32 waveforms in [-1, 1] and float32 targets. Clips that are not mixed are unchanged.
    """
    wave = audio.astype(jnp.float32)
    if audio.dtype == jnp.int16:
        wave = wave * (1.0 / 32768.0)
    target = target.astype(jnp.float32)
    batch, samples = wave.shape
    coin_key, partner_key, factor_key = jax.random.split(key, 3)

    real = weight > 0
    allowed = real[None, :] & ~jnp.eye(batch, dtype=bool)
    chance = jnp.where(allowed, jnp.float32(0.0), -jnp.inf)
    partner = jax.random.categorical(partner_key, chance, axis=-1)
    chosen = jax.random.uniform(coin_key, (batch,), jnp.float32) < prob
    mixes = chosen & real & jnp.any(allowed, axis=-1)
    factor = jax.random.beta(factor_key, alpha, alpha, (batch,), jnp.float32)[:, None]

    valid = jnp.arange(samples, dtype=length.dtype)[None, :] < length[:, None]
    centred = _centre(wave, valid)
    mixed = _centre(factor * centred + (1.0 - factor) * centred[partner], valid)
    blend = factor * target + (1.0 - factor) * target[partner]
    return jnp.where(mixes[:, None], mixed, wave), jnp.where(mixes[:, None], blend, target)


def _centre(wave: Float[Array, "b s"], valid: Bool[Array, "b s"]) -> Float[Array, "b s"]:
    """Subtract the mean of the valid samples and set the others to zero."""
    count = jnp.maximum(jnp.sum(valid, axis=-1, keepdims=True, dtype=wave.dtype), 1)
    mean = jnp.sum(jnp.where(valid, wave, 0.0), axis=-1, keepdims=True) / count
    return jnp.where(valid, wave - mean, 0.0)


def change_gain(
    key: PRNGKey, x: Float[Array, "b t f"], valid: Bool[Array, "b t"], *, limit: float
) -> Float[Array, "b t f"]:
    """Change the level of each clip by U[-limit, limit) dB, in the log-mel domain.

    A gain of g dB multiplies powers by 10^(g / 10), so their natural logarithms grow by
    g ln(10) / 10; values at the floor of the log-mel stay there.

    Args:
        key: random key.
        x: log-mel before normalisation.
        valid: frames that are not padding; others are unchanged.
        limit: largest change in dB.
    """
    shift = jax.random.uniform(key, (x.shape[0], 1, 1), x.dtype, -limit, limit)
    louder = jnp.maximum(x + shift * (math.log(10) / 10), LOG_FLOOR)
    return jnp.where(valid[:, :, None], louder, x)


def warp_frequencies(
    key: PRNGKey, x: Float[Array, "b t f"], *, limit: float, rate: int = 16000
) -> Float[Array, "b t f"]:
    """Move what is at f Hz to a f Hz, with ln a ~ U[-ln(1 + limit), ln(1 + limit)) per clip.

    Between the mel bins it is interpolated; above what the clip holds is its highest bin.

    Args:
        key: random key.
        x: log-mel before normalisation.
        limit: largest stretch.
        rate: sampling rate in Hz.
    """
    low, step = _space_bins(x.shape[2], rate)
    hertz = 700.0 * np.expm1((low + step * np.arange(1, x.shape[2] + 1)) / 1127.0)
    most = math.log1p(limit)
    factor = jnp.exp(jax.random.uniform(key, (x.shape[0], 1), x.dtype, -most, most))
    mel = 1127.0 * jnp.log1p(jnp.asarray(hertz, x.dtype)[None] / factor / 700.0)
    place = jnp.clip((mel - low) / step - 1.0, 0.0, x.shape[2] - 1.0)
    below = jnp.minimum(place.astype(jnp.int32), x.shape[2] - 2)
    share = (place - below)[:, None]
    lower, upper = (
        jnp.take_along_axis(x, jnp.broadcast_to(bins[:, None], x.shape), axis=2)
        for bins in (below, below + 1)
    )
    return lower + share * (upper - lower)


def _space_bins(mels: int, rate: int) -> tuple[float, float]:
    """Return where the mel scale of the front end begins, and the distance of its bins."""
    low, high = hertz_to_mel(np.array([LOW_HZ, rate / 2]))
    return float(low), float((high - low) / (mels + 1))


def cut_off(
    key: PRNGKey, x: Float[Array, "b t f"], *, prob: float, rate: int = 16000
) -> Float[Array, "b t f"]:
    """Lower what is above U[rate / 8, rate / 2) Hz by 60 dB, in some of the clips.

    Args:
        key: random key.
        x: log-mel before normalisation; values at its floor stay there.
        prob: probability for a clip.
        rate: sampling rate in Hz.
    """
    coin, place = jax.random.uniform(key, (2, x.shape[0], 1), x.dtype)
    low, step = _space_bins(x.shape[2], rate)
    highest = 1127.0 * jnp.log1p((1 + 3 * place) * (rate / 8) / 700.0)
    mel = jnp.asarray(low + step * np.arange(1, x.shape[2] + 1), x.dtype)[None]
    lost = (coin < prob) & (mel > highest)
    return jnp.where(lost[:, None], jnp.maximum(x - 6 * math.log(10), LOG_FLOOR), x)


def mask_spectrogram(
    key: PRNGKey, x: Float[Array, "b t f"], *, freq: int, time: int, fill: float = 0.0
) -> Float[Array, "b t f"]:
    """Mask one band of frequencies and one span of frames in each clip (SpecAugment).

    With u, v ~ U[0, 1) a mask is floor(u * size) wide, so less than `size`, and starts at
    floor(v * (axis - u * size)) (Park et al. 2019).

    Args:
        key: random key.
        x: features.
        freq: upper bound of the frequency mask in mel bins; 0 is no mask.
        time: upper bound of the time mask in frames; 0 is no mask.
        fill: value of masked features.
    """
    freq_key, time_key = jax.random.split(key)
    batch, frames, mels = x.shape
    masked = (
        _span(time_key, batch, frames, time)[:, :, None]
        | _span(freq_key, batch, mels, freq)[:, None, :]
    )
    return jnp.where(masked, jnp.asarray(fill, x.dtype), x)


def _span(key: PRNGKey, batch: int, axis: int, size: int) -> Bool[Array, "b n"]:
    """One random run of True per row."""
    u, v = jax.random.uniform(key, (2, batch, 1), jnp.float32)
    width = u * min(size, axis)
    start = jnp.floor(v * (axis - width))
    index = jnp.arange(axis, dtype=jnp.float32)[None, :]
    return (index >= start) & (index < start + jnp.floor(width))


def add_noise(key: PRNGKey, x: Float[Array, "b t f"]) -> Float[Array, "b t f"]:
    """Add U[0, 1) noise times a factor from U[0, 0.1) per clip."""
    noise_key, scale_key = jax.random.split(key)
    scale = jax.random.uniform(scale_key, (x.shape[0], 1, 1), x.dtype) / 10.0
    return x + scale * jax.random.uniform(noise_key, x.shape, x.dtype)


def roll_time(key: PRNGKey, x: Float[Array, "b t f"]) -> Float[Array, "b t f"]:
    """Roll each clip circularly along time, by a whole number of frames in [-10, 9]."""
    shift = jax.random.randint(key, (x.shape[0],), -10, 10, jnp.int32)
    return jax.vmap(lambda clip, by: jnp.roll(clip, by, axis=0))(x, shift)
