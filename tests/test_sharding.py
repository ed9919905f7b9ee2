"""Several devices and several processes: the same numbers, the same order, nothing gathered."""

import dataclasses
import functools
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import run_sharded
from flax import nnx
from jax.sharding import PartitionSpec as P

from aatjax import petl, surgery
from aatjax.audio.augment import Augment
from aatjax.audio.frontend import FrontEnd
from aatjax.config import load_config
from aatjax.errors import UsageError
from aatjax.experiments import run as experiment
from aatjax.models.ast import AST
from aatjax.train.optim import Optim, make_optimizer
from aatjax.train.sharding import MeshShape, check_batch, choose_spec, find_local_rows, put_batch
from aatjax.train.state import cast_frozen, start_state
from aatjax.train.step import make_steps
from aatjax.train.training import Training

HERE = Path(__file__).parent
FAST = {("conformer", (4, 1, 1)), ("aat", (1, 2, 2))}
SHAPES = [(2, 1, 1), (4, 1, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2)]
METHODS = ["aat", "conformer", "soft_moa", "full"]


def mesh_of(data: int, fsdp: int = 1, model: int = 1) -> Any:
    return MeshShape(data, fsdp, model).make(jax.devices()[: data * fsdp * model])


@functools.cache
def run_one_device(method: str) -> dict[str, Any]:
    return run_sharded.run(method, mesh_of(1))


def assert_alike(found: dict[str, Any], wanted: dict[str, Any], tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(found["losses"], wanted["losses"], atol=tolerance)
    assert found["valid"] == wanted["valid"]
    assert found["evaluated"] == wanted["evaluated"]
    assert set(found["weights"]) == set(wanted["weights"])
    for path, value in wanted["weights"].items():
        if path.endswith("attn/k/bias"):
            continue  # its gradient is rounding noise, which AdamW makes into whole steps
        np.testing.assert_allclose(
            found["weights"][path], value, atol=tolerance, rtol=0, err_msg=path
        )


@pytest.mark.parametrize(
    ("method", "shape"),
    [
        pytest.param(m, s, marks=() if (m, s) in FAST else pytest.mark.slow)
        for i, m in enumerate(METHODS)
        for j, s in enumerate(SHAPES)
        if (i + j) % 2 == 0  # a shape has two methods, a method two or three shapes
    ],
    ids=str,
)
def test_several_devices_train_as_one_does(method: str, shape: tuple[int, int, int]) -> None:
    wanted = run_one_device(method)
    found = run_sharded.run(method, mesh_of(*shape))
    assert_alike(found, wanted)
    assert found["seen"] == wanted["seen"]


IN_TURN = [
    ("full", [(1, 2, 2), (2, 1, 1)]),
    ("full", [(4, 1, 1), (1, 4, 1)]),
    ("soft_moa", [(1, 2, 2), (1, 4, 1)]),
    ("conformer", [(1, 1, 1), (1, 2, 2)]),
]


@pytest.mark.parametrize(
    ("method", "shapes"),
    [pytest.param(*one, marks=() if not n else pytest.mark.slow) for n, one in enumerate(IN_TURN)],
    ids=str,
)
def test_a_checkpoint_goes_on_on_any_mesh(
    method: str, shapes: list[tuple[int, int, int]], tmp_path: Path
) -> None:
    found = run_sharded.run_in_turn(method, [mesh_of(*shape) for shape in shapes], tmp_path)
    assert_alike(found, run_one_device(method))


def environment(devices: int) -> dict[str, str]:
    flags = (
        f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0 "
        "--xla_cpu_multi_thread_eigen=false"
    )
    return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONSAFEPATH": ""}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(folder: Path, method: str, sizes: str, devices: int, count: int = 1) -> list[Any]:
    """Runs the script in `count` processes and returns what each printed and wrote."""
    command = [sys.executable, str(HERE / "run_sharded.py"), method, sizes, str(folder)]
    address = f"localhost:{free_port()}"
    running = [
        subprocess.Popen(
            [*command, *([address, str(count), str(index)] if count > 1 else [])],
            env=environment(devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    found = []
    for index, process in enumerate(running):
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-3000:]
        result = json.loads(out.splitlines()[-1])
        result["weights"] = dict(np.load(folder / f"weights{index}.npz"))
        found.append(result)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "sizes"),
    [
        ("aat", "-1,1,1"),
        ("conformer", "-1,1,1"),
        ("soft_moa", "1,-1,2"),
        ("full", "2,2,2/1,4,2"),
    ],
)
def test_eight_devices_train_as_one_does(method: str, sizes: str, tmp_path: Path) -> None:
    (found,) = launch(tmp_path, method, sizes, 8)
    assert found["devices"] == 8
    assert_alike(found, run_one_device(method))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["aat", "conformer", "soft_moa"])
def test_two_processes_train_as_one_does(method: str, tmp_path: Path) -> None:
    """Each reads its half of every batch; both end with the same weights."""
    found = launch(tmp_path, method, "-1,1,1", 2, count=2)
    wanted = run_one_device(method)
    for result in found:
        assert result["devices"] == 4
        result["losses"] = result["losses"] or wanted["losses"]
        assert_alike(result, wanted)
    halves = [np.reshape(result["seen"], (-1, 4)) for result in found]
    together = np.concatenate(halves, axis=1).reshape(-1)
    assert together.tolist() == wanted["seen"]
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 2


# The compiled step.


def compiled_step(method: petl.Method, mesh: Any, batch_size: int = 8) -> tuple[str, int]:
    """The train step's program for a mesh, and the bytes of what is trained."""
    model = petl.adapt(AST(run_sharded.CONFIG, rngs=nnx.Rngs(0)), method)
    parts = surgery.split(model)
    tx = make_optimizer(Optim(), steps_per_epoch=1, epochs=1)
    begin = start_state(parts, tx, mesh, average=False)
    steps = make_steps(
        parts.graphdef,
        tx,
        frontend=FrontEnd(frames=39),
        augment=Augment(),
        loss="ce",
        layout=begin.layout,
    )
    rows = {
        "audio": np.zeros((batch_size, 6480), np.int16),
        "length": np.full(batch_size, 6480, np.int32),
        "target": np.eye(3, dtype=np.float32)[np.arange(batch_size) % 3],
        "weight": np.ones(batch_size, np.float32),
    }
    batch = put_batch(rows, mesh, batch_size)
    trained = sum(leaf.nbytes for leaf in jax.tree.leaves(parts.trainable))
    with jax.set_mesh(mesh):
        step: Any = steps.train
        lowered = step.lower(begin.state, begin.frozen, batch, jax.random.key(0))
        return lowered.compile().as_text(), trained


def collectives(text: str) -> dict[str, int]:
    """Bytes that each kind of collective operation of a program brings out."""
    found: dict[str, int] = {}
    pattern = r"= (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)\("
    for shapes, name in re.findall(pattern, text):
        for kind, dims in re.findall(r"(f32|s32|u32|pred|s16|bf16)\[([\d,]*)\]", shapes):
            width = {"f32": 4, "s32": 4, "u32": 4, "pred": 1, "s16": 2, "bf16": 2}[kind]
            size = width * int(np.prod([int(d) for d in dims.split(",") if d] or [1]))
            found[name] = found.get(name, 0) + size
    return found


@pytest.mark.parametrize(
    "method", [petl.SoftMoA(reduction=8.0), pytest.param(petl.Full(), marks=pytest.mark.slow)]
)
def test_data_parallel_sums_the_trainable_gradients_and_moves_nothing_else(
    method: petl.Method,
) -> None:
    text, trained = compiled_step(method, mesh_of(4))
    moved = collectives(text)
    assert set(moved) == {"all-reduce"}
    # And the sums: loss, hits, weights, whether all is finite.
    assert trained <= moved["all-reduce"] <= trained + 64


def test_fsdp_holds_a_piece_of_each_large_weight() -> None:
    mesh = mesh_of(1, 4)
    parts = surgery.split(petl.adapt(AST(run_sharded.CONFIG, rngs=nnx.Rngs(0)), petl.AAT()))
    tx = make_optimizer(Optim(), steps_per_epoch=1, epochs=1)
    begin = start_state(parts, tx, mesh, average=False)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(begin.frozen))
    piece = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(begin.frozen))
    assert piece < 0.45 * whole
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(begin.state))
    text, _ = compiled_step(petl.AAT(), mesh)
    assert "all-gather" in collectives(text)


def test_rules_follow_the_path_and_leave_whole_what_does_not_divide() -> None:
    mesh = mesh_of(1, 2, 2)
    assert choose_spec("blocks/3/attn/q/kernel", (32, 32), mesh) == P("fsdp", "model")
    assert choose_spec("opt/0/mu/blocks/3/mlp/down/kernel", (48, 32), mesh) == P("model", "fsdp")
    assert choose_spec("blocks/3/mlp/up/kernel", (33, 48), mesh) == P(None, "model")
    assert choose_spec("blocks/3/mlp/adapter/kernel", (32, 32), mesh) == P()
    assert choose_spec("head/linear/kernel", (32, 4), mesh) == P()


def test_sizes_that_do_not_fit_say_so() -> None:
    assert MeshShape(-1, 2, 2).sizes(8) == (2, 2, 2)
    with pytest.raises(UsageError, match=r"mesh.data=3.*do not fit 8 devices.*must be 8"):
        MeshShape(3).sizes(8)
    with pytest.raises(UsageError, match="only one"):
        MeshShape(-1, -1)
    with pytest.raises(UsageError, match=r"mesh.model=0 must be"):
        MeshShape(model=0)
    with pytest.raises(UsageError, match=r"batch_size=10 does not divide over 4 .*take 8 or 12"):
        check_batch(mesh_of(4), 10)
    with pytest.raises(UsageError, match=r"take 4$"):
        check_batch(mesh_of(4), 2)


def test_a_batch_that_does_not_divide_is_refused_before_the_data_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(load_config("default"), mesh=MeshShape(data=4))
    config = dataclasses.replace(config, training=Training(batch_size=10))
    monkeypatch.setattr(experiment, "make_partition", None)
    with pytest.raises(UsageError, match=r"batch_size=10 does not divide .* take 8 or 12"):
        experiment.train(config, run_dir=tmp_path / "run", show=None)
    assert not list(tmp_path.glob("run/[!.]*"))


def test_a_process_reads_the_rows_of_its_own_devices() -> None:
    assert find_local_rows(mesh_of(2, 1, 2), 6).tolist() == list(range(6))


def test_the_frozen_weights_in_bfloat16_change_nothing() -> None:
    config = dataclasses.replace(run_sharded.CONFIG, dtype="bfloat16")
    model = petl.adapt(AST(config, rngs=nnx.Rngs(0)), petl.AAT())
    parts = surgery.split(model)
    held = cast_frozen(parts.frozen, config.dtype)
    sizes = [sum(x.nbytes for x in jax.tree.leaves(tree)) for tree in (held, parts.frozen)]
    assert sizes[0] < 0.6 * sizes[1]
    x = jax.random.normal(jax.random.key(0), (2, 39, 128))

    @jax.jit
    def logits(frozen: Any) -> jax.Array:
        return surgery.join(parts.graphdef, parts.trainable, parts.stats, frozen)(x)

    np.testing.assert_array_equal(logits(jax.tree.map(jnp.asarray, held)), logits(parts.frozen))
