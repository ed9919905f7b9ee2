"""Orbax folders of canonical parameters with their `aatjax.json`."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from aatjax.convert.lazy_tensor import StoredTensor
from aatjax.errors import DataError
from aatjax.io.atomic import write_text
from aatjax.io.root_logger import keep_root_logger

DESCRIPTION = "aatjax.json"
DESCRIPTION_LIMIT = 8 * 2**20
PARAMS = "params"
_MARKS = ("_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt")


def is_orbax(path: Path) -> bool:
    """Whether the folder is an Orbax checkpoint, or one that aatjax wrote."""
    return (path / DESCRIPTION).is_file() or any((path / mark).exists() for mark in _MARKS)


@keep_root_logger()
def read_orbax(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Return the flat parameters of an Orbax folder and the text of its `aatjax.json`.

    The description lies in the folder, or beside the Orbax files one level up.

    Raises:
        DataError: no description, or a checkpoint that Orbax cannot read.
    """
    import orbax.checkpoint as ocp  # slow to import, and rarely needed

    root = path / PARAMS if (path / PARAMS).is_dir() else path
    places = (path / DESCRIPTION, path.parent / DESCRIPTION)
    description = next((place for place in places if place.is_file()), None)
    if description is None:
        raise DataError(
            f"{path}: an Orbax folder without {DESCRIPTION}, which describes the model: write it "
            "with aatjax, or name a .safetensors file"
        )
    if description.stat().st_size > DESCRIPTION_LIMIT:
        raise DataError(f"{description}: too large for a description")
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(root.absolute()).item_metadata.tree
            total = sum(math.prod(leaf.shape) for leaf in _flatten(tree).values())
            declared = 64 * sum(f.stat().st_size for f in root.rglob("*") if f.is_file())
            if total * 4 > max(declared, 2**30):
                raise DataError(f"{path}: declares {total} numbers, more than its files can hold")
            kinds = _map(tree, lambda _: ocp.RestoreArgs(restore_type=np.ndarray))
            arguments = ocp.args.PyTreeRestore(restore_args=kinds)
            values = _flatten(checkpointer.restore(root.absolute(), args=arguments))
    except DataError:
        raise
    except Exception as error:  # Orbax and TensorStore raise many kinds
        line = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: Orbax cannot read it ({line}): damaged or incomplete") from None
    if odd := [name for name, value in values.items() if not isinstance(value, np.ndarray)]:
        raise DataError(f"{path}: {odd[0]} is a {type(values[odd[0]]).__name__}, not an array")
    tensors = {
        name: StoredTensor(value.shape, str(value.dtype), lambda value=value: value)
        for name, value in values.items()
    }
    return tensors, {"aatjax": description.read_text(encoding="utf-8")}


@keep_root_logger()
def write_orbax_files(folder: Path, params: dict[str, np.ndarray], description: str) -> None:
    """Fill an existing empty folder: `params/` by Orbax, and the description."""
    import orbax.checkpoint as ocp

    write_text(folder / DESCRIPTION, description)
    tree: dict[str, Any] = {}
    for name, value in params.items():
        *folders, last = name.split("/")
        place = tree
        for part in folders:
            place = place.setdefault(part, {})
        place[last] = value
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute() / PARAMS, tree)
        checkpointer.wait_until_finished()


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by '/'-joined names; lists count like dictionaries of positions."""
    if isinstance(tree, list | tuple):
        tree = {str(i): part for i, part in enumerate(tree)}
    if not isinstance(tree, dict):
        return {prefix: tree}
    found: dict[str, Any] = {}
    for key, part in tree.items():
        found |= _flatten(part, f"{prefix}/{key}" if prefix else str(key))
    return found


def _map(tree: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(tree, dict):
        return {key: _map(part, function) for key, part in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_map(part, function) for part in tree)
    return function(tree)
