"""Figures read from compiled programs, and plans of steps for chips and pods."""

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from aatjax.analysis.flops import count_flops
from aatjax.analysis.hlo import Program, count_bytes
from aatjax.analysis.largest_batch import find_largest_batch, search_largest
from aatjax.analysis.plan import StepPlan, parse_overflow, plan_step, read_shape
from aatjax.analysis.topology import find_devices
from aatjax.cli import main
from aatjax.config import Model, load_config
from aatjax.errors import DataError, UsageError
from aatjax.train.sharding import MeshShape, find_near_batches

SMALL = dataclasses.replace(
    load_config("default"), model=Model(source="random:tiny", frames=98, scan=True)
)


def test_sizes_of_arrays():
    assert count_bytes("(f32[2,3]{1,0}, bf16[4]{0:T(8,128)S(1)}, pred[])") == 24 + 8 + 1
    assert count_bytes("(f32[2,3]{1,0}, bf16[4]{0:T(8,128)S(1)}, pred[])", in_hbm=True) == 25


def test_operations_in_a_loop_count_as_often_as_they_run():
    mesh = MeshShape().make(jax.devices()[:4])
    split = NamedSharding(mesh, PartitionSpec("data"))

    def function(x: jax.Array) -> jax.Array:
        def body(carry: jax.Array, _: Any) -> tuple[jax.Array, None]:
            return carry * 0.5 + x.sum(axis=0, keepdims=True) * carry.sum(), None

        return jax.lax.scan(body, x, None, length=7)[0]

    with jax.set_mesh(mesh):
        compiled = (
            jax.jit(function, in_shardings=split, out_shardings=split)
            .lower(jax.ShapeDtypeStruct((8, 256), jnp.float32))
            .compile()
        )
    found = Program(compiled.as_text()).count_collectives()
    assert set(found) == {"all-reduce"}
    # The sum of the carry, one number, in each of seven rounds; the row of x once or in each.
    assert found["all-reduce"][0] in (8, 14)
    assert found["all-reduce"][1] in (7 * 4 + 1024, 7 * (4 + 1024))


SLICED = """HloModule m

%sliced (p0: f32[12,64], p1: s32[]) -> f32[1,64] {
  %p0 = f32[12,64]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %ds = f32[1,64]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,64}
}

%body (s: (s32[], f32[12,64], f32[1,64])) -> (s32[], f32[12,64], f32[1,64]) {
  %s = (s32[], f32[12,64]{1,0}, f32[1,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %w = f32[12,64]{1,0} get-tuple-element(%s), index=1
  %row = f32[1,64]{1,0} fusion(%w, %i), kind=kLoop, calls=%sliced
  ROOT %out = (s32[], f32[12,64]{1,0}, f32[1,64]{1,0}) tuple(%i, %w, %row)
}

%condition (s: (s32[], f32[12,64], f32[1,64])) -> pred[] {
  %s = (s32[], f32[12,64]{1,0}, f32[1,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %twelve = s32[] constant(12)
  ROOT %lt = pred[] compare(%i, %twelve), direction=LT
}

ENTRY %main (a: (s32[], f32[12,64], f32[1,64])) -> (s32[], f32[12,64], f32[1,64]) {
  %a = (s32[], f32[12,64]{1,0}, f32[1,64]{1,0}) parameter(0)
  ROOT %while = (s32[], f32[12,64]{1,0}, f32[1,64]{1,0}) while(%a), condition=%condition, body=%body
}
"""


def test_a_slice_of_a_stacked_weight_counts_as_the_slice():
    program = Program(SLICED)
    # A row read and a row written (and the index), twelve times; the condition's two numbers.
    index = 4
    assert program.count_traffic() == 12 * (2 * 256 + index) + 12 * (index + 4 + 1)


def test_flops_leave_out_unused_results():
    weight, x = jnp.ones((8, 8)), jnp.ones((4, 8))

    def loss(x: jax.Array, weight: jax.Array) -> jax.Array:
        return ((x @ weight) ** 2).sum()

    both = count_flops(jax.grad(loss, argnums=(0, 1)), x, weight)
    one = count_flops(lambda x, w: jax.grad(loss, argnums=(0, 1))(x, w)[0], x, weight)
    product = 2 * 4 * 8 * 8
    assert (both, one) == (3 * product, 2 * product)


def test_flops_inside_shard_map_are_those_of_all_devices():
    mesh = MeshShape().make(jax.devices()[:4])
    spec = PartitionSpec("data")
    split = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=spec, out_specs=spec)
    assert count_flops(split, jnp.ones((8, 16))) == 4 * 2 * 2 * 2 * 16


def test_topologies_that_do_not_exist():
    for name in ("v5e", "v5e:16", "v9:2x2", "tpu"):
        with pytest.raises(UsageError, match="give a TPU as v4, v5e, v5p, v6e, tpu7x"):
            find_devices(name)
    with pytest.raises(UsageError, match="give the number of devices"):
        find_devices("cpu:many")
    jax.devices()
    with pytest.raises(UsageError, match="JAX has started with 4 CPU devices"):
        find_devices("cpu:64")
    with pytest.raises(UsageError, match="no GPU found"):
        find_devices("gpu")


def test_a_shape_without_its_weights_is_refused_and_named():
    with pytest.raises(DataError, match=r"nowhere.pth: no such file.*--model.source random:base"):
        read_shape(Model(source="nowhere.pth"), 7)
    shape = read_shape(Model(source="random:base", scan=True), 7)
    assert (shape.dim, shape.frames, shape.num_classes, shape.scan) == (768, 1024, 7, True)


def test_a_plan_for_fake_devices(small_ast):
    config = dataclasses.replace(SMALL, model=Model(source=small_ast, frames=64))
    found = plan_step(config, "cpu:4", num_classes=10, batch_per_device=2)
    assert (found.devices, found.hosts, found.batch_size) == (4, 1, 8)
    assert set(found.collectives) == {"all-reduce"}
    moved = found.collectives["all-reduce"][1]
    assert 4 * found.trainable <= moved <= 4 * found.trainable + 64
    assert found.fits and found.memory is None and found.step_s is None
    assert found.arguments > 4 * found.trainable
    assert found.asked is None
    near = plan_step(config, "cpu:3", memory=1000)
    assert (near.asked, near.batch_size) == (32, 33)
    assert near.memory == 1000 and not near.fits and near.over == near.needed - 1000


@pytest.mark.parametrize(
    ("batch_size", "shards", "near"),
    [(32, 256, [256]), (32, 3, [33, 30]), (10, 4, [8, 12]), (24, 8, [24]), (300, 256, [256, 512])],
)
def test_the_sizes_next_to_a_batch(batch_size: int, shards: int, near: list[int]) -> None:
    assert find_near_batches(batch_size, shards) == near


@pytest.mark.parametrize("largest", [0, 1, 2, 3, 37, 64, 100, 777, 1024])
@pytest.mark.parametrize("kind", ["line", "steps", "curve"])
def test_the_largest_count_is_found_exactly_and_with_few_trials(largest: int, kind: str) -> None:
    tried: list[int] = []

    def measure(count: int) -> int:
        tried.append(count)
        above = max(0, count - largest)
        extra = {"line": 7 * count, "steps": 1000 * (count // 8), "curve": count * count // 5}
        return extra[kind] if not above else 10**6 + extra[kind]

    assert search_largest(measure, 10**6 - 1, most=1024) == largest
    assert len(tried) == len(set(tried)) <= 2 + 3 * max(1, largest).bit_length()
    assert max(tried) <= 1024


def test_a_straight_line_needs_few_trials() -> None:
    tried: list[int] = []

    def measure(count: int) -> int:
        tried.append(count)
        return 500 + 90 * count

    assert search_largest(measure, 500 + 90 * 789 + 3) == 789
    assert tried[:11] == [2**n for n in range(11)] and len(tried) <= 15


def test_fit_does_not_go_with_a_given_batch(capfd: pytest.CaptureFixture[str]) -> None:
    assert main.run(["plan", "default", "--fit", "--per-device", "2"]) == 2
    assert "omit --per-device" in capfd.readouterr().err


def test_fit_prints_the_largest_batch_with_and_without_rematerialisation(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With a compiler that is not there: 1 GiB a clip, a quarter with rematerialisation."""

    def plan(config: Any, topology: str, *, batch_per_device: int, memory: int, **_: Any) -> Any:
        needed = batch_per_device * 2 ** (28 if config.model.remat else 30)
        over = max(0, needed - memory)
        sizes = {"devices": 4, "hosts": 1, "chips": 4, "batch_size": 4 * batch_per_device}
        times = {"flops": 1.0, "compute_s": None, "temporaries": needed, "over": over}
        return StepPlan(topology, dtype="float32", trainable=1, memory=memory, **sizes, **times)

    monkeypatch.setattr("aatjax.analysis.largest_batch.plan_step", plan)
    assert main.run(["plan", "default", "--fit", "--topology", "cpu:4", "--memory", "5.5"]) == 0
    out = capfd.readouterr().out
    assert "cpu:4: 4 devices, float32, 5.50 GiB per device" in out
    assert "--model.remat false  up to 5 clips per device, 20 per step, in 5.00 GiB" in out
    assert "--model.remat true   up to 22 clips per device, 88 per step, in 5.50 GiB" in out
    code = main.run(
        ["plan", "default", "--fit", "--topology", "cpu:4", "--memory", "0.1", "--json"]
    )
    found = json.loads(capfd.readouterr().out)
    assert code == 1 and [one["per_device"] for one in found["largest"]] == [0, 0]
    assert main.run(["plan", "default", "--fit", "--topology", "cpu:4", "--memory", "0.5"]) == 0
    assert "does not fit: one clip per device needs 1.00 GiB" in capfd.readouterr().out


@pytest.mark.slow
def test_the_largest_batch_of_a_model_fits_and_one_clip_more_does_not(small_ast: str) -> None:
    config = dataclasses.replace(SMALL, model=Model(source=small_ast, frames=64))
    limit = plan_step(config, "cpu:1", batch_per_device=2).needed + 1000
    found = find_largest_batch(config, "cpu:1", remat=False, memory=limit)
    assert found.per_device == 2 and found.plan.fits and found.compiled[3] > limit


@pytest.mark.slow
def test_half_the_batch_needs_half_the_flops():
    whole, half = (plan_step(SMALL, "cpu:4", batch_per_device=clips) for clips in (2, 1))
    assert half.flops == pytest.approx(whole.flops / 2)
    assert half.temporaries < whole.temporaries


def test_the_compilers_error_is_parsed():
    text = "RESOURCE_EXHAUSTED: Ran out of memory. Exceeded hbm capacity by 4.50G."
    assert parse_overflow(text) == int(4.5 * 2**30)
    assert parse_overflow("INVALID_ARGUMENT: something else") is None


@pytest.mark.slow
def test_a_plan_for_a_tpu_has_the_kernels_and_no_more_than_the_gradients():
    """The real TPU compiler, in a process of its own, through the command line."""
    pytest.importorskip("libtpu", reason="the TPU's compiler comes with aatjax[tpu]")
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    command = [
        sys.executable,
        "-c",
        "from aatjax.cli.main import main; main()",
        "plan",
        "default",
        "--model.source",
        "random:small",
        "--model.frames",
        "98",
        "--model.scan",
        "--model.dtype",
        "bfloat16",
        "--topology",
        "v5e:4x4",
        "--per-device",
        "2",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert (found["devices"], found["chips"], found["hosts"]) == (16, 16, 4)
    # Attention and mixture, forward and backward: the head reads every token of the last block.
    assert found["kernels"] == 12 * 4
    assert set(found["collectives"]) == {"all-reduce"}
    assert 0.5 * 4 * found["trainable"] <= found["collectives"]["all-reduce"][1]
    assert found["collectives"]["all-reduce"][1] <= 4 * found["trainable"] + 64
    assert found["fits"] and found["needed"] < found["memory"] == 16 * 2**30
    assert found["step_s"] == max(found["compute_s"], found["memory_s"]) > 0
    assert np.isclose(found["clips_per_host"], 32 / found["step_s"] / 4)
