"""`aatjax methods`: what every method of the papers' tables would train and cost on a model."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from aatjax import surgery
from aatjax.analysis import flops
from aatjax.models.ast import AST
from aatjax.models.config import ASTConfig
from aatjax.models.summary import summary
from aatjax.petl import TABLE, Method, adapt


@dataclasses.dataclass(frozen=True)
class Cost:
    """One method on one model.

    Attributes:
        name: its row.
        method: the method.
        trainable: parameters that it trains, head included.
        share: the same over all parameters of the model before adaptation.
        flops: what it adds to a forward pass of one clip, products only (it may be negative:
            prompts that replace a token, say).
    """

    name: str
    method: Method
    trainable: int
    share: float
    flops: int

    @property
    def placement(self) -> str:
        """The fields of the method that are not at their defaults, as `name=value`."""
        plain = type(self.method)
        changed = []
        for field in dataclasses.fields(self.method):
            value = getattr(self.method, field.name)
            if value != getattr(plain(), field.name):
                changed.append(f"{field.name}={value}")
        return ", ".join(changed)


def compare(config: ASTConfig, methods: Mapping[str, Method] = TABLE) -> list[Cost]:
    """The cost of each method on a model of that shape; nothing is allocated or computed."""
    plain: AST = nnx.eval_shape(lambda: AST(config, rngs=nnx.Rngs(0)))
    total = summary(plain).total
    before = _flops(plain)
    rows = []
    for name, method in methods.items():
        adapted: AST = nnx.eval_shape(lambda model, method=method: adapt(model, method), plain)
        trainable = summary(adapted).trainable
        rows.append(Cost(name, method, trainable, trainable / total, _flops(adapted) - before))
    return rows


def cost(config: ASTConfig, method: Method) -> tuple[int, int]:
    """Trained parameters of a method on a model of that shape, and FLOPs of one clip forward."""
    plain: AST = nnx.eval_shape(lambda: AST(config, rngs=nnx.Rngs(0)))
    adapted: AST = nnx.eval_shape(lambda model: adapt(model, method), plain)
    return summary(adapted).trainable, _flops(adapted)


def _flops(model: AST) -> int:
    parts = surgery.split(model)
    shape = (1, model.config.frames, model.config.mels)

    def forward(trainable: object, stats: object, frozen: object, x: jax.Array) -> jax.Array:
        return surgery.join(parts.graphdef, trainable, stats, frozen)(x)

    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    return flops.count(forward, parts.trainable, parts.stats, parts.frozen, x)
