"""Time and memory of a start with many rows, many classes and many files."""

import dataclasses
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import soundfile

from aatjax.audio.frontend import FrontEnd
from aatjax.audio.scoring import Scoring
from aatjax.config import Data
from aatjax.data.clip_windows import cut_clips
from aatjax.data.manifest import Manifest
from aatjax.data.sampling import compute_draw_shares
from aatjax.errors import DataError
from aatjax.experiments.partition import make_partition
from aatjax.train.run_dir import RunClaims
from benchmarks import append_row

T = TypeVar("T")
SOUNDS = 50  # files that the names are hard links of
BATCH = 64


@dataclasses.dataclass(frozen=True)
class Step:
    """One row: a step of a start, and what it took.

    Attributes:
        rows: clips.
        classes: classes.
        step: what was done.
        cpu_s: processor seconds of all threads, system calls included.
        memory_mb: the most memory that the process had used until then.
    """

    rows: int
    classes: int
    step: str
    cpu_s: str
    memory_mb: int


def scale(
    rows: int = 1_000_000,
    classes: tuple[int, ...] = (50, 5000),
    clips: int = 20_000,
    out: Path | None = None,
) -> None:
    """Measure the steps before training of a list with many rows, then of many cached clips.

    The names are hard links of a few sounds; no step knows that, but the one that hashes them.

    Args:
        rows: rows of the list.
        classes: classes of the list, one list each.
        clips: clips of the set that is decoded and started again.
        out: CSV file that receives the rows.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        _link_sounds(folder / "sounds", max(rows, clips))
        for count in classes:
            for step in _time_list(folder, rows, count):
                _report(step, out)
        for step in _time_starts(folder, clips):
            _report(step, out)


def _report(step: Step, out: Path | None) -> None:
    print(
        f"{step.rows:>9,} {step.classes:>5,}  {step.step:<46} {step.cpu_s:>7} s  "
        f"{step.memory_mb:>6,} MB",
        flush=True,
    )
    if out is not None:
        append_row(out, dataclasses.asdict(step))


def _link_sounds(folder: Path, count: int) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(SOUNDS):
        noise = rng.normal(0, 2000, 16000).astype(np.int16)
        soundfile.write(folder / f"s{number}.wav", noise, 16000)
    for number in range(count):
        os.link(folder / f"s{number % SOUNDS}.wav", folder / f"c{number:07d}.wav")


def _write_list(path: Path, rows: int, classes: int, files: int) -> Path:
    with path.open("w", encoding="utf-8") as file:
        file.write("path,label\n")
        for row in range(rows):
            file.write(f"sounds/c{row % files:07d}.wav,class{row % classes:04d}\n")
    return path


def _measure(rows: int, classes: int, name: str, function: Callable[[], T]) -> tuple[Step, T]:
    began = time.process_time()
    result = function()
    spent = time.process_time() - began
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    most /= 2**20 if sys.platform == "darwin" else 2**10
    return Step(rows, classes, name, f"{spent:.2f}", round(most)), result


def _time_list(folder: Path, rows: int, classes: int) -> Iterator[Step]:
    path = _write_list(folder / "list.csv", rows, classes, rows)
    step, source = _measure(rows, classes, "open the list", lambda: Manifest(path))
    yield step
    numbers = np.arange(BATCH)
    steps: dict[str, Callable[[], object]] = {
        "split by hash": lambda: source.split(0.1, method="hash"),
        "split stratified": lambda: source.split(0.1),
        "fingerprint": source.fingerprint,
        "class indices": source.labels,
        f"targets of a batch of {BATCH}": lambda: source.targets(numbers),
        "probabilities of balanced sampling": lambda: compute_draw_shares(source),
        "compare with the clips of a run folder": lambda: _compare(folder, source),
    }
    for name in steps:
        yield _measure(rows, classes, name, steps[name])[0]
    del source, steps
    path = _write_list(folder / "few.csv", rows, classes, SOUNDS)
    yield _measure(rows, classes, "refuse rows that repeat 50 files", lambda: _refuse(path))[0]


def _compare(folder: Path, source: Manifest) -> None:
    RunClaims(folder / "run").check_clips({"train": source})


def _refuse(path: Path) -> None:
    try:
        Manifest(path)
    except DataError:
        return
    raise AssertionError("rows that repeat files were accepted")


def _time_starts(folder: Path, clips: int) -> Iterator[Step]:
    path = _write_list(folder / "clips.csv", clips, 50, clips)
    data = Data(path=str(path), cache=str(folder / "cache"), valid_fraction=0.1)

    def start() -> None:
        for source in make_partition(data).sources().values():
            source.fingerprint()
            cut_clips(source, FrontEnd(frames=100), Scoring())

    for name in ("first start: hash, decode, cut", "start with everything known"):
        yield _measure(clips, 50, name, start)[0]
