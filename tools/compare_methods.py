"""Trains several methods on one task and prints a table: mean and 95% interval (Student t).

    python tools/compare_methods.py default --seeds 0 1 2
    python tools/compare_methods.py esc --data ESC-10 --source runs/real/backbone.safetensors \
        --folds

The first trains on the embedded default with several seeds (of initial weights, order and
augmentation); the second holds out each fold of a data set in turn. `scratch` is full
fine-tuning from random weights of the same shape. Every run keeps its folder under --out, so a
second call finishes what the first began.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from aatjax import petl
from aatjax.config import Config, Data, Model, load_config
from aatjax.experiment import Result, open_data, train
from aatjax.petl.aat import AAT
from aatjax.petl.simple import Full, Linear
from aatjax.petl.soft_moa import SoftMoA
from aatjax.train.intervals import mean_interval


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of the table: method, learning rate, and whether the backbone is reset."""

    method: petl.Method
    lr: float
    scratch: bool = False


METHODS = {
    "linear": Entry(Linear(), 1e-2),
    "aat_m": Entry(AAT(spatial=False), 3e-3),
    "aat_ms": Entry(AAT(), 3e-3),
    "soft_moa": Entry(SoftMoA(num_experts=7, slots=1, reduction=16), 5e-3),
    "full": Entry(Full(), 5e-4),
    "scratch": Entry(Full(), 1e-3, scratch=True),
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
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--lr", type=float, help="one learning rate for all, to tune it")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    args = parser.parse_args()

    config = load_config(args.config)
    data: Data = dataclasses.replace(config.data, path=args.data or config.data.path)
    model: Model = dataclasses.replace(
        config.model,
        source=args.source or config.model.source,
        frames=args.frames or config.model.frames,
    )
    config = dataclasses.replace(config, data=data, model=model)
    folds: tuple[str | None, ...] = open_data(data).folds if args.folds else (data.fold,)

    rows: list[dict[str, object]] = []
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
            "method": name, "lr": entry.lr, "trainable": results[0].trainable, "mean": mean,
            "low": low, "high": high, "values": values, "seconds": seconds,
        }  # fmt: skip
        rows.append(row)
        each = " ".join(f"{value:.3f}" for value in values)
        bounds = f"[{low:.3f}, {high:.3f}]" if low is not None and high is not None else ""
        print(
            f"{name:<9} lr {entry.lr:<7g} {results[0].trainable:>9,} trainable  {mean:.3f} "
            f"{bounds}  ({each})  {seconds:.0f} s a run",
            flush=True,
        )
    out = args.out / f"{Path(args.config).stem}.json"
    out.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
