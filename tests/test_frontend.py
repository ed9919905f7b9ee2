"""The front end: fixed length, padding policy, normalisation, statistics."""

import dataclasses
import json
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aatjax.audio.fbank import LOG_FLOOR, count_frames, count_samples, log_mel_reference
from aatjax.audio.frontend import PRESETS, FrontEnd, compute_statistics
from aatjax.audio.waveform import as_waveform
from aatjax.data import Arrays
from aatjax.errors import DataError, UsageError

SHORT = FrontEnd(frames=20)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """No run-time type checks, as for users."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3000, samples).astype(np.int16)


def run(frontend: FrontEnd, *clips: np.ndarray) -> np.ndarray:
    audio, length = zip(*[frontend.fit(clip) for clip in clips], strict=True)
    return np.asarray(jax.jit(frontend)(jnp.asarray(np.stack(audio)), jnp.asarray(length)))


@pytest.mark.parametrize("samples", [400, 559, 560, 2000, 3439, 3440, 3441, 9000])
def test_equals_hugging_face(samples: int) -> None:
    transformers = pytest.importorskip("transformers")
    clip = noise(samples)
    extractor = transformers.ASTFeatureExtractor(max_length=20)
    theirs = extractor(clip / np.float32(32768), sampling_rate=16000, return_tensors="np")
    x = run(SHORT, clip)[0]
    np.testing.assert_allclose(x, theirs["input_values"][0], atol=2e-4)


@settings(max_examples=30, deadline=None)
@given(samples=st.integers(1, 5000), data=st.data())
def test_fit_gives_a_fixed_length_and_one_valid_frame(samples: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, samples - 1))
    clip = noise(samples) | np.int16(1)  # no sample is zero
    fitted, valid = SHORT.fit(clip, start=start)
    assert fitted.shape == (SHORT.samples,) == (count_samples(20),)
    assert fitted.dtype == np.int16
    kept = min(samples - start, SHORT.samples)
    assert valid == max(400, kept)
    assert count_frames(valid) >= 1
    np.testing.assert_array_equal(fitted[:kept], clip[start : start + kept])
    assert not fitted[kept:].any()


def test_b3_one_sample_gives_one_frame() -> None:
    x = run(SHORT.with_statistics(0.0, 0.5), np.array([20000], np.int16))[0]
    assert np.isfinite(x).all()
    assert (x[0] < 0).any()
    assert not x[1:].any()


def test_padding_policies() -> None:
    clip = noise(1000)  # 4 whole frames
    by_pad = {
        pad: run(FrontEnd(frames=20, mean=0.0, std=0.5, pad=pad), clip)[0]
        for pad in ("log_mel_zero", "silence", "repeat")
    }
    whole = by_pad["log_mel_zero"][:4]
    assert (whole.max(axis=1) > 0).all()
    assert not by_pad["log_mel_zero"][4:].any()
    np.testing.assert_array_equal(by_pad["silence"][:4], whole)
    np.testing.assert_allclose(by_pad["silence"][4:], LOG_FLOOR, rtol=1e-6)
    np.testing.assert_array_equal(by_pad["repeat"][:4], whole)
    assert (by_pad["repeat"].max(axis=1) > -4).all()
    tiled, valid = FrontEnd(frames=20, pad="repeat").fit(clip)
    assert valid == tiled.size
    np.testing.assert_array_equal(tiled, np.tile(clip, 4)[: tiled.size])


def test_what_lies_past_the_length_does_not_matter() -> None:
    audio = noise(SHORT.samples)[None]
    quiet = audio.copy()
    quiet[:, 1000:] = 0
    length = jnp.array([1000])
    np.testing.assert_array_equal(
        SHORT(jnp.asarray(audio), length), SHORT(jnp.asarray(quiet), length)
    )


def test_known_values_of_padding_and_silence() -> None:
    zeros = np.zeros(400, np.int16)
    x = run(FrontEnd(frames=2), zeros)[0]
    np.testing.assert_allclose(x[0], -1.27759, atol=1e-5)
    np.testing.assert_allclose(x[1], 0.46703, atol=1e-5)
    pads = {"esc50": 0.6183, "us8k": 0.5656, "speech_commands_v1": 0.6172, "openmic": 0.4954}
    pads |= {"speech_commands_v2": 0.6150, "gtzan": 0.4436, "audioset": 0.46703}
    assert pads.keys() == PRESETS.keys()
    for name, value in pads.items():
        x = run(FrontEnd(frames=2).with_statistics(*PRESETS[name]), zeros)[0]
        np.testing.assert_allclose(x[1], value, atol=1e-4)


def test_float_and_int16_are_the_same_sound() -> None:
    audio, length = noise(SHORT.samples)[None], jnp.array([2000])
    scaled = jnp.asarray(audio / np.float32(32768))
    np.testing.assert_array_equal(SHORT(jnp.asarray(audio), length), SHORT(scaled, length))


def test_float_samples_are_not_rounded() -> None:
    """Rounding to int16 moves values near the floor; the front end takes floats as they are."""
    t = np.arange(SHORT.samples) / 16000
    x = (0.5 * np.sin(2 * np.pi * 150 * t) ** 9 * np.exp(-8 * t)).astype(np.float32)
    wanted = log_mel_reference(x.astype(np.float64))
    found = np.asarray(SHORT.features(jnp.asarray(x)[None]))[0]
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    rounded = np.asarray(SHORT.features(jnp.asarray(as_waveform(x, 16000))[None]))[0]
    moved = np.abs(rounded - wanted)
    assert 1 < moved.max() < 3 and wanted[moved > 0.5].max() < -13
    held = Arrays(found[None], [0], ("a",))
    np.testing.assert_array_equal(held.reader.read_log_mel(held.clips[0]), found)


def test_batch_equals_single_clips() -> None:
    clips = [noise(n, n) for n in (500, 3000, 8000)]
    together = run(SHORT, *clips)
    for row, clip in zip(together, clips, strict=True):
        np.testing.assert_allclose(row, run(SHORT, clip)[0], atol=1e-5)


def test_statistics_average_over_batches() -> None:
    fitted = [SHORT.fit(noise(n, n)) for n in (600, 2500, 9000)]
    batches = [
        (np.stack([a for a, _ in part]), np.array([n for _, n in part]))
        for part in (fitted[:2], fitted[2:])
    ]
    mean, std = compute_statistics(SHORT, batches)
    x = [np.asarray(SHORT.features(jnp.asarray(a), jnp.asarray(n)), np.float64) for a, n in batches]
    assert mean == pytest.approx((x[0].mean() + x[1].mean()) / 2)
    assert std == pytest.approx((x[0].std(ddof=1) + x[1].std(ddof=1)) / 2)
    # Batches count alike however many clips they hold, as in the published statistics.
    assert abs(mean - np.concatenate(x).mean()) > 1e-3
    assert (mean, std) == compute_statistics(SHORT.with_statistics(1.0, 2.0), batches)
    with pytest.raises(DataError, match="no batch"):
        compute_statistics(SHORT, [])


def test_json_round_trip_and_hash() -> None:
    frontend = FrontEnd(rate=8000, mels=64, frames=37, mean=-1.5, std=2.5, pad="silence")
    again = FrontEnd.from_dict(json.loads(json.dumps(frontend.to_dict())))
    assert again == frontend
    assert hash(again) == hash(frontend)
    assert FrontEnd.from_dict({}) == FrontEnd()
    with pytest.raises(
        UsageError, match=r"front end has no field 'frame', did you mean 'frames'\?"
    ):
        FrontEnd.from_dict({"frame": 3})
    with pytest.raises(dataclasses.FrozenInstanceError):
        frontend.mels = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rate", 0, "front end: rate=0 must be at least 1"),
        ("rate", 16000.0, "rate=16000.0 is not of type int"),
        ("rate", 20, "rate is 20 Hz"),
        ("mels", -1, "mels=-1 must be at least 1"),
        ("mels", 10**7, "mels=10000000 must be at most 4096"),
        ("frames", 0, "frames=0 must be"),
        ("frames", True, "frames=True is not of type int"),
        ("mean", float("nan"), "mean=nan is not of type float$"),
        ("mean", "0", "mean='0' is not of type float"),
        ("std", 0.0, "std=0.0 must be above 0"),
        ("std", float("inf"), "std=inf is not of type float"),
        ("pad", "zero", "pad='zero' is not of type Literal.*log_mel_zero"),
    ],
)
def test_impossible_fields_are_refused(
    unchecked: None, field: str, value: object, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        FrontEnd.from_dict({field: value})


def test_impossible_clips_are_refused() -> None:
    with pytest.raises(DataError, match="no samples"):
        SHORT.fit(np.zeros(0, np.int16))
    with pytest.raises(UsageError, match="start 10 is outside the 10 samples"):
        SHORT.fit(noise(10), start=10)
    with pytest.raises(UsageError, match="start -1"):
        SHORT.fit(noise(10), start=-1)
    with pytest.raises(UsageError, match="500 samples, but 20 frames need 3440"):
        SHORT(jnp.zeros((1, 500)), jnp.array([500]))


def test_without_lengths_every_sample_counts():
    audio = jnp.asarray(np.random.default_rng(0).normal(size=(2, SHORT.samples)), jnp.float32)
    lengths = jnp.full(2, SHORT.samples)
    np.testing.assert_array_equal(SHORT(audio), SHORT(audio, lengths))
