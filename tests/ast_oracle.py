"""A small random AST of Hugging Face `transformers`, and the same tensors in every layout.

The default model has a 12 x 12 patch grid (128 mel bins, 128 frames), which every layout can
express; `read_checkpoint(path, **ARGUMENTS)` adds what some files do not hold.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import ASTConfig, ASTForAudioClassification

LAYOUTS = (
    "hf",  # folder of save_pretrained: config.json, model.safetensors
    "hf_memory_names",  # the names transformers 5 has in memory
    "hf_bare",  # an ASTModel: no prefix, no classifier
    "hf_bin",  # config.json, pytorch_model.bin
    "hf_shards",  # model.safetensors.index.json and two shards
    "hf_bin_shards",
    "original",  # module.v. ..., the unused ImageNet heads
    "original_plain",  # without "module."
    "original_legacy",  # torch.save before 1.6
    "original_half",  # float16
    "original_bfloat16",
    "ssast",
    "timm_deit",  # RGB kernel, nested under "model"
    "timm_deit_safetensors",
    "hf_deit",
    "hf_deit_memory_names",
)
ARGUMENTS = {"frames": 128, "mels": 128}
HEADLESS = ("hf_bare", "ssast", "timm_deit", "timm_deit_safetensors", "hf_deit")
HEADLESS = (*HEADLESS, "hf_deit_memory_names")
Tensors = dict[str, torch.Tensor]

_PREFIX = "audio_spectrogram_transformer."
_TO_FILE = (
    (r"\blayers\.", "encoder.layer."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)
_TO_TIMM = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.distillation_token", "dist_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("layers.", "blocks."),
    ("attention.o_proj", "attn.proj"),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("layernorm.", "norm."),
)


def random_hf_ast(seed: int = 0, **config: Any) -> ASTForAudioClassification:
    """A small AST with every parameter random (biases, scales and positions too), in eval mode."""
    fields = dict(
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=192,
        max_length=128,
        num_labels=5,
    )
    torch.manual_seed(seed)
    model = ASTForAudioClassification(ASTConfig(**{**fields, **config}))
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.normal_(0.0, 0.1)
            if "layernorm" in name and name.endswith("weight"):
                value.add_(1.0)
    return model.eval()


def memory_tensors(model: ASTForAudioClassification) -> Tensors:
    """The tensors under the names of transformers 5's `state_dict()`."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def file_tensors(model: ASTForAudioClassification) -> Tensors:
    """The tensors under the names that files of every version of transformers hold."""
    return {_renamed(name, _TO_FILE): value for name, value in memory_tensors(model).items()}


def timm_tensors(model: ASTForAudioClassification) -> Tensors:
    """The body under timm's names, query, key and value fused."""
    body = {
        name.removeprefix(_PREFIX): value
        for name, value in memory_tensors(model).items()
        if name.startswith(_PREFIX)
    }
    found: Tensors = {}
    for name, value in body.items():
        if ".q_proj." in name:
            parts = [body[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            name, value = name.replace("attention.q_proj", "attn.qkv"), torch.cat(parts)
        elif ".k_proj." in name or ".v_proj." in name:
            continue
        for old, new in _TO_TIMM:
            name = name.replace(old, new)
        found[name] = value
    return found


def original_tensors(model: ASTForAudioClassification, module: str = "module.") -> Tensors:
    """The tensors of an original AST .pth, the unused ImageNet heads among them."""
    width = model.config.hidden_size
    found = {f"{module}v.{name}": value for name, value in timm_tensors(model).items()}
    for head in ("head", "head_dist"):
        found[f"{module}v.{head}.weight"] = torch.randn(1000, width)
        found[f"{module}v.{head}.bias"] = torch.randn(1000)
    head = {"layernorm": "mlp_head.0", "dense": "mlp_head.1"}
    for name, value in model.classifier.state_dict().items():
        part, kind = name.split(".")
        found[f"{module}{head[part]}.{kind}"] = value.clone()
    return found


def ssast_tensors(model: ASTForAudioClassification, module: str = "module.") -> Tensors:
    """The tensors of an SSAST pretraining file whose pretraining grid is the model's grid."""
    width, config = model.config.hidden_size, model.config
    found = {f"{module}v.{name}": value for name, value in timm_tensors(model).items()}
    patch = config.patch_size
    rows = (config.num_mel_bins - patch) // config.frequency_stride + 1
    columns = (config.max_length - patch) // config.time_stride + 1
    found[f"{module}p_input_fdim"] = torch.tensor(rows * patch)
    found[f"{module}p_input_tdim"] = torch.tensor(columns * patch)
    found[f"{module}mask_embed"] = torch.randn(1, 1, width)
    for name in ("cpredlayer", "gpredlayer"):
        for i, size in ((0, width), (2, 256)):
            found[f"{module}{name}.{i}.weight"] = torch.randn(size, width)
            found[f"{module}{name}.{i}.bias"] = torch.randn(size)
    for head in ("head", "head_dist"):
        found[f"{module}v.{head}.weight"] = torch.randn(1000, width)
        found[f"{module}v.{head}.bias"] = torch.randn(1000)
    return found


def in_colour(kernel: torch.Tensor) -> torch.Tensor:
    """An RGB kernel whose channels sum to the grey one exactly."""
    return torch.cat([kernel / 2, kernel / 4, kernel / 4], dim=1)


def deit_tensors(model: ASTForAudioClassification, *, files: bool) -> Tensors:
    """The tensors of a Hugging Face DeiT with an RGB kernel and both ImageNet classifiers."""
    named = file_tensors(model) if files else memory_tensors(model)
    found = {
        "deit." + name.removeprefix(_PREFIX): in_colour(value) if value.ndim == 4 else value
        for name, value in named.items()
        if name.startswith(_PREFIX)
    }
    for head in ("cls_classifier", "distillation_classifier"):
        found[f"{head}.weight"] = torch.randn(1000, model.config.hidden_size)
        found[f"{head}.bias"] = torch.randn(1000)
    return found


def write_layout(model: ASTForAudioClassification, layout: str, folder: Path) -> Path:
    """Writes the model's tensors in one of `LAYOUTS`; returns what `read_checkpoint` takes."""
    folder.mkdir(parents=True, exist_ok=True)
    if layout.startswith("hf_deit"):
        tensors = deit_tensors(model, files=layout == "hf_deit")
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder / "model.safetensors"
    if layout.startswith("hf"):
        return _write_hf(model, layout, folder)
    path = folder / f"{layout}.pth"
    tensors = original_tensors(model, "" if layout == "original_plain" else "module.")
    match layout:
        case "original" | "original_plain":
            torch.save(tensors, path)
        case "original_legacy":
            torch.save(tensors, path, _use_new_zipfile_serialization=False)
        case "original_half":
            torch.save({name: value.half() for name, value in tensors.items()}, path)
        case "original_bfloat16":
            torch.save({name: value.bfloat16() for name, value in tensors.items()}, path)
        case "ssast":
            torch.save(ssast_tensors(model), path)
        case "timm_deit" | "timm_deit_safetensors":
            tensors = timm_tensors(model)
            tensors["patch_embed.proj.weight"] = in_colour(tensors["patch_embed.proj.weight"])
            tensors["head.weight"] = torch.randn(1000, model.config.hidden_size)
            tensors["head.bias"] = torch.randn(1000)
            if layout == "timm_deit":
                torch.save({"model": tensors}, path)
            else:
                path = folder / "model.safetensors"
                save_file(tensors, path)
        case _:
            raise ValueError(f"unknown layout {layout!r}")
    return path


def _write_hf(model: ASTForAudioClassification, layout: str, folder: Path) -> Path:
    if layout == "hf":
        model.save_pretrained(folder)
        return folder
    model.config.save_pretrained(folder)
    tensors = file_tensors(model)
    match layout:
        case "hf_memory_names":
            save_file(memory_tensors(model), folder / "model.safetensors", {"format": "pt"})
        case "hf_bare":
            body = {
                name.removeprefix(_PREFIX): value
                for name, value in tensors.items()
                if name.startswith(_PREFIX)
            }
            save_file(body, folder / "model.safetensors", {"format": "pt"})
        case "hf_bin":
            torch.save(tensors, folder / "pytorch_model.bin")
        case "hf_shards" | "hf_bin_shards":
            pickled = layout == "hf_bin_shards"
            stem, ending = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
            names = sorted(tensors)
            places: dict[str, str] = {}
            for i, part in enumerate((names[::2], names[1::2]), start=1):
                shard = f"{stem}-{i:05d}-of-00002.{ending}"
                held = {name: tensors[name] for name in part}
                (torch.save if pickled else save_file)(held, folder / shard)
                places |= dict.fromkeys(part, shard)
            index = {"metadata": {"total_size": 1}, "weight_map": places}
            (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
        case _:
            raise ValueError(f"unknown layout {layout!r}")
    return folder


def _renamed(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, new in table:
        name = re.sub(pattern, new, name)
    return name
