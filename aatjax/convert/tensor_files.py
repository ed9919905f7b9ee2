"""Opens a file or folder of tensors in any form, without reading the numbers."""

import dataclasses
import functools
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn

from safetensors import SafetensorError, safe_open

from aatjax.convert.detect import guess_origin
from aatjax.convert.lazy_tensor import StoredTensor, read_array
from aatjax.convert.orbax import is_orbax, read_orbax
from aatjax.convert.torch_file import LEGACY_START, read_torch_legacy, read_torch_zip
from aatjax.errors import DataError, printable
from aatjax.io.foreign import HEAD, describe_foreign
from aatjax.io.json_file import parse_json, read_json_object

HEADER_LIMIT = 16 * 2**20
MOST_TENSORS = 20_000  # an AST of 64 blocks has about a thousand
JSON_LIMIT = 8 * 2**20
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_WRAPPERS = ("model", "state_dict", "model_state_dict")
_DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"},
    "BOOL": "bool",
}


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """The tensors of a checkpoint and what lies beside them.

    Attributes:
        path: what the user named.
        tensors: every tensor by its name in the file.
        metadata: text entries of a .safetensors header or of an `aatjax.json`.
        config: `config.json` beside the weights, if any.
        size: bytes of the weight files (Orbax compresses: bytes of the tensors).
        form: "safetensors", "torch", "orbax" or "memory".
    """

    path: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    config: dict[str, Any] | None
    size: int
    form: Literal["safetensors", "torch", "orbax", "memory"]


def open_tensors(path: Path) -> TensorFile:
    """Open .safetensors, `torch.save` files (.pth, .bin), folders of them and Orbax folders.

    The form is recognised by the content, not by the name.

    Raises:
        DataError: missing, damaged, of an unknown form, or a pickle that asks for more than
            tensors.
    """
    try:
        if path.is_dir():
            return _open_folder(path)
        return _open_one(path, path, read_description(path.parent / "config.json"))
    except FileNotFoundError as error:
        raise DataError(f"{error.filename or path}: no such file: check the path") from None
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def read_description(path: Path) -> dict[str, Any] | None:
    """Read a JSON object from a small file; None where there is no such file."""
    if not path.is_file():
        return None
    return read_json_object(path, limit=JSON_LIMIT, advice="fetch the file again")


def _open_folder(path: Path) -> TensorFile:
    if is_orbax(path):
        tensors, metadata = read_orbax(path)
        size = sum(4 * tensor.size for tensor in tensors.values())
        return TensorFile(path, tensors, metadata, None, size, "orbax")
    config = read_description(path / "config.json")
    name = next((name for name in WEIGHT_FILES if (path / name).is_file()), None)
    if name is None:
        others = sorted(f.name for f in path.iterdir() if f.suffix in (".safetensors", ".pth"))
        if len(others) != 1:
            found = ", ".join(others[:5]) or "neither"
            raise DataError(
                f"{path}: a folder of weights holds model.safetensors or pytorch_model.bin; "
                f"this one has {found}: name the file itself"
            )
        name = others[0]
    if not name.endswith(".index.json"):
        return _open_one(path, path / name, config)
    return _open_shards(path, name, config)


def _open_shards(path: Path, name: str, config: dict[str, Any] | None) -> TensorFile:
    """Join the shards that an `*.index.json` lists."""
    index = read_description(path / name) or {}
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
        raise DataError(f"{path / name}: no weight_map of tensor names to file names")
    tensors: dict[str, StoredTensor] = {}
    size = 0
    form: Literal["safetensors", "torch"] = "safetensors" if "safetensors" in name else "torch"
    for shard in sorted(set(places.values())):
        if Path(shard).name != shard or shard in (".", ".."):
            raise DataError(f"{path / name}: shard {shard[:80]!r} is not a plain file name")
        part = _open_one(path, path / shard, None)
        held = part.tensors
        if twice := sorted(set(held) & set(tensors)):
            raise DataError(f"{path / shard}: {twice[0]} is in another shard too")
        tensors |= held
        size += part.size
    if wrong := [key for key in places if key not in tensors]:
        raise DataError(
            f"{path / name}: {len(wrong)} tensors of the index are in no shard "
            f"({wrong[0][:80]!r} first): fetch the files again"
        )
    return TensorFile(path, tensors, {}, config, size, form)


def _open_one(named: Path, path: Path, config: dict[str, Any] | None) -> TensorFile:
    """Open one file of tensors; later messages name `named`."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(HEAD)
    if start.startswith(b"PK\x03\x04"):
        tensors = _state_dict(path, read_torch_zip(path))
    elif start.startswith(LEGACY_START):
        tensors = _state_dict(path, read_torch_legacy(path))
    elif start[8:9] == b"{":
        tensors, metadata = _open_safetensors(path)
        return TensorFile(named, tensors, metadata, config, size, "safetensors")
    else:
        _refuse_content(path, start)
    return TensorFile(named, tensors, {}, config, size, "torch")


def _refuse_content(path: Path, start: bytes) -> NoReturn:
    if not start:
        what: str | None = "the file is empty: fetch it again"
    elif start.startswith(b"\x80"):
        what = "a bare pickle, not a file of torch.save: refused, a pickle can run anything"
    else:
        what = describe_foreign(start, "the weights")
    other = "neither .safetensors nor a file of torch.save: truncated, or another format"
    raise DataError(f"{path}: {what or other}")


def _open_safetensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Open a .safetensors file whose header was checked."""
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > HEADER_LIMIT:
            raise DataError(
                f"{path}: declares a header of {length} bytes (limit {HEADER_LIMIT}): damaged, "
                "or not a file of weights"
            )
        if length + 8 > size:
            raise DataError(f"{path}: truncated inside its header: fetch the file again")
        header = file.read(length)
    try:
        entries = parse_json(header)
        if len(entries) > MOST_TENSORS:
            raise DataError(
                f"{path}: has {len(entries)} entries in its header, at most {MOST_TENSORS} are "
                "read: not a file of weights"
            )
        kinds = {k: v["dtype"] for k, v in entries.items() if k != "__metadata__"}
        if unknown := [f"{k[:80]} ({str(v)[:40]})" for k, v in kinds.items() if v not in _DTYPES]:
            raise DataError(
                f"{path}: {len(unknown)} tensors of a type that weights of AST never have, "
                f"{unknown[0]} first: convert them to float32"
            )
        with safe_open(path, framework="numpy") as checked:  # offsets, gaps, shapes, sizes
            metadata = dict(checked.metadata() or {})
    except DataError:
        raise
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise DataError(f"{path}: damaged .safetensors header ({reason})") from None
    except SafetensorError as error:
        raise DataError(
            f"{path}: damaged or truncated .safetensors ({printable(str(error)[:200])})"
        ) from None
    tensors = {}
    for key, kind in kinds.items():
        shape = tuple(entries[key]["shape"])
        begin, end = (8 + length + offset for offset in entries[key]["data_offsets"])
        load = functools.partial(read_array, path, begin, end - begin, _DTYPES[kind], shape)
        tensors[key] = StoredTensor(shape, _DTYPES[kind], load)
    return tensors, metadata


def _state_dict(path: Path, value: Any) -> dict[str, StoredTensor]:
    """The dictionary of tensors in an object that torch.save wrote."""
    if isinstance(value, dict) and not _is_state(value):
        inner = [key for key in _WRAPPERS if isinstance(value.get(key), dict)]
        if len(inner) == 1:
            value = value[inner[0]]
    if not isinstance(value, dict):
        kind = "tensor" if isinstance(value, StoredTensor) else type(value).__name__
        raise DataError(f"{path}: holds a {kind}, a dictionary of tensors was expected")
    if not _is_state(value):
        names = [str(key) for key in value]
        odd = next((k for k, v in value.items() if not isinstance(v, StoredTensor)), "")
        origin = guess_origin(names) or f"{str(odd)[:60]!r} is no tensor"
        shown = ", ".join(name[:40] for name in names[:4]) or "nothing"
        raise DataError(
            f"{path}: a dictionary of named tensors was expected; it holds {shown}: {origin}"
        )
    return value


def _is_state(value: dict[Any, Any]) -> bool:
    return bool(value) and all(
        isinstance(key, str) and isinstance(item, StoredTensor) for key, item in value.items()
    )
