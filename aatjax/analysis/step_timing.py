"""Training steps and inference as `fit` runs them, ready to be timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from aatjax import surgery
from aatjax.audio.augment import Augment
from aatjax.audio.frontend import FrontEnd
from aatjax.models.ast import AST
from aatjax.models.config import ASTConfig
from aatjax.petl import DenseMoA, Method, adapt
from aatjax.petl.moa import MixtureShape
from aatjax.petl.sites import make_block
from aatjax.train.optim import Optim, make_optimizer
from aatjax.train.sharding import MeshShape
from aatjax.train.state import start_state
from aatjax.train.step import make_steps


@dataclasses.dataclass(frozen=True)
class Ready:
    """A method's steps on a batch that lies on the device.

    Attributes:
        train: runs one training step, front end and optimiser included, and waits for it.
        infer: runs one forward pass of the same batch, and waits.
        temporaries: bytes of XLA's temporaries in a training step.
        trainable: parameters trained.
    """

    train: Callable[[], object]
    infer: Callable[[], object]
    temporaries: int | None
    trainable: int


def ready(config: ASTConfig, method: Method, *, batch_size: int, seed: int = 0) -> Ready:
    """Compiles the steps of a method on a model with random weights.

    Args:
        config: the model's shape, compute type, scan and remat.
        method: what is trained.
        batch_size: clips.
        seed: seed of weights and sounds.
    """
    model = adapt(AST(config, rngs=nnx.Rngs(seed)), method, seed=seed)
    parts = surgery.split(model)
    frontend = FrontEnd(frames=config.frames, mels=config.mels)
    tx = make_optimizer(Optim(), steps_per_epoch=1000, epochs=1)
    mesh = MeshShape().make(jax.local_devices()[:1])
    begin = start_state(parts, tx, mesh, average=False, dtype=config.dtype)
    steps = make_steps(
        parts.graphdef, tx, frontend=frontend, augment=Augment(), loss="ce", layout=begin.layout
    )
    rng = np.random.default_rng(seed)
    target = np.eye(config.num_classes, dtype=np.float32)
    batch: Any = {
        "audio": rng.integers(-8000, 8000, (batch_size, frontend.samples), np.int16),
        "length": np.full(batch_size, frontend.samples, np.int32),
        "target": target[rng.integers(0, config.num_classes, batch_size)],
        "weight": np.ones(batch_size, np.float32),
    }
    batch = jax.device_put(batch)
    key = jax.random.key(seed)
    with jax.set_mesh(mesh):
        lowered: Any = steps.train
        compiled = lowered.lower(begin.state, begin.frozen, batch, key).compile()
    analysis = compiled.memory_analysis()
    state = begin.state

    def train() -> None:
        nonlocal state
        with jax.set_mesh(mesh):
            state, sums = steps.train(state, begin.frozen, batch, key)
            jax.block_until_ready(sums)

    def infer() -> None:
        with jax.set_mesh(mesh):
            logits = steps.forward(
                (state.trainable, state.stats, begin.frozen), batch["audio"], batch["length"]
            )
            jax.block_until_ready(logits)

    trainable = sum(leaf.size for leaf in jax.tree.leaves(parts.trainable))
    return Ready(train, infer, getattr(analysis, "temp_size_in_bytes", None), trainable)


@dataclasses.dataclass(frozen=True)
class LoopedMoA(DenseMoA):
    """Dense-MoA with its experts run one after another, as the published code runs them.

    The same function and parameters as `DenseMoA`, whose experts are one batched product; here to
    tell how much of a measured difference is the loop and how much the method.
    """

    def make_mixture(self, shape: MixtureShape, rngs: nnx.Rngs) -> nnx.Module:
        return _Looped(shape, rngs)


class _Looped(nnx.Module):
    """sum_i gates_i A_i(x), a program of its own for every expert."""

    def __init__(self, shape: MixtureShape, rngs: nnx.Rngs):
        made = [
            make_block(
                "bottleneck",
                shape.dim,
                shape.width,
                kernel=shape.kernel,
                norm=False,
                dtype=shape.dtype,
                init=shape.init,
                as_published=False,
                rngs=rngs,
            )
            for _ in range(shape.experts)
        ]
        self.experts = nnx.List(made)
        normal = jax.random.normal(rngs.params(), (shape.dim, shape.experts))
        self.w_router = surgery.Trainable(0.02 * normal)
        self.b_router = surgery.Trainable(jnp.zeros(shape.experts))

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        scores = x @ self.w_router[...].astype(x.dtype)
        gates = jax.nn.softmax(scores.astype(jnp.float32) + self.b_router[None, None], axis=-1)
        outputs = jnp.stack([expert(x) for expert in self.experts], axis=-1)
        return jnp.einsum("bnde,bne->bnd", outputs, gates.astype(outputs.dtype)).astype(x.dtype)
