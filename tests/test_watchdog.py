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
