"""Accuracy of several methods on one task."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import tyro

from aatjax import petl
from aatjax.config import load_config
from aatjax.experiments.compare.runs import CompareEntry, run_grid
from aatjax.experiments.compare.tables import format_markdown, make_comparison_json


@dataclasses.dataclass(frozen=True)
class MethodSetting:
    """A row of the table: method, learning rate, and whether the backbone is reset."""

    method: petl.Method
    lr: float
    scratch: bool = False


# The papers' settings for AST-base, scaled to a backbone of width 128 with some 150 tokens: widths
# an eighth of the published reduction, prompts and prefixes a quarter of the published number.
# Prompts keep the DIST token and the backbone's own pooling, so that all rows pool alike.
METHODS = {
    "ridge": MethodSetting(petl.Ridge(), 1e-2),
    "linear": MethodSetting(petl.Linear(), 1e-2),
    "bitfit": MethodSetting(petl.BitFit(), 5e-3),
    "layer_norm": MethodSetting(petl.LayerNormTuning(), 5e-3),
    "partial": MethodSetting(petl.Partial(), 5e-4),
    "prompt_shallow": MethodSetting(
        petl.Prompt(tokens=75, deep=False, keep_dist=True, pool=None), 1e-2
    ),
    "prompt_deep": MethodSetting(petl.Prompt(tokens=6, keep_dist=True, pool=None), 1e-2),
    "prefix": MethodSetting(petl.Prefix(tokens=6), 1e-2),
    "lora": MethodSetting(petl.LoRA(reduction=16), 5e-3),
    "aat_m": MethodSetting(petl.AAT(spatial=False), 3e-3),
    "aat_s": MethodSetting(petl.AAT(mlp=False), 3e-3),
    "aat_ms": MethodSetting(petl.AAT(), 3e-3),
    "bottleneck": MethodSetting(petl.Adapter(reduction=8), 5e-3),
    "bottleneck_both": MethodSetting(petl.Adapter(reduction=8, location="both"), 5e-3),
    "conformer": MethodSetting(petl.Adapter(block="conformer", reduction=12), 5e-3),
    "conformer_both": MethodSetting(
        petl.Adapter(block="conformer", reduction=12, location="both"), 5e-3
    ),
    "loaa": MethodSetting(petl.LoAA(reduction=16), 5e-3),
    "dense_moa": MethodSetting(petl.DenseMoA(reduction=16), 5e-3),
    "top_k_moa": MethodSetting(petl.TopKMoA(reduction=16), 5e-3),
    "soft_moa": MethodSetting(petl.SoftMoA(num_experts=7, slots=1, reduction=16), 5e-3),
    "full": MethodSetting(petl.Full(), 5e-4),
    "scratch": MethodSetting(petl.Full(), 1e-3, scratch=True),
}


def compare_methods(
    config: tyro.conf.Positional[str],
    methods: tuple[str, ...] = tuple(METHODS),
    seeds: tuple[int, ...] = (0,),
    folds: bool = False,
    data: str | None = None,
    source: str | None = None,
    frames: int | None = None,
    positions: Literal["learned", "zeros"] = "learned",
    pad: Literal["log_mel_zero", "silence", "repeat"] | None = None,
    epochs: int | None = None,
    lr: float | None = None,
    out: Path = Path("runs/compare"),
) -> None:
    """Train methods on one task; print means with 95% intervals, and differences to the first.

    `aatjax compare` with the settings above. `scratch` is full fine-tuning from random weights of
    the same shape. Every run keeps its folder under --out, so that a second call continues the
    first.

    Args:
        config: a config, such as default or esc.
        methods: rows of the table.
        seeds: seeds of initial weights, order and augmentation.
        folds: hold out each fold in turn.
        data: data.path.
        source: model.source.
        frames: model.frames.
        positions: model.positions.
        pad: data.pad.
        epochs: training.epochs.
        lr: one learning rate for all methods, to tune it.
        out: folder of the runs.
    """
    task = load_config(config)
    entries = []
    for name in methods:
        setting = METHODS[name]
        model = {"source": source, "frames": frames, "positions": positions}
        part = dataclasses.replace(
            task,
            petl=setting.method,
            data=replace_given(task.data, path=data, pad=pad),
            model=replace_given(task.model, **model, reset=setting.scratch),
            training=replace_given(task.training, epochs=epochs),
            optim=replace_given(task.optim, lr=lr or setting.lr),
        )
        entries.append(CompareEntry(name, part))
    folder = out / Path(config).stem / (f"lr{lr:g}" if lr else "runs")
    comparison = run_grid(entries, folder, seeds=seeds, folds=folds, show=None, report=print)
    (out / f"{Path(config).stem}.json").write_text(json.dumps(make_comparison_json(comparison)))
    print(format_markdown(comparison))
    for name in methods:
        values = [f"{cell.value:.3f}" for cell in comparison.cells if cell.entry == name]
        print(f"{name}: {' '.join(values)}")


def replace_given(instance: Any, **fields: Any) -> Any:
    """Return a dataclass with the fields that are not None."""
    return dataclasses.replace(instance, **{k: v for k, v in fields.items() if v is not None})
