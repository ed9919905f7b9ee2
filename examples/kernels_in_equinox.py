"""The kernels in a model of another library: a Soft-MoA layer in Equinox."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from aatjax_kernels.attention import attention
from aatjax_kernels.soft_moe import soft_moe


class SoftMoE(eqx.Module):
    """e bottleneck experts of p slots each: `[b, n, d] -> [b, n, d]`."""

    phi: Array
    w_down: Array
    b_down: Array
    w_up: Array
    b_up: Array

    def __init__(self, dim: int, experts: int, slots: int, width: int, key: Array) -> None:
        keys = jax.random.split(key, 3)
        self.phi = 0.1 * jax.random.normal(keys[0], (dim, experts, slots))
        self.w_down = 0.02 * jax.random.normal(keys[1], (experts, dim, width))
        self.b_down = jnp.zeros((experts, width))
        self.w_up = 0.02 * jax.random.normal(keys[2], (experts, width, dim))
        self.b_up = jnp.zeros((experts, dim))

    def __call__(self, x: Array) -> Array:
        return soft_moe(x, self.phi, self.w_down, self.b_down, self.w_up, self.b_up)


layer = SoftMoE(dim=64, experts=4, slots=2, width=8, key=jax.random.key(0))
x = jax.random.normal(jax.random.key(1), (2, 100, 64))


@eqx.filter_jit
def compute_gradient(layer: SoftMoE, x: Array) -> SoftMoE:
    """Gradient of the mean square of the output, a layer of the same shapes."""

    def compute_loss(layer: SoftMoE) -> Array:
        return jnp.square(layer(x)).mean()

    return eqx.filter_grad(compute_loss)(layer)


print("output", layer(x).shape, "gradient of phi", compute_gradient(layer, x).phi.shape)
query = x.reshape(2, 100, 4, 16)
print("attention", attention(query, query, query).shape)
