"""Attention for NVIDIA GPUs by libraries, in half precision: cuDNN through JAX, and tokamax.

Both take the number of keys of a clip rather than a mask: keys that are masked out are moved
behind the others, which attention does not notice.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

WIDEST = 128
HALF = ("bfloat16", "float16")


def run_cudnn(
    query: Array, key: Array, value: Array, mask: Array | None, implementation: Any = "cudnn"
) -> Array:
    """softmax(Q K^T / sqrt(k)) V by `jax.nn.dot_product_attention`."""
    key, value, lengths = move_masked(key, value, mask)
    return jax.nn.dot_product_attention(
        query, key, value, key_value_seq_lengths=lengths, implementation=implementation
    )


def run_tokamax(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    implementation: Any = ("mosaic", "triton"),
) -> Array:
    """softmax(Q K^T / sqrt(k)) V by openxla/tokamax: Mosaic GPU where it runs, else Triton."""
    import tokamax  # pyright: ignore[reportMissingImports]

    key, value, lengths = move_masked(key, value, mask)
    return tokamax.dot_product_attention(
        query, key, value, key_value_seq_lengths=lengths, implementation=implementation
    )


LIBRARIES: dict[str, Callable[..., Array]] = {"cudnn": run_cudnn, "tokamax": run_tokamax}


def move_masked(key: Array, value: Array, mask: Array | None) -> tuple[Array, Array, Array | None]:
    """Return keys and values with those that are masked out at the end, and how many are not."""
    if mask is None:
        return key, value, None
    order = jnp.argsort(~mask, axis=1)[:, :, None, None]
    key, value = (jnp.take_along_axis(x, order, axis=1) for x in (key, value))
    return key, value, mask.sum(axis=1, dtype=jnp.int32)


def explain_unsupported(name: str, query: Any) -> str | None:
    """Return the property of queries `[b, n, h, k]`, or of this machine, that is not supported."""
    width = query.shape[3]
    if query.dtype.name not in HALF:
        return f"{query.dtype.name}: it must be bfloat16 or float16"
    if width % 8 or width > WIDEST:
        return f"heads of width {width}: it must be a multiple of 8, at most {WIDEST}"
    if jax.default_backend() != "gpu":
        return "any shape on this machine, where JAX finds no NVIDIA GPU"
    if name == "tokamax" and importlib.util.find_spec("tokamax") is None:
        return "any shape on this machine: pip install tokamax"
    return _explain_refused(name)


@functools.cache
def _explain_refused(name: str) -> str | None:
    """Lower a small program, and return why the library refuses it on this machine, or None."""
    small = jax.ShapeDtypeStruct((1, 64, 1, 64), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        try:
            jax.jit(lambda x: LIBRARIES[name](x, x, x, None)).lower(small)
        except Exception as error:
            return f"any shape on this machine: {error}"
    return None
