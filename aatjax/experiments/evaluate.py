"""Evaluation of adapters: on the test clips of their own run, or on other labelled sounds."""

import dataclasses
from collections.abc import Callable

from aatjax.config import Data
from aatjax.data.source import Source
from aatjax.errors import UsageError
from aatjax.experiments.own_data import find_own_data
from aatjax.experiments.partition import make_partition, open_data
from aatjax.train.adapter_file import TrainedAdapter
from aatjax.train.evaluation import score_clips
from aatjax.train.metrics.results import Metrics


def evaluate_adapter(
    adapter: TrainedAdapter, data: Data | None = None, *, begin: Callable[[], None] = lambda: None
) -> tuple[Metrics, Source]:
    """Evaluate an adapter on the test clips of its own config, or on other labelled sounds.

    Args:
        adapter: from `aatjax.load_adapter`.
        data: other data; its classes must be among the adapter's.
        begin: called when the clips were listed, before they are decoded and scored.
    """
    test = load_test_clips(adapter, data, begin=begin)
    return score_clips(adapter, test).measure(), test


def load_test_clips(
    adapter: TrainedAdapter, data: Data | None = None, *, begin: Callable[[], None] = lambda: None
) -> Source:
    """Return the clips that `evaluate_adapter` evaluates on; arguments as there.

    Raises:
        UsageError: the adapter has no test clips, its set has changed since training, or the
            data have a class that the adapter does not have.
    """

    def match(source: Source) -> Source:
        names, several = adapter.classes, adapter.multi_label
        return source.with_classes(names, "the adapter", multi_label=several)

    if data is not None:

        def check(listed: Source) -> None:
            match(listed)
            begin()

        data = dataclasses.replace(data, channels=adapter.frontend.channels)
        return match(open_data(data, check=check))
    parts = make_partition(find_own_data(adapter), check=lambda parts: begin())
    if adapter.info.get("data") != parts.train.fingerprint():
        raise UsageError(
            f"{parts.train.name}: the training clips are not those that the adapter was "
            "trained on: files were added, removed or changed, and the test clips may include "
            "some it was trained on; name the sounds to evaluate on"
        )
    if parts.test is None:
        raise UsageError("the adapter's config has no test clips: name sounds to evaluate on")
    return match(parts.test)
