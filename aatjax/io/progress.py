"""Progress of work in stages, on a stream."""

import sys
import time
from typing import IO, Any, Protocol, cast, runtime_checkable

NARROW = 40  # columns of a terminal below which there is no room for a bar


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
    """A bar per stage on a terminal, lines elsewhere.

    Args:
        quiet: show nothing.
        stream: where to write; by default standard error.
        after: seconds after which a stage is shown; a short one is not.
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
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> "StageBar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, stage: str, done: int, total: int) -> None:
        """Show how much of a stage is done; a total of 0 means unknown."""
        if self._quiet:
            return
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._began, self._spoke, self._task = stage, now, 0.0, None
        if now - self._began < self._after:
            return
        if not self._lines:
            self._show(stage, done, total)
        elif not self._spoke or now - self._spoke >= self._every:
            count = f"{done:,} of {total:,}" if self._spoke or self._after else f"{total:,}"
            self._spoke = now
            print(f"{stage} ({count})" if total else stage, file=self._stream, flush=True)

    def _show(self, stage: str, done: int, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        if self._bar is None:
            console = Console(file=cast(IO[str], self._stream))
            name = TextColumn("{task.description:<9}")
            bar = [BarColumn()] if console.width >= NARROW else []
            self._bar = Progress(name, *bar, MofNCompleteColumn(), console=console)
            self._bar.start()
        if self._task is None:
            self._task = self._bar.add_task(stage, total=total or None)
        self._bar.update(self._task, completed=done, total=total or None)
