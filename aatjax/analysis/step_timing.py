"""Time of training steps and inference as `fit` runs them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from aatjax import surgery
from aatjax.audio.augment import Augment
from aatjax.audio.frontend import FrontEnd
from aatjax.io.timing import time_interleaved
from aatjax.models.ast import AST
from aatjax.models.config import ASTConfig
from aatjax.petl import DenseMoA, Method, adapt
from aatjax.petl.moa import MixtureShape
from aatjax.train.optim import Optim, make_optimizer
from aatjax.train.sharding import MeshShape
from aatjax.train.state import start_state
from aatjax.train.step import make_steps


@dataclasses.dataclass(frozen=True)
class PreparedSteps:
    """Compiled steps of a method, with a batch on the device.

    Attributes:
        train: runs one training step, front end and optimiser included, and waits for it.
        infer: runs one forward pass of the same batch, and waits for it.
        temporary_bytes: XLA's temporaries in a training step.
        trainable: trainable parameters.
    """

    train: Callable[[], object]
    infer: Callable[[], object]
    temporary_bytes: int | None
    trainable: int


def prepare_steps(
    model: ASTConfig | AST, method: Method, *, batch_size: int, seed: int = 0
) -> PreparedSteps:
    """Compile the steps of a method.

    Args:
        model: a model, or the configuration of one with random weights.
        method: the method.
        batch_size: clips per step.
        seed: seed of weights and sounds.
    """
    base = model if isinstance(model, AST) else AST(model, rngs=nnx.Rngs(seed))
    config = base.config
    parts = surgery.split(adapt(base, method, seed=seed))
    frontend = FrontEnd(frames=config.frames, mels=config.mels)
    tx = make_optimizer(Optim(), steps_per_epoch=1000, epochs=1)
    mesh = MeshShape().make(jax.local_devices()[:1])
    begin = start_state(parts, tx, mesh, average=False, dtype=config.dtype)
    steps = make_steps(
        parts.graphdef, tx, frontend=frontend, augment=Augment(), loss="ce", layout=begin.layout
    )
    batch = jax.device_put(make_batch(frontend, batch_size, config.num_classes, seed))
    key = jax.random.key(seed)
    lowered: Any = steps.train
    with jax.set_mesh(mesh):
        compiled = lowered.lower(begin.state, begin.frozen, batch, key).compile()
    state = begin.state

    def train() -> None:
        nonlocal state
        with jax.set_mesh(mesh):
            state, sums = steps.train(state, begin.frozen, batch, key)
            jax.block_until_ready(sums)

    def infer() -> None:
        weights = (state.trainable, state.stats, begin.frozen)
        with jax.set_mesh(mesh):
            jax.block_until_ready(steps.forward(weights, batch["audio"], batch["length"]))

    return PreparedSteps(
        train,
        infer,
        getattr(compiled.memory_analysis(), "temp_size_in_bytes", None),
        sum(leaf.size for leaf in jax.tree.leaves(parts.trainable)),
    )


def make_batch(frontend: FrontEnd, batch_size: int, num_classes: int, seed: int) -> Any:
    """Return a training batch of noise that fills the input."""
    rng = np.random.default_rng(seed)
    labels = np.eye(num_classes, dtype=np.float32)
    return {
        "audio": rng.integers(-8000, 8000, (batch_size, frontend.samples), np.int16),
        "length": np.full(batch_size, frontend.samples, np.int32),
        "target": labels[rng.integers(0, num_classes, batch_size)],
        "weight": np.ones(batch_size, np.float32),
    }


@dataclasses.dataclass(frozen=True)
class StepTiming:
    """Measured time of the steps of one method; ratios are None without the method they name.

    Attributes:
        name: the method.
        trainable: trainable parameters.
        train_s, infer_s: median seconds of a training step and of a forward pass.
        train_quartiles_s: quartiles of the training step.
        over_linear, over_dense: training step over that of a linear probe and of Dense-MoA.
        temporaries: bytes of XLA's temporaries in a training step.
    """

    name: str
    trainable: int
    train_s: float
    train_quartiles_s: tuple[float, float]
    infer_s: float
    over_linear: float | None
    over_dense: float | None
    temporaries: int | None


def time_methods(
    models: Mapping[str, tuple[ASTConfig, Method]], *, batch_size: int, rounds: int
) -> list[StepTiming]:
    """Time the steps of methods, interleaved in one process.

    Args:
        models: configuration and method of each row; `linear` and `dense_moa` are references.
        batch_size: clips per step.
        rounds: rounds that count.
    """
    made = {
        name: prepare_steps(config, method, batch_size=batch_size)
        for name, (config, method) in models.items()
    }
    train = time_interleaved({name: steps.train for name, steps in made.items()}, rounds=rounds)
    infer = time_interleaved({name: steps.infer for name, steps in made.items()}, rounds=rounds)

    def compute_ratio(name: str, reference: str) -> float | None:
        return train[name].compute_ratio(train[reference]) if reference in train else None

    return [
        StepTiming(
            name=name,
            trainable=steps.trainable,
            train_s=train[name].median,
            train_quartiles_s=train[name].quartiles,
            infer_s=infer[name].median,
            over_linear=compute_ratio(name, "linear"),
            over_dense=compute_ratio(name, "dense_moa"),
            temporaries=steps.temporary_bytes,
        )
        for name, steps in made.items()
    ]


@dataclasses.dataclass(frozen=True)
class LoopedMoA(DenseMoA):
    """Dense-MoA whose experts run one after another, as in the published code.

    The same function and parameters as `DenseMoA`, whose experts are one batched product: it shows
    how much of a measured difference is due to the loop.
    """

    name: ClassVar[str] = "looped_moa"

    def make_mixture(self, shape: MixtureShape, rngs: nnx.Rngs) -> nnx.Module:
        return _Looped(shape, rngs)


class _Looped(nnx.Module):
    """sum_i gates_i A_i(x), with a product of its own for every expert."""

    def __init__(self, shape: MixtureShape, rngs: nnx.Rngs):
        self.experts = nnx.List(shape.block.make(rngs) for _ in range(shape.experts))
        normal = jax.random.normal(rngs.params(), (shape.block.dim, shape.experts))
        self.w_router = nnx.Param(0.02 * normal)
        self.b_router = nnx.Param(jnp.zeros(shape.experts))

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        scores = x @ self.w_router[...].astype(x.dtype)
        gates = jax.nn.softmax(scores.astype(jnp.float32) + self.b_router[None, None], axis=-1)
        outputs = jnp.stack([expert(x) for expert in self.experts], axis=-1)
        return jnp.einsum("bnde,bne->bnd", outputs, gates.astype(outputs.dtype)).astype(x.dtype)
