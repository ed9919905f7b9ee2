"""Several adapters on one frozen backbone: switching between them, averaging them."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from aatjax import surgery
from aatjax.errors import UsageError, check_kind
from aatjax.models.ast import AST
from aatjax.train.adapter_file import TrainedAdapter, load_adapter


class Adapters:
    """Adapters by name; all share the frozen arrays of their backbone, one of them is active.

        adapters = aatjax.Adapters()
        adapters.add("dogs", "dogs.safetensors")
        adapters.add("birds", "birds.safetensors")
        logits = adapters.use("birds")(x)

    Args:
        base: the backbone's weights if they moved since training, or a loaded model.
    """

    def __init__(self, base: str | os.PathLike[str] | AST | None = None) -> None:
        self._base = base
        self._adapters: dict[str, TrainedAdapter] = {}
        self._active: str | None = None

    def add(self, name: str, adapter: str | os.PathLike[str] | TrainedAdapter) -> TrainedAdapter:
        """Add an adapter, from a file or loaded, under a name; the first one becomes active.

        Raises:
            UsageError: the name is taken, or the backbone differs from that of the others.
            DataError: the file cannot be read.
        """
        if name in self._adapters:
            raise UsageError(f"there is an adapter {name!r} already: remove it first")
        if not isinstance(adapter, TrainedAdapter):
            adapter = load_adapter(adapter, base=self._base)
        if self._adapters:
            other, first = next(iter(self._adapters.items()))
            check_same_backbone(first.model, adapter.model, other, name)
            shared = share_frozen(adapter.model, first.model)
            adapter = dataclasses.replace(adapter, model=shared)
        self._adapters[name] = adapter
        self._active = self._active or name
        return adapter

    def remove(self, name: str) -> None:
        """Remove an adapter; if it was active, none is."""
        self[name]
        del self._adapters[name]
        if self._active == name:
            self._active = None

    def use(self, name: str) -> AST:
        """Make an adapter active and return its model."""
        model = self[name].model
        self._active = name
        return model

    @property
    def active(self) -> str | None:
        """Name of the active adapter."""
        return self._active

    def __getitem__(self, name: str) -> TrainedAdapter:
        if name not in self._adapters:
            known = ", ".join(self._adapters) or "none"
            raise UsageError(f"no adapter {name!r} (there are {known})")
        return self._adapters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters)

    def __len__(self) -> int:
        return len(self._adapters)

    def __call__(self, x: Float[Array, "b t f"], valid: Any = None) -> Float[Array, "b c"]:
        """Return the logits of the active adapter.

        Raises:
            UsageError: none is active.
        """
        if self._active is None:
            raise UsageError("no adapter is active: call use(name)")
        return self[self._active].model(x, valid)

    def average(self, name: str, weights: Mapping[str, float]) -> TrainedAdapter:
        """Add the weighted mean of adapters under a new name, and return it."""
        return self.add(name, average([self[key] for key in weights], list(weights.values())))


def average(
    adapters: Sequence[TrainedAdapter], weights: Sequence[float] | None = None
) -> TrainedAdapter:
    """Return the weighted mean of the trained tensors (and statistics) of adapters.

    Args:
        adapters: one or more, of one method, backbone, front end and list of classes.
        weights: positive weight per adapter, scaled to sum to one; None for equal weights.

    Raises:
        UsageError: no adapter, a weight that is not positive, or adapters of different methods,
            backbones, classes or front ends.
    """
    for adapter in adapters:
        check_kind(
            "average: adapter", adapter, TrainedAdapter, "give results of load_adapter(path)"
        )
    weights = [1.0] * len(adapters) if weights is None else weights
    if not adapters or len(weights) != len(adapters) or any(not w > 0 for w in weights):
        raise UsageError("average needs adapters, and for each a weight above 0")
    first = adapters[0]
    for number, other in enumerate(adapters[1:], 2):
        check_same_backbone(first.model, other.model, "1", str(number))
        for what in ("classes", "multi_label", "frontend", "scoring"):
            if getattr(first, what) != getattr(other, what):
                raise UsageError(f"adapters 1 and {number} differ in their {what}: not averaged")
        if first.model.method != other.model.method:
            raise UsageError(
                f"adapters 1 and {number} are of different methods, {first.model.method} and "
                f"{other.model.method}: not averaged"
            )
        if (path := find_frozen_difference(first.model, other.model)) is not None:
            raise UsageError(
                f"adapters 1 and {number} stand on different weights, first in {path}: not averaged"
            )
    model = surgery.clone(first.model)
    mean: dict[str, Any] = {}
    for kind in (nnx.Param, nnx.BatchStat):
        tensors = [surgery.arrays(adapter.model, kind) for adapter in adapters]
        for path in tensors[0]:
            mean[path] = np.average([np.asarray(t[path]) for t in tensors], axis=0, weights=weights)
    surgery.assign(model, mean, what="the average")
    info = {**first.info, "test": None}
    return dataclasses.replace(first, model=model, info=info, path=None)


def check_same_backbone(model: AST, other: AST, name: str, other_name: str) -> None:
    """Raise UsageError unless the backbones of two adapters have the same fingerprint."""
    prints = [None if m.origin is None else m.origin.fingerprint for m in (model, other)]
    if prints[0] != prints[1]:
        raise UsageError(
            f"adapters {name!r} and {other_name!r} were trained on different backbones "
            f"({str(prints[0])[:12]} and {str(prints[1])[:12]}): keep them apart"
        )


def find_frozen_difference(model: AST, other: AST) -> str | None:
    """Return the path of an array that is frozen in both models and differs, if there is one."""
    mine, theirs = (surgery.arrays(m, surgery.Frozen) for m in (model, other))
    pairs = ((path, mine[path], theirs[path]) for path in mine.keys() & theirs.keys())
    return next((p for p, a, b in pairs if a is not b and not np.array_equal(a, b)), None)


def share_frozen(model: AST, other: AST) -> AST:
    """Return the model with every frozen array that is equal in `other` taken from it."""
    shared = surgery.clone(model)
    theirs = surgery.variables(other)
    for path, mine in surgery.variables(shared).items():
        same = theirs.get(path)
        if same is None or isinstance(mine, nnx.Param) or type(same) is not type(mine):
            continue
        if same[...] is not mine[...] and np.array_equal(same[...], mine[...]):
            mine.set_raw_value(same[...])
    return shared
