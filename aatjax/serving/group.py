"""Adapters of one structure, their parameters stacked, and the pass that runs them together."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float

from aatjax import surgery
from aatjax.classifier import Cut
from aatjax.models.ast import AST
from aatjax.train.artefact import Adapter

HEAD = ("head/linear/kernel", "head/linear/bias")
WIDTH = 8  # heads are filled up to a multiple of so many classes, so that programs stay few


def own(model: AST) -> dict[str, np.ndarray]:
    """What an adapter file brings to a model: parameters trained and statistics, by path."""
    kinds = (surgery.Trainable, nnx.BatchStat)
    return {
        path: np.asarray(variable[...])
        for path, variable in surgery.variables(model).items()
        if isinstance(variable, kinds) or path in HEAD
    }


def structure(adapter: Adapter) -> Any:
    """What adapters must have in common to run in one pass."""
    model = adapter.model
    config = dataclasses.replace(model.config, num_classes=1)
    frontend = dataclasses.replace(adapter.frontend, mean=0.0, std=1.0)
    shapes = {path: value.shape for path, value in own(model).items() if path not in HEAD}
    return config, repr(model.method), frontend, tuple(sorted(shapes.items()))


@dataclasses.dataclass(frozen=True)
class Stack:
    """Parameters on the device `[a, ...]`, and for each adapter its row and number of classes."""

    places: dict[int, tuple[int, int]]
    arrays: Any


class Group:
    """Adapters of one structure.

    Args:
        first: one of them; its frozen arrays are used.
        largest: clips of the largest batch; smaller ones are filled up to powers of two.
    """

    def __init__(self, first: Adapter, largest: int) -> None:
        self._members: dict[int, tuple[dict[str, np.ndarray], float, float]] = {}
        self._stacked: Stack | None = None
        self._largest = largest
        shape = surgery.clone(first.model)
        theirs = own(first.model)
        arrays = surgery.arrays(first.model)
        self._frozen = {path: value for path, value in arrays.items() if path not in theirs}
        frontend = first.frontend

        def forward(
            frozen: Any, stack: Any, row: jax.Array, audio: jax.Array, length: jax.Array
        ) -> jax.Array:
            states, mean, std = jax.tree.map(lambda values: values[row], stack)
            x = frontend.features(audio, length)
            x = (x - mean[:, None, None]) / (2.0 * std[:, None, None])

            def one(state: Any, x: jax.Array, valid: jax.Array) -> jax.Array:
                whole = surgery.clone(shape)
                variables = surgery.variables(whole)
                for path, value in (frozen | state).items():
                    variables[path].set_raw_value(value)
                whole.eval()
                return whole(x[None], valid[None])[0]

            return jax.vmap(one)(states, x, frontend.sounding(length))

        self._forward: Callable[..., jax.Array] = jax.jit(forward)

    def __len__(self) -> int:
        return len(self._members)

    def add(self, key: int, adapter: Adapter) -> None:
        """Takes an adapter in, under a key of its own."""
        frontend = adapter.frontend
        self._members[key] = (own(adapter.model), frontend.mean, frontend.std)
        self._stacked = None

    def remove(self, key: int) -> None:
        """Lets an adapter go."""
        del self._members[key]
        self._stacked = None

    def ready(self) -> Stack:
        """The parameters of all adapters as they are now."""
        self._stacked = self._stacked or self._stack()
        return self._stacked

    def logits(
        self, stack: Stack, keys: Sequence[int], windows: Sequence[Cut]
    ) -> list[Float[np.ndarray, " c"]]:
        """Logits of each window by the adapter of its key."""
        found: list[np.ndarray] = []
        for start in range(0, len(keys), self._largest):
            taken = range(start, min(start + self._largest, len(keys)))
            size = _power_of_two(len(taken))
            full = [*taken, *[taken[-1]] * (size - len(taken))]
            out = self._forward(
                self._frozen,
                stack.arrays,
                np.array([stack.places[keys[i]][0] for i in full], np.int32),
                np.stack([windows[i].audio for i in full]),
                np.array([windows[i].length for i in full], np.int32),
            )
            for i, row in zip(taken, np.asarray(out), strict=False):
                found.append(row[: stack.places[keys[i]][1]])
        return found

    def _stack(self) -> Stack:
        members = list(self._members.items())
        classes = [state[HEAD[1]].shape[0] for _, (state, _, _) in members]
        widest = WIDTH * -(-max(classes) // WIDTH)
        rows = [*members, *members[-1:] * (_power_of_two(len(members)) - len(members))]
        states = {
            path: np.stack([_widened(path, state[path], widest) for _, (state, _, _) in rows])
            for path in members[0][1][0]
        }
        mean, std = np.array([(mean, std) for _, (_, mean, std) in rows], np.float32).T
        places = {key: (i, classes[i]) for i, (key, _) in enumerate(members)}
        return Stack(places, jax.device_put((states, mean, std)))


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _widened(path: str, value: np.ndarray, classes: int) -> np.ndarray:
    if path not in HEAD:
        return value
    return np.pad(value, [(0, 0)] * (value.ndim - 1) + [(0, classes - value.shape[-1])])
