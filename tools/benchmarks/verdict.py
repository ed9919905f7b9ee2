"""The comparison of `configs/verdict.py`: its runs, a row for each, and what they say."""

import csv
import dataclasses
import hashlib
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tyro

from aatjax import petl
from aatjax.config import Config, load_config
from aatjax.experiments.partition import open_data
from aatjax.experiments.run import train
from benchmarks import append_row, write_manifest
from benchmarks.tables import FIGURES

Part = Literal["rates", "main", "shots", "placement", "pretraining"]
PARTS: tuple[Part, ...] = ("rates", "main", "shots", "placement", "pretraining")

METHODS: dict[str, petl.Method] = {
    "ridge": petl.Ridge(),
    "linear": petl.Linear(),
    "bitfit": petl.BitFit(),
    "lora": petl.LoRA(reduction=16),
    "bottleneck": petl.Adapter(reduction=8),
    "conformer": petl.Adapter(block="conformer", reduction=12),
    "aat": petl.AAT(),
    "loaa": petl.LoAA(reduction=16),
    "dense_moa": petl.DenseMoA(reduction=16),
    "soft_moa": petl.SoftMoA(num_experts=7, slots=1, reduction=16),
    "full": petl.Full(),
    "scratch": petl.Full(),
}
PLACEMENT: dict[str, petl.Method] = {
    "mlp": petl.AAT(spatial=False),
    "spatial": petl.AAT(mlp=False),
    "mlp and spatial": METHODS["aat"],
    "both, first 2": petl.AAT(blocks="first2"),
    "both, last 2": petl.AAT(blocks="last2"),
    "both, last 1": petl.AAT(blocks="last1"),
    "both, half the width": petl.AAT(ratio=0.125),
}
SHOT_METHODS, SHOTS = ("ridge", "lora", "soft_moa", "full"), (1, 2, 4, 8, 16)
PRETRAINING_METHODS = ("ridge", "aat", "soft_moa", "full")
FACTORS = (1 / 3, 1.0, 3.0)
RATE_TASKS = ("esc10", "digits")


class Item(NamedTuple):
    """A clip of a task: file, class, the fold in which it is tested, recording or speaker."""

    path: Path
    label: str
    fold: str
    group: str


@dataclasses.dataclass(frozen=True)
class Task:
    """A labelled set and its folds.

    Attributes:
        folder: in the folder of real audio.
        frames: length of the input.
        fold: name of the fold of a clip, by its group and its fold in the set.
        takes: clips of a class and group that are kept.
    """

    folder: str
    frames: int
    fold: Callable[[str, str | None], str]
    takes: int = 1000

    def list(self, data: Path) -> list[Item]:
        """Return the clips, the same ones each time."""
        source = open_data(
            dataclasses.replace(load_config("folder").data, path=str(data / self.folder))
        )
        taken = Counter[tuple[str, str]]()
        items = []
        for clip in sorted(source.clips, key=lambda clip: clip.id):
            label, group = source.classes[clip.label[0]], str(clip.group)
            if taken[label, group] < self.takes:
                taken[label, group] += 1
                items.append(Item(Path(str(clip.path)), label, self.fold(group, clip.fold), group))
        return items


def quarter(group: str, fold: str | None) -> str:
    """Return one of four parts, by the name of a recording or speaker."""
    return str(hashlib.sha256(group.encode()).digest()[0] % 4)


TASKS = {
    "esc10": Task("esc10", 198, lambda group, fold: str(fold)),
    "esc50": Task("esc50_fold4", 198, quarter),
    "digits": Task("fsdd", 100, lambda group, fold: group, takes=8),
    "arabic": Task("arabic_speech_commands/val.csv", 100, lambda group, fold: group, takes=2),
    "commands": Task("speech_commands_v0.01", 100, quarter),
}


class Cell(NamedTuple):
    """One run: its clips, and what is trained on them."""

    part: str
    backbone: str
    task: str
    fold: str
    method: str
    rate: float
    shots: int


def verdict(
    data: tyro.conf.Positional[Path],
    embedded: str = "embedded",
    speech: str | None = None,
    masked: str | None = None,
    labelled: str | None = None,
    parts: tuple[Part, ...] = PARTS,
    out: Path = FIGURES / "verdict.csv",
) -> None:
    """Run what `configs/verdict.py` states; rows that --out has are not run again.

    Backbones that are not given are left out. Prints each row.

    Args:
        data: folder of the sets: esc10, esc50_fold4, fsdd, arabic_speech_commands,
            speech_commands_v0.01.
        embedded: weights of the first backbone.
        speech: weights of the second, which has heard speech only.
        masked: weights pretrained by masked patches.
        labelled: weights pretrained by labels, on the same sounds for as many epochs.
        parts: what is run.
        out: CSV file, a row for each run.
    """
    sources = {"embedded": embedded, "speech": speech, "masked": masked, "labelled": labelled}
    done = read_rows(out)
    with tempfile.TemporaryDirectory() as place:
        runner = Runner(data, {k: v for k, v in sources.items() if v}, Path(place), out, done)
        for part in parts:
            for cell, method in list_cells(part, runner):
                runner.run(cell, method)


def list_cells(part: Part, runner: "Runner") -> Iterator[tuple[Cell, petl.Method]]:
    """Return the cells of a part; those of a later part need the rates of the first."""
    if part == "rates":
        for name in METHODS:
            for rate in list_rates(name):
                for task in RATE_TASKS:
                    second = runner.folds(task)[1]
                    yield Cell(part, "embedded", task, second, name, rate, 0), METHODS[name]
        return
    if part == "main":
        grid = [(b, METHODS, tuple(TASKS), 0) for b in ("embedded", "speech")]
    elif part == "pretraining":
        chosen = {name: METHODS[name] for name in PRETRAINING_METHODS}
        grid = [(b, chosen, tuple(TASKS), 0) for b in ("masked", "labelled")]
    elif part == "placement":
        grid = [("embedded", PLACEMENT, tuple(TASKS), 0)]
    else:
        chosen = {name: METHODS[name] for name in SHOT_METHODS}
        grid = [("embedded", chosen, ("esc10", "digits"), shots) for shots in SHOTS]
    for backbone, methods, tasks, shots in grid:
        for task in tasks if backbone in runner.sources else ():
            for fold in runner.folds(task):
                for name, method in methods.items():
                    rate = runner.rate("aat" if part == "placement" else name)
                    yield Cell(part, backbone, task, fold, name, rate, shots), method


def list_rates(name: str) -> tuple[float, ...]:
    """Return the learning rates that are tried for a method on a narrow model."""
    method = METHODS[name]
    usual = method.choose_rate(128)
    return (usual,) if method.closed_form else tuple(float(f"{usual * f:.2g}") for f in FACTORS)


@dataclasses.dataclass
class Runner:
    """Runs cells, each once.

    Attributes:
        data: folder of the sets.
        sources: weights by the name of their backbone.
        place: folder of the runs; each is removed when its row is written.
        out: the CSV file.
        done: its rows.
    """

    data: Path
    sources: dict[str, str]
    place: Path
    out: Path
    done: list[dict[str, str]]

    def __post_init__(self) -> None:
        self.items: dict[str, list[Item]] = {}

    def folds(self, task: str) -> list[str]:
        """Return the names of the folds of a task, in order."""
        if task not in self.items:
            self.items[task] = TASKS[task].list(self.data)
        return sorted({item.fold for item in self.items[task]})

    def rate(self, name: str) -> float:
        """Return the learning rate with the highest mean accuracy in the rows of `rates`."""
        found: dict[float, list[float]] = {}
        for row in self.done:
            if row["part"] == "rates" and row["method"] == name:
                found.setdefault(float(row["rate"]), []).append(float(row["accuracy"]))
        missing = set(list_rates(name)) - {
            rate for rate, values in found.items() if len(values) == len(RATE_TASKS)
        }
        if missing:
            raise SystemExit(f"{self.out} has no rates of {name}: run --parts rates first")
        return max(found, key=lambda rate: (np.mean(found[rate]), -rate))

    def run(self, cell: Cell, method: petl.Method) -> None:
        """Train one model and write its row, unless it is there."""
        key = {
            name: f"{value:g}" if name == "rate" else str(value)
            for name, value in cell._asdict().items()
        }
        if any(all(row[name] == value for name, value in key.items()) for row in self.done):
            return
        folds = self.folds(cell.task)
        aside = {folds[0]} if cell.part == "rates" else set[str]()
        items = [item for item in self.items[cell.task] if item.fold not in aside]
        rows = cut(items, cell.fold, cell.shots)
        folder = self.place / "run"
        path = self.place / "clips.csv"
        write_manifest(path, rows)
        began, spent = time.perf_counter(), time.process_time()
        train(self.make_config(cell, method, path), run_dir=folder, show=None)
        spent, took = time.process_time() - spent, time.perf_counter() - began
        result = json.loads((folder / "result.json").read_text())
        shutil.rmtree(folder)
        row = key | {
            "train_clips": sum(part == "train" for *_, part, _ in rows),
            "test_clips": sum(part == "test" for *_, part, _ in rows),
            "trainable": result["trainable"],
            "accuracy": f"{result['test']['accuracy']:.4f}",
            "cpu_s": f"{spent:.1f}",
            "s": f"{took:.1f}",
        }
        self.done.append({name: str(value) for name, value in row.items()})
        append_row(self.out, row)
        print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)

    def make_config(self, cell: Cell, method: petl.Method, path: Path) -> Config:
        """Return the config of a cell: that of the verdict, with its method and clips."""
        config = load_config("verdict")
        scratch = cell.method == "scratch"
        source = self.sources[cell.backbone]
        frames = TASKS[cell.task].frames
        start = "zeros" if scratch else config.training.head_init
        if method.closed_form:
            start = "model"
        return dataclasses.replace(
            config,
            petl=method,
            model=dataclasses.replace(config.model, source=source, frames=frames, reset=scratch),
            data=dataclasses.replace(config.data, path=str(path), cache=str(self.place / "cache")),
            training=dataclasses.replace(config.training, head_init=start),
            optim=dataclasses.replace(config.optim, lr=cell.rate),
        )


def cut(items: Iterable[Item], fold: str, shots: int) -> list[tuple[Path, str, str, str]]:
    """Return file, class, part and group of each clip; `shots` training clips a class, 0 for all.

    Clips are taken from the groups of a class in turn, in a random order; fewer shots are the first
    of more.
    """
    rows: list[tuple[Path, str, str, str]] = []
    by_class: dict[str, list[Item]] = {}
    for item in items:
        if item.fold == fold:
            rows.append((item.path, item.label, "test", item.group))
        else:
            by_class.setdefault(item.label, []).append(item)
    for number, own in enumerate(by_class.values()):
        for item in take_in_turn(own, np.random.default_rng(number))[: shots or None]:
            rows.append((item.path, item.label, "train", item.group))
    return rows


def take_in_turn(items: Sequence[Item], rng: np.random.Generator) -> list[Item]:
    """Return the clips in a random order in which each group has its turn."""
    turns, order = Counter[str](), []
    for i in rng.permutation(len(items)):
        turns[items[i].group] += 1
        order.append((turns[items[i].group], len(order), items[i]))
    return [item for *_, item in sorted(order, key=lambda entry: entry[:2])]


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
