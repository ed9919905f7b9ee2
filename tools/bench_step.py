"""Times a training step of AST-base with adapters, against PyTorch's, in turn in one process.

    python tools/bench_step.py
    python tools/bench_step.py --batch 32 --frames 498 --rounds 20

The step is forward and backward pass of a frozen AST-base with a bottleneck of width 64 beside each
MLP and a trained head; the optimiser is left out of both. PyTorch runs transformers' AST (SDPA)
with the same adapters, eagerly, in float32 and, with --torch-bfloat16, in bfloat16 too. Printed are
median milliseconds and the median ratio of PyTorch in float32 to each, of the same rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from aatjax import petl, surgery
from aatjax.models.ast import AST
from aatjax.models.config import ASTConfig

CLASSES, WIDTH, WARM_UP = 50, 64, 2


def in_jax(x: np.ndarray, dtype: Any, method: petl.Method | None) -> Callable[[], None]:
    """Forward and backward pass in aatjax; the frozen weights are held in `dtype`."""
    config = ASTConfig(frames=x.shape[1], num_classes=CLASSES, dtype=dtype)
    model = AST(config, rngs=nnx.Rngs(0))
    if method is not None:
        model = petl.adapt(model, method)
    parts = surgery.split(model)
    frozen = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), parts.frozen)

    @jax.jit
    def step(trainable: Any, stats: Any, frozen: Any, x: jax.Array) -> Any:
        def loss(trainable: Any) -> jax.Array:
            model = surgery.join(parts.graphdef, trainable, stats, frozen)
            return (model(x) ** 2).mean()

        return jax.value_and_grad(loss)(trainable)

    given = jnp.asarray(x)
    return lambda: jax.block_until_ready(step(parts.trainable, parts.stats, frozen, given))


def in_torch(x: np.ndarray, dtype: str) -> Callable[[], None]:
    """The same with transformers' AST."""
    import torch
    from transformers import ASTConfig as HubConfig
    from transformers import ASTForAudioClassification

    named: Any = dict(max_length=x.shape[1], num_labels=CLASSES, attn_implementation="sdpa")
    config = HubConfig(**named)
    model = ASTForAudioClassification(config).to(getattr(torch, dtype))
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)

    class Adapter(torch.nn.Module):
        """A bottleneck beside a module."""

        def __init__(self, base: Any):
            super().__init__()
            self.base = base
            self.down = torch.nn.Linear(config.hidden_size, WIDTH)
            self.up = torch.nn.Linear(WIDTH, config.hidden_size)

        def forward(self, hidden: Any) -> Any:
            return self.base(hidden) + self.up(torch.nn.functional.gelu(self.down(hidden)))

    found = [
        (module, name)
        for module in model.modules()
        for name, child in module.named_children()
        if type(child).__name__ == "ASTMLP"
    ]
    assert len(found) == config.num_hidden_layers, "transformers' AST has no MLP of that name"
    for module, name in found:
        setattr(module, name, Adapter(getattr(module, name)).to(getattr(torch, dtype)))
    given = torch.tensor(x).to(getattr(torch, dtype))

    def step() -> None:
        model.zero_grad()
        (model(given).logits ** 2).mean().backward()

    return step


def main() -> None:
    """Times all and prints a row for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--frames", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--torch-bfloat16", action="store_true")
    args = parser.parse_args()
    x = np.random.default_rng(0).normal(size=(args.batch, args.frames, 128)).astype(np.float32)
    adapter = petl.Adapter(reduction=768 / WIDTH)
    steps = {
        "torch float32": in_torch(x, "float32"),
        "aatjax float32": in_jax(x, "float32", adapter),
        "aatjax bfloat16": in_jax(x, "bfloat16", adapter),
    }
    if args.torch_bfloat16:
        steps["torch bfloat16"] = in_torch(x, "bfloat16")
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(args.rounds + WARM_UP):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if number >= WARM_UP:
                times[name].append(time.perf_counter() - began)
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, batch {args.batch}, {args.frames} frames")
    for name, spent in times.items():
        pairs = zip(times["torch float32"], spent, strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"{name:16} {1e3 * statistics.median(spent):8.0f} ms  {ratio:.2f}x torch float32")


if __name__ == "__main__":
    main()
