"""Checks of what `fit` is given, before anything is computed."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import optax
from jax.sharding import Mesh

from aatjax import surgery
from aatjax.audio.augment import Augment
from aatjax.audio.frontend import FrontEnd
from aatjax.audio.scoring import Scoring
from aatjax.data.batches import Batches
from aatjax.data.buckets import Bucket, check_buckets, sort_into_buckets
from aatjax.data.clip_windows import TrainWindows
from aatjax.data.source import Source, check_source
from aatjax.errors import UsageError, check_kind, suggest
from aatjax.models.ast import AST
from aatjax.train.optim import Optim
from aatjax.train.sharding import MeshShape, check_batch
from aatjax.train.step import Loss
from aatjax.train.training import Training

# The types of the settings of `fit` that are no numbers, and what to give.
KINDS: dict[str, tuple[Any, str]] = {
    "training": (Training, "aatjax.Training(...)"),
    "optim": (
        Optim | optax.GradientTransformation | optax.MultiSteps,
        "aatjax.Optim(...), or a transformation of optax such as optax.adam(1e-3)",
    ),
    "loss": (Callable | str, "'ce', 'bce', or a function (logits, targets) -> losses"),
    "on_step": (Callable, "a function of a Moment"),
    "on_epoch": (Callable, "a function of a Moment"),
    "augment": (Augment, "aatjax.audio.augment.Augment(...)"),
    "frontend": (FrontEnd, "aatjax.FrontEnd(...)"),
    "windows": (str, "'every', 'start' or 'random'"),
    "scoring": (Scoring, "aatjax.Scoring(...)"),
    "mesh": (Mesh | MeshShape, "a mesh of JAX, such as jax.make_mesh((4,), ('data',))"),
}


def collect_sources(train: Any, valid: Any, test: Any) -> dict[str, Source]:
    """Return the sources of clips by part, all with the classes of `train`; refuse what is none."""
    parts = {"train": train, "valid": valid, "test": test}
    if not isinstance(train, Batches):
        check_source(train, "fit: train", ", or data.Batches(iterable, classes)")
    for name in ("valid", "test"):
        if parts[name] is not None:
            check_source(parts[name], f"fit: {name}")
    for name in ("valid", "test"):
        if isinstance(part := parts[name], Source):
            parts[name] = part.with_classes(
                train.classes, train.name, multi_label=train.multi_label
            )
    return {name: part for name, part in parts.items() if isinstance(part, Source)}


def check_settings(settings: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuse settings of `fit` of another name or type.

    Raises:
        UsageError: it names the setting and what to give.
    """
    for name in settings:
        if name not in names:
            hint = suggest(name, names) or f"; settings are {', '.join(names)}"
            for part, cls in (("training", Training), ("optim", Optim)):
                if name in cls.__dataclass_fields__:
                    hint = f": it is one of {part}=aatjax.{cls.__name__}({name}=...)"
            raise UsageError(f"fit has no setting {name!r}{hint}")
    for name, (kinds, advice) in KINDS.items():
        if settings.get(name) is not None:
            check_kind(f"fit: {name}", settings[name], kinds, f"give {advice}")
    if isinstance(loss := settings.get("loss"), str) and loss not in get_args(Loss):
        raise UsageError(f"fit: loss={loss!r} is not one of {', '.join(get_args(Loss))}")
    if (windows := settings.get("windows")) not in (None, *get_args(TrainWindows)):
        raise UsageError(
            f"fit: windows={windows!r} is not one of {', '.join(get_args(TrainWindows))}"
        )


def check_changes(allow: Sequence[str], fields: Mapping[str, Any], *more: str) -> None:
    """Refuse to allow a change of what does not exist.

    Args:
        allow: names that were given.
        fields: settings by part and name, such as those of a config.
        more: other names that may be given.

    Raises:
        UsageError: one is neither a field nor a part.
    """
    known = {"clips": None, **dict.fromkeys(more), **fields}
    known |= {f"{part}.{n}": None for part, v in fields.items() if isinstance(v, dict) for n in v}
    for name in allow:
        other_method = name.startswith("petl.")  # whose fields may be those of the run before
        if name.partition(".")[0] != "clips" and name not in known and not other_method:
            hint = suggest(name, known) or f" (parts are {', '.join(['clips', *fields])})"
            raise UsageError(f"allow_change: there is no field {name!r}{hint}")


def check_selection(
    training: Training, valid: Source | None, test: Source | None, chosen_on_test: str | None
) -> None:
    """Refuse to choose weights without validation clips, or by the clips that are reported."""
    if training.select != "best":
        return
    if valid is None:
        raise UsageError(
            "training.select='best' needs validation clips: give some "
            "(valid=), or use training.select='last'"
        )
    shared = set() if test is None else _identify_clips(valid) & _identify_clips(test)
    if shared and chosen_on_test is None:
        raise UsageError(
            f"{len(shared)} clips are in valid and test, such as {min(shared)[0]!r}: "
            "training.select='best' would choose weights by the clips that are reported; give "
            "other validation clips, or name the paper whose protocol this is "
            "(FitContext(chosen_on_test=))"
        )


def check_scoring(scoring: Scoring, valid: Source | None) -> None:
    """Refuse to learn a pooling without validation clips."""
    if scoring.pooling == "attention" and valid is None:
        raise UsageError(
            "pooling='attention' is learned on validation clips: give some "
            "(valid=), or take pooling='mean' or 'max'"
        )


def check_inputs(
    train: Source | Batches, sources: Mapping[str, Source], training: Training, augment: Augment
) -> None:
    """Refuse settings that need waveforms, or clips, where there are none."""
    kinds = {name: source.log_mel(0) is not None for name, source in sources.items()}
    if any(kinds.values()) and augment.mixup:
        raise UsageError("augment.mixup mixes waveforms, and the clips are log-mel: omit it")
    if training.buckets and (any(kinds.values()) or isinstance(train, Batches)):
        raise UsageError("training.buckets sorts waveforms by their length: omit it")
    if training.balance == "sampler" and training.buckets:
        raise UsageError(
            "training.balance='sampler' draws clips of all lengths: omit training.buckets"
        )
    if training.balance == "sampler" and isinstance(train, Batches):
        raise UsageError("training.balance draws clips, and batches have none: omit it")
    if isinstance(train, Batches) and training.head_init == "ridge":
        raise UsageError(
            "a ridge regression is fitted to clips, and batches have none: pass a Source, such as "
            "data.Arrays, or take another method and training.head_init"
        )
    if isinstance(train, Batches) and training.cache_prefix:
        raise UsageError("training.cache_prefix stores clips, and batches have none: omit it")


def check_parts(mesh: Mesh, training: Training) -> None:
    """Refuse a batch whose parts, which are computed at once, do not divide over the devices."""
    name = "training.batch_size"
    if training.accumulate > 1:
        name += " / training.accumulate"
    check_batch(mesh, training.batch_size // training.accumulate, name)


def sort_buckets(
    model: AST, sources: Mapping[str, Source], frontend: FrontEnd, training: Training
) -> dict[str, tuple[Bucket, ...]]:
    """Return the clips of each source by length, where `training.buckets` asks for that."""
    if not training.buckets:
        return {}
    omit = "omit training.buckets"
    if not model.config.mask_padding:
        raise UsageError(
            "training.buckets: this model attends to padding, so a clip without it would give "
            f"other logits: load it with mask_padding (model.mask_padding=true), or {omit}"
        )
    if training.cache_prefix:
        raise UsageError(f"training.buckets cannot be combined with training.cache_prefix: {omit}")
    for path, module in surgery.modules(model).items():
        if getattr(module, "along_tokens", False):
            raise UsageError(
                f"training.buckets: {path} convolves along the tokens, across the ends of the "
                f"patch rows, so its output depends on the length: {omit}"
            )
    patch, stride = model.config.patch[1], model.config.stride[1]
    lengths = check_buckets(training.buckets, frontend, patch)
    return {
        name: sort_into_buckets(source, frontend, lengths, patch=patch, stride=stride)
        for name, source in sources.items()
    }


def _identify_clips(source: Source) -> set[tuple[str, str]]:
    """Return the clips of a source, as id and what they are read from."""
    return {(c.id, str(source.reader.key(c) or c.path)) for c in source.clips}
