"""Running a list of blocks: one after the other, or as one scanned body; with or without remat."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from aatjax import ops
from aatjax.errors import UsageError


def masked(module: Any, x: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None) -> Any:
    """Calls a module on tokens; without a mask as `module(x)`, so that it need not know masks."""
    return module(x) if mask is None else module(x, mask)


def run_blocks(
    blocks: Sequence[nnx.Module],
    x: Float[Array, "b n d"],
    mask: Bool[Array, "b n"] | None = None,
    *,
    scan: bool,
    remat: bool,
) -> Float[Array, "b n d"]:
    """Applies the blocks in order to tokens `[b, n, d]`.

    Args:
        blocks: modules that map `[b, n, d]` to `[b, n, d]`.
        x: tokens.
        mask: which tokens hold sound; None where all do.
        scan: stack the blocks' weights and scan one body over them: compiles once whatever the
            depth. State that a block updates (batch statistics) is written back.
        remat: keep only each block's input for the backward pass and recompute the rest.

    Raises:
        UsageError: `scan` was asked for, but the blocks differ in structure.
    """
    x = ops.over_batch_only(x)
    if not scan and not remat:
        for block in blocks:
            x = ops.over_batch_only(masked(block, x, mask))
        return x

    parts = [nnx.split(block, nnx.Param, ...) for block in blocks]

    def body(x: Array, states: tuple[Any, Any], graphdef: Any) -> tuple[Array, Any]:
        block = nnx.merge(graphdef, *states, copy=True)
        y = ops.over_batch_only(masked(block, x, mask))
        return y, nnx.split(block, nnx.Param, ...)[2]

    if remat:
        body = jax.checkpoint(body, static_argnums=2)
    if not scan:
        for block, (graphdef, params, rest) in zip(blocks, parts, strict=True):
            x, rest = body(x, (params, rest), graphdef)
            nnx.update(block, rest)
        return x

    graphdef = parts[0][0]
    for index, part in enumerate(parts):
        if part[0] != graphdef or _shapes(part[1:]) != _shapes(parts[0][1:]):
            raise UsageError(
                f"scan=True needs equal blocks, but block {index} differs from block 0 in what is "
                "adapted or trained: use scan=False"
            )
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[part[1:] for part in parts])
    x, rest = jax.lax.scan(lambda x, states: body(x, states, graphdef), x, stacked)
    for index, block in enumerate(blocks):
        nnx.update(block, jax.tree.map(lambda leaf, index=index: leaf[index], rest))
    return x


def _shapes(tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]
