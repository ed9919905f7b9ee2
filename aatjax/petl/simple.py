"""Methods that add nothing: train the head alone, or everything."""

import dataclasses
from typing import ClassVar

from flax import nnx

from aatjax import surgery
from aatjax.models.ast import AST
from aatjax.petl.base import Method


@dataclasses.dataclass(frozen=True)
class Linear(Method):
    """Linear probe: the head, and the last LayerNorm before it, on a frozen body.

    Trainable: 2D + (D + 1)C parameters, whether the LayerNorm is the head's own ("head" in
    arXiv 2401.10544) or the body's final one ("linear" in arXiv 2312.03694).
    """

    name: ClassVar[str] = "linear"

    def inject(self, model: AST, *, rngs: nnx.Rngs) -> None:
        """Nothing is added: the head is trained by every method."""


@dataclasses.dataclass(frozen=True)
class Full(Method):
    """Full fine-tuning: every parameter of the model, positions included."""

    name: ClassVar[str] = "full"

    def inject(self, model: AST, *, rngs: nnx.Rngs) -> None:
        """Marks every parameter as trainable."""
        surgery.retag(model, "**")
