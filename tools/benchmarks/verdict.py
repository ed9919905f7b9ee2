"""The runs of `configs/verdict.py`, its rows of figures and their statistics."""

import csv
import dataclasses
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from aatjax import petl
from aatjax.config import Config, load_config
from aatjax.configs.verdict import METHODS
from aatjax.experiments.run import train
from aatjax.train.logging import METRICS, read_metrics
from benchmarks.compare import METHODS as SETTINGS
from benchmarks.compare import MethodSetting
from benchmarks.tables import FIGURES

Clip = tuple[Path, str, str, str]
"""File, label, part that is held out together, recording or speaker."""
Experiment = str
FACTORS = (1.0, 1 / 3)
"""Rates tried, in units of the preset."""
SHOTS = (1, 2, 4, 8, 16)
BOTH = ("esc10", "fsdd")


@dataclasses.dataclass(frozen=True)
class Task:
    """A set of sounds: its clips, and the length of the input in 10 ms frames."""

    read: Callable[[Path], Iterable[Clip]]
    frames: int


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run: what it is of, and what is held out."""

    experiment: str
    backbone: str
    task: str
    part: str
    method: str
    shots: int | None = None
    draw: int = 0


def list_esc(folder: Path) -> Iterator[Clip]:
    """The clips of an ESC folder with its folds."""
    for path in sorted((folder / "meta").glob("*.csv")):
        for row in csv.DictReader(path.open()):
            yield folder / "audio" / row["filename"], row["category"], row["fold"], row["src_file"]


def list_halves(folder: Path) -> Iterator[Clip]:
    """The clips of one fold in two halves: the recordings of a class take turns."""
    by_class: dict[str, list[str]] = defaultdict(list)
    for path, label, _, source in list_esc(folder):
        known = by_class[label]
        known += [source] * (source not in known)
        yield path, label, "ab"[known.index(source) % 2], source


def list_digits(folder: Path) -> Iterator[Clip]:
    """The first takes of Free Spoken Digits; the part is the speaker."""
    for path in sorted((folder / "recordings").iterdir()):
        found = re.fullmatch(r"(\d)_([a-z]+)_(\d+)\.wav", path.name)
        if found and int(found[3]) < 12:
            yield path, found[1], found[2], found[2]


def list_arabic(folder: Path) -> Iterator[Clip]:
    """Takes 1 to 5 of the development list of Arabic Speech Commands; the part is the speaker."""
    for row in csv.DictReader((folder / "val.csv").open()):
        speaker, _, take = Path(row["file"]).stem.split("_")
        if int(take) <= 5:
            yield folder / row["file"], row["class"], speaker, speaker


def list_commands(folder: Path) -> Iterator[Clip]:
    """Speech Commands in two halves by speaker."""
    for path in sorted(folder.glob("*/*_nohash_*.wav")):
        speaker = path.name.split("_")[0]
        yield path, path.parent.name, "ab"[int(speaker, 16) % 2], speaker


TASKS = {
    "esc10": Task(lambda data: list_esc(data / "esc10"), 298),
    "esc50_fold4": Task(lambda data: list_halves(data / "esc50_fold4"), 298),
    "fsdd": Task(lambda data: list_digits(data / "fsdd"), 70),
    "arabic": Task(lambda data: list_arabic(data / "arabic_speech_commands"), 98),
    "speech_commands": Task(lambda data: list_commands(data / "speech_commands_v0.01"), 98),
}


def place(where: str, blocks: str | None = None) -> MethodSetting:
    """A bottleneck adapter at a place."""
    return MethodSetting(petl.Adapter(reduction=8, location=where, blocks=blocks), 5e-3)  # pyright: ignore[reportArgumentType]


PLACEMENTS = {
    **{f"bottleneck_{where}": place(where) for where in ("mhsa", "ffn", "both")},
    **{f"bottleneck_both_{blocks}": place("both", blocks) for blocks in ("first2", "last2")},
    **{
        f"soft_moa_{count}": MethodSetting(
            petl.SoftMoA(num_experts=count, slots=1, reduction=16), 5e-3
        )
        for count in (1, 3, 7, 14)
    },
}
ALL = {**SETTINGS, **PLACEMENTS}


def list_cells(parts: Mapping[str, list[str]]) -> Iterator[Cell]:
    """All runs that `configs/verdict.py` states, given the parts of every task."""
    pairs = [("embedded", task) for task in TASKS]
    pairs += [("speech", task) for task in ("esc10", "esc50_fold4")]
    for backbone, task in pairs:
        for part in parts[task]:
            yield from (Cell("methods", backbone, task, part, name) for name in METHODS)
    for task in BOTH:
        for shots in SHOTS:
            for draw in range(3):
                for name in ("ridge", "linear", "lora", "bottleneck", "soft_moa", "full"):
                    yield Cell("shots", "embedded", task, parts[task][-1], name, shots, draw)
        for part in parts[task]:
            yield from (Cell("placement", "embedded", task, part, name) for name in PLACEMENTS)
            for name in ("ridge", "soft_moa", "full"):
                yield Cell("pretraining", "masked", task, part, name)


def verdict(
    data: Path,
    speech: Path,
    masked: Path,
    runs: Path = Path("runs/verdict"),
    out: Path = FIGURES / "verdict.csv",
    experiments: tuple[str, ...] = ("methods", "shots", "placement", "pretraining"),
) -> None:
    """Run what is not in the CSV yet.

    Args:
        data: folder with esc10, esc50_fold4, fsdd, arabic_speech_commands, speech_commands_v0.01.
        speech: backbone of `aatjax pretrain` on speech alone.
        masked: backbone of `aatjax pretrain --objective masked`.
        runs: folder of the runs.
        out: rows of figures; those that are there are kept.
        experiments: parts of the verdict.
    """
    sources = {"embedded": "embedded", "speech": str(speech), "masked": str(masked)}
    parts = {}
    for name, task in TASKS.items():
        clips = list(task.read(data))
        parts[name] = sorted({part for _, _, part, _ in clips})
        write_manifest(runs / f"{name}.csv", clips)
    done = read_done(out)
    fields = [f.name for f in dataclasses.fields(Cell)]
    titles = [*fields, "lr", "trainable", "train_clips", "accuracy", "seconds"]
    if not out.exists():
        out.write_text(",".join(titles) + "\n")
    wanted = [cell for cell in list_cells(parts) if cell.experiment in experiments]
    for number, cell in enumerate(wanted, 1):
        row = {k: "" if v is None else str(v) for k, v in dataclasses.asdict(cell).items()}
        if tuple(row.values()) in done:
            continue
        config = make_config(cell, sources[cell.backbone], runs)
        rate = choose_rate(cell, parts[cell.task][0], config, runs)
        folder = runs / "-".join(value or "all" for value in row.values())
        result = train_at(config, rate, folder)
        row |= {"lr": f"{rate:g}", "trainable": str(result["trainable"])}
        row |= {"train_clips": str(result["train_clips"])}
        row |= {"accuracy": f"{result['headline'][1]:.4f}", "seconds": f"{result['seconds']:.2f}"}
        with out.open("a", newline="") as file:
            csv.DictWriter(file, titles, lineterminator="\n").writerow(row)
        print(f"{number} of {len(wanted)}", *row.values(), flush=True)


def write_manifest(path: Path, clips: Iterable[Clip]) -> None:
    """Write the clips of a task as a CSV that `aatjax` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("path", "label", "fold", "group"))
        writer.writerows((file.absolute(), *rest) for file, *rest in clips)


def read_done(path: Path) -> set[tuple[str, ...]]:
    """The cells that a CSV holds."""
    if not path.exists():
        return set()
    fields = [f.name for f in dataclasses.fields(Cell)]
    return {tuple(row[name] for name in fields) for row in csv.DictReader(path.open())}


def make_config(cell: Cell, source: str, runs: Path) -> Config:
    """The config of a cell, without its rate."""
    config, setting = load_config("verdict"), ALL[cell.method]
    frames = TASKS[cell.task].frames
    start = {"linear": "zeros", "scratch": "model", "ridge": "model"}.get(cell.method, "ridge")
    path = str(runs / f"{cell.task}.csv")
    replace = dataclasses.replace
    return replace(
        config,
        petl=setting.method,
        model=replace(config.model, source=source, frames=frames, reset=setting.scratch),
        data=replace(config.data, path=path, fold=cell.part, shots=cell.shots, draw=cell.draw),
        training=replace(config.training, head_init=start),
    )


def choose_rate(cell: Cell, part: str, config: Config, runs: Path) -> float:
    """The rate of a method on a task: the best on validation clips of the first cell."""
    preset = ALL[cell.method].lr
    if cell.method == "ridge":
        return preset
    data = dataclasses.replace(
        config.data, fold=part, valid_fraction=0.2, shots=None, draw=0, seed=0
    )
    scores = {}
    for factor in sorted(FACTORS):  # equal scores give the lower
        tuned = dataclasses.replace(config, data=data)
        folder = runs / f"rate-{cell.backbone}-{cell.task}-{cell.method}-{factor:.2f}"
        train_at(tuned, preset * factor, folder)
        scores[factor] = read_metrics(folder / METRICS)[-1]["valid/accuracy"]
    return preset * max(scores, key=lambda factor: scores[factor])


def train_at(config: Config, rate: float, folder: Path) -> dict[str, object]:
    """Train with a rate, and return what `result.json` holds."""
    optim = dataclasses.replace(config.optim, lr=rate)
    train(dataclasses.replace(config, optim=optim), run_dir=folder, show=None)
    return json.loads((folder / "result.json").read_text())
