"""Macro-F1 with and without `training.balance`, where some classes have few clips."""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tyro

from aatjax.config import Config, load_config
from aatjax.data.sampling import Balance
from aatjax.data.source import Clip
from aatjax.experiments.partition import open_data
from aatjax.experiments.run import train
from aatjax.petl import make_method
from aatjax.train.metrics.intervals import mean_interval
from benchmarks import append_row, write_manifest

BALANCES: tuple[Balance, ...] = ("none", "sampler", "loss")


def long_tail(
    data: tyro.conf.Positional[Path],
    ratio: float = 20.0,
    methods: tuple[str, ...] = ("ridge", "soft_moa"),
    source: str = "embedded",
    draws: int = 3,
    epochs: int = 15,
    runs: Path = Path("runs/long-tail"),
    out: Path | None = None,
) -> None:
    """Train on each set of folds cut to a long tail, test on the whole fold that is held out.

    The classes, in a random order, keep a share of their training clips that falls in equal steps
    of the logarithm from 1 to 1 / ratio. Prints the mean macro-F1 over folds and draws, and the
    difference to no balance with its interval over folds.

    Args:
        data: a set in ESC-50's layout.
        ratio: clips of the most frequent class for one of the rarest.
        methods: rows; but for ridge the head starts as ridge.
        source: weights of the backbone.
        draws: orders of the classes and draws of their clips, per fold.
        epochs: of each run.
        runs: folder of the runs; finished ones are not repeated.
        out: CSV file, a row for each run.
    """
    clips = open_data(dataclasses.replace(load_config("esc").data, path=str(data)))
    folds = clips.folds
    found: dict[tuple[str, str], list[list[float]]] = defaultdict(lambda: [[] for _ in folds])
    for number, fold in enumerate(folds):
        for draw in range(draws):
            rows = cut(clips.clips, fold, ratio, np.random.default_rng([number, draw]))
            path = runs / f"fold{fold}-draw{draw}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            named = [
                (
                    (data / "audio" / clip.id).absolute(),
                    clips.classes[clip.label[0]],
                    part,
                    clip.group,
                )
                for clip, part in rows
            ]
            write_manifest(path, named)
            for method in methods:
                for balance in BALANCES:
                    config = make_config(path, method, source, balance, epochs, draw)
                    folder = runs / f"{path.stem}-{method}-{balance}"
                    train(config, run_dir=folder, show=None)
                    test = json.loads((folder / "result.json").read_text())["test"]
                    found[method, balance][number].append(test["macro_f1"])
                    row = {"fold": fold, "draw": draw, "method": method, "balance": balance}
                    row |= {"clips": sum(part == "train" for _, part in rows)}
                    row |= {name: f"{test[name]:.4f}" for name in ("macro_f1", "accuracy")}
                    append_row(out, row)
                    print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    for (method, balance), values in found.items():
        line = f"{method} {balance}: {np.mean(values):.3f}"
        if balance != "none":
            change = np.mean(values, axis=1) - np.mean(found[method, "none"], axis=1)
            middle, low, high = mean_interval(change)
            line += f"  {middle:+.3f} [{low:+.3f}, {high:+.3f}]"
        print(line)


def cut(
    clips: Iterable[Clip], fold: str, ratio: float, rng: np.random.Generator
) -> list[tuple[Clip, str]]:
    """Return the clips that are kept, each with its part."""
    by_class: dict[int, list[Clip]] = defaultdict(list)
    kept = []
    for clip in clips:
        if clip.fold == fold:
            kept.append((clip, "test"))
        else:
            by_class[clip.label[0]].append(clip)
    order = rng.permutation(sorted(by_class))
    for place, label in enumerate(order):
        own = by_class[int(label)]
        count = max(1, round(len(own) * ratio ** (-place / (len(order) - 1))))
        kept += [(own[i], "train") for i in sorted(rng.permutation(len(own))[:count])]
    return kept


def make_config(
    path: Path, method: str, source: str, balance: Balance, epochs: int, seed: int
) -> Config:
    """Return the config of a run: that of ESC, with statistics pooling and a head from ridge."""
    config = load_config("esc")
    return dataclasses.replace(
        config,
        petl=make_method(method),
        model=dataclasses.replace(config.model, source=source, pool="stats"),
        data=dataclasses.replace(config.data, format="manifest", path=str(path), leaks="report"),
        training=dataclasses.replace(
            config.training, epochs=epochs, balance=balance, head_init="ridge", seed=seed
        ),
    )
