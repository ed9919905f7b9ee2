"""Settings for a set of sounds, chosen by the rules of `aatjax adapt`."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from aatjax.audio.augment import Augment
from aatjax.config import Config, Data, Model
from aatjax.data.clip_windows import TrainWindows
from aatjax.data.source import Source
from aatjax.doctor.findings import Diagnosis
from aatjax.errors import format_count
from aatjax.petl import Method
from aatjax.petl.simple import Linear
from aatjax.petl.sizes import find_widths
from aatjax.petl.soft_moa import SoftMoA
from aatjax.train.loop import Training
from aatjax.train.metrics.results import Metrics
from aatjax.train.optim import Optim

FEW = 5  # clips per class below which only the head is trained
VALID_FROM = 12  # training clips of the rarest class from which validation clips are split off
STEPS = 600  # training steps aimed at
LEAST_FRAMES = 64
STRETCH = 1.5  # longest input, as a multiple of the base's own length


@dataclasses.dataclass(frozen=True)
class ChosenSetting:
    """One decision.

    Attributes:
        what: the field of the config, or several.
        value: the value, as text.
        why: the rule and the figures it was applied to.
    """

    what: str
    value: str
    why: str


Choose = Callable[[str, Any, str], Any]
"""Notes a setting, its value and the reason; returns the value."""


def choose_settings(
    source: Source,
    diagnosis: Diagnosis,
    *,
    path: str,
    format: str,
    pattern: str | None,
    base: str,
    base_shape: tuple[int, int],
) -> tuple[Config, list[ChosenSetting]]:
    """Return the config for a set of sounds, and the reasons.

    Args:
        source: the set, opened.
        diagnosis: from the doctor.
        path, format, pattern: how it was opened.
        base: the backbone's weights.
        base_shape: frames and width of the backbone.
    """
    settings: list[ChosenSetting] = []

    def choose(what: str, value: Any, why: str) -> Any:
        settings.append(ChosenSetting(what, str(value), why))
        return value

    longest, width = base_shape
    fields, rarest = _choose_division(source, choose)
    data = {"path": path, "format": format, "pattern": pattern, "statistics": "train", **fields}
    seconds = [m.seconds for m in diagnosis.measurements if m.seconds is not None]
    frames = _choose_length(seconds, longest, choose)
    method = _choose_method(rarest, width, choose)
    clips = int(len(source) * (1 - fields.get("test_fraction", 0.0)))
    training, data["windows"] = _choose_training(clips, seconds, frames, choose)
    rate = f"{method.choose_rate(width):g}"
    choose("optim.lr", rate, f"that of {method.name} on a model of width {width}")
    mixup = 0.5 if not source.multi_label and rarest >= FEW else 0.0
    augment = Augment(freq_mask=24, time_mask=min(48, frames // 5), mixup=mixup)
    choose(
        "augment",
        f"masks 24/{augment.time_mask}, mixup {augment.mixup:g}",
        f"SpecAugment; mixup from {FEW} clips per class",
    )
    choose("data.statistics", "train", "mean and deviation of the log-mel of the training clips")
    config = Config(
        name=f"adapt-{source.name}",
        petl=method,
        model=Model(source=base, frames=frames),
        data=Data(**data),
        training=training,
        optim=Optim(),
        augment=augment,
    )
    return config, settings


def _choose_training(
    clips: int, seconds: list[float], frames: int, choose: Choose
) -> tuple[Training, TrainWindows]:
    batch = choose(
        "training.batch_size",
        int(min(32, max(4, 2 ** int(np.log2(max(4, clips // 8)))))),
        f"an eighth of about {clips} training clips, 4 to 32",
    )
    per_epoch = max(1, -(-clips // batch))
    epochs = choose(
        "training.epochs",
        int(min(60, max(15, round(STEPS / per_epoch)))),
        f"about {STEPS} steps at {per_epoch} per epoch, 15 to 60 epochs",
    )
    cut = float(np.mean([s * 100 > frames for s in seconds])) if seconds else 0.0
    windows = choose(
        "data.windows",
        "random" if cut > 0.1 else "every",
        f"{cut:.0%} of the clips are longer than the input; random from 10 %",
    )
    return Training(epochs=epochs, batch_size=batch), windows


def _choose_division(source: Source, choose: Choose) -> tuple[dict[str, Any], int]:
    """Fields of the division, and the training clips of the rarest class under it."""
    counts = Counter(c for clip in source.clips for c in clip.label)
    rarest = min((counts.get(c, 0) for c in range(len(source.classes))), default=0)
    splits = {clip.split for clip in source.clips} - {None}
    if len(splits) > 1 and "train" in splits:
        choose("division", ", ".join(sorted(map(str, splits))), "the set's own parts")
        return {}, rarest
    grouped = sum(clip.group is not None for clip in source.clips)
    fields: dict[str, Any] = {"test_fraction": 0.2}
    if source.folds and len(source.folds) > 1:
        fields = {"fold": choose("data.fold", source.folds[-1], "the last fold is held out")}
        rarest = int(rarest * (1 - 1 / len(source.folds)))
    else:
        why = "a fifth, stratified by class"
        if grouped:
            why += f"; recordings or speakers (known for {grouped} clips) stay whole"
        choose("data.test_fraction", 0.2, why)
        rarest = int(rarest * 0.8)
    has = f"the rarest class has about {format_count(rarest, 'training clip')}"
    if rarest >= VALID_FROM:
        why = f"{has}; some of them calibrate the confidence"
        fields["valid_fraction"] = choose("data.valid_fraction", 0.15, why)
    else:
        why = f"none: {has}, {VALID_FROM} are needed; so confidence is not calibrated"
        choose("data.valid_fraction", 0.0, why)
    return fields, rarest


def _choose_length(seconds: list[float], longest: int, choose: Choose) -> int:
    wanted = int(np.ceil(100 * float(np.quantile(seconds, 0.95)))) if seconds else longest
    most = round(STRETCH * longest)
    return choose(
        "model.frames",
        max(LEAST_FRAMES, min(most, wanted)),
        f"95 % of the clips last {wanted / 100:.2f} s or less; the base was trained on "
        f"{longest / 100:.2f} s, its positions are stretched to {most / 100:.2f} s at most",
    )


def _choose_method(rarest: int, width: int, choose: Choose) -> Method:
    if rarest < FEW:
        has = f"the rarest class has about {format_count(rarest, 'training clip')}"
        choose("method", "linear", f"{has}, fewer than {FEW}: only the head is trained")
        return Linear()
    method = SoftMoA()
    (bottleneck,) = find_widths(method, width, 1)
    choose(
        "method",
        "soft_moa",
        f"Soft-MoA, seven experts of one slot (arXiv 2402.00828), bottleneck {bottleneck}",
    )
    return method


def suggest_next_steps(diagnosis: Diagnosis, outcome: Metrics | None, base: str) -> list[str]:
    """Return what to improve next, the most important first; at most five lines.

    Args:
        diagnosis: from the doctor.
        outcome: metrics on the test clips, or None.
        base: the backbone's weights.
    """
    lines = [
        f"{len(finding.items)} x {finding.kind}: {finding.message}"
        for finding in diagnosis.findings
        if finding.severity in ("error", "warning") and finding.items
    ]
    scores = [] if outcome is None else [(c.f1, c) for c in outcome.per_class if c.f1 is not None]
    if scores:
        f1, weakest = min(scores, key=lambda score: score[0])
        if f1 < 0.8:
            lines.append(
                f"the weakest class is {weakest.name} (F1 {f1:.2f}, "
                f"{format_count(weakest.support, 'test clip')}): record more of it, or listen to "
                "its clips"
            )
    if base == "embedded":
        lines.append(
            "the embedded base is small and was trained on synthetic sounds only: a published AST "
            "(86 M parameters, trained on AudioSet) does far better on real sounds: --base "
            "MIT/ast-finetuned-audioset-10-10-0.4593 downloads it (350 MB)"
        )
    return lines[:5]


def name_adapt_folder(source: Source) -> Path:
    """Return the default run folder of `aatjax adapt`."""
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in source.name)
    return Path("runs") / f"adapt-{safe}"
