"""Files of strangers: nothing runs, nothing is allocated on their word, damage is named."""

import contextlib
import io
import json
import os
import pickle
import struct
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from ast_oracle import original_tensors, random_hf_ast, write_layout
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from aatjax.convert import read_checkpoint, safe_pickle
from aatjax.convert.safe_pickle import read_pickle
from aatjax.convert.tensor_files import open_tensors
from aatjax.errors import AatjaxError, DataError


@pytest.fixture(scope="module")
def model():
    return random_hf_ast()


def refusal(path, **arguments):
    """The one line with which the file is refused, quickly and with little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(DataError) as caught:
            read_checkpoint(path, **arguments)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 60 * 2**20
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and len(message) < 2000
    return message


def zipped(path, value: bytes, members=(), compression=zipfile.ZIP_STORED):
    """A zip as torch.save writes it, around any pickle."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", value)
        archive.writestr("archive/byteorder", b"little")
        for name, data in members:
            archive.writestr(name, data)
    return path


def legacy(path, value: bytes):
    """The older form of torch.save around any pickle."""
    parts = [pickle.dumps(0x1950A86A20F9469CFC6C, 2), pickle.dumps(1001, 2)]
    parts += [pickle.dumps({"protocol_version": 1001, "little_endian": True}, 2), value]
    path.write_bytes(b"".join([*parts, pickle.dumps([], 2)]))
    return path


class Evil:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("inside", ["alone", "in_weights"])
def test_b19_malicious_pickle_runs_nothing(form, protocol, inside, tmp_path):
    sentinel = tmp_path / "sentinel"
    evil = Evil(os.system, f"touch {sentinel}")
    value = pickle.dumps(evil if inside == "alone" else {"cls_token": evil}, protocol)
    path = tmp_path / "evil.pth"
    if form == "bare":
        path.write_bytes(value)
    else:
        (zipped if form == "zip" else legacy)(path, value)
    message = refusal(path)
    assert not sentinel.exists()
    if form != "bare":
        assert "posix.system" in message and "nothing was run" in message
    pickle.loads(value)  # the trap is a real one
    assert sentinel.exists()


@pytest.mark.parametrize(
    "name",
    [
        "builtins.eval",
        "torch.load",
        "torch.hub.load",
        "torch.storage._load_from_bytes",
        "numpy.core.multiarray._reconstruct",
        "collections.OrderedDict.fromkeys",
        "torch._utils._rebuild_tensor_v2.__globals__",
        "argparse.Namespace",
    ],
)
def test_b20_unknown_globals_are_refused_by_name(name, tmp_path):
    module, attribute = name.rsplit(".", 1)
    value = f"\x80\x02c{module}\n{attribute}\n)R.".encode("latin-1")
    assert repr(name) in refusal(zipped(tmp_path / "a.pth", value))


def test_b20_allowed_names_are_never_really_called(tmp_path):
    for value, message in (
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "calls torch.FloatStorage"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", "with 0 arguments"),
        (b"\x80\x02ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01sb.", "dict expected"),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "uses opcode NEWOBJ"),
        (b"\x80\x02(K\x01ios\nsystem\n.", "uses opcode INST"),
        (b"\x80\x02\x82\x01.", "uses opcode EXT1"),
        (b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x00.", "truncated pickle"),
        (b"\x80\x02X\xff\xff\xff\x7fa.", "truncated pickle"),
        (b"\x80\x02K\x01r\xff\xff\xff\x7f.", "integer|holds a int|a int"),
        (b"\x80\x02", "truncated pickle"),
        (b"\x80\x02}(]K\x01u.", "dictionary key is a list"),
        (b"\x80\x02t.", "truncated pickle"),
    ):
        message_seen = refusal(zipped(tmp_path / "a.pth", value))
        assert any(part in message_seen for part in message.split("|")), message_seen


def test_a_pickle_of_too_many_values_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(safe_pickle, "MOST_OPCODES", 2000)
    content = b"\x80\x02" + 2001 * b"}" + b"."
    assert "more than 2,000 opcodes" in refusal(zipped(tmp_path / "a.pth", content))


@pytest.mark.parametrize("part", [b"}", b"]", b"(", b"N", b")", b"}(", b"K\x00\x85"])
def test_a_pickle_that_fills_the_memory_is_refused_at_once(part, tmp_path):
    """Neither values nor levels without end: the rest of such a pickle is not looked at."""
    content = b"\x80\x02" + part * (2**22 // len(part)) + b"."
    path = zipped(tmp_path / "a.pth", content)
    start = time.process_time()
    assert "values or 100 levels at a time" in refusal(path)
    assert time.process_time() - start < 2


def test_the_header_of_a_safetensors_file_is_read_in_linear_time(tmp_path):
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    names = [f'"k{i}":{entry}' for i in range(100_000)]
    path = tmp_path / "a.safetensors"
    for listed, why in ((names, "100000 entries"), ([*names, names[7]], "'k7' appears twice")):
        text = f"{{{','.join(listed)}}}".encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        start = time.process_time()
        with pytest.raises(DataError, match=why):
            open_tensors(path)
        assert time.process_time() - start < 4


def tensor_pickle(shape, strides, offset=0, count=4, key="0", storage="FloatStorage"):
    """A pickled dictionary of one tensor with any shape, strides, offset and storage."""
    sizes = [pickle.dumps(n, 2)[2:-1] for n in (tuple(shape), tuple(strides), offset, count)]
    return b"".join(
        [
            b"\x80\x02}X\x09\x00\x00\x00cls_tokenctorch._utils\n_rebuild_tensor_v2\n((",
            b"X\x07\x00\x00\x00storagectorch\n" + storage.encode() + b"\n",
            b"X" + struct.pack("<I", len(key)) + key.encode() + b"X\x03\x00\x00\x00cpu",
            sizes[3] + b"tQ" + sizes[2] + sizes[0] + sizes[1],
            b"\x89ccollections\nOrderedDict\n)RtRs.",
        ]
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(shape=(1, 4), strides=(4, -1)), "negative"),
        (dict(shape=(1, -4), strides=(4, 1)), "negative"),
        (dict(shape=(4,), strides=(1,), offset=-1), "negative"),
        (dict(shape=(10**12,), strides=(0,)), "overlapping"),
        (dict(shape=(2, 2), strides=(1, 1)), "overlapping"),
        (dict(shape=(3, 2), strides=(1, 2)), "overlapping"),
        (dict(shape=(10**6, 10**6), strides=(10**6, 1)), "outside its storage"),
        (dict(shape=(4,), strides=(1,), offset=1), "outside its storage"),
        (dict(shape=(10**30,), strides=(1,)), "outside its storage"),
        (dict(shape=(4,), strides=(1,), count=10**12), "the file holds 16 bytes"),
        (dict(shape=(4,), strides=(1,), storage="DoubleStorage"), "the file holds 16 bytes"),
        (dict(shape=(4,), strides=(1,), count=-4), "truncated pickle"),
        (dict(shape=(4,), strides=(1,), key="7"), "not in the file"),
        (dict(shape=(4,), strides=(1,), key="../../etc/passwd"), "not in the file"),
        (dict(shape=(4, 1), strides=(1,)), "2 axes and 1 strides"),
        (dict(shape=(1,) * 9, strides=(1,) * 9), "9 axes"),
        (dict(shape=("4",), strides=(1,)), "not integers"),
        (dict(shape=(True,), strides=(1,)), "not integers"),
    ],
)
def test_b20_dishonest_tensors_are_refused_before_allocation(arguments, message, tmp_path):
    data = np.arange(4, dtype=np.float32).tobytes()
    path = zipped(tmp_path / "a.pth", tensor_pickle(**arguments), [("archive/data/0", data)])
    assert message in refusal(path)


def test_honest_strides_are_read_as_torch_reads_them(tmp_path):
    data = np.arange(12, dtype=np.float32)
    for shape, strides, offset in (((4,), (1,), 0), ((3, 2), (1, 6), 1), ((2, 0), (5, 1), 12)):
        value = tensor_pickle(shape, strides, offset, count=12)
        path = zipped(tmp_path / "a.pth", value, [("archive/data/0", data.tobytes())])
        got = open_tensors(path).tensors["cls_token"].load()
        want = torch.as_strided(torch.from_numpy(data), shape, strides, offset)
        np.testing.assert_array_equal(got, want.numpy())


def test_b20_zips_that_torch_never_writes(model, tmp_path):
    value = tensor_pickle((4,), (1,))
    data = ("archive/data/0", bytes(16))
    path = zipped(tmp_path / "deflated.pth", value, [data], zipfile.ZIP_DEFLATED)
    assert "compressed" in refusal(path)
    bomb = ("archive/data/0", bytes(30 * 2**20))
    assert "compressed" in refusal(zipped(tmp_path / "bomb.pth", value, [bomb], 8))
    inner = zipped(tmp_path / "inner.pth", value, [data]).read_bytes()
    with zipfile.ZipFile(tmp_path / "nested.zip", "w") as archive:
        archive.writestr("weights/audioset.pth", inner)
    assert "unpack it first" in refusal(tmp_path / "nested.zip")
    assert "truncated pickle" in refusal(zipped(tmp_path / "as_pickle.pth", inner, [data]))
    with pytest.warns(UserWarning, match="Duplicate"):
        path = zipped(tmp_path / "twice.pth", value, [data, data])
    assert "twice" in refusal(path)
    path = zipped(tmp_path / "two.pth", value, [data, ("other/data.pkl", value)])
    assert "2 pickles" in refusal(path)
    path = zipped(tmp_path / "script.pth", value, [("archive/constants.pkl", b"")])
    assert "TorchScript" in refusal(path)
    big = zipped(tmp_path / "big.pth", value, [("archive/data/0", bytes(15))])
    assert "the file holds 15 bytes" in refusal(big)


def test_b20_declared_sizes_over_the_size_of_the_file(tmp_path):
    value = tensor_pickle((10**9,), (1,), count=10**9)
    path = zipped(tmp_path / "a.pth", value, [("archive/data/0", bytes(16))])
    raw = bytearray(path.read_bytes())
    at = raw.rindex(b"archive/data/0") - 46  # its entry in the central directory
    raw[at + 20 : at + 28] = struct.pack("<II", 4 * 10**9, 4 * 10**9)
    path.write_bytes(raw)
    assert "declares" in refusal(path)
    raw[at + 20 : at + 28] = struct.pack("<II", 300, 300)
    path.write_bytes(raw)
    assert "lies outside the file" in refusal(path)


def test_b20_storage_shared_by_many_tensors_is_refused(tmp_path):
    one = torch.zeros(3 * 128 * 128)
    path = tmp_path / "a.pth"
    many = random_hf_ast(intermediate_size=128, num_hidden_layers=6)
    named = original_tensors(many)
    for name, value in named.items():
        if value.ndim == 2 and "blocks" in name:
            named[name] = one[: value.numel()].view(value.shape)
    torch.save({n: v for n, v in named.items() if "v.head" not in n}, path)
    assert "share storage" in refusal(path)


def test_cut_anywhere_is_refused(model, tmp_path):
    for layout in ("original", "original_legacy", "hf"):
        path = write_layout(model, layout, tmp_path / layout)
        path = path / "model.safetensors" if path.is_dir() else path
        whole = path.read_bytes()
        for part in (0.0, 1e-4, 0.01, 0.3, 0.7, 0.999, 1 - 1 / len(whole)):
            (path.parent / "cut").write_bytes(whole[: int(len(whole) * part)])
            refusal(path.parent / "cut")


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_damaged_pickles_raise_nothing_but_data_errors(data):
    good = tensor_pickle((2, 2), (2, 1))
    raw = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        read_pickle(io.BytesIO(bytes(raw)), "x.pth")
    except AatjaxError as error:
        assert "\n" not in str(error)


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_raise_nothing_but_data_errors(raw):
    with contextlib.suppress(AatjaxError):
        read_pickle(io.BytesIO(b"\x80\x02" + raw), "x.pth")


# .safetensors


def header(path: Path, entries: bytes | dict, data=b"", length=None):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def test_b21_damaged_safetensors(tmp_path):
    path = tmp_path / "a.safetensors"
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    assert "header of 104857600 bytes" in refusal(header(path, b"{}", length=100 * 2**20))
    assert "truncated" in refusal(header(path, b"{}", length=1000))
    assert "damaged" in refusal(header(path, b"{nonsense"))
    assert "damaged" in refusal(header(path, b"{" + b'"a":{' * 50_000))
    text = json.dumps(entry).encode()
    double = b'{"a":' + text + b',"a":' + text + b"}"
    assert "'a' appears twice" in refusal(header(path, double, bytes(8)))
    overlap = {"a": entry, "b": {**entry, "data_offsets": [4, 12]}}
    assert "damaged" in refusal(header(path, overlap, bytes(12)))
    gap = {"a": entry, "b": {**entry, "data_offsets": [12, 20]}}
    assert "damaged" in refusal(header(path, gap, bytes(20)))
    assert "damaged" in refusal(header(path, {"a": {**entry, "shape": [2**60]}}, bytes(8)))
    assert "damaged" in refusal(header(path, {"a": entry}, bytes(4)))
    assert "damaged" in refusal(header(path, {"a": {**entry, "shape": [-2]}}, bytes(8)))
    assert "damaged" in refusal(header(path, {"a": 3}, bytes(8)))
    odd = {"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}
    assert "a (F8_E4M3) first: convert" in refusal(header(path, odd, bytes(8)))


def test_b21_tensors_of_integers_are_named(model, tmp_path):
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    tensors["classifier.dense.bias"] = torch.arange(5)
    save_file(tensors, tmp_path / "a.safetensors")
    message = refusal(tmp_path / "a.safetensors")
    assert "1 not of a floating type (classifier.dense.bias is int64)" in message


@pytest.mark.parametrize("layout", ["hf", "original", "ssast"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_f24_numbers_that_are_not_finite_are_refused_by_name(layout, value, tmp_path):
    model = random_hf_ast()
    with torch.no_grad():
        model.audio_spectrogram_transformer.layers[1].mlp.fc2.weight[3, 4] = value
    path = write_layout(model, layout, tmp_path / layout)
    message = refusal(path, frames=128, mels=128)
    name = "encoder.layer.1.output.dense" if layout == "hf" else "blocks.1.mlp.fc2"
    assert f"{name}.weight (1 of 24576)" in message
    got = read_checkpoint(path, frames=128, mels=128, allow_nan=True)
    assert np.count_nonzero(~np.isfinite(got.params["blocks/1/mlp/down/kernel"])) == 1


def test_f24_float64_too_large_for_float32_is_named(model, tmp_path):
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    tensors["classifier.dense.bias"] = torch.full((5,), 1e300, dtype=torch.float64)
    save_file(tensors, tmp_path / "a.safetensors")
    assert "classifier.dense.bias (5 of 5)" in refusal(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>Google Drive</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "Git LFS pointer"),
        (b"\x89HDF\r\n\x1a\n12345678", "HDF5"),
        (b"\x1f\x8b\x08 compressed", "unpack it first"),
        (b"RIFF1234WAVEfmt ", "a sound file"),
        (b'{"error": "not found"}', "JSON"),
        (bytes(range(9, 40)), "neither"),
    ],
)
def test_what_is_no_weight_file_is_named(content, message, tmp_path):
    (tmp_path / "a.pth").write_bytes(content)
    assert message in refusal(tmp_path / "a.pth")


def test_paths(tmp_path):
    assert "no such file" in refusal(tmp_path / "absent.pth")
    assert "a folder of weights holds" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{" * 100)
    (tmp_path / "model.safetensors").write_bytes(b"12345678{}")
    assert "JSON" in refusal(tmp_path)


def test_shards_stay_in_their_folder(model, tmp_path):
    path = write_layout(model, "hf_shards", tmp_path / "a")
    index = path / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    name = next(iter(fields["weight_map"]))
    for shard in ("../secret.safetensors", "/etc/passwd", ".."):
        index.write_text(json.dumps({"weight_map": {**fields["weight_map"], name: shard}}))
        assert "not a plain file name" in refusal(path)
    index.write_text(json.dumps({"weight_map": {**fields["weight_map"], "lost": "model.bin"}}))
    with pytest.raises(DataError, match=r"model\.bin: no such file"):
        read_checkpoint(path)
    index.write_text(
        json.dumps({"weight_map": {**fields["weight_map"], "lost": fields["weight_map"][name]}})
    )
    assert "'lost' first" in refusal(path)
