"""Training augmentation on the device: pure functions of a key and a batch.

The order is the one AST was trained with (Gong et al. 2021, "AST: Audio Spectrogram Transformer",
section 3; mixup after Tokozume et al. 2018, masks after Park et al. 2019): mixup of the waveforms,
log-mel, one frequency and one time mask, normalisation, additive noise, circular roll. Every clip
draws its own numbers. The same key gives the same result on any number of devices.

One difference to AST: the mixup partner is another clip of the same batch, where AST draws it from
the whole training list. A batch is a uniform sample of that list, so a partner is as likely, but
a batch of one clip (or one with a single real clip) is never mixed.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int16, Integer, Key, UInt32

from aatjax.audio.frontend import FrontEnd
from aatjax.errors import UsageError

PRNGKey = Key[Array, ""] | UInt32[Array, "2"]


@dataclasses.dataclass(frozen=True)
class Augment:
    """What is done to a training batch; the default does nothing.

    Attributes:
        mixup: probability in [0, 1] that a clip is mixed with another.
        mixup_alpha: the mixing factor is drawn from Beta(alpha, alpha).
        freq_mask: the frequency mask is narrower than this many mel bins; 0 is none.
        time_mask: the time mask is shorter than this many frames; 0 is none.
        noise: add uniform noise to the normalised features.
        roll: roll the normalised features along time by -10 to 9 frames.
        spec_after_norm: mask after normalisation (with the mean level of the data set), as the
            parameter-efficient transfer learning papers on AST do, instead of before it (with
            0.0 in the log-mel domain, which is loud).
    """

    mixup: float = 0.0
    mixup_alpha: float = 10.0
    freq_mask: int = 0
    time_mask: int = 0
    noise: bool = False
    roll: bool = False
    spec_after_norm: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.mixup <= 1.0:
            raise UsageError(f"augment: mixup is {self.mixup!r}, give a probability in [0, 1]")
        if not (math.isfinite(self.mixup_alpha) and self.mixup_alpha > 0.0):
            raise UsageError(f"augment: mixup_alpha is {self.mixup_alpha!r}, give a number above 0")
        for name in ("freq_mask", "time_mask"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise UsageError(f"augment: {name} is {value!r}, give a whole number from 0 on")

    def __call__(
        self,
        key: PRNGKey,
        frontend: FrontEnd,
        audio: Int16[Array, "b s"] | Float[Array, "b s"],
        length: Integer[Array, " b"],
        target: Float[Array, "b c"],
        weight: Float[Array, " b"],
    ) -> tuple[Float[Array, "b t f"], Float[Array, "b c"]]:
        """Fitted clips to augmented, normalised features and their (mixed) targets.

        The arguments are those of `mixup`. Switching one augmentation on or off leaves the random
        numbers of the others as they are.
        """
        mix_key, mask_key, noise_key, roll_key = jax.random.split(key, 4)
        if self.mixup > 0.0:
            audio, target = mixup(
                mix_key, audio, length, target, weight, prob=self.mixup, alpha=self.mixup_alpha
            )
        x = frontend.features(audio, length)
        if not self.spec_after_norm:
            x = mask_spectrogram(mask_key, x, freq=self.freq_mask, time=self.time_mask)
        x = frontend.normalise(x)
        if self.spec_after_norm:
            x = mask_spectrogram(mask_key, x, freq=self.freq_mask, time=self.time_mask)
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
    """Between-class mixing of waveforms and targets, each clip with probability `prob`.

    Both waveforms lose their mean; the partner is cut or zero-padded to the length of the clip;
    mixed = l * clip + (1 - l) * partner with l ~ Beta(alpha, alpha); the mixture loses its mean.
    The length of a clip stays what it was.

    Args:
        key: random key.
        audio: fitted clips, int16 or float in [-1, 1].
        length: valid samples of each clip.
        target: targets, any real-valued rows.
        weight: weight of each clip; a clip of weight 0 is padding of the batch, which neither
            mixes nor is a partner.
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
    partner = jax.random.categorical(partner_key, jnp.where(allowed, 0.0, -jnp.inf), axis=-1)
    chosen = jax.random.uniform(coin_key, (batch,)) < prob
    mixes = chosen & real & jnp.any(allowed, axis=-1)
    factor = jax.random.beta(factor_key, alpha, alpha, (batch,), jnp.float32)[:, None]

    valid = jnp.arange(samples)[None, :] < length[:, None]
    centred = _centre(wave, valid)
    mixed = _centre(factor * centred + (1.0 - factor) * centred[partner], valid)
    blend = factor * target + (1.0 - factor) * target[partner]
    return jnp.where(mixes[:, None], mixed, wave), jnp.where(mixes[:, None], blend, target)


def _centre(wave: Float[Array, "b s"], valid: Bool[Array, "b s"]) -> Float[Array, "b s"]:
    """Removes the mean of the valid samples and zeroes the others."""
    count = jnp.maximum(jnp.sum(valid, axis=-1, keepdims=True), 1)
    mean = jnp.sum(jnp.where(valid, wave, 0.0), axis=-1, keepdims=True) / count
    return jnp.where(valid, wave - mean, 0.0)


def mask_spectrogram(
    key: PRNGKey, x: Float[Array, "b t f"], *, freq: int, time: int, fill: float = 0.0
) -> Float[Array, "b t f"]:
    """SpecAugment: one frequency and one time mask in each clip (Park et al. 2019).

    With u, v ~ U[0, 1) the mask is floor(u * size) wide and starts at
    floor(v * (axis - u * size)), so `size` itself is never reached.

    Args:
        key: random key.
        x: features.
        freq: upper bound of the frequency mask in mel bins; 0 is none.
        time: upper bound of the time mask in frames; 0 is none.
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
    """One random run of True in each row of (batch, axis)."""
    u, v = jax.random.uniform(key, (2, batch, 1))
    width = u * min(size, axis)
    start = jnp.floor(v * (axis - width))
    index = jnp.arange(axis)[None, :]
    return (index >= start) & (index < start + jnp.floor(width))


def add_noise(key: PRNGKey, x: Float[Array, "b t f"]) -> Float[Array, "b t f"]:
    """Adds U[0, 1) noise scaled by a factor that each clip draws from U[0, 0.1)."""
    noise_key, scale_key = jax.random.split(key)
    scale = jax.random.uniform(scale_key, (x.shape[0], 1, 1), x.dtype) / 10.0
    return x + scale * jax.random.uniform(noise_key, x.shape, x.dtype)


def roll_time(key: PRNGKey, x: Float[Array, "b t f"]) -> Float[Array, "b t f"]:
    """Rolls each clip along time, circularly, by a whole number of frames in [-10, 9]."""
    shift = jax.random.randint(key, (x.shape[0],), -10, 10)
    return jax.vmap(lambda clip, by: jnp.roll(clip, by, axis=0))(x, shift)
