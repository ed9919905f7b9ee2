"""Places in a block that methods adapt, and adapter blocks by name."""

from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx

from aatjax.errors import UsageError
from aatjax.petl.bottleneck import Bottleneck, Init
from aatjax.petl.conformer import Conformer
from aatjax.petl.convpass import Convpass

Expert = Literal["bottleneck", "conformer", "convpass"]
Location = Literal["mhsa", "ffn", "both"]


def list_sites(location: Location) -> list[tuple[str, str]]:
    """Return (sub-layer, LayerNorm in front of it) of each site in a block."""
    known = {"mhsa": ("attn", "ln1"), "ffn": ("mlp", "ln2")}
    return list(known.values()) if location == "both" else [known[location]]


def list_blocks(method: Any, depth: int) -> list[str]:
    """Return globs of the blocks that a method adapts: all, or the last `method.last_blocks`.

    Raises:
        UsageError: more than the model has.
    """
    last, name = method.last_blocks, type(method).__name__
    if last is None:
        return ["blocks/*"]
    if last > depth:
        raise UsageError(f"{name} last_blocks={last}: the model has {depth} blocks")
    return [f"blocks/{number}" for number in range(depth - last, depth)]


def make_block(
    kind: Expert,
    dim: int,
    width: int,
    *,
    kernel: int,
    norm: bool,
    dtype: jnp.dtype,
    init: Init,
    as_published: bool,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """Return an adapter block `[b, n, d] -> [b, n, d]`; options that it does not have are ignored.

    Args:
        kind: `bottleneck`, `conformer` or `convpass`.
        dim: token width d.
        width: bottleneck width.
        kernel: tokens of a conformer's convolution.
        norm: whether a conformer starts with a LayerNorm.
        dtype: compute type.
        init: `identity` or `normal`.
        as_published: compute what the published code computes.
        rngs: source of the initial weights.
    """
    if kind == "bottleneck":
        return Bottleneck(dim, width, dtype=dtype, rngs=rngs, init=init)
    if kind == "convpass":
        uses_conv = not as_published
        return Convpass(dim, width, dtype=dtype, rngs=rngs, init=init, uses_conv=uses_conv)
    return Conformer(
        dim,
        width,
        kernel=kernel,
        norm=norm,
        uses_norm=not as_published,
        dtype=dtype,
        init=init,
        rngs=rngs,
    )
