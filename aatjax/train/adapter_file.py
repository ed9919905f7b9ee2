"""`adapter.safetensors`: trained parameters, with everything needed to use them again."""

import dataclasses
import functools
import json
import math
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from aatjax import surgery
from aatjax.audio.frontend import FrontEnd
from aatjax.convert.load import load_model, reset_weights, select_load_options
from aatjax.data.synthetic.synthesize import synthesize
from aatjax.errors import AatjaxError, DataError, UsageError
from aatjax.io.atomic import write_bytes
from aatjax.io.digest import hash_arrays
from aatjax.models.ast import AST, make_abstract
from aatjax.models.config import ASTConfig
from aatjax.models.provenance import Origin
from aatjax.petl import Method, adapt
from aatjax.train.forward import bind_forward

FORMAT = 1
KEY = "aatjax"
GOLDEN: dict[str, Any] = {"sound": "siren", "seed": 0, "seconds": 1.0}
"""The synthetic sound whose logits every adapter file stores; see `synthesize`."""


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
    """Write the trainable parameters, the statistics and the metadata, atomically.

    Args:
        path: the file, usually `adapter.safetensors`.
        model: an adapted model.
        classes: class names in the order of the logits.
        multi_label: whether a clip may have any number of classes.
        frontend: the front end that it was trained with.
        extra: more JSON for the metadata (config, metrics, which weights).

    Raises:
        DataError: the model was not made by `aatjax.load` and `aatjax.adapt`.
        WriteError: the file could not be written; an older one remains.
    """
    path = Path(path)
    if not isinstance(model.method, Method) or model.origin is None:
        raise DataError("only a model from aatjax.load and aatjax.adapt can be saved as an adapter")
    tensors = surgery.arrays(model, nnx.Param) | surgery.arrays(model, nnx.BatchStat)
    info = {
        "format": FORMAT,
        "kind": "adapter",
        "classes": list(classes),
        "multi_label": multi_label,
        "frontend": frontend.to_dict(),
        "model": model.config.without_execution().to_json(),
        "method": model.method.to_json(),
        "base": dataclasses.asdict(model.origin),
        "versions": find_versions(),
        "golden": _make_golden(model, frontend),
        **(extra or {}),
    }
    values = {name: np.asarray(value) for name, value in tensors.items()}
    data = save(values, {KEY: json.dumps(info), "sha256": hash_arrays(values)})
    write_bytes(path, data)
    return path


def compute_golden_logits(
    model: AST, frontend: FrontEnd, *, sound: str, seed: int, seconds: float
) -> Float[np.ndarray, " c"]:
    """Return a model's logits `[c]` for a synthetic sound, matrix products in full precision."""
    clip = synthesize(sound, seed, seconds=seconds, rate=frontend.rate)
    audio, length = frontend.fit(clip)
    with jax.default_matmul_precision("highest"):
        forward = bind_forward(model, frontend)
        return np.asarray(forward(audio[None], np.array([length], np.int32)))[0]


def _make_golden(model: AST, frontend: FrontEnd) -> dict[str, Any] | None:
    """Return the sample for the metadata; without logits where they are not finite."""
    if (frontend.frames, frontend.mels) != (model.config.frames, model.config.mels):
        return None
    logits = [float(f"{value:.7g}") for value in compute_golden_logits(model, frontend, **GOLDEN)]
    return {**GOLDEN, "logits": logits if all(map(math.isfinite, logits)) else None}


def read_info(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return the metadata of an adapter file, or None if the file is something else."""
    try:
        with safe_open(path, "np") as file:
            info = json.loads((file.metadata() or {}).get(KEY, "null"))
    except (SafetensorError, OSError, ValueError):
        return None
    return info if isinstance(info, dict) and info.get("kind") == "adapter" else None


def load_adapter(
    path: str | os.PathLike[str], *, base: str | os.PathLike[str] | AST | None = None
) -> TrainedAdapter:
    """Load an adapter onto its backbone.

    Args:
        path: a file that `save_adapter` wrote.
        base: the backbone's weights if they have moved since training, or a model loaded with the
            same options (length, pooling, positions, masking of padding).

    Raises:
        DataError: the file is missing, damaged, of a newer format, or made for another backbone
            (by fingerprint).
    """
    path = Path(path)
    file = _read_file(path)
    config, method, origin, tensors = file.config, file.method, file.origin, file.tensors
    whole = _make_shape(config, method)
    if set(surgery.variables(whole)) <= set(tensors):
        model = surgery.clone(whole)  # full fine-tuning: the file holds every parameter
    else:
        model = adapt(_load_base(path, base, config, origin), method)
    kinds = (nnx.Param, nnx.BatchStat)
    trained = {name for name, v in surgery.variables(whole).items() if isinstance(v, kinds)}
    if missing := sorted(trained - set(tensors)):
        raise DataError(
            f"{path}: {len(missing)} trained parameters are missing, first {missing[0]}"
        )
    try:
        surgery.assign(model, tensors, what=str(path))
    except UsageError as error:
        raise DataError(str(error)) from error
    model.origin, model.method = origin, method
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
        raise DataError(f"{path}: not an adapter file that aatjax wrote, or damaged")
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


@functools.lru_cache(8)
def _make_shape(config: ASTConfig, method: Method) -> AST:
    """Return an adapted model without numbers; making it takes longer than loading an adapter."""
    model: AST = nnx.eval_shape(lambda model: adapt(model, method), make_abstract(config))
    return model


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


def _load_base(
    path: Path, base: str | os.PathLike[str] | AST | None, config: ASTConfig, origin: Origin
) -> AST:
    if isinstance(base, AST):
        model = base
        _check_shape(path, base.config, config)
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
