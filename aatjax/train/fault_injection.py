"""Test of crash safety on a given disk: a run is killed at random, resumed and compared.

A small run is trained twice: without interruption, and interrupted repeatedly (kill -9, SIGTERM,
kill -9 while a checkpoint is being written, and, where a small file system may be mounted, a full
disk). Everything that both saved must be equal bit for bit, see `compare_runs`.
"""

import dataclasses
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from aatjax.errors import UsageError, format_count
from aatjax.io.atomic import check_output, report_write_errors
from aatjax.train.logging import METRICS, read_metrics
from aatjax.train.run_comparison import compare_runs

KINDS = ("kill", "term", "save")
PROGRAM = "from aatjax.cli.main import main; main()"
MISSES = 6  # interruptions in a row that came too early or too late, after which a trial gives up


@dataclasses.dataclass
class Certificate:
    """Result of a trial.

    Attributes:
        interruptions: one line each: what, when, and how the process ended.
        early: the number of interruptions before the first checkpoint, which test nothing.
        resumes: how often the run went on from a checkpoint.
        full_disk: what happened on a full disk, or why that was not tried.
        problems: failures; empty means that the run survived.
        seconds: time of the uninterrupted run.
        steps: steps of the uninterrupted run.
    """

    interruptions: list[str] = dataclasses.field(default_factory=list)
    early: int = 0
    resumes: int = 0
    full_disk: str = ""
    problems: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    steps: int = 0

    def to_text(self) -> str:
        """Return the certificate as text."""
        lines = [f"straight run: {self.steps} steps in {self.seconds:.0f} s"]
        lines += [f"  {number:2d}. {line}" for number, line in enumerate(self.interruptions, 1)]
        if self.early:
            lines.append(f"not counted: {self.early} before the first checkpoint")
        lines.append(f"full disk: {self.full_disk}")
        interruptions = format_count(len(self.interruptions), "interruption")
        lines += [f"BROKEN: {problem}" for problem in self.problems] or [
            f"survived: after {interruptions} and {format_count(self.resumes, 'resume')} from "
            "checkpoints everything that was saved is that of the straight run, bit for bit"
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
        self._interrupt_all(straight, broken, interruptions)
        if broken.exists():
            self._end(straight, broken)
        if interruptions and not self.found.resumes:
            self.found.problems.append("the run never went on from a checkpoint")
        self.found.full_disk = self._fill_disk(straight)
        self._say(f"full disk: {self.found.full_disk}")
        return self.found

    def _end(self, straight: Path, broken: Path) -> None:
        """Train an interrupted run to its end, and compare it."""
        code, last = self._finish(broken)
        if code:
            self.found.problems.append(f"the interrupted run ends with code {code}: {last}")
        else:
            self._compare(straight, broken, "the interrupted run")

    def _start(self, run: Path) -> Any:
        command = [sys.executable, "-c", PROGRAM, "train", *self._arguments, "--out", str(run)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)

    def _finish(self, run: Path) -> tuple[int, str]:
        """Train to the end; return the exit code and the last line of standard error."""
        process = self._start(run)
        error = self._wait(process)
        return process.returncode, _last_line(error)

    def _wait(self, process: Any) -> str:
        """Wait for the end of a process, note whether it resumed, and return what it said."""
        _, error = process.communicate()
        self.found.resumes += bool(re.search(r"^going on from step [1-9]", error, re.MULTILINE))
        return error

    def _interrupt_all(self, straight: Path, run: Path, interruptions: int) -> None:
        missed = 0  # the same kind is tried again, earlier each time
        while len(self.found.interruptions) < interruptions and missed < MISSES:
            number = len(self.found.interruptions)
            kind = KINDS[number % len(KINDS)]
            early = not self.found.early and not number  # the first may come before a checkpoint
            line, steps = self._interrupt(run, kind, latest=0.5**missed, early=early)
            if line is None:  # a whole run that may have been interrupted before
                missed += 1
                self._compare(straight, run, "an interrupted run")
                shutil.rmtree(run)
            elif not steps:
                missed += not early
                self.found.early += 1
            else:
                missed = 0
                self.found.interruptions.append(line)
                self._say(f"{number + 1:2d}. {line}")
                if steps[-1] >= self.found.steps:  # nothing is left to be interrupted
                    self._end(straight, run)
                    shutil.rmtree(run)
        if missed:
            self.found.problems.append(
                f"the run ended {missed} times before it could be interrupted: it is too short "
                "for this trial, give it more epochs"
            )

    def _interrupt(
        self, run: Path, kind: str, *, latest: float, early: bool
    ) -> tuple[str | None, list[int]]:
        """Start or resume the run and interrupt it.

        Args:
            run: its folder.
            kind: one of KINDS.
            latest: bound of the moment, relative to the time of the straight run. It counts from
                the start, or from the first checkpoint.
            early: whether the moment may come before the first checkpoint.

        Returns:
            What happened, or None where it ended before its moment came; and the steps of its
            checkpoints.
        """
        before = _find_saves(run)  # left by a save that was killed
        process = self._start(run)
        moment = self._random.uniform(0.05, 1.0) * latest * self.found.seconds
        moment *= 3 if kind == "save" else 1
        began = time.monotonic()
        until = began + moment if early or _find_steps(run) else None
        during = ""
        while process.poll() is None and (until is None or time.monotonic() <= until):
            if until is None and _find_steps(run):
                until = time.monotonic() + moment / 10  # compiled before, so the rest is short
            if kind == "save" and until is not None and _find_saves(run) - before:
                during = " while a checkpoint was being written"
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGTERM if kind == "term" else signal.SIGKILL)
        error = self._wait(process)
        steps = _find_steps(run)
        if process.returncode == 0:
            return None, steps
        name = "SIGTERM" if kind == "term" else "kill -9"
        line = f"{name} after {time.monotonic() - began:.1f} s{during}: code {process.returncode}, "
        line += f"checkpoint of step {steps[-1]}" if steps else "no checkpoint yet"
        if kind == "term" and process.returncode not in (143, -signal.SIGTERM):
            self.found.problems.append(f"{line}; 143 was expected: {_last_line(error)}")
        return line, steps

    def _compare(self, straight: Path, other: Path, what: str) -> None:
        self.found.problems += [f"{what}: {text}" for text in compare_runs(straight, other)]

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


def _find_steps(run: Path) -> list[int]:
    names = (path.name for path in (run / "checkpoints").glob("[0-9]*"))
    return sorted(int(name) for name in names if name.isdecimal())


def _find_saves(run: Path) -> set[tuple[str, int]]:
    """Name and number of the folders in which a checkpoint is being written."""
    try:
        found = [path for path in (run / "checkpoints").iterdir() if "tmp" in path.name]
        return {(path.name, path.stat().st_ino) for path in found}
    except OSError:
        return set()


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]
