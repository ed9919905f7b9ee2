"""`aatjax chaos`: a run that is killed and resumed, and a comparison that can fail."""

import dataclasses
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from safetensors.numpy import load_file, save_file
from tiny_run import make_config, train

from aatjax.audio.augment import Augment
from aatjax.cli.main import run
from aatjax.config import Config
from aatjax.errors import UsageError
from aatjax.io.json_file import write_json
from aatjax.io.signals import InterruptedRunError, StopRequest
from aatjax.train.fault_injection import Trial
from aatjax.train.loop import Loop
from aatjax.train.run_comparison import compare_runs
from aatjax.train.state import TrainState

SLOW = pytest.mark.slow
CONFIG = str(Path(__file__).parent / "small_config.py")


def may_mount(folder: Path) -> bool:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        return False
    subprocess.run(["umount", str(folder)], check=True)
    return True


@pytest.mark.slow
def test_a_run_survives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """F1, F2, F4, F7: kill -9, SIGTERM, kill -9 while saving, and where it can be a full disk."""
    folder = tmp_path / "chaos"
    code = run(["chaos", CONFIG, "--out", str(folder), "--interruptions", "3", "--seed", "1"])
    said = capsys.readouterr().out
    assert code == 0, said
    assert "bit for bit" in said
    assert "kill -9" in said and "SIGTERM" in said
    assert (folder / "certificate.txt").read_text() == said
    if may_mount(tmp_path / "probe"):
        assert "code 74" in said and "with room: code 0" in said
    else:
        assert "not tried" in said


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """A config, and the folder of its straight run and of one that was stopped in its 2nd epoch."""
    folder = tmp_path_factory.mktemp("runs")
    config = make_config(
        folder, clips=9, valid_fraction=0.2, training={"epochs": 3, "average": 0.9}
    )
    config = dataclasses.replace(config, augment=Augment(time_mask=20, freq_mask=20))
    train(config, folder / "straight")
    step = Loop._step
    with pytest.MonkeyPatch.context() as patch:

        def stop_at_5(self: Loop, state: Any, feed: Any, key: Any, stop: StopRequest) -> Any:
            state = step(self, state, feed, key, stop)
            stop.signum = 15 if self.done == 5 else None
            return state

        patch.setattr(Loop, "_step", stop_at_5)
        with pytest.raises(InterruptedRunError):
            train(config, folder / "stopped")
    return config, folder


def forget_iterator(loop: Loop, state: TrainState) -> TrainState:
    loop.progress.iterator = None
    return state


def forget_average(loop: Loop, state: TrainState) -> TrainState:
    return dataclasses.replace(state, average=jax.tree.map(jnp.copy, state.trainable))


def forget_optimiser(loop: Loop, state: TrainState) -> TrainState:
    return dataclasses.replace(state, opt_state=jax.tree.map(jnp.zeros_like, state.opt_state))


def forget_best_weights(loop: Loop, state: TrainState) -> TrainState:
    loop.best = jax.tree.map(jnp.copy, (state.trainable, state.stats))
    return state


def forget_best_score(loop: Loop, state: TrainState) -> TrainState:
    loop.progress.best_score = None
    return state


def forget_sums(loop: Loop, state: TrainState) -> TrainState:
    loop.progress.sums = {}
    return state


def forget_step(loop: Loop, state: TrainState) -> TrainState:
    return dataclasses.replace(state, step=jnp.zeros_like(state.step))


def forget_epoch(loop: Loop, state: TrainState) -> TrainState:
    loop.done -= loop.per_epoch
    return state


def forget_random_key(loop: Loop, state: TrainState) -> TrainState:
    steps = loop.steps

    def take_other_key(state: Any, frozen: Any, batch: Any, key: jax.Array) -> Any:
        return steps.train(state, frozen, batch, jax.random.fold_in(key, 1))

    loop.steps = dataclasses.replace(steps, train=take_other_key)
    return state


FAULTS = {
    "iterator": forget_iterator,
    "average": forget_average,
    "optimiser": forget_optimiser,
    "best weights": forget_best_weights,
    "best score": forget_best_score,
    "sums of the epoch": forget_sums,
    "step": forget_step,
    "epoch": forget_epoch,
    "random key": forget_random_key,
}


def test_a_resumed_run_saves_what_a_straight_one_saves(
    runs: tuple[Config, Path], tmp_path: Path
) -> None:
    config, folder = runs
    shutil.copytree(folder / "stopped", tmp_path / "run")
    train(config, tmp_path / "run")
    assert compare_runs(folder / "straight", tmp_path / "run") == []


@pytest.mark.parametrize(
    "fault", [name if name == "average" else pytest.param(name, marks=SLOW) for name in FAULTS]
)
def test_whatever_a_resume_forgets_is_found(
    runs: tuple[Config, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """The adapter file alone shows but some of these."""
    config, folder = runs
    shutil.copytree(folder / "stopped", tmp_path / "run")
    restore = Loop._restore
    monkeypatch.setattr(
        Loop, "_restore", lambda loop, state: FAULTS[fault](loop, restore(loop, state))
    )
    try:
        train(config, tmp_path / "run")
    except (StopIteration, RuntimeError):  # it asks for more batches than there are
        assert fault == "epoch"
    trial = Trial([], tmp_path, seed=0, say=print)
    trial._compare(folder / "straight", tmp_path / "run", "it")
    assert trial.found.problems
    text = trial.found.to_text()
    assert "BROKEN: it: " in text and "survived" not in text


def test_every_kind_of_file_is_compared(runs: tuple[Config, Path], tmp_path: Path) -> None:
    _, folder = runs
    other = tmp_path / "other"

    def find(name: str, change: Callable[[Path], object]) -> str:
        shutil.rmtree(other, ignore_errors=True)
        shutil.copytree(folder / "straight", other)
        change(other / name)
        return "; ".join(compare_runs(folder / "straight", other))

    def edit(**fields: Any) -> Callable[[Path], object]:
        return lambda path: write_json(path, {**json.loads(path.read_bytes()), **fields})

    assert find("result.json", edit(seconds=1e9)) == ""
    assert find("result.json", edit(trainable=1)) == "result.json differs"
    assert find("config.json", edit(name="x")) == "config.json differs"
    assert find("best.safetensors", Path.unlink) == "best.safetensors is missing in other"
    assert find("adapter.safetensors", lambda path: path.write_bytes(b"x")).startswith(
        "adapter.safetensors cannot be read"
    )
    rows = (folder / "straight" / "metrics.jsonl").read_text()
    slower = rows.replace('"train/seconds": ', '"train/seconds": 9')
    assert find("metrics.jsonl", lambda path: path.write_text(slower)) == ""
    other_rows = rows.replace('"train/loss": ', '"train/loss": 9')
    assert (
        find("metrics.jsonl", lambda path: path.write_text(other_rows)) == "metrics.jsonl differs"
    )

    def nudge(path: Path) -> None:
        arrays = load_file(path)
        name = sorted(arrays)[0]
        arrays[name] = -arrays[name]  # 0 becomes -0
        save_file(arrays, path)

    found = find("adapter.safetensors", nudge)
    assert "arrays differ" in found and "adapter.safetensors" in found
    found = find("checkpoints/9", shutil.rmtree)
    assert "the last checkpoints are those of steps 9 and 6" in found


def test_a_certificate_needs_a_resume_from_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fake(Trial):
        """Every process is killed before its first checkpoint."""

        def _finish(self, run: Path) -> tuple[int, str]:
            run.mkdir()
            (run / "metrics.jsonl").write_text('{"step": 3, "epoch": 1}\n')
            return 0, ""

        def _interrupt(self, run: Path, kind: str, **options: Any) -> tuple[str | None, list[int]]:
            return "kill -9", []

        def _compare(self, straight: Path, other: Path, what: str) -> None:
            pass

        def _fill_disk(self, straight: Path) -> str:
            return "not tried"

    found = Fake([], tmp_path / "new", seed=0, say=print).run(4)
    assert "the run never went on from a checkpoint" in found.problems
    assert not found.interruptions and found.early == 7
    assert "survived" not in found.to_text() and "not counted: 7" in found.to_text()


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="is not empty"):
        Trial([CONFIG], tmp_path, seed=0, say=print).run(1)
    assert run(["chaos", CONFIG, "--out", str(tmp_path), "--interruptions", "0"]) == 2
