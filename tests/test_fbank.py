"""The log-mel front end against published numbers, Hugging Face, librosa and its reference."""

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aatjax.audio import fbank
from aatjax.audio.fbank import (
    FRAME,
    HOP,
    LOG_FLOOR,
    count_frames,
    count_samples,
    hertz_to_mel,
    log_mel,
    log_mel_reference,
    mel_bank,
)
from aatjax.errors import UsageError

SECOND = np.arange(16000) / 16000


def chirp() -> np.ndarray:
    sweep = 2 * np.pi * (100 * SECOND + 1900 * SECOND**2)
    return (0.4 * np.sin(sweep)).astype(np.float32)


def pcm(x: np.ndarray) -> np.ndarray:
    return (np.clip(np.rint(x * 32768), -32768, 32767) / 32768).astype(np.float32)


def signals() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    pulses = 0.5 * np.sin(2 * np.pi * 150 * SECOND) ** 9 * np.exp(-3 * SECOND)
    return {
        "noise": pcm(rng.normal(0, 0.1, 16000)),
        "noise on dc": pcm(0.5 + rng.normal(0, 1e-3, 16000)),
        "quiet noise": pcm(rng.normal(0, 6e-5, 16000)),
        "tone": pcm(0.9 * np.sin(2 * np.pi * 437 * SECOND)),
        "low tone": pcm(0.99 * np.sin(2 * np.pi * 60 * SECOND)),
        "pulses": pcm(pulses),
        "clipped": np.sign(np.sin(2 * np.pi * 150 * SECOND + 0.1)).astype(np.float32),
        "silence": np.zeros(16000, np.float32),
        "one frame": pcm(rng.normal(0, 0.1, FRAME)),
    }


def assert_close(x: np.ndarray, truth: np.ndarray) -> None:
    assert x.shape == truth.shape
    np.testing.assert_allclose(np.asarray(x, np.float64), truth, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("rate", "mels"), [(16000, 128), (44100, 80)])
def test_the_filters_lie_between_the_mel_frequencies_of_librosa(rate: int, mels: int) -> None:
    """librosa's filters are triangular in Hz, these on the mel scale, with the same edges."""
    edges = librosa.mel_frequencies(mels + 2, fmin=20.0, fmax=rate / 2, htk=True)
    np.testing.assert_allclose(
        hertz_to_mel(edges), 1127 / 2595 * np.log(10) * librosa.hz_to_mel(edges, htk=True)
    )
    bins = librosa.fft_frequencies(sr=rate, n_fft=512)
    bank = mel_bank(rate, mels)
    for number in range(mels):
        inside = (bins > edges[number]) & (bins < edges[number + 2]) & (bins < rate / 2)
        np.testing.assert_array_equal(bank[:, number] > 1e-9, inside)
        if inside.any():
            nearest = np.abs(
                hertz_to_mel(bins) - hertz_to_mel(edges[number + 1 : number + 2])
            ).argmin()
            assert bank[:, number].argmax() == nearest
    sides = librosa.filters.mel(
        sr=rate, n_fft=512, n_mels=mels, fmin=20.0, fmax=rate / 2, htk=True, norm=None
    )
    assert np.abs(bank.T - sides).max() < 0.05


def test_golden_numbers_of_kaldi() -> None:
    x = log_mel_reference(chirp())
    assert x.shape == (98, 128)
    np.testing.assert_allclose(
        [x.mean(), x.std(), x.min(), x.max()],
        [-13.59188, 4.82520, -15.94238, 8.29719],
        atol=2e-5,
    )
    golden = {
        (0, 0): -5.22299,
        (0, 3): -15.94238,
        (0, 10): 0.59414,
        (10, 20): -5.76482,
        (49, 60): -8.75277,
        (49, 64): -3.41254,
        (97, 90): -6.50671,
        (97, 100): -9.08803,
        (97, 127): -15.94238,
    }
    twin = np.asarray(log_mel(jnp.asarray(chirp())))
    for at, value in golden.items():
        assert x[at] == pytest.approx(value, abs=2e-4)
        assert twin[at] == pytest.approx(value, abs=2e-4)
    assert x[[0, 24, 49, 73, 97]].argmax(axis=1).tolist() == [8, 45, 68, 83, 94]
    assert ((x + 4.2677393) / (2 * 4.5689974)).mean() == pytest.approx(-1.02037, abs=1e-5)
    assert_close(twin, x)


def test_mel_bank_shape_and_weights() -> None:
    bank = mel_bank()
    assert bank.shape == (257, 128)
    assert bank[1, 0] == pytest.approx(0.802637, abs=1e-5)
    assert np.flatnonzero(bank[:, 64]).tolist() == [57, 58, 59, 60]
    assert np.flatnonzero(bank.sum(axis=0) == 0).tolist() == [3]
    assert not bank[256].any()
    with pytest.raises(ValueError, match="read-only"):
        bank[0, 0] = 1.0


def test_filter_three_is_always_at_the_floor() -> None:
    noise = np.random.default_rng(1).normal(0, 0.3, (2, 4000)).astype(np.float32)
    x = log_mel(jnp.asarray(noise))
    np.testing.assert_allclose(x[..., 3], LOG_FLOOR, atol=1e-6)
    assert pytest.approx(-15.942385) == LOG_FLOOR
    assert float(x[..., 4].min()) > -15


def test_frame_counts() -> None:
    lengths = [0, 399, 400, 559, 560, 16000, 64000, 80000, 160000, 480000]
    assert [count_frames(n) for n in lengths] == [0, 0, 1, 1, 2, 98, 398, 498, 998, 2998]
    assert count_samples(1) == FRAME
    for frames in (1, 2, 98, 1024):
        assert count_frames(count_samples(frames)) == frames
        assert count_frames(count_samples(frames) - 1) == frames - 1
    with pytest.raises(UsageError, match="at least 1 frame"):
        count_samples(0)


@pytest.mark.parametrize("name", signals())
def test_equals_hugging_face(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    x = signals()[name]
    extractor = transformers.ASTFeatureExtractor(
        do_normalize=False, max_length=count_frames(x.size)
    )
    theirs = extractor(x, sampling_rate=16000, return_tensors="np")["input_values"][0]
    np.testing.assert_allclose(log_mel_reference(x), theirs, atol=2e-6)
    assert_close(np.asarray(log_mel(jnp.asarray(x))), theirs)
    single = np.asarray(fbank._power_single(fbank._frames(jnp.asarray(x))))  # what a TPU runs
    energy = np.maximum(single @ mel_bank(), fbank.ENERGY_FLOOR)
    error = np.abs(np.log(energy) - theirs)
    assert error.max() < (6e-3 if "tone" in name else 2e-3)  # 100 dB beside a tone: single's end
    assert np.max(error, where=theirs > -8, initial=0.0) < 5e-4


def test_the_slope_is_that_of_single_precision_and_a_tpu_can_run_it() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(0, 0.1, (2, 2000)), jnp.float32)
    slope = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(log_mel(x)))))(x)
    step = 1e-3 * np.random.default_rng(1).normal(size=x.shape)
    up, down = (
        np.sin([log_mel_reference(row) for row in np.float64(x) + sign * step]).sum()
        for sign in (0.5, -0.5)
    )
    assert float((slope * step).sum()) == pytest.approx(up - down, rel=2e-2)
    exported = jax.export.export(jax.jit(log_mel), platforms=["tpu"])(x)
    assert "f64" not in exported.mlir_module()


@settings(max_examples=12, deadline=None)
@given(
    samples=st.sampled_from([FRAME, FRAME + HOP - 1, FRAME + 7 * HOP + 3]),
    scale=st.sampled_from([1e-4, 1e-2, 0.3]),
    offset=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 2**16),
)
def test_the_jax_version_equals_the_reference(
    samples: int, scale: float, offset: float, seed: int
) -> None:
    x = pcm(offset + np.random.default_rng(seed).normal(0, scale, samples))
    truth = log_mel_reference(x)
    assert truth.shape == (count_frames(samples), 128)
    assert_close(np.asarray(log_mel(jnp.asarray(x))), truth)


def test_mean_of_the_clip_does_not_matter() -> None:
    x = chirp().astype(np.float64) + 0.2
    plain = log_mel_reference(x)
    np.testing.assert_allclose(plain, log_mel_reference(x, subtract_mean=True), atol=1e-8)


def test_batches_of_any_rank_and_jit() -> None:
    x = np.random.default_rng(2).normal(0, 0.1, (2, 3, 1000)).astype(np.float32)
    batch = jax.jit(log_mel)(jnp.asarray(x))
    assert batch.shape == (2, 3, 4, 128)
    assert batch.dtype == jnp.float32
    np.testing.assert_allclose(batch[1, 2], log_mel(jnp.asarray(x[1, 2])), atol=2e-3)


def test_other_rates_and_filter_counts() -> None:
    x = signals()["noise"][:4000]
    for rate, mels in [(8000, 64), (44100, 80)]:
        truth = log_mel_reference(x, rate=rate, mels=mels)
        assert truth.shape == (23, mels)
        assert_close(np.asarray(log_mel(jnp.asarray(x), rate=rate, mels=mels)), truth)


def test_silence_has_a_finite_gradient() -> None:
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(log_mel(x))))(jnp.zeros(FRAME))
    assert bool(jnp.isfinite(gradient).all())


@pytest.mark.parametrize("samples", [0, 1, FRAME - 1])
def test_less_than_a_frame_is_refused(samples: int) -> None:
    for features in (log_mel_reference, lambda x: log_mel(jnp.asarray(x))):
        with pytest.raises(UsageError, match=f"{samples} samples are less than one frame"):
            features(np.zeros(samples, np.float32))


def test_impossible_banks_are_refused() -> None:
    with pytest.raises(UsageError, match="mels is 0"):
        mel_bank(16000, 0)
    with pytest.raises(UsageError, match="rate is 40 Hz"):
        mel_bank(40, 8)


def test_real_sounds(real_audio) -> None:
    soundfile = pytest.importorskip("soundfile")
    files = sorted((real_audio / "speech_commands_v0.01").rglob("*.wav"))[::60]
    assert files
    for file in files:
        x, rate = soundfile.read(file, dtype="float32")
        assert rate == 16000
        assert_close(np.asarray(log_mel(jnp.asarray(x))), log_mel_reference(x))
