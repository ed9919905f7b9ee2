"""A method of one's own with dropout: masks by seed and step, resumed, none in evaluation."""

from collections.abc import Iterator
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array

import aatjax
from aatjax import data, petl, surgery
from aatjax.data.synthetic.dataset import TARGET_SOUNDS
from aatjax.models.ast import AST
from aatjax.petl import Method

SOUNDS = data.Synthetic(TARGET_SOUNDS[:3], clips=4, seconds=1.0)


class Branch(nnx.Module):
    """A linear layer with dropout beside another module."""

    def __init__(self, base: nnx.Module, dim: int, rngs: nnx.Rngs):
        self.base = base
        self.added = nnx.Linear(dim, dim, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        return self.base(x) + self.dropout(self.added(x))  # pyright: ignore[reportCallIssue]


@pytest.fixture(scope="module")
def dropped() -> Iterator[Method]:
    class Dropped(Method):
        name: ClassVar[str] = "dropped_of_a_test"

        def inject(self, model: AST, *, rngs: nnx.Rngs) -> None:
            dim = model.config.dim
            surgery.wrap(model, "blocks/*/mlp", lambda _, base: Branch(base, dim, rngs))

    yield Dropped()
    petl.METHODS.pop(Dropped.name)


def fit(
    method: Method,
    sounds: data.Source = SOUNDS,
    *,
    seed: int = 0,
    scan: bool = False,
    lr: float = 1e-3,
    **options,
) -> aatjax.Run:
    base = aatjax.load("embedded", num_classes=3, scan=scan)
    training = aatjax.Training(epochs=3, batch_size=12, seed=seed)
    model = aatjax.adapt(base, method)
    return aatjax.fit(model, sounds, training=training, lr=lr, show=False, **options)


@pytest.fixture(scope="module")
def run(dropped) -> aatjax.Run:
    return fit(dropped)


def get_weights(run: aatjax.Run) -> dict[str, np.ndarray]:
    return surgery.fetch_arrays(run.model, nnx.Param)


def assert_same(run: aatjax.Run, other: aatjax.Run, atol: float = 0) -> None:
    expected = get_weights(other)
    for path, value in get_weights(run).items():
        np.testing.assert_allclose(value, expected[path], rtol=0, atol=atol, err_msg=path)


def test_masks_follow_the_seed_and_the_step(dropped):
    """With twelve times one clip, nothing but the masks differs between steps."""
    one = np.eye(len(SOUNDS.classes))[np.zeros(12, int)]  # any number of classes, so one will do
    same = data.Arrays([SOUNDS.waveform(0)] * 12, one, SOUNDS.classes)
    runs = [fit(dropped, same, lr=1e-12, seed=seed) for seed in (0, 0, 1)]
    losses = [[row["train/loss"] for row in each.history] for each in runs]
    assert losses[0] == losses[1]
    assert len(set(losses[0] + losses[2])) == 6


@pytest.mark.slow
def test_equal_blocks_in_a_scan_have_masks_of_their_own(dropped, run):
    assert_same(fit(dropped, scan=True), run, atol=1e-5)


def test_an_interrupted_run_goes_on_with_the_masks_that_it_would_have_had(dropped, run, tmp_path):
    class Stopped(Exception):
        pass

    def stop(moment):
        if moment.epoch == 2:
            raise Stopped

    with pytest.raises(Stopped):
        fit(dropped, run_dir=tmp_path / "run", on_epoch=stop)
    assert_same(fit(dropped, run_dir=tmp_path / "run"), run)


def test_nothing_is_dropped_outside_training(dropped, run, tmp_path):
    x = jnp.ones((1, 198, 128))
    adapted = aatjax.adapt(aatjax.load("embedded", num_classes=3), dropped)
    np.testing.assert_array_equal(adapted(x), adapted(x))
    np.testing.assert_array_equal(run.model(x), run.model(x))
    again = aatjax.load_adapter(run.save(tmp_path / "adapter.safetensors"))
    np.testing.assert_array_equal(again.model(x), run.model(x))
    noisy = surgery.clone(run.model)
    noisy.train()
    assert np.abs(noisy(x) - noisy(x)).max() > 1e-3
