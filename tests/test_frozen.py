"""Frozen weights under Flax's own idioms, and in memory that a training step may take."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from petl_cases import make_clips, make_model

import aatjax
from aatjax import petl, surgery
from aatjax.models.tokens import call_masked

METHODS = [petl.AAT(), petl.Adapter(block="conformer"), petl.LoRA(), petl.SoftMoA(), petl.Linear()]
LABELS = jnp.array([0, 2])


def compute_loss(model, x=None):
    logits = model(make_clips() if x is None else x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()


def copy_arrays(model) -> dict[str, np.ndarray]:
    return {path: np.array(value) for path, value in surgery.arrays(model).items()}


def find_moved(model, before) -> set[str]:
    return {p for p, v in surgery.arrays(model).items() if not np.array_equal(v, before[p])}


def take_steps(model, steps: int = 2) -> None:
    """Flax's documented loop."""
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.value_and_grad(compute_loss)(model)[1]
        optimizer.update(model, grads)

    for _ in range(steps):
        step(model, optimizer)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_flax_own_loop_moves_what_is_trainable_and_nothing_else(method):
    model = aatjax.adapt(make_model(), method)
    trained = set(surgery.arrays(model, nnx.Param))
    before = copy_arrays(model)
    take_steps(model)
    statistics = set(surgery.arrays(model, nnx.BatchStat))
    assert find_moved(model, before) - statistics == trained
    counted = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert counted == aatjax.summary(model).trainable < aatjax.summary(model).total / 2


def test_a_gradient_by_flax_default_has_the_trainable_leaves():
    model = aatjax.adapt(make_model(), petl.AAT())
    for grads in (nnx.grad(compute_loss)(model), nnx.value_and_grad(compute_loss)(model)[1]):
        assert len(jax.tree.leaves(grads)) == len(surgery.arrays(model, nnx.Param))


def test_a_loaded_model_is_frozen_and_full_fine_tuning_trains_all_of_it():
    model = aatjax.load("random:tiny", num_classes=3)
    assert not jax.tree.leaves(nnx.state(model, nnx.Param))
    assert aatjax.summary(model).trainable == 0
    full = aatjax.summary(aatjax.adapt(model, petl.Full()))
    assert (full.trainable, full.frozen) == (aatjax.summary(model).total, 0)


class Gated(nnx.Module):
    """Plain Flax layers beside an MLP."""

    def __init__(self, base: nnx.Module, dim: int, rngs: nnx.Rngs):
        self.base = base
        self.inner = nnx.Linear(dim, 4, rngs=rngs)
        self.outer = nnx.LoRA(4, 2, dim, rngs=rngs)

    def __call__(self, x, mask=None):
        return call_masked(self.base, x, mask) + self.outer(jax.nn.silu(self.inner(x)))


@dataclasses.dataclass(frozen=True)
class Gate(petl.Method):
    """A method written with layers of Flax alone."""

    name: ClassVar[str] = "gate_of_the_test"
    shared: bool = False

    def inject(self, model, *, rngs):
        one = nnx.Linear(model.config.dim, 4, rngs=rngs)

        def build(_, base):
            wrapper = Gated(base, model.config.dim, rngs)
            if self.shared:
                wrapper.inner = one
            return wrapper

        surgery.wrap(model, "blocks/*/mlp", build)


def test_the_layers_of_a_method_of_ones_own_are_trained():
    model = aatjax.adapt(make_model(), Gate())
    before = copy_arrays(model)
    take_steps(model)
    moved = find_moved(model, before)
    assert {"blocks/0/mlp/inner/kernel", "blocks/1/mlp/outer/lora_a"} <= moved
    assert not any(
        path.startswith(("blocks/0/attn", "embed", "blocks/0/mlp/outer/k")) for path in moved
    )


def test_a_layer_that_blocks_share_is_counted_and_trained_once():
    plain, depth = make_model(), make_model().config.depth
    dim = plain.config.dim
    apart, shared = (aatjax.adapt(plain, Gate(shared=shared)) for shared in (False, True))
    once = aatjax.summary(apart).trainable - (depth - 1) * (dim * 4 + 4)
    assert aatjax.summary(shared).trainable == once
    assert sum(v.size for v in jax.tree.leaves(nnx.state(shared, nnx.Param))) == once
    surgery.freeze(shared)
    surgery.unfreeze(shared, "blocks/*/mlp/inner/*")
    assert aatjax.summary(shared).trainable == dim * 4 + 4
    assert shared.blocks[0].mlp.inner.kernel is shared.blocks[depth - 1].mlp.inner.kernel


@pytest.mark.parametrize("method", [petl.SoftMoA(), petl.Full()], ids=lambda method: method.name)
def test_donated_trainable_arrays_are_not_those_of_the_base_or_of_a_sibling(method):
    base = make_model()
    sibling, model = aatjax.adapt(base, method), aatjax.adapt(base, method)
    expected = [np.asarray(one(make_clips())) for one in (base, sibling)]
    donate = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 0, state), donate_argnums=0)
    donate(surgery.split(model).trainable)
    for one, logits in zip((base, sibling), expected, strict=True):
        np.testing.assert_array_equal(one(make_clips()), logits)
