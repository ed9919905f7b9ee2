"""Progress: stages and runs with the time that is left, on terminals of any width and elsewhere."""

import io
import re
import time
from collections.abc import Iterator

import jax
import pytest

from aatjax.io.progress import (
    Pace,
    StageBar,
    describe_compiling,
    format_seconds,
    report,
    track,
)
from aatjax.train.logging import ProgressDisplay


class Clock:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock.monotonic)
    yield clock


def test_what_compiles_does_not_count_as_pace(clock: Clock) -> None:
    pace = Pace()
    assert pace.mean(["step"]) is None
    for kind, seconds in [("step", 60), ("step", 2), ("other", 30), ("other", 4), ("step", 2)]:
        clock.now += seconds
        pace.add(kind)
    assert pace.mean(["step"]) == 2
    assert pace.mean(["step", "other"]) == pytest.approx(8 / 3)


def test_seconds_are_written_as_minutes_and_hours() -> None:
    assert [format_seconds(s) for s in (0, 59.6, 643, 3661)] == ["0:00", "1:00", "10:43", "1:01:01"]


def test_the_first_time_left_of_a_run_leaves_compilation_out(clock: Clock) -> None:
    """30 steps of 1 s, 3 epochs that end in 2 s; the first step takes 60 s, the first end 20 s."""
    stream = io.StringIO()
    display = ProgressDisplay(30, per_epoch=10, stream=stream, every=1e9)
    assert stream.getvalue().startswith("compiling")
    lines = []
    for step in range(1, 31):
        clock.now += 60 if step == 1 else 1
        display.step(step, 1, 5.0, 0.5)
        if step == 1:
            assert display.remaining() is None
        if step % 10 == 0:
            clock.now += 20 if step == 10 else 2
            display.end_epoch("epoch")
            lines.append(display.remaining())
    assert lines == ["0:20", "0:12", "0:00"]
    assert "epoch  0:20 left" in stream.getvalue()


def test_lengths_that_are_compiled_later_do_not_count_either(clock: Clock) -> None:
    display = ProgressDisplay(100, per_epoch=50, stream=None)
    for step, (shape, seconds) in enumerate(
        [("long", 50), ("long", 2), ("short", 40), ("short", 1), ("long", 2), ("short", 1)], 1
    ):
        clock.now += seconds
        display.step(step, 1, 5.0, None, shape)
    assert display.remaining() == format_seconds(94 * 1.5)


def test_without_a_terminal_there_are_occasional_lines(clock: Clock) -> None:
    stream = io.StringIO()
    with StageBar(stream=stream, after=2.0, every=30.0):
        report("compiling")
        for _ in track(range(100), "evaluate", 800, 8):
            clock.now += 1
    lines = stream.getvalue().splitlines()
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()
    assert lines[0] == "compiling" and 3 <= len(lines) <= 5
    assert re.fullmatch(r"evaluate \(24 of 800, 1:37 left\)", lines[1])


def test_short_stages_and_quiet_ones_show_nothing(clock: Clock) -> None:
    for quiet, seconds in ((False, 0.01), (True, 10)):
        stream = io.StringIO()
        with StageBar(quiet=quiet, stream=stream, after=2.0):
            for _ in track(range(50), "evaluate", 50):
                clock.now += seconds
        assert stream.getvalue() == ""


def test_only_the_inner_of_two_displays_is_shown(clock: Clock) -> None:
    outer, inner = io.StringIO(), io.StringIO()
    with StageBar(stream=outer):
        with StageBar(stream=inner):
            report("inside")
        report("outside")
    report("nowhere")
    assert (outer.getvalue(), inner.getvalue()) == ("outside\n", "inside\n")


@pytest.mark.parametrize("columns", [20, 80])
def test_a_bar_fits_its_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    for show in (show_stage, show_run):
        stream = Terminal()
        show(stream)
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
        lines = re.split(r"[\r\n]", plain)
        assert "training" in plain or "evaluate" in plain
        assert max(map(len, lines)) <= columns


def show_stage(stream: Terminal) -> None:
    with StageBar(stream=stream) as bar:
        for done in range(0, 20_001, 5000):
            bar.update("evaluate", done, 20_000)


def show_run(stream: Terminal) -> None:
    display = ProgressDisplay(4, per_epoch=2, stream=stream)
    for step in range(1, 5):
        display.step(step, 1, 123.0, 0.5)
    display.close()


def test_compiling_is_said_with_where_it_is_kept() -> None:
    before = getattr(jax.config, "jax_compilation_cache_dir", None)
    try:
        for folder, more in (("/somewhere", " (once; kept in the cache)"), (None, "")):
            jax.config.update("jax_compilation_cache_dir", folder)
            assert describe_compiling() == f"compiling{more}"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
