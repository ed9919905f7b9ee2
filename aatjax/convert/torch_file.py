"""`torch.save` files without PyTorch: the zip form and the older form behind a magic number.

Every offset, shape and stride is checked against the size of the file before anything is allocated;
tensors are read one by one, on demand.
"""

import functools
import io
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

from aatjax.convert.lazy_tensor import StoredTensor, make_dtype, read_array
from aatjax.convert.safe_pickle import TensorReference, read_pickle
from aatjax.errors import DataError

PICKLE_LIMIT = 64 * 2**20
MEMBER_LIMIT = 100_000
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_START = b"\x80\x02\x8a\x0a" + LEGACY_MAGIC.to_bytes(10, "little")
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")


def read_torch_zip(path: Path) -> Any:
    """Read a `torch.save` zip: its object with `StoredTensor`s in place of tensors.

    Raises:
        DataError: damaged, compressed, nested or dishonest about its sizes; or an unsafe pickle.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            members = _check_members(path, archive.infolist())
            root = _find_root(path, members)
            order = members.get(f"{root}byteorder")
            if order is not None and archive.read(order).strip() != b"little":
                raise DataError(f"{path}: big-endian tensors: save it again on a common machine")
            info = members[f"{root}data.pkl"]
            if info.file_size > PICKLE_LIMIT:
                raise DataError(
                    f"{path}: its pickle takes {info.file_size} bytes, weights need far fewer: "
                    "not a file of weights"
                )
            value = read_pickle(io.BytesIO(archive.read(info)), str(path))
            places = {
                name.removeprefix(f"{root}data/"): _locate_member(path, file, member)
                for name, member in members.items()
                if name.startswith(f"{root}data/")
            }
    except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, struct.error) as error:
        raise DataError(
            f"{path}: truncated or damaged zip ({error}): fetch the file again"
        ) from None
    except (NotImplementedError, RuntimeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a zip that torch.save writes ({error})") from None
    return _resolve(path, value, places)


def read_torch_legacy(path: Path) -> Any:
    """Read the form of `torch.save` before PyTorch 1.6, as `read_torch_zip` does.

    Raises:
        DataError: damaged, cut short, or an unsafe pickle.
    """
    where, size = str(path), path.stat().st_size
    with path.open("rb") as file:
        head = io.BytesIO(file.read(min(PICKLE_LIMIT, size)))
        magic, protocol, system = (read_pickle(head, where) for _ in range(3))
        if magic != LEGACY_MAGIC or protocol != 1001:
            raise DataError(f"{path}: not a torch.save file this reads (protocol {protocol!r})")
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise DataError(f"{path}: big-endian tensors: save it again on a common machine")
        value = read_pickle(head, where)
        keys = read_pickle(head, where)
        used = {found.storage.key: found.storage for _, found in _list_references(value)}
        if not isinstance(keys, list) or len(keys) != len(set(map(str, keys))):
            raise DataError(f"{path}: damaged list of storages")
        places: dict[str, tuple[int, int]] = {}
        position = head.tell()
        for key in keys:
            file.seek(position)
            count_bytes = file.read(8)
            if len(count_bytes) < 8 or key not in used:
                raise DataError(f"{path}: truncated or damaged at storage {str(key)[:40]!r}")
            (count,) = struct.unpack("<q", count_bytes)
            length = count * make_dtype(used[key].dtype).itemsize
            if count < 0 or position + 8 + length > size:
                raise DataError(f"{path}: truncated: storage {key!r} ends after the file")
            places[key] = (position + 8, length)
            position += 8 + length
    return _resolve(path, value, places)


def _check_members(path: Path, infos: list[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    """The members by name, once none is compressed, encrypted, doubled or larger than the file."""
    if len(infos) > MEMBER_LIMIT:
        raise DataError(f"{path}: {len(infos)} members in the zip: not a file of weights")
    members: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        shown = repr(info.filename[:80])
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise DataError(f"{path}: member {shown} is compressed, torch.save never does that")
        if info.flag_bits & 1:
            raise DataError(f"{path}: member {shown} is encrypted")
        if info.filename in members:
            raise DataError(f"{path}: member {shown} appears twice")
        members[info.filename] = info
    total, size = sum(info.file_size for info in infos), path.stat().st_size
    if total > size:
        raise DataError(f"{path}: declares {total} bytes of members in a file of {size} bytes")
    return members


def _find_root(path: Path, members: dict[str, zipfile.ZipInfo]) -> str:
    """The folder inside the zip that holds `data.pkl`."""
    pickles = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
    names = ", ".join(repr(name[:60]) for name in list(members)[:3])
    if not pickles:
        inner = [n for n in members if n.endswith((".pth", ".pt", ".bin", ".zip", ".safetensors"))]
        advice = "unpack it first" if inner else "not a file of torch.save"
        raise DataError(f"{path}: a zip without data.pkl (it holds {names}): {advice}")
    if len(pickles) > 1:
        raise DataError(f"{path}: {len(pickles)} pickles named data.pkl in one zip")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in members:
        raise DataError(
            f"{path}: a TorchScript program, not weights: save model.state_dict() instead"
        )
    return root


def _locate_member(path: Path, file: BinaryIO, info: zipfile.ZipInfo) -> tuple[int, int]:
    """Offset and number of the bytes of a stored member."""
    file.seek(info.header_offset)
    signature, *_, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    start = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    if signature != b"PK\x03\x04" or start + info.file_size > path.stat().st_size:
        raise DataError(f"{path}: member {info.filename[:80]!r} lies outside the file")
    return start, info.file_size


def _list_references(value: Any) -> list[tuple[str, TensorReference]]:
    """Every tensor reference in nested dictionaries and lists, with a name for messages."""
    found: list[tuple[str, TensorReference]] = []
    seen: set[int] = set()
    waiting: list[tuple[str, Any]] = [("", value)]
    while waiting:
        name, item = waiting.pop()
        if isinstance(item, TensorReference):
            found.append((name, item))
        elif isinstance(item, dict | list | tuple) and id(item) not in seen:
            seen.add(id(item))
            pairs = item.items() if isinstance(item, dict) else enumerate(item)
            waiting += [(f"{name}.{key}"[-200:] if name else str(key), part) for key, part in pairs]
    return found


def _resolve(path: Path, value: Any, places: dict[str, tuple[int, int]]) -> Any:
    """Replace tensor references by checked `StoredTensor`s, three levels of dictionaries deep."""
    for name, reference in _list_references(value):
        _check_tensor(path, name, reference, places)

    def replace(item: Any, depth: int) -> Any:
        if isinstance(item, TensorReference):
            return _make_tensor(path, item, places[item.storage.key])
        if isinstance(item, dict) and depth:
            return {key: replace(part, depth - 1) for key, part in item.items()}
        return item

    return replace(value, 3)


def _check_tensor(
    path: Path, name: str, reference: TensorReference, places: dict[str, tuple[int, int]]
) -> None:
    """Refuse a tensor whose shape, strides or storage do not fit the bytes in the file."""
    storage, offset = reference.storage, reference.offset
    shape, strides = reference.shape, reference.strides
    what = f"{path}: tensor {name[:80]!r}"
    for numbers in (shape, strides, (offset,)):
        if not isinstance(numbers, tuple) or not all(type(n) is int for n in numbers):
            raise DataError(f"{what} has a shape or stride that is not integers")
    if len(shape) != len(strides) or len(shape) > 8:
        raise DataError(f"{what} has {len(shape)} axes and {len(strides)} strides")
    if offset < 0 or min(shape, default=0) < 0 or min(strides, default=0) < 0:
        raise DataError(f"{what} has a negative size, stride or offset")
    if storage.key not in places:
        raise DataError(f"{what} points to storage {storage.key[:40]!r}, which is not in the file")
    if storage.count * make_dtype(storage.dtype).itemsize > places[storage.key][1]:
        raise DataError(
            f"{what} declares a storage of {storage.count} {storage.dtype}, the file holds "
            f"{places[storage.key][1]} bytes of it: truncated or damaged"
        )
    extent = 1
    for stride, length in sorted(zip(strides, shape, strict=True)):
        if length > 1 and stride < extent:
            raise DataError(f"{what} has overlapping strides {strides} for shape {shape}")
        extent += max(length - 1, 0) * stride
    if offset + (0 if 0 in shape else extent) > storage.count:
        raise DataError(
            f"{what} of shape {shape} reaches outside its storage of {storage.count} items"
        )


def _make_tensor(path: Path, reference: TensorReference, place: tuple[int, int]) -> StoredTensor:
    """A checked tensor, which reads the bytes from its first to its last number."""
    dtype, shape, strides = reference.storage.dtype, reference.shape, reference.strides
    width = make_dtype(dtype).itemsize
    extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    length = 0 if 0 in shape else extent * width
    begin = place[0] + reference.offset * width
    load = functools.partial(read_array, path, begin, length, dtype, shape, strides)
    return StoredTensor(shape, dtype, load)
