"""Methods that add nothing: train the head alone, some of what is there, or everything."""

import dataclasses
from typing import ClassVar

from flax import nnx

from aatjax import surgery
from aatjax.errors import UsageError
from aatjax.models.ast import AST
from aatjax.petl.base import Method, zero_positions


@dataclasses.dataclass(frozen=True)
class Linear(Method):
    """Linear probe: the head, and the last LayerNorm before it, on a frozen body.

    Trainable: 2D + (D + 1)C parameters, whether the LayerNorm is the head's own ("head" in
    arXiv 2401.10544) or the body's final one ("linear" in arXiv 2312.03694).
    as_published=True: zero positions, as in the code of arXiv 2312.03694.

    Attributes:
        as_published: see above.
    """

    name: ClassVar[str] = "linear"

    as_published: bool = False

    def inject(self, model: AST, *, rngs: nnx.Rngs) -> None:
        """Nothing is added: the head is trained by every method."""
        if self.as_published:
            zero_positions(model)


@dataclasses.dataclass(frozen=True)
class Full(Method):
    """Full fine-tuning: every parameter of the model, positions included.

    as_published=True: the positions start at zero, as in the code of arXiv 2312.03694.

    Attributes:
        as_published: see above.
    """

    name: ClassVar[str] = "full"

    as_published: bool = False

    def inject(self, model: AST, *, rngs: nnx.Rngs) -> None:
        """Marks every parameter as trainable."""
        surgery.retag(model, "**")
        if self.as_published:
            zero_positions(model)


@dataclasses.dataclass(frozen=True)
class Partial(Method):
    """The last half of the blocks and the head (AAT's "partial" baseline, arXiv 2401.10544).

    The body's final LayerNorm stays frozen where the head has its own. For AST-base and the half:
    42,527,232 parameters and the head.

    Attributes:
        blocks: how many of the last blocks; None is half of them.
    """

    name: ClassVar[str] = "partial"

    blocks: int | None = None

    def __post_init__(self) -> None:
        if self.blocks is not None and self.blocks < 1:
            raise UsageError(f"Partial blocks={self.blocks} must be at least 1")

    def inject(self, model: AST, *, rngs: nnx.Rngs) -> None:
        """Marks `blocks/N/**` of the last blocks."""
        depth = model.config.depth
        count = depth - depth // 2 if self.blocks is None else self.blocks
        if count > depth:
            raise UsageError(f"Partial blocks={count}, but the model has {depth}")
        for number in range(depth - count, depth):
            surgery.retag(model, f"blocks/{number}/**")


@dataclasses.dataclass(frozen=True)
class BitFit(Method):
    """The biases of every linear layer and LayerNorm of the body (Ben Zaken et al. 2022), and head.

    Not the patch embedding's bias, and no LayerNorm scale, not even the final one's
    (arXiv 2312.03694). 102,144 parameters in AST-base, and the head.
    as_published=True: zero positions.

    Attributes:
        as_published: see above.
    """

    name: ClassVar[str] = "bitfit"
    trains_last_norm: ClassVar[bool] = False

    as_published: bool = False

    def inject(self, model: AST, *, rngs: nnx.Rngs) -> None:
        """Marks every `bias` of the blocks and of the final LayerNorm."""
        for pattern in ("blocks/*/*/*/bias", "blocks/*/*/bias", "norm/bias"):
            surgery.retag(model, pattern)
        if self.as_published:
            zero_positions(model)


@dataclasses.dataclass(frozen=True)
class LayerNormTuning(Method):
    """Every LayerNorm of the body, scales and biases, and the head: 2D(2 blocks + 1) parameters."""

    name: ClassVar[str] = "layer_norm"

    def inject(self, model: AST, *, rngs: nnx.Rngs) -> None:
        """Marks `blocks/*/ln1`, `blocks/*/ln2` and `norm`."""
        for pattern in ("blocks/*/ln1/*", "blocks/*/ln2/*", "norm/*"):
            surgery.retag(model, pattern)
