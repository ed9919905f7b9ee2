"""Files that a stranger made: damaged at random and field by field, each reader explains them.

`MUTATIONS` is the number per reader. `AATJAX_FUZZ=2000 pytest -m slow tests/test_fuzz_files.py` is
the whole search; the default is a sample of it.
"""

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import struct
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzzing import Cases, run
from json_attacks import attack

from aatjax.config import load_config
from aatjax.errors import AatjaxError
from aatjax.export.verify import verify
from aatjax.reports.html.collect import _read_findings
from aatjax.train import adapter_file, prefix_cache

MUTATIONS = int(os.environ.get("AATJAX_FUZZ", "12"))
ATTACKS = 12 * MUTATIONS  # of those made field by field
HELD = Path(os.environ.get("AATJAX_FUZZ_FILES", "."))
"""Whole files that lie beside a damaged one; the process that reads has no memory to make them."""


@dataclasses.dataclass(frozen=True)
class Named:
    """Cases of several readers in turn, each file with the name of its reader before it."""

    parts: tuple[tuple[str, Cases], ...]

    def __len__(self) -> int:
        return sum(len(cases) for _, cases in self.parts)

    def __getitem__(self, index: int) -> bytes:
        for name, cases in self.parts:
            if index < len(cases):
                return name.encode() + b"\n" + cases[index]
            index -= len(cases)
        raise IndexError(index)


def read_any(path: Path) -> None:
    """Give a file to the reader that its first line names."""
    name, _, data = path.read_bytes().partition(b"\n")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        READERS[name.decode()](Path(folder), data)


def put_file(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


# Samples, made once a process.


@functools.cache
def make_native() -> bytes:
    from adapter_files import write_base
    from tiny_model import tiny_config

    with tempfile.TemporaryDirectory() as folder:
        config = tiny_config(dim=8, mlp_dim=8, frames=40, mels=32, pool="cls_dist")
        return write_base(Path(folder, "w.safetensors"), config=config).read_bytes()


@functools.cache
def make_hf() -> dict[str, bytes]:
    from aatjax.convert import read_checkpoint
    from aatjax.convert.write import write_hf

    with tempfile.TemporaryDirectory() as folder:
        native = put_file(Path(folder), "w.safetensors", make_native())
        read = read_checkpoint(native)
        write_hf(Path(folder, "hf"), read.params, read.config, ("dog", "cat", "a b"))
        return {path.name: path.read_bytes() for path in Path(folder, "hf").iterdir()}


@functools.cache
def make_adapter() -> tuple[bytes, dict[str, Any], dict[str, np.ndarray]]:
    """An adapter file, its metadata and its tensors; its base is `random:...`, never loaded."""
    from adapter_files import rewrite, trained
    from safetensors.numpy import load_file

    from aatjax import petl
    from aatjax.train.adapter_file import read_info

    with tempfile.TemporaryDirectory() as folder:
        base = put_file(Path(folder), "w.safetensors", make_native())
        model = trained(base, petl.SoftMoA(num_experts=2, reduction=4.0))
        frontend = dict(frames=40, mels=32)
        path = save_small(Path(folder, "a.safetensors"), model, frontend)
        rewrite(path, lambda info: info["base"].update(source="somewhere"))
        info = read_info(path)
        assert info is not None
        return path.read_bytes(), info, load_file(path)


def save_small(path: Path, model: Any, frontend: dict[str, int]) -> Path:
    from aatjax.audio.frontend import FrontEnd
    from aatjax.train.adapter_file import save_adapter

    decisions = dict(temperature=1.5, thresholds=None, quantile=0.5, coverage=0.9, clips=20)
    figure = dict(metric="accuracy", value=0.5, low=0.25, high=0.75, clips=12)
    extra = {"decisions": decisions, "test": figure, "about": {"shots": 4}}
    given = FrontEnd(**frontend, mean=-4.0, std=4.0)
    names = ("a", "b", "c")
    return save_adapter(path, model, classes=names, multi_label=False, frontend=given, extra=extra)


def make_pickle(tensors: dict[str, tuple[int, ...]]) -> bytes:
    """The pickle of a state dictionary, as torch writes it (protocol 2)."""
    parts = [b"\x80\x02}q\x00("]
    for number, (name, shape) in enumerate(tensors.items()):
        size = int(np.prod(shape))
        strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
        key = str(number)
        parts += [b"X" + struct.pack("<I", len(name)) + name.encode()]
        parts += [b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storage"]
        parts += [b"ctorch\nFloatStorage\nX" + struct.pack("<I", len(key)) + key.encode()]
        parts += [b"X\x03\x00\x00\x00cpu", pickle.dumps(size, 2)[2:-1], b"tQK\x00"]
        parts += [pickle.dumps(shape, 2)[2:-1], pickle.dumps(strides, 2)[2:-1]]
        parts += [b"\x89ccollections\nOrderedDict\n)RtR"]
    return b"".join([*parts, b"u."])


SHAPES = {"cls_token": (1, 1, 8), "v.blocks.0.norm1.weight": (8,), "mlp_head.1.weight": (3, 8)}


def make_torch_zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a/data.pkl", make_pickle(SHAPES))
        archive.writestr("a/byteorder", b"little")
        for number, shape in enumerate(SHAPES.values()):
            archive.writestr(f"a/data/{number}", bytes(4 * int(np.prod(shape))))
    return out.getvalue()


def make_torch_legacy() -> bytes:
    system = {"protocol_version": 1001, "little_endian": True}
    heads = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, system)]
    keys = [str(number) for number in range(len(SHAPES))]
    sizes = [int(np.prod(shape)) for shape in SHAPES.values()]
    data = [struct.pack("<q", size) + bytes(4 * size) for size in sizes]
    return b"".join([*heads, make_pickle(SHAPES), pickle.dumps(keys, 2), *data])


def make_archive(kind: str) -> bytes:
    out = io.BytesIO()
    files = {"a/1.wav": b"RIFF" + bytes(300), "a/b/2.txt": b"x" * 700, "empty": b""}
    if kind == "zip":
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as packed:
            for name, data in files.items():
                packed.writestr(name, data)
        return out.getvalue()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    data = out.getvalue()
    return gzip.compress(data, mtime=0) if kind == "tar.gz" else data


def make_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def sample(attacks: Sequence[Any]) -> list[Any]:
    """As many of the attacks as are asked for, the same in every process."""
    return random.Random(0).sample(list(attacks), min(len(attacks), ATTACKS))


ROWS = [
    {"path": "a.wav", "label": "dog", "fold": "1", "split": "train", "group": "s1"},
    {"path": "b.wav", "label": "cat", "fold": "2", "split": "test", "group": "s2"},
    {"path": "c.wav", "label": "rooster", "fold": "2", "split": "valid", "group": "s3"},
]
LONG = "9" * 5000
CSV = "\n".join([",".join(ROWS[0]), *(",".join(row.values()) for row in ROWS)]) + "\n"
CSV_ATTACKS = [
    *(
        f"path,label\na.wav,{cell}\nb.wav,x\n"
        for cell in (LONG, "\u00b2", "\u0663", "nan", "|", '"')
    ),
    "path,label\n" + "a.wav,x\n" * 3,
    "path,label,fold\na.wav,1,\u00b2\nb.wav,2," + LONG + "\n",
    "path,label\n" + "," * 10**5,
    ",".join(map(str, range(10**5))) + "\n",
    "path,label\n" + "x" * 200_000 + ",y\n",
    "path,label\r" + "a.wav,x\r",
    'path,label\n"a.wav,x\n' * 50,
    "path;label\n" + ";\n" * 20_000,
    "path,path\na.wav,b\n",
    "\ufeffpath,label\na.wav,x\0y\n",
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
JSON_ATTACKS = [
    '{"path": "a.wav", "label": NaN}\n{"path": "b.wav", "label": Infinity}\n',
    '{"path": "a.wav", "path": "b.wav", "label": "x"}\n',
    '{"path": "a.wav", "Path": "b.wav", "label": "x"}\n',
    '{"path": "a.wav", "label": ' + LONG + "}\n",
    '{"path": "a.wav", "label": 1e999}\n',
    '{"path": "a.wav", "label": "\\ud800"}\n',
    '{"path": ["a.wav"], "label": "x"}\n' + "[" * 10**5,
]


@functools.cache
def make_bundle() -> dict[str, Any]:
    """The entries of an export."""
    info = make_adapter()[1]
    names = ("classes", "multi_label", "frontend", "model", "method", "base", "versions")
    entries = {name: info[name] for name in (*names, "scoring", "golden", "test")}
    decisions = info["decisions"]
    entries |= {"to": "safetensors", "calibration": decisions, "format": 1, "kind": "export"}
    parity = {"tolerance": 1e-4, "by": "jax", "clips": [], "largest": {}, "probabilities": 0.0}
    files = {"a.bin": {"bytes": 0, "sha256": "0" * 64}}
    return entries | {"parity": parity, "files": files}


FACTS = {
    "format": 1,
    "name": "set",
    "classes": ["dog", "cat"],
    "multi_label": False,
    "clips": 2,
    "skipped": [["x.wav", "damaged"]],
    "notes": [["a.wav", "clipped"]],
    "duplicates": [],
}
PREPARED = [
    {"id": "a.wav", "label": [0], "fold": "1", "split": None, "group": "g", "part": "fold1"},
    {"id": "b.wav", "label": [1], "fold": "2", "split": None, "group": None, "part": "fold2"},
]
PREPARED = [{**row, "at": 0, "samples": 16, "sha256": "0" * 64} for row in PREPARED]


# Readers: a folder of their own, and the bytes.


def read_weights(folder: Path, data: bytes) -> None:
    from aatjax.convert import read_checkpoint

    read_checkpoint(put_file(folder, "w", data))


def read_hf(folder: Path, data: bytes, name: str) -> None:
    from aatjax.convert import read_checkpoint

    for other in HELD.glob("hf/*"):
        put_file(folder, other.name, data if other.name == name else other.read_bytes())
    read_checkpoint(folder)


def read_adapter(folder: Path, data: bytes) -> None:
    """All that `load_adapter` does before it loads a backbone."""
    path = put_file(folder, "adapter.safetensors", data)
    adapter_file.read_metadata(path)
    _, found, tensors = adapter_file._read_file(path)
    model = adapter_file._make_shape(path, found.model, found.method)
    adapter_file._assign(path, model, tensors)


def read_config(folder: Path, data: bytes) -> None:
    load_config(str(put_file(folder, "config.json", data)))


def read_manifest(folder: Path, data: bytes, name: str) -> None:
    from aatjax.data.manifest import Manifest

    for row in ROWS:
        put_file(folder, row["path"], b"")
    path = put_file(folder, name, data)
    Manifest(path, strict=False)
    Manifest(path)


def read_esc(folder: Path, data: bytes) -> None:
    from aatjax.data.folders import ESC

    put_file(folder, "audio/1-a.wav", b"")
    put_file(folder, "meta/esc50.csv", data)
    ESC(folder)


def read_names(folder: Path, data: bytes, name: str) -> None:
    from aatjax.data.class_names import read_class_names

    read_class_names(str(put_file(folder, name, data)))


def read_lists(folder: Path, data: bytes) -> None:
    from aatjax.audio.listing import find_sounds
    from aatjax.data.folders import read_list

    path = put_file(folder, "list.txt", data)
    find_sounds([str(path)])
    read_list(path)


def read_hub_table(folder: Path, data: bytes, name: str) -> None:
    from aatjax.data.huggingface.dataset import HuggingFace

    put_file(folder, "a.wav", b"")
    put_file(folder, name, data)
    HuggingFace(folder)


def read_quarantine(folder: Path, data: bytes) -> None:
    from aatjax.audio.decode import AudioError
    from aatjax.data.quarantine import write_quarantine
    from aatjax.data.source import Clip

    clip = Clip("a", (0,), "a.wav")
    path = put_file(folder, "quarantine.jsonl", data)
    write_quarantine(path, [clip], [(clip, AudioError("silent", "a"))])


def read_archive(folder: Path, data: bytes) -> None:
    from aatjax.io.archives import unpack_archive

    path = put_file(folder, "archive", data)
    try:
        unpack_archive(path, folder / "into")
    finally:
        for file in folder.rglob("*"):
            assert file.is_relative_to(folder) and not file.is_symlink()
        shutil.rmtree(folder / "into", ignore_errors=True)


def read_export(folder: Path, data: bytes) -> None:
    """Entries whose hashes are right: they are no signature."""
    from aatjax.export.manifest import read_bundle
    from aatjax.io.digest import hash_bytes, hash_json

    put_file(folder, "a.bin", b"")
    try:
        entries = json.loads(data.replace(b"0" * 64, hash_bytes(b"").encode()))
        sealed = make_json({**entries, "sha256": hash_json(entries)})
    except (TypeError, ValueError, RecursionError):
        sealed = data
    put_file(folder, "export.json", sealed)
    put_file(folder, "README.md", b"## Metrics\n\n- accuracy 0.500\n")
    read_bundle(folder)
    verify(folder)


def read_prepared(folder: Path, data: bytes) -> None:
    """The two files of a prepared set, the facts first; the checksum in them is right."""
    from aatjax.data.tfds import Prepared
    from aatjax.io.digest import hash_bytes

    facts, _, clips = data.partition(b"\n")
    with contextlib.suppress(TypeError, ValueError, RecursionError):
        facts = make_json({**json.loads(facts), "clips_sha256": hash_bytes(clips)})
    put_file(folder, "prepared.json", facts)
    put_file(folder, "clips.jsonl", clips)
    Prepared(folder)


def read_decoded(folder: Path, data: bytes) -> None:
    from aatjax.data.decode_cache import read_notes

    read_notes(put_file(folder, "entry.npy", data))


def read_tokens(folder: Path, data: bytes) -> None:
    """The three files of stored tokens, one after the other."""
    place = folder / "tokens"
    about, _, arrays = data.partition(b"\n")
    half = arrays.rfind(b"\x93NUMPY")
    put_file(place, "about.json", about)
    put_file(place, "tokens.npy", arrays[: max(half, 0)])
    put_file(place, "length.npy", arrays[max(half, 0) :])
    prefix_cache._read(place)


def read_scores(folder: Path, data: bytes) -> None:
    from aatjax.experiments.clip_scores import CLIP_SCORES, pool_clips, read_clip_scores

    put_file(folder, CLIP_SCORES, data)
    found = read_clip_scores(folder)
    pool_clips({(0, None): found})


def read_diagnosis(folder: Path, data: bytes) -> None:
    _read_findings(put_file(folder, "diagnosis.json", data))


READERS: dict[str, Callable[[Path, bytes], None]] = {
    "weights": read_weights,
    "hf config": functools.partial(read_hf, name="config.json"),
    "hf preprocessor": functools.partial(read_hf, name="preprocessor_config.json"),
    "adapter": read_adapter,
    "config": read_config,
    "manifest csv": functools.partial(read_manifest, name="m.csv"),
    "manifest jsonl": functools.partial(read_manifest, name="m.jsonl"),
    "esc": read_esc,
    "names csv": functools.partial(read_names, name="n.csv"),
    "names txt": functools.partial(read_names, name="n.txt"),
    "lists": read_lists,
    "hub csv": functools.partial(read_hub_table, name="metadata.csv"),
    "hub jsonl": functools.partial(read_hub_table, name="metadata.jsonl"),
    "quarantine": read_quarantine,
    "archive": read_archive,
    "export": read_export,
    "prepared": read_prepared,
    "decoded": read_decoded,
    "tokens": read_tokens,
    "scores": read_scores,
    "diagnosis": read_diagnosis,
}


def make_cases() -> dict[str, Cases]:
    """The samples and attacks of every reader."""
    from aatjax.train.adapter_file import encode_adapter

    adapter, info, tensors = make_adapter()
    hf = make_hf()
    native = make_native()

    def mutate(*samples: bytes, attacks: Sequence[bytes] = ()) -> Cases:
        return Cases(samples, tuple(sample(attacks)), MUTATIONS)

    def fields(value: Any, *more: bytes) -> Cases:
        return mutate(make_json(value), attacks=[*map(make_json, attack(value)), *more])

    def seal(value: Any) -> bytes:
        return encode_adapter(value, tensors)

    length = int.from_bytes(native[:8], "little")
    header = json.loads(native[8 : 8 + length])
    name = next(key for key in header if key != "__metadata__")
    described = json.loads(header["__metadata__"]["aatjax"])

    def head(value: Any) -> bytes:
        text = make_json(value)
        return struct.pack("<Q", len(text)) + text + native[8 + length :]

    natives = [head({**header, name: value}) for value in attack(header[name])]
    natives += [head({**header, "__metadata__": v}) for v in attack(header["__metadata__"])]
    for value in attack(described):
        natives.append(head({**header, "__metadata__": {"aatjax": json.dumps(value)}}))
    many = {f"k{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(99_000)}
    natives += [head({**header, **many}), struct.pack("<Q", 2**24) + b"[" * 2**24]
    npy = io.BytesIO()
    np.save(npy, np.zeros((2, 3), np.float32))
    notes = make_json(["clipped"])
    entry = io.BytesIO()
    np.save(entry, np.zeros(100, np.int16))
    entry_data = entry.getvalue() + notes + struct.pack("<I", len(notes))
    entry_data += hashlib.sha256(entry_data).digest()
    about = make_json({"dtype": "float32", "sha256": "0" * 64}) + b"\n"
    rows = b"".join(make_json(row) + b"\n" for row in PREPARED)
    prepared = make_json(FACTS) + b"\n"
    wrong_facts = [make_json(v) + b"\n" + rows for v in attack(FACTS)]
    wrong_rows = [prepared + make_json(v) + b"\n" for v in attack(PREPARED[0])]
    numbers = "index,mid,display_name\n0,/m/1,dog\n1,/m/2,cat\n"
    esc = "filename,fold,target,category,esc10,src_file,take\n1-a.wav,1,0,dog,True,1,A\n"
    hub = "file_name,label\na.wav,dog\n"
    csv_attacks = [text.encode("utf-8", "surrogatepass") for text in CSV_ATTACKS]
    json_attacks = [text.encode() for text in JSON_ATTACKS]
    lines = [make_json(v) + b"\n" for v in attack(ROWS[0])]
    hub_lines = make_json({"file_name": "a.wav", "label": "dog"}) + b"\n"
    scores = {"ids": ["a", "b"], "groups": ["g", None], "influence": [0.5, -0.5]}
    config = load_config("default").to_json()
    bombs = [b"\x80\x02" + part * 10**6 + b"." for part in (b"}", b"(", b"]", b"(}", b"N")]
    zips = []
    for bomb in bombs:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as packed:
            packed.writestr("a/data.pkl", bomb)
        zips.append(out.getvalue())
    old = [pickle.dumps(0x1950A86A20F9469CFC6C, 2) + bomb for bomb in bombs]
    return {
        "weights": mutate(
            native, make_torch_zip(), make_torch_legacy(), attacks=[*natives, *zips, *old]
        ),
        "hf config": fields(json.loads(hf["config.json"])),
        "hf preprocessor": fields(json.loads(hf["preprocessor_config.json"])),
        "adapter": mutate(adapter, attacks=[seal(v) for v in attack(info) if isinstance(v, dict)]),
        "config": fields(config),
        "manifest csv": mutate(CSV.encode(), attacks=csv_attacks),
        "manifest jsonl": mutate(LINES.encode(), attacks=[*json_attacks, *lines]),
        "esc": mutate(
            esc.encode(),
            attacks=[esc.replace(",0,", f",{c},").encode() for c in ("\u00b2", LONG, "-1", "nan")],
        ),
        "names csv": mutate(
            numbers.encode(),
            attacks=[
                numbers.replace("0,", f"{c},").encode() for c in ("\u00b2", LONG, "\u0663", "-1")
            ],
        ),
        "names txt": mutate(b"dog\ncat\n"),
        "lists": mutate(b"# list\na.wav\nb/c.wav\n"),
        "hub csv": mutate(hub.encode(), attacks=csv_attacks),
        "hub jsonl": mutate(hub_lines, attacks=json_attacks),
        "quarantine": mutate(LINES.encode(), attacks=json_attacks),
        "archive": mutate(*map(make_archive, ("zip", "tar", "tar.gz"))),
        "export": fields(make_bundle()),
        "prepared": mutate(prepared + rows, attacks=[*wrong_facts, *wrong_rows]),
        "decoded": mutate(entry_data),
        "tokens": mutate(about + npy.getvalue() + npy.getvalue()),
        "scores": fields(scores),
        "diagnosis": fields({"findings": [{"kind": "silent", "clips": ["a"]}]}),
    }


@pytest.mark.slow
def test_every_reader_explains_what_is_wrong_with_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = make_cases()
    put_file(tmp_path, "w.safetensors", make_native())
    for name, data in make_hf().items():
        put_file(tmp_path, f"hf/{name}", data)
    monkeypatch.setenv("AATJAX_FUZZ_FILES", str(tmp_path))
    assert set(found) == set(READERS)
    cases = Named(tuple(found.items()))
    report = run(read_any, cases, allowed=(AatjaxError,))  # pyright: ignore[reportArgumentType]
    print(report)
    assert not report.problems, "\n".join(report.problems)
    assert report.calls == len(cases)
    assert report.accepted >= sum(len(one.samples) for one in found.values()) // 2
