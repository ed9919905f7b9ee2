"""Output of a run: metrics.jsonl, TensorBoard events, progress display."""

import contextlib
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from aatjax.errors import format_count
from aatjax.io.atomic import append_line, report_write_errors, write_text
from aatjax.io.progress import NARROW, Pace, TextStream, describe_compiling, format_seconds

METRICS = "metrics.jsonl"
END_OF_EPOCH = "end of epoch"
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
        rows: rows that were written up to that step.
        say: called with a line where no events are written, or rows are missing.
    """

    def __init__(
        self,
        directory: Path | None,
        *,
        step: int = 0,
        rows: int = 0,
        say: Callable[[str], None] = print,
    ) -> None:
        self.rows: list[dict[str, Any]] = []
        self._path = None if directory is None else directory / METRICS
        self._events: EventFile | None = None
        if self._path is None or directory is None:
            return
        self.rows = [row for row in read_metrics(self._path, say=say) if row["step"] <= step]
        if (missing := rows - len(self.rows)) > 0:
            say(f"warning: {self._path} lacks {missing} of {format_count(rows, 'row')}")
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_text(self._path, text)
        try:
            self._events = EventFile(directory / "tensorboard", step)
        except ImportError:
            say("no TensorBoard events: pip install 'aatjax[tensorboard]' to have them written")

    def add(self, row: Mapping[str, Any]) -> None:
        """Write one row, which must have `step`; None stands for an undefined number.

        Raises:
            WriteError: it cannot be written.
        """
        self.rows.append(dict(row))
        if self._path is not None:
            append_line(self._path, json.dumps(row))
        if self._events is not None:
            self._events.add(row)

    def close(self) -> None:
        """Close the event file."""
        if self._events is not None:
            self._events.close()


class EventFile:
    """A file of TensorBoard scalars, written at once.

    The writer that tensorboardX documents hands the scalars to a thread. Where that cannot write,
    it prints a traceback and ends, and the run waits for it without end.

    Args:
        folder: created if needed.
        step: the step that the run starts from; TensorBoard drops what it has of later steps.

    Raises:
        ImportError: tensorboardX is not installed.
        WriteError: the file cannot be created.
    """

    def __init__(self, folder: Path, step: int) -> None:
        with _without_torch():
            from tensorboardX import event_file_writer, summary
            from tensorboardX.proto import event_pb2
        protos: Any = event_pb2
        self._folder, self._make_event, self._make_scalar = folder, protos.Event, summary.scalar
        with report_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file: Any = event_file_writer.EventsWriter(str(folder / "events"), f".{step}")
        start = protos.SessionLog(status=protos.SessionLog.START)
        self._write(step + 1, session_log=start)

    def add(self, row: Mapping[str, Any]) -> None:
        """Write the finite numbers of a row."""
        for name, value in row.items():
            if isinstance(value, int | float) and math.isfinite(value) and name != "step":
                self._write(row["step"], summary=self._make_scalar(name, value))
        with report_write_errors(self._folder):
            self._file.flush()

    def _write(self, step: int, **content: Any) -> None:
        event = self._make_event(wall_time=time.time(), step=step, **content)
        with report_write_errors(self._folder):
            self._file.write_event(event)

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # `add` has flushed what there is
            self._file.close()


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


def read_metrics(path: Path, *, say: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl, without those that are damaged.

    Args:
        path: the file; one that does not exist has no rows.
        say: called with a line on the first damaged row; by default that is a warning. A last line
            that a kill cut short is no damage.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    rows: list[dict[str, Any]] = []
    damaged: list[int] = []
    for number, line in enumerate(lines, 1):
        row = _parse_row(line)
        if row is not None:
            rows.append(row)
        elif number < len(lines):
            damaged.append(number)
    if damaged:
        more = f" and {len(damaged) - 1} more" if damaged[1:] else ""
        text = f"{path}: line {damaged[0]}{more} is damaged and left out"
        if say is None:
            warnings.warn(text, stacklevel=2)
        else:
            say(f"warning: {text}")
    return rows


def _parse_row(line: bytes) -> dict[str, Any] | None:
    """The row of a line, or None where it is not whole."""
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    whole = isinstance(row, dict) and all(isinstance(row.get(n), int) for n in ("step", "epoch"))
    return row if whole else None


class ProgressDisplay:
    """Progress of a run: a bar on a terminal, one line per epoch elsewhere.

    The time that is left is computed from steps and ends of epochs that compile nothing.

    Args:
        total: steps of the whole run.
        per_epoch: steps of an epoch.
        done: steps done before.
        stream: where to write; None shows nothing.
        every: seconds between plain lines within a long epoch.
    """

    def __init__(
        self,
        total: int,
        *,
        per_epoch: int,
        done: int = 0,
        stream: TextStream | None,
        every: float = 30.0,
    ) -> None:
        self._total, self._per_epoch, self._done = total, per_epoch, done
        self._stream, self._every = stream, every
        self._pace, self._kinds = Pace(), set[Hashable]()
        self._spoke = time.monotonic()
        self._bar: Progress | None = None
        if stream is None or done >= total:
            return
        if not stream.isatty():
            self.say(describe_compiling())
            return
        console = Console(file=cast(IO[str], stream))
        wide = [BarColumn(), TextColumn("{task.fields[numbers]}")]
        left = TextColumn("{task.fields[left]}")
        narrow = console.width < NARROW
        self._bar = Progress(
            TextColumn("{task.description}"), *([] if narrow else wide), left, console=console
        )
        self._task = self._bar.add_task(
            "training", total=total, completed=done, numbers=describe_compiling(), left=""
        )
        self._bar.start()

    def step(
        self, done: int, epoch: int, clips_per_s: float, loss: float | None, shape: Hashable = None
    ) -> None:
        """Show a step; `loss` is the latest known one, `shape` what the program is compiled for."""
        self._done = done
        self._kinds.add(shape)
        self._pace.add(shape)
        numbers = f"epoch {epoch}  {clips_per_s:.0f} clips/s"
        if loss is not None:
            numbers += f"  loss {loss:.3f}"
        if self._bar is not None:
            left = self.remaining() or ""
            self._bar.update(self._task, completed=done, numbers=numbers, left=left)
        elif time.monotonic() - self._spoke > self._every:
            self.say(f"{numbers}  step {done}/{self._total}{self.describe_remaining()}")

    def end_epoch(self, line: str) -> None:
        """Show the figures of an epoch, after its evaluation."""
        self._pace.add(END_OF_EPOCH)
        self.say(f"{line}{self.describe_remaining()}")

    def remaining(self) -> str | None:
        """Return the time to the end as minutes and seconds, or None before it is known."""
        step = self._pace.mean(self._kinds)
        if step is None:
            return None
        left = self._total - self._done
        ends = -(-left // self._per_epoch) * (self._pace.mean([END_OF_EPOCH]) or 0.0)
        return format_seconds(left * step + ends)

    def describe_remaining(self) -> str:
        """Return the time to the end as the last words of a line, or nothing."""
        left = self.remaining()
        return "" if left is None else f"  {left} left"

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
