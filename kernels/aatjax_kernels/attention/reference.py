"""Scaled dot-product attention as plain einsums: the truth."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def attention(
    query: Float[Array, "b n h k"],
    key: Float[Array, "b m h k"],
    value: Float[Array, "b m h k"],
    mask: Bool[Array, "b m"] | None,
) -> Float[Array, "b n h k"]:
    """softmax(Q K^T / sqrt(k)) V; see the package's `attention`."""
    scaled = query * query.shape[-1] ** -0.5
    logits = jnp.einsum("bnhk,bmhk->bhnm", scaled, key, preferred_element_type=jnp.float32)
    if mask is not None:
        logits = jnp.where(mask[:, None, None], logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return jnp.einsum("bhnm,bmhk->bnhk", weights, value)
