"""Trains several methods on one task and prints a table: mean and 95% interval (Student t).

    python tools/compare_methods.py default --seeds 0 1 2
    python tools/compare_methods.py esc --data ESC-10 --source runs/real/backbone.safetensors \
        --folds

The first trains on the embedded default with several seeds (of initial weights, order and
augmentation); the second holds out each fold of a data set in turn. `scratch` is full
fine-tuning from random weights of the same shape. Each row also has the mean difference to the
first method, paired by seed and fold. Every run keeps its folder under --out, so a
second call finishes what the first began.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from aatjax import petl
from aatjax.config import Config, Data, Model, load_config
from aatjax.experiments.run import Result, open_data, train
from aatjax.train.metrics.intervals import mean_interval


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of the table: method, learning rate, and whether the backbone is reset."""

    method: petl.Method
    lr: float
    scratch: bool = False


# The papers' settings for AST-base, scaled to a backbone of width 128 with some 150 tokens: widths
# an eighth of the published reduction, prompts and prefixes a quarter of the published number.
# Prompts keep the DIST token and the backbone's own pooling, so that all rows pool alike.
METHODS = {
    "linear": Entry(petl.Linear(), 1e-2),
    "bitfit": Entry(petl.BitFit(), 5e-3),
    "layer_norm": Entry(petl.LayerNormTuning(), 5e-3),
    "partial": Entry(petl.Partial(), 5e-4),
    "prompt_shallow": Entry(petl.Prompt(tokens=75, deep=False, keep_dist=True, pool=None), 1e-2),
    "prompt_deep": Entry(petl.Prompt(tokens=6, keep_dist=True, pool=None), 1e-2),
    "prefix": Entry(petl.Prefix(tokens=6), 1e-2),
    "lora": Entry(petl.LoRA(reduction=16), 5e-3),
    "aat_m": Entry(petl.AAT(spatial=False), 3e-3),
    "aat_s": Entry(petl.AAT(mlp=False), 3e-3),
    "aat_ms": Entry(petl.AAT(), 3e-3),
    "bottleneck": Entry(petl.Adapter(reduction=8), 5e-3),
    "bottleneck_both": Entry(petl.Adapter(reduction=8, location="both"), 5e-3),
    "conformer": Entry(petl.Adapter(block="conformer", reduction=12), 5e-3),
    "conformer_both": Entry(petl.Adapter(block="conformer", reduction=12, location="both"), 5e-3),
    "dense_moa": Entry(petl.DenseMoA(reduction=16), 5e-3),
    "top_k_moa": Entry(petl.TopKMoA(reduction=16), 5e-3),
    "soft_moa": Entry(petl.SoftMoA(num_experts=7, slots=1, reduction=16), 5e-3),
    "full": Entry(petl.Full(), 5e-4),
    "scratch": Entry(petl.Full(), 1e-3, scratch=True),
}


def configure(config: Config, entry: Entry, *, seed: int, epochs: int | None) -> Config:
    """The task's config with a method at its learning rate."""
    training = dataclasses.replace(
        config.training, seed=seed, epochs=epochs or config.training.epochs
    )
    return dataclasses.replace(
        config,
        petl=entry.method,
        training=training,
        optim=dataclasses.replace(config.optim, lr=entry.lr),
        model=dataclasses.replace(config.model, reset=entry.scratch),
    )


def main() -> None:
    """Runs every method on every seed or fold, then prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--folds", action="store_true", help="hold out each fold in turn")
    parser.add_argument("--data", help="data.path")
    parser.add_argument("--source", help="model.source")
    parser.add_argument("--frames", type=int, help="model.frames")
    parser.add_argument("--positions", default="learned", choices=("learned", "zeros"))
    parser.add_argument("--pad", help="data.pad")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--lr", type=float, help="one learning rate for all, to tune it")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    args = parser.parse_args()

    config = load_config(args.config)
    data: Data = dataclasses.replace(
        config.data, path=args.data or config.data.path, pad=args.pad or config.data.pad
    )
    model: Model = dataclasses.replace(
        config.model,
        source=args.source or config.model.source,
        frames=args.frames or config.model.frames,
        positions=args.positions,
    )
    config = dataclasses.replace(config, data=data, model=model)
    folds: tuple[str | None, ...] = open_data(data).folds if args.folds else (data.fold,)

    rows: list[dict[str, object]] = []
    first: list[float] = []
    for name in args.methods:
        entry = METHODS[name] if args.lr is None else dataclasses.replace(METHODS[name], lr=args.lr)
        results: list[Result] = []
        for seed in args.seeds:
            for fold in folds:
                part = configure(config, entry, seed=seed, epochs=args.epochs)
                part = dataclasses.replace(part, data=dataclasses.replace(data, fold=fold))
                folder = (
                    args.out
                    / Path(args.config).stem
                    / f"{name}-lr{entry.lr:g}-seed{seed}-fold{fold}"
                )
                results.append(train(part, run_dir=folder, show=None))
        values = [r.headline[1] for r in results if r.headline and r.headline[1] is not None]
        mean, low, high = mean_interval(values)
        seconds = sum(r.seconds for r in results) / len(results)
        row = {
            "method": name,
            "lr": entry.lr,
            "trainable": results[0].trainable,
            "mean": mean,
            "low": low,
            "high": high,
            "values": values,
            "seconds": seconds,
        }
        rows.append(row)
        each = " ".join(f"{value:.3f}" for value in values)
        bounds = _bounds(low, high)
        first = first or values
        gains = [a - b for a, b in zip(values, first, strict=True)]
        gain, gain_low, gain_high = mean_interval(gains)
        row["over_first"] = {"mean": gain, "low": gain_low, "high": gain_high}
        print(
            f"{name:<15} lr {entry.lr:<7g} {results[0].trainable:>9,} trainable  {mean:.3f} "
            f"{bounds}  ({each})  over {args.methods[0]} {gain:+.3f} "
            f"{_bounds(gain_low, gain_high, '+')}"
            f"  {seconds:.0f} s a run",
            flush=True,
        )
    out = args.out / f"{Path(args.config).stem}.json"
    out.write_text(json.dumps(rows, indent=2))


def _bounds(low: float | None, high: float | None, sign: str = "") -> str:
    return "" if low is None or high is None else f"[{low:{sign}.3f}, {high:{sign}.3f}]"


if __name__ == "__main__":
    main()
