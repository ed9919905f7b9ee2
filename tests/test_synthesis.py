"""Synthetic sounds: the same bytes everywhere, wide variation, neither too easy nor too hard."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from aatjax.data.synthetic.primitives import Take, convolve, fast_length, place_at
from aatjax.data.synthetic.synthesize import (
    MAKERS,
    PRETRAIN_SOUNDS,
    SOUNDS,
    TARGET_SOUNDS,
    synthesize,
)
from aatjax.errors import UsageError

GOLDEN = [
    ("siren", 0, 2.0, 16000, "ae1acc89d14d6a1df9d9d0c64b00ea2ab5644bf767cf1c89280e642498a2fb91"),
    ("fire", 1, 2.0, 16000, "f22feacbaccf04ea62d0ab29a0abdeb8a30b50b318bd293465b13a240bc8e8f8"),
    ("bark", 2, 2.0, 16000, "5f910bf59ea53f1109345d1fa2a2c39776f4e48a7906ef08a3aee12407d8d3f3"),
    ("clock", 3, 2.0, 16000, "0554e9117c20974155dd0ebc6f96105f6accde5d817123d57ea4d01a9e3aca4f"),
    ("rain", 4, 1.0, 16000, "be1c591e2c05b2122c46488a14d9df280074ac5cf7dbb9bb7912c035b162b983"),
    ("organ", 5, 0.5, 22050, "ca547e7488b83102a1fcb75e8e681090bceae1fb6da6c91a896a53441b3e9e04"),
    ("knock", 6, 1.3, 8000, "6bc32f884f2a8f15474ee5acc18478f5c30d25c835e60f961a87bd14b40e1f87"),
]

DIGEST_OF_ALL = """
import hashlib
from aatjax.data.synthetic.synthesize import SOUNDS, synthesize
digest = hashlib.sha256()
for sound in SOUNDS:
    for seed in range(3):
        digest.update(synthesize(sound, seed).astype("<i2").tobytes())
print(digest.hexdigest())
"""


ORDER = (
    "rain wind waves thunder fire clock bell siren alarm helicopter engine chainsaw bark crow"
    " bird cricket frog drops knock steps glass phone horn applause typing whistle pluck organ"
    " flute brass cat cow sheep rooster hen pig baby laugh cough sneeze snore vacuum train saw"
    " creak fireworks pour plane washer brush"
)


def digest(clip: np.ndarray) -> str:
    return hashlib.sha256(clip.astype("<i2").tobytes()).hexdigest()


def take(size: int = 16000, rate: int = 16000, seed: int = 0) -> Take:
    return Take(np.random.Generator(np.random.PCG64(seed)), rate, size)


def test_names_are_fifty_in_a_fixed_order_and_split_in_two() -> None:
    assert " ".join(SOUNDS) == ORDER
    assert len(TARGET_SOUNDS) == 10 and len(PRETRAIN_SOUNDS) == 40
    assert set(TARGET_SOUNDS) | set(PRETRAIN_SOUNDS) == set(SOUNDS)


@pytest.mark.parametrize(("sound", "seed", "seconds", "rate", "expected"), GOLDEN)
def test_bytes_are_the_published_ones(
    sound: str, seed: int, seconds: float, rate: int, expected: str
) -> None:
    assert digest(synthesize(sound, seed, seconds=seconds, rate=rate)) == expected


def _digest_in_new_process(**environment: str) -> str:
    root = str(Path(__file__).parents[1])
    run = subprocess.run(
        [sys.executable, "-c", DIGEST_OF_ALL],
        env={**os.environ, "PYTHONPATH": root, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return run.stdout.strip()


def test_bytes_repeat_here_and_in_another_process_without_vector_instructions() -> None:
    total = hashlib.sha256()
    state = str(np.random.get_state(legacy=False))
    for sound in SOUNDS:
        for seed in range(3):
            total.update(synthesize(sound, seed).astype("<i2").tobytes())
    assert str(np.random.get_state(legacy=False)) == state  # the global stream is left alone
    found = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])  # type: ignore[index]
    plain = _digest_in_new_process(NPY_DISABLE_CPU_FEATURES=" ".join(found), PYTHONHASHSEED="7")
    assert _digest_in_new_process() == total.hexdigest()
    assert plain == total.hexdigest()


def test_order_of_calls_does_not_matter() -> None:
    first = synthesize("glass", 3)
    synthesize("rain", 9, seconds=0.3)
    assert np.array_equal(synthesize("glass", 3), first)


@pytest.mark.parametrize("sound", SOUNDS)
def test_clips_are_sound_and_all_different(sound: str) -> None:
    clips = [synthesize(sound, seed) for seed in range(8)]
    assert len({digest(clip) for clip in clips}) == 8
    peaks = []
    for clip in clips:
        assert clip.dtype == np.int16 and clip.shape == (32000,)
        wave = clip / 32768.0
        peaks.append(20.0 * np.log10(np.abs(wave).max()))
        assert -30.1 < peaks[-1] < -2.9
        assert abs(wave.mean()) < 0.15 * np.abs(wave).max()  # overdrive leaves a little
        loudness = [np.std(part) for part in np.split(wave, 10)]
        assert min(loudness) > 0.0  # the background never stops
    assert np.ptp(peaks) > 5.0  # the level does not depend on the class


def test_name_of_the_sound_seeds_its_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MAKERS, "knock", MAKERS["clock"])
    one, two = (synthesize(sound, 5).astype(float) for sound in ("knock", "clock"))
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.2


@pytest.mark.parametrize(
    ("seconds", "rate"), [(1e-4, 16000), (0.013, 8000), (0.37, 11025), (1.3337, 22051), (1.0, 4000)]
)
def test_odd_lengths_and_rates(seconds: float, rate: int) -> None:
    for sound in SOUNDS:
        clip = synthesize(sound, 1, seconds=seconds, rate=rate)
        assert clip.shape == (round(seconds * rate),)
        assert np.abs(clip.astype(int)).max() > 500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sound": "sirens"}, "unknown sound 'sirens'; did you mean 'siren'"),
        ({"sound": "qqqq"}, "choose one of rain, wind"),
        ({"seed": -1}, "seed: -1 is negative"),
        ({"rate": 100}, "rate: 100 Hz is too low"),
        ({"seconds": 0.0}, r"seconds: 0\.0 is no length"),
        ({"seconds": float("nan")}, "seconds: nan is no length"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(arguments: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        synthesize(**{"sound": "rain", "seed": 0, **arguments})
    assert "\n" not in str(caught.value)


def test_fast_length_is_the_least_smooth_number() -> None:
    smooth = sorted(2**a * 3**b * 5**c for a in range(13) for b in range(8) for c in range(6))
    for size in [1, 2, 7, 11, 97, 1001, 2049, 3999, 4001]:
        assert fast_length(size) == next(number for number in smooth if number >= size)


def test_tone_has_its_pitch_and_no_alias() -> None:
    spectrum = np.abs(np.fft.rfft(take().tone(3000.0, [1.0, 0.5, 0.25]) * np.hanning(16000)))
    spectrum /= spectrum[3000]
    assert spectrum[6000] == pytest.approx(0.5, rel=1e-3)
    spectrum[2990:3011] = spectrum[5990:6011] = 0.0
    assert spectrum.max() < 1e-3  # 9000 Hz would fold to 7000 Hz


def test_noise_keeps_to_its_band_at_unit_level() -> None:
    sound = take().noise(500.0, 1500.0)
    power = np.abs(np.fft.rfft(sound)) ** 2
    assert np.sqrt(np.mean(sound**2)) == pytest.approx(1.0)
    assert power[300:2500].sum() > 0.99 * power.sum()


def test_convolve_and_place_at_agree_with_numpy() -> None:
    draws = np.random.default_rng(0)
    signal, response = draws.standard_normal(101), draws.standard_normal(37)
    np.testing.assert_allclose(
        convolve(signal, response), np.convolve(signal, response)[:101], atol=1e-12
    )
    track = np.zeros(5)
    for start in (-2, 3, 9, -9):
        place_at(track, np.array([1.0, 2.0, 3.0]), start)
    assert track.tolist() == [3.0, 0.0, 0.0, 1.0, 2.0]


def _spectrogram(clip: np.ndarray) -> np.ndarray:
    """Log power in 40 bands of equal ratio, frames of 25 ms every 10 ms."""
    frames = np.lib.stride_tricks.sliding_window_view(clip / 32768.0, 400)[::160]
    power = np.abs(np.fft.rfft(frames * np.hanning(400), 512)) ** 2
    edges = np.unique(np.geomspace(2, 257, 41).astype(int))
    return np.log(np.add.reduceat(power[:, :256], edges[:-1], axis=1) + 1e-8)


def _rhythm(bands: np.ndarray) -> np.ndarray:
    """How each quarter of the bands moves in time: modulation spectrum and change a frame."""
    coarse = np.stack([part.mean(axis=1) for part in np.array_split(bands, 8, axis=1)], axis=1)
    moving = (coarse - coarse.mean(axis=0)) * np.hanning(len(coarse))[:, None]
    turns = np.log(np.abs(np.fft.rfft(moving, 256, axis=0))[1:81] + 1e-2)
    change = np.diff(bands, axis=0)
    return np.concatenate(
        [turns.reshape(20, 4, -1).mean(axis=1).ravel(), change.std(axis=0), change.max(axis=0)]
    )


@pytest.mark.slow
def test_targets_are_separable_but_not_trivially() -> None:
    still, moving, labels = [], [], []
    for label, sound in enumerate(TARGET_SOUNDS):
        for seed in range(50):
            bands = _spectrogram(synthesize(sound, seed))
            still.append(np.concatenate([bands.mean(axis=0), bands.std(axis=0)]))
            moving.append(np.concatenate([still[-1], _rhythm(bands)]))
            labels.append(label)
    truth, train = np.array(labels), np.arange(len(labels)) % 50 < 20
    accuracy = []
    for features in (np.array(still), np.array(moving)):
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
        probe.fit(features[train], truth[train])
        accuracy.append(float(probe.score(features[~train], truth[~train])))
    print(f"20 clips per class: spectrum {accuracy[0]:.3f}, with rhythm {accuracy[1]:.3f}")
    assert 0.4 < accuracy[0] < 0.75
    assert accuracy[0] + 0.08 < accuracy[1] < 0.9  # time carries what the spectrum does not
