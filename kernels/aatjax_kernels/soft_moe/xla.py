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

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from aatjax_kernels.soft_moe.packing import Options
from aatjax_kernels.soft_moe.reference import NORM_EPS, weights
from aatjax_kernels.soft_moe.reference import experts as apply


def _scores(
    normalize: bool, x: Array, phi: Array
) -> tuple[Float[Array, "b n s"], Float[Array, "b n 1"] | None]:
    """Logits of tokens and slots in float32, and the reciprocal length of each token if used."""
    flat = phi.reshape(phi.shape[0], -1).astype(x.dtype)
    with jax.named_scope("logits"):
        logits = jnp.einsum("bnd,ds->bns", x, flat, preferred_element_type=jnp.float32)
    if not normalize:
        return logits, None
    square = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    length = jax.lax.rsqrt(square + NORM_EPS)
    return logits * length, length


def forward(
    options: Options, x: Array, phi: Array, *experts: Array, mask: Array | None, keep: bool
) -> tuple[Array, tuple[Array, ...]]:
    """The output, and with `keep` what the backward pass needs beside the arguments."""
    batch, _, dim = x.shape
    logits, length = _scores(options.normalize, x, phi)
    dispatch, combine = weights(logits, mask)
    with jax.named_scope("dispatch"):
        slots = jnp.einsum(
            "bns,bnd->bsd", dispatch.astype(x.dtype), x, preferred_element_type=jnp.float32
        )
    with jax.named_scope("experts"):
        outputs = apply(slots.reshape(batch, *phi.shape[1:], dim), *experts)
    with jax.named_scope("combine"):
        out = jnp.einsum(
            "bns,bsd->bnd",
            combine.astype(x.dtype),
            outputs.reshape(slots.shape).astype(x.dtype),
            preferred_element_type=jnp.float32,
        )
    kept = (logits, slots) if length is None else (logits, slots, length)
    return out.astype(x.dtype), kept if keep else ()


def backward(
    options: Options,
    dout: Array,
    kept: tuple[Array, ...],
    x: Array,
    phi: Array,
    *experts: Array,
    mask: Array | None,
) -> tuple[Array, ...]:
    """Gradients of x, phi and the experts' weights."""
    logits, slots, *lengths = kept
    length = lengths[0] if options.normalize else None
    batch, _, dim = x.shape
    dtype = x.dtype
    dispatch, combine = weights(logits, mask)

    # The slots: what the experts' outputs and their inputs are to the loss.
    with jax.named_scope("experts"):
        outputs, pull = jax.vjp(apply, slots.reshape(batch, *phi.shape[1:], dim), *experts)
    with jax.named_scope("combine"):
        doutputs = jnp.einsum(
            "bns,bnd->bsd", combine.astype(dtype), dout, preferred_element_type=jnp.float32
        )
    with jax.named_scope("experts"):
        dslots, *dweights = pull(doutputs.reshape(outputs.shape).astype(outputs.dtype))
    dslots = dslots.reshape(slots.shape)
    outputs = outputs.reshape(slots.shape)

    # The logits, through both softmaxes.
    both = jnp.concatenate([outputs, dslots], axis=1).astype(dtype)
    count = slots.shape[1]
    with jax.named_scope("combine"):
        dcombine = jnp.einsum(
            "bnd,bsd->bns", dout, both[:, :count], preferred_element_type=jnp.float32
        )
    with jax.named_scope("dispatch"):
        ddispatch = jnp.einsum(
            "bnd,bsd->bns", x, both[:, count:], preferred_element_type=jnp.float32
        )
    of_tokens = jnp.sum(combine * dcombine, axis=2, keepdims=True)
    of_slots = jnp.sum(slots * dslots, axis=2)[:, None]
    dlogits = combine * (dcombine - of_tokens) + dispatch * (ddispatch - of_slots)

    # The tokens and phi.
    scaled = dlogits if length is None else dlogits * length
    flat = jnp.broadcast_to(phi.reshape(dim, -1).T.astype(dtype), (batch, count, dim))
    with jax.named_scope("dispatch_logits"):  # one product, half of it each
        dx = jnp.einsum(
            "bnt,btd->bnd",
            jnp.concatenate([dispatch, scaled], axis=2).astype(dtype),
            jnp.concatenate([both[:, count:], flat], axis=1),
            preferred_element_type=jnp.float32,
        )
    if length is not None:
        along = jnp.sum(dlogits * logits, axis=2, keepdims=True)
        dx = dx - jnp.square(length) * along * x.astype(jnp.float32)
    with jax.named_scope("logits"):
        dphi = jnp.einsum(
            "bnd,bns->ds", x, scaled.astype(dtype), preferred_element_type=jnp.float32
        )
    return dx.astype(dtype), dphi.reshape(phi.shape), *dweights
