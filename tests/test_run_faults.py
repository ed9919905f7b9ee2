"""What goes wrong around a run while it trains: files that vanish, full disks, signals."""

import contextlib
import dataclasses
import gc
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_run import make_config, train

from aatjax.audio.augment import Augment
from aatjax.errors import DataError, WriteError
from aatjax.io.signals import InterruptedRunError
from aatjax.train.checkpoint import Checkpoints
from aatjax.train.evaluation import Evaluator
from aatjax.train.loop import Loop
from aatjax.train.run_comparison import compare_runs

SLOW = pytest.mark.slow


@contextlib.contextmanager
def after_step(step: int, action: Callable[[], object]) -> Iterator[None]:
    """Within the context, do something after a step of any run."""
    take = Loop._step

    def stepped(self: Loop, *args: Any) -> Any:
        state = take(self, *args)
        if self.done == step:
            action()
        return state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "_step", stepped)
        yield


@pytest.mark.parametrize("threads", [0, pytest.param(2, marks=SLOW)])
def test_a_sound_that_vanishes_ends_the_run_and_is_named(tmp_path: Path, threads: int) -> None:
    """F28: with the last checkpoint kept; when it is back, the run goes on."""
    config = make_config(tmp_path, training={"epochs": 3, "threads": threads})
    config = dataclasses.replace(config, augment=Augment(mixup=0.5))  # reads the sounds each time
    train(config, tmp_path / "straight")
    sounds, cache = tmp_path / "sounds", tmp_path / "cache"

    def vanish() -> None:
        sounds.rename(tmp_path / "away")
        shutil.rmtree(cache)

    with (
        after_step(3, vanish),
        pytest.raises(DataError, match=r"sounds/\w+/\d.wav") as caught,
    ):
        train(config, tmp_path / "run")
    assert caught.value.exit_code == 65 and "\n" not in str(caught.value)
    latest = Checkpoints(tmp_path / "run" / "checkpoints").latest
    assert latest == (6 if threads else 2)  # threads have read ahead: only the test clips are gone
    (tmp_path / "away").rename(sounds)
    train(config, tmp_path / "run")
    assert compare_runs(tmp_path / "straight", tmp_path / "run") == []


def replace_checkpoints(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").write_text("a file")


@pytest.mark.parametrize(
    ("action", "named"),
    [
        (shutil.rmtree, r"run/metrics.jsonl: cannot be written: No such file"),
        pytest.param(
            replace_checkpoints,
            r"checkpoint of step 4 could not be written",
            marks=SLOW,
        ),
        pytest.param(lambda run: shutil.rmtree(run / "tensorboard"), None, marks=SLOW),
    ],
    ids=["run folder", "checkpoints", "events"],
)
def test_a_run_folder_that_vanishes_ends_the_run_with_a_reason(
    tmp_path: Path, action: Callable[[Path], object], named: str | None
) -> None:
    """F6: it cannot be written any more, and nothing waits."""
    run, before = tmp_path / "run", threading.active_count()
    config = make_config(tmp_path)
    with after_step(3, lambda: action(run)):
        if named is None:
            train(config, run)
            return
        with pytest.raises(WriteError, match=named) as caught:
            train(config, run)
    assert caught.value.exit_code == 74 and "\n" not in str(caught.value)
    assert threading.active_count() <= before + 1


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def patch_phase(patch: pytest.MonkeyPatch, phase: str, number: int) -> None:
    """Send a signal to this process in a phase of the second epoch."""
    sent: list[int] = []

    def once(due: bool) -> None:
        if due and not sent:
            sent.append(number)
            send(number)

    save, settle, predict = Checkpoints.save, Checkpoints.settle, Evaluator.predict
    seen: list[int] = []

    def saving(self: Checkpoints, step: int, *args: Any) -> None:
        once(phase == "save" and step == 8)
        save(self, step, *args)
        seen.append(step)

    def settling(self: Checkpoints) -> None:
        settle(self)
        once(phase == "after the last epoch" and seen == [4, 8, 12])

    def predicting(self: Evaluator, *args: Any, **options: Any) -> Any:
        once(phase == "evaluation" and seen == [4])
        return predict(self, *args, **options)

    patch.setattr(Checkpoints, "save", saving)
    patch.setattr(Checkpoints, "settle", settling)
    patch.setattr(Evaluator, "predict", predicting)


@pytest.mark.parametrize(
    ("phase", "number", "latest"),
    [
        ("evaluation", signal.SIGTERM, 8),
        pytest.param("save", signal.SIGTERM, 8, marks=SLOW),
        pytest.param("save", signal.SIGHUP, 8, marks=SLOW),
        pytest.param("after the last epoch", signal.SIGTERM, 12, marks=SLOW),
    ],
    ids=str,
)
def test_a_signal_in_any_phase_saves_and_the_run_goes_on(
    tmp_path: Path, phase: str, number: signal.Signals, latest: int
) -> None:
    """F7: bit for bit as if nothing had come."""
    config = make_config(
        tmp_path, clips=9, valid_fraction=0.2, training={"epochs": 3, "batch_size": 3}
    )
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored under nohup
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch_phase(patch, phase, number)
            message = f"stopped at step {latest} of 12"
            with pytest.raises(InterruptedRunError, match=message) as caught:
                train(config, tmp_path / "run")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert caught.value.exit_code == 128 + number
    assert Checkpoints(tmp_path / "run" / "checkpoints").latest == latest
    train(config, tmp_path / "run")
    train(config, tmp_path / "straight")
    assert compare_runs(tmp_path / "straight", tmp_path / "run") == []


@pytest.mark.slow
def test_memory_files_and_threads_do_not_grow_over_epochs(tmp_path: Path) -> None:
    counts: dict[int, tuple[int, int, int]] = {}
    page = os.sysconf("SC_PAGE_SIZE")
    epochs = iter(range(30))

    def count() -> None:
        if (epoch := next(epochs)) not in (5, 29):
            return
        gc.collect()  # seconds, where other tests have left much
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
        counts[epoch] = (len(os.listdir("/proc/self/fd")), threading.active_count(), resident)

    config = make_config(tmp_path, valid_fraction=0.2, training={"epochs": 30, "threads": 2})
    save = Checkpoints.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", lambda *args: (count(), save(*args))[1])
        train(config, tmp_path / "run")
    assert next(epochs, None) is None
    settled, last = counts[5], counts[29]
    assert last[0] <= settled[0] + 2 and last[1] <= settled[1] + 1, counts
    assert last[2] - settled[2] < 24 * 2**20, counts
