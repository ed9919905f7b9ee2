"""Adapters of one structure: their stacked parameters and one forward pass for all of them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float

from aatjax import surgery
from aatjax.audio.windows import Window
from aatjax.inference.adapters import find_frozen_difference
from aatjax.inference.classifier import Classifier
from aatjax.models.ast import AST

HEAD = ("head/linear/kernel", "head/linear/bias")
CLASS_MULTIPLE = 8  # heads are padded to a multiple of this, so that few programs are compiled
Member = tuple[dict[str, np.ndarray], float, float]  # trained arrays, mean, standard deviation


def collect_trained(model: AST) -> dict[str, np.ndarray]:
    """Return what differs between adapters: trained parameters, statistics and head, by path."""
    kinds = (nnx.Param, nnx.BatchStat)
    return {
        path: np.asarray(variable[...])
        for path, variable in surgery.variables(model).items()
        if isinstance(variable, kinds) or path in HEAD
    }


def find_structure(classifier: Classifier) -> Any:
    """Return what adapters must have in common to share a forward pass."""
    model = classifier.model
    config = dataclasses.replace(model.config, num_classes=1)
    frontend = dataclasses.replace(classifier.frontend, mean=0.0, std=1.0)
    arrays = collect_trained(model).items()
    shapes = sorted((path, value.shape) for path, value in arrays if path not in HEAD)
    return config, repr(model.method), frontend, tuple(shapes)


@dataclasses.dataclass(frozen=True)
class AdapterStack:
    """Stacked parameters on the device.

    Attributes:
        members: the adapters that were stacked.
        rows: row and number of classes of each adapter, by key.
        arrays: parameters `[a, ...]`, means `[a]` and standard deviations `[a]`.
    """

    members: Mapping[int, Member]
    rows: dict[int, tuple[int, int]]
    arrays: Any


class AdapterGroup:
    """Adapters of one structure.

    Args:
        first: one of them; its frozen arrays are used.
        largest: largest batch; smaller ones are padded to powers of two.
    """

    def __init__(self, first: Classifier, largest: int) -> None:
        self._first, self._structure = first.model, find_structure(first)
        self._members: Mapping[int, Member] = {}
        self._stack: AdapterStack | None = None
        self._largest = largest
        shape = surgery.clone(first.model)
        shape.eval()
        trained = collect_trained(shape)
        arrays = surgery.arrays(shape)
        self._frozen = {path: value for path, value in arrays.items() if path not in trained}
        frontend = first.frontend

        def forward(frozen: Any, chosen: Any, audio: jax.Array, length: jax.Array) -> jax.Array:
            states, mean, std = chosen
            x = frontend.features(audio, length)
            x = (x - mean[:, None, None]) / (2.0 * std[:, None, None])

            def run_one(state: Any, x: jax.Array, valid: jax.Array) -> jax.Array:
                model = surgery.clone(shape)
                variables = surgery.variables(model)
                for path, value in (frozen | state).items():
                    variables[path].set_raw_value(value)
                return model(x[None], valid[None])[0]

            return jax.vmap(run_one)(states, x, frontend.count_frames(length))

        # Two programs: the large one does not depend on the number of adapters.
        self._choose = jax.jit(lambda arrays, rows: jax.tree.map(lambda a: a[rows], arrays))
        self._forward: Any = jax.jit(forward)

    def takes(self, classifier: Classifier) -> bool:
        """Return whether an adapter has the structure and the frozen arrays of this group."""
        return find_structure(classifier) == self._structure and (
            find_frozen_difference(classifier.model, self._first) is None
        )

    def __len__(self) -> int:
        return len(self._members)

    def add(self, key: int, classifier: Classifier) -> None:
        """Add an adapter under its own key."""
        frontend = classifier.frontend
        member = collect_trained(classifier.model), frontend.mean, frontend.std
        self._members = {**self._members, key: member}

    def remove(self, key: int) -> None:
        """Remove an adapter."""
        self._members = {k: member for k, member in self._members.items() if k != key}

    def stack(self) -> AdapterStack:
        """Return the current parameters of all adapters; called from one thread, without a lock."""
        members = self._members  # replaced, never changed
        if self._stack is None or self._stack.members is not members:
            self._stack = _stack_members(members)
        return self._stack

    def compute_logits(
        self, stack: AdapterStack, keys: Sequence[int], windows: Sequence[Window]
    ) -> list[Float[np.ndarray, " c"]]:
        """Return the logits of each window by the adapter of its key."""
        results: list[np.ndarray] = []
        for start in range(0, len(keys), self._largest):
            chosen = range(start, min(start + self._largest, len(keys)))
            padded = [*chosen, *[chosen[-1]] * (_round_up_to_power(len(chosen)) - len(chosen))]
            rows = np.array([stack.rows[keys[i]][0] for i in padded], np.int32)
            logits = self._forward(
                self._frozen,
                self._choose(stack.arrays, rows),
                np.stack([windows[i].audio for i in padded]),
                np.array([windows[i].length for i in padded], np.int32),
            )
            for i, row in zip(chosen, np.asarray(logits), strict=False):
                results.append(row[: stack.rows[keys[i]][1]])
        return results


def _stack_members(members: Mapping[int, Member]) -> AdapterStack:
    if not members:  # all were removed
        return AdapterStack(members, {}, None)
    states, means, stds = zip(*members.values(), strict=True)
    classes = [state[HEAD[1]].shape[0] for state in states]
    widest = CLASS_MULTIPLE * -(-max(classes) // CLASS_MULTIPLE)
    padding = _round_up_to_power(len(members)) - len(members)

    def pad(path: str, value: np.ndarray) -> np.ndarray:
        if path not in HEAD:
            return value
        return np.pad(value, [(0, 0)] * (value.ndim - 1) + [(0, widest - value.shape[-1])])

    arrays = {
        path: np.stack([pad(path, state[path]) for state in states + states[-1:] * padding])
        for path in states[0]
    }
    mean, std = (np.array(values + values[-1:] * padding, np.float32) for values in (means, stds))
    rows = {key: (i, count) for i, (key, count) in enumerate(zip(members, classes, strict=True))}
    return AdapterStack(members, rows, jax.device_put((arrays, mean, std)))


def _round_up_to_power(count: int) -> int:
    return 1 << (count - 1).bit_length()
