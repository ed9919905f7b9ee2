"""Many adapters on one frozen backbone, by name."""

import contextlib
import dataclasses
import itertools
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aatjax.errors import AatjaxError, DataError
from aatjax.inference.adapters import check_same_backbone, share_frozen
from aatjax.inference.classifier import Classifier
from aatjax.inference.server.stacked import AdapterGroup, collect_trained
from aatjax.models.ast import AST
from aatjax.train.adapter_base import load_base
from aatjax.train.adapter_file import load_adapter, read_metadata
from aatjax.train.own_run import lies_in_run


@dataclasses.dataclass
class ServedAdapter:
    """An adapter in memory.

    Attributes:
        name: its name in requests.
        key: its number; a file loaded again has another one.
        classifier: model on the shared backbone, classes, front end and calibration. Its own
            forward pass is never compiled.
        group: the adapters that share its forward pass.
        parameters: number of its own parameters and statistics.
        requests: requests in progress.
        dropped: whether it is removed after the last of them.
    """

    name: str
    key: int
    classifier: Classifier
    group: AdapterGroup
    parameters: int
    requests: int = 0
    dropped: bool = False

    @property
    def method(self) -> str:
        """Name of the adaptation method."""
        return getattr(self.classifier.model.method, "name", "no adapter")


class AdapterStore:
    """Adapters by name on one backbone, whose arrays are in memory once; thread-safe.

    Args:
        base: the backbone's weights if they moved since training.
        largest: largest batch.
    """

    def __init__(self, base: str | os.PathLike[str] | None = None, *, largest: int = 16) -> None:
        self._base = base
        self._bases: dict[Any, AST] = {}
        self._served: dict[str, ServedAdapter] = {}
        self._groups: list[AdapterGroup] = []
        self._keys = itertools.count()
        self._largest = largest
        self._lock = threading.RLock()
        self._loading = threading.Lock()

    def load(self, name: str, path: str | os.PathLike[str]) -> ServedAdapter:
        """Load an adapter file; it replaces the adapter of that name.

        Raises:
            DataError: the file cannot be read, or its backbone differs from that of the others.
        """
        with self._loading:  # one at a time; requests continue meanwhile
            adapter = load_adapter(path, base=self._load_base(path))
            try:
                return self.add(name, Classifier.from_adapter(adapter))
            except AatjaxError as error:
                raise DataError(f"{path}: {error}") from error

    def add(self, name: str, classifier: Classifier) -> ServedAdapter:
        """Add a classifier; it replaces the adapter of that name.

        Raises:
            UsageError: its backbone differs from that of the others.
        """
        model = classifier.model
        if other := next((one for one in self.list_adapters() if one.name != name), None):
            check_same_backbone(other.classifier.model, model, other.name, name)
        size = sum(value.size for value in collect_trained(model).values())
        with self._lock:
            group = next((group for group in self._groups if group.takes(classifier)), None)
            if group is None:
                group = AdapterGroup(classifier, self._largest)
                self._groups = [*self._groups, group]
            served = ServedAdapter(name, next(self._keys), classifier, group, size)
            group.add(served.key, classifier)
            self.drop(name)
            self._served[name] = served
        return served

    def drop(self, name: str) -> bool:
        """Remove an adapter after the requests in progress; return whether there was one."""
        with self._lock:
            served = self._served.pop(name, None)
            if served is not None:
                served.dropped = True
                self._clean(served)
            return served is not None

    @contextlib.contextmanager
    def use(self, name: str) -> Iterator[ServedAdapter | None]:
        """Keep the adapter of a name in memory until the block ends; None if there is none."""
        with self._lock:
            served = self._served.get(name)
            if served is not None:
                served.requests += 1
        try:
            yield served
        finally:
            if served is not None:
                with self._lock:
                    served.requests -= 1
                    self._clean(served)

    def list_adapters(self) -> list[ServedAdapter]:
        """Return the adapters ordered by name."""
        with self._lock:
            return [self._served[name] for name in sorted(self._served)]

    def _clean(self, served: ServedAdapter) -> None:
        if served.dropped and not served.requests:
            served.group.remove(served.key)
            self._groups = [group for group in self._groups if len(group)]

    def _load_base(self, path: str | os.PathLike[str]) -> AST | str | os.PathLike[str] | None:
        """The backbone of an adapter file, loaded once per shape."""
        try:
            stated = read_metadata(path)
            config, origin = stated.model, stated.base
            key = (self._base, config, origin)
            if key not in self._bases:
                own = lies_in_run(Path(path), stated.config)
                model = load_base(self._base, config, origin, own=own)
                for other in self._bases.values():
                    model = share_frozen(model, other)
                self._bases[key] = model
            return self._bases[key]
        except AatjaxError:
            return self._base  # load_adapter reports what is wrong
