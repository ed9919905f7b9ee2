"""Does a run survive everything on this machine and disk? Kill it at random, resume, compare.

A small run is trained twice: straight, and interrupted again and again (kill -9, SIGTERM, kill -9
while a checkpoint is being written, and, where a small file system may be mounted, a full disk).
The weights, the order of the steps and the figures of both must be the same, bit for bit.
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

from aatjax.errors import UsageError, WriteError
from aatjax.train.logging import read_metrics

TIMED = ("clips_per_s", "seconds", "seconds_input", "seconds_transfer")
KINDS = ("kill", "term", "save")


@dataclasses.dataclass
class Certificate:
    """What was done to a run and what came of it.

    Attributes:
        interruptions: one line each: what, when, and how the process ended.
        full_disk: what happened on a full disk, or why that was not tried.
        problems: what broke; empty means that the run survived.
        seconds: of the straight run.
        steps: of the straight run.
    """

    interruptions: list[str] = dataclasses.field(default_factory=list)
    full_disk: str = ""
    problems: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    steps: int = 0

    def text(self) -> str:
        """The certificate as a person reads it."""
        lines = [f"straight run: {self.steps} steps in {self.seconds:.0f} s"]
        lines += [f"  {number:2d}. {line}" for number, line in enumerate(self.interruptions, 1)]
        lines.append(f"full disk: {self.full_disk}")
        if self.problems:
            lines += [f"BROKEN: {problem}" for problem in self.problems]
        else:
            lines.append(
                f"survived: after {len(self.interruptions)} interruptions the weights and the "
                "figures are those of the straight run, bit for bit"
            )
        return "\n".join(lines)


class Trial:
    """The runs of one chaos test.

    Args:
        arguments: of `aatjax train`, without `--run`.
        workdir: a folder on the disk in question; must be empty or new.
        seed: seed of the moments.
        say: is told each line as it comes.
    """

    def __init__(
        self, arguments: Sequence[str], workdir: Path, *, seed: int, say: Callable[[str], None]
    ) -> None:
        self._arguments, self._folder, self._say = list(arguments), workdir, say
        self._random = random.Random(seed)
        self.found = Certificate()

    def _start(self, run: Path) -> Any:
        return subprocess.Popen(
            [
                sys.executable,
                "-c",
                "from aatjax.cli.main import main; main()",
                "train",
                *self._arguments,
                "--run",
                str(run),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def _finish(self, run: Path) -> tuple[int, str]:
        process = self._start(run)
        _, said = process.communicate()
        return process.returncode, (said.strip().splitlines() or ["nothing"])[-1]

    def run(self, interruptions: int) -> Certificate:
        """Does it all.

        Raises:
            UsageError: the folder is not empty, or the straight run fails.
            WriteError: the folder cannot be made.
        """
        folder = self._folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise UsageError(f"{folder} is not empty: give --workdir a new folder")
        except OSError as error:
            raise WriteError(f"{folder}: cannot be used: {error.strerror or error}") from error
        straight, shaken = folder / "straight", folder / "interrupted"
        for attempt in ("compiling", "timed"):  # the second finds its programs compiled
            shutil.rmtree(straight, ignore_errors=True)
            began = time.monotonic()
            code, last = self._finish(straight)
            if code:
                raise UsageError(f"the straight run ({attempt}) ends with code {code}: {last}")
            self.found.seconds = time.monotonic() - began
        rows = read_metrics(straight / "metrics.jsonl")
        self.found.steps = rows[-1]["step"]
        self._say(f"straight run: {self.found.steps} steps in {self.found.seconds:.0f} s")
        missed = 0  # the same kind is tried again, earlier each time
        while len(self.found.interruptions) < interruptions and missed < 6:
            number = len(self.found.interruptions)
            line = self._interrupt(shaken, KINDS[number % len(KINDS)], latest=0.5**missed)
            missed += 1
            if line is not None:
                missed = 0
                self.found.interruptions.append(line)
                self._say(f"{number + 1:2d}. {line}")
        if missed:
            self.found.problems.append(
                f"the run was through {missed} times before it could be interrupted: it is too "
                "short for this trial, give it more epochs"
            )
        code, last = self._finish(shaken)
        if code:
            self.found.problems.append(f"the interrupted run ends with code {code}: {last}")
        else:
            self._compare(straight, shaken, "the interrupted run")
        self.found.full_disk = self._fill(straight)
        self._say(f"full disk: {self.found.full_disk}")
        return self.found

    def _interrupt(self, run: Path, kind: str, *, latest: float) -> str | None:
        """Starts or resumes the run and interrupts it, up to `latest` of the straight run's time.

        None where it was through before its moment came: it is then begun anew.
        """
        process = self._start(run)
        at = self._random.uniform(0.05, 1.0) * latest * self.found.seconds
        began = time.monotonic()
        seen = ""
        while process.poll() is None:
            spent = time.monotonic() - began
            writing = kind == "save" and self._writing(run)
            if writing or spent > at * (3 if kind == "save" else 1):
                seen = " while a checkpoint was being written" if writing else ""
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGTERM if kind == "term" else signal.SIGKILL)
        _, said = process.communicate()
        if process.returncode == 0:
            shutil.rmtree(run)
            return None
        name = "SIGTERM" if kind == "term" else "kill -9"
        spent = time.monotonic() - began
        steps = sorted(
            int(p.name) for p in (run / "checkpoints").glob("[0-9]*") if p.name.isdigit()
        )
        line = f"{name} after {spent:.1f} s{seen}: code {process.returncode}, "
        line += f"checkpoint of step {steps[-1]}" if steps else "no checkpoint yet"
        if kind == "term" and process.returncode not in (143, -signal.SIGTERM):
            last = (said.strip().splitlines() or ["nothing"])[-1]
            self.found.problems.append(f"{line}; 143 was expected: {last}")
        return line

    @staticmethod
    def _writing(run: Path) -> bool:
        folder = run / "checkpoints"
        try:
            return any("tmp" in path.name for path in folder.iterdir())
        except OSError:
            return False

    def _compare(self, straight: Path, other: Path, what: str) -> None:
        one = load_file(straight / "adapter.safetensors")
        two = load_file(other / "adapter.safetensors")
        differ = [
            name
            for name in sorted(set(one) | set(two))
            if name not in one or name not in two or not np.array_equal(one[name], two[name])
        ]
        if differ:
            self.found.problems.append(
                f"{what}: {len(differ)} of {len(one)} tensors differ, first {differ[0]}"
            )
        figures = [
            [_untimed(row) for row in read_metrics(run / "metrics.jsonl")]
            for run in (straight, other)
        ]
        if figures[0] != figures[1]:
            self.found.problems.append(f"{what}: metrics.jsonl differs")

    def _fill(self, straight: Path) -> str:
        """The same run on a file system that is too small, then on the same with room."""
        disk = self._folder / "small-disk"
        disk.mkdir()
        size = sum(p.stat().st_size for p in straight.rglob("*") if p.is_file())
        small = max(64 << 10, math.ceil(size / 2))
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={small}", "tmpfs", str(disk)],
            capture_output=True,
            text=True,
        )
        if mounted.returncode:
            reason = (mounted.stderr.strip().splitlines() or ["no reason given"])[-1]
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


def _untimed(row: dict[str, Any]) -> str:
    kept = {k: v for k, v in row.items() if k.rpartition("/")[2] not in TIMED}
    return json.dumps(kept, sort_keys=True)
