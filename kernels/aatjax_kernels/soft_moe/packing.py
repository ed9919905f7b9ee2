"""Parameters in the layout of the kernels: slots and hidden units of all experts on one axis each.

Phi becomes [s, d], the down- and up-projections [h, d] with h = e r hidden units, and `own` [s, h]
marks the hidden units of each slot's expert, so that all experts are two products.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from aatjax_kernels.elementwise import gelu
from aatjax_kernels.soft_moe.reference import experts

apply_experts: Callable[..., Array] = functools.partial(experts, gelu=gelu)
"""`reference.experts` with a GELU that keeps only its input, for reverse mode alone."""


class PackedParams(NamedTuple):
    """Slot and expert parameters, or their gradients, with the experts on one axis."""

    phi: Float[Array, "s d"]
    w_down: Float[Array, "h d"]
    b_down: Float[Array, "1 h"]
    w_up: Float[Array, "h d"]
    b_up: Float[Array, "s d"]


def pack(phi: Array, w_down: Array, b_down: Array, w_up: Array, b_up: Array) -> PackedParams:
    """Pack phi [d, e, p], w_down [e, d, r], b_down [e, r], w_up [e, r, d] and b_up [e, d]."""
    dim, _, slots = phi.shape
    return PackedParams(
        phi.reshape(dim, -1).T,
        jnp.swapaxes(w_down, 1, 2).reshape(-1, dim),
        b_down.reshape(1, -1),
        w_up.reshape(-1, dim),
        jnp.repeat(b_up, slots, axis=0),
    )


def unpack(packed: PackedParams, experts: int, slots: int) -> tuple[Array, ...]:
    """Return gradients in the shapes of the parameters: the adjoint of `pack`."""
    dim = packed.phi.shape[1]
    return (
        packed.phi.T.reshape(dim, experts, slots),
        jnp.swapaxes(packed.w_down.reshape(experts, -1, dim), 1, 2),
        packed.b_down.reshape(experts, -1),
        packed.w_up.reshape(experts, -1, dim),
        packed.b_up.reshape(experts, slots, dim).sum(axis=1),
    )


def make_ownership(experts: int, slots: int, width: int) -> np.ndarray:
    """Return `own` [e p, e r]: 1 where a slot and a hidden unit belong to the same expert."""
    return np.kron(np.eye(experts), np.ones((slots, width))).astype(np.float32)


def gelu_and_slope(x: Array) -> tuple[Array, Array]:
    """Return the exact GELU and its slope, x Phi(x) and Phi(x) + x phi(x)."""
    cdf = 0.5 * (1.0 + jax.lax.erf(x * np.float32(0.5**0.5)))
    density = jnp.exp(-0.5 * x * x) * np.float32((2.0 * np.pi) ** -0.5)
    return x * cdf, cdf + x * density
