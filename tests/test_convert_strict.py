"""B22: every tensor is used or named, in one line, and other models are recognised."""

import numpy as np
import pytest
import torch
from ast_oracle import (
    file_tensors,
    original_tensors,
    random_hf_ast,
    ssast_tensors,
    timm_tensors,
    write_layout,
)
from safetensors.torch import save_file

from aatjax.convert import read_checkpoint, write_native
from aatjax.errors import DataError, UsageError


@pytest.fixture(scope="module")
def model():
    return random_hf_ast()


def refusal(path, **arguments):
    with pytest.raises(DataError) as caught:
        read_checkpoint(path, **arguments)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and len(message) < 2000
    return message


def saved(tensors, path):
    torch.save(tensors, path)
    return path


def test_all_problems_in_one_message(model, tmp_path):
    tensors = original_tensors(model)
    del tensors["module.v.norm.bias"], tensors["module.v.blocks.1.attn.qkv.weight"]
    name = "module.v.blocks.0.mlp.fc1.weight"
    tensors[name] = tensors[name].T.contiguous()
    tensors["module.v.blocks.1.norm1.weight"] = torch.zeros(127)
    for i in range(5):
        tensors[f"module.v.extra.{i}"] = torch.zeros(1)
    message = refusal(saved(tensors, tmp_path / "a.pth"))
    assert "read as original AST .pth" in message
    assert "2 missing (" in message and "module.v.norm.bias" in message
    assert "module.v.blocks.1.attn.qkv.weight" in message
    assert "2 of the wrong shape" in message
    assert f"{name} is (128, 192), expected (192, 128), transposed" in message
    assert "module.v.blocks.1.norm1.weight is (127,), expected (128,)" in message
    assert "5 unexpected (module.v.extra.0, module.v.extra.1, module.v.extra.2, and 2 more)" in (
        message
    )
    assert "Nothing was loaded" in message and "expected: AST" in message


@pytest.mark.parametrize("form", ["original", "hf", "ssast", "timm"])
def test_each_missing_tensor_is_named(model, form, tmp_path):
    make = {"original": original_tensors, "ssast": ssast_tensors, "timm": timm_tensors}
    tensors = file_tensors(model) if form == "hf" else make[form](model)
    unused = ("v.head", "predlayer", "mask_embed")
    for name in tensors:
        if any(part in name for part in unused):
            continue
        left = {key: value for key, value in tensors.items() if key != name}
        message = refusal(saved(left, tmp_path / "a.pth"), frames=128, mels=128)
        assert name in message and "1 missing" in message, message


@pytest.mark.parametrize("form", ["original", "hf"])
def test_each_misshapen_tensor_is_named(model, form, tmp_path):
    tensors = file_tensors(model) if form == "hf" else original_tensors(model)
    for name, value in tensors.items():
        if "v.head" in name or name.endswith(("mlp_head.1.bias", "classifier.dense.bias")):
            continue
        longer = torch.cat([value, value[..., :1]], dim=-1)
        message = refusal(saved({**tensors, name: longer}, tmp_path / "a.pth"))
        assert f"{name} is {tuple(longer.shape)}, expected" in message, message


def test_ignored_tensors_may_be_absent(model, tmp_path):
    tensors = {n: v for n, v in original_tensors(model).items() if "v.head" not in n}
    assert read_checkpoint(saved(tensors, tmp_path / "a.pth")).has_head
    tensors = {n: v for n, v in ssast_tensors(model).items() if "predlayer" not in n}
    assert read_checkpoint(saved(tensors, tmp_path / "a.pth")).layout == "ssast"


def test_headless_ast_is_read(model, tmp_path):
    tensors = {n: v for n, v in original_tensors(model).items() if "mlp_head" not in n}
    got = read_checkpoint(saved(tensors, tmp_path / "a.pth"))
    assert got.layout == "original" and not got.has_head


def fine_tuned(model):
    """AAT adds adapters and prompts to the original names."""
    tensors = original_tensors(model)
    for i in range(2):
        for part in ("s_adapter", "mlp_adapter", "b_adapter"):
            for fc, shape in (("fc1", (32, 128)), ("fc2", (128, 32))):
                tensors[f"module.v.blocks.{i}.{part}.{fc}.weight"] = torch.zeros(shape)
                tensors[f"module.v.blocks.{i}.{part}.{fc}.bias"] = torch.zeros(shape[0])
    tensors["module.prompt_embeddings"] = torch.zeros(1, 12, 128)
    return tensors


def optimizer_state(_):
    layer = torch.nn.Linear(3, 3)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.zeros(1, 3)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def names(*listed):
    return lambda _: {name: torch.zeros(2, 2) for name in listed}


STRANGERS = {
    "optimizer": (optimizer_state, "state of an optimizer"),
    "aat": (fine_tuned, "fine-tuned with AAT adapters"),
    "wav2vec2": (
        names("wav2vec2.feature_extractor.conv_layers.0.conv.weight", "wav2vec2.masked_spec_embed"),
        "wav2vec 2.0",
    ),
    "bert": (
        names(
            "embeddings.word_embeddings.weight",
            "encoder.layer.0.attention.self.query.weight",
            "encoder.layer.0.attention.self.key.weight",
            "encoder.layer.0.attention.self.value.weight",
            "encoder.layer.0.attention.output.LayerNorm.weight",
            "encoder.layer.0.intermediate.dense.weight",
            "encoder.layer.0.output.dense.weight",
            "embeddings.token_type_embeddings.weight",
        ),
        "BERT-like",
    ),
    "cnn14": (names("spectrogram_extractor.stft.conv_real.weight", "bn0.weight"), "CNN14"),
    "lora": (names("base_model.model.encoder.q.lora_A.weight"), "LoRA"),
    "whisper": (
        names("model.encoder.conv1.weight", "model.encoder.layers.0.fc1.weight"),
        "Whisper",
    ),
    "resnet": (names("layer1.0.conv1.weight", "fc.weight"), "convolutional"),
    "swin": (names("layers.0.blocks.0.attn.relative_position_bias_table"), "Swin"),
    "unknown": (names("left", "right"), "named left, right"),
    "nothing": (lambda _: {}, "nothing"),
    "numbers": (lambda _: {"epoch": 3, "loss": 0.1}, "epoch, loss"),
    "tensor": (lambda _: torch.zeros(3), "holds a tensor"),
    "list": (lambda _: [torch.zeros(3)], "holds a list"),
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_other_models_are_recognised(model, kind, tmp_path):
    make, words = STRANGERS[kind]
    message = refusal(saved(make(model), tmp_path / "best_optim_state.pth"))
    assert words in message, message


def test_adapters_of_aatjax_are_recognised(model, tmp_path):
    tensors = {"blocks/0/mlp/adapter/down/kernel": torch.zeros(2, 2)}
    path = tmp_path / "adapter.safetensors"
    save_file(tensors, path, {"aatjax": '{"format": 1, "method": "adapter"}'})
    assert "aatjax adapter" in refusal(path)
    save_file(tensors, path)
    assert "aatjax adapter" in refusal(path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not readable as JSON"),
        ("[]", "not readable as JSON"),
        ('{"format": 2, "config": {}}', "format 2, this version reads format 1"),
        ('{"format": 1, "config": {"width": 3}}', "model has no field 'width'"),
        ('{"format": 1, "config": {"dim": "768"}}', "model.dim='768' is not of type int"),
        ('{"format": 1, "config": {"depth": 100000}}', "model.depth=100000 must be at most 64"),
        ('{"format": 1, "config": {"dim": 1e400}}', "describes no AST"),
        (
            '{"format": 1, "config": {"stride": [10]}}',
            "model.stride=[10] is not of type tuple[int, int]",
        ),
        ('{"format": 1, "config": {"eps": NaN}}', "model.eps=nan is not of type float"),
        ('{"format": 1, "config": {"scan": 1}}', "model.scan=1 is not of type bool"),
        ('{"format": 1, "config": 3}', "model=3 is not an object"),
        ('{"format": 1, "config": {}, "grid": [1, 2, 3]}', "describes no AST"),
        ('{"format": 1, "config": {}, "grid": [12, -1]}', "grid of 12 x -1"),
        ('{"format": 1, "config": {}, "rule": "none"}', "rule 'none'"),
        ('{"format": 1, "config": {}, "labels": [1]}', "list of names"),
        ('{"format": 1, "config": {}, "labels": ["a"]}', "1 labels for 527 classes"),
    ],
)
def test_damaged_native_description(text, message, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"embed/cls": torch.zeros(1, 1, 768)}, path, {"aatjax": text})
    assert message in refusal(path)


def test_native_tensors_are_checked_too(model, tmp_path):
    source = read_checkpoint(write_layout(model, "hf", tmp_path / "hf"))
    path = tmp_path / "a.safetensors"
    write_native(path, source.params, source.config)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        text = file.metadata()["aatjax"]
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["blocks/0/mlp/up/kernel"] = tensors["blocks/0/mlp/up/kernel"].T.contiguous()
    del tensors["norm/bias"]
    save_file(tensors, path, {"aatjax": text})
    message = refusal(path)
    assert "1 missing (norm/bias)" in message and "transposed" in message
    save_file(tensors, path)
    assert "description" in refusal(path)


def test_names_cannot_break_the_line(model, tmp_path):
    tensors = {**original_tensors(model), "a\nb\x1b[31m" + "c" * 10_000: torch.zeros(1)}
    message = refusal(saved(tensors, tmp_path / "a.pth"))
    assert "\x1b" not in message


def test_wrong_arguments():
    for arguments in ({"heads": 0}, {"stride": 0}, {"stride": (10, -1)}, {"frames": -1}):
        with pytest.raises(UsageError, match="at least 1"):
            read_checkpoint("absent.pth", **arguments)
    with pytest.raises((UsageError, TypeError), match="rgb"):  # the type checker may be first
        read_checkpoint("absent.pth", rgb="max")


def test_square_grid_needed_for_imagenet(model, tmp_path):
    tensors = timm_tensors(model)
    tensors["pos_embed"] = torch.tensor(np.zeros((1, 2 + 143, 128), np.float32))
    assert "no square grid" in refusal(saved(tensors, tmp_path / "a.pth"))
