"""The backbone of an adapter file: found again, or refused as another one."""

import os
from pathlib import Path

from aatjax import surgery
from aatjax.convert.known_weights import find_weights
from aatjax.convert.load import (
    EMBEDDED,
    find_embedded,
    load_model,
    reset_weights,
    select_load_options,
)
from aatjax.convert.memory import NAME
from aatjax.errors import AatjaxError, DataError, printable
from aatjax.io.hub import is_repository_id
from aatjax.models.ast import AST
from aatjax.models.config import ASTConfig
from aatjax.models.provenance import Origin
from aatjax.train.own_run import check_stored_path


def find_base(
    path: Path,
    base: str | os.PathLike[str] | AST | None,
    config: ASTConfig,
    origin: Origin,
    stored: set[str],
    *,
    own: bool,
) -> AST:
    """Return the backbone of an adapter file, the very one that it was trained on.

    Args:
        path: the adapter file, for messages.
        base: weights or a loaded model in place of what the file names, or None.
        config, origin: what the file states of its backbone.
        stored: the arrays that the file itself holds.
        own: whether the file lies in the folder of its run, see `lies_in_run`.

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
            model = load_base(base, config, origin, own=own)
        except AatjaxError as error:
            if base is not None:
                raise
            raise type(error)(
                f"{printable(path)}: its base model {origin.source!r} could not be loaded "
                f"({error}); give the weights with base="
            ) from error
    found = None if model.origin is None else model.origin.fingerprint
    if found != origin.fingerprint:
        raise DataError(
            f"{printable(path)}: was trained on base {origin.source!r} (fingerprint "
            f"{origin.fingerprint[:12]}), this base has {str(found)[:12]}: give those weights with "
            "base="
        )
    _check_shape(path, model.config, config)
    return model


def load_base(
    base: str | os.PathLike[str] | None, config: ASTConfig, origin: Origin, *, own: bool = False
) -> AST:
    """Load weights in the shape that an adapter was trained on, for it to bring its head.

    Args:
        base: the weights if they have moved since training, else None.
        config: their shape and how they are used.
        origin: where they were, and what was made of them.
        own: whether a path in `origin` may be followed, see `lies_in_run`.

    Raises:
        AatjaxError: see `aatjax.load`.
    """
    options = select_load_options(config)
    options["rgb"] = origin.rgb
    source = _find_source(origin, own) if base is None else base
    if source == "embedded":  # those of the version that wrote the file
        source = find_embedded(origin.fingerprint)
    model = load_model(
        source,
        config.num_classes,
        origin.revision if base is None else None,
        origin.seed,
        options,
        draw_head=False,
    )
    if origin.reset:
        reset_weights(model, origin.seed)
    return model


def _find_source(origin: Origin, own: bool) -> str:
    """Return what to load for an adapter file.

    A file may come from anybody, and a path in it is not one of its reader: it is followed only
    where the file lies in the folder of its run. Elsewhere names of the package and of the Hub are
    taken, and weights of the same fingerprint that were loaded on this machine before.

    Raises:
        DataError: it names a path and has come from elsewhere, or what nobody should open.
    """
    source = origin.source
    if source.startswith("random:") or source in (*EMBEDDED, NAME):
        return source
    if is_repository_id(source) and not Path(source).exists():
        return source
    if own:
        check_stored_path(source)
        return source
    if (known := find_weights(origin.fingerprint)) is not None:
        return str(known)
    raise DataError("a path in a file is followed only in the folder of the run that wrote it")


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
