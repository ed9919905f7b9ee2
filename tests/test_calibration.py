"""Temperature, thresholds and conformal sets: against formulas, and on sounds of known odds."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import optimize, special, stats
from tiny_model import tiny_config

from aatjax import Classifier
from aatjax.audio.frontend import FrontEnd
from aatjax.errors import DataError, NotFiniteError, UsageError
from aatjax.inference.calibration import (
    Calibration,
    apply_calibration,
    calibrate_clips,
    compute_probabilities,
    compute_quantile,
    compute_reliability,
    fit_calibration,
    fit_temperature,
    fit_thresholds,
    read_calibration,
    select_conformal,
)
from aatjax.inference.prediction_formats import format_unsure
from aatjax.models.ast import AST

CLASSES = ("ant", "bee", "cat")


def single(n: int, c: int = 5, seed: int = 0, stretch: float = 1.0):
    """Logits whose softmax is the true distribution of the label, then stretched."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, c)) * 1.5
    odds = special.softmax(logits, axis=1)
    label = (rng.random(n)[:, None] > odds.cumsum(axis=1)).sum(axis=1).clip(max=c - 1)
    return logits * stretch, np.eye(c)[label]


def several(n: int, c: int = 4, seed: int = 0, stretch: float = 1.0, unknown: float = 0.0):
    """The same with independent sigmoids; a share of the entries is not annotated."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, c)) * 1.5 - 1
    targets = (rng.random((n, c)) < special.expit(logits)).astype(float)
    targets[rng.random((n, c)) < unknown] = np.nan
    return logits * stretch, targets


@pytest.mark.parametrize("stretch", [0.4, 1.0, 3.0])
@pytest.mark.parametrize("many", [False, True])
def test_the_temperature_is_the_optimum_of_the_likelihood(many: bool, stretch: float) -> None:
    make = several if many else single
    logits, targets = make(4000, seed=3, stretch=stretch)
    if many:
        targets[::7, 1] = np.nan

    def loss(temperature: float) -> float:
        if not many:
            return -special.log_softmax(logits / temperature, axis=1)[targets == 1].sum()
        signs = np.where(targets == 1, -1, 1)
        return np.logaddexp(0, signs * logits / temperature)[~np.isnan(targets)].sum()

    def posterior(temperature: float) -> float:
        return loss(temperature) - stats.norm.logpdf(math.log(temperature), 0, 0.7)

    found = fit_temperature(logits, targets, many)
    best = optimize.minimize_scalar(
        posterior, bounds=(0.05, 20), method="bounded", options={"xatol": 1e-9}
    )
    assert found == pytest.approx(best.x, rel=1e-5)
    assert found == pytest.approx(stretch, rel=0.1), "the stretch is undone"
    assert loss(found) <= loss(1.0)


@pytest.mark.parametrize("many", [False, True])
def test_few_clips_move_the_temperature_little(many: bool) -> None:
    """E15: 13 clips that are all right had a temperature of 0.09."""
    targets = np.eye(3)[np.arange(13) % 3]
    logits = 4 * targets - 1
    assert (0.25 if many else 0.5) < fit_temperature(logits, targets, many) < 1.0
    few = fit_temperature(-logits, targets, many)
    assert 1.5 < few < fit_temperature(*(np.tile(x, (50, 1)) for x in (-logits, targets)), many)
    assert calibrate_clips(logits, targets, many) == (
        None,
        "not calibrated: 13 validation clips, 20 are needed",
    )
    found, text = calibrate_clips(*(np.tile(x, (2, 1)) for x in (logits, targets)), many)
    assert found is not None
    assert text == f"calibrated on 26 validation clips: temperature {found.temperature:.3g}"


def test_a_threshold_needs_clips_with_and_without_the_class() -> None:
    """Four positive clips determine none, five do."""
    probability = np.concatenate([np.full(20, 0.1), np.full(5, 0.3)])[:, None]
    for positive, expected in ((4, 0.5), (5, 0.2)):
        target = (np.arange(25) >= 25 - positive).astype(float)[:, None]
        probability[: 25 - positive] = 0.1
        assert fit_thresholds(probability, target) == (pytest.approx(expected),)


def test_the_quantile_is_the_formula() -> None:
    rng = np.random.default_rng(0)
    for n in (1, 8, 9, 10, 19, 20, 99, 100, 1000):
        scores = rng.random(n)
        for coverage in (0.5, 0.8, 0.9, 0.95):
            rank = math.ceil(round((n + 1) * coverage, 6))
            expected = 1.0 if rank > n else np.partition(scores, rank - 1)[rank - 1]
            assert compute_quantile(scores, coverage) == expected
            if rank <= n:
                level = rank / n
                numpys = np.quantile(scores, level, method="inverted_cdf")
                assert compute_quantile(scores, coverage) == pytest.approx(numpys, abs=1e-12)


@pytest.mark.parametrize("clips", [10, 199])
@pytest.mark.parametrize("many", [False, True])
def test_the_sets_have_the_promised_coverage(many: bool, clips: int) -> None:
    """Split conformal: given n calibration clips, the coverage is Beta(k, n + 1 - k)."""
    make = several if many else single
    coverage = 0.9
    k = math.ceil((clips + 1) * coverage)
    fresh, truth = make(20000, seed=999, stretch=2.0)
    plain = special.expit(fresh) if many else special.softmax(fresh, axis=1)
    missed = np.where(truth == 1, 1 - plain, 0).max(axis=1)
    found = []
    for seed in range(120):
        logits, targets = make(clips, seed=seed, stretch=2.0)  # an over-confident model
        calibration = fit_calibration(logits, targets, many, coverage)
        found.append((missed <= calibration.quantile).mean())
        if seed == 0:
            low, high = stats.beta.ppf([0.0005, 0.9995], k, clips + 1 - k)
            slack = 4 * math.sqrt(0.09 / 20000)
            assert low - slack < found[0] < high + slack
            np.testing.assert_array_equal(
                select_conformal(plain, calibration), 1 - plain <= calibration.quantile
            )
    spread = stats.beta.std(k, clips + 1 - k) / math.sqrt(len(found)) + 0.3 / math.sqrt(20000)
    assert abs(np.mean(found) - k / (clips + 1)) < 4 * spread
    assert np.mean(found) > coverage - 4 * spread


def test_held_out_clips_are_covered_within_the_binomial_interval() -> None:
    logits, targets = single(4000, seed=5)
    calibration = fit_calibration(logits, targets, False, 0.8)
    fresh, truth = single(4000, seed=6)
    applied = apply_calibration(fresh, calibration)
    covered = int((applied.possible & (truth == 1)).any(axis=1).sum())
    low, high = stats.binom.ppf([0.0005, 0.9995], 4000, 0.8)
    assert low - 60 < covered < high + 60  # and as much again for the calibration clips
    assert 1 < applied.possible.sum(axis=1).mean() < 5
    assert applied.unsure.mean() > 0.2
    right = (applied.given & (truth == 1)).any(axis=1)
    assert right[~applied.unsure].mean() > right[applied.unsure].mean() + 0.2


def test_a_model_that_is_right_more_often_than_asked_leaves_no_set_empty() -> None:
    logits, targets = single(2000, seed=1, stretch=1.0)
    logits = logits + 6 * targets
    calibration = fit_calibration(logits, targets, False, 0.5)
    applied = apply_calibration(logits, calibration)
    bare = select_conformal(compute_probabilities(logits, 1.0, False), calibration)
    assert (bare.sum(axis=1) == 0).mean() > 0.3
    assert (applied.possible.sum(axis=1) >= 1).all()
    assert not applied.unsure.any()


def test_too_few_clips_make_every_class_possible() -> None:
    logits, targets = single(8, seed=2)
    calibration = fit_calibration(logits, targets, False, 0.9)
    assert calibration.quantile == 1.0
    assert apply_calibration(logits, calibration).possible.all()
    assert fit_calibration(*single(9, seed=2), False, 0.9).quantile < 1


def test_the_guarantee_does_not_depend_on_the_temperature() -> None:
    """The sets are those of the logits as they are: the fitted temperature does not move them."""
    logits, targets = single(300, seed=4, stretch=3.0)
    calibration = fit_calibration(logits, targets, False)
    assert calibration.temperature > 2
    scores = np.sort(1 - special.softmax(logits, axis=1)[targets == 1])
    assert calibration.quantile == scores[math.ceil(301 * 0.9) - 1]


@pytest.mark.parametrize("seed", range(8))
def test_thresholds_have_the_best_f1(seed: int) -> None:
    rng = np.random.default_rng(seed)
    probabilities = rng.integers(1, 20, size=(40, 5)) / 20  # many ties
    targets = (rng.random((40, 5)) < probabilities**2).astype(float)
    targets[:, 4] = 0
    targets[rng.random((40, 5)) < 0.1] = np.nan

    def f1(threshold: float, c: int) -> float:
        rows = ~np.isnan(targets[:, c])
        given, true = probabilities[rows, c] >= threshold, targets[rows, c] == 1
        return 2 * (given & true).sum() / max(1, given.sum() + true.sum())

    found = fit_thresholds(probabilities, targets)
    assert found[4] == 0.5
    for c in range(4):
        best = max(f1(t, c) for t in np.arange(0, 21) / 20 - 0.01)
        assert f1(found[c], c) == pytest.approx(best)
        assert 0 < found[c] < 1


def test_separable_classes_keep_a_threshold_of_a_half() -> None:
    probabilities = np.array([[0.9], [0.8], [0.2], [0.1]])
    assert fit_thresholds(probabilities, np.array([[1.0], [1], [0], [0]])) == (0.5,)


def test_the_calibration_error_of_an_example() -> None:
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.55, 0.45], [0.3, 0.7]])
    targets = np.eye(2)[[0, 1, 0, 1]]
    # Bins of a half: 0.9 right, 0.8 wrong, 0.55 right, 0.7 right: |3/4 - 2.95/4|.
    curve = compute_reliability(probabilities, targets, False, bins=2)
    assert curve.error == pytest.approx(abs(0.75 - 2.95 / 4))
    assert curve.count.tolist() == [0, 4]
    # Tenths: 0.9 in (0.8, 0.9], 0.8 in (0.7, 0.8], 0.7 in (0.6, 0.7], 0.55 in (0.5, 0.6].
    curve = compute_reliability(probabilities, targets, False, bins=10)
    assert curve.error == pytest.approx((0.1 + 0.8 + 0.3 + 0.45) / 4)
    assert curve.count.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 0]
    assert np.isnan(curve.accuracy[0]) and curve.accuracy[7] == 0


def test_the_calibration_error_against_a_loop_with_several_labels() -> None:
    logits, targets = several(500, unknown=0.2)
    p = special.expit(logits)
    total = gaps = 0.0
    for k in range(15):
        rows = (p > k / 15) & (p <= (k + 1) / 15) & ~np.isnan(targets)
        if rows.any():
            gaps += rows.sum() * abs((targets[rows] == 1).mean() - p[rows].mean())
            total += rows.sum()
    assert compute_reliability(p, targets, True).error == pytest.approx(gaps / total)


def test_a_stretched_model_is_calibrated() -> None:
    logits, targets = single(3000, seed=1, stretch=3.0)
    calibration = fit_calibration(logits, targets, False)
    fresh, truth = single(3000, seed=2, stretch=3.0)
    before = compute_reliability(compute_probabilities(fresh, 1.0, False), truth, False).error
    after = compute_reliability(
        apply_calibration(fresh, calibration).probabilities, truth, False
    ).error
    assert before > 0.15 and after < 0.04


def test_a_calibration_survives_json() -> None:
    for many in (False, True):
        made = fit_calibration(*(several if many else single)(200), many)
        fields = json.loads(json.dumps(made.to_json()))
        assert Calibration.from_json(fields) == made
        assert made.multi_label is many
        assert read_calibration({"decisions": fields}, 4) == made
    assert read_calibration({}, 4) is None


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": "<b>"},
        {"quantile": 1.5},
        {"quantile": None},
        {"coverage": -1},
        {"clips": math.inf},
        {"thresholds": [0.5]},
        {"thresholds": [2, 0, 0]},
        {"thresholds": 3},
    ],
)
def test_a_damaged_calibration_is_refused(change: dict) -> None:
    fields = Calibration(1.5, (0.5, 0.4, 0.3), 0.4, 0.9, 50).to_json()
    assert Calibration.from_json(fields, 3).thresholds == (0.5, 0.4, 0.3)
    with pytest.raises(DataError, match="decisions: damaged"):
        Calibration.from_json(fields | change, 3)
    for broken in (None, [], "x", {}):
        with pytest.raises(DataError, match="decisions: damaged"):
            Calibration.from_json(broken)


def test_mismatching_arguments_are_refused() -> None:
    logits, targets = single(20)
    with pytest.raises(UsageError, match="coverage"):
        fit_calibration(logits, targets, False, 1.0)
    with pytest.raises(UsageError, match="do not match"):
        fit_calibration(logits[:0], targets[:0], False)
    with pytest.raises(UsageError, match="multi_label"):
        fit_calibration(logits, np.ones_like(targets), False)
    with pytest.raises(UsageError, match="bins"):
        compute_reliability(logits, targets, False, bins=0)
    logits[3, 1] = np.nan
    with pytest.raises(NotFiniteError):
        fit_calibration(logits, targets, False)


# --- predictions --------------------------------------------------------------------------------

FRONTEND = FrontEnd(frames=98)
TINY = tiny_config()


@pytest.fixture(scope="module")
def model() -> AST:
    model = AST(TINY, rngs=nnx.Rngs(0))
    model.head.linear.kernel[...] = 100 * model.head.linear.kernel[...]
    return model


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return (3000 * np.random.default_rng(seed).normal(size=samples)).astype(np.int16)


def logits_of(model: AST, wave: np.ndarray) -> np.ndarray:
    audio, length = FRONTEND.fit(wave)
    return np.asarray(model(FRONTEND(jnp.asarray(audio[None]), jnp.asarray([length]))))


@pytest.mark.parametrize("many", [False, True])
def test_a_classifier_with_calibration(model: AST, many: bool) -> None:
    wave = noise(12000)
    logits = logits_of(model, wave)
    link = special.expit if many else lambda x: special.softmax(x, axis=1)
    plain = link(logits)[0]
    cut = float(1 - np.sort(plain)[-2])  # two classes are possible
    thresholds = (0.5, 0.5, 0.5) if many else None
    calibration = Calibration(2.0, thresholds, cut + 1e-4, 0.9, 60)
    found = Classifier(
        model, CLASSES, FRONTEND, multi_label=many, calibration=calibration
    ).predict_waveform(wave)
    np.testing.assert_allclose(found.probabilities, link(logits / 2)[0], atol=1e-5)
    assert found.possible is not None and found.given is not None
    assert set(CLASSES[i] for i in np.argsort(-plain)[:2]) <= set(found.possible)
    if not many:
        assert found.given == (found.label,) == found.possible[:1]
        assert len(found.possible) == 2 and found.unsure is True
        assert format_unsure(found) == f"  unsure: {', '.join(found.possible)} (90%)"
    fields = json.loads(json.dumps(found.to_json()))
    assert fields["unsure"] is found.unsure and fields["coverage"] == 0.9
    assert fields["possible"] == list(found.possible) and fields["given"] == list(found.given)


def test_a_classifier_without_calibration_has_no_sets(model: AST) -> None:
    wave = noise(40000)
    found = Classifier(model, CLASSES, FRONTEND).predict_waveform(wave)
    assert found.unsure is None and found.possible is None and format_unsure(found) == ""
    assert not {"unsure", "possible", "given", "coverage"} & set(found.to_json())
    parts = [wave[i : i + FRONTEND.samples] for i in range(0, len(wave), FRONTEND.samples)]
    rows = [jax.nn.softmax(jnp.asarray(logits_of(model, part)))[0] for part in parts]
    mean = np.average(rows, axis=0, weights=[len(part) for part in parts])
    np.testing.assert_allclose(found.probabilities, mean, atol=1e-5)


def test_a_sure_prediction_has_no_note(model: AST) -> None:
    sure = Classifier(model, CLASSES, FRONTEND, calibration=Calibration(1.0, None, 0.0, 0.9, 60))
    found = sure.predict_waveform(noise(9000))
    assert found.unsure is False and found.possible == (found.label,) and format_unsure(found) == ""
    lost = Classifier(model, CLASSES, FRONTEND, calibration=Calibration(1.0, None, 1.0, 0.9, 5))
    assert format_unsure(lost.predict_waveform(noise(9000))) == "  unsure: any class (90%)"
