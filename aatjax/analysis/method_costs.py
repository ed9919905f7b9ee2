"""Cost of a method per clip: FLOPs by part, activations kept, parameters, size of its file."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Literal

from aatjax import surgery
from aatjax.analysis.flops import count_flops, count_flops_by_scope
from aatjax.errors import UsageError
from aatjax.models.ast import AST, make_abstract
from aatjax.models.config import ASTConfig
from aatjax.models.summary import summary
from aatjax.petl import TABLE, Method, adapt
from aatjax.petl.dense_moa import DenseMoA
from aatjax.petl.sites import list_blocks
from aatjax.petl.sizes import find_widths
from aatjax.petl.soft_moa import SoftMoA

MIXTURE_PARTS = ("router", "logits", "dispatch", "experts", "combine")
TOLERANCE = 0.02
"""Relative difference allowed between our count of the mixtures and the closed formula."""


@dataclasses.dataclass(frozen=True)
class PassFlops:
    """FLOPs of one clip in one kind of pass.

    Attributes:
        backbone: the frozen backbone, with the tokens that a method adds (prompts, prefixes).
        adapter: everything that a method adds beside it.
        head: the classifier.
        inside: of a mixture: router or logits, dispatch, experts, combine.
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
    """Cost of one method on one model, each figure computed from shapes when it is read.

    Attributes:
        config: shape of the model.
        name: name of its row.
        method: the method.
    """

    config: ASTConfig
    name: str
    method: Method

    @functools.cached_property
    def trainable(self) -> int:
        """Trainable parameters, head included."""
        return summary(self._model).trainable

    @property
    def share(self) -> float:
        """Trainable parameters over all parameters of the model before adaptation."""
        return self.trainable / _measure_plain(self.config)[0]

    @property
    def added_flops(self) -> int:
        """FLOPs added to a forward pass; may be negative (prompts that replace a token)."""
        return self.forward.total - _measure_plain(self.config)[1]

    @functools.cached_property
    def forward(self) -> PassFlops:
        """FLOPs of a forward pass.

        Raises:
            UsageError: the count of a mixture and the closed formula differ by more than 2 %.
        """
        flops = _split_flops(count_flops_by_scope(*self._program))
        expected = compute_mixture_flops(self.config, self.method)
        if expected is not None and abs(flops.adapter - expected) > TOLERANCE * expected:
            raise UsageError(
                f"{self.method.name}: {flops.adapter:,} FLOPs were counted in the mixtures, and "
                f"the closed formula gives {expected:,}: please report this"
            )
        return flops

    @functools.cached_property
    def training(self) -> PassFlops:
        """FLOPs of a forward and backward pass."""
        return _split_flops(
            count_flops_by_scope(jax.value_and_grad(self._loss), *self._program[1:])
        )

    @functools.cached_property
    def activation_bytes(self) -> int:
        """Bytes of activations that the backward pass reads, in the compute type."""

        def pullback(trainable: Any, *rest: Any) -> Any:
            return jax.vjp(lambda trainable: self._loss(trainable, *rest), trainable)[1]

        jaxpr = jax.make_jaxpr(pullback)(*self._program[1:]).jaxpr
        from_clip = {jaxpr.invars[-1]}  # x is the last argument
        for equation in jaxpr.eqns:
            if any(not isinstance(v, Literal) and v in from_clip for v in equation.invars):
                from_clip.update(equation.outvars)
        kept = {v for v in jaxpr.outvars if not isinstance(v, Literal) and v in from_clip}
        return sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in kept)

    @functools.cached_property
    def file_bytes(self) -> int:
        """Bytes of the trained tensors in an adapter file, float32."""
        trainable = surgery.split(self._model).trainable
        return 4 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trainable))

    @property
    def placement(self) -> str:
        """The fields of the method that are not at their defaults, as `name=value`."""
        default = type(self.method)()
        fields = [field.name for field in dataclasses.fields(self.method)]
        changed = [f for f in fields if getattr(self.method, f) != getattr(default, f)]
        return ", ".join(f"{f}={getattr(self.method, f)}" for f in changed)

    def to_json(self) -> dict[str, Any]:
        """Return a plain dictionary of all figures."""
        return {
            "name": self.name,
            "method": self.method.to_json(),
            "trainable": self.trainable,
            "forward": {**dataclasses.asdict(self.forward), "total": self.forward.total},
            "training": {**dataclasses.asdict(self.training), "total": self.training.total},
            "activation_bytes": self.activation_bytes,
            "adapter_file_bytes": self.file_bytes,
        }

    @functools.cached_property
    def _model(self) -> AST:
        return nnx.eval_shape(lambda model: adapt(model, self.method), make_abstract(self.config))

    @functools.cached_property
    def _program(self) -> tuple[Any, ...]:
        return make_program(self._model)

    def _loss(self, *args: Any) -> jax.Array:
        return jnp.square(self._program[0](*args)).sum()


def compare_costs(config: ASTConfig, methods: Mapping[str, Method] = TABLE) -> list[MethodCost]:
    """Return the cost of each method on a model of that shape; nothing is allocated."""
    return [MethodCost(config, name, method) for name, method in methods.items()]


def make_program(model: AST) -> tuple[Callable[..., jax.Array], Any, Any, Any, Any]:
    """Return the forward pass of one clip, and its arguments: the model's parts and the input.

    All tokens are computed, as the papers count; a run leaves out those of the last block that the
    head does not read.
    """
    parts, config = surgery.split(model), model.config

    def forward(trainable: Any, stats: Any, frozen: Any, x: jax.Array) -> jax.Array:
        model: AST = surgery.join(parts.graphdef, trainable, stats, frozen)
        return model.head(model.pool(model.tokens(x)))

    x = jax.ShapeDtypeStruct((1, config.frames, config.mels), jnp.float32)
    return forward, parts.trainable, parts.stats, parts.frozen, x


@functools.lru_cache(maxsize=8)
def _measure_plain(config: ASTConfig) -> tuple[int, int]:
    """Return parameters and forward FLOPs of the model before adaptation."""
    plain = make_abstract(config)
    return summary(plain).total, count_flops(*make_program(plain))


def _split_flops(counts: Counter[tuple[str, ...]]) -> PassFlops:
    parts, inside = Counter[str](), Counter[str]()
    for names, count in counts.items():
        part = next((p for p in ("adapter", "head") if p in names), "backbone")
        parts[part] += count
        if "dispatch_logits" in names:
            inside["dispatch"] += count // 2
            inside["logits"] += count // 2
        else:
            within = next((name for name in MIXTURE_PARTS if name in names), None)
            if part == "adapter" and within is not None:
                inside[within] += count
    return PassFlops(parts["backbone"], parts["adapter"], parts["head"], dict(inside))


def compute_mixture_flops(config: ASTConfig, method: Method) -> int | None:
    """Return the forward FLOPs of all mixtures by closed formula; None for other methods.

    With m tokens, width D, N experts of bottleneck r and p slots, a site of Soft-MoA costs
    2 (3 m N p D + 2 N p D r) and 4 m D r for a shared expert, one of Dense-MoA
    2 (m N D + 2 m N D r + m N D): logits, dispatch and combine, or router and the experts' biases,
    and the experts (arXiv 2402.00828, section 2).
    """
    if not isinstance(method, DenseMoA | SoftMoA) or method.expert != "bottleneck":
        return None
    if method.budget is not None:
        return None
    each = 2 if method.location == "both" else 1
    blocks = len(list_blocks(method, config.depth))
    m, d, n = config.num_tokens, config.dim, method.num_experts
    widths = find_widths(method, d, blocks)
    if isinstance(method, SoftMoA):
        slots = n * method.slots
        rows = slots + m * method.shared  # that go through an expert
        return each * sum(2 * (3 * m * slots * d + 2 * rows * d * r) for r in widths)
    return each * sum(2 * (m * n * d + 2 * m * n * d * r + m * n * d) for r in widths)
