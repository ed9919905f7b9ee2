"""LoRA as files of Hugging Face's PEFT, named as transformers 4 and as transformers 5 names it."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from aatjax import surgery
from aatjax.export import hugging_face
from aatjax.export.merged_model import Clips, Subject, refuse
from aatjax.io.optional import need
from aatjax.petl import LoRA

BODY = "audio_spectrogram_transformer"
STYLES: dict[str, tuple[str, dict[str, str]]] = {
    "transformers-4": (
        f"{BODY}.encoder.layer",
        {
            "q": "attention.attention.query",
            "k": "attention.attention.key",
            "v": "attention.attention.value",
            "out": "attention.output.dense",
        },
    ),
    "transformers-5": (
        f"{BODY}.layers",
        {
            "q": "attention.q_proj",
            "k": "attention.k_proj",
            "v": "attention.v_proj",
            "out": "attention.o_proj",
        },
    ),
}
"""Where the blocks are, and the names of the projections in one, by folder."""

USAGE = """```python
from peft import PeftModel
from transformers import ASTForAudioClassification

base = ASTForAudioClassification.from_pretrained("base")
model = PeftModel.from_pretrained(base, "transformers-5")  # transformers-4 with transformers 4
```

`base` is the frozen backbone at the adapter's input length, its head still empty."""


def refused(subject: Subject) -> None:
    """Raises a UsageError for anything but LoRA; UnavailableError without the libraries."""
    reasons = []
    if not isinstance(subject.method, LoRA):
        reasons.append("PEFT's LoRA files hold LoRA and nothing else")
    if subject.masks:
        reasons.append("it masks padding, Hugging Face's AST cannot")
    instead = "onnx and stablehlo can"
    if subject.plain and not subject.masks:
        instead = "hf, safetensors, onnx and stablehlo can"
    refuse(subject, "peft", reasons, instead)
    need("peft", "transformers", "torch", extra="export")


def write(folder: Path, subject: Subject) -> tuple[str, ...]:
    """Writes one folder a key style, and the base that they belong to."""
    arrays = {k: np.asarray(v, np.float32) for k, v in surgery.arrays(subject.adapted).items()}
    factors = {path: value for path, value in arrays.items() if "/lora_" in path}
    base = {path: value for path, value in arrays.items() if path not in factors}
    for path in [path for path in base if path.startswith("head/")]:  # it comes with the adapter
        base[path] = np.full_like(base[path], path == "head/norm/scale")
    notes = hugging_face.write_weights(folder / "base", subject, base)
    for style in STYLES:
        _write_style(folder / style, style, subject, factors, arrays)
    return notes


def _write_style(
    folder: Path,
    style: str,
    subject: Subject,
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
    sites = dict.fromkeys(path.split("/")[3] for path in factors)
    numbers = sorted({int(path.split("/")[1]) for path in factors})
    one = surgery.modules(subject.adapted)[next(iter(factors)).rpartition("/")[0]]
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
        "target_modules": [names[site] for site in sites],
        "layers_to_transform": None if len(numbers) == subject.served.config.depth else numbers,
        "modules_to_save": ["classifier"],
    }
    folder.mkdir()
    stored = {f"base_model.model.{k}": np.ascontiguousarray(v) for k, v in tensors.items()}
    save_file(stored, folder / "adapter_model.safetensors", {"format": "pt"})
    text = json.dumps(config, indent=2) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")


def run(folder: Path, entries: dict[str, Any], clips: Clips) -> tuple[dict[str, np.ndarray], str]:
    """Logits by peft, with the files for the transformers that is installed."""
    need("peft", "transformers", "torch", extra="export")
    from peft import PeftModel
    from transformers import ASTForAudioClassification

    found = version("transformers")
    style = "transformers-4" if found.startswith("4.") else "transformers-5"
    base = ASTForAudioClassification.from_pretrained(str(folder / "base"), local_files_only=True)
    model = PeftModel.from_pretrained(base, str(folder / style))
    logits = hugging_face.by_torch(model, folder / "base", entries, clips)
    runner = f"peft {version('peft')}, transformers {found}"
    return {f"{style}, {given}": value for given, value in logits.items()}, runner


def usage(subject: Subject) -> str:
    """Markdown for the card."""
    return USAGE
