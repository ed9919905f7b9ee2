"""A folder that transformers opens as `ASTForAudioClassification`, with its feature extractor."""

from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from aatjax import surgery
from aatjax.convert import write_hf
from aatjax.convert.load import load
from aatjax.errors import UsageError
from aatjax.export.merged_model import Clips, Subject, logits_of, not_plain, refuse

USAGE = """```python
from transformers import pipeline

classify = pipeline("audio-classification", model=".")
print(classify("sound.wav"))
```"""


def refused(subject: Subject) -> None:
    """Raises a UsageError for a model that Hugging Face's AST is not."""
    reasons = not_plain(subject, "Hugging Face's AST")
    if subject.masks:
        reasons.append("it masks padding, Hugging Face's AST cannot")
    refuse(subject, "hf", reasons, "export it to onnx or stablehlo")


def write(folder: Path, subject: Subject) -> tuple[str, ...]:
    """Writes the folder; returns what differs a little."""
    return write_weights(folder, subject, surgery.arrays(subject.served))


def write_weights(folder: Path, subject: Subject, params: dict[str, Any]) -> tuple[str, ...]:
    """Writes parameters of the model's shape as Hugging Face's AST.

    Raises:
        UsageError: pooling, head or patches are not Hugging Face's.
    """
    frontend = subject.frontend
    try:
        notes = write_hf(
            folder,
            params,
            subject.served.config,
            subject.adapter.classes,
            mean=frontend.mean,
            std=frontend.std,
        )
    except UsageError as error:
        raise UsageError(f"{error} (safetensors, onnx or stablehlo)") from error
    if frontend.pad == "repeat":
        notes += ("short clips were repeated in training: repeat them before the extractor",)
    if frontend.pad == "silence":
        notes += ("short clips were filled with silence in training, the extractor fills with 0",)
    return notes


def run(folder: Path, entries: dict[str, Any], clips: Clips) -> tuple[dict[str, np.ndarray], str]:
    """Logits by transformers where it is installed, else by aatjax's own reader; and by which."""
    if find_spec("torch") is None or find_spec("transformers") is None:
        return {"log-mel": logits_of(load(folder), clips)}, "aatjax (transformers is not installed)"
    from transformers import ASTForAudioClassification

    model = ASTForAudioClassification.from_pretrained(str(folder), local_files_only=True)
    return by_torch(model, folder, entries, clips), f"transformers {version('transformers')}"


def by_torch(
    model: Any, folder: Path, entries: dict[str, Any], clips: Clips
) -> dict[str, np.ndarray]:
    """Logits of a PyTorch model for log-mel, and for waveforms by the folder's extractor."""
    import torch
    from transformers import ASTFeatureExtractor

    extractor = ASTFeatureExtractor.from_pretrained(str(folder), local_files_only=True)
    model = model.float().eval()

    def logits(features: Any) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor(np.asarray(features))).logits.numpy()

    found = {"log-mel": logits(clips.features)}
    # The extractor fills short clips as AST does and in no other way.
    whole = clips.length == clips.audio.shape[1]
    first = len(whole) if entries["frontend"]["pad"] == "log_mel_zero" else int(whole.argmin())
    first = len(whole) if whole.all() else first
    if first:
        waveforms = [wave[:size] for wave, size in zip(clips.waveform, clips.length, strict=True)]
        features = extractor(waveforms[:first], sampling_rate=16000, return_tensors="np")
        found["waveform"] = logits(features["input_values"])
    return found


def usage(subject: Subject) -> str:
    """Markdown for the card."""
    return USAGE
