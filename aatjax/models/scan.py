"""Runs a list of blocks: one after the other or as one scanned body, with or without remat."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from aatjax import ops
from aatjax.errors import UsageError
from aatjax.models.tokens import Mask, Tokens, call_masked


def run_blocks(
    blocks: Sequence[nnx.Module],
    x: Tokens,
    mask: Mask | None = None,
    *,
    scan: bool,
    remat: bool,
    first_trained: int | None = None,
) -> Tokens:
    """Apply the blocks in order.

    Args:
        blocks: modules that map `[b, n, d]` to `[b, n, d]`.
        x: tokens.
        mask: which tokens hold sound; None is all.
        scan: stack the weights of the blocks and scan one body over them, so that the time to
            compile does not grow with the depth. State that a block updates (batch statistics) is
            written back.
        remat: keep only the input of each block for the backward pass and recompute the rest.
        first_trained: index of the first block with a trained parameter, if the tokens depend on
            none. This block runs outside the scan: inside, the gradient would be carried on to the
            blocks below it.

    Raises:
        UsageError: `scan`, and blocks that would share a body differ in structure.
    """
    if not blocks:
        return x
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
    for group in _group(len(blocks), first_trained) if scan else [[i] for i in range(len(blocks))]:
        graphdef = parts[group[0]][0]
        for index in group:
            if parts[index][0] != graphdef or _shapes(parts[index]) != _shapes(parts[group[0]]):
                raise UsageError(
                    f"scan=True needs equal blocks, but block {index} differs from block "
                    f"{group[0]} in what is adapted or trained: use scan=False"
                )
        x, states = _scan(body, x, [parts[index] for index in group])
        for index, state in zip(group, states, strict=True):
            nnx.update(blocks[index], state)
    return x


def _group(count: int, first: int | None) -> list[range]:
    """Blocks that share a body: those below the first trained one, that one, those above it."""
    ends = sorted({0, count} if first is None else {0, first, first + 1, count})
    return [range(*pair) for pair in itertools.pairwise(ends)]


def _scan(body: Any, x: Array, parts: list[Any]) -> tuple[Array, list[Any]]:
    """Apply one body to the parts of each block; return the tokens and the blocks' new states."""
    graphdef = parts[0][0]
    if len(parts) == 1:
        x, state = body(x, parts[0][1:], graphdef)
        return x, [state]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[part[1:] for part in parts])
    x, states = jax.lax.scan(lambda x, states: body(x, states, graphdef), x, stacked)
    return x, [jax.tree.map(lambda leaf, i=i: leaf[i], states) for i in range(len(parts))]


def _shapes(part: Any) -> Any:
    leaves, structure = jax.tree.flatten(part[1:])
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]
