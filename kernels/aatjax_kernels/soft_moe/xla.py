"""Soft mixture of bottleneck adapters in plain jnp with a hand-written backward pass.

The same values as `reference.py` with less memory traffic in the backward pass:

1. The softmax over the tokens needs sum_n D_ns dD_ns for each slot s. With slots X~ = D^T X and
   dD = X dX~^T that is the inner product <X~_s, dX~_s>, known before the tokens are read again.
2. Both terms of dX are one product, dX = [D | dL] [dX~ ; Phi^T].
3. Of arrays of the size of the tokens only the tokens are kept, with the logits [b, n, s] and the
   slots [b, s, d].

With normalised scores L = r X Phi, r = (|x|^2 + 1e-6)^(-1/2), dL is scaled by r in 2 and
r^2 sum_s(dL L) X is subtracted.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from aatjax_kernels.dispatch import KernelOptions
from aatjax_kernels.matmul import F32
from aatjax_kernels.soft_moe.packing import apply_experts
from aatjax_kernels.soft_moe.reference import NORM_EPS, weights


def tile(options: KernelOptions, *arrays: Any) -> None:
    """Any shape is taken; see `Backend`."""


def _einsum(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=F32)


def _scores(
    normalize: bool, x: Array, phi: Array
) -> tuple[Float[Array, "b n s"], Float[Array, "b n 1"] | None]:
    """Return float32 logits, and the reciprocal length of each token if `normalize`."""
    flat = phi.reshape(phi.shape[0], -1).astype(x.dtype)
    with jax.named_scope("logits"):
        logits = _einsum("bnd,ds->bns", x, flat)
    if not normalize:
        return logits, None
    square = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    length = jax.lax.rsqrt(square + NORM_EPS)
    return logits * length, length


def forward(
    options: KernelOptions, x: Array, phi: Array, *rest: Any, keep: bool
) -> tuple[Array, tuple[Array, ...]]:
    """Return the output, and with `keep` logits, slots and lengths."""
    *experts, mask = rest
    batch, _, dim = x.shape
    logits, length = _scores(options.normalize, x, phi)
    dispatch, combine = weights(logits, mask)
    with jax.named_scope("dispatch"):
        slots = _einsum("bns,bnd->bsd", dispatch.astype(x.dtype), x)
    with jax.named_scope("experts"):
        outputs = apply_experts(slots.reshape(batch, *phi.shape[1:], dim), *experts)
    with jax.named_scope("combine"):
        outputs = outputs.reshape(slots.shape).astype(x.dtype)
        out = _einsum("bns,bsd->bnd", combine.astype(x.dtype), outputs)
    kept = (logits, slots) if length is None else (logits, slots, length)
    return out.astype(x.dtype), kept if keep else ()


def backward(
    options: KernelOptions, dout: Array, kept: tuple[Array, ...], x: Array, phi: Array, *rest: Any
) -> tuple[Array, ...]:
    """Return the gradients of x, phi and the experts' weights."""
    *experts, mask = rest
    logits, slots, *lengths = kept
    length = lengths[0] if options.normalize else None
    (batch, _, dim), dtype, count = x.shape, x.dtype, slots.shape[1]
    dispatch, combine = weights(logits, mask)

    # Gradients of the experts' outputs and of the slots.
    with jax.named_scope("experts"):
        outputs, pull = jax.vjp(apply_experts, slots.reshape(batch, *phi.shape[1:], dim), *experts)
    with jax.named_scope("combine"):
        doutputs = _einsum("bns,bnd->bsd", combine.astype(dtype), dout)
    with jax.named_scope("experts"):
        dslots, *dweights = pull(doutputs.reshape(outputs.shape).astype(outputs.dtype))
    dslots = dslots.reshape(slots.shape)
    both = jnp.concatenate([outputs.reshape(slots.shape), dslots], axis=1).astype(dtype)

    # The logits, through both softmaxes.
    with jax.named_scope("combine"):
        dcombine = _einsum("bnd,bsd->bns", dout, both[:, :count])
    with jax.named_scope("dispatch"):
        ddispatch = _einsum("bnd,bsd->bns", x, both[:, count:])
    # XLA:CPU would fuse the products with the sums below, which takes longer than both.
    dcombine, ddispatch = jax.lax.optimization_barrier((dcombine, ddispatch))
    of_tokens = jnp.sum(combine * dcombine, axis=2, keepdims=True)
    of_slots = jnp.sum(slots * dslots, axis=2)[:, None]
    dlogits = combine * (dcombine - of_tokens) + dispatch * (ddispatch - of_slots)

    # The tokens and phi.
    scaled = dlogits if length is None else dlogits * length
    flat = jnp.broadcast_to(phi.reshape(dim, -1).T.astype(dtype), (batch, count, dim))
    with jax.named_scope("dispatch_logits"):  # one product, half of it each
        weight = jnp.concatenate([dispatch, scaled], axis=2).astype(dtype)
        dx = _einsum("bnt,btd->bnd", weight, jnp.concatenate([both[:, count:], flat], axis=1))
    if length is not None:
        inner = jnp.sum(dlogits * logits, axis=2, keepdims=True)
        dx = dx - jnp.square(length) * inner * x.astype(F32)
    with jax.named_scope("logits"):
        dphi = _einsum("bnd,bns->ds", x, scaled.astype(dtype))
    return dx.astype(dtype), dphi.reshape(phi.shape), *dweights
