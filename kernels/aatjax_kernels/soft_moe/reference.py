"""Soft mixture of bottleneck adapters as plain einsums: the truth that kernels are held against.

Soft-MoA (arXiv 2402.00828), after "From Sparse to Soft Mixtures of Experts" (arXiv 2308.00951),
eq. 1-3. Axes: b batch, n tokens, d width, e experts, p slots an expert, r bottleneck width.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def routing(
    x: Float[Array, "b n d"], phi: Float[Array, "d e p"]
) -> tuple[Float[Array, "b n e p"], Float[Array, "b n e p"]]:
    """Dispatch and combine weights in float32.

    Dispatch is a softmax over the tokens, for each slot; combine is a softmax jointly over all
    e*p slots, for each token.
    """
    logits = jnp.einsum("bnd,dep->bnep", x, phi.astype(x.dtype), preferred_element_type=jnp.float32)
    dispatch = jax.nn.softmax(logits, axis=1)
    combine = jax.nn.softmax(logits, axis=(2, 3))
    return dispatch, combine


def soft_moe(
    x: Float[Array, "b n d"],
    phi: Float[Array, "d e p"],
    w_down: Float[Array, "e d r"],
    b_down: Float[Array, "e r"],
    w_up: Float[Array, "e r d"],
    b_up: Float[Array, "e d"],
) -> Float[Array, "b n d"]:
    """Every expert works on p convex combinations of all tokens; tokens read the slots back.

    Slots S = D^T X; slot outputs Y = W_up GELU(W_down S + b_down) + b_up, each expert its own
    weights; output C Y. GELU is the exact (erf) form. Products accumulate in float32.

    Returns:
        `[b, n, d]` in the type of `x`.
    """
    dtype = x.dtype
    dispatch, combine = routing(x, phi)
    slots = jnp.einsum(
        "bnep,bnd->bepd", dispatch.astype(dtype), x, preferred_element_type=jnp.float32
    )
    hidden = jnp.einsum("bepd,edr->bepr", slots, w_down) + b_down[None, :, None]
    outputs = jnp.einsum("bepr,erd->bepd", jax.nn.gelu(hidden, approximate=False), w_up)
    outputs = outputs + b_up[None, :, None]
    return jnp.einsum(
        "bnep,bepd->bnd",
        combine.astype(dtype),
        outputs.astype(dtype),
        preferred_element_type=jnp.float32,
    ).astype(dtype)
