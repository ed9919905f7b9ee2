"""Fine-tuned checkpoints under the names that the code of AAT and PETL_AST saves them by.

The names and shapes are those of files that the two repositories wrote (PyTorch 2.2, transformers
4.28.1, timm 0.9.2); logits agreed with their modules to 5e-7 (PETL_AST) and 3e-6 (AAT, AST-base).
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flax import nnx

import aatjax
from aatjax import petl, surgery
from aatjax.cli.main import run
from aatjax.convert import write_native
from aatjax.errors import DataError, UsageError
from aatjax.models.ast import AST
from aatjax.models.config import ASTConfig

DEPTH, CLASSES = 2, 3
SIZES: dict[str, Any] = {"dim": 64, "depth": DEPTH, "heads": 1, "mlp_dim": 96, "frames": 100}
PETL = ASTConfig(
    **SIZES, num_classes=CLASSES, pool="mean_all", head_norm=False, eps=1e-12, head_eps=1e-12
)
AAT = ASTConfig(**SIZES, num_classes=CLASSES)
LINEAR = ("kernel", "weight")
Tensors = dict[str, np.ndarray]


def make_adapted(method: petl.Method | None, config: ASTConfig) -> AST:
    """A model with a method, every number of it random."""
    model = AST(config, rngs=nnx.Rngs(0))
    adapted = model if method is None else petl.adapt(model, method)
    rng = np.random.default_rng(1)
    for path, variable in surgery.variables(adapted).items():
        noise = rng.normal(scale=0.1, size=variable.shape).astype(np.float32)
        near = 1.0 if path.endswith(("scale", "var")) else 0.0
        variable.set_raw_value(near + (abs(noise) if path.endswith("var") else noise))
    adapted.eval()
    return adapted


def numbered(names: dict[str, str]) -> dict[str, str]:
    return {
        a.replace("{i}", str(i)): b.replace("{i}", str(i)) for a, b in names.items() for i in (0, 1)
    }


HUGGING_FACE = numbered(
    {
        "embed/cls": "embeddings.cls_token",
        "embed/dist": "embeddings.distillation_token",
        "embed/pos": "embeddings.position_embeddings",
        "embed/proj": "embeddings.patch_embeddings.projection",
        "blocks/{i}/ln1": "encoder.layer.{i}.layernorm_before",
        "blocks/{i}/attn/q": "encoder.layer.{i}.attention.attention.query",
        "blocks/{i}/attn/k": "encoder.layer.{i}.attention.attention.key",
        "blocks/{i}/attn/v": "encoder.layer.{i}.attention.attention.value",
        "blocks/{i}/attn/out": "encoder.layer.{i}.attention.output.dense",
        "blocks/{i}/ln2": "encoder.layer.{i}.layernorm_after",
        "blocks/{i}/mlp/up": "encoder.layer.{i}.intermediate.dense",
        "blocks/{i}/mlp/down": "encoder.layer.{i}.output.dense",
        "norm": "layernorm",
        "head/linear": "classification_head",
    }
)
TIMM = numbered(
    {
        "embed/cls": "v.cls_token",
        "embed/dist": "v.dist_token",
        "embed/pos": "v.pos_embed",
        "embed/proj": "v.patch_embed.proj",
        "blocks/{i}/ln1": "v.blocks.{i}.norm1",
        "blocks/{i}/attn/out": "v.blocks.{i}.attn.proj",
        "blocks/{i}/ln2": "v.blocks.{i}.norm2",
        "blocks/{i}/mlp/up": "v.blocks.{i}.mlp.fc1",
        "blocks/{i}/mlp/down": "v.blocks.{i}.mlp.fc2",
        "norm": "v.norm",
        "head/norm": "mlp_head.0",
        "head/linear": "mlp_head.1",
    }
)
BOTTLENECK = {
    "w_down": "linear_downsample.weight",
    "b_down": "linear_downsample.bias",
    "w_up": "linear_upsample.weight",
    "b_up": "linear_upsample.bias",
}
CONVPASS = {
    "w_down": "adapter_down.weight",
    "b_down": "adapter_down.bias",
    "w_up": "adapter_up.weight",
    "b_up": "adapter_up.bias",
    "w_conv": "adapter_conv.weight",
    "b_conv": "adapter_conv.bias",
}
CONFORMER = {
    "norm/scale": "lnorm.weight",
    "norm/bias": "lnorm.bias",
    "w_in": "pwise_conv1.weight",
    "b_in": "pwise_conv1.bias",
    "w_conv": "dwise_conv.weight",
    "b_conv": "dwise_conv.bias",
    "batch_norm/scale": "bnorm.weight",
    "batch_norm/bias": "bnorm.bias",
    "batch_norm/mean": "bnorm.running_mean",
    "batch_norm/var": "bnorm.running_var",
    "w_out": "pwise_conv2.weight",
    "b_out": "pwise_conv2.bias",
}
AAT_ADAPTERS = {"mlp/mlp_adapter": "mlp_adapter", "attn/spatial_adapter": "s_adapter"}
FC = {"w_down": "fc1.weight", "b_down": "fc1.bias", "w_up": "fc2.weight", "b_up": "fc2.bias"}


def write_body(held: Tensors, names: dict[str, str]) -> Tensors:
    """The backbone and head, in the axes of PyTorch."""
    found: Tensors = {}
    for path, name in names.items():
        if path in held:
            found[name] = held[path]
        for part, suffix in (("kernel", "weight"), ("scale", "weight"), ("bias", "bias")):
            if (value := held.get(f"{path}/{part}")) is not None:
                is_image = value.ndim == 4
                turned = value.transpose(3, 2, 0, 1) if is_image else value.T
                found[f"{name}.{suffix}"] = turned
    return found


def write_block(held: Tensors, path: str, module: str, names: dict[str, str]) -> Tensors:
    """An adapter block; convolutions [out, in, width]."""
    found: Tensors = {}
    for parameter, name in names.items():
        value = held[f"{path}/{parameter}"].T
        if "pwise" in name and name.endswith("weight"):
            value = value[..., None]
        elif "dwise" in name and name.endswith("weight"):
            value = value[:, None]
        found[f"{module}.{name}"] = value
    if names is CONFORMER:
        found[f"{module}.bnorm.num_batches_tracked"] = np.array(7)
    return found


def write_mixture(held: Tensors, path: str, layer: str, suffix: str, experts: int) -> Tensors:
    found: Tensors = {}
    for n in range(experts):
        module = f"{layer}.moa{suffix}.moa.{n}"
        if f"{path}/w_down" in held:
            own = {f"{path}/{name}": held[f"{path}/{name}"][n] for name in BOTTLENECK}
            found |= write_block(own, path, module, BOTTLENECK)
        else:
            found |= write_block(held, f"{path}/blocks/{n}", module, CONVPASS)
    if f"{path}/phi" in held:
        found[f"{layer}.moa{suffix}.slot_params"] = held[f"{path}/phi"]
    else:
        found[f"{layer}.router{suffix}.ff.weight"] = held[f"{path}/w_router"].T
        found[f"{layer}.router{suffix}.ff.bias"] = held[f"{path}/b_router"]
    return found


def write_petl(model: AST, kind: str) -> Tensors:
    """What PETL_AST saves of a model: all but prompts and heads twice."""
    held = {path: np.asarray(value) for path, value in surgery.arrays(model).items()}
    found = write_body(held, HUGGING_FACE)
    for i in range(DEPTH):
        layer, block = f"encoder.layer.{i}", f"blocks/{i}"
        attention = f"{layer}.attention.attention"
        blocks = {"bottleneck": BOTTLENECK, "conformer": CONFORMER}
        if kind in blocks:
            for site, module in (("attn", "MHSA"), ("mlp", "FFN")):
                if any(path.startswith(f"{block}/{site}/adapter") for path in held):
                    path, name = f"{block}/{site}/adapter", f"{layer}.adapter_module_{module}"
                    found |= write_block(held, path, name, blocks[kind])
        elif kind == "ablation":
            path, name = f"{block}/mlp/adapter", f"{layer}.adapter_module"
            found |= write_block(held, path, name, BOTTLENECK)
        elif kind in ("lora", "lora_ablation"):
            for target in "qkvo":
                path = f"{block}/attn/{'out' if target == 'o' else target}/lora"
                if f"{path}_a" not in held:
                    continue
                letter = target.upper() if kind == "lora_ablation" else target
                module = f"{layer}.attention.output" if target == "o" else attention
                found[f"{module}.lora_down_{letter}.weight"] = held[f"{path}_a"].T
                found[f"{module}.lora_up_{letter}.weight"] = held[f"{path}_b"].T
        elif kind == "prefix":
            found[f"{attention}.key_tokens"] = held[f"{block}/attn/k/prefix"]
            found[f"{attention}.value_tokens"] = held[f"{block}/attn/v/prefix"]
        elif kind == "moa":
            name = model.method.name
            places = {f"{block}/{name}": "", f"{block}/attn/{name}": "_mhsa"}
            both = any(path.startswith(f"{block}/attn/{name}") for path in held)
            places |= {f"{block}/mlp/{name}": "_ffn" if both else ""}
            for path, suffix in places.items():
                if any(p.startswith(f"{path}/") for p in held):
                    experts = model.method.num_experts
                    found |= write_mixture(held, path, layer, suffix, experts)
    if kind == "linear":  # no copies
        return {n if n.startswith("class") else f"model.{n}": v for n, v in found.items()}
    if kind in ("shallow", "deep"):
        first = "embed" if kind == "shallow" else "blocks/0"
        found["prompt_embeddings"] = held[f"{first}/prompts"]
        if kind == "deep":
            found["deep_prompt_embeddings"] = held["blocks/1/prompts"]
        return found
    copies = {f"model.{n}": v for n, v in found.items() if not n.startswith("class")}
    return copies | found


def write_aat(model: AST) -> Tensors:
    """What AAT saves of a model."""
    held = {path: np.asarray(value) for path, value in surgery.arrays(model).items()}
    found = write_body(held, TIMM)
    for i in range(DEPTH):
        for part in ("kernel", "bias"):
            qkv = [held[f"blocks/{i}/attn/{name}/{part}"].T for name in "qkv"]
            suffix = "weight" if part == "kernel" else "bias"
            found[f"v.blocks.{i}.attn.qkv.{suffix}"] = np.concatenate(qkv)
        for path, name in (
            ("mlp/mlp_adapter", "mlp_adapter"),
            ("attn/spatial_adapter", "s_adapter"),
        ):
            if f"blocks/{i}/{path}/w_up" in held:
                found |= write_block(held, f"blocks/{i}/{path}", f"v.blocks.{i}.{name}", FC)
    for name in ("head", "head_dist"):
        found |= {f"v.{name}.weight": np.zeros((1000, 64)), f"v.{name}.bias": np.zeros(1000)}
    if "embed/prompts" in held:
        found["prompt_embeddings"] = held["embed/prompts"]
        found["deep_prompt_embeddings"] = held["blocks/1/prompts"]
    return {f"module.{name}": value for name, value in found.items()}


def save(path: Path, tensors: Tensors) -> Path:
    """A file of torch.save, in which copies share their storage."""
    made: dict[int, torch.Tensor] = {}
    kept = {n: made.setdefault(id(v), torch.tensor(np.asarray(v))) for n, v in tensors.items()}
    torch.save(kept, path)
    return path


published: dict[str, Any] = {"as_published": True}
PROMPTS = petl.Prompt(tokens=4, keep_dist=True, pool=None, **published)
AAT_METHODS = {
    "mlp": petl.AAT(spatial=False, width=16, **published),
    "mlp_spatial": petl.AAT(width=16, **published),
    "prompt": PROMPTS,
    "prompt_mlp_spatial": petl.Combined((PROMPTS, petl.AAT(width=16, **published))),
}
PETL_METHODS: dict[str, tuple[str, petl.Method]] = {
    "bottleneck_pfeiffer": ("bottleneck", petl.Adapter(width=4, **published)),
    "bottleneck_houlsby": ("bottleneck", petl.Adapter(width=4, location="both", **published)),
    "conformer": ("conformer", petl.Adapter(block="conformer", width=4, kernel=5, **published)),
    "ablation": ("ablation", petl.Adapter(width=4, position="after", **published)),
    "lora": ("lora", petl.LoRA(rank=2, alpha=4, **published)),
    "lora_ablation": (
        "lora_ablation",
        petl.LoRA(rank=4, alpha=2, targets=tuple("qkvo"), **published),
    ),
    "prefix": ("prefix", petl.Prefix(tokens=6, **published)),
    "spt": ("shallow", petl.Prompt(tokens=5, deep=False, **published)),
    "dpt": ("deep", petl.Prompt(tokens=5, **published)),
    "soft": ("moa", petl.SoftMoA(num_experts=3, slots=2, width=2, **published)),
    "soft_houlsby": ("moa", petl.SoftMoA(num_experts=3, width=2, location="both", **published)),
    "soft_one_expert": ("moa", petl.SoftMoA(num_experts=1, width=2, **published)),
    "dense": ("moa", petl.DenseMoA(num_experts=3, width=2, **published)),
    "dense_convpass": (
        "moa",
        petl.DenseMoA(num_experts=2, width=2, expert="convpass", location="both", **published),
    ),
}


def write(path: Path, name: str) -> tuple[AST, Path]:
    """A model, and its file as the repository of the method saves it."""
    if name in AAT_METHODS:
        model = make_adapted(AAT_METHODS[name], AAT)
        return model, save(path / "best_audio_model.pth", write_aat(model))
    kind, method = PETL_METHODS[name]
    model = make_adapted(method, PETL)
    return model, save(path / "bestmodel_fold0", write_petl(model, kind))


def clip() -> np.ndarray:
    return np.random.default_rng(2).normal(size=(1, 100, 128)).astype(np.float32)


@pytest.mark.parametrize("name", [*AAT_METHODS, *PETL_METHODS])
def test_a_published_checkpoint_is_its_method_with_all_its_numbers(name: str, tmp_path) -> None:
    model, path = write(tmp_path, name)
    found = aatjax.load_published(path)
    assert found.model.method == model.method
    assert found.model.config == model.config
    here, there = surgery.variables(found.model), surgery.variables(model)
    assert {p: type(v) for p, v in here.items()} == {p: type(v) for p, v in there.items()}
    for key, variable in there.items():
        np.testing.assert_array_equal(here[key][...], variable[...], err_msg=key)
    assert found.classes == ("class 0", "class 1", "class 2")
    assert (found.frontend.frames, found.frontend.mean) == (100, -4.2677393)


@pytest.mark.parametrize(
    "name", [*(pytest.param(n, marks=pytest.mark.slow) for n in ("mlp_spatial", "soft")), "dpt"]
)
def test_it_is_saved_as_an_adapter_with_its_backbone(name: str, tmp_path) -> None:
    model, path = write(tmp_path, name)
    found = aatjax.load_published(path, classes=("a", "b", "c"))
    file = aatjax.save_adapter(
        tmp_path / "a.safetensors",
        found.model,
        classes=found.classes,
        multi_label=False,
        frontend=found.frontend,
    )
    path.unlink()
    again = aatjax.load_adapter(file)
    assert again.classes == ("a", "b", "c")
    np.testing.assert_allclose(again.model(clip()), model(clip()), atol=2e-6)


def test_a_state_dictionary_and_the_prefix_of_a_wrapper_are_read_too(tmp_path) -> None:
    model = make_adapted(PETL_METHODS["lora"][1], PETL)
    tensors = {f"module.{n}": torch.tensor(v) for n, v in write_petl(model, "lora").items()}
    found = aatjax.load_published(tensors)
    path = "blocks/1/attn/v/lora_b"
    np.testing.assert_array_equal(surgery.arrays(found.model)[path], surgery.arrays(model)[path])


@pytest.mark.parametrize("kind", ["linear", "head"])
def test_a_model_without_added_modules_is_a_base_with_its_head(kind: str, tmp_path) -> None:
    model = make_adapted(None, PETL if kind == "linear" else AAT)
    tensors = write_petl(model, "linear") if kind == "linear" else write_aat(model)
    path = save(tmp_path / "file", tensors)
    found = aatjax.load(path)
    assert found.config == model.config
    for key, value in surgery.arrays(model).items():
        np.testing.assert_array_equal(surgery.arrays(found)[key], value, err_msg=key)
    with pytest.raises(DataError, match=r"aatjax\.load reads models without added modules"):
        aatjax.load_published(path)
    assert run(["convert", str(path), str(tmp_path / "w.safetensors")]) == 0
    np.testing.assert_array_equal(aatjax.load(tmp_path / "w.safetensors")(clip()), found(clip()))


# ---------------------------------------------------------------------------- strictness


def rename(tensors: Tensors, old: str, new: str) -> Tensors:
    return {name.replace(old, new): value for name, value in tensors.items()}


def cut(name: str) -> Any:
    return lambda t: {n: v for n, v in t.items() if not n.endswith(name)}


def change(name: str, value: Any) -> Any:
    return lambda t: {n: value(v) if n.endswith(name) else v for n, v in t.items()}


WRONG = {
    "an adapter is missing in one block": (
        "mlp",
        cut("v.blocks.1.mlp_adapter.fc2.weight"),
        r"1 missing \(v\.blocks\.1\.mlp_adapter\.fc2\.weight\)",
    ),
    "a tensor of another method": (
        "lora",
        lambda t: t | {"encoder.layer.0.moa.scale": np.ones(())},
        r"1 unexpected \(encoder\.layer\.0\.moa\.scale\)",
    ),
    "another width in one block": (
        "dense",
        change("layer.1.moa.moa.2.linear_upsample.weight", lambda v: v[:, :1]),
        r"1 of the wrong shape \(encoder\.layer\.1\.moa\.moa\.0\.linear_upsample\.weight",
    ),
    "not a number": (
        "prefix",
        change("layer.0.attention.attention.key_tokens", lambda v: v * np.nan),
        r"1 with NaN or infinity \(encoder\.layer\.0\.attention\.attention\.key_tokens",
    ),
    "copies that differ": (
        "soft",
        change("model.encoder.layer.1.moa.slot_params", lambda v: v + 1),
        r"encoder\.layer\.1\.moa\.slot_params and model\.encoder\.layer\.1\.moa\.slot_params "
        "differ",
    ),
    "a backbone that is not whole": (
        "bottleneck_pfeiffer",
        cut("encoder.layer.1.output.dense.bias"),
        r"1 missing \(encoder\.layer\.1\.output\.dense\.bias\)",
    ),
    "batch adapters": (
        "mlp_spatial",
        lambda t: rename(t, "s_adapter", "b_adapter"),
        r"AAT's batch adapters \(b_adapter\)",
    ),
    "more deep prompts than shallow ones": (
        "prompt",
        change("deep_prompt_embeddings", lambda v: np.concatenate([v, v], axis=1)),
        r"deep_prompt_embeddings \[1, 8, 64\] and prompt_embeddings \[1, 4, 64\] differ",
    ),
    "deep prompts for another depth": (
        "dpt",
        change("deep_prompt_embeddings", lambda v: np.concatenate([v, v])),
        r"1 of the wrong shape \(deep_prompt_embeddings \[2, 5, 64\]\)",
    ),
    "a normalised Soft-MoA": (
        "soft",
        lambda t: t | {f"encoder.layer.{i}.moa.scale": np.ones(()) for i in (0, 1)},
        r"its Soft-MoA normalises \(moa\.scale\)",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_not_as_published_is_refused_by_name(what: str, tmp_path) -> None:
    name, damage, message = WRONG[what]
    if name in AAT_METHODS:
        tensors = write_aat(make_adapted(AAT_METHODS[name], AAT))
    else:
        kind, method = PETL_METHODS[name]
        tensors = write_petl(make_adapted(method, PETL), kind)
    path = save(tmp_path / "file.pth", damage(tensors))
    with pytest.raises(DataError, match=message) as caught:
        aatjax.load_published(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["mlp", "lora", "soft", "bottleneck_pfeiffer", "dpt", "prefix"])
def test_load_says_which_function_reads_a_fine_tuned_model(name: str, tmp_path) -> None:
    _, path = write(tmp_path, name)
    with pytest.raises(DataError, match=r"aatjax\.load_published or `aatjax convert FILE"):
        aatjax.load(path)


# --------------------------------------------------------------------- base, command line


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and a mixture beside its MLPs as PETL_AST trains and saves it."""
    folder = tmp_path_factory.mktemp("published")
    base = make_adapted(None, PETL)
    held = {path: np.asarray(value) for path, value in surgery.arrays(base).items()}
    write_native(folder / "base.safetensors", held, PETL)
    method = petl.SoftMoA(num_experts=2, width=2, location="ffn", **published)
    tuned = petl.adapt(base, method)
    rng = np.random.default_rng(3)
    for variable in surgery.variables(tuned).values():
        if isinstance(variable, nnx.Param):
            noise = rng.normal(scale=0.1, size=variable.shape)
            variable.set_raw_value(variable[...] + noise.astype(np.float32))
    save(folder / "bestmodel_fold0", write_petl(tuned, "moa"))
    (folder / "classes.txt").write_text("dog\nrain\nbell\n", encoding="utf-8")
    (folder / "labels.csv").write_text(
        'index,mid,display_name\n1,/m/1,"rain"\n0,/m/0,"dog"\n2,/m/2,"bell"\n', encoding="utf-8"
    )
    return folder


def convert(files: Path, out: Path, *flags: str) -> int:
    return run(["convert", str(files / "bestmodel_fold0"), str(out), *flags])


def test_an_adapter_stands_on_the_base_that_was_fine_tuned(files, tmp_path, capsys) -> None:
    out, base = tmp_path / "a.safetensors", str(files / "base.safetensors")
    assert convert(files, out, "--base", base) == 65
    error = capsys.readouterr().err
    assert re.search(r"4 of \d+ frozen tensors .* first is blocks/0/ln2/(bias|scale)", error)
    assert "it is read with location mhsa" in error and "--petl.FIELD" in error
    flags = ("--petl.location", "ffn", "--classes", str(files / "labels.csv"))
    assert convert(files, out, "--base", base, *flags) == 0
    said = capsys.readouterr()
    assert "stands on" in said.out and "assumed" not in said.err
    assert out.stat().st_size < (files / "base.safetensors").stat().st_size / 5
    found = aatjax.load_adapter(out)
    assert found.classes == ("dog", "rain", "bell")
    whole = aatjax.load_published(files / "bestmodel_fold0", method=found.model.method)
    np.testing.assert_allclose(found.model(clip()), whole.model(clip()), atol=1e-6)
    assert run(["verify", str(out)]) == 0


def test_what_is_assumed_is_printed_and_can_be_replaced(files, tmp_path, capsys) -> None:
    assert convert(files, tmp_path / "a.safetensors", "--classes", str(files / "classes.txt")) == 0
    assert "note: assumed: location mhsa" in capsys.readouterr().err
    lora = make_adapted(PETL_METHODS["lora"][1], PETL)
    path = save(tmp_path / "lora", write_petl(lora, "lora"))
    assert run(["convert", str(path), str(tmp_path / "b.safetensors")]) == 0
    error = capsys.readouterr().err
    assert "assumed: alpha 4, a scale of 0.125" in error and "have numbers for names" in error
    out = tmp_path / "c.safetensors"
    assert run(["convert", str(path), str(out), "--petl.alpha", "16", "--pool", "cls"]) == 0
    assert "alpha" not in capsys.readouterr().err
    found = aatjax.load_adapter(out).model
    assert isinstance(found.method, petl.LoRA)
    assert (found.method.alpha, found.config.pool) == (16, "cls")


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--petl.alhpa", "3"], 2, "--petl.alhpa"),
        (["--optim.lr", "1"], 2, "no flag '--optim.lr'"),
        (["--classes", "esc50"], 2, "50 class names for 3 classes"),
        (["--classes", "esc51"], 2, "did you mean 'esc50'"),
        (["--statistics", "esc5"], 2, "did you mean 'esc50'"),
        (["--dtype", "float16"], 2, "a model with added modules becomes an adapter"),
        (["--petl.width", "3"], 65, "of the wrong shape"),
        (["--petl.location", "both"], 65, "missing (encoder.layer.0.moa_ffn.moa.0"),
        (["--frames", "512"], 65, "108 positions fit no known grid"),
    ],
)
def test_wrong_flags_are_refused_by_name(files, flags, code, message, tmp_path, capsys) -> None:
    assert convert(files, tmp_path / "a.safetensors", *flags) == code
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_flags_of_an_adapter_are_refused_for_a_whole_model(files, tmp_path, capsys) -> None:
    base, out = str(files / "base.safetensors"), str(tmp_path / "w.safetensors")
    for flags in (["--classes", "esc50"], ["--petl.alpha", "3"], ["--multi-label"]):
        assert run(["convert", base, out, *flags]) == 2
        assert f"omit {flags[0]}" in capsys.readouterr().err


def test_aat_numbers_the_words_of_speech_commands_in_its_own_order(tmp_path, capsys) -> None:
    _, path = write(tmp_path, "mlp")
    out = str(tmp_path / "a.safetensors")
    assert run(["convert", str(path), out, "--classes", "speech_commands_v2"]) == 2
    assert "give its class_labels_indices.csv" in capsys.readouterr().err
    assert run(["convert", str(path), out]) == 0
    assert "AudioSet's statistics" in capsys.readouterr().err
    again = ["--statistics", "esc50", "--force"]
    assert run(["convert", str(path), out, *again]) == 0
    assert aatjax.load_adapter(out).frontend.mean == -6.6268077
    with pytest.raises(UsageError, match="did you mean 'esc50'"):
        aatjax.load_published(path, statistics="esc-50")
