"""A method of one's own in one file: plain Flax layers that are trained, saved and loaded."""

import dataclasses
from typing import ClassVar

import jax
from flax import nnx
from jax import Array

import aatjax
from aatjax import data, petl, surgery
from aatjax.models.tokens import call_masked


class GatedMlp(nnx.Module):
    """An MLP with a small gated layer beside it."""

    def __init__(self, base: nnx.Module, dim: int, width: int, rngs: nnx.Rngs) -> None:
        self.base = base
        self.gate = nnx.Linear(dim, width, rngs=rngs)
        self.value = nnx.Linear(dim, width, rngs=rngs)
        self.back = nnx.Linear(width, dim, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        extra = self.back(jax.nn.silu(self.gate(x)) * self.value(x))
        return call_masked(self.base, x, mask) + extra


@dataclasses.dataclass(frozen=True)
class Gate(petl.Method):
    """Gated layers beside the MLPs; the identity at first."""

    name: ClassVar[str] = "gate"
    width: int = 8

    def inject(self, model: aatjax.AST, *, rngs: nnx.Rngs) -> None:
        """Wrap every MLP; its path names it."""
        dim = model.config.dim
        surgery.wrap(model, "blocks/*/mlp", lambda _, mlp: GatedMlp(mlp, dim, self.width, rngs))


sounds = data.Synthetic(("frog", "rain", "siren"), clips=8, seconds=1.0)
model = aatjax.adapt(aatjax.load("embedded", num_classes=3, frames=98), Gate(width=4))
print(aatjax.summary(model))
run = aatjax.fit(model, sounds, sounds, epochs=3, lr=3e-3, show=False)
path = run.save("gate.safetensors")
print(aatjax.load_adapter(path).model.method)
