"""`adapter.safetensors`: trained parameters, with everything needed to use them again."""

import dataclasses
import json
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from aatjax import surgery
from aatjax.audio.frontend import FrontEnd
from aatjax.convert.load import load_model, reset_weights, select_load_options
from aatjax.errors import AatjaxError, DataError, UsageError, check_names
from aatjax.io.atomic import write_bytes
from aatjax.io.digest import hash_arrays
from aatjax.models.ast import AST, check_model
from aatjax.models.config import ASTConfig
from aatjax.models.provenance import Origin
from aatjax.petl import Method, adapt
from aatjax.train.forward import check_fit
from aatjax.train.golden import differs, make_golden
from aatjax.train.rebuilt_model import PASSING, make_shape, rebuild_model

FORMAT = 1
KEY = "aatjax"


@dataclasses.dataclass(frozen=True)
class TrainedAdapter:
    """A trained adapter on its backbone.

    Attributes:
        model: the adapted AST.
        classes: class names in the order of the logits.
        multi_label: whether a clip may have any number of classes.
        frontend: the front end that it was trained with.
        info: the whole metadata of the file.
    """

    model: AST
    classes: tuple[str, ...]
    multi_label: bool
    frontend: FrontEnd
    info: dict[str, Any]


def find_versions() -> dict[str, str]:
    """Return the versions of aatjax and of the libraries that numbers depend on."""
    found = {}
    for name in ("aatjax", "jax", "flax", "optax"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def save_adapter(
    path: str | os.PathLike[str],
    model: AST,
    *,
    classes: tuple[str, ...],
    multi_label: bool,
    frontend: FrontEnd,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write an adapter, so that `load_adapter` returns exactly this model, atomically.

    The file holds the trained parameters, the statistics, and every other array that is not as the
    base was loaded: those of earlier, frozen adapters, and those that were merged or edited.

    Args:
        path: the file, usually `adapter.safetensors`.
        model: an adapted model.
        classes: class names in the order of the logits.
        multi_label: whether a clip may have any number of classes.
        frontend: the front end that it was trained with.
        extra: more JSON for the metadata (config, metrics, which weights).

    Raises:
        UsageError: the model was not made by `aatjax.load` and `aatjax.adapt`, or was changed by
            hand so that it would come back as another; the number of classes is not that of the
            head; the front end does not fit the model.
        WriteError: the file could not be written; an older one remains.
    """
    path = Path(path)
    check_model(model, "save_adapter")
    check_names("save_adapter: classes", classes)
    method, origin = model.method, model.origin
    if not isinstance(method, Method) or origin is None:
        raise UsageError(
            "only a model from aatjax.load and aatjax.adapt can be saved as an adapter: write the "
            "weights of a model of your own (aatjax.convert.write_native), load those and adapt"
        )
    check_fit(model.config, len(classes), frontend)
    config = model.config.without_execution()
    golden = make_golden(model, frontend)
    rebuilt = rebuild_model(model, config, method, frontend, golden)
    frozen = surgery.fetch_arrays(rebuilt, surgery.Frozen)
    changed = list(frozen) if model.loaded is None else model.loaded.find_changed(frozen)
    values = {name: frozen[name] for name in changed}
    for name, variable in surgery.variables(rebuilt).items():
        if not isinstance(variable, (surgery.Frozen, *PASSING)):
            values[name] = np.asarray(variable[...])
    info = {
        "format": FORMAT,
        "kind": "adapter",
        "classes": list(classes),
        "multi_label": multi_label,
        "frontend": frontend.to_dict(),
        "model": config.to_json(),
        "method": method.to_json(),
        "base": dataclasses.asdict(origin),
        "versions": find_versions(),
        "golden": golden,
        **(extra or {}),
    }
    data = save(values, {KEY: json.dumps(info), "sha256": hash_arrays(values)})
    write_bytes(path, data)
    return path


def read_info(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return the metadata of an adapter file, or None if the file is something else."""
    try:
        with safe_open(path, "np") as file:
            info = json.loads((file.metadata() or {}).get(KEY, "null"))
    except (SafetensorError, OSError, ValueError):
        return None
    return info if isinstance(info, dict) and info.get("kind") == "adapter" else None


def load_adapter(
    path: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | AST | None = None,
    check: bool = True,
) -> TrainedAdapter:
    """Load an adapter onto its backbone.

    Args:
        path: a file that `save_adapter` wrote.
        base: the backbone's weights if they have moved since training, or a model loaded with the
            same options (length, pooling, positions, masking of padding).
        check: recompute the golden sample, the logits of a synthetic sound that the file holds.

    Raises:
        DataError: the file is missing, damaged, of a newer format, or made for another backbone
            (by fingerprint); or the model computes other logits than when it was saved.
    """
    path = Path(path)
    file = _read_file(path)
    config, method, origin, tensors = file.config, file.method, file.origin, file.tensors
    whole = make_shape(config, method)
    if set(surgery.variables(whole)) <= set(tensors):
        model = surgery.clone(whole)  # full fine-tuning: the file holds every parameter
    else:
        model = adapt(_load_base(path, base, config, origin, set(tensors)), method)
    trained = {
        name
        for name, variable in surgery.variables(whole).items()
        if not isinstance(variable, (surgery.Frozen, *PASSING))
    }
    if missing := sorted(trained - set(tensors)):
        raise DataError(
            f"{path}: {len(missing)} trained parameters are missing, first {missing[0]}"
        )
    try:
        surgery.assign(model, tensors, what=str(path))
    except UsageError as error:
        raise DataError(str(error)) from error
    model.origin, model.method = origin, method
    golden = file.info.get("golden") if check else None
    if (difference := differs(model, file.frontend, golden)) is not None:
        raise DataError(
            f"{path}: the model does not compute what it did when it was saved: a logit of the "
            f"golden sample differs by {difference:.2g}. The code of the method, or the software, "
            "has changed since; check=False loads it nevertheless"
        )
    return TrainedAdapter(model, file.classes, file.multi_label, file.frontend, file.info)


@dataclasses.dataclass(frozen=True)
class _File:
    """The content of an adapter file."""

    info: dict[str, Any]
    config: ASTConfig
    method: Method
    origin: Origin
    classes: tuple[str, ...]
    multi_label: bool
    frontend: FrontEnd
    tensors: dict[str, np.ndarray]


def _read_file(path: Path) -> _File:
    if not path.exists():
        raise DataError(f"{path}: no such file")
    info = read_info(path)
    if info is None:
        raise DataError(
            f"{path}: not an adapter file that aatjax wrote, or damaged (of a checkpoint of AAT or "
            "PETL_AST, aatjax convert makes one)"
        )
    try:
        if info["format"] > FORMAT:
            raise DataError(
                f"{path}: format {info['format']} is newer than this aatjax reads ({FORMAT}): "
                f"it was written by aatjax {info['versions']['aatjax']}, install that or newer"
            )
        with safe_open(path, "np") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            checksum = file.metadata().get("sha256")
        found = _File(
            info,
            ASTConfig.from_json(info["model"]),
            Method.from_json(info["method"]),
            Origin(**info["base"]),
            tuple(info["classes"]),
            bool(info["multi_label"]),
            FrontEnd.from_dict(info["frontend"]),
            tensors,
        )
    except UsageError as error:  # a method or field that this version does not have
        raise DataError(f"{path}: {error}") from error
    except (SafetensorError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: damaged: {type(error).__name__}: {error}") from error
    if checksum is not None and checksum != hash_arrays(tensors):
        raise DataError(
            f"{path}: damaged: the checksum of its tensors does not match; copy it again"
        )
    return found


def load_base(base: str | os.PathLike[str] | None, config: ASTConfig, origin: Origin) -> AST:
    """Load weights in the shape that an adapter was trained on.

    Args:
        base: the weights if they have moved since training, else None.
        config: their shape and how they are used.
        origin: where they were, and what was made of them.

    Raises:
        AatjaxError: see `aatjax.load`.
    """
    options = select_load_options(config)
    options["rgb"] = origin.rgb
    model = load_model(
        origin.source if base is None else base,
        config.num_classes,
        origin.revision if base is None else None,
        origin.seed,
        options,
    )
    if origin.reset:
        reset_weights(model, origin.seed)
    return model


def _check_shape(path: Path, given: ASTConfig, wanted: ASTConfig) -> None:
    """Refuse a loaded backbone that would give other logits than the one trained on."""
    free = {"dtype", "num_classes"}
    fields = given.without_execution().to_json()
    pairs = ((name, fields[name], value) for name, value in wanted.to_json().items())
    other = [f"{n}={a!r} for {b!r}" for n, a, b in pairs if a != b and n not in free]
    if other:
        raise DataError(
            f"{path}: the given base is not used as in training: {', '.join(other)}; load "
            "it with those options, or give its weights"
        )


def _check_unchanged(path: Path, base: AST, stored: set[str]) -> None:
    """Refuse a backbone that is not as it was loaded, but for arrays that the file holds."""
    arrays = surgery.fetch_arrays(base)
    changed = list(arrays) if base.loaded is None else base.loaded.find_changed(arrays)
    changed = [name for name in changed if name not in stored]
    if base.method is not None or changed:
        what = "is adapted" if base.method is not None else f"was changed, first in {changed[0]}"
        raise DataError(
            f"{path}: the given base {what} after it was loaded: give the model that aatjax.load "
            "returned, or its weights"
        )


def _load_base(
    path: Path,
    base: str | os.PathLike[str] | AST | None,
    config: ASTConfig,
    origin: Origin,
    stored: set[str],
) -> AST:
    if isinstance(base, AST):
        model = base
        _check_shape(path, base.config, config)
        _check_unchanged(path, base, stored)
    else:
        try:
            model = load_base(base, config, origin)
        except AatjaxError as error:
            if base is not None:
                raise
            raise type(error)(
                f"{path}: its base model {origin.source!r} could not be loaded ({error}); give the "
                "weights with base= (on the command line --base)"
            ) from error
    found = None if model.origin is None else model.origin.fingerprint
    if found != origin.fingerprint:
        raise DataError(
            f"{path}: was trained on base {origin.source!r} (fingerprint "
            f"{origin.fingerprint[:12]}), this base has {str(found)[:12]}: give those weights with "
            "--base"
        )
    return model
