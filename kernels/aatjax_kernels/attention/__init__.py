"""Scaled dot-product attention.

`reference` is the truth in plain einsums; `blocked` the same without keeping the weights, on CPU a
few heads at a time; `tpu` and `gpu` are Pallas kernels.
"""

from typing import Literal

from jaxtyping import Array, Bool, Float

from aatjax_kernels.attention import fused, reference

Implementation = Literal["blocked", "tpu", "gpu", "reference"] | None
IMPLEMENTATIONS = ("blocked", "tpu", "gpu", "reference")

__all__ = ["IMPLEMENTATIONS", "Implementation", "attention"]


def attention(
    query: Float[Array, "b n h k"],
    key: Float[Array, "b m h k"],
    value: Float[Array, "b m h k"],
    *,
    mask: Bool[Array, "b m"] | None = None,
    implementation: Implementation = None,
    interpret: bool = False,
) -> Float[Array, "b n h k"]:
    """softmax(Q K^T / sqrt(k)) V with a float32 softmax (Vaswani et al. 2017, eq. 1).

    Args:
        query: `[b, n, h, k]`.
        key: `[b, m, h, k]`.
        value: `[b, m, h, k]`.
        mask: which keys are seen; None for all. A clip must have one at least.
        implementation: `"blocked"`, `"tpu"`, `"gpu"`, `"reference"` (which alone has forward-mode
            derivatives), or None for the best on the platform that the program is compiled for.
        interpret: run the kernel in Pallas's interpreter, on any platform.

    Returns:
        `[b, n, h, k]` in the type of `value`.

    Raises:
        ValueError: an implementation of that name does not exist, or cannot take these shapes.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"attention has no implementation {implementation!r}: use "
            f"{', '.join(map(repr, IMPLEMENTATIONS))} or None"
        )
    if implementation == "reference":
        return reference.attention(query, key, value, mask)
    static = fused.static(implementation, query, key, interpret=interpret)
    return fused.attention(static, query, key, value, mask)
