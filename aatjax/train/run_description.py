"""What a run is made of, as JSON that can be compared: weights, updates, loss and clips."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from aatjax import surgery
from aatjax.data.source import Source
from aatjax.models.ast import AST
from aatjax.train.optim import compute_updates
from aatjax.train.step import LossFunction, compute_losses


def describe_weights(model: AST) -> dict[str, list[float]]:
    """Return mean and root mean square of every array by path.

    They tell other weights apart, also on another device, where the last digits differ.
    """
    kinds = (nnx.Param, surgery.Frozen, nnx.BatchStat)
    variables = surgery.variables(model).items()
    return {path: _describe(v[...]) for path, v in variables if isinstance(v, kinds)}


def describe_updates(tx: optax.GradientTransformation, model: AST) -> dict[str, list[float]]:
    """Return mean and root mean square of the first three updates, for stated gradients.

    A transformation of optax holds functions only, which cannot be compared: this tells apart what
    differs in rate, moments, decay, and in the start of the schedule.
    """
    trainable: Any = surgery.split(model).trainable
    state, found = tx.init(trainable), {}
    for step in range(3):
        gradient = jax.tree.map(
            lambda leaf, step=step: jnp.cos((step + 1.0) * jnp.arange(leaf.size)).reshape(
                leaf.shape
            ),
            trainable,
        )
        updates, state = compute_updates(tx, gradient, state, trainable)
        leaves = [np.ravel(leaf) for leaf in jax.tree.leaves(updates)]
        found[str(step)] = _describe(np.concatenate(leaves))
    return found


def describe_loss(loss: LossFunction) -> list[float]:
    """Return mean and root mean square of a loss of stated logits and targets."""
    logits = jnp.cos(jnp.arange(12.0)).reshape(4, 3)
    return _describe(compute_losses(logits, jnp.eye(4, 3), loss))


def _describe(array: Any) -> list[float]:
    value = np.asarray(array, np.float32)
    return [float(value.mean()), float(np.sqrt(np.square(value).mean()))]


def describe_clips(parts: Mapping[str, Source]) -> dict[str, Any]:
    """Return classes, and names, labels and content of the clips of each part, as JSON."""
    return {
        "classes": list(next(iter(parts.values())).classes),
        "parts": {
            name: {
                clip.id: [list(clip.label), part.reader.key(clip)]
                + ([] if clip.observed is None else [list(clip.observed)])
                for clip in part.clips
            }
            for name, part in parts.items()
        },
    }


def compare_clips(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[str]]:
    """Differences of classes and clips by part, at most three clips of a kind.

    A clip that left one part for another is neither gone nor new.
    """
    problems: dict[str, list[str]] = {}
    if before["classes"] != now["classes"]:
        problems["classes"] = [f"classes: {before['classes']} -> {now['classes']}"]
    names = sorted({*before["parts"], *now["parts"]})
    old = {name: before["parts"].get(name, {}) for name in names}
    new = {name: now["parts"].get(name, {}) for name in names}
    left = {id: name for name in names for id in old[name] if id not in new[name]}
    came = {id: name for name in names for id in new[name] if id not in old[name]}
    for name in names:
        kinds: dict[str, list[str]] = {
            "gone": [i for i in old[name] if i not in new[name] and i not in came],
            "new": [i for i in new[name] if i not in old[name] and i not in left],
            "changed": [i for i in old[name] if i in new[name] and old[name][i] != new[name][i]],
        }
        for id in new[name]:
            if came.get(id) == name and id in left:
                kinds.setdefault(f"moved here from {left[id]}", []).append(id)
        found = [f"{name}: {kind} {_list_first(ids)}" for kind, ids in kinds.items() if ids]
        if old[name].keys() == new[name].keys() and list(old[name]) != list(new[name]):
            found.append(f"{name}: in another order")
        elif not found and len(old[name]) > len(new[name]):
            found.append(f"{name}: others moved away")
        if found:
            problems[name] = found
    return problems


def _list_first(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - 3} more" if ids[3:] else ""
    return ", ".join(map(repr, ids[:3])) + more


def is_close(before: Any, after: Any) -> bool:
    """Return whether two descriptions of an array are those of the same numbers."""
    for one in (before, after):
        numbers = [isinstance(n, int | float) for n in one] if isinstance(one, list) else []
        if numbers != [True, True]:
            return False
    scale = 1e-5 * max(abs(before[1]), abs(after[1]))
    return all(abs(a - b) <= scale for a, b in zip(before, after, strict=True))
