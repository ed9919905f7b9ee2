"""Checkpoints: what comes back is what was saved, or an error with the reason."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aatjax import petl, surgery
from aatjax.errors import DataError, WriteError
from aatjax.models.ast import AST, ASTConfig
from aatjax.train import checkpoint
from aatjax.train.optim import Optim, make_optimizer
from aatjax.train.state import TrainState, init_state


class Checkpoints(checkpoint.Checkpoints):
    """Every save is on disk when it returns."""

    def save(self, step: int, tree: Any, progress: dict[str, Any]) -> None:
        super().save(step, tree, progress)
        self.settle()


def make_state(
    method: petl.Method | None = None, *, average: bool = False, dim: int = 32, classes: int = 4
) -> TrainState:
    config = ASTConfig(
        dim=dim, depth=2, heads=2, mlp_dim=48, stride=(16, 16), frames=98, num_classes=classes
    )
    model = petl.adapt(AST(config, rngs=nnx.Rngs(0)), method or petl.AAT())
    parts = surgery.split(model)
    tx = make_optimizer(Optim(), steps_per_epoch=3, epochs=2)
    return init_state(parts.trainable, parts.stats, tx, average=average)


def filled(state: TrainState, number: float) -> TrainState:
    """The same tree with every leaf full of one number."""
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, number), state)


def assert_equal(one: Any, other: Any) -> None:
    leaves, others = jax.tree.leaves(one), jax.tree.leaves(other)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert len(leaves) == len(others) > 0
    for a, b in zip(leaves, others, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("best", [False, True])
def test_round_trip(tmp_path: Path, average: bool, best: bool) -> None:
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda leaf: jnp.asarray(rng.integers(0, 9, leaf.shape), leaf.dtype) / 1,
        make_state(average=average),
    )
    state = jax.tree.map(
        lambda leaf, was: leaf.astype(was.dtype), state, make_state(average=average)
    )
    assert (state.average is not None) is average
    tree = {"state": state, "best": (state.trainable, state.stats) if best else None}
    progress = {
        "sums": {"loss": 1.5},
        "best_score": None,
        "iterator": {"next_index": 3, "x": {"y": 1}},
    }
    checkpoints = Checkpoints(tmp_path / "c")
    assert checkpoints.latest is None
    checkpoints.save(7, tree, progress)
    assert checkpoints.latest == 7
    checkpoints.close()
    again = Checkpoints(tmp_path / "c")
    empty = {"state": filled(state, 0), "best": None}
    if best:
        empty["best"] = jax.tree.map(jnp.zeros_like, tree["best"])
    found, extra = again.restore(empty)
    assert_equal(found, tree)
    assert extra == progress
    assert (found["state"].average is None) is not average


def test_the_two_newest_are_kept(tmp_path: Path) -> None:
    state = make_state(petl.Linear())
    checkpoints = Checkpoints(tmp_path)
    for step in (2, 4, 6):
        checkpoints.save(step, filled(state, step), {"at": step})
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ["4", "6"]
    for step in (4, 6, None):
        found, extra = checkpoints.restore(state, step)
        assert_equal(found, filled(state, step or 6))
        assert extra == {"at": step or 6}


def test_the_same_step_is_written_again(tmp_path: Path) -> None:
    state = make_state(petl.Linear())
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, filled(state, 1), {})
    checkpoints.save(2, filled(state, 5), {"again": True})
    found, extra = checkpoints.restore(state)
    assert_equal(found, filled(state, 5))
    assert extra == {"again": True}


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (make_state(petl.Linear()), "arrays differ"),
        (make_state(petl.AAT(ratio=0.5)), "adapter"),
        (make_state(dim=40), "arrays differ"),
        (make_state(classes=5), "head"),
        (make_state(average=True), "average"),
    ],
    ids=["method", "width of the adapter", "width", "classes", "average"],
)
def test_a_checkpoint_of_another_model_is_refused(
    tmp_path: Path, other: TrainState, named: str
) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, make_state(), {})
    with pytest.raises(DataError, match="step 3 belongs to another model") as caught:
        checkpoints.restore(other)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no checkpoint"):
        Checkpoints(tmp_path / "new").restore(make_state(petl.Linear()))


def data_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def make_noise() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    return {
        "large": jnp.asarray(rng.normal(size=(90, 90)), jnp.float32),
        "small": jnp.asarray(rng.normal(size=(3,)), jnp.float32),
        "step": jnp.int32(7),
    }


def flip(content: bytes, at: int) -> bytes:
    flipped = bytearray(content)
    flipped[at] ^= 0x10
    return bytes(flipped)


def test_damage_to_any_file_is_named_and_the_checkpoint_before_is_used(tmp_path: Path) -> None:
    """F19: one bit flipped, cut short, emptied, removed; nothing is deleted."""
    noise = make_noise()
    empty = jax.tree.map(jnp.zeros_like, noise)
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, say=said.append)
    for step in (1, 2):
        checkpoints.save(step, noise, {"at": step})
    checkpoints.close()
    files = [path for path in sorted((tmp_path / "2").rglob("*")) if path.is_file()]
    names = {path.relative_to(tmp_path / "2").as_posix() for path in files}
    assert {"_CHECKPOINT_METADATA", "files.json", "pytree/_METADATA"} < names
    for path in files:
        content = path.read_bytes()
        damages = [flip(content, at) for at in {0, len(content) // 2} if content]
        for damaged in (*damages, content[: len(content) // 2], b"x", None):
            if damaged == content or (damaged is None and path.name == "files.json"):
                continue
            path.write_bytes(damaged or b"")
            if damaged is None:
                path.unlink()
            found, extra = Checkpoints(tmp_path, say=said.append).restore(empty)
            assert_equal(found, noise)
            assert extra == {"at": 1}
            name = re.escape(path.relative_to(tmp_path / "2").as_posix())
            assert re.search(rf"step 2 cannot be read: {name} is .*back to step 1$", said[-1])
            path.write_bytes(content)
    found, extra = Checkpoints(tmp_path).restore(empty)
    assert extra == {"at": 2}


@pytest.mark.parametrize("listed", [True, False])
def test_a_flipped_bit_never_loads_as_other_numbers(tmp_path: Path, listed: bool) -> None:
    """F19: also without the list of files, as after a kill before it was written."""
    noise = make_noise()
    empty = jax.tree.map(jnp.zeros_like, noise)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, noise, {"at": 1})
    if not listed:
        (tmp_path / "1" / "files.json").unlink()
    refused = 0
    for path in data_files(tmp_path / "1"):
        content = path.read_bytes()
        places = (1, len(content) // 3, len(content) // 2, len(content) - 2)
        if path.name == "_CHECKPOINT_METADATA":
            places = (*places, content.index(b"item_handlers") + 4)
        for at in places:
            path.write_bytes(flip(content, at))
            try:
                found, extra = checkpoints.restore(empty)
            except DataError as error:
                assert "step 1" in str(error) and "\n" not in str(error)
                refused += 1
            else:
                assert_equal(found, noise)
                assert extra == {"at": 1}
        path.write_bytes(content)
    assert refused > 5


def test_a_folder_left_by_a_killed_save_does_not_disturb(tmp_path: Path) -> None:
    """F1: half a checkpoint under its temporary name, and one without its mark of completion."""
    state = make_state(petl.Linear())
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, filled(state, 1), {})
    checkpoints.close()
    half = tmp_path / "2.orbax-checkpoint-tmp"
    (half / "state").mkdir(parents=True)
    (half / "state" / "data").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    reopened = Checkpoints(tmp_path)
    assert reopened.latest == 1
    reopened.save(2, filled(state, 2), {})
    found, _ = reopened.restore(state)
    assert_equal(found, filled(state, 2))
    assert not half.exists()
    assert (tmp_path / "notes.txt").exists()


@pytest.mark.parametrize("below", ["file/checkpoints", "file"])
def test_a_folder_that_cannot_be_is_a_write_error(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("a file, not a folder")
    with pytest.raises(WriteError) as caught:
        Checkpoints(tmp_path / below).save(1, make_state(petl.Linear()), {})
    assert caught.value.exit_code == 74
    assert "file" in str(caught.value) and "\n" not in str(caught.value)


def test_a_save_that_fails_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F4: the disk is full."""
    state = make_state(petl.Linear())
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, filled(state, 1), {})

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.ocp, "save_pytree_async", full)
    with pytest.raises(WriteError, match=r"step 2 could not be written.*No space left"):
        checkpoints.save(2, filled(state, 2), {})
    monkeypatch.undo()
    assert checkpoints.latest == 1
    assert_equal(checkpoints.restore(state)[0], filled(state, 1))


def test_a_background_failure_is_raised_at_the_next_settle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F4: asynchronous, and yet reported before the next step is done."""
    state = make_state(petl.Linear())
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(1, filled(state, 1), {})

    class Full:
        def result(self) -> None:  # as the array store raises it
            raise RuntimeError("RESOURCE_EXHAUSTED: Failed writing: No space left on device")

    checkpoints.settle()
    monkeypatch.setattr(checkpoint.ocp, "save_pytree_async", lambda *a, **k: Full())
    checkpoints.save(2, filled(state, 2), {})
    with pytest.raises(WriteError, match=r"step 2 could not be written.*No space left"):
        checkpoints.settle()
    checkpoints.settle()
    assert_equal(checkpoints.restore(state)[0], filled(state, 1))


def test_what_is_saved_is_what_was_given_though_its_memory_is_donated(tmp_path: Path) -> None:
    checkpoints = checkpoint.Checkpoints(tmp_path)
    spoil = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    tree = {f"leaf{i}": jnp.full((256, 256), 3.0) for i in range(8)}
    empty = jax.tree.map(jnp.zeros_like, tree)
    checkpoints.save(1, tree, {})
    for _ in range(5):
        tree = spoil(tree)
    found, _ = checkpoints.restore(empty)
    assert all((np.asarray(leaf) == 3.0).all() for leaf in found.values())


SAVER = """
import sys
import jax, jax.numpy as jnp
from aatjax.train.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
step = checkpoints.latest or 0
while True:
    step += 1
    tree = {f"leaf{i}": jnp.full((64, 64), step, jnp.float32) for i in range(8)}
    checkpoints.save(step, tree, {"at": step})
    checkpoints.settle()
    print(step, flush=True)
"""


@pytest.mark.slow
def test_killed_while_saving(tmp_path: Path) -> None:
    """F1: after kill -9 at any time the newest whole checkpoint holds what was saved as it."""
    template = {f"leaf{i}": jnp.zeros((64, 64), jnp.float32) for i in range(8)}
    before = 0
    for round in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        assert process.stdout is not None
        extra = 0
        for _ in range(2 + round):
            extra = int(process.stdout.readline())
        time.sleep(0.013 * round)
        process.send_signal(signal.SIGKILL)
        process.wait()
        checkpoints = Checkpoints(tmp_path)
        latest = checkpoints.latest
        assert latest is not None and latest >= extra > before
        found, progress = checkpoints.restore(template)
        assert progress == {"at": latest}
        assert all((np.asarray(leaf) == latest).all() for leaf in found.values())
        checkpoints.close()
        assert not [p.name for p in tmp_path.iterdir() if "tmp" in p.name]
        before = latest


def test_progress_is_plain_json(tmp_path: Path) -> None:
    state = make_state(petl.Linear())
    checkpoints = Checkpoints(tmp_path)
    progress = {"sums": {"loss": 0.1 + 0.2}, "seconds": 1e-9, "best_score": -0.5}
    checkpoints.save(1, state, progress)
    _, extra = checkpoints.restore(state)
    assert json.dumps(extra) == json.dumps(progress)
