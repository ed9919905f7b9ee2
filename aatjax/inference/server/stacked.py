"""Adapters of one structure: their stacked parameters and one forward pass for all of them."""

import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
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
class BatchProgram:
    """The compiled forward pass for one batch size.

    Attributes:
        choose: takes the parameters of each row of the batch from a stack.
        forward: frozen arrays, those parameters, audio `[b, s]` and lengths `[b]` to logits.
    """

    choose: Any
    forward: Any


@dataclasses.dataclass(frozen=True)
class AdapterStack:
    """Stacked parameters on the device, with the programs that take them.

    Attributes:
        members: the adapters that were stacked.
        rows: row and number of classes of each adapter, by key.
        arrays: parameters `[a, ...]`, means `[a]` and standard deviations `[a]`.
        shape: adapters `a` and classes for which there is room.
        programs: by batch size, ascending.
    """

    members: Mapping[int, Member]
    rows: dict[int, tuple[int, int]]
    arrays: Any
    shape: tuple[int, int]
    programs: dict[int, BatchProgram]


class AdapterGroup:
    """Adapters of one structure.

    Adapters are compiled for before they are in the stack: `compute_logits` never compiles.

    Args:
        first: one of them; its frozen arrays are used.
        largest: largest batch; smaller ones are padded to powers of two.
    """

    def __init__(self, first: Classifier, largest: int) -> None:
        self._first, self._structure = first.model, find_structure(first)
        self._samples: int = first.frontend.samples
        self._members: Mapping[int, Member] = {}  # replaced, never changed
        self._stack = AdapterStack(self._members, {}, None, (0, 0), {})
        self._lock = threading.Lock()
        self.sizes: tuple[int, ...] = list_batch_sizes(largest)
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

    def add(self, added: Mapping[int, Classifier], report: Callable[[], None]) -> None:
        """Add adapters under their own keys, after every batch size is compiled.

        Called from one thread at a time; batches run meanwhile.

        Args:
            added: adapters by key.
            report: called after each batch size; an error that it raises ends this, and nothing
                is added.
        """
        new = {
            key: (collect_trained(one.model), one.frontend.mean, one.frontend.std)
            for key, one in added.items()
        }
        current = self._stack
        stack = _stack_members({**self._members, **new}, current)
        if stack.shape != current.shape:
            programs = {}
            for size in self.sizes:
                programs[size] = self._compile(size, stack, current)
                report()
            stack = dataclasses.replace(stack, programs=programs)
        while True:
            with self._lock:
                members = {**self._members, **new}
                if members.keys() == stack.members.keys():
                    self._members, self._stack = stack.members, stack
                    return
            stack = _stack_members(members, stack)  # some were removed meanwhile

    def _compile(self, size: int, stack: AdapterStack, current: AdapterStack) -> BatchProgram:
        rows = jax.ShapeDtypeStruct((size,), np.int32)
        choose = self._choose.lower(stack.arrays, rows).compile()
        if current.shape[1] == stack.shape[1]:
            return BatchProgram(choose, current.programs[size].forward)
        chosen = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype), stack.arrays
        )
        audio = jax.ShapeDtypeStruct((size, self._samples), np.int16)
        forward = self._forward.lower(self._frozen, chosen, audio, rows).compile()
        return BatchProgram(choose, forward)

    def remove(self, key: int) -> None:
        """Remove an adapter."""
        with self._lock:
            self._members = {k: member for k, member in self._members.items() if k != key}

    def stack(self) -> AdapterStack:
        """Return the current parameters of all adapters."""
        with self._lock:
            members, stack = self._members, self._stack
        if stack.members is members:
            return stack
        stack = _stack_members(members, stack)  # some were removed: the shape is the same
        with self._lock:
            if self._members is members:
                self._stack = stack
        return stack

    def compute_logits(
        self, stack: AdapterStack, keys: Sequence[int], windows: Sequence[Window]
    ) -> list[Float[np.ndarray, " c"]]:
        """Return the logits of each window by the adapter of its key."""
        results: list[np.ndarray] = []
        for start in range(0, len(keys), self.sizes[-1]):
            chosen = range(start, min(start + self.sizes[-1], len(keys)))
            size = next(size for size in self.sizes if size >= len(chosen))
            padded = [*chosen, *[chosen[-1]] * (size - len(chosen))]
            rows = np.array([stack.rows[keys[i]][0] for i in padded], np.int32)
            program = stack.programs[size]
            logits = program.forward(
                self._frozen,
                program.choose(stack.arrays, rows),
                np.stack([windows[i].audio for i in padded]),
                np.array([windows[i].length for i in padded], np.int32),
            )
            for i, row in zip(chosen, np.asarray(logits), strict=False):
                results.append(row[: stack.rows[keys[i]][1]])
        return results


def list_batch_sizes(largest: int) -> tuple[int, ...]:
    """Return the batch sizes that are compiled: powers of two, and the largest."""
    powers = (1 << n for n in range(largest.bit_length()))
    return (*(size for size in powers if size < largest), largest)


def _stack_members(members: Mapping[int, Member], current: AdapterStack) -> AdapterStack:
    """The stack of some adapters, with the room and the programs of the current one, or more room.

    Room for adapters grows in powers of two, so that few programs are compiled.
    """
    if not members:  # all were removed
        return dataclasses.replace(current, members=members, rows={}, arrays=None)
    states, means, stds = zip(*members.values(), strict=True)
    classes = [state[HEAD[1]].shape[0] for state in states]
    widest = max(CLASS_MULTIPLE * -(-max(classes) // CLASS_MULTIPLE), current.shape[1])
    room = max(1 << (len(members) - 1).bit_length(), current.shape[0])
    padding = room - len(members)

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
    placed = jax.device_put((arrays, mean, std))
    return AdapterStack(members, rows, placed, (room, widest), current.programs)
