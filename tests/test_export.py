"""Exports: each passes its parity check or is refused with the reason; files open elsewhere."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_files import rewrite
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import aatjax
from aatjax import load, petl, surgery
from aatjax.audio.frontend import FrontEnd
from aatjax.cli.main import run as run_command
from aatjax.convert import write_native
from aatjax.errors import AatjaxError, DataError, UnavailableError, UsageError, WriteError
from aatjax.export import FORMATS, ExportMismatchError, export, read_bundle, verify, writer
from aatjax.export.inline_jaxpr import inline_calls
from aatjax.export.manifest import MANIFEST, seal_bundle
from aatjax.export.merged_model import MergedModel, ParityClips
from aatjax.export.model_card import markdown, scalar
from aatjax.export.parity import synthesize_clips
from aatjax.io.digest import hash_json
from aatjax.models.ast import AST, ASTConfig
from aatjax.petl import TABLE
from aatjax.petl.sites import list_blocks
from aatjax.train.adapter_file import save_adapter

TINY = ASTConfig(
    dim=32, depth=2, heads=2, mlp_dim=48, stride=(16, 16), frames=40, mels=32, num_classes=5
)
CLASSES = ("yes", "no", 'naïve, "quoted"\n<b>*\u202e')
FRONTEND = FrontEnd(frames=40, mels=32, mean=-5.5, std=3.25)
METHODS = [*TABLE, "aat_ms+lora", "lora+layer_norm"]
QUICK = {"soft_moa"}
"""One row that merges and one that stays beside the layers; all others are slow."""
PLAIN = {"linear", "partial", "bitfit", "layer_norm", "lora", "full", "lora+layer_norm"}

Make = Callable[..., Path]


def shrunk(name: str) -> petl.Method:
    """A row of the table in a size for a tiny model."""

    def one(method: petl.Method) -> petl.Method:
        small: dict[str, Any] = {"reduction": 8.0, "tokens": 4}
        names = {field.name for field in dataclasses.fields(method)}
        return method.replace(**{key: v for key, v in small.items() if key in names})

    if "+" in name:
        return petl.find_method("combined")(tuple(one(TABLE[part]) for part in name.split("+")))
    return one(TABLE[name])


def synthetic_clips(frontend: FrontEnd) -> ParityClips:
    return ParityClips.from_waveforms(frontend, *zip(*synthesize_clips(frontend), strict=True))


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Writes an adapter with random weights; the same one once for the same arguments."""
    folder = tmp_path_factory.mktemp("adapters")
    for blocks in (1, 2):
        config = dataclasses.replace(TINY, depth=blocks)
        arrays = surgery.arrays(AST(config, rngs=nnx.Rngs(0)))
        write_native(folder / f"base{blocks}.safetensors", arrays, config)
    made: dict[str, Path] = {}

    def adapter(
        method: str | petl.Method = "lora",
        frontend: FrontEnd = FRONTEND,
        extra: dict[str, Any] | None = None,
        classes: tuple[str, ...] = CLASSES,
        depth: int = 2,
        **options: Any,
    ) -> Path:
        key = repr((method, frontend, extra, depth, options))
        if key in made:
            return made[key]
        options = {"num_classes": 3, **options}
        found = shrunk(method) if isinstance(method, str) else method
        model = petl.adapt(load(folder / f"base{depth}.safetensors", **options), found, seed=3)
        rng = np.random.default_rng(0)
        for value in surgery.variables(model).values():
            if isinstance(value, nnx.Param):
                change = 0.2 * rng.normal(size=value.shape)
                value[...] = value[...] + jnp.asarray(change, jnp.float32)
        path = folder / f"{len(made)}.safetensors"
        save_adapter(
            path, model, classes=classes, multi_label=False, frontend=frontend, extra=extra
        )
        made[key] = path
        return path

    return adapter


def truth(path: Path) -> tuple[MergedModel, ParityClips, np.ndarray]:
    """The adapter's own logits of the sounds of the parity check."""
    adapter = aatjax.load_adapter(path)
    merged = MergedModel.from_adapter(adapter)
    clips = synthetic_clips(adapter.frontend)
    features, valid = jnp.asarray(clips.features), jnp.asarray(clips.valid)
    return merged, clips, np.asarray(jax.jit(adapter.model.__call__)(features, valid))


# Every method and every format.


@pytest.mark.parametrize(
    "name", [pytest.param(m, marks=[pytest.mark.slow] * (m not in QUICK)) for m in METHODS]
)
def test_every_method_passes_its_parity_check_or_is_refused(
    name: str, make: Make, tmp_path: Path, record_property: Any
) -> None:
    path = make(name, depth=1)
    adapter = aatjax.load_adapter(path)
    for to in set(FORMATS) - {"web"}:  # the same graphs as onnx: tests/test_demo.py
        out = tmp_path / to
        holds = to in ("onnx", "stablehlo") or (name in PLAIN and to != "peft")
        holds |= (name, to) == ("ridge", "safetensors")  # Hugging Face's AST has no such pooling
        if not holds and (name, to) != ("lora", "peft"):
            with pytest.raises(UsageError, match=r"onnx.*stablehlo") as caught:
                export(adapter, to, out)
            why = "it pools stats" if (name, to) == ("ridge", "hf") else shrunk(name).name
            assert "\n" not in str(caught.value) and why in str(caught.value)
            assert not out.exists()
            continue
        done = export(adapter, to, out, platforms=("cpu",), tolerance=1e-4)
        record_property(to, max(done.largest.values()))
        entries = read_bundle(out)
        assert entries["to"] == to and entries["classes"] == list(CLASSES)
        assert entries["parity"]["largest"] == done.largest
        card = (out / "README.md").read_text(encoding="utf-8")
        assert card.startswith("---\n")
        assert str(path.parent) not in (out / MANIFEST).read_text() + card
        if name in ("lora", "soft_moa"):
            assert verify(out).largest < 1e-4
    assert not [p for p in tmp_path.iterdir() if p.name not in FORMATS]


def test_the_export_is_of_the_adapted_model_not_of_its_base(make: Make, tmp_path: Path) -> None:
    path = make("lora")
    export(path, "safetensors", tmp_path / "out")
    merged, clips, want = truth(path)
    model = load(tmp_path / "out" / "model.safetensors")
    features = jnp.asarray(clips.features)
    assert model.labels == CLASSES
    assert model.statistics == (FRONTEND.mean, FRONTEND.std)
    np.testing.assert_allclose(jax.jit(model.__call__)(features), want, atol=1e-4)
    bare = surgery.clone(merged.adapted)
    factors = {k: np.zeros(v.shape) for k, v in surgery.arrays(bare).items() if "lora_b" in k}
    surgery.assign(bare, factors, what="no LoRA")
    assert np.abs(np.asarray(jax.jit(bare.__call__)(features)) - want).max() > 1e-2


# Hugging Face.


def test_transformers_opens_the_folder_with_equal_logits(make: Make, tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    out = tmp_path / "out"
    path = make("lora")
    done = export(path, "hf", out)
    assert done.by.startswith("transformers") and set(done.largest) == {"log-mel", "waveform"}
    _, clips, want = truth(path)
    model = transformers.AutoModelForAudioClassification.from_pretrained(out).eval()
    extractor = transformers.AutoFeatureExtractor.from_pretrained(out)
    assert [model.config.id2label[i] for i in range(3)] == list(CLASSES)
    assert (extractor.mean, extractor.std, extractor.max_length) == (-5.5, 3.25, 40)
    for number, length in enumerate(clips.length):
        wave = clips.waveform[number, :length]
        features = extractor(wave, sampling_rate=16000, return_tensors="pt")["input_values"]
        with torch.no_grad():
            logits = model(features).logits.numpy()
        np.testing.assert_allclose(logits[0], want[number], atol=1e-4)
    # And back into aatjax.
    again = load(out)
    assert again.labels == CLASSES
    np.testing.assert_allclose(again(jnp.asarray(clips.features)), want, atol=1e-4)


def test_without_transformers_the_folder_is_read_by_aatjax(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aatjax.export.hugging_face.find_spec", lambda name: None)
    done = export(make("lora"), "hf", tmp_path / "out")
    assert "not installed" in done.by and max(done.largest.values()) < 1e-4


@pytest.mark.parametrize("to", ["hf", pytest.param("peft", marks=pytest.mark.slow)])
def test_what_hugging_face_cannot_express_is_refused(to: str, make: Make, tmp_path: Path) -> None:
    if to == "peft":
        pytest.importorskip("peft")
    for options, word in (
        ({"pool": "mean_all"}, "mean_all"),
        ({"head_norm": False}, "LayerNorm"),
        ({"mask_padding": True}, "masks padding"),
    ):
        with pytest.raises(UsageError, match=f"{word}.*onnx.*stablehlo"):
            export(make("lora", **options), to, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_other_fillings_are_noted(make: Make, tmp_path: Path) -> None:
    for pad in ("repeat", "silence"):
        path = make("linear", dataclasses.replace(FRONTEND, pad=pad))
        done = export(path, "hf", tmp_path / pad)
        assert any("short clips" in note for note in done.notes)
        assert "Note: short clips" in (tmp_path / pad / "README.md").read_text(encoding="utf-8")


# PEFT.


@pytest.mark.slow
def test_peft_opens_the_files_with_equal_logits(make: Make, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    _, clips, _ = truth(make("lora"))
    for method in (
        petl.LoRA(reduction=8),
        petl.LoRA(reduction=4, targets="qkvo", alpha=3.5, scale="alpha/reduction"),
        petl.LoRA(reduction=8, as_published=True),
        petl.LoRA(reduction=8, blocks="last1"),
        petl.LoRA(rank=2, targets=("v", "up", "down")),
    ):
        path, out = make(method), tmp_path / str(hash(method))
        _, clips, want = truth(path)
        done = export(path, "peft", out)
        assert all(given.startswith("transformers-5") for given in done.largest)
        base = transformers.ASTForAudioClassification.from_pretrained(out / "base").eval()
        features = torch.tensor(clips.features)
        with torch.no_grad():
            bare = base(features).logits.numpy()
            model = peft.PeftModel.from_pretrained(base, str(out / "transformers-5")).eval()
            found = model(features).logits.numpy()
            merged = model.merge_and_unload()(features).logits.numpy()
        assert not bare.any()  # its head is empty: everything must come from the adapter
        np.testing.assert_allclose(found, want, atol=1e-4)
        np.testing.assert_allclose(merged, want, atol=1e-4)
        old = load_file(out / "transformers-4" / "adapter_model.safetensors")
        new = load_file(out / "transformers-5" / "adapter_model.safetensors")
        blocks = len(list_blocks(method, 2))
        assert len(old) == len(new) == 2 * blocks * len(method.targets) + 4
        for one, other in zip(sorted(old), sorted(new), strict=True):
            assert one.count("lora_A") == other.count("lora_A")
        name = "encoder.layer.1.attention.attention.value.lora_B.weight"
        place = "base_model.model.audio_spectrogram_transformer"
        np.testing.assert_array_equal(
            old[f"{place}.{name}"], new[f"{place}.layers.1.attention.v_proj.lora_B.weight"]
        )


OLD_TRANSFORMERS = """
import sys, numpy as np, torch, transformers
from peft import PeftModel
assert transformers.__version__.startswith("4.")
base = transformers.ASTForAudioClassification.from_pretrained(sys.argv[1] + "/base")
model = PeftModel.from_pretrained(base, sys.argv[1] + "/transformers-4").eval()
plain = transformers.ASTForAudioClassification.from_pretrained(sys.argv[2]).eval()
features = torch.tensor(np.load(sys.argv[3]))
with torch.no_grad():
    np.savez(sys.argv[4], peft=model(features).logits, hf=inline_calls(features).logits)
"""


@pytest.mark.slow
def test_transformers_4_opens_both(make: Make, tmp_path: Path) -> None:
    """With AATJAX_TRANSFORMERS_4, a folder from `pip install --target` of transformers 4.

    It may not run: an environment holds one version of transformers, and `[test]` installs 5, with
    which the test above opens the same files.
    """
    library = os.environ.get("AATJAX_TRANSFORMERS_4")
    if not library:
        pytest.skip(
            "an environment holds one version of transformers, here 5: set AATJAX_TRANSFORMERS_4 "
            "to a folder with 4"
        )
    path = make(petl.LoRA(reduction=4, targets="qkvo"))
    export(path, "peft", tmp_path / "peft")
    export(path, "hf", tmp_path / "hf")
    _, clips, want = truth(path)
    np.save(tmp_path / "x.npy", clips.features)
    names = [str(tmp_path / name) for name in ("peft", "hf", "x.npy", "y.npz")]
    subprocess.run(
        [sys.executable, "-c", OLD_TRANSFORMERS, *names],
        check=True,
        env={**os.environ, "PYTHONPATH": library},
    )
    found = np.load(tmp_path / "y.npz")
    for name in ("peft", "hf"):
        np.testing.assert_allclose(found[name], want, atol=1e-4)


# ONNX.


@pytest.mark.parametrize(
    ("pad", "masks"),
    [
        pytest.param("log_mel_zero", False, marks=pytest.mark.slow),
        ("silence", True),
        pytest.param("repeat", False, marks=pytest.mark.slow),
    ],
)
def test_onnxruntime_gives_equal_logits_for_every_batch(
    pad: Any, masks: bool, make: Make, tmp_path: Path
) -> None:
    pytest.importorskip("jax2onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    path = make("soft_moa", dataclasses.replace(FRONTEND, pad=pad), mask_padding=masks)
    out = tmp_path / "out"
    export(path, "onnx", out)
    _, clips, want = truth(path)
    wave = onnxruntime.InferenceSession(str(out / "waveform.onnx"))
    mel = onnxruntime.InferenceSession(str(out / "log_mel.onnx"))
    assert [i.name for i in wave.get_inputs()] == ["waveform", "length"]
    assert [i.name for i in mel.get_inputs()] == ["log_mel", *(["valid"] if masks else [])]
    for rows in (slice(0, 1), slice(1, 4), slice(0, 4), [2, 2, 1, 0, 3, 3, 3]):
        some = clips[rows]
        (found,) = wave.run(
            None, {"waveform": some.waveform, "length": some.length.astype(np.int64)}
        )
        np.testing.assert_allclose(found, want[rows], atol=1e-4)
        given = {"log_mel": some.features} | ({"valid": some.valid} if masks else {})
        np.testing.assert_allclose(mel.run(None, given)[0], want[rows], atol=1e-4)
    # The weights lie there once, beside both graphs.
    assert (out / "weights.data").stat().st_size > 20 * (out / "log_mel.onnx").stat().st_size / 100
    assert "weights.data" in read_bundle(out)["files"]


def test_the_front_end_graph_gives_the_log_mel(tmp_path: Path) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    from aatjax.export.onnx_frontend import make_front_end_nodes

    frontend = FrontEnd(frames=98, mels=128)
    nodes, constants = make_front_end_nodes(frontend, "x", "n")
    make_info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "front_end",
        [make_info("waveform", 1, ["b", frontend.samples]), make_info("length", 7, ["b"])],
        [make_info("x", 1, ["b", 98, 128]), make_info("n", 6, ["b"])],
        constants,
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    clips = synthetic_clips(frontend)
    loud = ParityClips.from_waveforms(frontend, ["loud"], [np.full(9000, 32767, np.int16)])
    for some in (clips, loud):
        x, count = session.run(
            None, {"waveform": some.waveform, "length": some.length.astype(np.int64)}
        )
        np.testing.assert_allclose(x, some.features, atol=2e-5)
        np.testing.assert_array_equal(count, some.valid)


# Programs.


ELSEWHERE = """
import sys, jax, jax.export, numpy as np
from safetensors.numpy import load_file
folder, given, out = sys.argv[1:]
weights, x = load_file(folder + "/weights.safetensors"), np.load(given)
found = {}
for name, values in (("waveform", ("waveform", "length")), ("log_mel", ("features", "valid"))):
    with open(f"{folder}/cpu_{name}.jaxexport", "rb") as file:
        program = jax.export.deserialize(bytearray(file.read()))
    for batch in (1, 2, 4):
        found[f"{name}{batch}"] = program.call(weights, *(x[v][:batch] for v in values))
assert not [name for name in sys.modules if name.startswith(("aatjax", "flax"))]
np.savez(out, **found)
"""


@pytest.mark.slow
def test_programs_run_in_a_process_without_aatjax(make: Make, tmp_path: Path) -> None:
    path, out = make("soft_moa"), tmp_path / "out"
    done = export(path, "stablehlo", out)
    assert done.by.endswith("not run: cuda, tpu")
    names = {f"{p}_{i}.jaxexport" for p in ("cpu", "cuda", "tpu") for i in ("log_mel", "waveform")}
    assert names | {"weights.safetensors"} == set(read_bundle(out)["files"])
    for name in names:
        program = jax.export.deserialize(bytearray((out / name).read_bytes()))
        assert program.platforms == (name.split("_")[0],)
    _, clips, want = truth(path)
    np.savez(
        tmp_path / "x.npz",
        waveform=clips.waveform,
        length=clips.length,
        features=clips.features,
        valid=clips.valid,
    )
    arguments = [str(out), str(tmp_path / "x.npz"), str(tmp_path / "y.npz")]
    subprocess.run([sys.executable, "-c", ELSEWHERE, *arguments], check=True)
    found = np.load(tmp_path / "y.npz")
    assert len(found.files) == 6
    for name in found.files:
        np.testing.assert_allclose(found[name], want[: int(name[-1])], atol=1e-4)


@pytest.mark.slow
def test_padding_is_masked_in_programs_too(make: Make, tmp_path: Path) -> None:
    path = make("aat_ms", dataclasses.replace(FRONTEND, pad="repeat"), mask_padding=True)
    export(path, "stablehlo", tmp_path / "repeat", platforms=("cpu",))
    path = make("aat_ms", mask_padding=True)
    export(path, "stablehlo", tmp_path / "out", platforms=("cpu",))
    export(path, "onnx", tmp_path / "onnx")
    _, clips, want = truth(path)
    unmasked = np.asarray(aatjax.load_adapter(path).model(jnp.asarray(clips.features)))
    assert np.abs(unmasked - want).max() > 5e-3  # so the parity check would fail
    # No file says where on whose machine it was made.
    places = [os.fsencode(path) for path in (Path(aatjax.__file__).parent, sys.prefix, tmp_path)]
    for file in (*(tmp_path / "out").iterdir(), *(tmp_path / "onnx").iterdir()):
        assert not any(place in file.read_bytes() for place in places), file.name


def test_platforms_that_cannot_be_checked_are_refused(make: Make, tmp_path: Path) -> None:
    for platforms, word in ((("tpu",), "could be checked"), (("gpu",), "cuda"), ((), "cuda")):
        with pytest.raises(UsageError, match=word):
            export(make("lora"), "stablehlo", tmp_path / "out", platforms=platforms)
    assert not list(tmp_path.iterdir())


def test_plain_programs_hold_no_kernel_and_no_choice(tmp_path: Path) -> None:
    """A model large enough that attention chooses by platform."""
    config = dataclasses.replace(
        TINY, dim=128, depth=2, frames=400, mels=128, stride=(4, 4), patch=(16, 16)
    )
    model = AST(config, rngs=nnx.Rngs(0))
    shape = jax.ShapeDtypeStruct((1, 400, 128), jnp.float32)
    before = str(jax.make_jaxpr(lambda x: model(x))(shape))
    after = str(jax.make_jaxpr(inline_calls(lambda x: model(x), shape))(shape))
    assert "by_platform" in before and "custom_vjp" in before
    for word in ("by_platform", "platform_index", "cond", "custom_vjp", "pallas", "jit", "scan"):
        assert not re.search(rf"\b{word}\w*\[", after), word


def test_plain_computes_the_same() -> None:
    def function(x: Any, tree: Any) -> Any:
        y = jax.nn.gelu(jnp.pad(x, ((1, 2), (0, 0), (3, 0)), constant_values=2.0))
        negative = jnp.roll(jax.lax.pad(y, 0.0, ((0, 0, 1), (-1, 0, 0), (0, 0, 0))), 1)
        return {"a": negative * tree["w"], "b": (jax.nn.relu(x).sum(),)}

    x, tree = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)), jnp.float32), {"w": 3.0}
    want, found = function(x, tree), inline_calls(function, x, tree)(x, tree)
    assert jax.tree.structure(found) == jax.tree.structure(want)
    assert jnp.array_equal(found["a"], want["a"])
    assert found["b"][0] == want["b"][0]


# The parity check.


def damaged(to: str, change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a format's files be changed between writing and checking."""
    kind = FORMATS[to]

    def write(folder: Path, merged: MergedModel, **options: Any) -> tuple[str, ...]:
        notes = kind.write(folder, merged, **options)
        change(folder)
        return notes

    monkeypatch.setitem(writer.FORMATS, to, dataclasses.replace(kind, write=write))


def change_a_tensor(path: Path, part: str) -> None:
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    name = next(name for name in tensors if part in name)
    noise = np.random.default_rng(0).normal(size=tensors[name].shape)
    tensors[name] = tensors[name] + np.float32(0.1) * noise.astype(np.float32)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("to", "file", "part"),
    [
        ("safetensors", "model.safetensors", "blocks/1/mlp/down/kernel"),
        pytest.param("hf", "model.safetensors", "attention.query.weight", marks=pytest.mark.slow),
        pytest.param(
            "peft",
            "transformers-5/adapter_model.safetensors",
            "lora_A",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "peft", "base/model.safetensors", "output.dense.weight", marks=pytest.mark.slow
        ),
        pytest.param(
            "stablehlo", "weights.safetensors", "head/linear/bias", marks=pytest.mark.slow
        ),
        ("onnx", "weights.data", ""),
    ],
)
def test_the_parity_check_refuses_changed_weights(
    to: str, file: str, part: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(folder: Path) -> None:
        if part:
            return change_a_tensor(folder / file, part)
        values = np.fromfile(folder / file, np.float32)
        (values * np.float32(1.05)).tofile(folder / file)
        return None

    damaged(to, change, monkeypatch)
    with pytest.raises(
        ExportMismatchError, match=r"away from the model's.*tolerance 0\.0001"
    ) as caught:
        export(make("lora"), to, tmp_path / "out", platforms=("cpu",))
    assert caught.value.exit_code == 1 and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    export(make("lora"), to, tmp_path / "out", platforms=("cpu",), tolerance=10.0)


def test_the_parity_check_refuses_another_front_end(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(folder: Path) -> None:
        path = folder / "preprocessor_config.json"
        path.write_text(path.read_text().replace("-5.5", "-4.5"))

    damaged("hf", change, monkeypatch)
    with pytest.raises(ExportMismatchError, match="from waveform"):
        export(make("lora"), "hf", tmp_path / "out")


def test_the_parity_check_refuses_what_is_not_finite(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = FORMATS["safetensors"]

    def nothing(*args: Any) -> Any:
        found, by = kind.run(*args)
        return {given: value * np.nan for given, value in found.items()}, by

    monkeypatch.setitem(writer.FORMATS, "safetensors", dataclasses.replace(kind, run=nothing))
    with pytest.raises(ExportMismatchError, match="nan"):
        export(make("lora"), "safetensors", tmp_path / "out")
    for tolerance in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="tolerance"):
            export(make("lora"), "safetensors", tmp_path / "out", tolerance=tolerance)


def test_given_files_are_what_is_compared_on(make: Make, tmp_path: Path) -> None:
    import soundfile

    name = tmp_path / "dog <x>.wav"
    soundfile.write(name, np.random.default_rng(0).normal(size=3000) * 0.1, 16000)
    export(make("lora"), "safetensors", tmp_path / "out", check=[name])
    assert read_bundle(tmp_path / "out")["parity"]["clips"][:-1] == ["dog <x>.wav"]
    with pytest.raises(AatjaxError, match=r"gone\.wav"):
        export(make("lora"), "safetensors", tmp_path / "other", check=[tmp_path / "gone.wav"])


@pytest.mark.slow
def test_half_precision_is_exported_in_float32(make: Make, tmp_path: Path) -> None:
    path = make("lora", dtype="bfloat16")
    for to in ("hf", "safetensors"):
        done = export(path, to, tmp_path / to)
        assert max(done.largest.values()) < 1e-4
    assert verify(path).allowed >= 0.05


# Bundles (B28).


@pytest.fixture
def bundle(make: Make, tmp_path: Path) -> Path:
    export(make("lora"), "safetensors", tmp_path / "out")
    return tmp_path / "out"


def test_a_changed_file_of_a_bundle_is_refused(bundle: Path) -> None:
    (bundle / "README.md").write_text("my own words")  # the card is anybody's
    assert verify(bundle).largest < 1e-4
    path = bundle / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"model\.safetensors: was changed after the export"):
        verify(bundle)
    path.unlink()
    with pytest.raises(DataError, match=r"model\.safetensors: is missing"):
        verify(bundle)


def test_a_card_with_other_figures_than_the_export_is_refused(make: Make, tmp_path: Path) -> None:
    figure = {"metric": "accuracy", "value": 0.51, "low": 0.4, "high": 0.6, "clips": 50}
    out = tmp_path / "out"
    export(make("lora", extra={"test": figure}), "safetensors", out)
    card = out / "README.md"
    text = card.read_text(encoding="utf-8")
    assert verify(out).largest < 1e-4
    for before, after in [
        ("accuracy 0.510", "accuracy 0.910"),
        ("on 50 test clips", "on 5000 test clips"),
        ("value: 0.51", "value: 0.91"),
        ("## Checked", "It is 0.99 on other sounds.\n\n## Checked"),
    ]:
        assert before in text
        card.write_text(text.replace(before, after), encoding="utf-8")
        with pytest.raises(DataError, match=r"README\.md: states .* no figure of the export"):
            verify(out)
    # Words of its owner's and a shorter card are nobody's business.
    card.write_text(
        text.replace("## Checked", "## Mine\n\n0.99\n\n## Checked").replace("value: 0.51", "")
    )
    verify(out)
    card.unlink()
    verify(out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e["classes"].reverse(), "was changed"),
        (lambda e: e["frontend"].update(mean=0.0), "was changed"),
        (lambda e: e.pop("sha256"), "was changed"),
        (lambda e: e.update(format=2), "format 2 is newer.*install"),
        (lambda e: e.update(format=0), "format 0 is older.*export the adapter again"),
        (lambda e: e.update(format=None), "older"),
        (lambda e: e.update(kind="adapter"), "not that of"),
    ],
)
def test_changed_entries_are_refused(change: Any, message: str, bundle: Path) -> None:
    entries = json.loads((bundle / MANIFEST).read_text())
    change(entries)
    (bundle / MANIFEST).write_text(json.dumps(entries))
    with pytest.raises(DataError, match=message):
        read_bundle(bundle)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 100000, "\x00"])
def test_entries_that_are_none_are_refused(text: str, bundle: Path) -> None:
    (bundle / MANIFEST).write_text(text)
    with pytest.raises(DataError, match=r"export"):
        read_bundle(bundle)
    (bundle / MANIFEST).unlink()
    with pytest.raises(DataError, match=r"not an export of aatjax"):
        read_bundle(bundle)


def test_a_bundle_does_not_lead_out_of_its_folder(bundle: Path) -> None:
    entries = json.loads((bundle / MANIFEST).read_text())
    seal_bundle(bundle, entries)
    entries = json.loads((bundle / MANIFEST).read_text())
    entries["files"]["../x"] = entries["files"].pop("model.safetensors")
    entries.pop("sha256")
    entries["sha256"] = hash_json(entries)
    (bundle / MANIFEST).write_text(json.dumps(entries))
    with pytest.raises(DataError, match="a file outside"):
        read_bundle(bundle)


def test_a_whole_export_or_none(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    with pytest.raises(WriteError, match="not an empty folder"):
        export(make("lora"), "hf", tmp_path / "full")
    with pytest.raises(UsageError, match="is a folder"):
        export(make("lora"), "onnx", tmp_path / "model.onnx")
    with pytest.raises(UsageError, match=r"no format 'tflite'.*stablehlo"):
        export(make("lora"), "tflite", tmp_path / "out")

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "seal_bundle", full)
    with pytest.raises(WriteError, match="No space left"):
        export(make("lora"), "safetensors", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


def test_absent_libraries_are_named_with_the_pip_line(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aatjax.io.optional.find_spec", lambda name: None)
    for to in ("onnx", "peft", "stablehlo"):
        with pytest.raises(UnavailableError, match=r"pip install 'aatjax\[.*export\]'") as caught:
            export(make("lora"), to, tmp_path / "out")
        assert caught.value.exit_code == 69


# The card.

NASTY = (
    'a"b\\c\n---\nlicense: mit # {x} [l](http://e) <script>*_`| \u202e\x07 \U0001f600 \udc80 @me'
)


def test_the_card_is_yaml_and_holds_no_markup_of_the_users(make: Make, tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    extra = {
        "test": {"metric": "accuracy", "value": 0.91, "low": 0.9, "high": 0.92, "clips": 50},
        "about": {"benchmark": NASTY, "protocol": NASTY, NASTY: 1},
        "data": "0123456789abcdef",
        "weights": "last",
    }
    path = make("linear", extra=extra, classes=(NASTY, "<img src=x>", "# no"))
    export(path, "safetensors", tmp_path / "out", licence=NASTY)
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    front, body = text.removeprefix("---\n").split("\n---\n", 1)
    fields = yaml.safe_load(front)
    readable = NASTY.replace("\udc80", "\\udc80")
    assert fields["license"] == readable
    assert fields["library_name"] == "aatjax" and fields["pipeline_tag"] == "audio-classification"
    (result,) = fields["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "accuracy", "value": 0.91}]
    assert result["dataset"]["name"] == readable
    for mark in ("<script>", "<img", "[l](", "http:", "\u202e", "\x07", "@me"):
        assert mark not in body, mark
    assert "\n---" not in body and "0123456789ab" in body and "0\\.910 \\[" not in body
    assert "accuracy 0.910 [0.900, 0.920] on 50 test clips" in body
    assert "classes: " in body and "aatjax.load" in body


def test_escapes() -> None:
    assert markdown("a*b\n<i>") == "a\\*b\\\\n&lt;i&gt;"
    assert scalar('x"\n') == '"x\\"\\U0000000a"'


# Verify.


def rewritten(path: Path, out: Path, change: Callable[[dict, dict], None]) -> Path:
    """The adapter with other metadata or tensors, its checksum right."""
    tensors = load_file(path)
    return rewrite(path, lambda info: change(info, tensors), tensors, out=out)


@pytest.mark.parametrize("name", ["lora", "soft_moa"])
def test_an_untouched_adapter_is_verified(name: str, make: Make) -> None:
    done = verify(make(name))
    assert done.largest < 1e-5 and done.allowed >= 1e-3


def test_a_changed_tensor_is_noticed(make: Make, tmp_path: Path, capsys: Any) -> None:
    def change(info: dict, tensors: dict) -> None:
        name = next(name for name in tensors if name.endswith("lora_b"))
        tensors[name] = tensors[name] + np.float32(0.05)

    path = rewritten(make("lora"), tmp_path / "a.safetensors", change)
    with pytest.raises(ExportMismatchError, match="away from the stored ones"):
        verify(path)
    assert run_command(["verify", str(path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "golden" in captured.err


def test_a_missing_or_damaged_golden_sample_is_explained(make: Make, tmp_path: Path) -> None:
    for number, (change, message) in enumerate(
        [
            (lambda info, _: info.pop("golden"), "has no golden sample"),
            (lambda info, _: info["golden"].update(logits=None), "not finite"),
            (lambda info, _: info["golden"].update(logits=[1.0]), "damaged"),
            (lambda info, _: info["golden"].update(logits="abc"), "damaged"),
            (lambda info, _: info["golden"].update(sound="horse"), "damaged"),
            (lambda info, _: info["golden"].update(seconds=1e9), "damaged"),
            (lambda info, _: info.update(golden=3), "damaged"),
        ]
    ):
        path = rewritten(make("lora"), tmp_path / f"{number}.safetensors", change)
        with pytest.raises(DataError, match=message):
            verify(path)


def test_an_adapter_that_diverged_is_saved_but_not_exported(make: Make, tmp_path: Path) -> None:
    def change(info: dict, tensors: dict) -> None:
        tensors["head/linear/bias"] = tensors["head/linear/bias"] * np.float32(np.nan)

    path = rewritten(make("lora"), tmp_path / "a.safetensors", change)
    found = aatjax.load_adapter(path, check=False)
    save_adapter(
        tmp_path / "b.safetensors",
        found.model,
        classes=CLASSES,
        multi_label=False,
        frontend=FRONTEND,
    )
    with pytest.raises(DataError, match="not finite"):
        verify(tmp_path / "b.safetensors")
    with pytest.raises(ExportMismatchError):
        verify(path)
    with pytest.raises(DataError, match="differs by nan"):
        export(path, "safetensors", tmp_path / "out")
    with pytest.raises(DataError, match="not finite"):
        export(tmp_path / "b.safetensors", "safetensors", tmp_path / "out")


# The command line.


def test_the_commands(make: Make, tmp_path: Path, capsys: Any) -> None:
    path, out = make("lora"), tmp_path / "out"
    assert run_command(["export", str(path), "--to", "safetensors", str(out)]) == 0
    assert "logits within" in capsys.readouterr().out
    for file in (path, out):
        assert run_command(["verify", str(file)]) == 0
        assert "unchanged" in capsys.readouterr().out
    for arguments, code in (
        (["export", str(path), "--to", "hff", str(tmp_path / "x")], 2),
        (["export", str(make("soft_moa")), "--to", "hf", str(tmp_path / "x")], 2),
        (["export", str(tmp_path / "gone.safetensors"), "--to", "hf", str(tmp_path / "x")], 65),
        (["export", str(path), "--to", "hf", str(out)], 74),
        (["verify", str(tmp_path / "gone.safetensors")], 65),
        (["verify", str(tmp_path)], 65),
    ):
        assert run_command(arguments) == code, arguments
        assert capsys.readouterr().err.count("\n") == 1
