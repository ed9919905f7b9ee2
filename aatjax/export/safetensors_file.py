"""Plain weights in aatjax's own .safetensors, for `aatjax.load` and `aatjax convert`."""

import dataclasses
from pathlib import Path
from typing import Any

from aatjax import surgery
from aatjax.convert import write_native
from aatjax.convert.load import load
from aatjax.export.formats import ExportFormat, Logits, explain_parts, refuse
from aatjax.export.merged_model import MergedModel, ParityClips, compute_logits

NAME = "model.safetensors"

USAGE = """```python
import aatjax

model = aatjax.load("model.safetensors"{mask_padding})
print(aatjax.predict("model.safetensors", "sound.wav"))
```"""


def _check(model: MergedModel) -> None:
    refuse(model, "safetensors", explain_parts(model, "a file of plain weights"))


def _write(folder: Path, model: MergedModel) -> tuple[str, ...]:
    config = dataclasses.replace(model.merged.config, positions="learned")
    frontend = model.frontend
    write_native(
        folder / NAME,
        surgery.arrays(model.merged),
        config,
        model.adapter.classes,
        statistics=(frontend.mean, frontend.std),
    )
    notes = []
    if model.masks_padding:
        notes.append("the model masks padding: load it with mask_padding=True")
    if frontend.pad != "log_mel_zero":
        notes.append(f"short clips were padded by pad={frontend.pad!r}: set it in the front end")
    return tuple(notes)


def _run(folder: Path, entries: dict[str, Any], clips: ParityClips) -> Logits:
    masks = bool(entries["model"]["mask_padding"])
    model = load(folder / NAME, mask_padding=masks)
    return {"log-mel": compute_logits(model, clips)}, "aatjax"


SAFETENSORS_FORMAT = ExportFormat("safetensors", _check, _write, _run, USAGE)
