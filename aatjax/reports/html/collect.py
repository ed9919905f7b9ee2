"""The data of a report: files of a run, its adapter, and its predictions on labelled clips."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int16

from aatjax.analysis.flops import count_flops
from aatjax.audio.fbank import FRAME, HOP
from aatjax.audio.frontend import FrontEnd
from aatjax.config import Data
from aatjax.data.source import Source
from aatjax.errors import AatjaxError, DataError, UsageError
from aatjax.experiments.evaluate import load_test_clips
from aatjax.inference.calibration import (
    Calibration,
    apply_calibration,
    compute_probabilities,
    read_calibration,
)
from aatjax.io.json_file import read_json
from aatjax.models.ast import AST
from aatjax.models.summary import Summary, summary
from aatjax.petl import routing_weights
from aatjax.reports.routing_maps import RoutingMap, map_routing
from aatjax.train.adapter_file import TrainedAdapter, find_adapter, load_adapter
from aatjax.train.evaluation import score_clips
from aatjax.train.logging import METRICS, read_metrics
from aatjax.train.metrics.results import Metrics
from aatjax.train.run_dir import read_result

MOST_MISTAKES = 8
LONGEST = 4.0  # seconds of sound of a mistake


@dataclasses.dataclass(frozen=True)
class Mistake:
    """One clip with a wrong and confident prediction.

    Attributes:
        clip: name of the clip, and `path` of its file where it has one.
        predicted, truth: the prediction, and the labels, if any.
        probability: calibrated probability of the prediction.
        possible: the conformal set; None without decisions.
        samples: the beginning of the model's input.
        features: its log-mel, `[t, f]`.
        cut: whether the input is longer than that.
    """

    clip: str
    path: str | None
    predicted: str
    truth: tuple[str, ...]
    probability: float
    possible: tuple[str, ...] | None
    samples: Int16[np.ndarray, " s"]
    features: Float[np.ndarray, "t f"]
    cut: bool


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Predictions of the adapter on labelled clips.

    Attributes:
        source: the clips.
        own: whether they are the test part of the run itself.
        logits, targets: `[b, c]`.
        metrics: as of `aatjax eval`.
        mistakes: the most confident ones.
    """

    source: Source
    own: bool
    logits: Float[np.ndarray, "b c"]
    targets: Float[np.ndarray, "b c"]
    metrics: Metrics
    mistakes: list[Mistake]


@dataclasses.dataclass(frozen=True)
class ReportData:
    """Everything that a report shows.

    Attributes:
        path: the adapter file, and `size` in bytes.
        adapter: its content.
        decisions: calibration fitted on its validation clips, or None.
        evaluation: on labelled clips, or the reason why there is none.
        routing: maps of its mixtures, or the reason why there is none; None without mixtures.
        result: result.json of the run, empty without.
        rows: metrics.jsonl of the run.
        findings: of diagnosis.json, or the reason why it could not be read.
        counts: trained and frozen parameters.
        flops: of the forward pass of one clip, or None where they cannot be counted.
        run: the run folder, if there is one.
    """

    path: Path
    size: int
    adapter: TrainedAdapter
    decisions: Calibration | None
    evaluation: Evaluation | str
    routing: RoutingMap | str | None
    result: dict[str, Any]
    rows: list[dict[str, Any]]
    findings: list[dict[str, Any]] | str
    counts: Summary
    flops: int | None
    run: Path | None

    @property
    def about(self) -> dict[str, Any]:
        """What must be reported of the training data."""
        about = self.result.get("data", self.adapter.info.get("about"))
        return about if isinstance(about, dict) else {}


def collect_report(
    path: Path,
    data: Data | None = None,
    *,
    base: str | None = None,
    begin: Callable[[], None] = lambda: None,
) -> ReportData:
    """Read a run folder or an adapter file, and evaluate the adapter.

    Args:
        path: a run folder, or an adapter file.
        data: labelled sounds; by default the run's own test part.
        base: the backbone's weights, where they have moved.
        begin: called when everything was opened, before the clips are decoded and scored.

    Raises:
        UsageError: the classes of the data are not the adapter's.
        DataError: a file is missing or damaged; the sounds have moved.
    """
    file, run = find_adapter(path)
    adapter = load_adapter(file, base=base)
    try:
        decisions = read_calibration(adapter.info, len(adapter.classes))
    except DataError as error:
        raise DataError(f"{file}: {error}") from error
    result: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    findings: list[dict[str, Any]] | str = []
    if run is not None:
        result = read_result(run) or {}
        rows = read_metrics(run / METRICS)
        findings = _read_findings(run / "diagnosis.json")
    source, reason = _open_clips(adapter, data, begin)
    begin()
    routing: RoutingMap | str | None = None
    if routing_weights.has_mixtures(adapter.model):
        routing = "not mapped: there are no labelled clips"
        if source is not None:
            routing = map_routing(adapter.model, source, adapter.frontend)
    return ReportData(
        path=file,
        size=file.stat().st_size,
        adapter=adapter,
        decisions=decisions,
        evaluation=_evaluate(adapter, source, decisions, data is None)
        if source is not None
        else reason,
        routing=routing,
        result=result,
        rows=rows,
        findings=findings,
        counts=summary(adapter.model),
        flops=_count_flops(adapter.model),
        run=run,
    )


def _open_clips(
    adapter: TrainedAdapter, data: Data | None, begin: Callable[[], None]
) -> tuple[Source | None, str]:
    """The labelled clips, or the reason why the adapter has none of its own."""
    try:
        return load_test_clips(adapter, data, begin=begin), ""
    except UsageError as error:
        if data is not None:
            raise
        return None, str(error)
    except DataError as error:
        if data is not None:
            raise
        raise DataError(f"{error}; name the labelled sounds (aatjax report RUN SOUNDS)") from error


def _read_findings(path: Path) -> list[dict[str, Any]] | str:
    if not path.is_file():
        return []
    try:
        content = read_json(path)
    except DataError as error:
        return str(error)
    found = content.get("findings") if isinstance(content, dict) else None
    if not isinstance(found, list):
        return f"{path}: has no list of findings"
    return [one for one in found if isinstance(one, dict)]


def _evaluate(
    adapter: TrainedAdapter, source: Source, decisions: Calibration | None, own: bool
) -> Evaluation:
    scores = score_clips(adapter, source)
    logits, source = scores.select()
    logits = np.asarray(logits, np.float64)
    targets = np.asarray(source.targets(), np.float64)
    return Evaluation(
        source=source,
        own=own,
        logits=logits,
        targets=targets,
        metrics=scores.measure(),
        mistakes=_find_mistakes(source, adapter.frontend, logits, targets, decisions),
    )


def _find_mistakes(
    source: Source,
    frontend: FrontEnd,
    logits: Float[np.ndarray, "b c"],
    targets: Float[np.ndarray, "b c"],
    decisions: Calibration | None,
) -> list[Mistake]:
    """The most confident wrong predictions, one per clip."""
    multi_label = source.multi_label
    temperature = 1.0 if decisions is None else decisions.temperature
    probabilities = compute_probabilities(logits, temperature, multi_label)
    if multi_label:
        positive = logits > 0
        wrong = (positive != (targets == 1)) & ~np.isnan(targets)
    else:
        positive = np.arange(logits.shape[1]) == logits.argmax(axis=1)[:, None]
        wrong = positive & (targets != 1)
    confidence = np.where(wrong, np.where(positive, probabilities, 1 - probabilities), -1.0)
    possible = None if decisions is None else apply_calibration(logits, decisions).possible
    found: list[Mistake] = []
    for row in map(int, np.argsort(-confidence.max(axis=1), kind="stable")[:MOST_MISTAKES]):
        c = int(confidence[row].argmax())
        if confidence[row, c] < 0:
            break
        clip = source.clips[row]
        predicted = source.classes[c]
        if multi_label:
            predicted += ": yes" if positive[row, c] else ": no"
        samples, features, cut = _read_input(source, frontend, row)
        found.append(
            Mistake(
                clip=clip.id,
                path=clip.path,
                predicted=predicted,
                truth=tuple(source.classes[c] for c in clip.label),
                probability=float(confidence[row, c]),
                possible=None
                if possible is None
                else _name_classes(source, possible[row], probabilities[row]),
                samples=samples,
                features=features,
                cut=cut,
            )
        )
    return found


def _name_classes(
    source: Source, mask: Bool[np.ndarray, " c"], probabilities: Float[np.ndarray, " c"]
) -> tuple[str, ...]:
    """The classes of a mask, the most probable first."""
    return tuple(source.classes[c] for c in np.argsort(-probabilities) if mask[c])


def _read_input(
    source: Source, frontend: FrontEnd, row: int
) -> tuple[Int16[np.ndarray, " s"], Float[np.ndarray, "t f"], bool]:
    """The beginning of the model's input for a clip: samples, log-mel, whether there is more."""
    audio, length = frontend.fit(source.waveform(row))
    most = round(LONGEST * frontend.rate)
    frames = min(int(frontend.count_frames(jnp.asarray([length]))[0]), 1 + (most - FRAME) // HOP)
    features = frontend.features(jnp.asarray(audio[None]), jnp.asarray([length]))[0]
    return audio[: min(length, most)], np.asarray(features)[: max(1, frames)], length > most


def _count_flops(model: AST) -> int | None:
    config = model.config
    graphdef, state = nnx.split(model)
    x = jnp.zeros((1, config.frames, config.mels), jnp.float32)
    try:
        return count_flops(lambda state, x: nnx.merge(graphdef, state, copy=True)(x), state, x)
    except AatjaxError:
        return None
