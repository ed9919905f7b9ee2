"""What a mixture of adapters does with its tokens: who reads what, who is used, who is alike."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from aatjax import surgery
from aatjax.errors import UsageError
from aatjax.models.ast import AST
from aatjax.petl.base import Monitor
from aatjax.surgery import Recorded


@dataclasses.dataclass(frozen=True)
class Routing:
    """The weights of one mixture on a batch of clips, as numpy arrays.

    Attributes:
        combine: what each token reads: `[b, n, e, p]` of a soft mixture, `[b, n, e]` gates of a
            dense or top-k one. Sums to one over experts and slots.
        dispatch: what each slot is made of, `[b, n, e, p]`, sums to one over the tokens; None for
            mixtures without slots.
        slots: the slots `[b, e, p, d]` themselves; None without.
    """

    combine: np.ndarray
    dispatch: np.ndarray | None
    slots: np.ndarray | None

    @property
    def use(self) -> np.ndarray:
        """Share of all that the tokens read that comes from each expert, `[e]`."""
        gates = self.combine if self.dispatch is None else self.combine.sum(axis=-1)
        total = gates.sum(axis=(0, 1))
        return total / total.sum()


def has_mixtures(model: AST) -> bool:
    """Whether the model has mixtures that `routing` can look into."""
    return any(hasattr(module, "watched") for module in surgery.modules(model).values())


def make_probe(model: AST) -> AST:
    """A copy whose mixtures record, its blocks run one after the other."""
    probe = surgery.clone(model)
    probe.config = dataclasses.replace(model.config, scan=False, remat=False)
    for module in surgery.modules(probe).values():
        if hasattr(module, "watched"):
            module.watched = True  # pyright: ignore[reportAttributeAccessIssue]
    return probe


def run_probe(probe: AST, x: jax.Array, valid: jax.Array | None) -> dict[str, dict[str, Any]]:
    probe(x, valid)
    found: dict[str, dict[str, Any]] = {}
    for path, array in surgery.arrays(probe, Recorded).items():
        site, _, name = path.rpartition("/recorded_")
        found.setdefault(site, {})[name] = array
    return found


def routing(model: AST, x: Float[Array, "b t f"], valid: Any = None) -> dict[str, Routing]:
    """The weights of every mixture for a batch of clips, by the path of the mixture.

    Args:
        model: a model adapted with SoftMoA, DenseMoA or TopKMoA; it is left as it is.
        x: normalised log-mel.
        valid: sounding frames of each clip, for models with `mask_padding`.

    Raises:
        UsageError: the model has no mixture.
    """
    if not has_mixtures(model):
        name = getattr(model.method, "name", "a model without a method")
        raise UsageError(f"{name} has no mixture of adapters to look into")
    probe = make_probe(model)
    graphdef, state = nnx.split(probe)

    @jax.jit
    def run(state: Any, x: jax.Array, valid: Any) -> dict[str, dict[str, Any]]:
        return run_probe(nnx.merge(graphdef, state, copy=True), x, valid)

    found = jax.device_get(run(state, x, valid))
    return {
        site: Routing(arrays["combine"], arrays.get("dispatch"), arrays.get("slots"))
        for site, arrays in found.items()
    }


def measure_entropy(weights: Float[Array, "*_"], axes: tuple[int, ...]) -> Float[Array, "*_"]:
    """Entropy over some axes, over the largest that it can be: 1 is uniform, 0 is one choice."""
    size = int(np.prod([weights.shape[axis] for axis in axes]))
    bits = -jnp.sum(jnp.where(weights > 0, weights * jnp.log(weights), 0.0), axis=axes)
    return bits / np.log(size) if size > 1 else jnp.ones_like(bits)


def summarize_routing(sites: dict[str, dict[str, Any]]) -> dict[str, jax.Array]:
    """Numbers over all mixtures of a model, from what they recorded; each a mean over the sites.

    combine_entropy: of what a token reads, over experts and slots, 0 (one) to 1 (all alike).
    dispatch_entropy: of what a slot is made of, over the tokens, likewise.
    least_used, most_used: use of an expert times the number of experts; 1 and 1 is balance.
    balance: entropy of the use of the experts, 0 (collapsed on one) to 1.
    slot_similarity: mean cosine between the slots of a clip; near 1 all slots are the same.
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


def measure_similarity(slots: Float[Array, "b e p d"]) -> Float[Array, ""]:
    flat = slots.reshape(slots.shape[0], -1, slots.shape[-1])
    unit = flat / jnp.maximum(jnp.linalg.norm(flat, axis=-1, keepdims=True), 1e-12)
    count = flat.shape[1]
    if count == 1:
        return jnp.ones(())
    total = jnp.square(unit.sum(axis=1)).sum(axis=-1) - count
    return (total / (count * (count - 1))).mean()


def make_monitor(model: AST) -> Monitor:
    """`summarize_routing` as a compiled function of the model's parts and a batch."""
    graphdef = surgery.split(make_probe(model)).graphdef

    @jax.jit
    def run(
        trainable: Any, stats: Any, frozen: Any, x: jax.Array, valid: jax.Array
    ) -> dict[str, jax.Array]:
        return summarize_routing(
            run_probe(surgery.join(graphdef, trainable, stats, frozen), x, valid)
        )

    return run


def diagnose_routing(model: AST, x: Float[Array, "b t f"], valid: Any = None) -> dict[str, float]:
    """`summarize_routing` of a model on a batch of clips.

    Raises:
        UsageError: the model has no mixture.
    """
    sites = {site: dataclasses.asdict(one) for site, one in routing(model, x, valid).items()}
    return {name: float(value) for name, value in summarize_routing(sites).items()}
