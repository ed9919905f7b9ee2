"""Evaluating a model on labelled clips."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float

from aatjax import surgery
from aatjax.audio.frontend import FrontEnd
from aatjax.audio.scoring import Scoring, fit_sharpness
from aatjax.convert.load import make_front_end
from aatjax.data.batches import Batches
from aatjax.data.buckets import Bucket
from aatjax.data.clip_windows import ClipWindows, cut_clips
from aatjax.data.pipeline import Stored, make_eval_batches
from aatjax.data.source import Source, check_source
from aatjax.errors import DataError, format_count
from aatjax.io.progress import describe_compiling, report, track
from aatjax.io.root_logger import keep_root_logger
from aatjax.models.ast import AST, check_model
from aatjax.train.adapter_file import TrainedAdapter
from aatjax.train.forward import (
    Reader,
    check_fit,
    make_forward,
    read_embedding,
    read_logits,
    split_model,
)
from aatjax.train.log_mel_cache import LogMelCache
from aatjax.train.metrics.evaluate import compute_metrics
from aatjax.train.metrics.results import Metrics
from aatjax.train.prefix_cache import PrefixCache
from aatjax.train.sharding import (
    MeshShape,
    choose_devices,
    count_batch_shards,
    fetch,
    find_local_rows,
    place_arrays,
    put_batch,
)
from aatjax.train.state import cast_frozen

Weights = tuple[Any, Any]
"""Trainable parameters and batch statistics."""


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Computes the logits of whole sources; used under `jax.set_mesh(mesh)`.

    Attributes:
        forward: the compiled forward pass, see `make_forward`.
        frozen: the frozen parameters, on the devices.
        frontend: log-mel front end.
        mesh: the devices.
        batch_size: clips per batch, at least.
        stored: what batches hold in place of the sounds, if anything.
    """

    forward: Any
    frozen: Any
    frontend: FrontEnd
    mesh: Mesh
    batch_size: int
    stored: PrefixCache | LogMelCache | None = None

    @property
    def batch(self) -> int:
        """Clips per batch: a multiple of the devices, as the last batch is padded anyway."""
        shards = count_batch_shards(self.mesh)
        return -(-self.batch_size // shards) * shards

    def predict(
        self,
        weights: Weights,
        source: Source,
        *,
        buckets: Sequence[Bucket] = (),
        stopped: Callable[[], bool] = lambda: False,
    ) -> Float[np.ndarray, "n c"] | None:
        """Return the logits `[w, c]` of every window in order, or None once `stopped()`."""
        logits = np.zeros((len(source), len(source.classes)), np.float32)
        for bucket in buckets or [Bucket(self.frontend, np.arange(len(source)))]:
            clips = source.subset(bucket.rows) if buckets else source
            found = self.read(weights, clips, bucket.frontend, stopped)
            if found is None:
                return None
            logits[bucket.rows] = found
        return logits

    def load_stored(self, source: Source) -> Stored | None:
        """Return what is stored of a source's clips where batches hold such."""
        return None if self.stored is None else self.stored.load(source)

    def read(
        self,
        weights: Weights,
        clips: Source,
        frontend: FrontEnd | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> np.ndarray | None:
        """Return what `forward` computes of every clip in order, or None once `stopped()`."""
        batches = make_eval_batches(
            clips,
            frontend or self.frontend,
            batch_size=self.batch,
            rows=find_local_rows(self.mesh, self.batch),
            stored=self.load_stored(clips),
        )
        parts: list[np.ndarray] = []
        waiting: jax.Array | None = None
        report(describe_compiling())
        for host in track(batches, "evaluate", len(clips), self.batch):
            if stopped():
                return None
            rows = {name: host[name] for name in ("audio", "length")}
            batch = put_batch(rows, self.mesh, self.batch)
            found = self.forward((*weights, self.frozen), batch["audio"], batch["length"])
            if waiting is not None:  # the next batch is on its way to the devices by now
                parts.append(fetch(waiting))
            waiting = found
        if waiting is not None:
            parts.append(fetch(waiting))
        return np.concatenate(parts)[: len(clips)]


def evaluate(
    model: AST | TrainedAdapter,
    source: Source,
    frontend: FrontEnd | None = None,
    *,
    batch_size: int = 64,
    scoring: Scoring | None = None,
) -> Metrics:
    """Return the metrics of a model on labelled clips, each with the score of all its windows.

    Args:
        model: a loaded adapter, or an AST. The classes of `source` are matched by name to those of
            an adapter, and to the labels of an AST that has all of them; else they are the outputs
            of its head in their order.
        source: labelled clips.
        frontend: the front end that the model was trained with; by default the adapter's, or AST's
            at its length.
        batch_size: windows per batch.
        scoring: how a clip's windows are pooled, by default as the adapter says, or their mean.

    Raises:
        UsageError: the number of classes differs, or an adapter does not have one of them.
        DataError: no clip holds any sound.
    """
    scores = score_clips(model, source, frontend, batch_size=batch_size, scoring=scoring)
    return scores.measure()


@dataclasses.dataclass(frozen=True)
class ScoredClips:
    """The scores of the clips of a source.

    Attributes:
        source: the clips.
        logits: of each clip `[n, c]`, see `Scoring`; NaN where it has no score.
        scored: whether it has one: silent clips and those shorter than a frame have none.
        used: share of the sound that lies in the windows that were scored.
    """

    source: Source
    logits: Float[np.ndarray, "n c"]
    scored: Bool[np.ndarray, " n"]
    used: float

    @classmethod
    def from_windows(
        cls, cut: ClipWindows, logits: Float[np.ndarray, "w c"], scoring: Scoring
    ) -> "ScoredClips":
        """Pool the logits of windows."""
        return cls(cut.clips, cut.pool(logits, scoring), cut.scored, cut.measure_used(scoring))

    def select(self) -> tuple[Float[np.ndarray, "m c"], Source]:
        """Return the logits of the clips that have a score, and those clips.

        Raises:
            DataError: none has.
        """
        if self.scored.all():
            return self.logits, self.source
        if not self.scored.any():
            raise DataError(
                f"{self.source.name}: none of {len(self.source):,} holds sound: nothing to evaluate"
            )
        return self.logits[self.scored], self.source.subset(np.flatnonzero(self.scored))

    def measure(self) -> Metrics:
        """Return the metrics of the clips that have a score; the others are in the notes.

        Raises:
            DataError: none has.
        """
        metrics = measure_metrics(*self.select())
        return dataclasses.replace(metrics, notes=(*metrics.notes, *self.describe()))

    def describe(self) -> tuple[str, ...]:
        """Return what to state beside figures: clips without a score, sound that was not used."""
        notes = []
        if missing := int((~self.scored).sum()):
            noun = "is" if missing == 1 else "are"
            notes.append(
                f"{format_count(missing, 'clip')} of {len(self.source)} {noun} silent, or 25 ms "
                "or less, and not counted"
            )
        if self.used < LEAST_USED:
            notes.append(f"{self.used:.0%} of the sound was used: the rest lies in no window")
        return tuple(notes)


@keep_root_logger()
def score_clips(
    model: AST | TrainedAdapter,
    source: Source,
    frontend: FrontEnd | None = None,
    *,
    batch_size: int = 64,
    scoring: Scoring | None = None,
) -> ScoredClips:
    """Return the scores of every clip in order; arguments as for `evaluate`."""
    check_source(source, "evaluate: source")
    if isinstance(model, TrainedAdapter):
        frontend, scoring = frontend or model.frontend, scoring or model.scoring
        source = source.with_classes(model.classes, "the adapter", multi_label=model.multi_label)
        model = model.model
    check_model(model, "evaluate")
    if model.labels is not None and set(source.classes) <= set(model.labels):
        source = source.with_classes(model.labels, "the model")
    frontend, scoring = frontend or make_front_end(model), scoring or Scoring()
    check_sources(model, [source], frontend)
    cut = cut_clips(source, frontend, scoring)
    logits = _run_clips(model, cut.windows, frontend, batch_size, read_logits)
    return ScoredClips.from_windows(cut, logits, scoring)


class Embeddings(NamedTuple):
    """One vector per clip, for a classifier or a plot.

    Attributes:
        matrix: `[n, d]`, the mean over the patch tokens after the last LayerNorm, and over the
            windows of a clip, weighted by their length.
        labels: class index `[n]`; of a multi-label source `[n, c]`, see `Source.targets`.
        ids: names of the clips.
    """

    matrix: Float[np.ndarray, "n d"]
    labels: np.ndarray
    ids: tuple[str, ...]


@keep_root_logger()
def embed(
    model: AST | TrainedAdapter,
    source: Source,
    frontend: FrontEnd | None = None,
    *,
    batch_size: int = 64,
) -> Embeddings:
    """Return a vector per clip with its label and name, in the source's order.

    Args:
        model: a loaded adapter, or an AST, adapted or not; its head is not used.
        source: labelled clips of any classes.
        frontend: the front end that the model was trained with; by default the adapter's, or AST's
            at its length.
        batch_size: clips per batch.

    Raises:
        UsageError: the front end does not fit the model.
    """
    if isinstance(model, TrainedAdapter):
        frontend, model = frontend or model.frontend, model.model
    check_model(model, "embed")
    check_source(source, "embed: source")
    frontend = frontend or make_front_end(model)
    check_fit(model.config, model.config.num_classes, frontend)
    labels = source.targets() if source.multi_label else source.labels()
    cut = cut_clips(source, frontend, Scoring())
    vectors = _run_clips(model, cut.windows, frontend, batch_size, read_embedding)
    matrix = cut.average(vectors)
    return Embeddings(matrix, labels, tuple(clip.id for clip in source.clips))


def _run_clips(
    model: AST, source: Source, frontend: FrontEnd, batch_size: int, read: Reader
) -> np.ndarray:
    """Return what `read` computes of every clip in order, on the devices of this process."""
    devices = choose_devices(batch_size, surgery.count_bytes(model), jax.local_devices())
    mesh = MeshShape().make(devices)
    parts = split_model(model)
    state = (parts.trainable, parts.stats, cast_frozen(parts.frozen, model.config.dtype))
    with jax.set_mesh(mesh):
        *weights, frozen = place_arrays(state, mesh)
        forward = make_forward(parts.graphdef, frontend, read)
        evaluator = Evaluator(forward, frozen, frontend, mesh, batch_size)
        found = evaluator.read((weights[0], weights[1]), source)
    assert found is not None
    return found


def measure_metrics(logits: Float[np.ndarray, "n c"], source: Source) -> Metrics:
    """Return the metrics of the logits of a source's clips, with intervals over their groups."""
    return compute_metrics(
        logits,
        source.targets(),
        classes=source.classes,
        multi_label=source.multi_label,
        groups=[clip.group for clip in source.clips],
    )


LEAST_USED = 0.995  # share of the sound from which on it is not stated


def learn_sharpness(
    cut: ClipWindows, logits: Float[np.ndarray, "w c"], scoring: Scoring
) -> Scoring:
    """Return the scoring with the sharpness that fits labelled clips, from their windows."""
    source = cut.clips
    return fit_sharpness(scoring, cut.list_logits(logits), source.targets(), source.multi_label)


def check_sources(model: AST, sources: Sequence[Source | Batches], frontend: FrontEnd) -> None:
    """Refuse sources and a front end that do not fit the model's head and input."""
    for source in sources:
        check_fit(model.config, len(source.classes), frontend, source.name)
