"""Time of the Soft-MoA layer, forward and backward."""

import importlib.util
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from aatjax.io.timing import time_interleaved
from aatjax_kernels.soft_moe import soft_moe
from benchmarks import append_row, describe_cpu

TOKENS = (110, 602, 1214)
MIXTURES = ((8, 1, 6), (15, 1, 2), (16, 8, 6))
"""Experts, slots per expert, bottleneck width."""

DIM = 768


def kernels(
    batch: int = 4,
    rounds: int = 15,
    dtype: Literal["float32", "bfloat16"] = "float32",
    out: Path | None = None,
) -> None:
    """Time the Soft-MoA layer in every implementation that runs here.

    The shapes are those of AST-base at 1 second, 512 and 1,024 frames (110, 602, 1214 tokens) with
    8, 15 and 128 slots. Where PyTorch is installed its plain formulation, einsums and a loop over
    the experts, runs in the same rounds (CPU, float32). Prints median milliseconds and the median
    speed relative to `reference`, the einsums that JAX differentiates itself.

    Args:
        batch: clips.
        rounds: rounds that count.
        dtype: type of the tokens.
        out: CSV file that gets a row for each shape and implementation.
    """
    device = jax.devices()[0]
    device_name = describe_cpu() if device.platform == "cpu" else device.device_kind
    print(f"{device_name}\njax {jax.__version__}, batch {batch}, {dtype}")
    names = ["reference", "xla"] + [device.platform] * (device.platform in ("gpu", "tpu"))
    use_torch = dtype == "float32" and device.platform == "cpu"
    use_torch = use_torch and importlib.util.find_spec("torch") is not None
    ratios: dict[str, list[float]] = {}
    for tokens in TOKENS:
        for experts, slots, width in MIXTURES:
            values = make_arrays(batch, tokens, experts, slots, width)
            steps = {name: make_jax_step(values, name, dtype) for name in names}
            if use_torch:
                steps["torch"] = make_torch_step(values)
            timings = time_interleaved(steps, rounds=rounds, warm_up=3)
            row = f"{tokens:5} tokens {experts * slots:4} slots"
            for name, timing in timings.items():
                ratio = timings["reference"].compute_ratio(timing)
                ratios.setdefault(name, []).append(ratio)
                figures = {"ms": f"{1e3 * timing.median:.2f}", "over_reference": f"{ratio:.2f}"}
                about = {"device": device_name, "batch": batch, "dtype": dtype, "tokens": tokens}
                about |= {"slots": experts * slots, "implementation": name}
                append_row(out, about | figures)
                row += f"   {name} {1e3 * timing.median:7.2f} ms ({ratio:.2f}x)"
            print(row, flush=True)
    means = (f"{name} {statistics.geometric_mean(each):.2f}x" for name, each in ratios.items())
    print("geometric mean over reference: " + ", ".join(means))


def make_arrays(batch: int, tokens: int, experts: int, slots: int, width: int) -> list[np.ndarray]:
    """Return tokens, phi and the experts' weights."""
    rng = np.random.default_rng(0)
    shapes = (
        ((batch, tokens, DIM), 1.0),
        ((DIM, experts, slots), 0.05),
        ((experts, DIM, width), 0.02),
        ((experts, width), 0.02),
        ((experts, width, DIM), 0.02),
        ((experts, DIM), 0.02),
    )
    return [(scale * rng.normal(size=shape)).astype(np.float32) for shape, scale in shapes]


def make_jax_step(values: list[np.ndarray], name: Any, dtype: str) -> Callable[[], object]:
    """Return a forward and backward pass of an implementation."""

    @jax.jit
    def step(dout: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(lambda *a: soft_moe(*a, implementation=name), *arrays)
        return out, *pull(dout)

    arrays = [jnp.asarray(values[0], dtype), *map(jnp.asarray, values[1:])]
    dout = jnp.asarray(values[0][::-1], dtype)
    return lambda: jax.block_until_ready(step(dout, *arrays))


def make_torch_step(values: list[np.ndarray]) -> Callable[[], object]:
    """Return the same in eager PyTorch, expert by expert."""
    import torch

    arrays: list[Any] = [torch.tensor(value, requires_grad=True) for value in values]
    dout = torch.tensor(values[0][::-1].copy())

    def step() -> None:
        x, phi, w_down, b_down, w_up, b_up = arrays
        for tensor in arrays:
            tensor.grad = None
        logits = torch.einsum("bnd,dep->bnep", x, phi)
        dispatch = logits.softmax(dim=1)
        combine = logits.flatten(2).softmax(dim=-1).view_as(logits)
        slots = torch.einsum("bnep,bnd->bepd", dispatch, x)
        outputs = [
            torch.nn.functional.gelu(slots[:, i] @ w_down[i] + b_down[i]) @ w_up[i] + b_up[i]
            for i in range(phi.shape[1])
        ]
        out = torch.einsum("bnep,bepd->bnd", combine, torch.stack(outputs, dim=1))
        out.backward(dout)

    return step
