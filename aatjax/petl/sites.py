"""Places in a block that methods adapt, and the adapter blocks that they put there."""

import dataclasses
import re
from collections.abc import Sequence
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


def list_blocks(method: Any, depth: int) -> list[int]:
    """Return the numbers of the blocks that a method adapts, in order.

    Its field `blocks` is None for all, `last3` or `first3` for that number, or a tuple of numbers
    from 0 (the first block) or -1 (the last).

    Raises:
        UsageError: it is none of these, or the model has no such block.
    """
    blocks, text = method.blocks, f"{type(method).__name__} blocks={method.blocks!r}"
    if blocks is None:
        return list(range(depth))
    if not isinstance(blocks, Sequence) or isinstance(blocks, str):
        form = re.fullmatch(r"(first|last)([1-9]\d*)", str(blocks))
        if form is None:
            raise UsageError(f"{text}: give a tuple of numbers, or a word such as 'last3'")
        count = int(form[2])
        if count > depth:
            raise UsageError(f"{text}: the model has {depth} blocks")
        return list(range(count) if form[1] == "first" else range(depth - count, depth))
    numbers = sorted({number + depth if number < 0 else number for number in blocks})
    if not numbers or len(numbers) < len(blocks) or not 0 <= numbers[0] <= numbers[-1] < depth:
        raise UsageError(f"{text}: give different numbers from 0 to {depth - 1}")
    return numbers


@dataclasses.dataclass(frozen=True)
class BlockShape:
    """An adapter block `[b, n, d] -> [b, n, d]`; options that its kind does not have are ignored.

    Attributes:
        kind: `bottleneck`, `conformer` or `convpass`.
        dim: token width d.
        width: bottleneck width r.
        dtype: compute type.
        kernel: tokens of a conformer's convolution.
        norm: whether a conformer starts with a LayerNorm.
        as_published: compute, and start from, what the published code does.
    """

    kind: Expert
    dim: int
    width: int
    dtype: jnp.dtype
    kernel: int = 8
    norm: bool = True
    as_published: bool = False

    @property
    def init(self) -> Init:
        """Start of the last projection."""
        return "normal" if self.as_published else "identity"

    def make(self, rngs: nnx.Rngs) -> nnx.Module:
        """Return a block with new weights."""
        options: dict[str, Any] = dict(dtype=self.dtype, init=self.init, rngs=rngs)
        if self.kind == "bottleneck":
            return Bottleneck(self.dim, self.width, **options)
        if self.kind == "convpass":
            return Convpass(self.dim, self.width, uses_conv=not self.as_published, **options)
        options |= dict(kernel=self.kernel, norm=self.norm, uses_norm=not self.as_published)
        return Conformer(self.dim, self.width, **options)
