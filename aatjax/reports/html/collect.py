"""What a report is made of: the files of a run, the adapter, and what it says of labelled clips."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from aatjax.analysis import flops
from aatjax.audio.frontend import FrontEnd
from aatjax.config import Data
from aatjax.data.source import Source
from aatjax.errors import AatjaxError, DataError, UsageError
from aatjax.experiments import run as experiment
from aatjax.experiments.run_dir import read_json
from aatjax.inference.calibration import (
    Calibration,
    apply_calibration,
    compute_probabilities,
    read_calibration,
)
from aatjax.models.ast import AST
from aatjax.models.summary import Summary, summary
from aatjax.petl import routing_weights
from aatjax.reports.html.class_intervals import ClassIntervals, class_intervals
from aatjax.reports.routing_maps import Atlas, atlas
from aatjax.train.adapter_file import Adapter, load_adapter
from aatjax.train.evaluation import clip_logits, measure
from aatjax.train.logging import read_rows
from aatjax.train.metrics.evaluate import Metrics

ARTEFACT = "adapter.safetensors"
MOST_MISTAKES = 8
LONGEST = 4.0  # seconds of sound of a mistake


@dataclasses.dataclass(frozen=True)
class Mistake:
    """One clip that the adapter was most sure of and wrong about.

    Attributes:
        clip: name of the clip, and `path` of its file where it has one.
        said, truth: what the adapter says, and what the labels say.
        probability: calibrated probability of what is said, or of what was missed.
        possible: the conformal set; None without decisions.
        samples: the beginning of what the model heard.
        features: its log-mel, `[t, f]`.
        cut: whether the model heard more than that.
    """

    clip: str
    path: str | None
    said: str
    truth: str
    probability: float
    possible: tuple[str, ...] | None
    samples: np.ndarray
    features: np.ndarray
    cut: bool


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """What the adapter says of labelled clips.

    Attributes:
        source: the clips.
        own: whether they are the test part of the run itself.
        logits, targets: `[b, c]`.
        metrics: what `aatjax eval` says.
        intervals: of the figures of each class.
        mistakes: the most confident ones.
    """

    source: Source
    own: bool
    logits: np.ndarray
    targets: np.ndarray
    metrics: Metrics
    intervals: list[ClassIntervals]
    mistakes: list[Mistake]


@dataclasses.dataclass(frozen=True)
class Evidence:
    """Everything that a report tells.

    Attributes:
        path: the adapter file, and `size` in bytes.
        adapter: what is in it.
        decisions: what its validation clips told, or None.
        evaluated: what it says of labelled clips, or the reason why there are none.
        atlas: of its mixtures, or the reason why there is none.
        result: result.json of the run, empty without.
        rows: metrics.jsonl of the run.
        findings: of diagnosis.json, or the reason why it could not be read.
        counts: trained and frozen parameters.
        flops: of one clip forward, or None where they cannot be counted.
        run: the run folder, if there is one.
    """

    path: Path
    size: int
    adapter: Adapter
    decisions: Calibration | None
    evaluated: Evaluated | str
    atlas: Atlas | str
    result: dict[str, Any]
    rows: list[dict[str, Any]]
    findings: list[dict[str, Any]] | str
    counts: Summary
    flops: int | None
    run: Path | None

    @property
    def about(self) -> dict[str, Any]:
        """What a report must tell of the data that it was trained on."""
        about = self.result.get("data", self.adapter.info.get("about"))
        return about if isinstance(about, dict) else {}


def find_adapter(path: Path) -> tuple[Path, Path | None]:
    """The adapter file, and the run folder where it lies in one.

    Raises:
        DataError: there is none.
    """
    if path.is_dir():
        if (path / ARTEFACT).is_file():
            return path / ARTEFACT, path
        inside = sorted(one.parent.name for one in path.glob(f"*/{ARTEFACT}"))
        hint = f"; there are {', '.join(inside[:6])} in it: name one" if inside else ""
        raise DataError(f"{path}: has no {ARTEFACT}: the run has not finished{hint}")
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    here = path.name == ARTEFACT and (path.parent / "result.json").is_file()
    return path, path.parent if here else None


def gather(path: Path, data: Data | None = None, *, base: str | None = None) -> Evidence:
    """Reads a run folder or an adapter file, and evaluates it.

    Args:
        path: a run folder, or an adapter file.
        data: labelled sounds; by default the run's own test part.
        base: the backbone's weights, where they have moved.

    Raises:
        UsageError: the classes of the data are not the adapter's.
        DataError: a file is missing or damaged; the sounds are not where they were.
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
        found = read_json(run / "result.json") if (run / "result.json").is_file() else {}
        result = found if isinstance(found, dict) else {}
        rows = [row for row in read_rows(run / "metrics.jsonl") if isinstance(row, dict)]
        findings = _findings(run / "diagnosis.json")
    try:
        source: Source | None = experiment.labelled_clips(adapter, data)
        reason = ""
    except UsageError as error:
        if data is not None:
            raise
        source, reason = None, str(error)
    except DataError as error:
        if data is not None:
            raise
        raise DataError(f"{error}; name the labelled sounds with --clips") from error
    drawn: Atlas | str = "the method has no mixture of adapters"
    if routing_weights.has_mixtures(adapter.model):
        drawn = "there are no clips to draw it on"
        if source is not None:
            drawn = atlas(adapter.model, source, adapter.frontend)
    return Evidence(
        path=file,
        size=file.stat().st_size,
        adapter=adapter,
        decisions=decisions,
        evaluated=reason
        if source is None
        else _evaluated(adapter, source, decisions, data is None),
        atlas=drawn,
        result=result,
        rows=rows,
        findings=findings,
        counts=summary(adapter.model),
        flops=_flops(adapter.model),
        run=run,
    )


def _findings(path: Path) -> list[dict[str, Any]] | str:
    if not path.is_file():
        return []
    try:
        told = read_json(path)
    except DataError as error:
        return str(error)
    found = told.get("findings") if isinstance(told, dict) else None
    if not isinstance(found, list):
        return f"{path}: has no list of findings"
    return [one for one in found if isinstance(one, dict)]


def _evaluated(
    adapter: Adapter, source: Source, decisions: Calibration | None, own: bool
) -> Evaluated:
    logits = np.asarray(clip_logits(adapter.model, source, adapter.frontend), np.float64)
    targets = np.asarray(source.targets(), np.float64)
    return Evaluated(
        source=source,
        own=own,
        logits=logits,
        targets=targets,
        metrics=measure(logits, source, 1000),
        intervals=class_intervals(logits, targets, multi_label=source.multi_label),
        mistakes=_mistakes(source, adapter.frontend, logits, targets, decisions),
    )


def _mistakes(
    source: Source,
    frontend: FrontEnd,
    logits: np.ndarray,
    targets: np.ndarray,
    decisions: Calibration | None,
) -> list[Mistake]:
    """The clips that the adapter is wrong about and surest of, each clip once."""
    many = source.multi_label
    temperature = 1.0 if decisions is None else decisions.temperature
    probabilities = compute_probabilities(logits, temperature, many)
    if many:
        guess = logits > 0
        wrong = (guess != (targets == 1)) & ~np.isnan(targets)
    else:
        guess = np.arange(logits.shape[1]) == logits.argmax(axis=1)[:, None]
        wrong = guess & (targets != 1)
    sure = np.where(wrong, np.where(guess, probabilities, 1 - probabilities), -1.0)
    possible = None if decisions is None else apply_calibration(logits, decisions).possible
    found: list[Mistake] = []
    for row in np.argsort(-sure.max(axis=1), kind="stable")[:MOST_MISTAKES]:
        c = int(sure[row].argmax())
        if sure[row, c] < 0:
            break
        clip = source.clips[int(row)]
        samples, features, cut = _heard(source, frontend, int(row))
        named = source.classes[c]
        said = named if not many else f"{named}: {'yes' if guess[row, c] else 'no'}"
        truth = ", ".join(source.classes[label] for label in clip.label) or "none of the classes"
        kept = None
        if possible is not None:
            kept = tuple(
                source.classes[i] for i in np.argsort(-probabilities[row]) if possible[row, i]
            )
        found.append(
            Mistake(
                clip.id, clip.path, said, truth, float(sure[row, c]), kept, samples, features, cut
            )
        )
    return found


def _heard(source: Source, frontend: FrontEnd, row: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """The beginning of what the model heard of a clip: samples, log-mel, whether there was more."""
    audio, length = frontend.fit(source.waveform(row))
    most = round(LONGEST * frontend.rate)
    frames = int(frontend.count_frames(jnp.asarray([length]))[0])
    shown = max(1, min(frames, 1 + max(0, most - 400) // 160))
    features = frontend.features(jnp.asarray(audio[None]), jnp.asarray([length]))[0]
    return audio[: min(length, most)], np.asarray(features)[:shown], length > most


def _flops(model: AST) -> int | None:
    config = model.config
    graphdef, state = nnx.split(model)
    x = jnp.zeros((1, config.frames, config.mels), jnp.float32)
    try:
        return flops.count(lambda state, x: nnx.merge(graphdef, state, copy=True)(x), state, x)
    except AatjaxError:
        return None
