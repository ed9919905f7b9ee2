"""Scaled dot-product attention.

`reference` is the truth in plain einsums; `blocked` the same without keeping the weights, on CPU a
few heads at a time; `tpu` and `gpu` are Pallas kernels.
"""

from typing import Literal, get_args

from jaxtyping import Array, Bool, Float

from aatjax_kernels import dispatch, mesh
from aatjax_kernels.arguments import check_arrays
from aatjax_kernels.attention import fused, reference
from aatjax_kernels.attention.reference import weights

AttentionImplementation = Literal["blocked", "tpu", "gpu", "reference"]

__all__ = ["AttentionImplementation", "attention", "weights"]


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
        implementation: `"blocked"`, `"tpu"`, `"gpu"`, `"reference"` (which alone has forward-mode
            derivatives), or None for the fastest on the platform that the program is compiled for.
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

    def run(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
        if implementation == "reference":
            return reference.attention(query, key, value, mask)
        choice = fused.choose_attention(implementation, query, key, mask, interpret)
        return fused.attention(choice, query, key, value, mask)

    return mesh.follow_sharding(run, query, key, value, mask)
