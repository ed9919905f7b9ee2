"""Many adapters on one frozen backbone, held by name and let go by name."""

import contextlib
import dataclasses
import itertools
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from aatjax.errors import AatjaxError, DataError
from aatjax.inference.adapters import check_same_backbone, sharing
from aatjax.inference.calibration import compute_probabilities, read_calibration
from aatjax.inference.classifier import Classifier, Cut, Prediction
from aatjax.inference.server.stacked import Group, own, structure
from aatjax.models.ast import AST
from aatjax.models.config import ASTConfig
from aatjax.models.provenance import Origin
from aatjax.train.adapter_file import TrainedAdapter, load_adapter, load_base, read_info


@dataclasses.dataclass
class Held:
    """An adapter in memory.

    Attributes:
        name: what requests call it.
        key: its own number; a file loaded again has another one.
        adapter: on the shared backbone.
        classifier: its classes, front end and calibration. Its own program is never compiled.
        group: the adapters whose clips run in the same pass.
        parameters: parameters and statistics of its own.
        users: requests under way.
        dropped: whether it goes with the last of them.
    """

    name: str
    key: int
    adapter: TrainedAdapter
    classifier: Classifier
    group: Group
    parameters: int
    users: int = 0
    dropped: bool = False

    def prediction(
        self, path: str, logits: Sequence[Float[np.ndarray, " c"]], windows: Sequence[Cut]
    ) -> Prediction:
        """What `aatjax predict` says of a file, from the logits of its windows."""
        rows = np.stack(logits).astype(np.float64)
        calibration, many = self.classifier.calibration, self.classifier.multi_label
        temperature = 1.0 if calibration is None else calibration.temperature
        spans = [window.span for window in windows]
        heard = compute_probabilities(rows, temperature, many)
        return self.classifier.summary(path, heard, compute_probabilities(rows, 1.0, many), spans)


class Bank:
    """Adapters by name on one backbone, whose arrays are in memory once. Any thread may ask.

    Args:
        base: the backbone's weights where they are not where they were in training.
        largest: clips of the largest batch.
    """

    def __init__(self, base: str | os.PathLike[str] | None = None, *, largest: int = 16) -> None:
        self._base = base
        self._bases: dict[Any, AST] = {}
        self._held: dict[str, Held] = {}
        self._groups: dict[Any, Group] = {}
        self._keys = itertools.count()
        self._largest = largest
        self._lock = threading.RLock()
        self._loading = threading.Lock()

    def load(self, name: str, path: str | os.PathLike[str]) -> Held:
        """Loads an adapter, in the place of the one of that name.

        Raises:
            DataError: it cannot be read, or is of another backbone than the adapters held.
        """
        with self._loading:  # one at a time; requests go on meanwhile
            adapter = load_adapter(path, base=self._base_of(path))
            try:
                calibration = read_calibration(adapter.info, len(adapter.classes))
                for held in self.all():
                    if held.name != name:
                        check_same_backbone(held.adapter, adapter, held.name, name)
                        break
            except AatjaxError as error:
                raise DataError(f"{path}: {error}") from error
            classifier = Classifier(
                adapter.model,
                adapter.classes,
                adapter.frontend,
                multi_label=adapter.multi_label,
                calibration=calibration,
            )
            place = structure(adapter)
            size = sum(value.size for value in own(adapter.model).values())
            with self._lock:
                group = self._groups.get(place) or Group(adapter, self._largest)
                held = Held(name, next(self._keys), adapter, classifier, group, size)
                group.add(held.key, adapter)
                self._groups[place] = group
                self.drop(name)
                self._held[name] = held
            return held

    def drop(self, name: str) -> bool:
        """Lets an adapter go once the requests under way are answered; False if there is none."""
        with self._lock:
            held = self._held.pop(name, None)
            if held is not None:
                held.dropped = True
                self._clear(held)
            return held is not None

    @contextlib.contextmanager
    def using(self, name: str) -> Iterator[Held | None]:
        """The adapter of a name, which stays until the block ends; None if there is none."""
        with self._lock:
            held = self._held.get(name)
            if held is not None:
                held.users += 1
        try:
            yield held
        finally:
            if held is not None:
                with self._lock:
                    held.users -= 1
                    self._clear(held)

    def all(self) -> list[Held]:
        """The adapters in memory by name."""
        with self._lock:
            return [self._held[name] for name in sorted(self._held)]

    def _clear(self, held: Held) -> None:
        if held.dropped and not held.users:
            held.group.remove(held.key)
            self._groups = {place: g for place, g in self._groups.items() if len(g)}

    def _base_of(self, path: str | os.PathLike[str]) -> AST | str | os.PathLike[str] | None:
        """The backbone that a file asks for, loaded once for each shape of it."""
        info = read_info(path)
        try:
            origin = Origin(**(info or {})["base"])
            config = ASTConfig.from_json((info or {})["model"])
            key = (self._base, config, origin)
            if key not in self._bases:
                model = load_base(self._base, config, origin)
                for other in self._bases.values():
                    model = sharing(model, other)
                self._bases[key] = model
            return self._bases[key]
        except (AatjaxError, KeyError, TypeError):
            return self._base  # load_adapter says what is wrong
