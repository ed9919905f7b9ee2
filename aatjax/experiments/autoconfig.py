"""Settings for a set of sounds, chosen by the rules of `aatjax adapt`."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aatjax.audio.augment import Augment
from aatjax.config import Config, Data, Model
from aatjax.data.clip_windows import TrainWindows
from aatjax.data.groups import describe_groups
from aatjax.data.source import Source
from aatjax.doctor.findings import Diagnosis
from aatjax.doctor.set_checks import list_level_gaps
from aatjax.errors import format_count
from aatjax.experiments.partition import Partition
from aatjax.models.config import ASTConfig, Pooling
from aatjax.petl import Method
from aatjax.petl.simple import Ridge
from aatjax.petl.sizes import find_widths
from aatjax.petl.soft_moa import SoftMoA
from aatjax.train.metrics.results import Metrics
from aatjax.train.optim import Optim
from aatjax.train.training import Training

FEW = 5  # clips per class below which only the head is fitted
VALID_FROM = 12  # training clips of the rarest class from which validation clips are split off
STEPS = 600  # training steps aimed at
LEAST_FRAMES = 100
MOST_GAIN = 20  # dB
STRETCH = 1.5  # longest input, as a multiple of the base's own length
NARROW = 384  # width of a model below which a ridge start can suffice
SUFFICES = 0.85  # share of the training clips left out from which it does
MOST_POOLED = 4096  # width of the pooled vector up to which each frequency band is pooled apart


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


def choose_division(source: Source, data: Data) -> tuple[Data, list[ChosenSetting]]:
    """Return how a set is divided, and the reasons.

    Args:
        source: the clips that can be used.
        data: where they are; other fields are replaced.
    """
    settings: list[ChosenSetting] = []
    choose = _note_in(settings)
    counts = Counter(c for clip in source.clips for c in clip.label)
    rarest = min((counts.get(c, 0) for c in range(len(source.classes))), default=0)
    splits = {clip.split for clip in source.clips} - {None}
    fields: dict[str, Any] = {"statistics": "train"}
    choose("data.statistics", "train", "mean and deviation of the log-mel of the training clips")
    if len(splits) > 1 and "train" in splits:
        choose("division", ", ".join(sorted(map(str, splits))), "the set's own parts")
        return dataclasses.replace(data, **fields), settings
    grouped = sum(clip.group is not None for clip in source.clips)
    if source.folds and len(source.folds) > 1:
        fields["fold"] = choose("data.fold", source.folds[-1], "the last fold is held out")
        rarest = int(rarest * (1 - 1 / len(source.folds)))
    else:
        why = "a fifth, stratified by class"
        if grouped:
            known = f"known for {format_count(grouped, 'clip')}"
            why += f"; {describe_groups(source)} ({known}) stay whole"
        fields["test_fraction"] = choose("data.test_fraction", 0.2, why)
        rarest = int(rarest * 0.8)
    has = f"the rarest class has about {format_count(rarest, 'training clip')}"
    if rarest >= VALID_FROM:
        why = f"{has}; some of them calibrate the confidence"
        fields["valid_fraction"] = choose("data.valid_fraction", 0.15, why)
    else:
        why = f"none: {has}, {VALID_FROM} are needed; so confidence is not calibrated"
        fields["valid_fraction"] = choose("data.valid_fraction", 0.0, why)
    return dataclasses.replace(data, **fields), settings


def choose_settings(
    source: Source,
    parts: Partition,
    diagnosis: Diagnosis,
    model: Model,
    data: Data,
    shape: ASTConfig,
    method: Method | None = None,
) -> tuple[Config, list[ChosenSetting]]:
    """Return the config for a set of sounds, and the reasons.

    Args:
        source: the clips that can be used.
        parts: the set, divided as `data` says.
        diagnosis: from the doctor; its `frames` are the length of the input.
        model: the backbone's weights.
        data: the set and its division.
        shape: of the backbone.
        method: the method that the user asks for.
    """
    settings: list[ChosenSetting] = []
    choose = _note_in(settings)
    longest, width = shape.frames, shape.dim
    counts = Counter(c for clip in parts.train.clips for c in clip.label)
    rarest = min(counts.get(c, 0) for c in range(len(source.classes)))
    seconds = [m.seconds for m in diagnosis.measurements if m.seconds is not None]
    frames = choose("model.frames", diagnosis.frames, _explain_frames(seconds, longest))
    free = method is None
    if method is None:
        method = _choose_method(rarest, width, choose)
    else:
        choose("method", method.name, "given")
    pad = choose("data.pad", "repeat", _explain_pad(seconds, frames))
    training, windows = _choose_training(len(parts.train), seconds, frames, choose)
    model = dataclasses.replace(model, frames=frames)
    if model.pool is None:
        model = dataclasses.replace(model, pool=_choose_pool(shape, choose))
    if not method.closed_form:
        training = dataclasses.replace(training, head_init="ridge")
        why = "training begins at the accuracy of ridge regression"
        choose("training.head_init", "ridge", why)
        if free and width < NARROW:
            why = "with this share of the clips left out right, training gained nothing on ESC-10"
            suffices = choose("training.ridge_suffices", SUFFICES, why)
            training = dataclasses.replace(training, ridge_suffices=suffices)
    rate = f"{method.choose_rate(width):g}"
    choose("optim.lr", rate, f"that of {method.name} on a model of width {width}")
    mixup = 0.5 if not source.multi_label and rarest >= FEW else 0.0
    gaps = [gap for *_, gap in list_level_gaps(source, diagnosis.measurements)]
    gain = float(min(MOST_GAIN, round(max(map(abs, gaps), default=0.0))))
    masks = Augment(freq_mask=24, time_mask=min(48, frames // 5), mixup=mixup, gain=gain)
    text = f"masks 24/{masks.time_mask}, mixup {masks.mixup:g}, gain {gain:g} dB"
    why = f"SpecAugment; mixup from {FEW} clips per class"
    if gain:
        why += f"; gain since speakers, recordings or parts differ in level by {gain:g} dB or more"
    choose("augment", text, why)
    config = Config(
        name=f"adapt-{source.name}",
        petl=method,
        model=model,
        data=dataclasses.replace(data, pad=pad, windows=windows),
        training=training,
        optim=Optim(),
        augment=masks,
    )
    return config, settings


def describe_training(config: Config, parts: Partition) -> str:
    """Return the number of clips of each part, and the steps per epoch, in one line."""
    counts = [format_count(len(parts.train), "training clip")]
    counts += [] if parts.valid is None else [f"{len(parts.valid):,} for validation"]
    counts += [] if parts.test is None else [f"{len(parts.test):,} for testing"]
    steps = -(-len(parts.train) // config.training.batch_size)
    return f"{', '.join(counts)}; {format_count(steps, 'step')} per epoch"


def _note_in(settings: list[ChosenSetting]) -> Choose:
    """A function that appends a setting to a list and returns its value."""

    def choose(what: str, value: Any, why: str) -> Any:
        settings.append(ChosenSetting(what, str(value), why))
        return value

    return choose


def _choose_training(
    clips: int, seconds: list[float], frames: int, choose: Choose
) -> tuple[Training, TrainWindows]:
    batch = choose(
        "training.batch_size",
        int(min(32, max(4, 2 ** int(np.log2(max(4, clips // 8)))))),
        f"an eighth of the {format_count(clips, 'training clip')}, 4 to 32",
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
        "random" if cut else "every",
        f"{cut:.0%} of the clips are longer than the input; another part of them in each epoch",
    )
    return Training(epochs=epochs, batch_size=batch), windows


def choose_frames(seconds: Sequence[float], longest: int) -> int:
    """Return the length of the input in 10 ms frames.

    Args:
        seconds: lengths of the clips.
        longest: frames that the base was trained on.
    """
    return max(LEAST_FRAMES, min(round(STRETCH * longest), _count_wanted(seconds, longest)))


def _count_wanted(seconds: Sequence[float], longest: int) -> int:
    return int(np.ceil(100 * float(np.quantile(seconds, 0.95)))) if seconds else longest


def _explain_pad(seconds: Sequence[float], frames: int) -> str:
    short = float(np.mean([s * 100 < frames for s in seconds])) if seconds else 0.0
    return f"{short:.0%} of the clips are shorter: what is pooled is sound throughout, no padding"


def _explain_frames(seconds: Sequence[float], longest: int) -> str:
    wanted, most = _count_wanted(seconds, longest), round(STRETCH * longest)
    return (
        f"95 % of the clips last {wanted / 100:.2f} s or less; the base was trained on "
        f"{longest / 100:.2f} s, its positions are stretched to {most / 100:.2f} s at most"
    )


def _choose_method(rarest: int, width: int, choose: Choose) -> Method:
    if rarest < FEW:
        has = f"the rarest class has about {format_count(rarest, 'training clip')}"
        why = f"{has}, fewer than {FEW}: only the head is fitted, in closed form"
        choose("method", "ridge", why)
        return Ridge()
    method = SoftMoA()
    (bottleneck,) = find_widths(method, width, 1)
    choose(
        "method",
        "soft_moa",
        f"Soft-MoA, seven experts of one slot (arXiv 2402.00828), bottleneck {bottleneck}",
    )
    return method


def _choose_pool(shape: ASTConfig, choose: Choose) -> Pooling:
    wide = dataclasses.replace(shape, pool="bands").pooled_dim
    if wide <= MOST_POOLED:
        why = f"mean and deviation of the patches of each frequency band, {wide:,} numbers"
        return choose("model.pool", "bands", why)
    why = f"mean and deviation of all patches; by frequency band they would be {wide:,} numbers"
    return choose("model.pool", "stats", why)


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
            "the embedded base is small and has heard synthetic sounds and 40 words only: a "
            "published AST (86 M parameters, trained on AudioSet) does far better: --base "
            "MIT/ast-finetuned-audioset-10-10-0.4593 downloads it (350 MB)"
        )
    return lines[:5]


def name_adapt_folder(source: Source) -> Path:
    """Return the default run folder of `aatjax adapt`."""
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in source.name)
    return Path("runs") / f"adapt-{safe}"
