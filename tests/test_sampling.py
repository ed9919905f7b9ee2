"""Class-balanced sampling: probabilities, order, resuming, processes that share a batch."""

import itertools
from typing import Any

import numpy as np
import pytest
from jaxtyping import Int16

from aatjax.audio.augment import Augment
from aatjax.audio.frontend import FrontEnd
from aatjax.data.batches import Batches
from aatjax.data.buckets import Bucket
from aatjax.data.pipeline import make_train_batches
from aatjax.data.sampling import compute_draw_shares
from aatjax.data.source import Clip, Reader, Source
from aatjax.errors import UsageError
from aatjax.train.fit_checks import check_inputs
from aatjax.train.training import Training

FRONTEND = FrontEnd(frames=23)


class Silence(Reader):
    def read(self, clip: Clip) -> Int16[np.ndarray, " s"]:
        return np.zeros(400, np.int16)


def label(labels: list[tuple[int, ...]], classes: int = 3, *, multi_label: bool = False) -> Source:
    clips = [Clip(str(i), one, None) for i, one in enumerate(labels)]
    names = [f"c{c}" for c in range(classes)]
    return Source(clips, names, name="s", multi_label=multi_label, reader=Silence())


RARE = label([(0,)] * 90 + [(1,)] * 9 + [(2,)])


def draw(source: Source, *, epochs: int = 1, seed: int = 0, **options: Any) -> Any:
    settings: dict[str, Any] = {"batch_size": 10, "balance": "sampler", "threads": 0, **options}
    return iter(make_train_batches(source, FRONTEND, epochs=epochs, seed=seed, **settings))


def list_rows(batches: Any) -> list[int]:
    return [int(i) for b in batches for i in b["index"][b["weight"] > 0]]


def test_single_label_classes_are_drawn_alike() -> None:
    shares = compute_draw_shares(RARE)
    np.testing.assert_allclose(np.bincount(RARE.labels(), shares), [1 / 3] * 3)
    rows = list_rows(draw(RARE, epochs=30))
    assert len(rows) == 3000
    found = np.bincount(RARE.labels()[rows]) / 3000
    np.testing.assert_allclose(found, [1 / 3] * 3, atol=0.04)


def test_of_several_labels_the_rarest_decides() -> None:
    """The sum of 1 / (clips of the class) over the labels, as in AST's recipe."""
    labels = [(0,), (0, 1), (0, 1, 2), (0,), ()]
    shares = compute_draw_shares(label(labels, multi_label=True))
    wanted = np.array([1 / 4, 1 / 4 + 1 / 2, 1 / 4 + 1 / 2 + 1, 1 / 4, 1])
    np.testing.assert_allclose(shares, wanted / wanted.sum())


def test_windows_of_a_long_clip_count_as_one_clip() -> None:
    # Class 0 has one clip of three windows; class 1 has two clips.
    source, weights = label([(0,), (0,), (0,), (1,), (1,)], 2), np.array([1 / 3] * 3 + [1, 1])
    shares = compute_draw_shares(source, weights)
    np.testing.assert_allclose(shares, [1 / 6] * 3 + [1 / 4] * 2)
    batches = list(draw(source, weights=weights))
    assert all(set(b["weight"].tolist()) <= {0.0, 1.0} for b in batches)


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    once = list_rows(draw(RARE, epochs=3))
    assert once == list_rows(draw(RARE, epochs=3, threads=2, batch_size=7))
    assert once[:100] == list_rows(draw(RARE)) != once[100:200]
    assert once != list_rows(draw(RARE, epochs=3, seed=1))


@pytest.mark.parametrize("at", [1, 10, 17])
def test_an_iterator_continues_from_its_state(at: int) -> None:
    whole = list(draw(RARE, epochs=3))
    began = draw(RARE, epochs=3)
    list(itertools.islice(began, at))
    again = draw(RARE, epochs=3)
    again.set_state(began.get_state())
    rest = list(again)
    assert len(rest) == len(whole) - at
    for one, other in zip(rest, whole[at:], strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_processes_read_their_rows_of_the_same_batches() -> None:
    whole = list(draw(RARE))
    parts = [list(draw(RARE, rows=np.arange(5) + start)) for start in (0, 5)]
    for batch, first, second in zip(whole, *parts, strict=True):
        both = np.concatenate([first["index"], second["index"]])
        np.testing.assert_array_equal(both, batch["index"])


def test_what_cannot_be_balanced_is_refused() -> None:
    buckets = [Bucket(FRONTEND, np.arange(100))]
    with pytest.raises(UsageError, match="omit the buckets"):
        draw(RARE, buckets=buckets)
    training = Training(balance="sampler", buckets=(32,))
    with pytest.raises(UsageError, match=r"omit training\.buckets"):
        check_inputs(RARE, {"train": RARE}, training, Augment())
    batches = Batches([(np.zeros((1, 400), np.int16), [0])], ["a", "b"])
    with pytest.raises(UsageError, match=r"training\.balance draws clips"):
        check_inputs(batches, {}, Training(balance="sampler"), Augment())
    with pytest.raises(UsageError, match=r"training\.balance='even' is not one of none, sampler"):
        Training(balance="even")  # pyright: ignore[reportArgumentType]
