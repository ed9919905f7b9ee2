"""Test of crash safety on a given disk: a run is killed at random, resumed and compared.

A small run is trained twice: without interruption, and interrupted repeatedly (kill -9, SIGTERM,
kill -9 while a checkpoint is being written, and, where a small file system may be mounted, a full
disk). Weights, order of the steps and metrics of both must be equal bit for bit.
"""

import dataclasses
import json
import math
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from aatjax.errors import UsageError
from aatjax.io.atomic import check_output, report_write_errors
from aatjax.train.logging import METRICS, read_metrics

TIMED = ("clips_per_s", "seconds", "seconds_input", "seconds_transfer")
KINDS = ("kill", "term", "save")
PROGRAM = "from aatjax.cli.main import main; main()"


@dataclasses.dataclass
class Certificate:
    """Result of a trial.

    Attributes:
        interruptions: one line each: what, when, and how the process ended.
        full_disk: what happened on a full disk, or why that was not tried.
        problems: failures; empty means that the run survived.
        seconds: time of the uninterrupted run.
        steps: steps of the uninterrupted run.
    """

    interruptions: list[str] = dataclasses.field(default_factory=list)
    full_disk: str = ""
    problems: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    steps: int = 0

    def to_text(self) -> str:
        """Return the certificate as text."""
        lines = [f"straight run: {self.steps} steps in {self.seconds:.0f} s"]
        lines += [f"  {number:2d}. {line}" for number, line in enumerate(self.interruptions, 1)]
        lines.append(f"full disk: {self.full_disk}")
        lines += [f"BROKEN: {problem}" for problem in self.problems] or [
            f"survived: after {len(self.interruptions)} interruptions the weights and the "
            "metrics are those of the straight run, bit for bit"
        ]
        return "\n".join(lines)


class Trial:
    """The runs of one crash-safety test.

    Args:
        arguments: those of `aatjax train`, without `--out`.
        workdir: a new or empty folder on the disk to test.
        seed: seed of the moments of interruption.
        say: called with each line of the certificate as it is known.
    """

    def __init__(
        self, arguments: Sequence[str], workdir: Path, *, seed: int, say: Callable[[str], object]
    ) -> None:
        self._arguments, self._folder, self._say = list(arguments), workdir, say
        self._random = random.Random(seed)
        self.found: Certificate = Certificate()

    def run(self, interruptions: int, begin: Callable[[], None] = lambda: None) -> Certificate:
        """Run the whole trial; `begin` is called when the folder was checked.

        Raises:
            UsageError: the folder is not empty, or the uninterrupted run fails.
            WriteError: the folder cannot be created.
        """
        check_output(self._folder / "certificate.txt")
        if self._folder.is_dir() and any(self._folder.iterdir()):
            raise UsageError(f"{self._folder} is not empty: give another, new or empty (--out)")
        begin()
        with report_write_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        straight, broken = self._folder / "straight", self._folder / "interrupted"
        for attempt in ("compiling", "timed"):  # the second finds its programs compiled
            shutil.rmtree(straight, ignore_errors=True)
            began = time.monotonic()
            code, last = self._finish(straight)
            if code:
                raise UsageError(f"the straight run ({attempt}) ends with code {code}: {last}")
            self.found.seconds = time.monotonic() - began
        self.found.steps = read_metrics(straight / METRICS)[-1]["step"]
        self._say(f"straight run: {self.found.steps} steps in {self.found.seconds:.0f} s")
        self._interrupt_all(broken, interruptions)
        code, last = self._finish(broken)
        if code:
            self.found.problems.append(f"the interrupted run ends with code {code}: {last}")
        else:
            self._compare(straight, broken, "the interrupted run")
        self.found.full_disk = self._fill_disk(straight)
        self._say(f"full disk: {self.found.full_disk}")
        return self.found

    def _start(self, run: Path) -> Any:
        command = [sys.executable, "-c", PROGRAM, "train", *self._arguments, "--out", str(run)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)

    def _finish(self, run: Path) -> tuple[int, str]:
        """Train to the end; return the exit code and the last line of standard error."""
        process = self._start(run)
        _, error = process.communicate()
        return process.returncode, _last_line(error)

    def _interrupt_all(self, run: Path, interruptions: int) -> None:
        missed = 0  # the same kind is tried again, earlier each time
        while len(self.found.interruptions) < interruptions and missed < 6:
            number = len(self.found.interruptions)
            line = self._interrupt(run, KINDS[number % len(KINDS)], latest=0.5**missed)
            missed += 1
            if line is not None:
                missed = 0
                self.found.interruptions.append(line)
                self._say(f"{number + 1:2d}. {line}")
        if missed:
            self.found.problems.append(
                f"the run ended {missed} times before it could be interrupted: it is too short "
                "for this trial, give it more epochs"
            )

    def _interrupt(self, run: Path, kind: str, *, latest: float) -> str | None:
        """Start or resume the run and interrupt it, up to `latest` of the straight run's time.

        Returns None where it ended before its moment came; it is then removed.
        """
        process = self._start(run)
        moment = self._random.uniform(0.05, 1.0) * latest * self.found.seconds
        moment *= 3 if kind == "save" else 1
        began = time.monotonic()
        during = ""
        while process.poll() is None and time.monotonic() - began <= moment:
            if kind == "save" and _is_saving(run):
                during = " while a checkpoint was being written"
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGTERM if kind == "term" else signal.SIGKILL)
        _, error = process.communicate()
        if process.returncode == 0:
            shutil.rmtree(run)
            return None
        name = "SIGTERM" if kind == "term" else "kill -9"
        names = (path.name for path in (run / "checkpoints").glob("[0-9]*"))
        steps = sorted(int(name) for name in names if name.isdigit())
        line = f"{name} after {time.monotonic() - began:.1f} s{during}: code {process.returncode}, "
        line += f"checkpoint of step {steps[-1]}" if steps else "no checkpoint yet"
        if kind == "term" and process.returncode not in (143, -signal.SIGTERM):
            self.found.problems.append(f"{line}; 143 was expected: {_last_line(error)}")
        return line

    def _compare(self, straight: Path, other: Path, what: str) -> None:
        one, two = (load_file(run / "adapter.safetensors") for run in (straight, other))
        differ = [
            name
            for name in sorted(set(one) | set(two))
            if name not in one or name not in two or not np.array_equal(one[name], two[name])
        ]
        if differ:
            self.found.problems.append(
                f"{what}: {len(differ)} of {len(one)} tensors differ, first {differ[0]}"
            )
        rows = [
            [_drop_times(row) for row in read_metrics(run / METRICS)] for run in (straight, other)
        ]
        if rows[0] != rows[1]:
            self.found.problems.append(f"{what}: metrics.jsonl differs")

    def _fill_disk(self, straight: Path) -> str:
        """Train on a file system that is too small, then on the same one with room."""
        disk = self._folder / "small-disk"
        disk.mkdir()
        size = sum(p.stat().st_size for p in straight.rglob("*") if p.is_file())
        small = max(64 << 10, math.ceil(size / 2))
        mount = ["mount", "-t", "tmpfs", "-o", f"size={small}", "tmpfs", str(disk)]
        mounted = subprocess.run(mount, capture_output=True, text=True)
        if mounted.returncode:
            reason = _last_line(mounted.stderr)
            return f"not tried: a small file system may not be mounted here ({reason})"
        try:
            code, last = self._finish(disk / "run")
            if code != 74:
                self.found.problems.append(
                    f"on a full disk the run ends with code {code}, 74 was expected: {last}"
                )
            room = ["mount", "-o", f"remount,size={8 * size + (64 << 20)}", str(disk)]
            subprocess.run(room, check=True, capture_output=True)
            again, last_again = self._finish(disk / "run")
            if again:
                self.found.problems.append(
                    f"after a full disk the run ends with code {again}: {last_again}"
                )
            else:
                self._compare(straight, disk / "run", "the run after a full disk")
            return f"on {small >> 10} KiB: code {code} ({last[:160]}); with room: code {again}"
        finally:
            subprocess.run(["umount", str(disk)], capture_output=True)


def _is_saving(run: Path) -> bool:
    try:
        return any("tmp" in path.name for path in (run / "checkpoints").iterdir())
    except OSError:
        return False


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def _drop_times(row: dict[str, Any]) -> str:
    kept = {k: v for k, v in row.items() if k.rpartition("/")[2] not in TIMED}
    return json.dumps(kept, sort_keys=True)
