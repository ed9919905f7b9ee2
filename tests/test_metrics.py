"""Metrics against scikit-learn, against values computed on paper, and on degenerate sets."""

import json
import time

import numpy as np
import pytest
from scipy import special, stats
from sklearn import metrics as sk

from aatjax.errors import DataError, NotFiniteError, UsageError
from aatjax.train.metrics.evaluate import compute_metrics
from aatjax.train.metrics.intervals import mean_interval, percentile_interval, rank, resample


def single(n, c, *, seed=0, signal=1.5, labels=None):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, c, n) if labels is None else np.asarray(labels)
    targets = np.eye(c, dtype=np.float32)[labels]
    logits = rng.normal(size=(n, c)).astype(np.float32) + signal * targets
    return labels, logits.astype(np.float32), targets


def names(c):
    return [f"class {i}" for i in range(c)]


@pytest.mark.parametrize(("n", "c"), [(60, 2), (200, 7), (90, 30)])
def test_single_label_agrees_with_scikit_learn(n, c):
    labels, logits, targets = single(n, c, labels=np.arange(n) % c)
    guess = logits.argmax(1)
    probability = special.softmax(logits.astype(np.float64), axis=1)
    result = compute_metrics(logits, targets, classes=names(c), multi_label=False, bootstrap=0)

    assert result.accuracy == pytest.approx(sk.accuracy_score(labels, guess))
    assert result.balanced_accuracy == pytest.approx(sk.balanced_accuracy_score(labels, guess))
    assert result.macro_f1 == pytest.approx(sk.f1_score(labels, guess, average="macro"))
    assert result.mean_ap == pytest.approx(sk.average_precision_score(targets, probability))
    assert result.macro_auc == pytest.approx(sk.roc_auc_score(targets, probability))
    np.testing.assert_array_equal(result.confusion, sk.confusion_matrix(labels, guess))
    table = sk.precision_recall_fscore_support(labels, guess, zero_division=np.nan)
    for row, precision, recall, f1, support in zip(result.per_class, *table, strict=True):
        assert row.precision == (None if np.isnan(precision) else pytest.approx(precision))
        assert (row.recall, row.f1) == (pytest.approx(recall), pytest.approx(f1))
        assert row.support == support


def test_multi_label_agrees_with_scikit_learn():
    rng = np.random.default_rng(3)
    targets = (rng.random((150, 9)) < 0.25).astype(np.float32)
    logits = (rng.normal(size=targets.shape) + 1.5 * targets - 0.7).astype(np.float32)
    result = compute_metrics(logits, targets, classes=names(9), multi_label=True, bootstrap=50)

    assert result.mean_ap == pytest.approx(sk.average_precision_score(targets, logits))
    assert result.macro_auc == pytest.approx(sk.roc_auc_score(targets, logits))
    assert result.macro_f1 == pytest.approx(sk.f1_score(targets, logits > 0, average="macro"))
    some = targets.any(1)
    hits = targets[np.arange(150), logits.argmax(1)][some]
    assert result.accuracy == pytest.approx(hits.mean())
    assert result.balanced_accuracy is None and result.confusion is None
    name, value, low, high = result.headline
    assert (name, value) == ("mAP", result.mean_ap) and low < value < high


def test_values_computed_on_paper():
    # True classes a a a b; guesses a a b b.
    logits = np.array([[2, 0], [3, 0], [0, 1], [0, 2]], np.float32)
    targets = np.array([[1, 0], [1, 0], [1, 0], [0, 1]], np.float32)
    result = compute_metrics(logits, targets, classes=["a", "b"], multi_label=False, bootstrap=0)
    assert result.accuracy == 3 / 4
    assert result.balanced_accuracy == pytest.approx((2 / 3 + 1) / 2)
    assert result.macro_f1 == pytest.approx((4 / 5 + 2 / 3) / 2)
    np.testing.assert_array_equal(result.confusion, [[2, 1], [0, 1]])
    assert result.mean_ap == pytest.approx(1)  # b's only clip is ranked first, a's three before it

    # Ranks 1 to 4 are + - + -: precision 1 and 2/3 at the positives; 3 of 4 pairs in order.
    logits = np.array([[4], [3], [2], [1]], np.float32)
    targets = np.array([[1], [0], [1], [0]], np.float32)
    result = compute_metrics(logits, targets, classes=["a"], multi_label=True, bootstrap=0)
    assert result.mean_ap == pytest.approx((1 + 2 / 3) / 2)
    assert result.macro_auc == pytest.approx(3 / 4)
    assert result.d_prime == pytest.approx(2**0.5 * 0.6744897501960817)


def test_weighted_ranks_equal_repeated_clips_with_ties():
    rng = np.random.default_rng(5)
    scores = rng.integers(0, 6, 40).astype(float)  # many ties
    positive = rng.random(40) < 0.3
    weights = rng.multinomial(40, np.full(40, 1 / 40), size=25).astype(float)
    average, area = rank(scores, positive, weights)
    for k, row in enumerate(weights.astype(int)):
        y, s = np.repeat(positive, row), np.repeat(scores, row)
        assert average[k] == pytest.approx(sk.average_precision_score(y, s))
        assert area[k] == pytest.approx(sk.roc_auc_score(y, s))


def test_ranks_without_positives_or_negatives_are_undefined():
    weights = np.ones((2, 3))
    for positive in ([False] * 3, [True] * 3):
        average, area = rank(np.array([1.0, 2.0, 3.0]), np.array(positive), weights)
        assert np.isnan(area).all()
        assert np.isnan(average).all() == (not positive[0])


def test_intervals_are_those_of_a_plain_bootstrap():
    labels, logits, targets = single(120, 4)
    result = compute_metrics(logits, targets, classes=names(4), multi_label=False, bootstrap=2000)
    guess = logits.argmax(1)
    rng = np.random.default_rng(1)
    draws = [rng.integers(0, 120, 120) for _ in range(2000)]
    plain = {
        "accuracy": [(labels[d] == guess[d]).mean() for d in draws],
        "macro_f1": [sk.f1_score(labels[d], guess[d], average="macro") for d in draws[:600]],
        "mean_ap": [
            sk.average_precision_score(targets[d], special.softmax(logits[d], 1))
            for d in draws[:600]
        ],
    }
    for name, values in plain.items():
        low, high = result.intervals[name]
        assert low == pytest.approx(np.quantile(values, 0.025), abs=0.02), name
        assert high == pytest.approx(np.quantile(values, 0.975), abs=0.02), name


def test_intervals_follow_seed_level_and_groups():
    _, logits, targets = single(80, 3)
    call = {"classes": names(3), "multi_label": False, "bootstrap": 400}
    first = compute_metrics(logits, targets, **call)
    assert first.intervals == compute_metrics(logits, targets, **call).intervals
    assert first.intervals != compute_metrics(logits, targets, **call, seed=1).intervals
    narrow = compute_metrics(logits, targets, **call, interval=0.5).intervals["accuracy"]
    wide = first.intervals["accuracy"]
    assert wide[0] < narrow[0] < first.accuracy < narrow[1] < wide[1]
    # Eight copies of ten clips hold the information of ten clips, not of eighty.
    copies, owners = np.tile(np.arange(10), 8), np.tile(np.arange(10), 8)
    plain = compute_metrics(logits[copies], targets[copies], **call).intervals["accuracy"]
    grouped = compute_metrics(logits[copies], targets[copies], **call, groups=list(owners))
    low, high = grouped.intervals["accuracy"]
    assert high - low > 2 * (plain[1] - plain[0])


def test_resamples_draw_whole_groups():
    drawn = resample(["a", "b", "a", "c"], 4, 200, np.random.default_rng(0))
    np.testing.assert_array_equal(drawn[:, 0], drawn[:, 2])
    assert (drawn[:, 0] + drawn[:, 1] + drawn[:, 3] == 3).all()
    assert (resample(None, 7, 50, np.random.default_rng(0)).sum(1) == 7).all()


def test_four_hundred_clips_take_less_than_two_seconds():
    _, logits, targets = single(400, 50)
    start = time.perf_counter()
    compute_metrics(logits, targets, classes=names(50), multi_label=False, bootstrap=1000)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    "labels", [[0, 0, 1, 1, 1], [0, 0, 0], [2], [1, 2]], ids=["absent", "one", "1 clip", "2 clips"]
)
@pytest.mark.parametrize("multi_label", [False, True])
def test_b15_small_sets_are_defined_or_none(labels, multi_label):
    _, logits, targets = single(len(labels), 3, labels=labels)
    result = compute_metrics(
        logits, targets, classes=names(3), multi_label=multi_label, bootstrap=100
    )
    text = json.dumps(result.to_json(), allow_nan=False)
    assert json.loads(text)["clips"] == len(labels)
    name, value, low, high = result.headline
    assert value is not None and 0 <= value <= 1
    assert (low is None) == (len(labels) == 1) == (high is None)
    absent = sorted(set(range(3)) - set(labels))
    for c in absent:
        row = result.per_class[c]
        assert (row.support, row.recall, row.f1, row.average_precision) == (0, None, None, None)
    assert any(f"{len(absent)} of 3 classes have no clip" in note for note in result.notes)
    assert name in result.table() and "n/a" in result.table() and "nan" not in result.table()


def test_b15_absent_classes_do_not_enter_the_means():
    labels, logits, targets = single(40, 5, labels=np.arange(40) % 4)
    result = compute_metrics(logits, targets, classes=names(5), multi_label=False, bootstrap=0)
    guess, scores = logits.argmax(1), special.softmax(logits, 1)
    present = range(4)
    f1 = sk.f1_score(labels, guess, labels=list(present), average="macro")
    assert result.macro_f1 == pytest.approx(f1)
    ap = [sk.average_precision_score(labels == c, scores[:, c]) for c in present]
    assert result.mean_ap == pytest.approx(np.mean(ap), rel=1e-5)


def test_b15_one_class_and_many_classes():
    one = np.ones((4, 1), np.float32)
    result = compute_metrics(one, one, classes=["a"], multi_label=False, bootstrap=20)
    assert (result.accuracy, result.macro_auc, result.d_prime) == (1, None, None)
    assert any("one class only" in note for note in result.notes)

    labels, logits, targets = single(300, 5000, signal=6)
    result = compute_metrics(logits, targets, classes=names(5000), multi_label=False, bootstrap=20)
    assert result.accuracy == pytest.approx((logits.argmax(1) == labels).mean())
    assert result.confusion is None
    assert "... and 4990 more classes" in result.table(10)
    json.dumps(result.to_json(), allow_nan=False)


def test_b15_multi_label_clips_without_any_label():
    zeros = np.zeros((3, 2), np.float32)
    result = compute_metrics(zeros, zeros, classes=["a", "b"], multi_label=True, bootstrap=20)
    assert result.headline == ("mAP", None, None, None)
    assert result.accuracy is None
    json.dumps(result.to_json(), allow_nan=False)


def test_a_perfect_ranking_has_no_bounded_d_prime():
    targets = np.eye(3, dtype=np.float32)[[0, 1, 2, 0, 1, 2]]
    result = compute_metrics(
        9 * targets, targets, classes=names(3), multi_label=False, bootstrap=30
    )
    assert (result.macro_auc, result.d_prime, result.intervals["d_prime"]) == (1, None, None)
    assert any("d-prime" in note for note in result.notes)


def test_b16_labels_that_do_not_fit_the_task():
    logits = np.zeros((3, 3), np.float32)
    targets = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0]], np.float32)
    with pytest.raises(UsageError, match=r"2 of 3 .* first row 1 with 2; set multi_label=True"):
        compute_metrics(logits, targets, classes=names(3), multi_label=False)
    assert (
        compute_metrics(logits, targets, classes=names(3), multi_label=True, bootstrap=0).clips == 3
    )
    one_hot = np.eye(3, dtype=np.float32)
    result = compute_metrics(logits, one_hot, classes=names(3), multi_label=True, bootstrap=0)
    assert any("multi_label=False" in note for note in result.notes)
    with pytest.raises(UsageError, match="0 or 1"):
        compute_metrics(logits, 0.5 * one_hot, classes=names(3), multi_label=True)


def test_bad_arguments():
    logits = targets = np.eye(3, dtype=np.float32)
    call = {"classes": names(3), "multi_label": False}
    with pytest.raises(UsageError, match="do not fit"):
        compute_metrics(logits, targets, classes=names(2), multi_label=False)
    with pytest.raises(UsageError, match="2 groups for 3 clips"):
        compute_metrics(logits, targets, **call, groups=["a", "b"])
    with pytest.raises(UsageError, match="interval is 95"):
        compute_metrics(logits, targets, **call, interval=95.0)
    with pytest.raises(UsageError, match="bootstrap is -1"):
        compute_metrics(logits, targets, **call, bootstrap=-1)
    with pytest.raises(DataError, match="no clips"):
        compute_metrics(logits[:0], targets[:0], **call)
    broken = logits.copy()
    broken[1, 2] = np.nan
    with pytest.raises(NotFiniteError, match=r"1 of 3 clips .* first row 1"):
        compute_metrics(broken, targets, **call)


def test_large_sets_get_fewer_resamples(monkeypatch):
    _, logits, targets = single(50, 4)
    monkeypatch.setattr("aatjax.train.metrics.evaluate.RANKING_WORK", 50 * 4 * 250)
    result = compute_metrics(logits, targets, classes=names(4), multi_label=False, bootstrap=900)
    assert "250 resamples instead of 900 for mAP, AUC and d-prime" in result.notes
    monkeypatch.setattr("aatjax.train.metrics.evaluate.RANKING_WORK", 50 * 4)
    result = compute_metrics(logits, targets, classes=names(4), multi_label=False, bootstrap=900)
    assert result.intervals["mean_ap"] is None and result.intervals["accuracy"] is not None


def test_mean_interval():
    values = [0.91, 0.88, 0.93, 0.9, 0.86]
    mean, low, high = mean_interval(values)
    known = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (mean, low, high) == pytest.approx((np.mean(values), known.low, known.high))
    # Two values: half their distance, times 12.7062 of one degree of freedom.
    assert mean_interval([0.0, 2.0])[2] == pytest.approx(1 + 12.7062, abs=1e-4)
    assert mean_interval([0.7]) == (0.7, None, None)
    for wrong in ([], [0.5, float("nan")]):
        with pytest.raises(UsageError, match="not defined"):
            mean_interval(wrong)
    with pytest.raises(UsageError, match="interval"):
        mean_interval(values, 1.0)


def test_percentile_interval_leaves_out_what_is_undefined():
    assert percentile_interval(np.array([np.nan, np.nan]), 0.9) is None
    low, high = percentile_interval(np.append(np.arange(101.0), np.nan), 0.9)
    assert (low, high) == (5, 95)
