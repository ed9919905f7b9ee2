"""Accuracy of several methods on one task."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import tyro

from aatjax import petl
from aatjax.config import Config, load_config
from aatjax.experiments.run import Result, open_data, train
from aatjax.train.metrics.intervals import mean_interval


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
    """Train several methods on one task and print means with 95% intervals (Student t).

    Each row also has the mean difference to the first method, paired by seed and fold. `scratch` is
    full fine-tuning from random weights of the same shape. Every run keeps its folder under --out,
    so that a second call continues the first.

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
    changes: dict[str, Any] = {"path": data, "pad": pad}
    task_data = replace_given(task.data, **changes)
    changes = {"source": source, "frames": frames, "positions": positions}
    task = dataclasses.replace(task, data=task_data, model=replace_given(task.model, **changes))
    names = open_data(task_data).folds if folds else (task_data.fold,)
    rows: list[dict[str, Any]] = []
    for name in methods:
        setting = replace_given(METHODS[name], lr=lr)
        results = []
        for seed in seeds:
            for fold in names:
                part = configure(task, setting, seed=seed, epochs=epochs, fold=fold)
                label = f"{name}-lr{setting.lr:g}-seed{seed}-fold{fold}"
                results.append(train(part, run_dir=out / Path(config).stem / label, show=None))
        rows.append(summarize(name, setting, results, rows[0]["values"] if rows else None))
        print(format_row(rows[-1], methods[0]), flush=True)
    (out / f"{Path(config).stem}.json").write_text(json.dumps(rows, indent=2))


def replace_given(instance: Any, **fields: Any) -> Any:
    """Return a dataclass with the fields that are not None."""
    return dataclasses.replace(instance, **{k: v for k, v in fields.items() if v is not None})


def configure(
    config: Config, setting: MethodSetting, *, seed: int, epochs: int | None, fold: Any
) -> Config:
    """Return the task's config with a method at its learning rate."""
    return dataclasses.replace(
        config,
        petl=setting.method,
        training=replace_given(config.training, seed=seed, epochs=epochs),
        optim=dataclasses.replace(config.optim, lr=setting.lr),
        model=dataclasses.replace(config.model, reset=setting.scratch),
        data=dataclasses.replace(config.data, fold=fold),
    )


def summarize(
    name: str, setting: MethodSetting, results: list[Result], first: list[float] | None
) -> dict[str, Any]:
    """Return the row of a method; `first` are the values of the first method."""
    values = [r.headline[1] for r in results if r.headline and r.headline[1] is not None]
    gains = [a - b for a, b in zip(values, first or values, strict=True)]
    mean, gain = mean_interval(values), mean_interval(gains)
    return {
        "method": name,
        "lr": setting.lr,
        "trainable": results[0].trainable,
        **dict(zip(("mean", "low", "high"), mean, strict=True)),
        "values": values,
        "seconds": sum(result.seconds for result in results) / len(results),
        "over_first": dict(zip(("mean", "low", "high"), gain, strict=True)),
    }


def format_row(row: dict[str, Any], first: str) -> str:
    """Return the printed line of a method."""

    def bounds(of: dict[str, Any], sign: str = "") -> str:
        low, high = of["low"], of["high"]
        return "" if low is None or high is None else f"[{low:{sign}.3f}, {high:{sign}.3f}]"

    gain, each = row["over_first"], " ".join(f"{value:.3f}" for value in row["values"])
    return (
        f"{row['method']:<15} lr {row['lr']:<7g} {row['trainable']:>9,} trainable  "
        f"{row['mean']:.3f} {bounds(row)}  ({each})  over {first} {gain['mean']:+.3f} "
        f"{bounds(gain, '+')}  {row['seconds']:.0f} s per run"
    )
