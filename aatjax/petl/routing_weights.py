"""Routing of mixtures of adapters: weights, use of the experts, similarity of the slots."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float, Integer

from aatjax import surgery
from aatjax.errors import UsageError
from aatjax.models.ast import AST, check_model
from aatjax.petl.base import Monitor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """The weights of one mixture on a batch of clips: NumPy arrays, or JAX's under `jax.jit`.

    Attributes:
        combine: weights of each token's output: `[b, n, e, p]` of a soft mixture, `[b, n, e]` gates
            of a dense or top-k one. They sum to one over experts and slots.
        dispatch: weights of each slot's input, `[b, n, e, p]`, which sum to one over the tokens;
            None for mixtures without slots.
        slots: the slots `[b, e, p, d]`; None without.
    """

    combine: np.ndarray | Array
    dispatch: np.ndarray | Array | None
    slots: np.ndarray | Array | None

    @property
    def use(self) -> np.ndarray | Array:
        """Each expert's share of the combine weights, `[e]`."""
        gates = self.combine if self.dispatch is None else self.combine.sum(axis=-1)
        total = gates.sum(axis=(0, 1))
        return total / total.sum()


def has_mixtures(model: AST) -> bool:
    """Return whether the model has mixtures, whose routing can be recorded."""
    return any(hasattr(module, "watched") for module in surgery.modules(model).values())


def copy_unrolled(model: AST) -> AST:
    """Return a copy whose blocks run one after the other, so that each can keep values."""
    copy = surgery.clone(model)
    copy.config = dataclasses.replace(model.config, scan=False, remat=False)
    return copy


def make_probe(model: AST) -> AST:
    """Return a copy whose mixtures record their routing."""
    probe = copy_unrolled(model)
    for module in surgery.modules(probe).values():
        if hasattr(module, "watched"):
            module.watched = True  # pyright: ignore[reportAttributeAccessIssue]
    return probe


def run_probe(probe: AST, x: jax.Array, valid: jax.Array | None) -> dict[str, dict[str, Any]]:
    """Run a model of `make_probe`; return the fields of `Routing` by mixture, then by name."""
    probe(x, valid)
    found: dict[str, dict[str, Any]] = {}
    for path, array in surgery.arrays(probe, nnx.Intermediate).items():
        site, _, name = path.rpartition("/recorded_")
        found.setdefault(site, {})[name] = array
    return found


def routing(
    model: AST, x: Float[Array, "b t f"], valid: Integer[Array, " b"] | None = None
) -> dict[str, Routing]:
    """Return the weights of every mixture for a batch of clips, by the path of the mixture.

    Args:
        model: a model adapted with SoftMoA, DenseMoA or TopKMoA; not changed.
        x: normalised log-mel.
        valid: number of frames of each clip that are not padding, for models with `mask_padding`.

    Raises:
        UsageError: the model has no mixture.
    """
    check_model(model, "routing")
    if not has_mixtures(model):
        name = getattr(model.method, "name", "a model without a method")
        raise UsageError(f"{name} has no mixture of adapters, so there is no routing to return")
    graphdef, state = nnx.split(make_probe(model))

    @jax.jit
    def run(state: Any, x: jax.Array, valid: Any) -> dict[str, dict[str, Any]]:
        return run_probe(nnx.merge(graphdef, state, copy=True), x, valid)

    found = run(state, x, valid)
    if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(found)):
        found = jax.device_get(found)
    return {
        site: Routing(arrays["combine"], arrays.get("dispatch"), arrays.get("slots"))
        for site, arrays in found.items()
    }


def measure_entropy(weights: Float[Array, "*_"], axes: tuple[int, ...]) -> Float[Array, "*_"]:
    """Return the entropy over some axes divided by its maximum: 1 is uniform, 0 is one choice."""
    size = int(np.prod([weights.shape[axis] for axis in axes]))
    entropy = -jnp.sum(jnp.where(weights > 0, weights * jnp.log(weights), 0.0), axis=axes)
    return entropy / math.log(size) if size > 1 else jnp.ones_like(entropy)


def measure_similarity(slots: Float[Array, "b e p d"]) -> Float[Array, ""]:
    """Return the mean cosine between different slots of a clip; near 1 all slots are equal."""
    flat = slots.reshape(slots.shape[0], -1, slots.shape[-1])
    unit = flat / jnp.maximum(jnp.linalg.norm(flat, axis=-1, keepdims=True), 1e-12)
    count = flat.shape[1]
    if count == 1:
        return jnp.ones(())
    total = jnp.square(unit.sum(axis=1)).sum(axis=-1) - count
    return (total / (count * (count - 1))).mean()


def summarize_routing(sites: dict[str, dict[str, Any]]) -> dict[str, jax.Array]:
    """Return numbers over all mixtures of a model from `run_probe`, each a mean over the sites.

    combine_entropy: of each token's weights over experts and slots, 0 (one) to 1 (uniform).
    dispatch_entropy: of each slot's weights over the tokens, 0 (one token) to 1 (uniform).
    least_used, most_used: use of an expert times the number of experts; both are 1 if balanced.
    balance: entropy of the use of the experts, 0 (collapsed to one) to 1.
    slot_similarity: see `measure_similarity`.
    """
    rows: list[dict[str, jax.Array]] = []
    for arrays in sites.values():
        combine = jnp.asarray(arrays["combine"])
        axes = tuple(range(2, combine.ndim))
        gates = combine.sum(axis=3) if combine.ndim == 4 else combine
        use = gates.sum(axis=(0, 1)) / gates.sum()
        row = {
            "combine_entropy": measure_entropy(combine, axes).mean(),
            "least_used": use.min() * use.size,
            "most_used": use.max() * use.size,
            "balance": measure_entropy(use, (0,)),
        }
        if arrays.get("dispatch") is not None:
            row["dispatch_entropy"] = measure_entropy(jnp.asarray(arrays["dispatch"]), (1,)).mean()
            row["slot_similarity"] = measure_similarity(jnp.asarray(arrays["slots"]))
        rows.append(row)
    return {name: jnp.stack([row[name] for row in rows]).mean() for name in rows[0]}


def make_monitor(model: AST) -> Monitor:
    """Return `summarize_routing` as a compiled function of a split model and a batch."""
    graphdef = surgery.split(make_probe(model)).graphdef

    @jax.jit
    def run(
        trainable: Any, stats: Any, frozen: Any, x: jax.Array, valid: jax.Array
    ) -> dict[str, jax.Array]:
        probe = surgery.join(graphdef, trainable, stats, frozen)
        return summarize_routing(run_probe(probe, x, valid))

    return run


def diagnose_routing(
    model: AST, x: Float[Array, "b t f"], valid: Integer[Array, " b"] | None = None
) -> dict[str, float]:
    """Return `summarize_routing` of a model on a batch of clips; see `routing`.

    Raises:
        UsageError: the model has no mixture.
    """
    sites = {site: dataclasses.asdict(one) for site, one in routing(model, x, valid).items()}
    return {name: float(value) for name, value in summarize_routing(sites).items()}
