"""Several adapters on one frozen backbone: held by name, switched, averaged."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from aatjax import surgery
from aatjax.errors import UsageError
from aatjax.models.ast import AST
from aatjax.train.adapter_file import TrainedAdapter, load_adapter


class Adapters:
    """Adapters by name; all share the frozen arrays of their backbone, one of them is in use.

        adapters = aatjax.Adapters()
        adapters.add("dogs", "dogs.safetensors")
        adapters.add("birds", "birds.safetensors")
        logits = adapters.use("birds")(x)

    Args:
        base: the backbone's weights, or a loaded model, where they are not where they were in
            training.
    """

    def __init__(self, base: str | os.PathLike[str] | AST | None = None) -> None:
        self._base = base
        self._held: dict[str, TrainedAdapter] = {}
        self._active: str | None = None

    def add(self, name: str, adapter: str | os.PathLike[str] | TrainedAdapter) -> TrainedAdapter:
        """Holds an adapter, from a file or loaded, under a name; the first one is in use.

        Raises:
            UsageError: the name is taken.
            DataError: the file cannot be read, or is of another backbone than the ones held.
        """
        if name in self._held:
            raise UsageError(f"there is an adapter {name!r} already: remove it first")
        if not isinstance(adapter, TrainedAdapter):
            adapter = load_adapter(adapter, base=self._base)
        if self._held:
            other, held = next(iter(self._held.items()))
            check_same_backbone(held, adapter, other, name)
            adapter = dataclasses.replace(adapter, model=sharing(adapter.model, held.model))
        self._held[name] = adapter
        self._active = self._active or name
        return adapter

    def remove(self, name: str) -> None:
        """Lets an adapter go; if it was in use, none is."""
        self[name]
        del self._held[name]
        if self._active == name:
            self._active = None

    def use(self, name: str) -> AST:
        """Switches to an adapter and returns its model."""
        model = self[name].model
        self._active = name
        return model

    @property
    def active(self) -> str | None:
        """Name of the adapter in use."""
        return self._active

    def __getitem__(self, name: str) -> TrainedAdapter:
        if name not in self._held:
            known = ", ".join(self._held) or "none"
            raise UsageError(f"no adapter {name!r} (there are {known})")
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __call__(self, x: Float[Array, "b t f"], valid: Any = None) -> Float[Array, "b c"]:
        """Logits of the adapter in use.

        Raises:
            UsageError: none is in use.
        """
        if self._active is None:
            raise UsageError("no adapter is in use: call use(name)")
        return self[self._active].model(x, valid)

    def average(self, name: str, weights: Mapping[str, float]) -> TrainedAdapter:
        """Holds the weighted mean of held adapters under a new name, and returns it."""
        return self.add(name, average([self[key] for key in weights], list(weights.values())))


def average(
    adapters: Sequence[TrainedAdapter], weights: Sequence[float] | None = None
) -> TrainedAdapter:
    """The weighted mean of the trained tensors (and statistics) of adapters of one kind.

    Args:
        adapters: one or more, of one method, backbone, front end and list of classes.
        weights: positive weight of each adapter, scaled to sum to one; None weighs them alike.

    Raises:
        UsageError: none, a weight that is not positive, or adapters of different methods,
            backbones, classes or front ends.
    """
    weights = [1.0] * len(adapters) if weights is None else weights
    if not adapters or len(weights) != len(adapters) or any(not w > 0 for w in weights):
        raise UsageError("average needs adapters, and for each a weight above 0")
    first = adapters[0]
    for number, other in enumerate(adapters[1:], 2):
        check_same_backbone(first, other, "1", str(number))
        for what in ("classes", "multi_label", "frontend"):
            if getattr(first, what) != getattr(other, what):
                raise UsageError(f"adapters 1 and {number} differ in their {what}: not averaged")
        if first.model.method != other.model.method:
            raise UsageError(
                f"adapters 1 and {number} are of different methods, {first.model.method} and "
                f"{other.model.method}: not averaged"
            )
    model = surgery.clone(first.model)
    mean: dict[str, Any] = {}
    for kind in (surgery.Trainable, nnx.BatchStat):
        held = [surgery.arrays(adapter.model, kind) for adapter in adapters]
        for path in held[0]:
            mean[path] = np.average([np.asarray(a[path]) for a in held], axis=0, weights=weights)
    surgery.assign(model, mean, what="the average")
    return dataclasses.replace(first, model=model, info={**first.info, "test": None})


def check_same_backbone(
    one: TrainedAdapter, other: TrainedAdapter, name: str, other_name: str
) -> None:
    """Refuses adapters of different backbones, by fingerprint."""
    prints = [None if a.model.origin is None else a.model.origin.fingerprint for a in (one, other)]
    if prints[0] != prints[1]:
        raise UsageError(
            f"adapters {name!r} and {other_name!r} were trained on different backbones "
            f"({str(prints[0])[:12]} and {str(prints[1])[:12]}): hold them apart"
        )


def sharing(model: AST, other: AST) -> AST:
    """The model with every frozen array that the other has too taken from it, held once."""
    shared = surgery.clone(model)
    theirs = surgery.variables(other)
    for path, mine in surgery.variables(shared).items():
        same = theirs.get(path)
        if isinstance(mine, surgery.Trainable) or type(same) is not type(mine):
            continue
        if same is not None and same[...] is mine[...]:
            continue
        if same is not None and np.array_equal(same[...], mine[...]):
            mine.set_raw_value(same[...])
    return shared
