"""Search for wrong labels: predictions from a frozen backbone against the labels.

Every clip becomes one vector: the class tokens and the mean patch of the frozen backbone, each as
mean and standard deviation over up to five windows of the clip. A ridge regression predicts each
clip from the others, without those of its recording and copies of its sound. As in confident
learning (Northcutt, Jiang and Chuang, JAIR 2021) a class has a threshold, the mean confidence of
its own clips; a clip is suspect if its confidence in its label is below that of the label, that in
another class reaches the other's, and the two are `MARGIN` apart.

The suspects are to be listened to, not deleted: the search is only as good as the embeddings. How
good, is measured on the set itself: the labels of `PLANTED` of the clips are changed at random and
searched for in the same way. Where fewer than `LEAST_PRECISION` of the clips that this lists are
changed ones, the embeddings do not separate the classes, and no list is given.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int16
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.special import softmax

from aatjax.audio.frontend import FrontEnd
from aatjax.convert.load import load, make_front_end
from aatjax.data.source import Progress, Source
from aatjax.doctor.clip_checks import is_usable
from aatjax.doctor.findings import ClipMeasurements, Finding, Item, LabelCheck
from aatjax.io.threads import map_threads
from aatjax.models.ast import AST
from aatjax.train.forward import bind_forward
from aatjax.train.ridge import find_logit_scale, fit_ridge

FEWEST_CLIPS = 20
FEWEST_PER_CLASS = 3
MARGIN = 0.5
PLANTED = 0.05
FEWEST_PLANTED, MOST_DRAWS = 100, 10
LEAST_PRECISION = 0.15
BATCH = 16
MOST_WINDOWS = 5


class ClipEmbedder:
    """Embeds windows of clips by the frozen backbone, in full batches.

    Args:
        base: anything `aatjax.load` takes.
        frames: input length; None takes that of the weights.
    """

    def __init__(self, base: str, frames: int | None) -> None:
        model = load(base, num_classes=2, frames=frames)
        self.frontend: FrontEnd = make_front_end(model)
        self._embed = bind_forward(model, self.frontend, read_embedding)
        self._waiting: list[tuple[int, np.ndarray, int]] = []
        self._embedded: dict[int, list[np.ndarray]] = {}

    def cut_windows(self, samples: Int16[np.ndarray, " s"]) -> list[tuple[np.ndarray, int]]:
        """Cut up to five windows spread over a clip, fitted to the model's input."""
        size = self.frontend.samples
        count = max(1, min(MOST_WINDOWS, -(-samples.size // size)))
        starts = np.linspace(0, max(0, samples.size - size), count).astype(int)
        return [self.frontend.fit(samples, start=int(start)) for start in starts]

    def add(self, index: int, windows: list[tuple[np.ndarray, int]]) -> None:
        """Add the windows of a clip; runs the model whenever a batch is full."""
        self._waiting += [(index, audio, length) for audio, length in windows]
        while len(self._waiting) >= BATCH:
            self._run()

    def finish(self) -> dict[int, Float[np.ndarray, " d"]]:
        """Return the vector of every clip: mean and standard deviation over its windows."""
        while self._waiting:
            self._run()
        return {
            i: np.concatenate([np.mean(rows, axis=0), np.std(rows, axis=0)])
            for i, rows in self._embedded.items()
        }

    def _run(self) -> None:
        group, self._waiting = self._waiting[:BATCH], self._waiting[BATCH:]
        full = group + [group[-1]] * (BATCH - len(group))
        audio = np.stack([samples for _, samples, _ in full])
        length = np.array([valid for *_, valid in full], np.int32)
        for (index, *_), row in zip(group, np.asarray(self._embed(audio, length)), strict=False):
            self._embedded.setdefault(index, []).append(row)


def read_embedding(
    model: AST, x: Float[Array, "b t f"], valid: Int[Array, " b"]
) -> Float[Array, "b d"]:
    """The mean class token beside the mean patch of the sounding frames."""
    tokens = model.tokens(x)
    mask = model.embed.mask(valid)
    first = model.config.num_prefix
    patches = tokens[:, first:].mean(axis=1, where=mask[:, first:, None])
    return jnp.concatenate([tokens[:, :first].mean(axis=1), patches], axis=1)


def embed_clips(
    source: Source,
    measurements: Sequence[ClipMeasurements],
    embedder: ClipEmbedder,
    threads: int,
    progress: Progress,
) -> dict[int, Float[np.ndarray, " d"]]:
    """Return the vector of every usable clip, by its index."""
    usable = [i for i, m in enumerate(measurements) if is_usable(m)]

    def cut(k: int) -> list[tuple[np.ndarray, int]]:
        return embedder.cut_windows(source.waveform(usable[k]))

    for done, windows in enumerate(map_threads(cut, len(usable), workers=threads), 1):
        embedder.add(usable[done - 1], windows)
        progress("embed", done, len(usable))
    return embedder.finish()


def explain_skip(source: Source) -> str:
    """Why the labels of a set cannot be checked; empty where they can."""
    if source.multi_label:
        return "clips with several labels are not supported"
    if len(source) < FEWEST_CLIPS:
        return f"{len(source)} clips are too few, {FEWEST_CLIPS} are needed"
    counts = Counter(clip.label[0] for clip in source.clips)
    if sum(n >= FEWEST_PER_CLASS for n in counts.values()) < 2:
        return f"fewer than two classes have {FEWEST_PER_CLASS} clips"
    return ""


def find_wrong_labels(
    source: Source,
    vectors: dict[int, Float[np.ndarray, " d"]],
    same: Iterable[tuple[int, int]],
    base: str,
) -> tuple[LabelCheck, list[Finding]]:
    """Find clips of a single-label set whose label is probably wrong, the most certain first.

    Args:
        source: the clips.
        vectors: from `ClipEmbedder.finish`, of the usable clips.
        same: pairs of clips with the same sound.
        base: the weights of the embeddings, for the report.
    """
    groups = _group_clips(source, same)
    labels = {i: source.clips[i].label[0] for i in sorted(vectors)}
    members: dict[int, set[int]] = {}
    for i, c in labels.items():
        members.setdefault(c, set()).add(groups[i])
    counts = Counter(labels.values())
    judged = sorted(c for c in counts if counts[c] >= FEWEST_PER_CLASS and len(members[c]) > 1)
    rows = [i for i, c in labels.items() if c in judged]
    if len(judged) < 2 or len(rows) < FEWEST_CLIPS:
        why = f"{len(rows)} clips of {len(judged)} classes with several recordings are too few"
        return LabelCheck(False, why, base), []
    label = np.array([judged.index(labels[i]) for i in rows])
    group = np.array([groups[i] for i in rows])
    draws = plant_wrong_labels(label)
    rows_of = np.stack([vectors[i] for i in rows])
    confidence, *planted = predict_held_out(rows_of, [label, *draws], group)
    suspect, other = find_suspects(confidence, label)
    agreement = round(float(np.mean(confidence.argmax(axis=1) == label)), 6)
    check = LabelCheck(True, "", base, len(rows), agreement)
    omitted = len(source.classes) - len(judged)
    if omitted:
        omits = f"with fewer than {FEWEST_PER_CLASS} clips or one recording"
        check = replace(check, why=f"{omitted} classes {omits} are omitted")
    precision, recall = estimate_scores(label, draws, planted)
    check = replace(check, precision=precision, recall=recall)
    if precision < LEAST_PRECISION:
        why = (
            f"{base} embeddings predict {100 * agreement:.0f} % of the labels; with "
            f"{100 * PLANTED:.0f} % of the labels changed on purpose, {100 * precision:.0f} % of "
            f"the clips listed are changed ones, and {100 * LEAST_PRECISION:.0f} % are needed; "
            "--base names other weights"
        )
        return replace(check, done=False, why=why), []
    given = confidence[np.arange(len(rows)), label]
    best = confidence[np.arange(len(rows)), other]

    def describe(k: int) -> Item:
        old, new = (source.classes[judged[c]] for c in (label[k], other[k]))
        id = source.clips[rows[k]].id
        return Item(id, f"labelled {old} ({given[k]:.2f}), resembles {new} ({best[k]:.2f})", (id,))

    order = sorted(np.flatnonzero(suspect).tolist(), key=lambda k: given[k] - best[k])
    return check, [Finding("wrong-label", tuple(map(describe, order)))] if order else []


def plant_wrong_labels(label: Int[np.ndarray, " n"]) -> list[Int[np.ndarray, " n"]]:
    """Return copies of the labels, `PLANTED` of which are changed at random."""
    rng = np.random.default_rng(0)
    classes, count = int(label.max()) + 1, max(1, round(PLANTED * len(label)))
    draws = []
    for _ in range(min(MOST_DRAWS, -(-FEWEST_PLANTED // count))):
        other, changed = label.copy(), rng.permutation(len(label))[:count]
        other[changed] += rng.integers(1, classes, count)
        draws.append(other % classes)
    return draws


def estimate_scores(
    label: Int[np.ndarray, " n"],
    draws: Sequence[Int[np.ndarray, " n"]],
    confidences: Sequence[Float[np.ndarray, "n c"]],
) -> tuple[float, float]:
    """Return precision and recall of the search for labels that were changed on purpose.

    Precision is a lower bound where labels are wrong already: those count as right.

    Args:
        label: the labels.
        draws: the same with some changed.
        confidences: of `predict_held_out` for each draw.
    """
    found = listed = planted = 0
    for other, confidence in zip(draws, confidences, strict=True):
        suspect, _ = find_suspects(confidence, other)
        found, listed = found + int(suspect[other != label].sum()), listed + int(suspect.sum())
        planted += int((other != label).sum())
    return round(found / max(1, listed), 6), round(found / planted, 6)


def predict_held_out(
    vectors: Float[np.ndarray, "n d"],
    labels: Sequence[Int[np.ndarray, " n"]],
    group: Int[np.ndarray, " n"],
) -> list[Float[np.ndarray, "n c"]]:
    """Return the confidence in every class by a ridge regression without the clip's group.

    Args:
        vectors: one row per clip.
        labels: classes of the clips from 0, in several versions, which share one decomposition.
        group: clips of one group are left out together.
    """
    classes = int(labels[0].max()) + 1
    targets = [np.eye(classes)[label] for label in labels]
    fitted = fit_ridge(
        vectors, np.concatenate(targets, axis=1), groups=group, tasks=[classes] * len(labels)
    )
    weights, confidences = np.ones(len(vectors)), []
    for outputs, target in zip(
        np.split(fitted.left_out, len(labels), axis=1), targets, strict=True
    ):
        scale, _ = find_logit_scale(outputs, target, weights, multi_label=False)
        confidences.append(softmax(scale * outputs, axis=1))
    return confidences


def find_suspects(
    confidence: Float[np.ndarray, "n c"], label: Int[np.ndarray, " n"]
) -> tuple[Bool[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Which clips are suspect, and the most probable other class of each."""
    rows = np.arange(len(label))
    threshold = np.array([confidence[label == c, c].mean() for c in range(confidence.shape[1])])
    given = confidence[rows, label]
    reaches = confidence >= threshold
    reaches[rows, label] = False
    other = np.where(reaches, confidence, -1.0).argmax(axis=1)
    margin = confidence[rows, other] - given
    return reaches.any(axis=1) & (given < threshold[label]) & (margin >= MARGIN), other


def _group_clips(source: Source, same: Iterable[tuple[int, int]]) -> Int[np.ndarray, " n"]:
    """A number for each clip, the same for one recording and for copies of one sound."""
    first: dict[str, int] = {}
    pairs = [
        (i, first.setdefault(clip.group, i))
        for i, clip in enumerate(source.clips)
        if clip.group is not None
    ]
    pairs += same
    rows, columns = np.array(pairs, int).reshape(-1, 2).T
    graph = coo_array((np.ones(len(pairs)), (rows, columns)), shape=(len(source),) * 2)
    return connected_components(graph, directed=False)[1]
