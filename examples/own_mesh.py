"""A mesh of one's own with JAX's defaults: each device has its clips and a piece of the weights."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

import aatjax
from aatjax import petl, surgery

devices = jax.device_count()
mesh = jax.make_mesh((devices,), ("batch",))  # any name
print(mesh)
model = aatjax.adapt(aatjax.load("embedded", num_classes=3, frames=98), petl.SoftMoA())
parts = surgery.split(model)
optimizer = optax.adamw(3e-3)


def split_rows(leaf: Array) -> Array:
    """Give each device some rows of a frozen matrix (fsdp); copy what cannot be split."""
    fits = leaf.ndim == 2 and leaf.shape[0] % devices == 0
    return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec("batch" if fits else None)))


def place(tree: Any, *axes: str) -> Any:
    """Put arrays on the mesh, split along these axes or copied to every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*axes)))


@jax.jit
def step(trainable: Any, state: Any, frozen: Any, x: Array, y: Array) -> tuple[Any, Any, Array]:
    """Return updated parameters and optimizer state, and the loss of clips `[b, t, f]`."""

    def compute_loss(trainable: Any) -> Array:
        model = surgery.join(parts.graphdef, trainable, parts.stats, frozen)
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    loss, grads = jax.value_and_grad(compute_loss)(trainable)
    updates, state = optimizer.update(grads, state, trainable)
    return optax.apply_updates(trainable, updates), state, loss


frozen = jax.tree.map(split_rows, parts.frozen)
trainable = place(parts.trainable)
state = optimizer.init(trainable)
x = place(jax.random.normal(jax.random.key(0), (2 * devices, 98, 128)), "batch")
y = place(jnp.arange(2 * devices) % 3, "batch")
for _ in range(3):
    trainable, state, loss = step(trainable, state, frozen, x, y)
    print(f"loss {float(loss):.4f}")
