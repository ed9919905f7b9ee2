"""Scaled dot-product attention.

`reference` is the truth in plain einsums; `blocked` the same without keeping the weights, on CPU a
few heads at a time.
"""

from typing import Literal

from jaxtyping import Array, Bool, Float

from aatjax_kernels.attention import blocked, reference

Implementation = Literal["blocked", "reference"] | None
IMPLEMENTATIONS = ("blocked", "reference")

__all__ = ["IMPLEMENTATIONS", "Implementation", "attention"]


def attention(
    query: Float[Array, "b n h k"],
    key: Float[Array, "b m h k"],
    value: Float[Array, "b m h k"],
    *,
    mask: Bool[Array, "b m"] | None = None,
    implementation: Implementation = None,
) -> Float[Array, "b n h k"]:
    """softmax(Q K^T / sqrt(k)) V with a float32 softmax (Vaswani et al. 2017, eq. 1).

    Args:
        query: `[b, n, h, k]`.
        key: `[b, m, h, k]`.
        value: `[b, m, h, k]`.
        mask: which keys are seen; None for all. A clip must have one at least.
        implementation: `"blocked"`, `"reference"` (which alone has forward-mode derivatives), or
            None for the faster one, which is `"blocked"`.

    Returns:
        `[b, n, h, k]` in the type of `value`.

    Raises:
        ValueError: an implementation of that name does not exist.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"attention has no implementation {implementation!r}: use "
            f"{', '.join(map(repr, IMPLEMENTATIONS))} or None"
        )
    run = reference.attention if implementation == "reference" else blocked.attention
    return run(query, key, value, mask)
