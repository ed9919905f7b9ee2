"""Detection of stuck processes, with a fake clock. Whole runs: tests/test_distributed.py."""

from typing import Any, cast

import pytest

from aatjax.train import watchdog
from aatjax.train.watchdog import Watchdog


class Watched:
    """Process 0 of two, the other of which is never late; it has compiled all but saving."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(watchdog.time, "monotonic", lambda: self.now)
        self.dog = Watchdog(0, 2, stuck=600.0, compiling=3600.0)
        self.dog._peers[1] = watchdog._Peer(phase="start")
        self.ended: list[str] = []

        def end(rank: int, what: str, **_: Any) -> None:
            self.ended.append(f"{rank} {what}")

        monkeypatch.setattr(self.dog, "_end", end)
        for phase in ("input", "step", "eval", "input"):
            self.dog.beat(phase, 1)

    def after(self, seconds: float) -> list[str]:
        """Return the processes that the watchdog ends after some time."""
        self.now += seconds
        self.dog._check_stuck(self.now)
        return self.ended


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


def test_every_batch_of_a_long_evaluation_is_a_heartbeat(watched: Watched) -> None:
    for _ in range(5):
        watched.dog.beat("eval", 2)
        assert watched.after(500) == []
    assert watched.after(101) == ["0 is stuck: 601 s in 'eval' after step 2"]


@pytest.mark.parametrize(("phase", "limited"), [("start", 0), ("report", 0), ("step", 1)])
def test_phases_without_waiting_peers_have_no_limit(
    watched: Watched, phase: str, limited: int
) -> None:
    watched.dog.beat(phase, 0)
    assert len(watched.after(1e6)) == limited


def test_the_first_time_in_a_phase_may_be_spent_on_compiling(watched: Watched) -> None:
    watched.dog.beat("save", 1)
    assert watched.after(3599) == []
    assert watched.after(2) == ["0 is stuck: 3601 s in 'save' after step 1"]


def test_a_peer_that_has_finished_gets_no_message(watched: Watched) -> None:
    sent: list[dict[str, Any]] = []

    class Link:
        def send(self, message: dict[str, Any]) -> None:
            sent.append(message)

    watched.dog._links[1] = cast(Any, Link())
    watched.dog._send(1, {"rank": 0})
    assert watched.dog._receive(1, {"bye": None})
    watched.dog._send(1, {"rank": 0})  # its link is gone by now: no error ends the heartbeat
    assert len(sent) == 1


def make_others(watched: Watched, *phases: str) -> None:
    watched.dog._peers = {
        rank: watchdog._Peer(f"h{rank}", phase, since=watched.now, warm=True)
        for rank, phase in enumerate(phases, 1)
    }


def test_one_that_others_wait_for_and_that_does_nothing_is_named(watched: Watched) -> None:
    make_others(watched, "start", "wait")
    with watched.dog.waiting():
        assert watched.after(599) == []
        assert watched.after(2) == ["1 is stuck: 601 s in 'start' after step 0"]


def test_one_that_others_wait_for_may_work_for_as_long_as_it_needs(watched: Watched) -> None:
    make_others(watched, "start", "wait")
    with watched.dog.waiting():
        for _ in range(9):
            watched.dog._peers[1].since = watched.now + 500  # it used the processor
            assert watched.after(500) == []
        assert watched.after(601) != []


def test_one_that_compiles_is_waited_for(watched: Watched) -> None:
    make_others(watched, "compile", "wait")
    watched.dog._peers[1].warm = False
    with watched.dog.waiting():
        assert watched.after(1799) == []
        assert watched.after(2) == ["1 is stuck: 1801 s in 'compile' after step 0"]


def test_those_who_are_awaited_are_named(watched: Watched) -> None:
    make_others(watched, "wait", "input", "start")
    assert watched.dog._name_awaited() == (
        f"process 0 (host {watched.dog._own.host}), process 2 (host h2), process 3 (host h3)"
    )
    with watched.dog.waiting():
        assert watched.dog._name_awaited() == "process 2 (host h2), process 3 (host h3)"
    assert watched.dog._own.phase == "input"
    make_others(watched, "step", "input")
    assert watched.dog._name_awaited() == ""


def test_an_error_of_the_network_names_the_one_that_is_late(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But a broken connection leaves the watchdog time to name the one that was lost."""
    slept: list[float] = []
    monkeypatch.setattr(watchdog.time, "sleep", slept.append)
    watched.dog._links[1] = cast(Any, None)
    make_others(watched, "step", "input")
    error = watched.dog.blame(RuntimeError("Gloo context initialization failed: timed out"))
    assert error is not None and error.exit_code == 69
    assert str(error).startswith("process 2 (host h2), in 'input' after step 0, was late")
    assert watched.dog.blame(RuntimeError("an error of the program")) is None
    make_others(watched, "step", "wait")
    error = watched.dog.blame(RuntimeError("Gloo AllGather failed: Connection reset by peer"))
    assert str(error).startswith("another process was lost or late")
    assert slept == [3.0, 25.0]


def test_work_is_told_from_idleness_by_the_processor_time(watched: Watched, monkeypatch) -> None:
    """A process that reads its data reports progress; one that sleeps does not."""
    times = iter([0.0, 0.5, 0.5, 0.505, 0.505])
    monkeypatch.setattr(watchdog.time, "process_time", lambda: next(times))
    ages: list[float] = []

    def sleep(seconds: float) -> None:
        ages.append(watched.now - watched.dog._own.since)
        watched.now += 10.0
        watched.dog._done = len(ages) == 2

    monkeypatch.setattr(watchdog.time, "sleep", sleep)
    watched.dog._peers.clear()
    watched.dog.beat("start", 0)
    watched.now += 5.0
    watched.dog._report()
    assert ages == [0.0, 10.0]


def test_a_process_names_itself_where_it_is_one_of_several() -> None:
    assert str(Watchdog()) == ""
    assert str(Watchdog(3, 8)).startswith("process 3 of 8 on host ")
