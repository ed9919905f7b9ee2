"""What methods choose from: sites in a block, adapter blocks by name, bottleneck widths."""

from typing import Literal

import jax.numpy as jnp
from flax import nnx

from aatjax.errors import UsageError
from aatjax.petl.bottleneck import Bottleneck, Init
from aatjax.petl.conformer import Conformer
from aatjax.petl.convpass import Convpass

Expert = Literal["bottleneck", "conformer", "convpass"]
Location = Literal["mhsa", "ffn", "both"]


def sites(location: Location) -> list[tuple[str, str]]:
    """(sub-layer, LayerNorm in front of it) of each site in a block."""
    known = {"mhsa": ("attn", "ln1"), "ffn": ("mlp", "ln2")}
    return list(known.values()) if location == "both" else [known[location]]


def block_paths(method: str, depth: int, last_blocks: int | None) -> list[str]:
    """Globs of the blocks that a method adapts: all of them, or the last so many.

    Raises:
        UsageError: fewer than one, or more than the model has.
    """
    if last_blocks is None:
        return ["blocks/*"]
    if not 1 <= last_blocks <= depth:
        raise UsageError(f"{method} last_blocks={last_blocks}: the model has {depth} blocks")
    return [f"blocks/{number}" for number in range(depth - last_blocks, depth)]


def bottleneck_width(dim: int, reduction: float) -> int:
    """r = round(D / reduction), at least 1."""
    return max(1, round(dim / reduction))


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
    """An adapter block `[b, n, d] -> [b, n, d]` by name; a choice that it has not is ignored."""
    match kind:
        case "bottleneck":
            return Bottleneck(dim, width, dtype=dtype, rngs=rngs, init=init)
        case "conformer":
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
        case _:
            return Convpass(
                dim, width, dtype=dtype, init=init, uses_conv=not as_published, rngs=rngs
            )
