"""Soft mixture of experts: dispatch, experts, combine.

`reference` is the truth in plain einsums; `xla` the same with a hand-written backward pass; `tpu`
fused kernels. Under a mesh (`jax.set_mesh`) kernels run on each device's part of the batch, which
is split over the axes named in `aatjax_kernels.mesh.BATCH_AXES`.
"""

from typing import Any, Literal

from jaxtyping import Array, Bool, Float

from aatjax_kernels.soft_moe import fused, reference
from aatjax_kernels.soft_moe.packing import Options
from aatjax_kernels.soft_moe.reference import combine, dispatch, routing

Implementation = Literal["xla", "tpu", "gpu", "reference"] | None
IMPLEMENTATIONS = ("xla", "tpu", "gpu", "reference")

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
    interpret: Any = False,
) -> Float[Array, "b n d"]:
    """Soft mixture of bottleneck experts (arXiv 2402.00828; 2308.00951, eq. 1-3).

    Args:
        x: tokens `[b, n, d]`.
        phi: slot parameters `[d, e, p]` for e experts of p slots.
        w_down, b_down: stacked down-projections `[e, d, r]` and `[e, r]`.
        w_up, b_up: stacked up-projections `[e, r, d]` and `[e, d]`.
        mask: which tokens are dispatched and read back; the others come out as zero. None for all.
        normalize: tokens have unit length in the scores (not in the slots).
        implementation: `"xla"`, `"tpu"`, `"reference"` (which alone has forward-mode derivatives),
            or None for the fastest one on the platform that the program is compiled for.
        interpret: run a kernel that was named in Pallas's interpreter, on any platform.

    Returns:
        `[b, n, d]` in the type of `x`. Scores, softmaxes and sums are float32.

    Raises:
        ValueError: an implementation of that name does not exist or, when the program is compiled,
            does not run on its platform; or the mesh in use cannot split the batch evenly.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"soft_moe has no implementation {implementation!r}: use "
            f"{', '.join(map(repr, IMPLEMENTATIONS))} or None"
        )
    given = (x, phi, w_down, b_down, w_up, b_up)
    if implementation == "reference":
        return reference.soft_moe(*given, mask=mask, normalize=normalize)
    options = Options(normalize, interpret)
    static = fused.static(implementation, x, phi, w_down.shape[2], options)
    return fused.soft_moe(static, *given, mask)
