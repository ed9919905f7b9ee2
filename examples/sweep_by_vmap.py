"""A sweep over learning rates and seeds in one program: adapters stacked, the backbone shared."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

import aatjax
from aatjax import data, petl, surgery

sounds = data.Synthetic(("frog", "rain", "siren"), clips=4, seconds=1.0)
frontend = aatjax.FrontEnd(frames=98)
fitted = [frontend.fit(sounds.waveform(i)) for i in range(len(sounds))]
x = frontend(jnp.array([wave for wave, _ in fitted]), jnp.array([n for _, n in fitted]))
y = jnp.array([clip.label[0] for clip in sounds.clips])

base = aatjax.load("embedded", num_classes=3, frames=98)
rates = jnp.array([1e-3, 3e-3, 1e-2])
parts = [surgery.split(aatjax.adapt(base, petl.SoftMoA(), seed=seed)) for seed in range(3)]
stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[part.trainable for part in parts])


def train(trainable: Any, rate: Array) -> tuple[Any, Array]:
    """Five steps of gradient descent; the arrays of the backbone are the same for all."""

    def compute_loss(trainable: Any) -> Array:
        model = surgery.join(parts[0].graphdef, trainable, parts[0].stats, parts[0].frozen)
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    for _ in range(5):
        grads = jax.grad(compute_loss)(trainable)
        trainable = jax.tree.map(lambda p, g: p - rate * g, trainable, grads)
    return trainable, compute_loss(trainable)


adapters, losses = jax.jit(jax.vmap(train))(stacked, rates)
for rate, loss in zip(rates.tolist(), losses.tolist(), strict=True):
    print(f"rate {rate:.0e}  loss {loss:.4f}")
