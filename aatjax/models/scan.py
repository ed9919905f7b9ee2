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
from aatjax.models.copies import call_copy
from aatjax.models.tokens import FirstTokens, Mask, Tokens, call_first


def run_blocks(
    blocks: Sequence[nnx.Module],
    x: Tokens,
    mask: Mask | None = None,
    *,
    count: int | None = None,
    scan: bool,
    remat: bool,
    first_trained: int | None = None,
) -> FirstTokens:
    """Apply the blocks in order.

    Args:
        blocks: modules that map `[b, n, d]` to `[b, n, d]`.
        x: tokens.
        mask: which tokens hold sound; None is all.
        count: return the first tokens only; the last block, which then runs outside the scan,
            computes no others where its modules allow that (`aatjax.models.tokens.call_first`).
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
        return x[:, :count]
    x = ops.over_batch_only(x)
    counts = [*[None] * (len(blocks) - 1), count]
    if not scan and not remat:
        for block, its_count in zip(blocks, counts, strict=True):
            x = ops.over_batch_only(call_first(block, x, mask, its_count))
        return x

    parts = [nnx.split(block) for block in blocks]

    def body(x: Array, state: Any, graphdef: Any, count: int | None) -> tuple[Array, Any]:
        def run(block: nnx.Module) -> Array:
            return ops.over_batch_only(call_first(block, x, mask, count))

        return call_copy(graphdef, state, run)

    if remat:
        body = jax.checkpoint(body, static_argnums=(2, 3))
    alone = [] if first_trained is None else [first_trained]
    alone += [] if count is None else [len(blocks) - 1]
    for group in _group(len(blocks), alone) if scan else [[i] for i in range(len(blocks))]:
        graphdef = parts[group[0]][0]
        for index in group:
            if parts[index][0] != graphdef or _shapes(parts[index]) != _shapes(parts[group[0]]):
                raise UsageError(
                    f"scan=True needs equal blocks, but block {index} differs from block "
                    f"{group[0]} in what is adapted or trained: use scan=False"
                )
        x, states = _scan(body, x, [parts[index] for index in group], counts[group[-1]])
        for index, state in zip(group, states, strict=True):
            nnx.update(blocks[index], state)
    return x


def _group(count: int, alone: Sequence[int]) -> list[range]:
    """Blocks that share a body: some alone, and those before, between and after them."""
    ends = sorted({0, count, *alone, *(index + 1 for index in alone)})
    return [range(*pair) for pair in itertools.pairwise(ends)]


def _scan(body: Any, x: Array, parts: list[Any], count: int | None) -> tuple[Array, list[Any]]:
    """Apply one body to the parts of each block; return the tokens and the blocks' new states."""
    graphdef = parts[0][0]
    if len(parts) == 1:
        x, state = body(x, parts[0][1], graphdef, count)
        return x, [state]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[part[1] for part in parts])
    x, states = jax.lax.scan(lambda x, state: body(x, state, graphdef, None), x, stacked)
    return x, [jax.tree.map(lambda leaf, i=i: leaf[i], states) for i in range(len(parts))]


def _shapes(part: Any) -> Any:
    leaves, structure = jax.tree.flatten(part[1])
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]
