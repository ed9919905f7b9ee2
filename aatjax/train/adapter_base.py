"""The backbone of an adapter file: found again, or refused as another one."""

import os
from pathlib import Path

from aatjax import surgery
from aatjax.convert.load import load_model, reset_weights, select_load_options
from aatjax.errors import AatjaxError, DataError
from aatjax.models.ast import AST
from aatjax.models.config import ASTConfig
from aatjax.models.provenance import Origin

_DEVICES = [("/", "dev"), ("/", "proc"), ("/", "sys")]


def find_base(
    path: Path,
    base: str | os.PathLike[str] | AST | None,
    config: ASTConfig,
    origin: Origin,
    stored: set[str],
) -> AST:
    """Return the backbone of an adapter file, the very one that it was trained on.

    Args:
        path: the adapter file, for messages.
        base: weights or a loaded model in place of what the file names, or None.
        config, origin: what the file states of its backbone.
        stored: the arrays that the file itself holds.

    Raises:
        DataError: it is another one, or used in another way.
        AatjaxError: see `aatjax.load`.
    """
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
                "weights with base="
            ) from error
    found = None if model.origin is None else model.origin.fingerprint
    if found != origin.fingerprint:
        raise DataError(
            f"{path}: was trained on base {origin.source!r} (fingerprint "
            f"{origin.fingerprint[:12]}), this base has {str(found)[:12]}: give those weights with "
            "base="
        )
    _check_shape(path, model.config, config)
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
    if base is None:
        _check_stored_source(origin.source)
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


def _check_stored_source(source: str) -> None:
    """Refuse a place that the author of a file may not send its reader to.

    What is left is a name in the package, one of the Hub, or a file or folder of this machine.
    Reading that is safe: the readers execute and write nothing, and weights of another fingerprint
    are refused.
    """
    if source.startswith("random:") or source == "embedded":
        return
    path = Path(os.path.expanduser(source))
    if "://" in source or source.startswith(("//", "\\\\")) or "\0" in source:
        raise DataError("it is a network address, which is not opened because a file names it")
    inside = path.resolve().parts[:2]
    if path.exists() and (not (path.is_file() or path.is_dir()) or inside in _DEVICES):
        raise DataError("it is a device or a pipe, which is not opened because a file names it")


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
