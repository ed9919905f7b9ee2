"""Progress of work in stages, on a stream, with the time that is left.

`StageBar` shows what `report` and `track` say while its `with` block runs; without one they do
nothing, so that what takes long says how far it is without being handed a display.
"""

import contextvars
import sys
import time
from collections.abc import Hashable, Iterable, Iterator
from typing import IO, Any, Protocol, TypeVar, cast, runtime_checkable

NARROW = 40  # columns of a terminal below which there is no room for a bar
SHOWN_AFTER = 2.0  # seconds after which a stage of a command is shown
T = TypeVar("T")


def describe_compiling() -> str:
    """Return what to say before something is computed for the first time."""
    import jax

    kept = getattr(jax.config, "jax_compilation_cache_dir", None)
    return "compiling (once; kept in the cache)" if kept else "compiling"


def format_seconds(seconds: float) -> str:
    """Return minutes and seconds, with hours from one hour on."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Pace:
    """Seconds per unit of work by kind; the first of a kind does not count, as it compiles."""

    def __init__(self) -> None:
        self._seconds: dict[Hashable, float] = {}
        self._units: dict[Hashable, int] = {}
        self._mark = time.monotonic()

    def add(self, kind: Hashable, units: int = 1) -> None:
        """Count the time since the last call, or since the start, for units of a kind."""
        now = time.monotonic()
        spent, self._mark = now - self._mark, now
        if kind not in self._units:
            spent = units = 0
        self._seconds[kind] = self._seconds.get(kind, 0.0) + spent
        self._units[kind] = self._units.get(kind, 0) + units

    def mean(self, kinds: Iterable[Hashable]) -> float | None:
        """Return the mean seconds per unit of these kinds, or None before there is one."""
        units = sum(self._units.get(kind, 0) for kind in kinds)
        return sum(self._seconds.get(kind, 0.0) for kind in kinds) / units if units else None


@runtime_checkable
class TextStream(Protocol):
    """A stream that progress is written to, such as standard error."""

    def write(self, text: str, /) -> object:
        """Write text."""
        ...

    def flush(self) -> object:
        """Send on what was written."""
        ...

    def isatty(self) -> bool:
        """Return whether it is a terminal."""
        ...


class StageBar:
    """A bar per stage on a terminal, lines elsewhere, both with the time that is left.

    In its `with` block it also shows what `report` and `track` say.

    Args:
        quiet: show nothing.
        stream: where to write; by default standard error.
        after: seconds after which a stage of known length is shown; a short one is not.
        every: seconds between the lines of a stage where there is no terminal.
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        stream: TextStream | None = None,
        after: float = 0.0,
        every: float = 30.0,
    ) -> None:
        self._stream = stream or sys.stderr
        self._quiet, self._after, self._every = quiet, after, every
        self._lines = not self._stream.isatty()
        self._stage: str | None = None
        self._began = self._spoke = 0.0
        self._done = 0
        self._pace = Pace()
        self._bar: Any = None
        self._task: Any = None
        self._token: contextvars.Token[StageBar | None] | None = None

    def __enter__(self) -> "StageBar":
        self._token = _shown.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self._token is not None:
            _shown.reset(self._token)
        if self._bar is not None:
            self._bar.stop()

    def update(self, stage: str, done: int, total: int) -> None:
        """Show how much of a stage is done; a total of 0 means unknown."""
        if self._quiet:
            return
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._began, self._spoke, self._task = stage, now, 0.0, None
            self._done, self._pace = 0, Pace()
        if done > self._done:
            self._pace.add(stage, done - self._done)
            self._done = done
        if total and now - self._began < self._after:
            return
        if not self._lines:
            self._show(stage, done, total)
        elif not self._spoke or now - self._spoke >= self._every:
            count = f"{done:,} of {total:,}" if self._spoke or self._after else f"{total:,}"
            left = f", {self._remaining(done, total)} left" if self._remaining(done, total) else ""
            self._spoke = now
            print(f"{stage} ({count}{left})" if total else stage, file=self._stream, flush=True)

    def _remaining(self, done: int, total: int) -> str:
        """The time that is left at the pace so far, or nothing where it is not known."""
        pace = self._pace.mean([self._stage])
        return "" if pace is None or done >= total else format_seconds(pace * (total - done))

    def _show(self, stage: str, done: int, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        if self._bar is None:
            console = Console(file=cast(IO[str], self._stream))
            columns: list[Any] = [TextColumn("{task.description:<9}")]
            if console.width >= NARROW:
                columns += [BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}")]
            else:
                columns += [MofNCompleteColumn()]
            self._bar = Progress(*columns, console=console)
            self._bar.start()
        if self._task is None:
            self._task = self._bar.add_task(stage, total=total or None, left="")
        left = self._remaining(done, total)
        self._bar.update(self._task, completed=done, total=total or None, left=left)


_shown: contextvars.ContextVar[StageBar | None] = contextvars.ContextVar("shown", default=None)


def report(stage: str, done: int = 0, total: int = 0) -> None:
    """Say how much of a stage is done to the `StageBar` whose block runs, if there is one."""
    bar = _shown.get()
    if bar is not None:
        bar.update(stage, done, total)


def track(items: Iterable[T], stage: str, total: int, each: int = 1) -> Iterator[T]:
    """Yield items, and report each when the next one is asked for.

    Args:
        items: such as batches.
        stage: name of the stage.
        total: units of the whole work.
        each: units per item; the last may have fewer.
    """
    for number, item in enumerate(items, 1):
        yield item
        report(stage, min(number * each, total), total)
