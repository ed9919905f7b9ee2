"""Soft mixture of experts: dispatch, experts, combine.

`reference` is the truth in plain einsums; `xla` the same with a hand-written backward pass.
"""

from typing import Literal

from jaxtyping import Array, Bool, Float

from aatjax_kernels.soft_moe import reference, xla
from aatjax_kernels.soft_moe.reference import combine, dispatch, routing

Implementation = Literal["xla", "reference"] | None
IMPLEMENTATIONS = ("xla", "reference")

__all__ = ["IMPLEMENTATIONS", "Implementation", "combine", "dispatch", "routing", "soft_moe"]


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
    implementation: Implementation = None,
) -> Float[Array, "b n d"]:
    """Soft mixture of bottleneck experts (arXiv 2402.00828; 2308.00951, eq. 1-3).

    Args:
        x: tokens `[b, n, d]`.
        phi: slot parameters `[d, e, p]` for e experts of p slots.
        w_down, b_down: stacked down-projections `[e, d, r]` and `[e, r]`.
        w_up, b_up: stacked up-projections `[e, r, d]` and `[e, d]`.
        mask: which tokens are dispatched and read back; the others come out as zero. None for all.
        normalize: tokens have unit length in the scores (not in the slots).
        implementation: `"xla"`, `"reference"` (which alone has forward-mode derivatives), or None
            for the fastest one here, which is `"xla"`.

    Returns:
        `[b, n, d]` in the type of `x`. Scores, softmaxes and sums are float32.

    Raises:
        ValueError: an implementation of that name does not exist.
    """
    if implementation == "reference":
        return reference.soft_moe(
            x, phi, w_down, b_down, w_up, b_up, mask=mask, normalize=normalize
        )
    if implementation == "tpu":
        from aatjax_kernels.soft_moe import tpu
        return tpu.soft_moe(tpu.Options(normalize), x, phi, w_down, b_down, w_up, b_up, mask)
    if implementation not in (None, "xla"):
        raise ValueError(
            f"soft_moe has no implementation {implementation!r}: use "
            f"{', '.join(map(repr, IMPLEMENTATIONS))} or None"
        )
    return xla.soft_moe(normalize, x, phi, w_down, b_down, w_up, b_up, mask)
