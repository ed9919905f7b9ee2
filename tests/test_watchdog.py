"""Who counts as stuck, by a clock of the test's own. Runs of several: tests/test_processes.py."""

from typing import Any

import pytest

from aatjax.train import watchdog
from aatjax.train.watchdog import Watchdog


class Ended(Exception):
    pass


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def watched(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> Watchdog:
    """Process 0 of two, the other of which is never late; it has compiled everything."""
    made = Watchdog(0, stuck=600.0, compiling=3600.0)
    made._peers[1] = watchdog._Peer(phase="start")

    def end(rank: int, what: str, **_: Any) -> None:
        raise Ended(f"{rank} {what}")

    monkeypatch.setattr(made, "_end", end)
    for phase in ("input", "step", "eval", "input"):
        made.beat(phase, 1)
    return made


def test_every_part_of_a_long_evaluation_is_a_sign_of_life(watched, clock) -> None:
    for _ in range(5):
        watched.beat("eval", 2)
        clock[0] += 500
        watched._look_for_stuck(clock[0])
    clock[0] += 101
    with pytest.raises(Ended, match="0 is stuck: 601 s in 'eval' after step 2"):
        watched._look_for_stuck(clock[0])


@pytest.mark.parametrize("phase", ["start", "report"])
def test_what_nobody_waits_for_may_take_any_time(watched, clock, phase: str) -> None:
    watched.beat(phase, 0)
    clock[0] += 1e6
    watched._look_for_stuck(clock[0])


def test_the_first_time_in_a_phase_may_be_spent_on_compiling(watched, clock) -> None:
    watched.beat("save", 1)
    clock[0] += 3599
    watched._look_for_stuck(clock[0])
    clock[0] += 2
    with pytest.raises(Ended, match="in 'save'"):
        watched._look_for_stuck(clock[0])


def test_a_peer_that_said_goodbye_is_no_error(watched) -> None:
    watched._send(7, {"rank": 0})
