"""Adapters from the checkpoints that the papers' repositories write."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from aatjax import surgery
from aatjax.audio.frontend import PRESETS, FrontEnd
from aatjax.convert.load import WeightSource
from aatjax.convert.memory import NAME, is_in_memory
from aatjax.convert.published import PublishedFile, open_published
from aatjax.errors import DataError, UsageError, check_names, suggest
from aatjax.models.config import Pooling
from aatjax.models.provenance import Origin, fingerprint_backbone
from aatjax.petl import Method, adapt
from aatjax.train.adapter_base import load_base
from aatjax.train.adapter_file import TrainedAdapter
from aatjax.train.rebuilt_model import make_shape

CLOSE = 1e-5  # positions of the papers' code and of aatjax for the same length differ by less
NOT_PUBLISHED = (
    "not a checkpoint of AAT or PETL_AST with adapters, LoRA, prompts, prefixes or experts; "
    "aatjax.load reads models without added modules (linear, full, BitFit, partial)"
)


def load_published(
    source: WeightSource,
    *,
    method: Method | None = None,
    base: str | os.PathLike[str] | None = None,
    classes: tuple[str, ...] | None = None,
    multi_label: bool = False,
    statistics: str = "audioset",
    frames: int | None = None,
    pool: Pooling | None = None,
) -> TrainedAdapter:
    """Load a fine-tuned checkpoint that the code of AAT or PETL_AST wrote, as adapter and backbone.

    AAT (arXiv 2401.10544) saves `best_audio_model.pth`, PETL_AST (arXiv 2312.03694, 2402.00828)
    `bestmodel_fold0`. The result computes what their code computes, errors included
    (`as_published`). `save_adapter` writes it, with its backbone unless `base` is given.

    Args:
        source: a file, or a state dictionary of tensors.
        method: another reading, where the tensors do not show everything: LoRA's alpha (default:
            a scale of 0.125), the location of a mixture of one site (mhsa), order and position
            of adapters (parallel), pooling of a prompted model (all). Start from
            `load_published(source).model.method` and `replace` fields.
        base: the weights that were fine-tuned, if the adapter is to be saved without them; all
            that the method keeps frozen must be equal to the file's.
        classes: class names in the order of the logits; None numbers them.
        multi_label: whether a clip may have any number of classes.
        statistics: normalisation, a name in `aatjax.audio.frontend.PRESETS`. PETL_AST's is always
            AudioSet's; AAT's scripts have one per data set.
        frames: 10 ms frames of the input, where the number of positions does not show them.
        pool: pooling, if PETL_AST's `final_output` was not ALL: `cls`.

    Raises:
        DataError: no such checkpoint, damaged, incomplete, of a model that aatjax does not have,
            or not made from `base`.
        UsageError: the method, or the number of classes, does not fit.
    """
    found = open_published(source, frames=frames)
    if found is None:
        name = NAME if is_in_memory(source) else source
        raise DataError(f"{name}: {NOT_PUBLISHED}")
    return build_published(
        found,
        method=method,
        base=base,
        classes=classes,
        multi_label=multi_label,
        statistics=statistics,
        pool=pool,
    )


def build_published(
    found: PublishedFile,
    *,
    method: Method | None = None,
    base: str | os.PathLike[str] | None = None,
    classes: tuple[str, ...] | None = None,
    multi_label: bool = False,
    statistics: str = "audioset",
    pool: Pooling | None = None,
) -> TrainedAdapter:
    """Return the adapter of an open checkpoint; see `load_published`."""
    checkpoint, name = found.checkpoint, found.name
    config = (
        checkpoint.config if pool is None else dataclasses.replace(checkpoint.config, pool=pool)
    )
    if statistics not in PRESETS:
        hint = suggest(statistics, PRESETS)
        raise UsageError(f"no statistics {statistics!r}{hint} (there are {', '.join(PRESETS)})")
    if classes is None:
        classes = tuple(f"class {number}" for number in range(config.num_classes))
    check_names("load_published: classes", classes)
    if len(classes) != config.num_classes:
        raise UsageError(f"{name}: {len(classes)} class names for {config.num_classes} classes")
    method = Method.from_json(found.method) if method is None else method
    shape = make_shape(config, method)
    variables = surgery.variables(shape)
    added = {p: tuple(v.shape) for p, v in variables.items() if p not in checkpoint.params}
    values = checkpoint.params | found.load_parameters(method.to_json(), added)
    if base is None:
        model = surgery.clone(shape)
        model.origin = Origin(name, fingerprint_backbone(checkpoint.params))
    else:
        model = adapt(load_base(base, config, Origin(os.fspath(base), "")), method)
        _check_base(found, base, surgery.fetch_arrays(model, surgery.Frozen), values)
    surgery.assign(model, values, what=name, complete=True)
    model.statistics = PRESETS[statistics]
    mean, std = PRESETS[statistics]
    frontend = FrontEnd(frames=config.frames, mels=config.mels, mean=mean, std=std)
    info: dict[str, Any] = {"published": {"source": name, "assumed": list(found.assumed)}}
    return TrainedAdapter(model, classes, multi_label, frontend, info)


def _check_base(
    found: PublishedFile,
    base: str | os.PathLike[str],
    frozen: Mapping[str, np.ndarray],
    values: Mapping[str, np.ndarray],
) -> None:
    """Refuse a base whose frozen arrays are not those of the file."""
    other = [
        path
        for path, value in frozen.items()
        if value.shape != values[path].shape or np.abs(value - values[path]).max() > CLOSE
    ]
    if not other:
        return
    assumed = ""
    if found.assumed:
        assumed = (
            f"; it is read with {', '.join(found.assumed)}, which method= (on the command line "
            "--petl.FIELD) changes"
        )
    raise DataError(
        f"{found.name}: {len(other)} of {len(frozen)} frozen tensors are not those of {base}, the "
        f"first is {other[0]}: give the weights that were fine-tuned{assumed}"
    )
