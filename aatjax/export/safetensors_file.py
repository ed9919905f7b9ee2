"""Plain weights in aatjax's own .safetensors, for `aatjax.load` and `aatjax convert`."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from aatjax import surgery
from aatjax.convert import write_native
from aatjax.convert.load import load
from aatjax.export.merged_model import Clips, Subject, logits_of, not_plain, refuse

NAME = "model.safetensors"

USAGE = """```python
import aatjax

model = aatjax.load("model.safetensors"{masking})
print(aatjax.predict("model.safetensors", "sound.wav"))
```"""


def refused(subject: Subject) -> None:
    """Raises a UsageError for a model that is more than an AST."""
    reasons = not_plain(subject, "a file of plain weights")
    refuse(subject, "safetensors", reasons, "export it to onnx or stablehlo")


def write(folder: Path, subject: Subject) -> tuple[str, ...]:
    """Writes `model.safetensors`; returns what a user must know besides."""
    config = dataclasses.replace(subject.served.config, positions="learned")
    frontend = subject.frontend
    write_native(
        folder / NAME,
        surgery.arrays(subject.served),
        config,
        subject.adapter.classes,
        statistics=(frontend.mean, frontend.std),
    )
    notes = []
    if subject.masks:
        notes.append("the model masks padding: load it with mask_padding=True")
    if frontend.pad != "log_mel_zero":
        notes.append(f"short clips were filled by pad={frontend.pad!r}: give that to the front end")
    return tuple(notes)


def run(folder: Path, entries: dict[str, Any], clips: Clips) -> tuple[dict[str, np.ndarray], str]:
    """Logits of the file, loaded again, by what it was given; and what ran it."""
    masks = bool(entries["model"]["mask_padding"])
    model = load(folder / NAME, mask_padding=masks)
    return {"log-mel": logits_of(model, clips)}, "aatjax"


def usage(subject: Subject) -> str:
    """Markdown for the card."""
    return USAGE.format(masking=", mask_padding=True" if subject.masks else "")
