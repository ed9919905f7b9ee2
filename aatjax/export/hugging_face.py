"""Hugging Face: a folder that transformers opens as `ASTForAudioClassification`."""

import dataclasses
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from aatjax import surgery
from aatjax.convert import write_hf
from aatjax.convert.load import load
from aatjax.errors import UsageError
from aatjax.export.formats import ExportFormat, Logits, explain_parts, refuse
from aatjax.export.merged_model import MergedModel, ParityClips, compute_logits

NO_MASK = "it masks padding, Hugging Face's AST cannot"
USAGE = """```python
from transformers import pipeline

classify = pipeline("audio-classification", model=".")
print(classify("sound.wav"))
```"""


def _check(model: MergedModel) -> None:
    reasons = explain_parts(model, "Hugging Face's AST")
    if model.masks_padding:
        reasons.append(NO_MASK)
    refuse(model, "hf", reasons)


def _write(folder: Path, model: MergedModel) -> tuple[str, ...]:
    return write_hf_folder(folder, model, surgery.arrays(model.merged))


def write_hf_folder(folder: Path, model: MergedModel, params: dict[str, Any]) -> tuple[str, ...]:
    """Write parameters of the model's shape as Hugging Face's AST; return notes.

    Raises:
        UsageError: pooling, head or patches are not Hugging Face's.
    """
    frontend = model.frontend
    try:
        notes = write_hf(
            folder,
            params,
            model.merged.config,
            model.adapter.classes,
            mean=frontend.mean,
            std=frontend.std,
            multi_label=model.adapter.multi_label,
        )
    except UsageError as error:
        raise UsageError(f"{error} (safetensors, onnx or stablehlo)") from error
    if frontend.pad == "repeat":
        notes += ("short clips were repeated in training: repeat them before the extractor",)
    if frontend.pad == "silence":
        notes += ("short clips were filled with silence in training, the extractor fills with 0",)
    return notes


def _run(folder: Path, entries: dict[str, Any], clips: ParityClips) -> Logits:
    if find_spec("torch") is None or find_spec("transformers") is None:
        model = load(folder)
        logits = compute_logits(model, _lengthen(clips, model.config.frames))
        return {"log-mel": logits}, "aatjax (transformers is not installed)"
    from transformers import ASTForAudioClassification

    model = ASTForAudioClassification.from_pretrained(str(folder), local_files_only=True)
    return run_in_torch(model, folder, entries, clips), f"transformers {version('transformers')}"


def run_in_torch(
    model: Any, folder: Path, entries: dict[str, Any], clips: ParityClips
) -> dict[str, np.ndarray]:
    """Return logits from log-mel, and from waveforms by the folder's feature extractor."""
    import torch
    from transformers import ASTFeatureExtractor

    extractor = ASTFeatureExtractor.from_pretrained(str(folder), local_files_only=True)
    model = model.float().eval()

    def logits(features: Any) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor(np.asarray(features))).logits.numpy()

    clips = _lengthen(clips, extractor.max_length)
    found = {"log-mel": logits(clips.features)}
    # The extractor pads short clips as AST does and in no other way.
    whole = clips.length == clips.audio.shape[1]
    first = len(whole) if entries["frontend"]["pad"] == "log_mel_zero" else int(whole.argmin())
    first = len(whole) if whole.all() else first
    if first:
        waveforms = [wave[:size] for wave, size in zip(clips.waveform, clips.length, strict=True)]
        features = extractor(waveforms[:first], sampling_rate=16000, return_tensors="np")
        found["waveform"] = logits(features["input_values"])
    return found


def _lengthen(clips: ParityClips, frames: int) -> ParityClips:
    """Add frames that only the zeros behind a square patch read (`write_hf`)."""
    more = frames - clips.features.shape[1]
    return dataclasses.replace(clips, features=np.pad(clips.features, ((0, 0), (0, more), (0, 0))))


HF_FORMAT = ExportFormat("hf", _check, _write, _run, USAGE)
