"""Labels that look wrong: what a frozen backbone hears against what the label says.

Every clip becomes one vector: the class tokens and the mean patch of the frozen backbone, each as
mean and standard deviation over up to five windows of the clip. A logistic regression is
cross-validated on them with all clips of one recording, and all copies of one sound, in the same
fold. As in confident learning (Northcutt, Jiang and Chuang, JAIR 2021) a class has a threshold,
the mean confidence of its own clips; a clip is suspect if its confidence in its label is below
that of the label, that in another class reaches the other's, and the two are `MARGIN` apart.

The list is to be listened to, not to be deleted: it is as good as the backbone hears, which
`LabelCheck.agreement` tells.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, Int16

from aatjax.data.source import Source
from aatjax.doctor.findings import Finding, Item, LabelCheck

FEWEST_CLIPS = 20
FEWEST_OF_CLASS = 3
FOLDS, ROUNDS = 5, 2
MARGIN = 0.5
STRENGTH = 0.02  # inverse regularisation of the regression, on standardised vectors
BATCH = 16
MOST_WINDOWS = 5


class Ear:
    """The frozen backbone: windows of clips in, one vector a window out, in full batches.

    Args:
        base: anything `aatjax.load` takes.
        frames: input length; None takes that of the weights.
    """

    def __init__(self, base: str, frames: int | None) -> None:
        import jax
        import jax.numpy as jnp
        from flax import nnx

        from aatjax.convert.load import front_end_of, load

        model = load(base, num_classes=2, frames=frames)
        self.frontend = front_end_of(model)
        graph, state = nnx.split(model)

        def embed(state: nnx.State, audio: jax.Array, length: jax.Array) -> jax.Array:
            whole = nnx.merge(graph, state, copy=True)
            tokens = whole.tokens(self.frontend(audio, length))
            mask = whole.embed.mask(self.frontend.count_frames(length))
            first = whole.config.num_prefix
            patches = tokens[:, first:].mean(axis=1, where=mask[:, first:, None])
            return jnp.concatenate([tokens[:, :first].mean(axis=1), patches], axis=1)

        compiled = jax.jit(embed)
        self._embed = lambda audio, length: np.asarray(compiled(state, audio, length))
        self._waiting: list[tuple[int, np.ndarray, int]] = []
        self._heard: dict[int, list[np.ndarray]] = {}

    def cut(self, samples: Int16[np.ndarray, " s"]) -> list[tuple[np.ndarray, int]]:
        """Up to five windows spread over a clip, fitted to the model's input."""
        size = self.frontend.samples
        count = max(1, min(MOST_WINDOWS, -(-samples.size // size)))
        starts = np.linspace(0, max(0, samples.size - size), count).astype(int)
        return [self.frontend.fit(samples, start=int(start)) for start in starts]

    def hear(self, index: int, windows: list[tuple[np.ndarray, int]]) -> None:
        """Takes the windows of a clip; runs the model whenever a batch is full."""
        self._waiting += [(index, audio, length) for audio, length in windows]
        while len(self._waiting) >= BATCH:
            self._run()

    def vectors(self) -> dict[int, Float[np.ndarray, " d"]]:
        """Of every clip that was heard: mean and standard deviation over its windows."""
        while self._waiting:
            self._run()
        return {
            i: np.concatenate([np.mean(rows, axis=0), np.std(rows, axis=0)])
            for i, rows in self._heard.items()
        }

    def _run(self) -> None:
        group, self._waiting = self._waiting[:BATCH], self._waiting[BATCH:]
        full = group + [group[-1]] * (BATCH - len(group))
        audio = np.stack([samples for _, samples, _ in full])
        length = np.array([valid for *_, valid in full], np.int32)
        for (index, *_), row in zip(group, self._embed(audio, length), strict=False):
            self._heard.setdefault(index, []).append(row)


def unfit(source: Source) -> str:
    """Why the labels of a set cannot be judged, or nothing."""
    if source.multi_label:
        return "clips have several labels, which is not done"
    if len(source) < FEWEST_CLIPS:
        return f"{len(source)} clips are too few, {FEWEST_CLIPS} are needed"
    counts = Counter(clip.label[0] for clip in source.clips)
    if sum(n >= FEWEST_OF_CLASS for n in counts.values()) < 2:
        return f"fewer than two classes have {FEWEST_OF_CLASS} clips"
    return ""


def find_wrong_labels(
    source: Source,
    vectors: dict[int, Float[np.ndarray, " d"]],
    same: Iterable[tuple[int, int]],
    base: str,
) -> tuple[LabelCheck, list[Finding]]:
    """Clips of a single-label set whose label looks wrong, the surest first.

    Args:
        source: the clips.
        vectors: from `Ear.vectors`, of the clips that can be read.
        same: pairs of clips that hold the same sound.
        base: the weights they are from, for the report.
    """
    groups = _groups(source, same)
    held: dict[int, set[int]] = {}
    for i in vectors:
        held.setdefault(source.clips[i].label[0], set()).add(groups[i])
    counts = Counter(source.clips[i].label[0] for i in vectors)
    judged = sorted(c for c in counts if counts[c] >= FEWEST_OF_CLASS and len(held[c]) > 1)
    rows = [i for i in sorted(vectors) if source.clips[i].label[0] in judged]
    if len(judged) < 2 or len(rows) < FEWEST_CLIPS:
        why = f"{len(rows)} clips of {len(judged)} classes with several recordings are too few"
        return LabelCheck(False, why, base), []
    left = len(source.classes) - len(judged)
    label = np.array([judged.index(source.clips[i].label[0]) for i in rows])
    group = np.array([groups[i] for i in rows])
    confidence = cross_validate(np.stack([vectors[i] for i in rows]), label, group)
    suspect, other = confident(confidence, label)
    given = confidence[np.arange(len(rows)), label]
    margin = confidence[np.arange(len(rows)), other] - given
    items = [
        Item(
            source.clips[rows[k]].id,
            f"labelled {source.classes[judged[label[k]]]} ({given[k]:.2f}), sounds like "
            f"{source.classes[judged[other[k]]]} ({given[k] + margin[k]:.2f})",
            (source.clips[rows[k]].id,),
        )
        for k in sorted(np.flatnonzero(suspect).tolist(), key=lambda k: -margin[k])
    ]
    check = LabelCheck(
        True,
        f"{left} classes with fewer than {FEWEST_OF_CLASS} clips or one recording are left out"
        if left
        else "",
        base,
        len(rows),
        round(float(np.mean(confidence.argmax(axis=1) == label)), 6),
    )
    return check, [Finding("wrong-label", tuple(items))] if items else []


def cross_validate(
    vectors: Float[np.ndarray, "n d"], label: Int[np.ndarray, " n"], group: Int[np.ndarray, " n"]
) -> Float[np.ndarray, "n c"]:
    """Out-of-fold confidence in every class, the mean of `ROUNDS` divisions into folds."""
    from sklearn.linear_model import LogisticRegression

    total = np.zeros((len(label), int(label.max()) + 1))
    rng = np.random.default_rng(0)
    for _ in range(ROUNDS):
        fold = _folds(label, group, rng)
        for k in np.unique(fold):
            train, test = fold != k, fold == k
            known = np.unique(label[train])
            if known.size < 2:
                total[np.ix_(test, known)] += 1.0
                continue
            mean, spread = vectors[train].mean(axis=0), vectors[train].std(axis=0)
            scaled = (vectors - mean) / np.where(spread > 1e-6, spread, 1.0)
            fitted = LogisticRegression(C=STRENGTH, max_iter=200).fit(scaled[train], label[train])
            total[np.ix_(test, fitted.classes_)] += fitted.predict_proba(scaled[test])
    return total / ROUNDS


def confident(
    confidence: Float[np.ndarray, "n c"], label: Int[np.ndarray, " n"]
) -> tuple[Bool[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Which clips are suspect, and the class that each sounds like most."""
    rows = np.arange(len(label))
    threshold = np.array([confidence[label == c, c].mean() for c in range(confidence.shape[1])])
    given = confidence[rows, label]
    reaches = confidence >= threshold
    reaches[rows, label] = False
    other = np.where(reaches, confidence, -1.0).argmax(axis=1)
    margin = confidence[rows, other] - given
    return reaches.any(axis=1) & (given < threshold[label]) & (margin >= MARGIN), other


def _groups(source: Source, same: Iterable[tuple[int, int]]) -> list[int]:
    """A number for each clip, the same for one recording and for copies of one sound."""
    parent = list(range(len(source)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[str, int] = {}
    pairs = [
        (i, first.setdefault(clip.group, i))
        for i, clip in enumerate(source.clips)
        if clip.group is not None
    ]
    for i, j in [*pairs, *same]:
        parent[root(i)] = root(j)
    return [root(i) for i in range(len(source))]


def _folds(
    label: Int[np.ndarray, " n"], group: Int[np.ndarray, " n"], rng: np.random.Generator
) -> Int[np.ndarray, " n"]:
    """A fold for each clip: groups whole, the largest first, each class spread evenly."""
    members: dict[int, list[int]] = {}
    for i in rng.permutation(len(label)).tolist():
        members.setdefault(int(group[i]), []).append(i)
    load = np.zeros((int(label.max()) + 1, FOLDS))
    fold = np.zeros(len(label), int)
    units: Sequence[list[int]] = sorted(members.values(), key=lambda unit: -len(unit))
    for unit in units:
        classes = label[unit]
        k = int((load[classes].sum(axis=0) + 1e-3 * load.sum(axis=0)).argmin())
        fold[unit] = k
        load[:, k] += np.bincount(classes, minlength=len(load))
    return fold
