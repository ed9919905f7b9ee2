"""Soft mixture of bottleneck adapters in plain jnp with a hand-written backward pass.

The same values as `reference.py` with less traffic in the backward pass, on every platform:

1. The softmax over the tokens needs sum_n D_ns dD_ns for each slot s. With slots X~ = D^T X and
   dD = X dX~^T that is the inner product <X~_s, dX~_s>, known before the tokens are read again.
2. Both terms of dX are one product, dX = [D | dL] [dX~ ; Phi^T].
3. Kept for the backward pass are the logits [b, n, s] and the slots [b, s, d], nothing of the size
   of the tokens but the tokens themselves.

With normalised scores L = r X Phi, r = (|x|^2 + 1e-6)^(-1/2), dL is scaled by r in 2 and
r^2 sum_s(dL L) X is taken off.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from aatjax_kernels.soft_moe.reference import NORM_EPS, experts, weights


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def soft_moe(
    normalize: bool,
    x: Float[Array, "b n d"],
    phi: Float[Array, "d e p"],
    w_down: Float[Array, "e d r"],
    b_down: Float[Array, "e r"],
    w_up: Float[Array, "e r d"],
    b_up: Float[Array, "e d"],
    mask: Bool[Array, "b n"] | None,
) -> Float[Array, "b n d"]:
    """`reference.soft_moe`, with the backward pass above; forward mode is not supported."""
    return _forward(normalize, x, phi, w_down, b_down, w_up, b_up, mask)[0]


def _scores(
    normalize: bool, x: Array, phi: Array
) -> tuple[Float[Array, "b n s"], Float[Array, "b n 1"] | None]:
    """Logits of tokens and slots in float32, and the reciprocal length of each token if used."""
    flat = phi.reshape(phi.shape[0], -1).astype(x.dtype)
    logits = jnp.einsum("bnd,ds->bns", x, flat, preferred_element_type=jnp.float32)
    if not normalize:
        return logits, None
    square = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    length = jax.lax.rsqrt(square + NORM_EPS)
    return logits * length, length


def _forward(
    normalize: bool,
    x: Array,
    phi: Array,
    w_down: Array,
    b_down: Array,
    w_up: Array,
    b_up: Array,
    mask: Array | None,
) -> tuple[Array, Any]:
    batch, _, dim = x.shape
    logits, length = _scores(normalize, x, phi)
    dispatch, combine = weights(logits, mask)
    slots = jnp.einsum(
        "bns,bnd->bsd", dispatch.astype(x.dtype), x, preferred_element_type=jnp.float32
    )
    given = (w_down, b_down, w_up, b_up)
    outputs = experts(slots.reshape(batch, *phi.shape[1:], dim), *given)
    out = jnp.einsum(
        "bns,bsd->bnd",
        combine.astype(x.dtype),
        outputs.reshape(slots.shape).astype(x.dtype),
        preferred_element_type=jnp.float32,
    )
    return out.astype(x.dtype), (x, phi, given, mask, logits, length, slots)


def _backward(normalize: bool, kept: Any, dout: Array) -> tuple[Array | None, ...]:
    x, phi, given, mask, logits, length, slots = kept
    batch, _, dim = x.shape
    dtype = x.dtype
    dispatch, combine = weights(logits, mask)

    # The slots: what the experts' outputs and their inputs are to the loss.
    outputs, pull = jax.vjp(experts, slots.reshape(batch, *phi.shape[1:], dim), *given)
    doutputs = jnp.einsum(
        "bns,bnd->bsd", combine.astype(dtype), dout, preferred_element_type=jnp.float32
    )
    dslots, *dweights = pull(doutputs.reshape(outputs.shape).astype(outputs.dtype))
    dslots = dslots.reshape(slots.shape)
    outputs = outputs.reshape(slots.shape)

    # The logits, through both softmaxes.
    both = jnp.concatenate([outputs, dslots], axis=1).astype(dtype)
    count = slots.shape[1]
    dcombine = jnp.einsum("bnd,bsd->bns", dout, both[:, :count], preferred_element_type=jnp.float32)
    ddispatch = jnp.einsum("bnd,bsd->bns", x, both[:, count:], preferred_element_type=jnp.float32)
    of_tokens = jnp.sum(combine * dcombine, axis=2, keepdims=True)
    of_slots = jnp.sum(slots * dslots, axis=2)[:, None]
    dlogits = combine * (dcombine - of_tokens) + dispatch * (ddispatch - of_slots)

    # The tokens and phi.
    scaled = dlogits if length is None else dlogits * length
    flat = jnp.broadcast_to(phi.reshape(dim, -1).T.astype(dtype), (batch, count, dim))
    dx = jnp.einsum(
        "bnt,btd->bnd",
        jnp.concatenate([dispatch, scaled], axis=2).astype(dtype),
        jnp.concatenate([both[:, count:], flat], axis=1),
        preferred_element_type=jnp.float32,
    )
    if length is not None:
        along = jnp.sum(dlogits * logits, axis=2, keepdims=True)
        dx = dx - jnp.square(length) * along * x.astype(jnp.float32)
    dphi = jnp.einsum("bnd,bns->ds", x, scaled.astype(dtype), preferred_element_type=jnp.float32)
    return dx.astype(dtype), dphi.reshape(phi.shape).astype(phi.dtype), *dweights, None


soft_moe.defvjp(_forward, _backward)
