"""Looking inside: intermediate values by name, a gradient of them, a Hessian-vector product."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import aatjax
from aatjax import petl, surgery

base = aatjax.load("embedded", num_classes=3, frames=98, implementation="reference")
model = aatjax.adapt(base, petl.SoftMoA(num_experts=4, slots=2))
x = jax.random.normal(jax.random.key(0), (2, 98, 128))

values = aatjax.capture(
    model, x, "blocks/*", "blocks/*/attn/weights", "blocks/*/attn/soft_moa/dispatch"
)
for name, value in values.items():
    print(name, value.shape)


def measure_tokens(x: Array) -> Array:
    """How much the tokens behind the second block depend on the spectrogram."""
    return jnp.square(aatjax.capture(model, x, "blocks/1")["blocks/1"]).mean()


print("saliency", jax.jit(jax.grad(measure_tokens))(x).shape)

parts = surgery.split(model)


def compute_loss(trainable: Any) -> Array:
    """Mean square of the logits, as a function of the trained parameters."""
    model = surgery.join(parts.graphdef, trainable, parts.stats, parts.frozen)
    return jnp.square(model(x)).mean()


def multiply_hessian(direction: Any) -> Any:
    """Forward over reverse, which plain operations have (implementation="reference")."""
    return jax.jvp(jax.grad(compute_loss), (parts.trainable,), (direction,))[1]


product = jax.jit(multiply_hessian)(jax.tree.map(jnp.ones_like, parts.trainable))
print("Hessian times vector", sum(leaf.size for leaf in jax.tree.leaves(product)), "numbers")
