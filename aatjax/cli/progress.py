"""Progress of commands that work in stages."""

import sys
from typing import Any


class StageBar:
    """A bar per stage on a terminal, a line per stage elsewhere; on standard error.

    Args:
        quiet: show nothing.
    """

    def __init__(self, *, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        console = Console(stderr=True)
        self._lines = not quiet and not console.is_terminal
        self._stage: str | None = None
        self._task: Any = None
        columns = TextColumn("{task.description:<9}"), BarColumn(), MofNCompleteColumn()
        self._bar = Progress(*columns, console=console, disable=quiet or self._lines)

    def __enter__(self) -> "StageBar":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, stage: str, done: int, total: int) -> None:
        """Show how much of a stage is done; a total of 0 means unknown."""
        if stage != self._stage:
            self._stage = stage
            self._task = self._bar.add_task(stage, total=total or None)
            if self._lines:
                print(f"{stage} ({total:,})" if total else stage, file=sys.stderr, flush=True)
        self._bar.update(self._task, completed=done, total=total or None)
