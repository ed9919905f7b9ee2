"""Every published weight layout gives the same canonical parameters, exactly."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from ast_oracle import (
    ARGUMENTS,
    HEADLESS,
    LAYOUTS,
    memory_tensors,
    original_tensors,
    random_hf_ast,
    ssast_tensors,
    timm_tensors,
    write_layout,
)
from safetensors.torch import load_file, save_file

from aatjax.convert import read_checkpoint, write_native, write_orbax
from aatjax.convert.detect import expand_layout
from aatjax.convert.infer_config import Sizes
from aatjax.convert.rules import HF_AST
from aatjax.convert.rules import LAYOUTS as READABLE
from aatjax.errors import DataError, UsageError
from aatjax.models.config import ASTConfig
from aatjax.models.positions import resize_positions

WIDTH, BLOCKS = 128, 2


@pytest.fixture(scope="module")
def model():
    labels = {i: name for i, name in enumerate(["dog", "rain", "bell", "saw", "train"])}
    return random_hf_ast(id2label=labels)


def canonical(model):
    """The parameters under canonical names, written out by hand from the module tree."""
    body = model.audio_spectrogram_transformer
    found = {
        "embed/cls": body.embeddings.cls_token,
        "embed/dist": body.embeddings.distillation_token,
        "embed/pos": body.embeddings.position_embeddings,
        "embed/proj/kernel": body.embeddings.patch_embeddings.projection.weight.permute(2, 3, 1, 0),
        "embed/proj/bias": body.embeddings.patch_embeddings.projection.bias,
        "norm/scale": body.layernorm.weight,
        "norm/bias": body.layernorm.bias,
        "head/norm/scale": model.classifier.layernorm.weight,
        "head/norm/bias": model.classifier.layernorm.bias,
        "head/linear/kernel": model.classifier.dense.weight.T,
        "head/linear/bias": model.classifier.dense.bias,
    }
    for i, block in enumerate(body.layers):
        attention = block.attention
        linears = {
            "attn/q": attention.q_proj,
            "attn/k": attention.k_proj,
            "attn/v": attention.v_proj,
            "attn/out": attention.o_proj,
            "mlp/up": block.mlp.fc1,
            "mlp/down": block.mlp.fc2,
        }
        for name, linear in linears.items():
            found[f"blocks/{i}/{name}/kernel"] = linear.weight.T
            found[f"blocks/{i}/{name}/bias"] = linear.bias
        for name, norm in (("ln1", block.layernorm_before), ("ln2", block.layernorm_after)):
            found[f"blocks/{i}/{name}/scale"] = norm.weight
            found[f"blocks/{i}/{name}/bias"] = norm.bias
    return {name: value.detach().numpy() for name, value in found.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_parameters(model, layout, tmp_path):
    path = write_layout(model, layout, tmp_path / "weights")
    silent = layout.startswith(("hf_deit", "ssast", "timm"))
    got = read_checkpoint(path, **(ARGUMENTS if silent else {}))
    want = canonical(model)
    if layout in HEADLESS:
        want = {name: value for name, value in want.items() if not name.startswith("head/")}
    assert got.has_head is (layout not in HEADLESS)
    assert set(got.params) == set(want)
    casts = {"original_half": torch.float16, "original_bfloat16": torch.bfloat16}
    for name, value in want.items():
        if layout in casts:
            value = torch.from_numpy(value.copy()).to(casts[layout]).float().numpy()
        assert got.params[name].dtype == np.float32
        assert got.params[name].flags.c_contiguous and got.params[name].flags.writeable
        np.testing.assert_array_equal(got.params[name], value, err_msg=name)
    config = got.config
    assert (config.dim, config.depth, config.heads, config.mlp_dim) == (WIDTH, BLOCKS, 2, 192)
    assert (config.patch, config.stride, config.mels, config.frames) == (
        (16, 16),
        (10, 10),
        128,
        128,
    )
    assert got.grid == config.grid == (12, 12) and got.num_prefix == 2
    families = {"original": "audioset", "hf": "audioset", "ssast": "ssast"}
    imagenet = "deit" in layout
    assert got.rule == ("imagenet" if imagenet else families[layout.split("_")[0]])
    assert config.pool == ("mean_patches" if layout == "ssast" else "cls_dist")
    hugging = layout.startswith("hf")
    assert (config.eps, config.head_eps) == ((1e-12, 1e-12) if hugging else (1e-6, 1e-5))
    if hugging and layout not in HEADLESS:
        assert got.labels == ("dog", "rain", "bell", "saw", "train")
        assert config.num_classes == 5
    else:
        assert got.labels is None


@pytest.mark.parametrize("kind", ["native", "half", "orbax"])
def test_native_files_come_back(model, kind, tmp_path):
    source = read_checkpoint(write_layout(model, "hf", tmp_path / "hf"))
    config = dataclasses.replace(source.config, pool="mean_all", eps=1e-7)
    path = tmp_path / ("weights" if kind == "orbax" else "weights.safetensors")
    write = write_orbax if kind == "orbax" else write_native
    extra = {"dtype": "float16"} if kind == "half" else {}
    write(path, source.params, config, source.labels, **extra)
    got = read_checkpoint(path)
    assert (got.config, got.labels, got.grid) == (config, source.labels, (12, 12))
    assert got.layout == ("orbax" if kind == "orbax" else "native") and got.has_head
    for name, value in source.params.items():
        if kind == "half":
            value = value.astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(got.params[name], value, err_msg=name)
    if kind == "native":
        with pytest.raises(UsageError, match=r"says frames=128, the argument frames=64"):
            read_checkpoint(path, frames=64)


def test_native_without_head_keeps_the_source_grid_and_its_rule(model, tmp_path):
    source = read_checkpoint(write_layout(model, "ssast", tmp_path / "a"), frames=64, mels=128)
    assert source.config.grid == (12, 5) and source.grid == (12, 12)
    path = tmp_path / "b.safetensors"
    write_native(path, source.params, source.config, grid=source.grid, rule=source.rule)
    got = read_checkpoint(path)
    assert (got.grid, got.rule, got.has_head) == ((12, 12), "ssast", False)
    pos = resize_positions(
        got.params["embed/pos"], got.grid, got.config.grid, prefix=got.num_prefix, rule=got.rule
    )
    assert pos.shape == (1, 2 + 60, WIDTH)


def base(depth=12, dim=768):
    return Sizes(dim, depth, 4 * dim, (16, 16, 1), 1214, True, 527)


def test_published_base_files_have_159_and_203_tensors():
    shapes = base().shapes()
    original = next(x for x in READABLE if x.name == "original").wrap("module.")
    names = expand_layout(original, shapes, 12)
    assert len(names) + 4 == 159  # v.head and v.head_dist are in the file too
    assert names["module.v.blocks.11.attn.qkv.weight"][2] == (2304, 768)
    assert names["module.v.blocks.0.mlp.fc2.weight"][2] == (768, 3072)
    assert names["module.v.pos_embed"][2] == (1, 1214, 768)
    assert names["module.mlp_head.1.weight"][2] == (527, 768)
    hugging = expand_layout(HF_AST, shapes, 12)
    assert len(hugging) == 203
    prefix = "audio_spectrogram_transformer."
    assert hugging[f"{prefix}embeddings.patch_embeddings.projection.weight"][2] == (768, 1, 16, 16)
    assert hugging[f"{prefix}encoder.layer.7.output.dense.weight"][2] == (768, 3072)


def test_full_width_original_file(tmp_path):
    """An AudioSet file in full size (two blocks of it), inferred from nothing but its tensors."""
    original = next(x for x in READABLE if x.name == "original").wrap("module.")
    tensors = {
        name: torch.full(shape, 0.5, dtype=torch.float16)
        for name, (_, _, shape) in expand_layout(original, base(2).shapes(), 2).items()
    }
    torch.save(tensors, tmp_path / "audioset_10_10_0.4593.pth")
    got = read_checkpoint(tmp_path / "audioset_10_10_0.4593.pth")
    assert got.config == ASTConfig(depth=2)
    assert got.grid == (12, 101)
    assert sum(value.size for value in got.params.values()) == 86_594_063 - 10 * 7_087_872


@pytest.mark.parametrize(
    "patches, arguments, grid, frames",
    [
        (1212, {}, (12, 101), 1024),
        (850, {}, (10, 85), 1024),
        (657, {}, (9, 73), 1024),
        (512, {}, (8, 64), 1024),
        (600, {}, (12, 50), 512),
        (12 * 7, {"stride": 10}, (12, 7), 76),
        (12 * 7, {"stride": 10, "frames": 79}, (12, 7), 79),
        (9 * 3, {"frames": 44}, (9, 3), 44),
    ],
)
def test_grid_is_inferred_from_the_number_of_positions(
    model, patches, arguments, grid, frames, tmp_path
):
    tensors = original_tensors(model)
    tensors["module.v.pos_embed"] = torch.randn(1, patches + 2, WIDTH)
    torch.save(tensors, tmp_path / "a.pth")
    got = read_checkpoint(tmp_path / "a.pth", **arguments)
    assert got.grid == got.config.grid == grid and got.config.frames == frames


def test_unknown_grid_is_refused(model, tmp_path):
    tensors = original_tensors(model)
    tensors["module.v.pos_embed"] = torch.randn(1, 2 + 84, WIDTH)
    torch.save(tensors, tmp_path / "a.pth")
    with pytest.raises(
        DataError, match=r"a\.pth: 84 positions fit no known grid .* give the stride"
    ):
        read_checkpoint(tmp_path / "a.pth")
    with pytest.raises(DataError, match=r"84 positions .* frames=100"):
        read_checkpoint(tmp_path / "a.pth", frames=100)


@pytest.mark.parametrize("module", ["module.", ""])
def test_ssast_frame_model(module, tmp_path):
    model = random_hf_ast()
    tensors = ssast_tensors(model, module)
    tensors[f"{module}v.patch_embed.proj.weight"] = torch.randn(WIDTH, 1, 128, 2)
    tensors[f"{module}v.pos_embed"] = torch.randn(1, 514, WIDTH)
    tensors[f"{module}p_input_fdim"] = torch.tensor(128)
    tensors[f"{module}p_input_tdim"] = torch.tensor(1024)
    torch.save(tensors, tmp_path / "frame.pth")
    got = read_checkpoint(tmp_path / "frame.pth", frames=512)
    assert got.grid == (1, 512) and got.rule == "ssast"
    assert (got.config.patch, got.config.stride) == ((128, 2), (128, 1))
    assert got.config.grid == (1, 511) and got.config.pool == "mean_patches"


@pytest.mark.parametrize("width, heads", [(192, 3), (384, 6), (768, 12)])
def test_ssast_patch_sizes(width, heads, tmp_path):
    model = random_hf_ast(
        hidden_size=width,
        num_attention_heads=heads,
        num_hidden_layers=1,
        intermediate_size=4 * width,
    )
    tensors = ssast_tensors(model)
    tensors["module.v.pos_embed"] = torch.randn(1, 514, width)
    tensors["module.p_input_fdim"] = torch.tensor(128)
    tensors["module.p_input_tdim"] = torch.tensor(1024)
    torch.save(tensors, tmp_path / "SSAST.pth")
    got = read_checkpoint(tmp_path / "SSAST.pth")
    assert (got.config.dim, got.config.heads, got.grid) == (width, heads, (8, 64))
    assert got.config.grid == (12, 101) and not got.has_head


@pytest.mark.parametrize("side", [14, 24])
def test_plain_vit_has_no_distillation_token(side, tmp_path):
    tensors = timm_tensors(random_hf_ast())
    del tensors["dist_token"]
    tensors["pos_embed"] = torch.randn(1, 1 + side * side, WIDTH)
    colour = torch.randn(WIDTH, 3, 16, 16)
    tensors["patch_embed.proj.weight"] = colour
    torch.save(tensors, tmp_path / "vit.pth")
    for rgb in ("sum", "mean"):
        got = read_checkpoint(tmp_path / "vit.pth", rgb=rgb)
        want = getattr(colour.numpy(), rgb)(axis=1)
        np.testing.assert_allclose(
            got.params["embed/proj/kernel"][:, :, 0], want.transpose(1, 2, 0), atol=1e-6
        )
    assert got.config.distilled is False and got.num_prefix == 1 and "embed/dist" not in got.params
    assert got.grid == (side, side) and got.config.grid == (12, 101) and got.rule == "imagenet"


@pytest.mark.parametrize("kind", ["vit", "deit"])
def test_files_that_transformers_writes_for_imagenet_models(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = dict(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=96,
        image_size=64,
        patch_size=16,
    )
    if kind == "vit":
        model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes))
    else:
        model = transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**sizes))
    model.save_pretrained(tmp_path)
    got = read_checkpoint(tmp_path)
    assert got.layout == f"hf-{kind}" and got.grid == (4, 4)
    assert got.config.heads == 4 and got.config.distilled is (kind == "deit")
    body = getattr(model, kind)
    value = body.layers[0].mlp.fc1.weight.detach().numpy().T
    np.testing.assert_array_equal(got.params["blocks/0/mlp/up/kernel"], value)
    (tmp_path / "bare").mkdir()
    save_file(
        {k: v.clone() for k, v in body.state_dict().items()}, tmp_path / "bare/model.safetensors"
    )
    bare = read_checkpoint(tmp_path / "bare/model.safetensors", heads=4)
    assert bare.config.distilled is (kind == "deit") and bare.grid == (4, 4)


def test_query_key_value_without_bias(tmp_path):
    model = random_hf_ast(qkv_bias=False)
    path = write_layout(model, "hf", tmp_path / "a")
    got = read_checkpoint(path)
    assert got.config.qkv_bias is False and "blocks/0/attn/q/bias" not in got.params
    assert "blocks/0/attn/out/bias" in got.params
    (path / "config.json").unlink()
    with pytest.raises(DataError, match="missing"):
        read_checkpoint(path)


def test_heads_come_from_config_or_argument(tmp_path):
    model = random_hf_ast(num_attention_heads=8)
    path = write_layout(model, "hf", tmp_path / "a")
    assert read_checkpoint(path).config.heads == 8
    assert read_checkpoint(path, heads=4).config.heads == 4
    (path / "config.json").unlink()
    assert read_checkpoint(path).config.heads == 2
    narrow = write_layout(random_hf_ast(hidden_size=96), "original", tmp_path / "b")
    with pytest.raises(DataError, match=r"width of 96 does not show .* heads: give heads="):
        read_checkpoint(narrow)
    assert read_checkpoint(narrow, heads=3).config.heads == 3
    with pytest.raises(UsageError, match="multiple"):
        read_checkpoint(narrow, heads=5)


@pytest.mark.parametrize(
    "entry, value, message",
    [
        ("max_length", 1024, "144 positions .* 12 x 101"),
        ("num_hidden_layers", 3, "says num_hidden_layers=3, the weights 2"),
        ("hidden_act", "gelu_new", "activation 'gelu_new'"),
        ("model_type", "wav2vec2", "model_type 'wav2vec2'"),
        ("hidden_size", -1, "hidden_size=-1"),
        ("id2label", {"0": "a", "1": "b"}, "names 2 labels, the head 5"),
    ],
)
def test_config_json_of_another_model_is_refused(model, entry, value, message, tmp_path):
    path = write_layout(model, "hf", tmp_path / "a")
    fields = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**fields, entry: value}))
    with pytest.raises(DataError, match=message) as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_state_dict_as_torch_modules_save_it(model, tmp_path):
    """A real state_dict is an OrderedDict with _metadata; parameters and transposed views too."""
    torch.save(model.state_dict(), tmp_path / "a.bin")
    want = read_checkpoint(tmp_path / "a.bin").params
    views = {
        name: torch.nn.Parameter(value.T.contiguous().T if value.ndim == 2 else value)
        for name, value in memory_tensors(model).items()
    }
    for legacy in (False, True):
        path = tmp_path / f"b{legacy}.bin"
        torch.save(
            {"state_dict": views, "epoch": 3}, path, _use_new_zipfile_serialization=not legacy
        )
        got = read_checkpoint(path).params
        for name, value in want.items():
            np.testing.assert_array_equal(got[name], value)
    torch.save(model.state_dict(), tmp_path / "c.bin", pickle_protocol=4)
    np.testing.assert_array_equal(
        read_checkpoint(tmp_path / "c.bin").params["norm/bias"], want["norm/bias"]
    )


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "model.", "_orig_mod.module."])
@pytest.mark.parametrize("form", ["hf", "original_plain", "timm_deit_safetensors"])
def test_prefixes_of_wrapped_models_are_removed(model, form, wrapper, tmp_path):
    """By DataParallel, torch.compile, and a module that holds the model."""
    path = write_layout(model, form, tmp_path)
    plain = read_checkpoint(path, **ARGUMENTS)
    if form == "hf":
        path = path / "model.safetensors"
    tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path)
    wrapped = {f"{wrapper}{name}": value.contiguous() for name, value in tensors.items()}
    save_file(wrapped, tmp_path / "model.safetensors")
    got = read_checkpoint(tmp_path / "model.safetensors", **ARGUMENTS)
    assert (got.wrapper, got.layout, got.labels) == (wrapper, plain.layout, plain.labels)
    for name, value in plain.params.items():
        np.testing.assert_array_equal(got.params[name], value, err_msg=name)
    del wrapped[next(name for name in wrapped if name.endswith("norm.bias"))]
    save_file(wrapped, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=rf"behind '{wrapper}'.*1 missing"):
        read_checkpoint(tmp_path / "model.safetensors", **ARGUMENTS)


@pytest.mark.parametrize(
    ("names", "message"),
    [(["a", "a", "b", "c", "d"], "the name 'a' for more"), (["a", "b", "c", "", "d"], "class 3")],
)
def test_doubled_and_empty_class_names_are_refused(model, names, message, tmp_path):
    path = write_layout(model, "hf", tmp_path)
    config = json.loads((path / "config.json").read_text())
    config["id2label"] = {str(i): name for i, name in enumerate(names)}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=f"id2label has .*{message}"):
        read_checkpoint(path)
    source = read_checkpoint(write_layout(model, "original", tmp_path / "o"))
    with pytest.raises(UsageError, match=message):
        write_native(tmp_path / "w.safetensors", source.params, source.config, names)
