"""Batches: order by seed and epoch, every clip once per epoch, padding without weight."""

import dataclasses
import itertools
import json
import time
from typing import Any

import numpy as np
import pytest
from flax import nnx
from jaxtyping import Int16

from aatjax import evaluate
from aatjax.audio.frontend import FrontEnd
from aatjax.data import pipeline
from aatjax.data.pipeline import (
    count_batches,
    keep_in_memory,
    make_eval_batches,
    make_train_batches,
)
from aatjax.data.source import Clip, Reader, Source
from aatjax.errors import DataError, UsageError
from aatjax.models.ast import AST, ASTConfig

FRONTEND = FrontEnd(frames=23)


@dataclasses.dataclass(frozen=True)
class Ramps(Reader):
    """Sample k of clip i is 1000 i + k: where a crop was taken can be read off."""

    samples: int = 4000
    calls: list[str] = dataclasses.field(default_factory=list)

    def read(self, clip: Clip) -> Int16[np.ndarray, " s"]:
        self.calls.append(clip.id)
        return (np.arange(self.samples) + 1000 * int(clip.id)).astype(np.int16)


class Noise(Reader):
    """Noise whose pitch and level are the clip's own, so that no two clips score alike."""

    def read(self, clip: Clip) -> Int16[np.ndarray, " s"]:
        rng = np.random.default_rng(int(clip.id))
        wave = np.convolve(rng.normal(size=4000), rng.normal(size=9), "same")
        return (500 * (1 + int(clip.id)) * wave / np.abs(wave).max()).astype(np.int16)


def ramps(count: int, samples: int = 4000, classes: int = 3) -> Source:
    return Source(
        [Clip(str(i), (i % classes,), None) for i in range(count)],
        [f"c{c}" for c in range(classes)],
        name="ramps",
        reader=Ramps(samples),
    )


def order(batches: Any) -> list[list[int]]:
    """Clip numbers of the rows that count, batch by batch."""
    return [batch["index"][batch["weight"] > 0].tolist() for batch in batches]


def epochs_of(
    source: Source, *, batch: int, epochs: int, seed: int, **more: Any
) -> list[list[int]]:
    rows = order(
        make_train_batches(source, FRONTEND, batch_size=batch, epochs=epochs, seed=seed, **more)
    )
    each = count_batches(source, batch)
    assert len(rows) == epochs * each
    return [list(itertools.chain(*rows[e * each : (e + 1) * each])) for e in range(epochs)]


@pytest.mark.parametrize(("clips", "batch"), [(10, 4), (9, 4), (12, 4), (3, 8), (1, 4), (5, 1)])
def test_every_clip_comes_once_an_epoch(clips: int, batch: int) -> None:
    source = ramps(clips)
    for epoch in epochs_of(source, batch=batch, epochs=4, seed=0):
        assert sorted(epoch) == list(range(clips))


def test_order_is_a_function_of_seed_and_epoch() -> None:
    source = ramps(20)
    once = epochs_of(source, batch=6, epochs=4, seed=7)
    assert once == epochs_of(source, batch=6, epochs=4, seed=7)
    assert len({tuple(epoch) for epoch in once}) == 4
    assert once != epochs_of(source, batch=6, epochs=4, seed=8)
    assert once[0] != list(range(20))
    # Neither threads, nor the length of the run, nor the batch size belong to it.
    assert once == epochs_of(source, batch=6, epochs=4, seed=7, threads=0)
    assert once[:2] == epochs_of(source, batch=6, epochs=2, seed=7)
    assert once == epochs_of(source, batch=5, epochs=4, seed=7)


def test_rows_hold_the_samples_and_target_of_their_clip() -> None:
    source = ramps(7)
    for batch in make_train_batches(source, FRONTEND, batch_size=4, epochs=2, seed=0):
        assert batch["audio"].shape == (4, FRONTEND.samples)
        assert batch["audio"].dtype == np.int16
        assert batch["target"].dtype == batch["weight"].dtype == np.float32
        for row, number in enumerate(batch["index"]):
            assert batch["audio"][row, 0] == 1000 * number
            assert batch["target"][row].argmax() == number % 3
            assert batch["target"][row].sum() == 1


@pytest.mark.parametrize("clips", [9, 3, 8])
def test_last_batch_is_filled_up_with_weight_zero(clips: int) -> None:
    source = ramps(clips)
    for batches in (
        make_train_batches(source, FRONTEND, batch_size=4, epochs=1, seed=0),
        make_eval_batches(source, FRONTEND, batch_size=4),
    ):
        weights = [batch["weight"].tolist() for batch in batches]
        last = clips % 4 or 4
        assert weights[-1] == [1.0] * last + [0.0] * (4 - last)
        assert all(row == [1.0] * 4 for row in weights[:-1])
        assert sum(map(sum, weights)) == clips


def test_evaluation_keeps_the_order_and_cuts_at_the_start() -> None:
    source = ramps(9, samples=9000)
    batches = list(make_eval_batches(source, FRONTEND, batch_size=4))
    assert list(itertools.chain(*order(batches))) == list(range(9))
    assert all(b["audio"][r, 0] == 1000 * b["index"][r] for b in batches for r in range(4))


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("at", [0, 1, 3, 5, 8])
def test_an_iterator_continues_from_its_state(at: int, threads: int) -> None:
    source = ramps(10, samples=9000)

    def batches() -> Any:
        return iter(
            make_train_batches(
                source, FRONTEND, batch_size=4, epochs=3, seed=3, crop="random", threads=threads
            )
        )

    whole = list(batches())
    first = batches()
    for _ in range(at):
        next(first)
    state = json.loads(json.dumps(first.get_state()))  # it travels in a checkpoint's JSON
    again = batches()
    again.set_state(state)
    rest = list(again)
    assert len(rest) == len(whole) - at
    for one, other in zip(whole[at:], rest, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def crops(seed: int, epochs: int = 3, samples: int = 9000) -> np.ndarray:
    """First sample of every crop, `[epoch, clip]`."""
    source = ramps(8, samples=samples)
    starts = np.zeros((epochs, 8), int)
    batches = make_train_batches(
        source, FRONTEND, batch_size=4, epochs=epochs, seed=seed, crop="random"
    )
    for number, batch in enumerate(batches):
        starts[number // 2, batch["index"]] = batch["audio"][:, 0] - 1000 * batch["index"]
        assert (np.diff(batch["audio"], axis=1) == 1).all()
        assert (batch["length"] == FRONTEND.samples).all()
    return starts


def test_random_crops_lie_inside_the_clip_and_are_repeatable() -> None:
    starts = crops(seed=0)
    assert starts.min() >= 0 and starts.max() <= 9000 - FRONTEND.samples
    assert (starts == crops(seed=0)).all()
    assert (starts != crops(seed=1)).any()
    assert (starts[0] != starts[1]).any(), "every epoch draws new crops"
    assert len(np.unique(starts)) > 12


def test_random_crops_reach_both_ends() -> None:
    starts = crops(seed=0, epochs=20, samples=FRONTEND.samples + 1)
    assert set(np.unique(starts)) == {0, 1}


def test_short_clips_are_never_cropped() -> None:
    source = ramps(3, samples=1000)
    for batch in make_train_batches(
        source, FRONTEND, batch_size=3, epochs=2, seed=0, crop="random"
    ):
        assert (batch["length"] == 1000).all()
        assert (batch["audio"][:, 1000:] == 0).all()
        assert (batch["audio"][:, 0] == 1000 * batch["index"]).all()


@pytest.mark.parametrize("clips", [1, 5, 9])
@pytest.mark.parametrize("batch", [1, 4, 64])
def test_figures_do_not_depend_on_batches_and_padding(clips: int, batch: int) -> None:
    """B18: a batch larger than the set, a last batch of one, sizes that do not divide."""
    config = ASTConfig(
        dim=16, depth=1, heads=2, mlp_dim=16, stride=(16, 16), frames=23, num_classes=3
    )
    model = AST(config, rngs=nnx.Rngs(0))
    model.head.linear.kernel[...] = 100 * model.head.linear.kernel[...]  # no near ties
    source = ramps(clips).with_clips(ramps(clips).clips, reader=Noise())
    found = evaluate(model, source, FRONTEND, batch_size=batch)
    alone = evaluate(model, source, FRONTEND, batch_size=clips)
    assert found.to_json() == alone.to_json()
    assert found.clips == clips


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_of_nothing_is_refused(size: int) -> None:
    with pytest.raises(UsageError, match="batch_size"):
        make_train_batches(ramps(3), FRONTEND, batch_size=size, epochs=1, seed=0)
    with pytest.raises(UsageError, match="batch_size"):
        make_eval_batches(ramps(3), FRONTEND, batch_size=size)


def test_no_clip_is_refused() -> None:
    """B18: an empty set is refused where it is made."""
    with pytest.raises(DataError, match="no clips"):
        ramps(3).subset([])


def test_in_memory_reads_once() -> None:
    source = ramps(5)
    reader = source.reader
    assert isinstance(reader, Ramps)
    kept = keep_in_memory(source)
    for _ in range(3):
        for i in range(5):
            np.testing.assert_array_equal(kept.waveform(i), source.waveform(i))
    assert reader.calls.count("0") == 4  # once for `kept`, three times directly
    assert kept.fingerprint() == source.fingerprint()
    assert kept.subset([1]).waveform(0)[0] == 1000


class Broken(Reader):
    """Clip 5 cannot be read."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def read(self, clip: Clip) -> Int16[np.ndarray, " s"]:
        if clip.id == "5":
            raise self.error
        return np.zeros(4000, np.int16)


@pytest.mark.parametrize("error", [DataError("5.wav: is broken"), RuntimeError("boom")])
@pytest.mark.parametrize("threads", [0, 2])
def test_a_clip_that_fails_ends_the_run_and_is_named(error: Exception, threads: int) -> None:
    """F28: what a reading thread raises comes out, soon, as an error that names the file."""
    source = ramps(10).with_clips(
        [dataclasses.replace(c, path=f"/sounds/{c.id}.wav") for c in ramps(10).clips],
        reader=Broken(error),
    )
    began = time.monotonic()
    with pytest.raises(DataError, match=r"5\.wav"):
        list(make_train_batches(source, FRONTEND, batch_size=2, epochs=1, seed=0, threads=threads))
    with pytest.raises(DataError, match=r"5\.wav"):
        list(make_eval_batches(source, FRONTEND, batch_size=2, threads=threads))
    assert time.monotonic() - began < 5


def test_a_partial_batch_is_filled_with_its_rows_in_turn() -> None:
    """Batch statistics count every row: three clips in eight places are 3, 3 and 2 rows."""
    rows = {"index": np.array([4, 7, 9]), "weight": np.ones(3, np.float32)}
    filled = pipeline.pad_batch(rows, size=8)
    assert filled["index"].tolist() == [4, 7, 9, 4, 7, 9, 4, 7]
    assert filled["weight"].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    assert pipeline.pad_batch(rows, size=3) is rows
