"""Differences between two finished runs of one config, in all that they saved but times."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from aatjax.errors import DataError
from aatjax.io.json_file import read_json_object
from aatjax.io.lock import HOLDER, LOCK
from aatjax.train.checkpoint import Checkpoints
from aatjax.train.logging import METRICS, read_metrics
from aatjax.train.run_dir import RESULT

TIMES = ("clips_per_s", "seconds", "seconds_input", "seconds_transfer", "spent")
APART = ("checkpoints", "tensorboard", LOCK, HOLDER)
"""Compared otherwise, or different in any two runs."""


def compare_runs(one: Path, other: Path) -> list[str]:
    """Say how two run folders differ; nothing where they hold the same, bit for bit.

    The last checkpoints are compared array by array (step, trainable parameters, statistics,
    optimiser, moving average, best weights) and with their JSON (iterator, best figure, sums of the
    epoch, steps skipped); adapter files tensor by tensor; all other files by their bytes.
    """
    names = sorted(_list_files(one) | _list_files(other))
    problems = [problem for name in names if (problem := _compare_file(one, other, name))]
    return problems + list(_compare_checkpoints(one, other))


def _list_files(run: Path) -> set[str]:
    paths = [path.relative_to(run) for path in run.rglob("*") if path.is_file()]
    return {path.as_posix() for path in paths if path.parts[0] not in APART}


def _compare_file(one: Path, other: Path, name: str) -> str | None:
    for run in (one, other):
        if not (run / name).is_file():
            return f"{name} is missing in {run.name}"
    read = READERS.get(name, Path.read_bytes)
    try:
        if read(one / name) == read(other / name):
            return None
        if name.endswith(".safetensors"):
            arrays = (load_file(one / name), load_file(other / name))
            return _compare_arrays(name, *arrays) or f"{name}: its metadata differ"
    except (DataError, SafetensorError) as error:
        return f"{name} cannot be read: {error}"
    return f"{name} differs"


def _compare_checkpoints(one: Path, other: Path) -> Iterator[str]:
    folders = [Checkpoints(run / "checkpoints") for run in (one, other)]
    steps = [folder.latest for folder in folders]
    if steps[0] is None or steps[0] != steps[1]:
        yield f"the last checkpoints are those of steps {steps[0]} and {steps[1]}"
        return
    try:
        (arrays, progress), (others, other_progress) = [f.read(steps[0]) for f in folders]
    except DataError as error:
        yield str(error)
        return
    where = f"the checkpoint of step {steps[0]}"
    if problem := _compare_arrays(where, arrays, others):
        yield problem
    for name in sorted({*progress, *other_progress} - set(TIMES)):
        values = progress.get(name), other_progress.get(name)
        if json.dumps(values[0], sort_keys=True) != json.dumps(values[1], sort_keys=True):
            yield f"{where}: {name} is {values[0]!r} and {values[1]!r}"


def _compare_arrays(
    where: str, one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]
) -> str | None:
    names = sorted({*one, *other})
    different = [
        name
        for name in names
        if name not in one or name not in other or not _are_same(one[name], other[name])
    ]
    if not different:
        return None
    return f"{where}: {len(different)} of {len(names)} arrays differ, first {different[0]}"


def _are_same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays are equal bit for bit: 0 is not -0, and NaN is itself."""
    kinds = [(array.shape, array.dtype) for array in (one, other)]
    return kinds[0] == kinds[1] and one.tobytes() == other.tobytes()


def _read_rows(path: Path) -> list[str]:
    return [_drop_times(row) for row in read_metrics(path)]


def _read_result(path: Path) -> str:
    return _drop_times(read_json_object(path))


def _drop_times(row: Mapping[str, Any]) -> str:
    kept = {k: v for k, v in row.items() if k.rpartition("/")[2] not in TIMES}
    return json.dumps(kept, sort_keys=True)


READERS: dict[str, Callable[[Path], Any]] = {METRICS: _read_rows, RESULT: _read_result}
"""Readers of the part of a file that is compared, where that is not all of its bytes."""
