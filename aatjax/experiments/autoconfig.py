"""What `aatjax adapt` chooses for a set of sounds, by rules that it states."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from aatjax.audio.augment import Augment
from aatjax.config import Config, Data, Model
from aatjax.data.source import Source
from aatjax.doctor.findings import Diagnosis
from aatjax.petl import Method
from aatjax.petl.simple import Linear
from aatjax.petl.soft_moa import SoftMoA
from aatjax.train.loop import Training
from aatjax.train.optim import Optim

FEW = 5  # clips of a class below which only the head is trained
VALID_FROM = 12  # training clips of the rarest class from which some validate
STEPS = 600  # training steps aimed at
LEAST_FRAMES = 64
STRETCH = 1.5  # how far beyond its own length a base is used


@dataclasses.dataclass(frozen=True)
class Choice:
    """One decision.

    Attributes:
        what: the field of the config, or several.
        value: what was chosen, as a person reads it.
        why: the rule and the figures that led to it.
    """

    what: str
    value: str
    why: str


def choose(
    source: Source,
    diagnosis: Diagnosis,
    *,
    path: str,
    format: str,
    pattern: str | None,
    base: str,
    base_shape: tuple[int, int],
) -> tuple[Config, list[Choice]]:
    """The config for a set, and the reasons.

    Args:
        source: the set, opened.
        diagnosis: what the doctor found.
        path, format, pattern: how it was opened.
        base: the backbone's weights.
        base_shape: frames and width of the backbone.
    """
    longest, width = base_shape
    choices: list[Choice] = []

    def chosen(what: str, value: Any, why: str) -> Any:
        choices.append(Choice(what, str(value), why))
        return value

    data, rarest = _divided(source, chosen)
    seconds = [m.seconds for m in diagnosis.measurements if m.seconds is not None]
    frames = _length(seconds, longest, chosen)
    cut = float(np.mean([s * 100 > frames for s in seconds])) if seconds else 0.0
    method = _method(rarest, width, chosen)
    clips = int(len(source) * (1 - data.get("test_fraction", 0.0)))
    batch = chosen(
        "training.batch_size",
        int(min(32, max(4, 2 ** int(np.log2(max(4, clips // 8)))))),
        f"an eighth of about {clips} training clips, 4 to 32",
    )
    per_epoch = max(1, -(-clips // batch))
    epochs = chosen(
        "training.epochs",
        int(min(60, max(15, round(STEPS / per_epoch)))),
        f"about {STEPS} steps at {per_epoch} an epoch, 15 to 60 epochs",
    )
    rate = 1e-2 if isinstance(method, Linear) else 5e-3
    chosen("optim.lr", rate, "1e-2 for a head alone, 5e-3 for adapters (arXiv 2312.03694)")
    augment = Augment(freq_mask=24, time_mask=min(48, frames // 5))
    if not source.multi_label and rarest >= FEW:
        augment = dataclasses.replace(augment, mixup=0.5)
    chosen(
        "augment",
        f"masks 24/{augment.time_mask}, mixup {augment.mixup:g}",
        "SpecAugment; mixup from 5 clips a class on",
    )
    crop = chosen(
        "training.crop",
        "random" if cut > 0.1 else "start",
        f"{cut:.0%} of the clips are longer than the input; random from 10 % on",
    )
    chosen("data.statistics", "train", "mean and deviation of the log-mel of the training clips")
    config = Config(
        name=f"adapt-{source.name}",
        petl=method,
        model=Model(source=base, frames=frames),
        data=Data(format=format, path=path, pattern=pattern, statistics="train", **data),  # pyright: ignore[reportArgumentType]
        training=Training(epochs=epochs, batch_size=batch, crop=crop),
        optim=Optim(lr=rate),
        augment=augment,
    )
    return config, choices


def _divided(source: Source, chosen: Any) -> tuple[dict[str, Any], int]:
    """Fields of the division, and the training clips of the rarest class under it."""
    counts = Counter(c for clip in source.clips for c in clip.label)
    rarest = min((counts.get(c, 0) for c in range(len(source.classes))), default=0)
    splits = {clip.split for clip in source.clips} - {None}
    if len(splits) > 1 and "train" in splits:
        chosen("division", ", ".join(sorted(map(str, splits))), "the set's own parts")
        return {}, rarest
    grouped = sum(clip.group is not None for clip in source.clips)
    fields: dict[str, Any] = {"test_fraction": 0.2}
    if source.folds and len(source.folds) > 1:
        fields = {"fold": chosen("data.fold", source.folds[-1], "the last fold is held out")}
        rarest = int(rarest * (1 - 1 / len(source.folds)))
    else:
        why = "a fifth, stratified by class"
        if grouped:
            why += f"; recordings or speakers ({grouped} clips tell them) stay whole"
        chosen("data.test_fraction", 0.2, why)
        rarest = int(rarest * 0.8)
    if rarest >= VALID_FROM:
        why = f"the rarest class has about {rarest} training clips; some calibrate the confidence"
        fields["valid_fraction"] = chosen("data.valid_fraction", 0.15, why)
    else:
        chosen(
            "data.valid_fraction",
            0.0,
            f"none: the rarest class has about {rarest} training clips, {VALID_FROM} are needed; "
            "so confidence is not calibrated",
        )
    return fields, rarest


def _length(seconds: list[float], longest: int, chosen: Any) -> int:
    wanted = int(np.ceil(100 * float(np.quantile(seconds, 0.95)))) if seconds else longest
    most = round(STRETCH * longest)
    frames = max(LEAST_FRAMES, min(most, wanted))
    return chosen(
        "model.frames",
        frames,
        f"95 % of the clips last {wanted / 100:.2f} s or less; the base was trained on "
        f"{longest / 100:.2f} s, its positions are stretched to {most / 100:.2f} s at most",
    )


def _method(rarest: int, width: int, chosen: Any) -> Method:
    if rarest < FEW:
        chosen(
            "method",
            "linear",
            f"the rarest class has about {rarest} training clips, fewer than "
            f"{FEW}: only the head is trained",
        )
        return Linear()
    reduction = 128 if width >= 384 else 16
    chosen(
        "method",
        "soft_moa",
        "Soft-MoA, seven experts of one slot (arXiv 2402.00828), bottleneck "
        f"{max(1, width // reduction)}",
    )
    return SoftMoA(reduction=reduction)


def next_steps(diagnosis: Diagnosis, outcome: Any, base: str) -> list[str]:
    """What to mend next, the most telling first; at most five lines.

    Args:
        diagnosis: what the doctor found.
        outcome: metrics on the test clips, or None.
        base: the backbone's weights.
    """
    lines = []
    for finding in diagnosis.findings:
        if finding.severity in ("error", "warning") and finding.items:
            lines.append(f"{len(finding.items)} x {finding.kind}: {finding.message}")
    if outcome is not None:
        weak = [c for c in outcome.per_class if c.f1 is not None]
        weak = sorted(weak, key=lambda c: c.f1)[:1]
        lines += [
            f"the weakest class is {c.name} (F1 {c.f1:.2f}, {c.support} test clips): record "
            "more of it, or listen to its clips"
            for c in weak
            if c.f1 < 0.8
        ]
    if base == "embedded":
        lines.append(
            "the embedded base is small and knows made sounds only: a published AST (86 M "
            "parameters, trained on AudioSet) does far better on real sounds: --base "
            "MIT/ast-finetuned-audioset-10-10-0.4593 fetches it (350 MB)"
        )
    return lines[:5]


def run_folder_of(source: Source) -> Path:
    """Where `aatjax adapt` works unless told otherwise."""
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in source.name)
    return Path("runs") / f"adapt-{safe}"
