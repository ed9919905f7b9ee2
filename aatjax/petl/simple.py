"""Methods that add no modules: train the head, a part of the model, or all of it."""

import dataclasses
from typing import ClassVar

from flax import nnx

from aatjax import surgery
from aatjax.models.ast import AST, Head
from aatjax.models.config import Pooling
from aatjax.models.pool import make_pool
from aatjax.petl.base import Method
from aatjax.petl.published_start import start_as_aat, start_as_petl
from aatjax.petl.sites import list_blocks


@dataclasses.dataclass(frozen=True)
class Linear(Method):
    """Linear probe: the head and the last LayerNorm before it, on a frozen body.

    Trains 2D + (D + 1)C parameters, with the head's own LayerNorm ("head" in arXiv 2401.10544) or
    the body's final one ("linear" in arXiv 2312.03694).

    Attributes:
        as_published: zero positions and a uniform head (`start_as_petl`), as in the code of
            arXiv 2312.03694.
    """

    name: ClassVar[str] = "linear"
    rates: ClassVar[tuple[float, float]] = (1e-3, 1e-2)

    as_published: bool = False

    def inject(self, model: AST, *, rngs: nnx.Rngs) -> None:
        """Add nothing: the head is trained by every method."""
        if self.as_published:
            start_as_petl(model, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class Ridge(Method):
    """Ridge regression on pooled features of the frozen model, solved in closed form.

    One pass over the training clips, without augmentation and gradients. The penalty is the best
    for training clips left out, those of a recording or speaker together
    (`aatjax.train.ridge.fit_ridge`). The head is linear, without a LayerNorm: (P + 1)C parameters,
    with `stats` P = 3D.

    Attributes:
        pool: pooling of the tokens, see `ASTConfig`; None is the model's if that is `bands`, and
            else `stats`.
    """

    name: ClassVar[str] = "ridge"
    trains_last_norm: ClassVar[bool] = False
    closed_form: ClassVar[bool] = True

    pool: Pooling | None = None

    def inject(self, model: AST, *, rngs: nnx.Rngs) -> None:
        """Replace `pool` and `head`."""
        pool = self.pool or ("bands" if model.config.pool == "bands" else "stats")
        config = dataclasses.replace(model.config, pool=pool, head_norm=False)
        model.config = config
        model.pool, model.head = make_pool(config, rngs=rngs), Head(config, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class Full(Method):
    """Full fine-tuning: every parameter of the model, positions included.

    Attributes:
        as_published: positions start at zero and the head uniform (`start_as_petl`), as in the code
            of arXiv 2312.03694.
    """

    name: ClassVar[str] = "full"
    rates: ClassVar[tuple[float, float]] = (5e-5, 5e-4)

    as_published: bool = False

    def inject(self, model: AST, *, rngs: nnx.Rngs) -> None:
        """Mark every parameter as trainable."""
        surgery.unfreeze(model, "**")
        if self.as_published:
            start_as_petl(model, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class Partial(Method):
    """The last half of the blocks and the head (AAT's baseline "partial", arXiv 2401.10544).

    The body's final LayerNorm stays frozen if the head has its own. AST-base: 42,527,232
    parameters and the head.

    Attributes:
        as_published: the head starts as in AAT's code (`start_as_aat`).
        blocks: which blocks are trained, see `petl.sites.list_blocks`; None is the last half.
    """

    name: ClassVar[str] = "partial"
    rates: ClassVar[tuple[float, float]] = (5e-5, 5e-4)

    as_published: bool = False
    blocks: str | tuple[int, ...] | None = None

    def inject(self, model: AST, *, rngs: nnx.Rngs) -> None:
        """Mark `blocks/N/**`."""
        depth = model.config.depth
        half = f"last{depth - depth // 2}"
        chosen = self.replace(blocks=half) if self.blocks is None else self
        for number in list_blocks(chosen, depth):
            surgery.unfreeze(model, f"blocks/{number}/**")
        if self.as_published:
            start_as_aat(model, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class BitFit(Method):
    """The biases of all linear layers and LayerNorms of the body (Ben Zaken et al. 2022), and head.

    Not the bias of the patch embedding, and no scale of a LayerNorm, not even of the final one
    (arXiv 2312.03694). AST-base: 102,144 parameters and the head.

    Attributes:
        as_published: zero positions and a uniform head (`start_as_petl`), as in the code of
            arXiv 2312.03694.
        blocks: which blocks are trained, see `petl.sites.list_blocks`; None is all.
    """

    name: ClassVar[str] = "bitfit"
    trains_last_norm: ClassVar[bool] = False

    as_published: bool = False
    blocks: str | tuple[int, ...] | None = None

    def inject(self, model: AST, *, rngs: nnx.Rngs) -> None:
        """Mark every `bias` of the blocks and of the final LayerNorm."""
        for block in list_blocks(self, model.config.depth):
            for pattern in ("*/*/bias", "*/bias"):
                surgery.unfreeze(model, f"blocks/{block}/{pattern}")
        surgery.unfreeze(model, "norm/bias")
        if self.as_published:
            start_as_petl(model, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class LayerNormTuning(Method):
    """Every LayerNorm of the body, scales and biases, and the head: 2D(2 blocks + 1) parameters.

    Attributes:
        blocks: which blocks are trained, see `petl.sites.list_blocks`; None is all.
    """

    name: ClassVar[str] = "layer_norm"

    blocks: str | tuple[int, ...] | None = None

    def inject(self, model: AST, *, rngs: nnx.Rngs) -> None:
        """Mark `blocks/*/ln1`, `blocks/*/ln2` and `norm`."""
        for block in list_blocks(self, model.config.depth):
            surgery.unfreeze(model, f"blocks/{block}/ln?/*")
        surgery.unfreeze(model, "norm/*")
