"""Running a list of blocks: one after the other, or as one scanned body; with or without remat."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from aatjax import ops
from aatjax.errors import UsageError


def call_masked(module: Any, x: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None) -> Any:
    """Calls a module on tokens; without a mask as `module(x)`, so that it need not know masks."""
    return module(x) if mask is None else module(x, mask)


def run_blocks(
    blocks: Sequence[nnx.Module],
    x: Float[Array, "b n d"],
    mask: Bool[Array, "b n"] | None = None,
    *,
    scan: bool,
    remat: bool,
    first_trained: int | None = None,
) -> Float[Array, "b n d"]:
    """Applies the blocks in order to tokens `[b, n, d]`.

    Args:
        blocks: modules that map `[b, n, d]` to `[b, n, d]`.
        x: tokens.
        mask: which tokens hold sound; None where all do.
        scan: stack the blocks' weights and scan one body over them: compiles once whatever the
            depth. State that a block updates (batch statistics) is written back.
        remat: keep only each block's input for the backward pass and recompute the rest.
        first_trained: the first block that has a trained parameter, if the tokens come from none.
            It runs outside the scan, whose body knows no first one: the gradient then stops in it
            and never reaches the blocks below.

    Raises:
        UsageError: `scan` was asked for, but the blocks that would share a body differ in
            structure.
    """
    x = ops.over_batch_only(x)
    if not scan and not remat:
        for block in blocks:
            x = ops.over_batch_only(call_masked(block, x, mask))
        return x

    parts = [nnx.split(block, nnx.Param, ...) for block in blocks]

    def body(x: Array, states: tuple[Any, Any], graphdef: Any) -> tuple[Array, Any]:
        block = nnx.merge(graphdef, *states, copy=True)
        y = ops.over_batch_only(call_masked(block, x, mask))
        return y, nnx.split(block, nnx.Param, ...)[2]

    if remat:
        body = jax.checkpoint(body, static_argnums=2)
    if not scan:
        for block, (graphdef, params, rest) in zip(blocks, parts, strict=True):
            x, rest = body(x, (params, rest), graphdef)
            nnx.update(block, rest)
        return x

    for group in _shared(len(blocks), first_trained):
        graphdef = parts[group[0]][0]
        for index in group:
            if parts[index][0] != graphdef or _shapes(parts[index]) != _shapes(parts[group[0]]):
                raise UsageError(
                    f"scan=True needs equal blocks, but block {index} differs from block "
                    f"{group[0]} in what is adapted or trained: use scan=False"
                )
        x, rest = _scanned(body, x, [parts[index] for index in group])
        for index, state in zip(group, rest, strict=True):
            nnx.update(blocks[index], state)
    return x


def _shared(count: int, first: int | None) -> list[range]:
    """Which blocks share a scanned body: those below the first trained one, it, those above."""
    ends = sorted({0, count} if first is None else {0, first, first + 1, count})
    return [range(*pair) for pair in itertools.pairwise(ends)]


def _scanned(body: Any, x: Array, parts: list[Any]) -> tuple[Array, list[Any]]:
    """One body over the blocks' parts; their new states beside the tokens."""
    graphdef = parts[0][0]
    if len(parts) == 1:
        x, rest = body(x, parts[0][1:], graphdef)
        return x, [rest]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[part[1:] for part in parts])
    x, rest = jax.lax.scan(lambda x, states: body(x, states, graphdef), x, stacked)
    return x, [jax.tree.map(lambda leaf, i=i: leaf[i], rest) for i in range(len(parts))]


def _shapes(part: Any) -> Any:
    leaves, structure = jax.tree.flatten(part[1:])
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]
