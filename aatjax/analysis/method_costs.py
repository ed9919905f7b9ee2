"""What one clip costs under each method: FLOPs by part, activations kept, parameters, file."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import Literal

from aatjax import surgery
from aatjax.analysis import flops
from aatjax.errors import UsageError
from aatjax.models.ast import AST
from aatjax.models.config import ASTConfig
from aatjax.models.summary import summary
from aatjax.petl import Method, adapt

INSIDE = ("router", "logits", "dispatch", "experts", "combine")
TOLERANCE = 0.02  # between our count of the mixtures and the closed formula


@dataclasses.dataclass(frozen=True)
class Pass:
    """FLOPs of one clip in one kind of pass.

    Attributes:
        backbone: the frozen backbone, and what a method makes it do more (prompts, prefixes).
        adapter: everything that a method adds beside it.
        head: the classifier.
        inside: of a mixture, router or logits, dispatch, experts, combine.
    """

    backbone: int
    adapter: int
    head: int
    inside: Mapping[str, int]

    @property
    def total(self) -> int:
        return self.backbone + self.adapter + self.head


@dataclasses.dataclass(frozen=True)
class MethodCost:
    """One method on one model.

    Attributes:
        name: its row.
        method: the method.
        trainable: parameters that it trains, head included.
        forward, training: FLOPs of one clip: a forward pass, and a forward and backward pass.
        kept: bytes of activations that the backward pass of one clip reads (compute type).
        file: bytes of the trained tensors in an adapter file, float32.
    """

    name: str
    method: Method
    trainable: int
    forward: Pass
    training: Pass
    kept: int
    file: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "name": self.name,
            "method": self.method.to_json(),
            "trainable": self.trainable,
            "forward": {**dataclasses.asdict(self.forward), "total": self.forward.total},
            "training": {**dataclasses.asdict(self.training), "total": self.training.total},
            "activation_bytes": self.kept,
            "adapter_file_bytes": self.file,
        }


def method_cost(config: ASTConfig, name: str, method: Method) -> MethodCost:
    """The cost of a method on a model of that shape; nothing is allocated or computed.

    Raises:
        UsageError: the count of a mixture and the closed formula differ by more than 2 %.
    """
    plain: AST = nnx.eval_shape(lambda: AST(config, rngs=nnx.Rngs(0)))
    model: AST = nnx.eval_shape(lambda model: adapt(model, method), plain)
    parts = surgery.split(model)
    x = jax.ShapeDtypeStruct((1, config.frames, config.mels), jnp.float32)
    given = (parts.trainable, parts.stats, parts.frozen, x)

    def forward(trainable: Any, stats: Any, frozen: Any, x: jax.Array) -> jax.Array:
        return surgery.join(parts.graphdef, trainable, stats, frozen)(x)

    def loss(trainable: Any, stats: Any, frozen: Any, x: jax.Array) -> jax.Array:
        logits = forward(trainable, stats, frozen, x)
        return jnp.square(logits).sum()

    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(parts.trainable)]
    once = _passed(flops.by_scope(forward, *given))
    _check(config, method, once)
    return MethodCost(
        name,
        method,
        summary(model).trainable,
        once,
        _passed(flops.by_scope(jax.value_and_grad(loss), *given)),
        _kept(loss, given),
        4 * sum(sizes),
    )


def _passed(found: Counter[tuple[str, ...]]) -> Pass:
    parts, inside = Counter[str](), Counter[str]()
    for names, count in found.items():
        part = next((p for p in ("adapter", "head") if p in names), "backbone")
        parts[part] += count
        if "dispatch_logits" in names:
            inside["dispatch"] += count // 2
            inside["logits"] += count // 2
        else:
            within = next((name for name in INSIDE if name in names), None)
            if part == "adapter" and within is not None:
                inside[within] += count
    return Pass(parts["backbone"], parts["adapter"], parts["head"], dict(inside))


def mixture_formula(config: ASTConfig, method: Method) -> int | None:
    """FLOPs forward of all mixtures of a model by closed formula; None for other methods.

    With m tokens, width D, N experts of bottleneck r and p slots, a site of Soft-MoA costs
    2 (3 m N p D + 2 N p D r), one of Dense-MoA 2 (m N D + 2 m N D r + m N D): logits, dispatch and
    combine, or router and the experts' biases, and the experts (arXiv 2402.00828, section 2).
    """
    from aatjax.petl.dense_moa import DenseMoA
    from aatjax.petl.sizes import find_width
    from aatjax.petl.soft_moa import SoftMoA

    if not isinstance(method, DenseMoA | SoftMoA) or method.expert != "bottleneck":
        return None
    if method.budget is not None:
        return None
    sites = (method.last_blocks or config.depth) * (2 if method.location == "both" else 1)
    m, d, n = config.num_tokens, config.dim, method.num_experts
    r = find_width(method, d)
    if isinstance(method, SoftMoA):
        slots = n * method.slots
        return sites * 2 * (3 * m * slots * d + 2 * slots * d * r)
    return sites * 2 * (m * n * d + 2 * m * n * d * r + m * n * d)


def _check(config: ASTConfig, method: Method, once: Pass) -> None:
    wanted = mixture_formula(config, method)
    if wanted is not None and abs(once.adapter - wanted) > TOLERANCE * wanted:
        raise UsageError(
            f"{method.name}: {once.adapter:,} FLOPs were counted in the mixtures and the closed "
            f"formula gives {wanted:,}: one of them is wrong, report it"
        )


def _kept(loss: Any, given: tuple[Any, ...]) -> int:
    """Bytes that the backward pass is handed and that depend on the sound."""

    def pullback(trainable: Any, stats: Any, frozen: Any, x: jax.Array) -> Any:
        return jax.vjp(lambda trainable: loss(trainable, stats, frozen, x), trainable)[1]

    jaxpr = jax.make_jaxpr(pullback)(*given).jaxpr
    sounding = {jaxpr.invars[-1]}  # x is the last argument
    for equation in jaxpr.eqns:
        if any(not isinstance(v, Literal) and v in sounding for v in equation.invars):
            sounding.update(equation.outvars)
    kept = {v for v in jaxpr.outvars if not isinstance(v, Literal) and v in sounding}
    return sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in kept)


def xla_flops(config: ASTConfig, method: Method) -> float:
    """FLOPs of a forward pass of one clip by XLA's own count, of the program before optimisation.

    XLA counts element-wise operations too, so its number is a little above ours.
    """
    model = adapt(AST(config, rngs=nnx.Rngs(0)), method)
    parts = surgery.split(model)

    def forward(trainable: Any, stats: Any, frozen: Any, x: jax.Array) -> jax.Array:
        return surgery.join(parts.graphdef, trainable, stats, frozen)(x)

    x = jnp.asarray(np.zeros((1, config.frames, config.mels), np.float32))
    lowered = jax.jit(forward).lower(parts.trainable, parts.stats, parts.frozen, x)
    analysis: Any = lowered.cost_analysis()
    return float(analysis["flops"])
