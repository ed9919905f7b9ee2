"""Checks of what `fit` is given, before anything is computed."""

from collections.abc import Mapping
from typing import Any

from aatjax import surgery
from aatjax.audio.augment import Augment
from aatjax.audio.frontend import FrontEnd
from aatjax.data.batches import Batches
from aatjax.data.buckets import Bucket, check_buckets, sort_into_buckets
from aatjax.data.source import Source
from aatjax.errors import UsageError
from aatjax.models.ast import AST
from aatjax.train.loop import Training


def collect_sources(train: Any, valid: Any, test: Any) -> dict[str, Source]:
    """Return the sources of clips by part; refuse what is none."""
    parts = {"train": train, "valid": valid, "test": test}
    for name, part in parts.items():
        if part is None or isinstance(part, Source) or (name, type(part)) == ("train", Batches):
            continue
        how = "data.Arrays(X, y, classes), data.AudioFolder(path)"
        how += ", or data.Batches(iterable, classes)" if name == "train" else ""
        raise UsageError(f"fit: {name} is a {type(part).__name__}, not a source: give {how}")
    return {name: part for name, part in parts.items() if isinstance(part, Source)}


def check_selection(
    training: Training, valid: Source | None, test: Source | None, chosen_on_test: str | None
) -> None:
    """Refuse to choose weights without validation clips, or by the clips that are reported."""
    if training.select != "best":
        return
    if valid is None:
        raise UsageError(
            "training.select='best' needs validation clips: give some (valid=, "
            "--data.valid-fraction), or use training.select='last'"
        )
    shared = set() if test is None else _identify_clips(valid) & _identify_clips(test)
    if shared and chosen_on_test is None:
        raise UsageError(
            f"{len(shared)} clips are in valid and test, such as {min(shared)[0]!r}: "
            "training.select='best' would choose weights by the clips that are reported; give "
            "other validation clips, or name the paper whose protocol this is "
            "(FitContext.chosen_on_test, --protocol)"
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
    if isinstance(train, Batches) and training.cache_prefix:
        raise UsageError("training.cache_prefix stores clips, and batches have none: omit it")


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
