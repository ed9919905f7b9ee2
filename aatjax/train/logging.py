"""Output of a run: metrics.jsonl, TensorBoard events, progress display."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from aatjax.io.atomic import report_write_errors, write_text
from aatjax.io.progress import TextStream

Show = TextStream | Literal["stderr"] | bool | None
"""Where progress goes: a stream, `stderr` or True, or None or False for nowhere."""


def choose_stream(show: Show) -> TextStream | None:
    """Return the stream of a progress setting."""
    return (sys.stderr if isinstance(show, str | bool) else show) if show else None


class MetricsWriter:
    """Writes the metrics of a run: one JSON line per epoch, and TensorBoard scalars.

    Events need tensorboardX (the extra `tensorboard`); without it none are written.

    Args:
        directory: the run folder, or None to keep the rows in memory only.
        step: the step that the run starts from; rows of later steps (of a run that was killed
            after its last checkpoint) are dropped, so each step is written once.
        say: called with a line where no events are written.
    """

    def __init__(
        self, directory: Path | None, *, step: int = 0, say: Callable[[str], None] = print
    ) -> None:
        self.rows: list[dict[str, Any]] = []
        self._path = None if directory is None else directory / "metrics.jsonl"
        self._events: Any = None
        if self._path is None or directory is None:
            return
        self.rows = [row for row in read_metrics(self._path) if row["step"] <= step]
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_text(self._path, text)
        try:
            with _without_torch():
                from tensorboardX import SummaryWriter
        except ImportError:
            say("no TensorBoard events: pip install 'aatjax[tensorboard]' to have them written")
            return
        with report_write_errors(directory):
            self._events = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)

    def add(self, row: Mapping[str, Any]) -> None:
        """Write one row, which must have `step`; None stands for an undefined number."""
        self.rows.append(dict(row))
        if self._path is None:
            return
        with report_write_errors(self._path):
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            if self._events is None:
                return
            for name, value in row.items():
                if isinstance(value, int | float) and math.isfinite(value) and name != "step":
                    self._events.add_scalar(name, value, row["step"])
            self._events.flush()

    def close(self) -> None:
        """Close the event file."""
        if self._events is not None:
            self._events.close()


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Hide PyTorch in the block where it is not loaded: tensorboardX would import it for nothing.

    That takes seconds; without it tensorboardX writes the same scalars.
    """
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        del sys.modules["torch"]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl; a last line cut short by a kill is skipped."""
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class ProgressDisplay:
    """Progress of a run: a bar on a terminal, one line per epoch elsewhere.

    Args:
        total: steps of the whole run.
        done: steps done before.
        stream: where to write; None shows nothing.
        every: seconds between plain lines within a long epoch.
    """

    def __init__(
        self, total: int, *, done: int = 0, stream: TextStream | None, every: float = 30.0
    ) -> None:
        self._total, self._done, self._start = total, done, done
        self._stream, self._every = stream, every
        self._began = self._spoke = time.monotonic()
        self._bar: Progress | None = None
        if stream is not None and stream.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                console=Console(file=cast(IO[str], stream)),
            )
            self._task = self._bar.add_task("training", total=total, completed=done, numbers="")
            self._bar.start()

    def step(self, done: int, epoch: int, clips_per_s: float, loss: float | None) -> None:
        """Show a step; `loss` is the latest known one."""
        self._done = done
        numbers = f"epoch {epoch}  {clips_per_s:.0f} clips/s"
        if loss is not None:
            numbers += f"  loss {loss:.3f}"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, numbers=numbers)
        elif time.monotonic() - self._spoke > self._every:
            self.say(f"{numbers}  step {done}/{self._total}  {self.remaining()} left")

    def remaining(self) -> str:
        """Return the time to the end at the pace so far, as minutes and seconds."""
        pace = (time.monotonic() - self._began) / max(1, self._done - self._start)
        seconds = int(pace * (self._total - self._done))
        return f"{seconds // 60}:{seconds % 60:02d}"

    def say(self, line: str) -> None:
        """Print one line above the bar."""
        self._spoke = time.monotonic()
        if self._bar is not None:
            self._bar.console.print(line, highlight=False, markup=False)
        elif self._stream is not None:
            print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
