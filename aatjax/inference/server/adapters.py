"""Many adapters on one frozen backbone, by name."""

import contextlib
import dataclasses
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from aatjax import ops
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


class ClosedError(AatjaxError):
    """The store was closed while adapters were loaded."""


class AdapterStore:
    """Adapters by name on one backbone, whose arrays are in memory once; thread-safe.

    An adapter is there for requests once all that computes it is compiled.

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
        self._closed = False
        self.pending: frozenset[str] = frozenset()
        """Names of the adapters that are being loaded."""
        self.progress: tuple[int, int] = (0, 0)
        """Batch sizes compiled and to compile for the adapters that are being loaded."""

    def load(self, name: str, path: str | os.PathLike[str]) -> ServedAdapter:
        """Load an adapter file and compile it; it then replaces the adapter of that name.

        Raises:
            DataError: the file cannot be read, or its backbone differs from that of the others.
        """
        with self._announce({name}):
            classifiers: dict[str, Classifier] = {}
            self._read(name, path, classifiers)
            return self._install(classifiers)[0]

    def load_all(
        self, files: Mapping[str, Path], report: Callable[[ServedAdapter | AatjaxError], None]
    ) -> None:
        """Load adapter files, then compile them.

        Args:
            files: by name.
            report: called with each adapter once requests can use it, and with the error of
                each file that cannot be read, or whose backbone differs from that of the others.
        """
        with self._announce(files):
            classifiers: dict[str, Classifier] = {}
            for name, path in files.items():
                self._check_open()
                try:
                    self._read(name, path, classifiers)
                except AatjaxError as error:
                    report(error)
            self._install(classifiers, report)

    def add(self, name: str, classifier: Classifier) -> ServedAdapter:
        """Compile a classifier; it then replaces the adapter of that name.

        Raises:
            UsageError: its backbone differs from that of the others.
        """
        with self._announce({name}):
            self._check_backbone(name, classifier, {})
            return self._install({name: classifier})[0]

    @contextlib.contextmanager
    def _announce(self, names: Mapping[str, Any] | set[str]) -> Iterator[None]:
        """Load adapters of these names, one call at a time; requests continue meanwhile."""
        with self._loading, ops.choosing_kernels(backward=False):
            self.pending = frozenset(names)
            try:
                yield
            finally:
                self.pending = frozenset()

    def _read(
        self, name: str, path: str | os.PathLike[str], classifiers: dict[str, Classifier]
    ) -> None:
        """Read a file into the classifiers that are being loaded."""
        adapter = load_adapter(path, base=self._load_base(path))
        try:
            classifier = Classifier.from_adapter(adapter)
            self._check_backbone(name, classifier, classifiers)
        except AatjaxError as error:
            raise DataError(f"{path}: {error}") from error
        classifiers[name] = classifier

    def _check_backbone(
        self, name: str, classifier: Classifier, others: Mapping[str, Classifier]
    ) -> None:
        known = {one.name: one.classifier for one in self.list_adapters()} | dict(others)
        if other := next((one for one in known if one != name), None):
            check_same_backbone(known[other].model, classifier.model, other, name)

    def _install(
        self,
        classifiers: Mapping[str, Classifier],
        report: Callable[[ServedAdapter], None] = lambda served: None,
    ) -> list[ServedAdapter]:
        """Compile classifiers group by group, and have requests use them."""
        groups = list(self._groups)
        found: dict[AdapterGroup, list[ServedAdapter]] = {}
        for name, classifier in classifiers.items():
            group = next((group for group in groups if group.takes(classifier)), None)
            if group is None:
                group = AdapterGroup(classifier, self._largest)
                groups.append(group)
            size = sum(value.size for value in collect_trained(classifier.model).values())
            served = ServedAdapter(name, next(self._keys), classifier, group, size)
            found.setdefault(group, []).append(served)
        self.progress = (0, sum(len(group.sizes) for group in found))
        for group, members in found.items():
            self._check_open()
            group.add({one.key: one.classifier for one in members}, self._count_compiled)
            with self._lock:
                if group not in self._groups:
                    self._groups = [*self._groups, group]
                for served in members:
                    self.drop(served.name)
                    self._served[served.name] = served
            for served in members:
                report(served)
        return [served for members in found.values() for served in members]

    def _count_compiled(self) -> None:
        compiled, total = self.progress
        self.progress = (compiled + 1, total)
        self._check_open()

    def close(self) -> None:
        """End the loading of adapters after the program that is being compiled."""
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the server ends: nothing more is loaded")

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
