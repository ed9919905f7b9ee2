"""Which implementation of an op runs: by a timer, by a fixed rule, by names; libraries."""

import dataclasses
import functools
import io
import json
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.sharding import AxisType
from tiny_run import make_config

import aatjax_kernels.attention as attention_package
from aatjax import ops, petl
from aatjax.errors import UsageError
from aatjax.experiments import run as experiment
from aatjax.ops import kernel_timer
from aatjax.ops.kernel_timer import KernelTimer, find_fastest
from aatjax.train.training import Training
from aatjax_kernels import selection
from aatjax_kernels.attention import attention, libraries, reference
from aatjax_kernels.selection import Op

X = jax.ShapeDtypeStruct((8, 6, 4), jnp.float32)


def make_op(slow="first", broken=(), calls=None):
    """An op of three implementations, one of which waits."""

    def run(name, x):
        if calls is not None:
            calls.append(name)
        if name in broken:
            raise ValueError("does not take these shapes")
        if name == slow:
            wait = lambda value: (time.sleep(0.02), value)[1]  # noqa: E731
            return jax.pure_callback(wait, jax.typeof(x), x, vmap_method="sequential")
        return x + 1

    names = ("first", "second", "third")
    return Op("toy", {"cpu": names}, (0,), run, lambda x: 1.0)


def test_the_fastest_is_chosen_and_kept_for_the_next_process(tmp_path):
    path, lines, calls = tmp_path / "cache" / "times.json", [], []
    timer = KernelTimer(path, backward=False, say=lines.append)
    op = make_op(calls=calls)
    assert timer(op, (X,)) in ("second", "third")
    (line,) = lines
    assert line.startswith("toy of 6x4 in float32, timed once on this device: ")
    assert line.index("first") > max(line.index("second"), line.index("third"))
    tried = len(calls)
    assert timer(op, (X,)) is not None
    assert KernelTimer(path, backward=False)(op, (X,)) in ("second", "third")
    assert len(calls) == tried
    times = json.loads(path.read_text())["toy of 6x4 in float32, forward"]
    assert times["first"] > 20 > times["second"]


def test_other_shapes_and_the_backward_pass_are_timed_on_their_own(tmp_path):
    timer = KernelTimer(tmp_path / "times.json", backward=False)
    op = make_op()
    timer(op, (X,))
    timer(op, (jax.ShapeDtypeStruct((4, 6, 4), jnp.float32),))  # another batch: the same times
    timer(op, (jax.ShapeDtypeStruct((8, 7, 4), jnp.float32),))
    timer(op, (jax.ShapeDtypeStruct((8, 6, 4), jnp.bfloat16),))
    KernelTimer(tmp_path / "times.json", backward=True)(make_op(slow=None), (X,))
    assert list(json.loads((tmp_path / "times.json").read_text())) == [
        "toy of 6x4 in float32, forward",
        "toy of 7x4 in float32, forward",
        "toy of 6x4 in bfloat16, forward",
        "toy of 6x4 in float32, forward and backward",
    ]


def test_what_does_not_run_is_left_out(tmp_path):
    timer = KernelTimer(tmp_path / "times.json", backward=False)
    assert timer(make_op(broken=("second",)), (X,)) == "third"
    everything = make_op(broken=("first", "second", "third"))
    assert KernelTimer(None, backward=False)(everything, (X,)) is None


def test_the_fixed_rule_holds_unless_another_is_faster_by_the_margin():
    names = ("first", "second")
    assert find_fastest(names, {"first": 1.0, "second": 0.98}) is None
    assert find_fastest(names, {"first": 1.0, "second": 0.96}) == "second"
    assert find_fastest(names, {"second": 5.0}) == "second"
    assert find_fastest(names, {}) is None


def test_no_more_time_is_spent_than_there_is(tmp_path):
    lines = []
    timer = KernelTimer(tmp_path / "times.json", backward=False, seconds=1e-9, say=lines.append)
    assert timer(make_op(), (X,)) is None
    assert timer(make_op(), (jax.ShapeDtypeStruct((8, 9, 4), jnp.float32),)) is None
    assert len(lines) == 2 and all("the fixed rule holds" in line for line in lines)


def test_times_of_some_implementations_only_do_not_count(tmp_path):
    """The second one alone would be chosen before the third one was tried."""
    path = tmp_path / "times.json"
    timer = KernelTimer(path, backward=False, seconds=0.01)
    assert timer(make_op(broken=("first",), slow="second"), (X,)) is None
    assert list(json.loads(path.read_text()).values()) == [{}]


def test_a_run_that_goes_on_chooses_as_it_did(tmp_path):
    """Where there was no time the first time, nothing is timed the second time."""
    path = tmp_path / "times.json"
    assert KernelTimer(path, backward=False, seconds=1e-9)(make_op(), (X,)) is None
    calls = []
    assert KernelTimer(path, backward=False)(make_op(calls=calls), (X,)) is None
    assert not calls


def test_the_process_that_was_first_decides(tmp_path):
    path = tmp_path / "times.json"
    late = KernelTimer(path, backward=False)
    case = "toy of 6x4 in float32, forward"
    path.write_text(json.dumps({case: {"first": 2.0, "second": 1.9, "third": 1.0}}))
    assert late(make_op(slow="third"), (X,)) == "third"


def test_a_cache_that_cannot_be_written_leaves_the_fixed_rule(tmp_path):
    (tmp_path / "file").write_text("no folder")
    timer = KernelTimer(tmp_path / "file" / "times.json", backward=False)
    assert timer(make_op(), (X,)) is None
    assert timer.seconds == 0


@pytest.mark.parametrize("text", ["", "[]", '{"case": 3}', '{"case": {"a": "x"}}', "\0"])
def test_damaged_times_are_measured_again(tmp_path, text):
    path = tmp_path / "times.json"
    path.write_text(text)
    assert KernelTimer(path, backward=False)(make_op(), (X,)) in ("second", "third")
    assert "toy of 6x4 in float32, forward" in json.loads(path.read_text())


@pytest.fixture
def own_times(tmp_path, monkeypatch):
    """Has times kept in a file of the test, and choices measured, on however busy a machine."""
    path = tmp_path / "times.json"
    monkeypatch.setenv(selection.VARIABLE, "measured")

    @functools.cache
    def get_timer(*, backward):
        return KernelTimer(path, backward, seconds=600)

    monkeypatch.setattr(kernel_timer, "get_timer", get_timer)
    return path


def trace_attention(batch=4, **options):
    x = jax.ShapeDtypeStruct((batch, 9, 2, 8), jnp.float32)
    jax.jit(lambda x: ops.attention(x, x, x)).lower(x, **options)


def test_ops_are_timed_where_they_are_asked_for_only(own_times):
    trace_attention()
    assert not own_times.exists()
    lines = []
    with ops.choosing_kernels(backward=True, say=lines.append):
        trace_attention()
    times = json.loads(own_times.read_text())
    assert set(times["attention of 9x2x8 in float32, forward and backward"]) == {
        "blocked",
        "reference",
    }
    assert len(lines) == 1
    with ops.choosing_kernels("fixed", backward=False):
        trace_attention()
    assert json.loads(own_times.read_text()) == times


def test_the_measured_choice_runs(own_times, monkeypatch):
    """Times in the file that prefer the einsums: their weights are in the program."""
    case = "attention of 9x2x8 in float32, forward and backward"
    x = jnp.ones((4, 9, 2, 8))

    def find_program():
        kernel_timer.get_timer.cache_clear()
        with ops.choosing_kernels(backward=True):
            return jax.jit(lambda x: ops.attention(x, x, x)).lower(x).as_text()

    own_times.write_text(json.dumps({case: {"blocked": 1.0, "reference": 2.0}}))
    blocked = find_program()
    own_times.write_text(json.dumps({case: {"blocked": 2.0, "reference": 1.0}}))
    assert find_program() != blocked
    plain = jax.jit(lambda x: attention(x, x, x, implementation="reference")).lower(x).as_text()
    assert find_program().count("dot_general") == plain.count("dot_general")


def test_the_part_of_one_device_is_timed(own_times):
    axes = (AxisType.Auto, AxisType.Auto)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=axes)
    with jax.set_mesh(mesh), ops.choosing_kernels(backward=False):
        trace_attention()
    assert list(json.loads(own_times.read_text())) == ["attention of 9x1x8 in float32, forward"]


def test_training_times_its_ops_once_and_says_so(own_times, tmp_path):
    config = dataclasses.replace(make_config(tmp_path), petl=petl.SoftMoA(num_experts=3))
    said = []
    for run in ("a", "b"):
        kernel_timer.get_timer.cache_clear()
        screen = io.StringIO()
        experiment.train(config, run_dir=tmp_path / run, show=screen)
        said.append(screen.getvalue().count("timed once on this device"))
    assert said == [3, 0]  # attention of all tokens and of the pooled ones, soft_moe; then none
    assert len(json.loads(own_times.read_text())) == 3


def test_a_wrong_name_is_said():
    message = "kernels='nope': unknown kernel 'nope'; use tpu, gpu, cudnn, tokamax, a list"
    context = ops.choosing_kernels("nope", backward=False)
    with pytest.raises(UsageError, match=message), context:
        pass
    with pytest.raises(UsageError, match=f"training.{message}"):
        Training(kernels="nope")


# Libraries.


@pytest.mark.parametrize("masked", [False, True])
def test_keys_behind_the_others_are_masked_out(masked):
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.normal(size=(3, 11, 2, 8)), jnp.float32) for _ in "qkv")
    mask = jnp.asarray(rng.random((3, 11)) < 0.6) if masked else None

    def ours(*arrays):
        return libraries.run_cudnn(*arrays, mask, implementation="xla")

    truth, pull_truth = jax.vjp(lambda *a: reference.attention(*a, mask), query, key, value)
    out, pull = jax.vjp(ours, query, key, value)
    np.testing.assert_allclose(out, truth, atol=2e-6)
    for mine, wanted in zip(pull(value), pull_truth(value), strict=True):
        np.testing.assert_allclose(mine, wanted, atol=5e-6)


def test_tokamax_takes_the_same_arguments():
    pytest.importorskip("tokamax", reason="openxla/tokamax is not installed")
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.normal(size=(2, 16, 2, 16)), jnp.float32) for _ in "qkv")
    mask = jnp.asarray(rng.random((2, 16)) < 0.6)
    out = libraries.run_tokamax(query, key, value, mask, implementation="xla")
    np.testing.assert_allclose(out, reference.attention(query, key, value, mask), atol=2e-6)


def shape(*, width=64, dtype="bfloat16"):
    return jax.ShapeDtypeStruct((2, 590, 12, width), jnp.dtype(dtype))


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        (shape(dtype="float32"), "float32: it must be bfloat16 or float16"),
        (shape(width=132), "heads of width 132: it must be a multiple of 8, at most 128"),
        (shape(width=12), "heads of width 12"),
        (shape(), "where JAX finds no NVIDIA GPU"),
    ],
)
@pytest.mark.parametrize("library", ["cudnn", "tokamax"])
def test_what_a_library_does_not_take_is_said(library, query, reason):
    with pytest.raises(ValueError, match=f"attention implementation='{library}'.*{reason}"):
        jax.jit(lambda x: attention(x, x, x, implementation=library)).lower(query)


@pytest.fixture
def stated_cudnn(monkeypatch):
    """cuDNN as on a Hopper GPU, for programs that are lowered without one."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91500)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: False)

    def explain(name, query):
        half = query.dtype.name in libraries.HALF
        return None if half and name == "cudnn" else "not stated here"

    monkeypatch.setattr(attention_package, "explain_unsupported", explain)


def lower(dtype="bfloat16", platform="cuda", mask=None, **options):
    x = shape(dtype=dtype)

    def both(query, mask):
        out, pull = jax.vjp(lambda q: attention(q, q, q, mask=mask, **options), query)
        return pull(out)

    traced = jax.jit(both).trace(x, mask)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def test_attention_in_half_precision_is_cudnn_on_a_gpu(stated_cudnn):
    text = lower()
    assert "__cudnn$fmhaSoftmax" in text
    assert "__cudnn$fmhaSoftmaxBackward" in text
    assert "__cudnn" not in lower(dtype="float32")
    assert "__cudnn" not in lower(platform="cpu")
    assert "__cudnn" in lower(mask=jax.ShapeDtypeStruct((2, 590), jnp.bool_))


def test_cudnn_runs_on_each_devices_own_clips_and_heads(stated_cudnn):
    axes = (AxisType.Auto, AxisType.Auto)
    with jax.set_mesh(jax.make_mesh((2, 2), ("data", "model"), axis_types=axes)):
        text = lower()
    calls = [line for line in text.splitlines() if "__cudnn$fmha" in line]
    assert len(calls) == 2
    assert all("tensor<1x590x6x64xbf16>" in call for call in calls)


def test_names_limit_the_fixed_rule(stated_cudnn, monkeypatch):
    monkeypatch.setenv(selection.VARIABLE, "none")
    assert "__cudnn" not in lower()
    monkeypatch.setenv(selection.VARIABLE, "gpu")
    assert "__cudnn" not in lower()
    assert "triton" in lower().lower()


def test_the_default_path_imports_no_triton():
    """Lowered for CUDA: what JAX is to remove is not touched."""
    code = """
import sys, jax, jax.numpy as jnp
from aatjax import ops
x = jnp.ones((2, 16, 2, 64), jnp.bfloat16)
p = [jnp.ones(s) for s in ((128, 2, 1), (2, 128, 4), (2, 4), (2, 4, 128), (2, 128))]
def f(x):
    y = ops.attention(x, x, x).reshape(2, 16, 128)
    return ops.soft_moe(y, *p).sum()
jax.jit(jax.grad(lambda x: f(x).astype(jnp.float32))).trace(x).lower(lowering_platforms=("cuda",))
assert not [name for name in sys.modules if "pallas.triton" in name], "Triton was imported"
"""
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:jax", "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_times_of_a_device_have_a_file_of_their_own(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = kernel_timer.find_times()
    assert path.parent == tmp_path / "aatjax" / "kernels"
    assert f"jax-{jax.__version__}" in path.name
    monkeypatch.setattr(kernel_timer, "version", lambda name: "9.9")
    assert kernel_timer.find_times() != path
    assert kernel_timer.get_timer(backward=True) is kernel_timer.get_timer(backward=True)
