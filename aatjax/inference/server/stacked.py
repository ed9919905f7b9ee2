"""Adapters of one structure, their parameters stacked, and the pass that runs them together."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float

from aatjax import surgery
from aatjax.inference.classifier import Cut
from aatjax.models.ast import AST
from aatjax.train.adapter_file import TrainedAdapter

HEAD = ("head/linear/kernel", "head/linear/bias")
Member = tuple[dict[str, np.ndarray], float, float]  # its own arrays, mean, standard deviation
WIDTH = 8  # heads are filled up to a multiple of so many classes, so that programs stay few


def own(model: AST) -> dict[str, np.ndarray]:
    """What an adapter file brings to a model: parameters trained and statistics, by path."""
    kinds = (surgery.Trainable, nnx.BatchStat)
    return {
        path: np.asarray(variable[...])
        for path, variable in surgery.variables(model).items()
        if isinstance(variable, kinds) or path in HEAD
    }


def structure(adapter: TrainedAdapter) -> Any:
    """What adapters must have in common to run in one pass."""
    model = adapter.model
    config = dataclasses.replace(model.config, num_classes=1)
    frontend = dataclasses.replace(adapter.frontend, mean=0.0, std=1.0)
    shapes = {path: value.shape for path, value in own(model).items() if path not in HEAD}
    return config, repr(model.method), frontend, tuple(sorted(shapes.items()))


@dataclasses.dataclass(frozen=True)
class Stack:
    """Parameters on the device `[a, ...]`, and for each adapter its row and number of classes.

    Attributes:
        members: those it was made of.
        places: row and number of classes by key.
        arrays: parameters, means and standard deviations.
    """

    members: Any
    places: dict[int, tuple[int, int]]
    arrays: Any


class Group:
    """Adapters of one structure.

    Args:
        first: one of them; its frozen arrays are used.
        largest: clips of the largest batch; smaller ones are filled up to powers of two.
    """

    def __init__(self, first: TrainedAdapter, largest: int) -> None:
        self._members: Mapping[int, Member] = {}
        self._stacked: Stack | None = None
        self._largest = largest
        shape = surgery.clone(first.model)
        theirs = own(first.model)
        arrays = surgery.arrays(first.model)
        self._frozen = {path: value for path, value in arrays.items() if path not in theirs}
        frontend = first.frontend

        def forward(frozen: Any, taken: Any, audio: jax.Array, length: jax.Array) -> jax.Array:
            states, mean, std = taken
            x = frontend.features(audio, length)
            x = (x - mean[:, None, None]) / (2.0 * std[:, None, None])

            def one(state: Any, x: jax.Array, valid: jax.Array) -> jax.Array:
                whole = surgery.clone(shape)
                variables = surgery.variables(whole)
                for path, value in (frozen | state).items():
                    variables[path].set_raw_value(value)
                whole.eval()
                return whole(x[None], valid[None])[0]

            return jax.vmap(one)(states, x, frontend.count_frames(length))

        # Apart, so that the large program does not depend on how many adapters there are.
        self._take = jax.jit(lambda stack, row: jax.tree.map(lambda values: values[row], stack))
        self._forward: Callable[..., jax.Array] = jax.jit(forward)

    def __len__(self) -> int:
        return len(self._members)

    def add(self, key: int, adapter: TrainedAdapter) -> None:
        """Takes an adapter in, under a key of its own."""
        frontend = adapter.frontend
        state = own(adapter.model)
        self._members = {**self._members, key: (state, frontend.mean, frontend.std)}

    def remove(self, key: int) -> None:
        """Lets an adapter go."""
        self._members = {k: member for k, member in self._members.items() if k != key}

    def ready(self) -> Stack:
        """The parameters of all adapters as they are now; of one thread, without a lock."""
        members = self._members  # never changed, only replaced
        if self._stacked is None or self._stacked.members is not members:
            self._stacked = _stack(members)
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
            rows = np.array([stack.places[keys[i]][0] for i in full], np.int32)
            out = self._forward(
                self._frozen,
                self._take(stack.arrays, rows),
                np.stack([windows[i].audio for i in full]),
                np.array([windows[i].length for i in full], np.int32),
            )
            for i, row in zip(taken, np.asarray(out), strict=False):
                found.append(row[: stack.places[keys[i]][1]])
        return found


def _stack(members: Mapping[int, Member]) -> Stack:
    if not members:  # all were dropped
        return Stack(members, {}, None)
    states = [state for state, _, _ in members.values()]
    classes = [state[HEAD[1]].shape[0] for state in states]
    widest = WIDTH * -(-max(classes) // WIDTH)
    fill = _power_of_two(len(members)) - len(members)
    arrays = {
        path: np.stack(
            [_widened(path, state[path], widest) for state in states + states[-1:] * fill]
        )
        for path in states[0]
    }
    figures = [(mean, std) for _, mean, std in members.values()]
    mean, std = np.array(figures + figures[-1:] * fill, np.float32).T
    places = {key: (i, count) for i, (key, count) in enumerate(zip(members, classes, strict=True))}
    return Stack(members, places, jax.device_put((arrays, mean, std)))


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _widened(path: str, value: np.ndarray, classes: int) -> np.ndarray:
    if path not in HEAD:
        return value
    return np.pad(value, [(0, 0)] * (value.ndim - 1) + [(0, classes - value.shape[-1])])
