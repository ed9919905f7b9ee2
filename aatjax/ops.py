"""Ops with a choice of implementation: the only module of aatjax that imports the kernels."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

from jax import lax
from jaxtyping import Array, Bool, Float

from aatjax.errors import UsageError
from aatjax_kernels import attention as attention_kernels
from aatjax_kernels import elementwise, matmul
from aatjax_kernels import soft_moe as soft_moe_kernels
from aatjax_kernels.attention import weights as attention_weights
from aatjax_kernels.mesh import as_auto, find_explicit, over_batch
from aatjax_kernels.mesh import pin as over_batch_only
from aatjax_kernels.soft_moe import combine as soft_combine
from aatjax_kernels.soft_moe import dispatch as soft_dispatch
from aatjax_kernels.soft_moe import routing as soft_routing

__all__ = ["as_auto", "attention", "attention_weights", "dot_general", "find_explicit", "gelu"]
__all__ += ["layer_norm", "over_batch", "over_batch_only", "plain_operations", "soft_combine"]
__all__ += ["soft_dispatch", "soft_moe", "soft_routing"]

_plain: contextvars.ContextVar[bool] = contextvars.ContextVar("plain", default=False)


@contextlib.contextmanager
def plain_operations() -> Iterator[None]:
    """Trace every op as plain operations, without kernels or derivative rules of our own.

    They have derivatives of every kind and order, and take more memory and time.
    """
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def gelu(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """x Phi(x) with the exact (erf) Phi: see `aatjax_kernels.elementwise.plain_gelu`."""
    return elementwise.plain_gelu(x) if _plain.get() else elementwise.gelu(x)


def layer_norm(
    x: Float[Array, "*b d"], scale: Float[Array, " d"], bias: Float[Array, " d"], eps: float
) -> Float[Array, "*b d"]:
    """LayerNorm over the last axis: see `aatjax_kernels.elementwise.plain_layer_norm`."""
    norm = elementwise.plain_layer_norm if _plain.get() else elementwise.layer_norm
    return norm(x, scale, bias, eps)


def dot_general(x: Array, kernel: Array, dimensions: Any, *args: Any, **options: Any) -> Array:
    """Multiply as `lax.dot_general` does: see `aatjax_kernels.matmul.dot_general`."""
    product = lax.dot_general if _plain.get() else matmul.dot_general
    return product(x, kernel, dimensions, *args, **options)


def attention(
    query: Float[Array, "b n h k"],
    key: Float[Array, "b m h k"],
    value: Float[Array, "b m h k"],
    *,
    mask: Bool[Array, "b m"] | None = None,
) -> Float[Array, "b n h k"]:
    """Scaled dot-product attention, softmax(Q K^T / sqrt(k)) V, with a float32 softmax.

    Args:
        query: `[b, n, h, k]`.
        key: `[b, m, h, k]`.
        value: `[b, m, h, k]`.
        mask: False for keys that are masked out; None for none. Each clip needs one True.

    Returns:
        `[b, n, h, k]` in the type of `value`.

    Raises:
        UsageError: `AATJAX_KERNELS` names a kernel that does not exist.

    Source: Vaswani et al. 2017, eq. 1.
    """
    name = "reference" if _plain.get() else None
    try:
        return attention_kernels.attention(query, key, value, mask=mask, implementation=name)
    except ValueError as error:
        raise UsageError(str(error)) from error


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
    implementation: soft_moe_kernels.SoftMoeImplementation | None = None,
) -> Float[Array, "b n d"]:
    """Soft mixture of bottleneck experts (2402.00828): see `aatjax_kernels.soft_moe.soft_moe`.

    Raises:
        UsageError: an implementation of that name does not exist, or cannot run here.
    """
    implementation = "reference" if _plain.get() else implementation
    try:
        return soft_moe_kernels.soft_moe(
            x,
            phi,
            w_down,
            b_down,
            w_up,
            b_up,
            mask=mask,
            normalize=normalize,
            implementation=implementation,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
