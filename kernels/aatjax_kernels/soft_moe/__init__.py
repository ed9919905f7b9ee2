"""Soft mixture of experts: dispatch, experts, combine.

`reference` is the truth in plain einsums; `xla` the same with a hand-written backward pass; `tpu`
and `gpu` are fused Pallas kernels. On a mesh kernels run on each device's part of the batch; see
`aatjax_kernels.mesh` for which meshes.
"""

from typing import Any, Literal, get_args

from jaxtyping import Array, Bool, Float

from aatjax_kernels import mesh, selection
from aatjax_kernels.arguments import check_arrays
from aatjax_kernels.dispatch import KernelOptions, check_name
from aatjax_kernels.soft_moe import fused, reference
from aatjax_kernels.soft_moe.reference import combine, dispatch, routing

SoftMoeImplementation = Literal["xla", "tpu", "gpu", "reference"]

__all__ = ["OP", "SoftMoeImplementation", "combine", "dispatch", "routing", "soft_moe"]


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
    implementation: SoftMoeImplementation | None = None,
    interpret: Any = False,
) -> Float[Array, "b n d"]:
    """Soft mixture of bottleneck experts (arXiv 2402.00828; 2308.00951, eq. 1-3).

    An expert is W_up GELU(W_down s + b_down) + b_up of each of its slots s, GELU by erf. Slots are
    D^T X and the output is C Y, with D the softmax of x phi over the tokens and C that over all
    slots. Products take operands in the type of `x` and add up in float32; the weights D and C and
    the outputs of the experts are rounded to the type of `x` before the products that use them.

    Args:
        x: tokens `[b, n, d]`.
        phi: slot parameters `[d, e, p]` for e experts of p slots.
        w_down, b_down: stacked down-projections `[e, d, r]` and `[e, r]`.
        w_up, b_up: stacked up-projections `[e, r, d]` and `[e, d]`.
        mask: False for tokens that are masked out: they are not dispatched, and their output is
            zero. None for none.
        normalize: scale tokens to unit length in the scores (not in the slots).
        implementation: `"xla"`, `"tpu"`, `"gpu"`, `"reference"` (which alone has forward-mode
            derivatives), or None for the fastest on the platform that the program is compiled for
            (`aatjax_kernels.selection`).
        interpret: run a named kernel in Pallas's interpreter, on any platform.

    Returns:
        `[b, n, d]` in the type of `x`. Scores, softmaxes and sums are float32.

    Raises:
        ValueError: an array has a type or shape that does not fit (the message says which); an
            implementation of that name does not exist, does not take these shapes or,
            when the program is compiled, does not run on its platform; or a kernel was named and
            the mesh in use cannot split the batch evenly.
    """
    check_name("soft_moe", implementation, get_args(SoftMoeImplementation))
    arrays = (x, phi, w_down, b_down, w_up, b_up)
    check_arrays(
        "soft_moe",
        x=(x, "b n d"),
        phi=(phi, "d e p"),
        w_down=(w_down, "e d r"),
        b_down=(b_down, "e r"),
        w_up=(w_up, "e r d"),
        b_up=(b_up, "e d"),
        mask=(mask, "b n"),
    )

    def run(*arrays: Any) -> Array:
        *given, mask = arrays
        x, mask_of_device = mesh.divide((given[0], mask))
        name = implementation or selection.select(OP, x, *given[1:], mask_of_device)
        if name == "reference":
            return reference.soft_moe(*given, mask=mask, normalize=normalize)
        unasked = selection.parse_choice(selection.read_choice()) if name is None else (name,)
        options = KernelOptions(interpret, normalize)
        choice = fused.choose_soft_moe(implementation, options, unasked, *given, mask)
        return fused.soft_moe(choice, *given, mask)

    return mesh.follow_sharding(run, *arrays, mask)


def _count(x: Any, phi: Any, *_: Any) -> float:
    return 6.0 * x.size * phi.shape[1] * phi.shape[2]


OP = selection.Op(
    "soft_moe",
    {
        "cpu": ("xla", "reference"),
        "cuda": ("xla", "gpu", "reference"),
        "tpu": ("tpu", "xla"),
    },
    (0, 6),
    lambda name, *arrays: soft_moe(*arrays[:6], mask=arrays[6], implementation=name),
    _count,
)
"""What may run where none is named."""
