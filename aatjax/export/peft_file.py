"""LoRA as files of Hugging Face's PEFT, with the names of transformers 4 and of transformers 5."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from aatjax import surgery
from aatjax.export.formats import ExportFormat, Logits, refuse
from aatjax.export.hugging_face import NO_MASK, run_in_torch, write_hf_folder
from aatjax.export.merged_model import MergedModel, ParityClips
from aatjax.io.optional import need
from aatjax.petl import LoRA

BODY = "audio_spectrogram_transformer"
OLD_NAMES = (
    "attention.attention.query",
    "attention.attention.key",
    "attention.attention.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
NEW_NAMES = (*(f"attention.{letter}_proj" for letter in "qkvo"), "mlp.fc1", "mlp.fc2")
SITES = ("q", "k", "v", "out", "up", "down")
STYLES: dict[str, tuple[str, dict[str, str]]] = {
    "transformers-4": (f"{BODY}.encoder.layer", dict(zip(SITES, OLD_NAMES, strict=True))),
    "transformers-5": (f"{BODY}.layers", dict(zip(SITES, NEW_NAMES, strict=True))),
}
"""Where the blocks are, and the names of the projections in one, by folder."""

USAGE = """```python
from peft import PeftModel
from transformers import ASTForAudioClassification

base = ASTForAudioClassification.from_pretrained("base")
model = PeftModel.from_pretrained(base, "transformers-5")  # transformers-4 with transformers 4
```

`base` is the frozen backbone at the adapter's input length, with an empty head."""


LIBRARIES = ("peft", "transformers", "torch")


def _check(model: MergedModel) -> None:
    reasons = []
    if not isinstance(model.method, LoRA):
        reasons.append("PEFT's LoRA files hold LoRA and nothing else")
    if model.masks_padding:
        reasons.append(NO_MASK)
    plain = model.is_plain and not model.masks_padding
    advice = "hf, safetensors, onnx and stablehlo can" if plain else "onnx and stablehlo can"
    refuse(model, "peft", reasons, advice)


def _write(folder: Path, model: MergedModel) -> tuple[str, ...]:
    """Write a folder per style of names, and the base that they belong to."""
    arrays = {k: np.asarray(v, np.float32) for k, v in surgery.arrays(model.adapted).items()}
    factors = {path: value for path, value in arrays.items() if "/lora_" in path}
    base = {path: value for path, value in arrays.items() if path not in factors}
    for path in [path for path in base if path.startswith("head/")]:  # it comes with the adapter
        base[path] = np.full_like(base[path], path == "head/norm/scale")
    notes = write_hf_folder(folder / "base", model, base)
    for style in STYLES:
        _write_style(folder / style, style, model, factors, arrays)
    return notes


def _write_style(
    folder: Path,
    style: str,
    model: MergedModel,
    factors: dict[str, np.ndarray],
    arrays: dict[str, np.ndarray],
) -> None:
    blocks, names = STYLES[style]
    tensors = {}
    for path, value in factors.items():
        _, number, _, site, factor = path.split("/")
        name = f"{blocks}.{number}.{names[site]}.lora_{factor[-1].upper()}.weight"
        tensors[name] = value.T
    tensors |= {
        "classifier.layernorm.weight": arrays["head/norm/scale"],
        "classifier.layernorm.bias": arrays["head/norm/bias"],
        "classifier.dense.weight": arrays["head/linear/kernel"].T,
        "classifier.dense.bias": arrays["head/linear/bias"],
    }
    modules = dict.fromkeys(name.partition(".lora_")[0] for name in tensors if ".lora_" in name)
    one = surgery.modules(model.adapted)[next(iter(factors)).rpartition("/")[0]]
    rank = next(value.shape[1] for path, value in factors.items() if path.endswith("lora_a"))
    alpha = getattr(one, "scale") * rank  # noqa: B009
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": "base",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "target_modules": list(modules),  # whole names: output.dense ends attention.output.dense
        "modules_to_save": ["classifier"],
    }
    folder.mkdir()
    stored = {f"base_model.model.{k}": np.ascontiguousarray(v) for k, v in tensors.items()}
    save_file(stored, folder / "adapter_model.safetensors", {"format": "pt"})
    text = json.dumps(config, indent=2) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")


def _run(folder: Path, entries: dict[str, Any], clips: ParityClips) -> Logits:
    need(*LIBRARIES, extra="export")
    from peft import PeftModel
    from transformers import ASTForAudioClassification

    found = version("transformers")
    style = "transformers-4" if found.startswith("4.") else "transformers-5"
    base = ASTForAudioClassification.from_pretrained(str(folder / "base"), local_files_only=True)
    model = PeftModel.from_pretrained(base, str(folder / style))
    logits = run_in_torch(model, folder / "base", entries, clips)
    runner = f"peft {version('peft')}, transformers {found}"
    return {f"{style}, {given}": value for given, value in logits.items()}, runner


PEFT_FORMAT = ExportFormat("peft", _check, _write, _run, USAGE, LIBRARIES)
