"""Metrics against scikit-learn, against values computed on paper, and on degenerate sets."""

import dataclasses
import json
import time

import numpy as np
import pytest
from scipy import special, stats
from sklearn import metrics as sk

from aatjax.data.source import Clip, Source
from aatjax.errors import DataError, NotFiniteError, UsageError
from aatjax.train.evaluation import measure_metrics
from aatjax.train.metrics.estimates import estimate_ranking
from aatjax.train.metrics.evaluate import compute_metrics
from aatjax.train.metrics.intervals import Units, estimate_share_interval, mean_interval


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
    result = compute_metrics(logits, targets, classes=names(c), multi_label=False)

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
    result = compute_metrics(logits, targets, classes=names(9), multi_label=True)

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
    result = compute_metrics(logits, targets, classes=["a", "b"], multi_label=False)
    assert result.accuracy == 3 / 4
    assert result.balanced_accuracy == pytest.approx((2 / 3 + 1) / 2)
    assert result.macro_f1 == pytest.approx((4 / 5 + 2 / 3) / 2)
    np.testing.assert_array_equal(result.confusion, [[2, 1], [0, 1]])
    assert result.mean_ap == pytest.approx(1)  # b's only clip is ranked first, a's three before it

    # Ranks 1 to 4 are + - + -: precision 1 and 2/3 at the positives; 3 of 4 pairs in order.
    logits = np.array([[4], [3], [2], [1]], np.float32)
    targets = np.array([[1], [0], [1], [0]], np.float32)
    result = compute_metrics(logits, targets, classes=["a"], multi_label=True)
    assert result.mean_ap == pytest.approx((1 + 2 / 3) / 2)
    assert result.macro_auc == pytest.approx(3 / 4)
    assert result.d_prime == pytest.approx(2**0.5 * 0.6744897501960817)


def ranked(seed, *, n=60, ties=False):
    rng = np.random.default_rng(seed)
    positive = rng.random(n) < 0.3
    scores = rng.normal(size=n) + positive
    return (np.round(2 * scores) / 2 if ties else scores), positive


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("which", [0, 1], ids=["ap", "auc"])
def test_ranking_and_its_influences_are_those_of_scikit_learn(ties, which):
    scores, positive = ranked(5, ties=ties)
    found = estimate_ranking(scores, positive, np.ones(60, bool))[which]
    theirs = (sk.average_precision_score, sk.roc_auc_score)[which]
    assert found.value == pytest.approx(theirs(positive, scores), abs=1e-12)
    step = 1e-6
    for i in range(0, 60, 4):  # the derivative by the weight of a clip
        weights = np.ones(60)
        weights[i] += step
        more = theirs(positive, scores, sample_weight=weights)
        weights[i] -= 2 * step
        less = theirs(positive, scores, sample_weight=weights)
        assert found.influence[i] == pytest.approx((more - less) / (2 * step), abs=1e-8)


@pytest.mark.parametrize("ties", [False, True])
def test_the_bias_of_average_precision_is_the_jackknifes(ties):
    scores, positive = ranked(6, n=30, ties=ties)
    found, _ = estimate_ranking(scores, positive, np.ones(30, bool))
    without = [
        sk.average_precision_score(np.delete(positive, i), np.delete(scores, i)) for i in range(30)
    ]
    assert found.bias == pytest.approx(29 * (np.mean(without) - found.value), abs=1e-12)


def test_the_variance_of_the_area_is_delongs():
    rng = np.random.default_rng(3)
    positive = np.arange(40) % 2 == 0
    scores = rng.normal(size=40) + positive
    _, found = estimate_ranking(scores, positive, np.ones(40, bool))
    above = scores[positive][:, None] > scores[~positive][None]
    delong = above.mean(1).var(ddof=1) / 20 + above.mean(0).var(ddof=1) / 20
    assert (found.influence**2).sum() * 20 / 19 == pytest.approx(delong)


def test_ranks_without_positives_or_negatives_are_undefined():
    scores, every = np.array([1.0, 2.0, 3.0]), np.ones(3, bool)
    assert estimate_ranking(scores, ~every, every) == (None, None)
    assert estimate_ranking(scores, every, every) == (None, None), "any order would have an AP of 1"


def test_intervals_of_proportions_are_wilsons():
    labels, logits, targets = single(120, 4)
    result = compute_metrics(logits, targets, classes=names(4), multi_label=False)
    guess = logits.argmax(1)

    def wilson(right, of):
        found = stats.binomtest(int(right), int(of)).proportion_ci(0.95, method="wilson")
        return pytest.approx((found.low, found.high))

    assert result.intervals["accuracy"] == wilson((guess == labels).sum(), 120)
    for c, row in enumerate(result.per_class):
        right = ((guess == c) & (labels == c)).sum()
        assert row.intervals["recall"] == wilson(right, (labels == c).sum())
        assert row.intervals["precision"] == wilson(right, (guess == c).sum())
    # Newcombe 1998, table I: 81 of 263 and 1 of 29.
    for right, of, bounds in ((81, 263, (0.2553, 0.3662)), (1, 29, (0.0061, 0.1718))):
        true = np.arange(of) < right
        assert estimate_share_interval(true) == pytest.approx(bounds, abs=5e-5)
    assert estimate_share_interval(np.zeros(0, bool)) is None


def test_other_intervals_are_about_those_of_a_plain_bootstrap():
    _, logits, targets = single(120, 4)
    call = {"classes": names(4), "multi_label": False}
    result = compute_metrics(logits, targets, **call)
    rng = np.random.default_rng(1)
    draws = [rng.integers(0, 120, 120) for _ in range(400)]
    drawn = [compute_metrics(logits[d], targets[d], **call) for d in draws]
    for name in ("balanced_accuracy", "macro_f1", "mean_ap", "macro_auc"):
        spread = np.std([getattr(one, name) for one in drawn])
        low, high = result.intervals[name]
        assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.2), name
        assert low < getattr(result, name) < high
    for name in ("f1", "average_precision", "auc"):
        spread = np.std([getattr(one.per_class[1], name) for one in drawn])
        low, high = result.per_class[1].intervals[name]
        assert high - low == pytest.approx(2 * 2.05 * spread, rel=0.2), name  # t of 27 clips


def test_the_interval_over_groups_is_the_score_interval_of_their_variance():
    rng = np.random.default_rng(4)
    owners = np.arange(80) % 10
    right = rng.random(80) < np.linspace(0.2, 0.9, 10)[owners]
    low, high = estimate_share_interval(right, owners.tolist())
    means = np.array([right[owners == g].mean() for g in range(10)])
    share, error = right.mean(), stats.sem(means)
    effective = share * (1 - share) / error**2
    for bound in (low, high):  # Wilson: the bound's own standard error, by Student's t
        distance = abs(share - bound) / np.sqrt(bound * (1 - bound) / effective)
        assert distance == pytest.approx(stats.t.ppf(0.975, 9), rel=0.01)
    plain = estimate_share_interval(right)
    assert high - low > 1.3 * (plain[1] - plain[0])


def test_intervals_follow_level_and_groups():
    _, logits, targets = single(80, 3)
    call = {"classes": names(3), "multi_label": False}
    first = compute_metrics(logits, targets, **call)
    narrow = compute_metrics(logits, targets, **call, interval=0.5).intervals["accuracy"]
    wide = first.intervals["accuracy"]
    assert wide[0] < narrow[0] < first.accuracy < narrow[1] < wide[1]
    # Eight copies of ten clips hold the information of ten clips, not of eighty.
    copies, owners = np.tile(np.arange(10), 8), np.tile(np.arange(10), 8)
    plain = compute_metrics(logits[copies], targets[copies], **call)
    grouped = compute_metrics(logits[copies], targets[copies], **call, groups=owners.tolist())
    for name, bounds in grouped.intervals.items():
        if bounds is not None:
            narrow = plain.intervals[name]
            assert bounds[1] - bounds[0] > 1.8 * (narrow[1] - narrow[0]), name
    assert (plain.counts, grouped.counts) == ("80 clips", "80 clips, 10 groups")
    assert "80 clips, 10 groups" in grouped.table() and "variance over groups" in grouped.table()
    assert grouped.format_headline().endswith("(80 clips, 10 groups)")
    assert "variance over clips" in plain.table()


def test_clips_without_a_group_are_on_their_own():
    units = Units(["a", None, "a", None], 4)
    assert units.count == 3 and units.grouped
    np.testing.assert_array_equal(units.sum(np.array([1.0, 2.0, 3.0, 4.0])), [4, 2, 4])
    assert units.count_among(np.array([True, False, True, False])) == 1
    _, logits, targets = single(30, 3)
    call = {"classes": names(3), "multi_label": False}
    alone = compute_metrics(logits, targets, **call, groups=[None] * 30)
    assert alone.to_json() == compute_metrics(logits, targets, **call).to_json()


@pytest.mark.parametrize("groups", [None, [i % 5 for i in range(13)]], ids=["clips", "speakers"])
def test_thirteen_of_thirteen_is_not_certain(groups):
    targets = np.eye(3, dtype=np.float32)[np.arange(13) % 3]
    result = compute_metrics(
        9 * targets, targets, classes=names(3), multi_label=False, groups=groups
    )
    low, high = result.intervals["accuracy"]
    assert high == 1
    if groups is None:
        assert low == pytest.approx(0.7719, abs=1e-4)  # Wilson: 13 / (13 + 1.96^2)
    else:
        assert low < 0.5  # five speakers: nothing is known of a sixth
    widths = [pair[1] - pair[0] for pair in result.intervals.values() if pair is not None]
    assert len(widths) == 5 and min(widths) > 0.2
    for row in result.per_class:
        assert all(pair is None or pair[1] - pair[0] > 0.3 for pair in row.intervals.values())


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_average_precision_of_six_clips_has_a_width(value):
    targets = np.array([[1], [1], [1], [1], [1], [1], [0], [0]], np.float32)
    logits = 10 * (targets if value else 1 - targets)
    result = compute_metrics(logits, targets, classes=["a"], multi_label=True)
    low, high = result.intervals["mean_ap"]
    assert high - low > 0.3 and low <= result.mean_ap <= high
    assert result.per_class[0].intervals["average_precision"] == pytest.approx((low, high))


def test_clips_of_one_group_have_no_interval():
    _, logits, targets = single(30, 3)
    result = compute_metrics(
        logits, targets, classes=names(3), multi_label=False, groups=["one"] * 30
    )
    assert set(result.intervals.values()) == {None}
    assert any("all 30 clips are of one group" in note for note in result.notes)
    assert result.headline[0] == "accuracy" and result.headline[2:] == (None, None)


def test_mean_ap_of_too_few_clips_has_no_interval():
    _, logits, targets = single(10, 5, labels=np.arange(10) % 5)
    result = compute_metrics(logits, targets, classes=names(5), multi_label=False)
    assert result.mean_ap is not None and result.intervals["mean_ap"] is None
    assert any("no interval of mAP: the classes have 2.0 clips" in note for note in result.notes)


def test_metrics_of_a_source_are_over_its_groups():
    _, logits, targets = single(24, 3)
    clips = [Clip(str(i), (int(c),), None) for i, c in enumerate(targets.argmax(1))]
    spoken = [dataclasses.replace(clip, group=f"speaker {i % 4}") for i, clip in enumerate(clips)]
    plain, grouped = (
        measure_metrics(logits, Source(part, names(3), name="spoken")) for part in (clips, spoken)
    )
    assert (plain.groups, grouped.groups) == (None, 4)
    assert grouped.intervals["accuracy"] != plain.intervals["accuracy"]
    assert grouped.accuracy == plain.accuracy


def test_four_hundred_clips_take_less_than_two_seconds():
    _, logits, targets = single(400, 50)
    start = time.perf_counter()
    compute_metrics(logits, targets, classes=names(50), multi_label=False)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    "labels", [[0, 0, 1, 1, 1], [0, 0, 0], [2], [1, 2]], ids=["absent", "one", "1 clip", "2 clips"]
)
@pytest.mark.parametrize("multi_label", [False, True])
def test_b15_small_sets_are_defined_or_none(labels, multi_label):
    _, logits, targets = single(len(labels), 3, labels=labels)
    result = compute_metrics(logits, targets, classes=names(3), multi_label=multi_label)
    text = json.dumps(result.to_json(), allow_nan=False)
    assert json.loads(text)["clips"] == len(labels)
    name, value, low, high = result.headline
    if multi_label and len(set(labels)) == 1:
        assert value is low is high is None  # no clip without the class
        return
    assert value is not None and 0 <= value <= 1
    enough = not multi_label  # mAP needs three clips per class
    assert (low is not None) == enough == (high is not None)
    assert not enough or (low <= value <= high and high - low > 0.1)
    absent = sorted(set(range(3)) - set(labels))
    for c in absent:
        row = result.per_class[c]
        assert (row.support, row.recall, row.f1, row.average_precision) == (0, None, None, None)
    verb = "has" if len(absent) == 1 else "have"
    assert any(f"{len(absent)} of 3 classes {verb} no clip" in note for note in result.notes)
    assert name in result.table() and "n/a" in result.table() and "nan" not in result.table()


def test_b15_absent_classes_do_not_enter_the_means():
    labels, logits, targets = single(40, 5, labels=np.arange(40) % 4)
    result = compute_metrics(logits, targets, classes=names(5), multi_label=False)
    guess, scores = logits.argmax(1), special.softmax(logits, 1)
    present = range(4)
    f1 = sk.f1_score(labels, guess, labels=list(present), average="macro")
    assert result.macro_f1 == pytest.approx(f1)
    ap = [sk.average_precision_score(labels == c, scores[:, c]) for c in present]
    assert result.mean_ap == pytest.approx(np.mean(ap), rel=1e-5)


def test_b15_one_class_and_many_classes():
    one = np.ones((4, 1), np.float32)
    result = compute_metrics(one, one, classes=["a"], multi_label=False)
    assert (result.accuracy, result.macro_auc, result.d_prime) == (1, None, None)
    assert any("one class only" in note for note in result.notes)

    labels, logits, targets = single(300, 5000, signal=6)
    result = compute_metrics(logits, targets, classes=names(5000), multi_label=False)
    assert result.accuracy == pytest.approx((logits.argmax(1) == labels).mean())
    assert result.confusion is None
    assert "... and 4990 more classes" in result.table(10)
    json.dumps(result.to_json(), allow_nan=False)


def test_b15_multi_label_clips_without_any_label():
    zeros = np.zeros((3, 2), np.float32)
    result = compute_metrics(zeros, zeros, classes=["a", "b"], multi_label=True)
    assert result.headline == ("mAP", None, None, None)
    assert result.accuracy is None
    json.dumps(result.to_json(), allow_nan=False)


def test_a_perfect_ranking_has_no_bounded_d_prime():
    targets = np.eye(3, dtype=np.float32)[[0, 1, 2, 0, 1, 2]]
    result = compute_metrics(9 * targets, targets, classes=names(3), multi_label=False)
    assert (result.macro_auc, result.d_prime, result.intervals["d_prime"]) == (1, None, None)
    assert any("d-prime" in note for note in result.notes)


def test_b16_labels_that_do_not_fit_the_task():
    logits = np.zeros((3, 3), np.float32)
    targets = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0]], np.float32)
    with pytest.raises(UsageError, match=r"2 of 3 .* first row 1 with 2; set multi_label=True"):
        compute_metrics(logits, targets, classes=names(3), multi_label=False)
    assert compute_metrics(logits, targets, classes=names(3), multi_label=True).clips == 3
    one_hot = np.eye(3, dtype=np.float32)
    result = compute_metrics(logits, one_hot, classes=names(3), multi_label=True)
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
    with pytest.raises(DataError, match="no clips"):
        compute_metrics(logits[:0], targets[:0], **call)
    broken = logits.copy()
    broken[1, 2] = np.nan
    with pytest.raises(NotFiniteError, match=r"1 of 3 clips .* first row 1"):
        compute_metrics(broken, targets, **call)


def test_mean_interval():
    values = [0.91, 0.88, 0.93, 0.9, 0.86]
    mean, low, high = mean_interval(values)
    known = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (mean, low, high) == pytest.approx((np.mean(values), known.low, known.high))
    # Two values: half their distance, times 12.7062 of one degree of freedom.
    assert mean_interval([0.0, 2.0])[2] == pytest.approx(1 + 12.7062, abs=1e-4)
    assert mean_interval([0.7]) == (0.7, None, None)
    assert mean_interval([0.7, 0.7]) == (0.7, None, None)  # equal values show no spread
    for wrong in ([], [0.5, float("nan")]):
        with pytest.raises(UsageError, match="not defined"):
            mean_interval(wrong)
    with pytest.raises(UsageError, match="interval"):
        mean_interval(values, 1.0)
