"""Scaled dot-product attention as plain einsums: the truth."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from aatjax_kernels.arguments import check_arrays


def attention(
    query: Float[Array, "b n h k"],
    key: Float[Array, "b m h k"],
    value: Float[Array, "b m h k"],
    mask: Bool[Array, "b m"] | None,
) -> Float[Array, "b n h k"]:
    """softmax(Q K^T / sqrt(k)) V; see the package's `attention`."""
    return jnp.einsum("bhnm,bmhk->bnhk", weights(query, key, mask).astype(value.dtype), value)


def weights(
    query: Float[Array, "b n h k"],
    key: Float[Array, "b m h k"],
    mask: Bool[Array, "b m"] | None = None,
) -> Float[Array, "b h n m"]:
    """softmax(Q K^T / sqrt(k)) in float32: the weights, which no other implementation keeps."""
    check_arrays("weights", query=(query, "b n h k"), key=(key, "b m h k"), mask=(mask, "b m"))
    scaled = query * query.shape[-1] ** -0.5
    logits = jnp.einsum("bnhk,bmhk->bhnm", scaled, key, preferred_element_type=jnp.float32)
    if mask is not None:
        logits = jnp.where(mask[:, None, None], logits, -jnp.inf)
    return jax.nn.softmax(logits, axis=-1)
