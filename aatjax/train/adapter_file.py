"""`adapter.safetensors`: trained parameters, with everything needed to use them again."""

import dataclasses
import json
import os
import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from aatjax import surgery
from aatjax.audio.frontend import FrontEnd
from aatjax.audio.scoring import Scoring
from aatjax.errors import AatjaxError, DataError, UsageError, check_names, printable
from aatjax.io.atomic import write_bytes
from aatjax.io.digest import hash_arrays, hash_json
from aatjax.io.json_fields import shorten
from aatjax.models.ast import AST, check_model
from aatjax.models.config import ASTConfig
from aatjax.petl import Method
from aatjax.train.adapter_base import find_base
from aatjax.train.adapter_metadata import AdapterMetadata, parse_metadata
from aatjax.train.forward import check_fit
from aatjax.train.golden import differs, make_golden
from aatjax.train.own_run import lies_in_run
from aatjax.train.rebuilt_model import PASSING, adapt_stored, make_shape, rebuild_model

ARTEFACT = "adapter.safetensors"
"""Name of the adapter file in a run folder."""
FORMAT = 2
TENSORS_ONLY = 1
"""The format whose checksum covers the tensors, not the metadata."""
KEY = "aatjax"
DIGEST = "sha256"


@dataclasses.dataclass(frozen=True)
class TrainedAdapter:
    """A trained adapter on its backbone.

    Attributes:
        model: the adapted AST.
        classes: class names in the order of the logits.
        multi_label: whether a clip may have any number of classes.
        frontend: the front end that it was trained with.
        info: the whole metadata of the file.
        path: the file that it was loaded from.
        scoring: how the score of a clip is made of its windows.
    """

    model: AST
    classes: tuple[str, ...]
    multi_label: bool
    frontend: FrontEnd
    info: dict[str, Any]
    path: Path | None = None
    scoring: Scoring = Scoring()


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
    scoring: Scoring | None = None,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write an adapter, so that `load_adapter` returns exactly this model, atomically.

    The file holds the trained parameters, the statistics, and every other array that is not as the
    base was loaded: those of earlier, frozen adapters, and those that were merged or edited. Equal
    models and arguments give equal bytes. A file of an older format is written again by passing
    what `load_adapter` returned: its model, classes, `multi_label`, front end, scoring, and
    `extra=adapter.info`.

    Args:
        path: the file, usually `adapter.safetensors`.
        model: an adapted model.
        classes: class names in the order of the logits.
        multi_label: whether a clip may have any number of classes.
        frontend: the front end that it was trained with.
        scoring: how the score of a clip is made of its windows, by default their mean.
        extra: more JSON for the metadata (config, metrics, which weights); what the file states
            of itself (classes, method, golden sample, ...) is made again.

    Raises:
        UsageError: the model was not made by `aatjax.load` and `aatjax.adapt`, or was changed by
            hand so that it would come back as another; the number of classes is not that of the
            head, or a name stands twice; the front end does not fit the model; `extra` is no JSON.
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
        "scoring": dataclasses.asdict(scoring or Scoring()),
        "model": config.to_json(),
        "method": method.to_json(),
        "base": dataclasses.asdict(origin),
        "versions": find_versions(),
        "golden": golden,
    }
    more = {name: value for name, value in (extra or {}).items() if name not in (*info, DIGEST)}
    write_bytes(path, encode_adapter(_complete(info | more), values))
    return path


def _complete(info: dict[str, Any]) -> dict[str, Any]:
    """Add the decision to the golden sample, and check what would be refused when it is read."""
    try:
        info = json.loads(json.dumps(info))
        found = AdapterMetadata.from_json(info)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"save_adapter: the metadata cannot be saved: {error}") from error
    if found.golden is None or found.golden.logits is None:
        return info
    label, probabilities = found.compute_decision(np.asarray(found.golden.logits))
    rounded = [float(f"{value:.7g}") for value in probabilities]
    return info | {"golden": {**info["golden"], "label": label, "probabilities": rounded}}


def encode_adapter(info: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> bytes:
    """Return the bytes of an adapter file: equal metadata and tensors give equal bytes.

    The digest covers both. It lies within the one entry of the file's header, since safetensors
    writes several entries in an order that changes from process to process.
    """
    fields = {name: value for name, value in info.items() if name != DIGEST}
    digest = compute_digest(fields, tensors)
    text = json.dumps({**fields, DIGEST: digest}, sort_keys=True)
    return save(dict(tensors), {KEY: text})


def compute_digest(info: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 of an adapter's metadata, without its digest, and of its tensors."""
    fields = {name: value for name, value in info.items() if name != DIGEST}
    return hash_arrays(tensors, start=hash_json(fields).encode())


def read_info(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return the metadata of an adapter file, unchecked; None if the file is something else."""
    try:
        with safe_open(path, "np") as file:
            info = parse_metadata((file.metadata() or {}).get(KEY, "null"))
    except (SafetensorError, OSError, ValueError):
        return None
    return info if isinstance(info, dict) and info.get("kind") == "adapter" else None


def find_adapter(path: Path) -> tuple[Path, Path | None]:
    """Return the adapter file, and the run folder that it is in, if any.

    Raises:
        DataError: there is none.
    """
    if path.is_dir():
        if (path / ARTEFACT).is_file():
            return path / ARTEFACT, path
        inside = sorted(one.parent.name for one in path.glob(f"*/{ARTEFACT}"))
        hint = f"; name one of its runs: {', '.join(inside[:6])}" if inside else ""
        raise DataError(f"{path}: has no {ARTEFACT}: the run has not finished{hint}")
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    in_run = path.name == ARTEFACT and (path.parent / "result.json").is_file()
    return path, path.parent if in_run else None


def load_adapter(
    path: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | AST | None = None,
    check: bool = True,
) -> TrainedAdapter:
    """Load an adapter onto its backbone.

    Args:
        path: a file that `save_adapter` wrote, or the run folder that it is in.
        base: the backbone's weights, or a model loaded with the same options (length, pooling,
            positions, masking of padding). None takes a name of the package or the Hub from the
            file, or weights of its fingerprint that were loaded on this machine before; a path in
            the file is followed only in the folder of the run that wrote it.
        check: recompute the golden sample, the logits of a synthetic sound that the file holds.

    Raises:
        DataError: the file is missing, damaged or changed, of a newer format, or made for another
            backbone (by fingerprint); a field of its metadata is out of range; or the model
            computes other logits than when it was saved.
    """
    path = find_adapter(Path(path))[0]
    info, found, tensors = _read_file(path)
    config, method = found.model, found.method
    model = _make_shape(path, config, method)
    variables = surgery.variables(model)
    trained = {
        name
        for name, variable in variables.items()
        if not isinstance(variable, (surgery.Frozen, *PASSING))
    }
    if missing := sorted(trained - set(tensors)):
        raise DataError(
            f"{path}: {len(missing)} trained parameters are missing, first {missing[0]}"
        )
    _assign(path, model, tensors)  # before a backbone is made: nothing is larger than the file
    if not set(variables) <= set(tensors):  # full fine-tuning holds every parameter
        own = lies_in_run(path, found.config)
        backbone = find_base(path, base, config, found.base, set(tensors), own=own)
        model = adapt_stored(backbone, method, set(tensors))
        _assign(path, model, tensors)
    model.origin, model.method = found.base, method
    golden = info.get("golden") if check else None
    if (difference := differs(model, found.frontend, golden)) is not None:
        raise DataError(
            f"{path}: the model does not compute what it did when it was saved: a logit of the "
            f"golden sample differs by {difference:.2g}. The code of the method, or the software, "
            "has changed since; check=False loads it nevertheless"
        )
    return TrainedAdapter(
        model,
        found.classes,
        found.multi_label,
        found.frontend,
        info,
        path,
        found.scoring or Scoring(),
    )


def _make_shape(path: Path, config: ASTConfig, method: Method) -> AST:
    """Return the abstract model of a file, or explain why its method does not go with its model."""
    try:
        return surgery.clone(make_shape(config, method))
    except (AatjaxError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        why = f"{method} cannot be put on its model: {error}"
        raise DataError(f"{path}: damaged or changed: {printable(why[:500])}") from error


def _assign(path: Path, model: AST, tensors: Mapping[str, np.ndarray]) -> None:
    try:
        surgery.assign(model, tensors, what=str(path))
    except UsageError as error:
        raise DataError(str(error)) from error


def read_metadata(path: str | os.PathLike[str]) -> AdapterMetadata:
    """Return the metadata of an adapter file, checked but for its digest, which needs the tensors.

    Raises:
        DataError: the file is missing, damaged or of a newer format, or a field is out of range.
    """
    return _check_metadata(Path(path), _read_known(Path(path)))


def _read_known(path: Path) -> dict[str, Any]:
    """Return the raw metadata of a file whose format is known."""
    if not path.exists():
        raise DataError(f"{path}: no such file")
    info = read_info(path)
    if info is None:
        raise DataError(
            f"{path}: not an adapter file that aatjax wrote, or damaged (of a checkpoint of AAT or "
            "PETL_AST, aatjax convert makes one)"
        )
    number = info.get("format")
    if type(number) is not int or number < 1:
        raise DataError(
            f"{path}: damaged or changed: metadata.format={shorten(number)} is no version"
        )
    if number > FORMAT:
        versions = info.get("versions")
        wrote = versions.get("aatjax") if isinstance(versions, dict) else "unknown"
        raise DataError(
            f"{path}: format {shorten(number)} is newer than this aatjax reads ({FORMAT}): it was "
            f"written by aatjax {printable(str(wrote)[:40])}, install that or newer"
        )
    return info


def _check_metadata(path: Path, info: Mapping[str, Any]) -> AdapterMetadata:
    try:
        return AdapterMetadata.from_json(info)
    except (UsageError, DataError) as error:
        raise DataError(f"{path}: damaged or changed: {error}") from error


def _read_file(
    path: Path,
) -> tuple[dict[str, Any], AdapterMetadata, dict[str, np.ndarray]]:
    """Return metadata, raw and checked, and tensors of a file that is as it was written."""
    info = _read_known(path)
    try:
        with safe_open(path, "np") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            old_digest = file.metadata().get(DIGEST)
    except (SafetensorError, OSError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: damaged: {type(error).__name__}: {error}") from error
    _check_digest(path, info, tensors, old_digest)
    return info, _check_metadata(path, info), tensors


def _check_digest(
    path: Path, info: Mapping[str, Any], tensors: Mapping[str, np.ndarray], old: str | None
) -> None:
    """Refuse a file that is not as it was written; warn of metadata that no digest covers."""
    is_old = info["format"] == TENSORS_ONLY
    want, found = (old, hash_arrays(tensors)) if is_old else (info.get(DIGEST), None)
    if want is None:
        raise DataError(
            f"{path}: has no checksum, so nothing shows whether it is as it was written: get it "
            "from where it was made, or train again"
        )
    if want != (found or compute_digest(info, tensors)):
        raise DataError(
            f"{path}: damaged or changed: the checksum of its "
            f"{'tensors' if is_old else 'tensors and metadata (classes, calibration, figures)'} "
            "does not match: get it from where it was made, or write it again with "
            "aatjax.save_adapter"
        )
    if is_old:
        warnings.warn(
            f"{path}: of format {TENSORS_ONLY}, whose checksum does not cover class names, "
            "calibration and figures: where they are right, write it again with "
            "aatjax.save_adapter (extra=adapter.info), or train again",
            stacklevel=4,
        )
