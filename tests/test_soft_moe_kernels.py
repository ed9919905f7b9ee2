"""Every implementation of the soft mixture against float64, and where each of them runs."""

import functools
import itertools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from jax.experimental.layout import Format, Layout
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from slow_cases import mark_slow
from torch_soft_moe import soft_moe as truth

from aatjax.analysis.hlo import Program
from aatjax_kernels.dispatch import KernelOptions
from aatjax_kernels.soft_moe import SoftMoeImplementation, fused, gpu_short, soft_moe, tpu
from aatjax_kernels.soft_moe.shapes import MIXTURES, SHAPES, TOKENS
from aatjax_kernels.soft_moe.shapes import SoftMoeShape as Shape

NAMES = ("x", "phi", "w_down", "b_down", "w_up", "b_up")
KERNELS = ("tpu", "gpu")
DERIVED = ("xla", *KERNELS)
"""Implementations with a backward pass of their own."""
CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
Arrays = list[np.ndarray]


def arrays(shape: Shape, dim: int, seed: int = 0, size: float = 1.0) -> Arrays:
    """Arguments whose scores have a spread of about `size`."""
    rng = np.random.default_rng(seed)
    batch, tokens, e, p, r = shape
    shapes = ((batch, tokens, dim), (dim, e, p), (e, dim, r), (e, r), (e, r, dim), (e, dim))
    scales = (1.0, size * dim**-0.5, dim**-0.5, 0.5, r**-0.5, 0.5)
    return [
        (scale * rng.normal(size=shape)).astype(np.float32)
        for shape, scale in zip(shapes, scales, strict=True)
    ]


def mask_ends(shape: Shape, seed: int = 0) -> np.ndarray:
    """A mask with ragged ends, one clip full and one (of several) empty."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, shape.tokens + 1, size=shape.batch)
    lengths[0] = shape.tokens
    if shape.batch > 2:
        lengths[1] = 0
    return np.arange(shape.tokens)[None] < lengths[:, None]


def distance(found: jax.Array, expected: np.ndarray) -> float:
    """Relative distance in the Euclidean norm."""
    difference = np.linalg.norm(np.asarray(found, np.float64) - expected)
    return float(difference / max(np.linalg.norm(expected), 1e-30))


def run(
    values: Arrays,
    cotangent: np.ndarray,
    name: SoftMoeImplementation | None,
    *,
    dtype: str = "float32",
    mask: np.ndarray | None = None,
    **more,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Output and gradients of an implementation, kernels in Pallas's interpreter."""
    more.setdefault("interpret", name in KERNELS)

    @jax.jit
    def both(dout, *given):
        valid = None if mask is None else jnp.asarray(mask)
        call = functools.partial(soft_moe, implementation=name, mask=valid, **more)
        out, pull = jax.vjp(call, *given)
        return out, pull(dout)

    given = [jnp.asarray(values[0], dtype), *map(jnp.asarray, values[1:])]
    return both(jnp.asarray(cotangent, dtype), *given)


def check(
    shape: Shape,
    dim: int,
    name: SoftMoeImplementation | None,
    *,
    bound: float = 1e-5,
    dtype: str = "float32",
    gradient_bound: float | None = None,
    values: Arrays | None = None,
    **more,
) -> None:
    values = arrays(shape, dim) if values is None else values
    cotangent = np.random.default_rng(1).normal(size=values[0].shape).astype(np.float32)
    # Both get the same numbers, rounded once.
    values[0], cotangent = (
        np.asarray(jnp.asarray(each, dtype).astype(jnp.float32)) for each in (values[0], cotangent)
    )
    truths = {key: value for key, value in more.items() if key != "interpret"}
    expected, gradients = truth(*values, cotangent=cotangent, **truths)
    out, found = run(values, cotangent, name, dtype=dtype, **more)
    assert out.dtype == jnp.dtype(dtype)
    assert distance(out, expected) < bound
    whole = np.linalg.norm(gradients[0])
    for key, mine, theirs in zip(NAMES, found, gradients, strict=True):
        # A gradient that vanishes (phi with one token) is compared with that of the tokens.
        scale = max(np.linalg.norm(theirs), 1e-3 * whole)
        gap = np.linalg.norm(np.asarray(mine, np.float64) - theirs)
        assert gap < (gradient_bound or bound) * scale, f"{key}: {gap / scale}"


@pytest.mark.slow
@pytest.mark.parametrize("name", DERIVED)
@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    tokens=st.one_of(st.integers(8, 130), st.integers(131, 1300)),
    mixture=st.sampled_from([(1, 1), (3, 1), (7, 1), (5, 3), (24, 1), (33, 1), (16, 8)]),
    width=st.integers(2, 46),
    dim=st.sampled_from([64, 192, 384, 768]),
    normalize=st.booleans(),
    masked=st.booleans(),
    batch=st.integers(1, 5),
)
@example(tokens=3590, mixture=(7, 1), width=6, dim=64, normalize=False, masked=True, batch=1)
@example(tokens=8, mixture=(128, 1), width=1, dim=64, normalize=True, masked=False, batch=3)
@example(tokens=590, mixture=(7, 1), width=6, dim=768, normalize=False, masked=False, batch=3)
def test_values_and_gradients_are_those_of_float64(
    name, tokens, mixture, width, dim, normalize, masked, batch
):
    shape = Shape(batch, tokens, *mixture, width)
    check(shape, dim, name, normalize=normalize, mask=mask_ends(shape) if masked else None)


FEW_SLOTS, MANY_SLOTS = Shape(9, 110, 7, 1, 6), Shape(2, 146, 16, 8, 3)


@pytest.mark.parametrize(
    ("name", "shape"),
    mark_slow(
        itertools.product(DERIVED, (FEW_SLOTS, MANY_SLOTS)),
        lambda name, shape: shape == (MANY_SLOTS if name == "gpu" else FEW_SLOTS),
    ),
)
def test_bfloat16_stays_near_float64(name, shape):
    check(shape, 192, name, dtype="bfloat16", bound=2e-2, mask=mask_ends(shape))


@pytest.mark.parametrize("name", DERIVED)
def test_scores_of_ten_thousand(name):
    """Whole numbers, so that the scores are exact and only the softmaxes are tested.

    Gradients of the scores are differences of what nearly cancels, times phi of thousands.
    """
    shape, dim = Shape(3, 57, 4, 2, 3), 64
    values = arrays(shape, dim)
    rng = np.random.default_rng(2)
    values[0] = rng.integers(-3, 4, size=values[0].shape).astype(np.float32)
    values[1] = np.zeros_like(values[1])
    values[1][:9] = rng.integers(-400, 401, size=values[1][:9].shape)
    scores = np.einsum("bnd,dep->bnep", values[0], values[1])
    assert np.abs(scores).max() > 5_000
    values[1][9] = 8192.0
    check(shape, dim, name, values=values, gradient_bound=1e-3)


@pytest.mark.parametrize(
    ("name", "mask"), mark_slow(itertools.product(DERIVED, (False, True)), lambda name, mask: mask)
)
def test_normalised_scores(name, mask):
    shape = Shape(3, 200, 7, 1, 6)
    check(shape, 64, name, normalize=True, mask=mask_ends(shape) if mask else None)


SHORT = (Shape(3, 110, 7, 1, 6), Shape(3, 146, 5, 3, 11), Shape(4, 57, 24, 1, 1))
FORMS = itertools.product(SHORT, (False, True), (False, True), ("float32", "bfloat16"))


@pytest.mark.parametrize(
    ("shape", "normalize", "masked", "dtype"),
    mark_slow(
        FORMS,
        lambda shape, normalize, masked, dtype: (
            normalize == masked == (shape.tokens == 110)
            and (dtype == "bfloat16") == (shape.tokens == 57)
        ),
    ),
)
def test_short_clips_in_one_program_on_gpu(monkeypatch, shape, normalize, masked, dtype):
    """Kernels that hold a clip, which are otherwise chosen for many clips only."""
    monkeypatch.setattr(gpu_short, "MIN_CLIPS", 1)
    mask = mask_ends(shape) if masked else None
    bound = 1e-5 if dtype == "float32" else 2e-2
    jax.clear_caches()
    try:
        check(shape, 192, "gpu", normalize=normalize, mask=mask, dtype=dtype, bound=bound)
    finally:
        jax.clear_caches()


def test_the_normal_distribution_on_gpu():
    at = np.linspace(-9, 9, 4001).astype(np.float32)
    found = np.asarray(gpu_short.normal_cdf(jnp.asarray(at)), np.float64)
    assert np.abs(found - scipy.stats.norm.cdf(at.astype(np.float64))).max() < 2.5e-7


@pytest.mark.parametrize(
    ("tokens", "normalize", "masked"),
    mark_slow(
        [(1024, False, False), (1024, True, False), (1300, False, True), (1300, True, True)],
        lambda tokens, normalize, masked: normalize == masked,
    ),
)
def test_tiles_on_tpu(monkeypatch, tokens, normalize, masked):
    """A clip that does not fit VMEM is tiled: here VMEM is made small."""
    monkeypatch.setattr(tpu, "VMEM", 3 * 2**19)
    shape = Shape(3, tokens, 5, 2, 6)
    tiling = tpu.tile(KernelOptions(), *map(jnp.asarray, arrays(shape, 64)), None)
    assert tiling.tile == 512
    jax.clear_caches()
    try:
        check(shape, 64, "tpu", normalize=normalize, mask=mask_ends(shape) if masked else None)
    finally:
        jax.clear_caches()


@pytest.mark.parametrize(
    "shape", mark_slow([(FEW_SLOTS,), (Shape(3, 590, 24, 1, 1),)], {(FEW_SLOTS,)}), ids=str
)
def test_uninitialised_memory_is_not_used_on_tpu(shape):
    """Memory that was not written is NaN, also beyond the end of a clip or of the batch."""
    poisoned = pltpu.InterpretParams(uninitialized_memory="nan")
    check(shape, 64, "tpu", interpret=poisoned, mask=mask_ends(shape))


@pytest.mark.parametrize("name", mark_slow([(name,) for name in DERIVED], {("tpu",)}))
def test_under_the_transformations(name):
    shape = Shape(2, 33, 3, 2, 4)
    x, *params = (jnp.asarray(value) for value in arrays(shape, 64))
    call = functools.partial(soft_moe, implementation=name, interpret=name in KERNELS)

    def slope(function):
        return jax.jit(jax.grad(lambda x: (jnp.sin(function(x, *params)) ** 2).sum()))(x)

    np.testing.assert_allclose(slope(jax.checkpoint(call)), slope(call), atol=1e-6)
    several = jnp.stack([x, x[::-1], 2 * x])
    np.testing.assert_allclose(
        jax.jit(jax.vmap(lambda x: call(x, *params)))(several),
        jnp.stack([jax.jit(call)(x, *params) for x in several]),
        rtol=1e-5,
        atol=1e-6,
    )

    def scanned(x, *params):
        return jax.lax.scan(lambda x, _: (x + call(x, *params), None), x, length=3)[0]

    def unrolled(x, *params):
        for _ in range(3):
            x = x + call(x, *params)
        return x

    np.testing.assert_allclose(slope(scanned), slope(unrolled), rtol=1e-4, atol=1e-5)


def test_the_choice_on_cpu_is_xla_bit_for_bit():
    values = arrays(Shape(2, 110, 7, 1, 6), 64)
    cotangent = values[0][::-1].copy()
    chosen, xla = (run(values, cotangent, name) for name in (None, "xla"))
    for mine, theirs in zip(jax.tree.leaves(chosen), jax.tree.leaves(xla), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("name", KERNELS)
def test_a_named_kernel_raises_where_it_cannot_run(name):
    values = [jnp.asarray(value) for value in arrays(Shape(2, 16, 3, 1, 2), 64)]
    with pytest.raises(ValueError, match=f"'{name}' runs on (TPU|NVIDIA GPU) only: use implem"):
        soft_moe(*values, implementation=name)
    with pytest.raises(ValueError, match="only"):
        jax.jit(functools.partial(soft_moe, implementation=name))(*values)


# Without the device: which programs compile, and what they do.


def both(
    *values: jax.Array, name: SoftMoeImplementation | None, mask: jax.Array | None = None
) -> tuple[jax.Array, ...]:
    call = functools.partial(soft_moe, implementation=name, mask=mask)
    out, pull = jax.vjp(call, *values[:-1])
    return out, *pull(values[-1])


def shaped(
    shape: Shape, dim: int = 768, dtype: str = "bfloat16"
) -> tuple[jax.ShapeDtypeStruct, ...]:
    batch, tokens, e, p, r = shape
    shapes = ((dim, e, p), (e, dim, r), (e, r), (e, r, dim), (e, dim))
    x = jax.ShapeDtypeStruct((batch, tokens, dim), jnp.dtype(dtype))
    return x, *(jax.ShapeDtypeStruct(each, jnp.float32) for each in shapes), x


@pytest.mark.parametrize(
    "shape",
    mark_slow([(s,) for s in SHAPES], {(SHAPES[0],), (SHAPES[2],), (SHAPES[25],), (SHAPES[29],)}),
    ids=str,
)
def test_lowers_for_cuda_on_a_machine_without(shape):
    exported = jax.export.export(
        jax.jit(functools.partial(both, name="gpu")),
        platforms=["cuda"],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")],
    )(*shaped(shape))
    short = shape.tokens <= 110 + 36 * (shape.experts * shape.slots <= 16)
    calls = 2 if short and shape.experts * shape.slots <= 32 else 4
    assert exported.mlir_module().count("stablehlo.custom_call @__gpu$xla.gpu.triton") == calls


@functools.cache
def chip(name: str):
    """The devices of a TPU, without one."""
    pytest.importorskip("libtpu", reason="compiling for TPU needs libtpu: pip install '.[tpu]'")
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", ALLOW_MULTIPLE_LIBTPU_LOAD="1"
    )
    from jax.experimental import topologies

    found = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[name]).devices
    return np.array(found)


def compiled(
    name: str,
    shape: Shape,
    count: int = 1,
    *,
    masked: bool = False,
    row_major: bool = False,
    **form,
) -> str:
    """The program of forward and backward pass for a chip, the batch split over `count` of them."""
    mesh = Mesh(chip(name)[:count], ("data",), axis_types=(AxisType.Auto,))
    split, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec("data"), PartitionSpec()))
    given = shaped(shape, **form)
    places = (split, *[whole] * 5, split)
    if row_major:
        places = tuple(
            Format(Layout(tuple(range(each.ndim))), place)
            for each, place in zip(given, places, strict=True)
        )
    mask = jnp.asarray(mask_ends(shape)) if masked else None
    with jax.set_mesh(mesh):
        function = functools.partial(both, name="tpu", mask=mask)
        jitted = jax.jit(function, in_shardings=places, out_shardings=(places[0], *places[:-1]))
        return jitted.lower(*given).compile().as_text()


FEW = {("v5p", SHAPES[15]), ("v6e", SHAPES[25])}
# Every mixture on every chip, with the lengths in turn.
IN_TURN = [
    (chip, SHAPES[len(MIXTURES) * ((len(CHIPS) * i + j) % len(TOKENS)) + i])
    for i in range(len(MIXTURES))
    for j, chip in enumerate(CHIPS)
]
OTHERS = [pair for pair in IN_TURN if pair not in FEW]
assert {shape.tokens for _, shape in IN_TURN} == set(TOKENS)


@pytest.mark.parametrize(
    ("name", "shape"), mark_slow([*sorted(FEW, key=str), *OTHERS], FEW), ids=str
)
def test_compiles_for_tpu(name, shape):
    kernels = compiled(name, shape).count('custom_call_target="tpu_custom_call"')
    assert kernels == 2


OTHER_FORMS = [
    ("v5e", Shape(3, 8, 1, 1, 2), 64, "float32", False),
    ("v5p", Shape(5, 110, 33, 1, 2), 192, "float32", True),
    ("v6e", Shape(127, 110, 7, 1, 6), 768, "bfloat16", True),
    ("v5e", Shape(2, 3590, 7, 1, 6), 768, "float32", True),
    ("v5p", Shape(2, 3590, 16, 8, 46), 768, "float32", False),
]


@pytest.mark.parametrize(
    ("name", "shape", "dim", "dtype", "masked"),
    mark_slow(OTHER_FORMS, set(OTHER_FORMS[1:3])),
    ids=str,
)
def test_other_forms_compile_for_tpu(name, shape, dim, dtype, masked):
    text = compiled(name, shape, dim=dim, dtype=dtype, masked=masked)
    assert 'custom_call_target="tpu_custom_call"' in text


LARGE, MIDDLE = Shape(128, 1214, 8, 1, 6), Shape(32, 590, 8, 1, 6)


@pytest.mark.parametrize(
    ("name", "shape"),
    mark_slow(itertools.product(CHIPS, (LARGE, MIDDLE)), {("v5e", LARGE), ("v5p", MIDDLE)}),
    ids=str,
)
def test_moves_little_more_than_it_must_on_tpu(name, shape):
    """Bytes to and from HBM of forward and backward pass: at most 1.15 times five tensors."""
    tensor = shape.batch * shape.tokens * 768 * 2
    program = Program(compiled(name, shape, row_major=True))
    assert program.count_traffic() < 1.15 * 5 * tensor


@pytest.mark.parametrize("name", mark_slow([(name,) for name in CHIPS], {("v6e",)}))
def test_on_four_chips_only_gradients_travel(name):
    text = compiled(name, Shape(32, 110, 7, 1, 6), count=4)
    assert "bf16[8,110,768]" in text
    assert "all-gather" not in text
    reductions = re.findall(r"= .* all-reduce(?:-start)?\(", text)
    assert len(reductions) == 1, reductions


def meshed(values: Arrays, name: SoftMoeImplementation | None, *, interpret: bool = False):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    given = [jnp.asarray(value) for value in values]
    given[0] = jax.device_put(given[0], split)

    def step(x, dout, *params):
        call = functools.partial(soft_moe, implementation=name, interpret=interpret)
        out, pull = jax.vjp(call, x, *params)
        return out, *pull(dout)

    with jax.set_mesh(mesh):
        return jax.jit(step)(given[0], given[0][::-1], *given[1:])


@pytest.mark.parametrize("name", mark_slow([(None,), ("tpu",), ("gpu",)], {(None,), ("tpu",)}))
def test_four_devices_give_what_one_gives(name):
    values = arrays(Shape(8, 30, 5, 1, 3), 64)
    out, grads = run(values, values[0][::-1].copy(), name)
    found = meshed(values, name, interpret=name in KERNELS)
    for mine, theirs in zip(found, (out, *grads), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)


def test_gpu_kernels_get_the_clips_of_one_device_under_a_mesh():
    """Plain jit would gather the batch on every device without a warning."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    shape = Shape(32, 110, 7, 1, 6)

    def lowered():
        traced = jax.jit(functools.partial(both, name="gpu")).trace(*shaped(shape))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        calls = [line for line in text.splitlines() if "xla.gpu.triton" in line]
        assert len(calls) == 4
        return calls

    assert all("tensor<32x110x768xbf16>" in call for call in lowered() if "bf16" in call)
    with jax.set_mesh(mesh):
        calls = lowered()
    assert any("tensor<8x110x768xbf16>" in call for call in calls)
    assert not any("tensor<32x" in call for call in calls)


def test_a_batch_that_cannot_be_split():
    values = [jnp.asarray(value) for value in arrays(Shape(6, 30, 5, 1, 3), 64)]
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        with pytest.raises(ValueError, match="batch of 6 cannot be split over the mesh axes data"):
            soft_moe(*values, implementation="gpu", interpret=True)
        with pytest.warns(UserWarning, match="'xla' runs on every platform"):
            out = soft_moe(*values)
    np.testing.assert_allclose(out, soft_moe(*values, implementation="xla"), atol=1e-6)


def test_residuals_of_other_platforms_are_not_computed():
    """The zeros in their place are not part of the program."""
    x, *params, dout = shaped(Shape(4, 110, 7, 1, 6))
    texts = [
        jax.jit(functools.partial(both, name=name)).lower(x, *params, dout).compile().as_text()
        for name in (None, "xla")
    ]
    counts = [len(re.findall(r"^\s+(?:ROOT )?%", text, flags=re.M)) for text in texts]
    assert counts[0] == counts[1]
    choice = fused.choose_soft_moe(None, KernelOptions(), ("tpu",), x, *params, None)
    assert choice.names == ("tpu", "xla"), "no other platform has a choice of its own"


def test_a_kernel_is_traced_where_a_program_is_lowered_for_its_platform(monkeypatch):
    """Not in a program for the CPU, its gradient included; what it keeps is known by its shape."""
    traced: list[str] = []
    for name in ("forward", "backward"):
        real = getattr(tpu, name)

        def count(*args, name=name, real=real, **kept):
            traced.append(name)
            return real(*args, **kept)

        monkeypatch.setattr(tpu, name, count)
    x, *params, dout = shaped(Shape(4, 110, 5, 1, 6))
    program = jax.jit(functools.partial(both, name=None)).trace(x, *params, dout)
    program.lower().compile()
    values = [jnp.zeros(each.shape, each.dtype) for each in (x, *params)]
    out = jax.vmap(lambda x: soft_moe(x[None], *values[1:])[0])(values[0])
    assert not traced and out.shape == x.shape
    text = program.lower(lowering_platforms=("tpu",)).as_text()
    assert set(traced) == {"forward", "backward"} and "tpu_custom_call" in text


@pytest.mark.parametrize("shape", [Shape(4, 110, 7, 1, 6), Shape(2, 3500, 16, 8, 6)])
def test_what_the_kernel_on_tpu_keeps(shape):
    x, *params, _ = shaped(shape)
    given = (KernelOptions(), x, *params, None)
    found = jax.eval_shape(functools.partial(tpu.forward, given[0], keep=True), *given[1:])[1]
    kept = tpu.kept_shapes(*given)
    assert [(k.shape, k.dtype) for k in kept] == [(f.shape, f.dtype) for f in found]


@pytest.mark.parametrize(
    ("name", "shape", "dim", "why"),
    [
        ("tpu", Shape(2, 7, 3, 1, 2), 64, "7 tokens, fewer than 8"),
        ("tpu", Shape(2, 110, 1, 3, 1), 64, "a single hidden unit"),
        ("tpu", Shape(2, 110, 128, 1, 46), 768, "weights of 128 experts"),
        ("gpu", Shape(2, 110, 3, 1, 2), 72, "a width of 72"),
    ],
)
def test_shapes_that_a_kernel_does_not_take(name, shape, dim, why):
    values = [jnp.asarray(value) for value in arrays(shape, dim)]
    with pytest.raises(ValueError, match=f"implementation='{name}': does not take {why}"):
        soft_moe(*values, implementation=name, interpret=True)
    choice = fused.choose_soft_moe(None, KernelOptions(), (name,), *values, None)
    assert not choice.kernels
