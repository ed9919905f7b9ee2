"""Ops with a choice of implementation: the only module of aatjax that imports the kernels."""

from jaxtyping import Array, Bool, Float

from aatjax.errors import UsageError
from aatjax_kernels import attention as attention_kernels
from aatjax_kernels import elementwise, matmul, mesh
from aatjax_kernels import soft_moe as soft_moe_kernels


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
    try:
        return attention_kernels.attention(query, key, value, mask=mask)
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


as_auto = mesh.as_auto
dot_general = matmul.dot_general
find_explicit = mesh.find_explicit
gelu = elementwise.gelu
layer_norm = elementwise.layer_norm
over_batch = mesh.over_batch
over_batch_only = mesh.pin
soft_routing = soft_moe_kernels.routing
soft_dispatch = soft_moe_kernels.dispatch
soft_combine = soft_moe_kernels.combine
