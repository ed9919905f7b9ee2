"""Soft mixture of bottleneck adapters as plain einsums: the truth that kernels are tested against.

Soft-MoA (arXiv 2402.00828), after "From Sparse to Soft Mixtures of Experts" (arXiv 2308.00951),
eq. 1-3. Axes: b batch, n tokens, d width, e experts, p slots per expert, r bottleneck width.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from aatjax_kernels.arguments import check_arrays

_gelu = functools.partial(jax.nn.gelu, approximate=False)
NORM_EPS = 1e-6
"""Added to the squared length of a token before division by it."""


def routing(
    x: Float[Array, "b n d"],
    phi: Float[Array, "d e p"],
    *,
    mask: Bool[Array, "b n"] | None = None,
    normalize: bool = False,
) -> tuple[Float[Array, "b n e p"], Float[Array, "b n e p"]]:
    """Compute dispatch and combine weights in float32.

    Dispatch is a softmax over the tokens, for each slot; combine a softmax over all e*p slots, for
    each token.

    Args:
        x: tokens.
        phi: slot parameters.
        mask: False for tokens that are masked out: both weights are zero. None for none.
        normalize: scale tokens to unit length for the scores, x / sqrt(|x|^2 + 1e-6).
    """
    check_arrays("routing", x=(x, "b n d"), phi=(phi, "d e p"), mask=(mask, "b n"))
    scored = x
    if normalize:
        wide = x.astype(jnp.float32)
        square = jnp.sum(jnp.square(wide), axis=-1, keepdims=True)
        scored = (wide * jax.lax.rsqrt(square + NORM_EPS)).astype(x.dtype)
    logits = jnp.einsum(
        "bnd,dep->bnep", scored, phi.astype(x.dtype), preferred_element_type=jnp.float32
    )
    both = weights(logits.reshape(*x.shape[:2], -1), mask)
    return both[0].reshape(logits.shape), both[1].reshape(logits.shape)


def weights(
    logits: Float[Array, "b n s"], mask: Bool[Array, "b n"] | None
) -> tuple[Float[Array, "b n s"], Float[Array, "b n s"]]:
    """Softmax of logits over the tokens (dispatch) and over all slots (combine)."""
    combine = jax.nn.softmax(logits, axis=2)
    if mask is None:
        return jax.nn.softmax(logits, axis=1), combine
    valid = mask[:, :, None]
    # The weights of a clip that is masked out are zero, not 0/0.
    peak = jnp.max(logits, axis=1, keepdims=True, where=valid, initial=-1e30)
    scores = jnp.where(valid, jnp.exp(jnp.where(valid, logits - peak, 0.0)), 0.0)
    dispatch = scores / jnp.maximum(scores.sum(axis=1, keepdims=True), 1e-30)
    return dispatch, jnp.where(valid, combine, 0.0)


def dispatch(x: Float[Array, "b n d"], weights: Float[Array, "b n e p"]) -> Float[Array, "b e p d"]:
    """Compute slots S = D^T X in float32: each a weighted mean of the tokens."""
    check_arrays("dispatch", x=(x, "b n d"), weights=(weights, "b n e p"))
    return jnp.einsum(
        "bnep,bnd->bepd", weights.astype(x.dtype), x, preferred_element_type=jnp.float32
    )


def experts(
    slots: Float[Array, "b e p d"],
    w_down: Float[Array, "e d r"],
    b_down: Float[Array, "e r"],
    w_up: Float[Array, "e r d"],
    b_up: Float[Array, "e d"],
    *,
    gelu: Callable[[Array], Array] = _gelu,
) -> Float[Array, "b e p d"]:
    """Apply every expert to its own slots."""
    hidden = jnp.einsum("bepd,edr->bepr", slots, w_down) + b_down[None, :, None]
    outputs = jnp.einsum("bepr,erd->bepd", gelu(hidden), w_up)
    return outputs + b_up[None, :, None]


def combine(
    outputs: Float[Array, "b e p d"], weights: Float[Array, "b n e p"], dtype: jnp.dtype
) -> Float[Array, "b n d"]:
    """Compute the output of the tokens, C Y, in `dtype`."""
    check_arrays("combine", outputs=(outputs, "b e p d"), weights=(weights, "b n e p"))
    return jnp.einsum(
        "bnep,bepd->bnd",
        weights.astype(dtype),
        outputs.astype(dtype),
        preferred_element_type=jnp.float32,
    ).astype(dtype)


def soft_moe(
    x: Float[Array, "b n d"],
    phi: Float[Array, "d e p"],
    w_down: Float[Array, "e d r"],
    b_down: Float[Array, "e r"],
    w_up: Float[Array, "e r d"],
    b_up: Float[Array, "e d"],
    *,
    mask: Bool[Array, "b n"] | None = None,
    normalize: bool = False,
) -> Float[Array, "b n d"]:
    """Apply every expert to p convex combinations of all tokens, and mix the results per token.

    Slots S = D^T X; slot outputs Y = W_up GELU(W_down S + b_down) + b_up, each expert its own
    weights; output C Y. GELU is the exact (erf) form. Products accumulate in float32.
    `mask` and `normalize` are those of `routing`.

    Returns:
        `[b, n, d]` in the type of `x`.
    """
    to_slots, to_tokens = routing(x, phi, mask=mask, normalize=normalize)
    outputs = experts(dispatch(x, to_slots), w_down, b_down, w_up, b_up)
    return combine(outputs, to_tokens, x.dtype)
