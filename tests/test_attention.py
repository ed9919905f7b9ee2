"""Attention and the bfloat16 product against float64 PyTorch, and what attention keeps."""

import functools
import inspect
import itertools
import re
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from slow_cases import mark_slow, pair_in_turn

from aatjax import ops
from aatjax.errors import UsageError
from aatjax.models.ast import AST, ASTConfig
from aatjax_kernels import matmul, selection, triton
from aatjax_kernels.attention import AttentionImplementation, attention, blocked, tpu
from aatjax_kernels.attention.libraries import LIBRARIES
from aatjax_kernels.dispatch import KernelOptions
from aatjax_kernels.soft_moe import gpu as soft_moe_gpu

IMPLEMENTATIONS = [n for n in get_args(AttentionImplementation) if n not in LIBRARIES]
NAMES = ("output", "query", "key", "value")


def arrays(n: int = 37, m: int = 41, heads: int = 4, width: int = 16) -> list[np.ndarray]:
    """Query, key, value and cotangent of the output."""
    rng = np.random.default_rng(0)
    batch = 3 if n < 50 else 2
    shapes = [(batch, tokens, heads, width) for tokens in (n, m, m, n)]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def mask_keys(m: int, batch: int) -> np.ndarray:
    return np.arange(m)[None] < np.array([m, 1, m // 2])[:batch, None]


def truth(values: list[np.ndarray], mask: np.ndarray | None) -> list[np.ndarray]:
    """Output and gradients in float64."""
    *given, cotangent = (torch.tensor(np.asarray(v, np.float64)).transpose(1, 2) for v in values)
    given = [tensor.requires_grad_() for tensor in given]
    valid = None if mask is None else torch.tensor(mask)[:, None, None]
    out = torch.nn.functional.scaled_dot_product_attention(*given, attn_mask=valid)
    grads = torch.autograd.grad(out, given, cotangent)
    return [each.detach().transpose(1, 2).numpy() for each in (out, *grads)]


def assert_close(found: tuple, expected: list[np.ndarray], bound: float) -> None:
    for name, mine, theirs in zip(NAMES, found, expected, strict=True):
        gap = np.linalg.norm(np.asarray(mine, np.float64) - theirs) / np.linalg.norm(theirs)
        assert gap < bound, f"{name}: {gap}"


def check(values: list[np.ndarray], mask: np.ndarray | None, bound: float, dtype, **options):
    given = [jnp.asarray(value, dtype) for value in values]
    expected = truth([np.asarray(each.astype(jnp.float32)) for each in given], mask)
    valid = None if mask is None else jnp.asarray(mask)

    @jax.jit
    def both(query, key, value, dout):
        run = functools.partial(attention, mask=valid, **options)
        out, pull = jax.vjp(run, query, key, value)
        return out, *pull(dout)

    found = both(*given)
    assert found[0].dtype == given[2].dtype
    assert_close(found, expected, bound)


TYPES = [("float32", 1e-5), ("bfloat16", 2e-2)]
CASES = itertools.product([None, *IMPLEMENTATIONS], [False, True], TYPES)


@pytest.mark.parametrize(
    ("implementation", "masked", "kind"),
    mark_slow(CASES, lambda name, masked, kind: masked == (kind[0] == "float32")),
)
def test_values_and_gradients(implementation, masked, kind):
    interpret = implementation in ("tpu", "gpu")
    mask = mask_keys(41, 3) if masked else None
    check(arrays(), mask, kind[1], kind[0], implementation=implementation, interpret=interpret)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
def test_a_few_heads_at_a_time_on_cpu(monkeypatch, masked, heads):
    monkeypatch.setattr(blocked, "BLOCK", heads * 37 * 41)
    jax.clear_caches()
    check(arrays(), mask_keys(41, 3) if masked else None, 1e-5, "float32")
    jax.clear_caches()


LONG = [(300, 300, 2, 64), (700, 64, 2, 64), (1300, 14, 4, 64), (8, 700, 3, 64), (29, 29, 6, 32)]


@pytest.mark.parametrize(
    ("shape", "masked"),
    mark_slow(
        itertools.product(LONG, [False, True]),
        lambda shape, masked: shape in LONG[::2] and masked == (shape[0] < 700),
    ),
)
def test_the_tpu_kernel_over_several_blocks_in_poisoned_memory(shape, masked):
    """The last block reaches past the end, where the interpreter puts NaN."""
    n, m, heads, width = shape
    values = arrays(n, m, heads, width)
    mask = mask_keys(m, len(values[0])) if masked else None
    options = KernelOptions(pltpu.InterpretParams(uninitialized_memory="nan"))
    given = (*map(jnp.asarray, values[:3]), None if mask is None else jnp.asarray(mask))

    out, log_sum = tpu.forward(options, *given, keep=True)
    grads = tpu.backward(options, jnp.asarray(values[3]), (out, log_sum), *given)
    assert_close((out, *grads), truth(values, mask), 1e-5)


ON_GPU = [(300, 300, 2, 64), (130, 64, 1, 32), (14, 520, 2, 128), (128, 192, 1, 16)]


@pytest.mark.parametrize(
    ("shape", "masked"),
    mark_slow(
        itertools.product(ON_GPU, [False, True]), lambda shape, masked: masked == (shape[3] > 32)
    ),
)
def test_the_gpu_kernel_over_several_blocks(shape, masked):
    n, m, heads, width = shape
    values = arrays(n, m, heads, width)
    mask = mask_keys(m, len(values[0])) if masked else None
    check(values, mask, 1e-5, "float32", implementation="gpu", interpret=True)


def test_shapes_and_platforms_that_a_named_kernel_does_not_support_raise():
    narrow, short, plain = (
        [jnp.zeros(shape)] * 3 for shape in ((1, 16, 2, 48), (1, 4, 2, 64), (1, 16, 2, 64))
    )
    with pytest.raises(ValueError, match="'gpu': does not take heads of width 48: it must be 16"):
        attention(*narrow, implementation="gpu")
    with pytest.raises(ValueError, match="'gpu' runs on NVIDIA GPU only"):
        attention(*plain, implementation="gpu")
    with pytest.raises(ValueError, match="'tpu': does not take 4 tokens, fewer than 8"):
        attention(*short, implementation="tpu")
    with pytest.raises(ValueError, match="'tpu' runs on TPU only"):
        attention(*plain, implementation="tpu")
    assert attention(*short).shape == (1, 4, 2, 64)  # None takes another
    huge = jax.ShapeDtypeStruct((1, 60000, 12, 64), jnp.float32)
    assert "VMEM is too small" in tpu.tile(KernelOptions(), huge, huge)


def test_a_batch_or_heads_that_the_mesh_cannot_split_evenly():
    values = arrays(16, 16, heads=3)
    given = [jnp.asarray(value) for value in values[:3]]
    axes = (AxisType.Auto, AxisType.Auto)
    plain = attention(*given)
    with jax.set_mesh(jax.make_mesh((2, 2), ("data", "model"), axis_types=axes)):
        with pytest.raises(ValueError, match="batch of 3 cannot be split over the mesh axes data"):
            attention(*given, implementation="tpu", interpret=True)
        with pytest.raises(ValueError, match="3 heads cannot be split over the mesh axis model"):
            attention(*(x[:2] for x in given), implementation="tpu", interpret=True)
        with pytest.warns(UserWarning, match="'blocked' runs on every platform"):
            uneven = attention(*given)
    np.testing.assert_allclose(uneven, plain, atol=1e-6)


def calls_on_cuda(
    implementation: str | None, tokens: int = 590, dtype: str = "bfloat16"
) -> list[str]:
    """Kernels of forward and backward pass, as lowered for CUDA on a machine without."""
    given = [jax.ShapeDtypeStruct((4, tokens, 12, 64), jnp.dtype(dtype))] * 4

    def both(query, key, value, dout):
        run = functools.partial(inspect.unwrap(attention), implementation=implementation)
        out, pull = jax.vjp(run, query, key, value)
        return out, pull(dout)

    text = jax.jit(both).trace(*given).lower(lowering_platforms=("cuda",)).as_text()
    kernel = "stablehlo.custom_call @__gpu$xla.gpu.triton"
    return [line for line in text.splitlines() if kernel in line]


@pytest.mark.parametrize("tokens", [110, 590, 3590])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_gpu_kernel_lowers_for_cuda(tokens, dtype):
    assert len(calls_on_cuda("gpu", tokens, dtype)) == 3


def test_the_gpu_kernel_gets_the_clips_and_heads_of_one_device_under_a_mesh():
    """Plain jit would gather them on every device without a warning."""
    assert all("tensor<4x590x12x64xbf16>" in call for call in calls_on_cuda("gpu"))
    axes = (AxisType.Auto, AxisType.Auto)
    with jax.set_mesh(jax.make_mesh((2, 2), ("data", "model"), axis_types=axes)):
        calls = calls_on_cuda("gpu")
    assert len(calls) == 3
    assert all("tensor<2x590x6x64xbf16>" in call and "x12x64x" not in call for call in calls)


def test_a_jax_without_triton_leaves_the_gpu_kernels_out(monkeypatch):
    monkeypatch.setattr(triton, "load", None)
    monkeypatch.setenv(selection.VARIABLE, "gpu")
    assert not calls_on_cuda(None)
    with pytest.raises(ValueError, match="'gpu': does not take any shape with this jax"):
        calls_on_cuda("gpu")
    x, phi = jnp.zeros((1, 9, 64)), jnp.zeros((64, 2, 1))
    assert "no Triton backend" in str(soft_moe_gpu.tile(KernelOptions(), x, phi, None))


def test_the_environment_names_the_kernels_that_are_chosen_by_default(monkeypatch):
    assert not calls_on_cuda(None)
    monkeypatch.setenv(selection.VARIABLE, "tpu, gpu")
    assert len(calls_on_cuda(None)) == 3
    assert selection.parse_choice("tpu, gpu") == ("tpu", "gpu")
    assert not calls_on_cuda("blocked")
    monkeypatch.setenv(selection.VARIABLE, "none")
    assert selection.parse_choice("none") == ()
    monkeypatch.setenv(selection.VARIABLE, "gpu,fast")
    values = [jnp.zeros((1, 16, 2, 64))] * 3
    with pytest.raises(UsageError, match="unknown kernel 'fast'; use tpu, gpu, cudnn, tokamax, a"):
        ops.attention(*values)
    with pytest.raises(ValueError, match="AATJAX_KERNELS='gpu,fast'"):
        attention(*values)


CHIPS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
TOKENS = (110, 146, 470, 590, 602, 1214, 3590)
DEFAULT = {("v5e:2x2", 110), ("v6e:2x2", 1214)}
OTHERS = [pair for pair in pair_in_turn(CHIPS, TOKENS) if pair not in DEFAULT]


@pytest.mark.parametrize(
    ("chip", "tokens"),
    mark_slow([*sorted(DEFAULT), *OTHERS], DEFAULT),
)
def test_the_tpu_kernel_compiles(chip, tokens):
    """Forward and backward of AST-base's attention, bfloat16, by libtpu without a TPU."""
    pytest.importorskip("libtpu", reason="the TPU's compiler comes with aatjax[tpu]")
    topology = topologies.get_topology_desc(platform="tpu", topology_name=chip)
    mesh = Mesh(np.array(topology.devices[:1]), ("data",))
    whole = NamedSharding(mesh, PartitionSpec())
    given = [jax.ShapeDtypeStruct((2, tokens, 12, 64), jnp.bfloat16)] * 4

    def both(query, key, value, dout):
        out, pull = jax.vjp(inspect.unwrap(attention), query, key, value)
        return out, pull(dout)

    with jax.set_mesh(mesh):
        jitted = jax.jit(both, in_shardings=whole, out_shardings=whole)
        text = jitted.lower(*given).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2
    # No weights in HBM: no array of tokens by tokens.
    assert not re.search(rf"\[[\d,]*{tokens},{tokens}\b", text)


def test_no_weights_are_kept():
    values = [jnp.asarray(value) for value in arrays()]
    _, pull = jax.vjp(attention, *values[:3])
    kept = [leaf.shape for leaf in jax.tree.leaves(pull) if hasattr(leaf, "shape")]
    assert kept
    assert not any(37 in shape and 41 in shape for shape in kept)


def test_an_unknown_implementation():
    values = [jnp.asarray(value) for value in arrays()[:3]]
    with pytest.raises(ValueError, match="attention has no implementation 'fast': use 'blocked'"):
        inspect.unwrap(attention)(*values, implementation="fast")


@pytest.mark.parametrize("shape", [(5, 24), (2, 5, 24)])
def test_bfloat16_products_are_rounded_once(shape):
    rng = np.random.default_rng(0)
    x, kernel, dout = (
        jnp.asarray(rng.normal(size=each), jnp.bfloat16)
        for each in (shape, (24, 7), (*shape[:-1], 7))
    )
    wide = [np.asarray(each.astype(jnp.float32), np.float64) for each in (x, kernel, dout)]
    rows = wide[0].reshape(-1, 24), wide[2].reshape(-1, 7)
    out, pull = jax.vjp(matmul.matmul, x, kernel)
    expected = (wide[0] @ wide[1], wide[2] @ wide[1].T, rows[0].T @ rows[1])
    for mine, theirs in zip((out, *pull(dout)), expected, strict=True):
        assert mine.dtype == jnp.bfloat16
        rounded = np.asarray(jnp.asarray(theirs, jnp.bfloat16).astype(jnp.float32))
        # Half a unit of the last place at a tie at most.
        np.testing.assert_allclose(mine.astype(jnp.float32), rounded, rtol=2**-7, atol=1e-6)


def test_the_dense_layers_of_a_bfloat16_model_sum_in_float32():
    small = ASTConfig(
        dim=32, depth=1, heads=2, mlp_dim=64, frames=48, num_classes=3, dtype="bfloat16"
    )
    model = AST(small, rngs=nnx.Rngs(0))
    text = str(jax.make_jaxpr(lambda x: model(x))(jnp.zeros((1, 48, 128))))
    dense = [line for line in text.splitlines() if "= dot_general" in line]
    assert dense
    assert not any(line.strip().split("=")[0].count("bf16") for line in dense)
