"""Scaled dot-product attention.

`reference` is the truth in plain einsums; `blocked` the same without keeping the weights, on CPU a
few heads at a time; `tpu` and `gpu` are Pallas kernels; `cudnn` and `tokamax` are libraries.
"""

import functools
from typing import Any, Literal, get_args

from jax import lax
from jaxtyping import Array, Bool, Float

from aatjax_kernels import dispatch, mesh, selection
from aatjax_kernels.arguments import check_arrays
from aatjax_kernels.attention import fused, reference
from aatjax_kernels.attention.libraries import LIBRARIES, explain_unsupported
from aatjax_kernels.attention.reference import weights

AttentionImplementation = Literal["blocked", "tpu", "gpu", "cudnn", "tokamax", "reference"]

__all__ = ["OP", "AttentionImplementation", "attention", "weights"]


def attention(
    query: Float[Array, "b n h k"],
    key: Float[Array, "b m h k"],
    value: Float[Array, "b m h k"],
    *,
    mask: Bool[Array, "b m"] | None = None,
    implementation: AttentionImplementation | None = None,
    interpret: bool = False,
) -> Float[Array, "b n h k"]:
    """softmax(Q K^T / sqrt(k)) V with a float32 softmax (Vaswani et al. 2017, eq. 1).

    Args:
        query: `[b, n, h, k]`.
        key: `[b, m, h, k]`.
        value: `[b, m, h, k]`.
        mask: False for keys that are masked out; None for none. Each clip needs one True.
        implementation: `"blocked"`, `"tpu"`, `"gpu"`, `"cudnn"`, `"tokamax"`, `"reference"` (which
            alone has forward-mode derivatives), or None for the fastest on the platform that the
            program is compiled for (`aatjax_kernels.selection`).
        interpret: run the kernel in Pallas's interpreter, on any platform.

    Returns:
        `[b, n, h, k]` in the type of `value`.

    Raises:
        ValueError: an array has a type or shape that does not fit (the message says which); an
            implementation of that name does not exist, does not take these shapes or,
            when the program is compiled, does not run on its platform; or a kernel was named and
            the mesh in use cannot split the batch or the heads evenly.
    """
    check_arrays(
        "attention",
        query=(query, "b n h k"),
        key=(key, "b m h k"),
        value=(value, "b m h k"),
        mask=(mask, "b m"),
    )
    dispatch.check_name("attention", implementation, get_args(AttentionImplementation))

    def run(*arrays: Any) -> Array:
        local = mesh.divide(arrays, fused.head_axes(arrays))
        name = implementation or selection.select(OP, *local)
        if name == "reference":
            return reference.attention(*arrays)
        unasked = selection.parse_choice(selection.read_choice()) if name is None else (name,)
        if implementation in LIBRARIES:
            reason = explain_unsupported(implementation, local[0])
            dispatch.check_supported("attention", implementation, "blocked", reason)
            return _run_library(implementation, *arrays)
        uneven = mesh.explain_uneven(arrays[0].shape[0], arrays[0].shape[2])
        choice = fused.choose_attention(implementation, local, unasked, uneven, interpret)
        ours = functools.partial(fused.attention, choice)
        for library in unasked:
            if library in LIBRARIES and explain_unsupported(library, local[0]) is None:
                theirs = functools.partial(_run_library, library)
                return lax.platform_dependent(*arrays, cuda=theirs, default=ours)
        return ours(*arrays)

    return mesh.follow_sharding(run, query, key, value, mask)


def _run_library(name: str, *arrays: Any) -> Array:
    """Call a library on every device with its own clips and heads."""
    return mesh.over_heads(lambda own: LIBRARIES[name](*own), arrays, fused.head_axes(arrays), 2)


def _count(query: Any, key: Any, *_: Any) -> float:
    return 4.0 * query.size * key.shape[1]


OP = selection.Op(
    "attention",
    {
        "cpu": ("blocked", "reference"),
        "cuda": ("cudnn", "blocked", "tokamax", "gpu", "reference"),
        "tpu": ("tpu", "blocked"),
    },
    (0, 1, 2, 3),
    lambda name, query, key, value, mask: attention(
        query, key, value, mask=mask, implementation=name
    ),
    _count,
)
"""What may run where none is named."""
