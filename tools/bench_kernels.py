"""Times the Soft-MoA layer, forward and backward, in every implementation that runs here, in turn.

    python tools/bench_kernels.py
    python tools/bench_kernels.py --dtype bfloat16 --batch 32 --rounds 30

The shapes are those of AST-base at 1 second, 512 and 1,024 frames (110, 602, 1214 tokens) with 8,
15 and 128 slots. Where PyTorch is installed its plain formulation, einsums and a loop over the
experts, runs in the same rounds (CPU, float32). Printed are median milliseconds and the median
ratio of each round to `reference`, the einsums that JAX differentiates itself.
"""

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aatjax_kernels.soft_moe import soft_moe

TOKENS = (110, 602, 1214)
MIXTURES = ((8, 1, 6), (15, 1, 2), (16, 8, 6))  # experts, slots an expert, bottleneck width
DIM = 768
WARM_UP = 3


def arrays(batch: int, tokens: int, experts: int, slots: int, width: int) -> list[np.ndarray]:
    """Tokens, phi and the experts' weights."""
    rng = np.random.default_rng(0)
    shapes = (
        (batch, tokens, DIM),
        (DIM, experts, slots),
        (experts, DIM, width),
        (experts, width),
        (experts, width, DIM),
        (experts, DIM),
    )
    scales = (1.0, 0.05, 0.02, 0.02, 0.02, 0.02)
    return [
        (scale * rng.normal(size=shape)).astype(np.float32)
        for shape, scale in zip(shapes, scales, strict=True)
    ]


def in_jax(values: list[np.ndarray], implementation: Any, dtype: str) -> Callable[[], None]:
    """One forward and backward pass of an implementation."""

    @jax.jit
    def step(cotangent: jax.Array, *given: jax.Array) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(lambda *a: soft_moe(*a, implementation=implementation), *given)
        return out, *pull(cotangent)

    given = [jnp.asarray(values[0], dtype), *map(jnp.asarray, values[1:])]
    cotangent = jnp.asarray(values[0][::-1], dtype)
    return lambda: jax.block_until_ready(step(cotangent, *given))


def in_torch(values: list[np.ndarray]) -> Callable[[], None]:
    """The same in eager PyTorch, expert by expert."""
    import torch

    given: list[Any] = [torch.tensor(value, requires_grad=True) for value in values]
    cotangent = torch.tensor(values[0][::-1].copy())

    def step() -> None:
        x, phi, w_down, b_down, w_up, b_up = given
        for tensor in given:
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
        out.backward(cotangent)

    return step


def main() -> None:
    """Times every shape and prints a row for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = parser.parse_args()
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}, batch {args.batch}, {args.dtype}")
    names: list[str] = ["reference", "xla"]
    if device.platform in ("gpu", "tpu"):
        names.append(device.platform)
    torch_too = args.dtype == "float32" and device.platform == "cpu"
    torch_too = torch_too and importlib.util.find_spec("torch") is not None
    ratios: dict[str, list[float]] = {}
    for tokens in TOKENS:
        for experts, slots, width in MIXTURES:
            values = arrays(args.batch, tokens, experts, slots, width)
            steps = {name: in_jax(values, name, args.dtype) for name in names}
            if torch_too:
                steps["torch"] = in_torch(values)
            times: dict[str, list[float]] = {name: [] for name in steps}
            for number in range(args.rounds + WARM_UP):
                for name, step in steps.items():
                    began = time.perf_counter()
                    step()
                    if number >= WARM_UP:
                        times[name].append(time.perf_counter() - began)
            row = f"{tokens:5} tokens {experts * slots:4} slots"
            for name, spent in times.items():
                pairs = zip(times["reference"], spent, strict=True)
                ratio = statistics.median(a / b for a, b in pairs)
                ratios.setdefault(name, []).append(ratio)
                row += f"   {name} {1e3 * statistics.median(spent):7.2f} ms ({ratio:.2f}x)"
            print(row, flush=True)
    print(
        "geometric mean over reference: "
        + ", ".join(
            f"{name} {statistics.geometric_mean(values):.2f}x" for name, values in ratios.items()
        )
    )


if __name__ == "__main__":
    main()
