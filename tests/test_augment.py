"""Augmentation: what it changes, what it keeps, and the numbers it draws."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aatjax.audio.augment import (
    Augment,
    add_noise,
    change_gain,
    cut_off,
    mask_spectrogram,
    mixup,
    roll_time,
    warp_frequencies,
)
from aatjax.audio.fbank import LOG_FLOOR, log_mel
from aatjax.audio.frontend import FrontEnd
from aatjax.errors import UsageError

FRONTEND = FrontEnd(frames=20)


def clips(batch: int, lengths: list[int] | None = None) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(batch)
    audio = rng.normal(500, 3000, (batch, FRONTEND.samples)).astype(np.int16)
    length = np.array(lengths or [FRONTEND.samples] * batch)
    audio[np.arange(FRONTEND.samples)[None, :] >= length[:, None]] = 0
    return jnp.asarray(audio), jnp.asarray(length)


jitted_mixup = jax.jit(mixup, static_argnames=("prob", "alpha"))


def mix(
    key: int, audio: jax.Array, length: jax.Array, weight: list[float], **kwargs: float
) -> tuple[jax.Array, jax.Array]:
    target, weights = jnp.eye(audio.shape[0]), jnp.array(weight, jnp.float32)
    return jitted_mixup(jax.random.key(key), audio, length, target, weights, **kwargs)


def test_mixup_is_the_weighted_sum_of_centred_clips() -> None:
    audio, length = clips(3, [FRONTEND.samples, 900, 2000])
    mixed, target = mix(0, audio, length, [1, 1, 1], prob=1.0, alpha=10.0)
    wave = np.asarray(audio, np.float64) / 32768
    for i in range(3):
        row = np.asarray(target[i], np.float64)
        factor = row[i]
        (j,) = [j for j in range(3) if j != i and row[j] > 0]
        assert factor + row[j] == pytest.approx(1.0)
        n, m = int(length[i]), int(length[j])
        first = wave[i, :n] - wave[i, :n].mean()
        second = np.zeros(n)
        second[: min(n, m)] = (wave[j, :m] - wave[j, :m].mean())[:n]
        truth = factor * first + (1 - factor) * second
        truth -= truth.mean()
        np.testing.assert_allclose(mixed[i, :n], truth, atol=1e-6)
        assert not np.any(mixed[i, n:])


def test_mixup_probability_and_beta() -> None:
    audio, length = clips(64)
    audio = audio[:, :400]
    rows = [mix(k, audio, length, [1] * 64, prob=0.3, alpha=10.0)[1] for k in range(20)]
    own = np.stack([np.diag(np.asarray(t)) for t in rows]).ravel()
    mixes = own < 1
    assert mixes.mean() == pytest.approx(0.3, abs=0.05)  # 1280 draws: 4 standard errors
    # Beta(10, 10): mean 1/2, variance 1 / (4 * 21).
    assert own[mixes].mean() == pytest.approx(0.5, abs=0.025)
    assert own[mixes].std() == pytest.approx((1 / 84) ** 0.5, abs=0.02)


def test_mixup_partners_are_real_other_clips_and_uniform() -> None:
    audio, length = clips(5)
    audio = audio[:, :400]
    weight = [1.0, 1.0, 0.0, 0.5, 1.0]
    count = np.zeros((5, 5))
    for key in range(120):
        mixed, target = mix(key, audio, length, weight, prob=1.0)
        count += np.asarray(target) > 0
        np.testing.assert_array_equal(mixed[2], audio[2] / np.float32(32768))
        assert float(target[2, 2]) == 1.0
    partners = count - np.diag(np.diag(count))
    assert not partners[2].any() and not partners[:, 2].any()
    real = partners[np.ix_([0, 1, 3, 4], [0, 1, 3, 4])]
    assert (real.sum(axis=1) == 120).all()
    assert (real[~np.eye(4, dtype=bool)] > 20).all()  # 40 expected each


@pytest.mark.parametrize("weight", [[1.0], [1.0, 0.0], [0.0, 0.0]])
def test_mixup_without_a_partner_changes_nothing(weight: list[float]) -> None:
    audio, length = clips(len(weight))
    mixed, target = mix(0, audio, length, weight, prob=1.0)
    np.testing.assert_array_equal(mixed, audio / np.float32(32768))
    np.testing.assert_array_equal(target, np.eye(len(weight)))


def test_mixup_with_probability_zero_changes_nothing() -> None:
    audio, length = clips(4)
    mixed, target = mix(0, audio, length, [1] * 4, prob=0.0)
    np.testing.assert_array_equal(mixed, audio / np.float32(32768))
    np.testing.assert_array_equal(target, np.eye(4))


def runs(row: np.ndarray) -> int:
    """Number of separate runs of True."""
    return int(np.diff(np.concatenate([[0], row.astype(int), [0]])).clip(0).sum())


def test_spec_mask_is_one_band_and_one_span_in_each_clip() -> None:
    x = jnp.ones((256, 40, 32))
    masked = np.asarray(mask_spectrogram(jax.random.key(0), x, freq=8, time=10, fill=-3.0)) != 1
    assert set(np.unique(mask_spectrogram(jax.random.key(0), x, freq=8, time=10, fill=-3.0))) == {
        -3,
        1,
    }
    time, freq = masked.all(axis=2), masked.all(axis=1)
    np.testing.assert_array_equal(masked, time[:, :, None] | freq[:, None, :])
    for axis, size in ((time, 10), (freq, 8)):
        assert max(runs(row) for row in axis) == 1
        widths = axis.sum(axis=1)
        assert set(widths) == set(range(size))  # 0 to size - 1, never size
        starts = axis[widths > 0].argmax(axis=1)
        assert starts.min() == 0
        assert (starts + widths[widths > 0]).max() in (axis.shape[1] - 1, axis.shape[1])
        assert abs(widths.mean() - (size - 1) / 2) < 0.8
    assert abs(np.corrcoef(time.sum(axis=1), freq.sum(axis=1)).ravel()[1]) < 0.3


def test_spec_mask_off_and_larger_than_the_axis() -> None:
    x = jnp.ones((16, 20, 12))
    key = jax.random.key(1)
    np.testing.assert_array_equal(mask_spectrogram(key, x, freq=0, time=0), x)
    masked = np.asarray(mask_spectrogram(key, x, freq=0, time=500)) == 0
    assert not masked.all(axis=1).any()
    assert 0 < masked.all(axis=2).sum(axis=1).max() < 20


def test_noise_level_is_drawn_by_clip() -> None:
    noise = np.asarray(add_noise(jax.random.key(0), jnp.full((200, 30, 20), 2.0))) - 2.0
    assert noise.min() >= 0
    assert noise.max() < 0.1
    level = 2 * noise.mean(axis=(1, 2))  # the mean of U[0, 1) is 1/2
    assert level.min() < 0.01 and level.max() > 0.09
    assert level.mean() == pytest.approx(0.05, abs=0.01)
    loudest, second = noise[np.argsort(level)[-2:]].reshape(2, -1)
    assert abs(np.corrcoef(loudest, second).ravel()[1]) < 0.2


def test_roll_is_circular_and_between_minus_ten_and_nine() -> None:
    x = jnp.broadcast_to(jnp.arange(40.0)[None, :, None], (400, 40, 2))
    rolled = np.asarray(roll_time(jax.random.key(0), x))
    shifts = rolled[:, :, 0].argmin(axis=1)
    shifts = np.where(shifts > 20, shifts - 40, shifts)
    assert set(shifts) == set(range(-10, 10))
    for clip, shift in zip(rolled, shifts, strict=True):
        np.testing.assert_array_equal(clip, np.roll(np.asarray(x[0]), shift, axis=0))


def augmented(augment: Augment, key: int = 3, batch: int = 4) -> tuple[np.ndarray, np.ndarray]:
    audio, length = clips(batch, [FRONTEND.samples, 900, 2000, 400][:batch])
    step = jax.jit(augment, static_argnums=1)
    x, target = step(jax.random.key(key), FRONTEND, audio, length, jnp.eye(batch), jnp.ones(batch))
    return np.asarray(x), np.asarray(target)


def test_default_augment_is_the_front_end() -> None:
    audio, length = clips(4, [FRONTEND.samples, 900, 2000, 400])
    x, target = augmented(Augment())
    np.testing.assert_allclose(x, FRONTEND(audio, length), atol=1e-4)
    np.testing.assert_array_equal(target, np.eye(4))


def test_everything_together_is_deterministic_by_key() -> None:
    full = Augment(mixup=1.0, freq_mask=24, time_mask=8, noise=True, roll=True)
    first, again, other = augmented(full), augmented(full), augmented(full, key=4)
    assert first[0].shape == (4, 20, 128) and first[0].dtype == np.float32
    assert np.isfinite(first[0]).all()
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert (np.abs(first[0] - other[0]).max(axis=(1, 2)) > 0.1).all()


def test_masks_come_before_normalisation_by_default() -> None:
    plain = augmented(Augment())[0]
    before = augmented(Augment(freq_mask=60))[0]
    after = augmented(Augment(freq_mask=60, spec_after_norm=True))[0]
    changed = (before != plain).any(axis=(0, 1))
    assert changed.any()
    loud = -FRONTEND.mean / (2 * FRONTEND.std)
    np.testing.assert_allclose(before[before != plain], loud, rtol=1e-5)
    assert (after[after != plain] == 0).all() and (after != plain).any()


def test_one_augmentation_does_not_shift_the_numbers_of_another() -> None:
    rolled = augmented(Augment(roll=True))[0]
    both = augmented(Augment(roll=True, noise=True))[0]
    noise = both - rolled
    assert noise.min() >= -1e-6 and 0 < noise.max() < 0.1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixup": 1.5}, r"augment\.mixup=1\.5 must be at least 0 and at most 1"),
        ({"mixup": float("nan")}, "mixup=nan must be a finite number"),
        ({"mixup_alpha": 0.0}, "mixup_alpha=0.0 must be above 0"),
        ({"freq_mask": -1}, "freq_mask=-1 must be at least 0"),
        ({"time_mask": True}, "time_mask=True must be a whole number"),
    ],
)
def test_impossible_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Augment(**fields)


def test_gain_is_that_of_the_waveform_and_leaves_padding() -> None:
    audio, length = clips(64, [FRONTEND.samples, 1200] * 32)
    features = FRONTEND.features(audio, length)
    valid = FRONTEND.valid_frames(length)
    louder = change_gain(jax.random.key(1), features, valid, limit=20.0)
    np.testing.assert_array_equal(louder[~valid], features[~valid])
    shift = jnp.where(valid[:, :, None], louder - features, jnp.nan)
    db = np.asarray(jnp.nanmedian(shift, axis=(1, 2))) * 10 / np.log(10)
    assert -20 <= db.min() < -15 and 15 < db.max() <= 20 and len(np.unique(db)) == 64
    wave = audio.astype(jnp.float32) / 32768 * jnp.asarray(10 ** (db / 20))[:, None]
    loud = np.asarray(louder) > -9  # far from the floor
    np.testing.assert_allclose(louder[loud], FRONTEND.features(wave, length)[loud], atol=2e-3)
    silence = FRONTEND.features(jnp.zeros_like(audio), length)
    softer = change_gain(jax.random.key(1), silence, valid, limit=20.0)
    assert float(softer.min()) == float(silence[valid].min()), "silence has no level to lower"


def test_gain_leaves_the_random_numbers_of_the_others() -> None:
    audio, length = clips(4)
    target, weight = jnp.eye(4), jnp.ones(4)
    arguments = jax.random.key(3), FRONTEND, audio, length, target, weight
    plain = Augment(freq_mask=20, time_mask=5)(*arguments)
    faint = Augment(freq_mask=20, time_mask=5, gain=1e-6)(*arguments)
    np.testing.assert_allclose(plain[0], faint[0], atol=1e-5)
    with pytest.raises(UsageError, match="gain"):
        Augment(gain=-1.0)


def test_what_is_above_the_cut_off_is_60_db_lower() -> None:
    """The cut lies between 2 and 8 kHz, in the given share of the clips."""
    x = jnp.zeros((2000, 1, 128))
    found = np.asarray(cut_off(jax.random.key(0), x, prob=0.25, rate=16000))[:, 0]
    assert set(np.round(np.unique(found), 3)) == {0.0, np.float32(-13.816)}
    kept = (found == 0).sum(axis=1)
    mel = [1127 * np.log1p(f / 700) for f in (20, 2000, 8000)]
    least = np.floor((mel[1] - mel[0]) / ((mel[2] - mel[0]) / 129))
    cut = kept[kept < 128]
    assert abs(len(cut) / 2000 - 0.25) < 0.04
    assert least <= cut.min() <= least + 2 and cut.max() >= 125
    assert np.all(np.diff(found, axis=1) <= 0)  # only what lies above
    low = np.asarray(cut_off(jax.random.key(0), x + LOG_FLOOR, prob=1.0))
    np.testing.assert_array_equal(low, np.float32(LOG_FLOOR) + 0 * low)


def test_warped_tones_are_the_tones_at_other_frequencies() -> None:
    """A tone at f, stretched by a, is where a tone at a f is."""
    rate, seconds = 16000, np.arange(8000) / 16000
    at = [300.0 * 1.3**i for i in range(12)]
    tones = jnp.asarray([np.sin(2 * np.pi * f * seconds) for f in at], jnp.float32)
    found = warp_frequencies(jax.random.key(3), log_mel(tones), limit=0.5, rate=rate)
    most = np.log1p(0.5)
    factors = np.exp(jax.random.uniform(jax.random.key(3), (12, 1), jnp.float32, -most, most))[:, 0]
    assert factors.min() < 0.8 and factors.max() > 1.2
    moved = jnp.asarray(
        [np.sin(2 * np.pi * f * a * seconds) for f, a in zip(at, factors, strict=True)], jnp.float32
    )
    peaks, wanted = (np.asarray(x)[:, 20].argmax(axis=1) for x in (found, log_mel(moved)))
    assert np.abs(peaks - wanted).max() <= 1
    still = warp_frequencies(jax.random.key(3), log_mel(tones), limit=1e-9, rate=rate)
    np.testing.assert_allclose(still, log_mel(tones), atol=1e-3)
