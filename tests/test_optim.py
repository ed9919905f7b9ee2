"""Schedules and AdamW against PyTorch, the decay mask, and what the optimiser's state holds."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from aatjax import petl, surgery
from aatjax.errors import UsageError
from aatjax.models.ast import AST, ASTConfig
from aatjax.train.optim import Optim, make_optimizer, make_schedule
from aatjax.train.state import init_state

TINY = ASTConfig(dim=32, depth=2, heads=2, mlp_dim=48, stride=(16, 16), frames=98, num_classes=5)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Types unchecked, as they are for a user: what is refused is refused by our own words."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def adapted(method: petl.Method) -> AST:
    return petl.adapt(AST(TINY, rngs=nnx.Rngs(0)), method)


def start() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "kernel": rng.normal(size=(4, 3)).astype(np.float32),
        "bias": rng.normal(size=(3,)).astype(np.float32),
    }


def gradients(steps: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [
        {name: rng.normal(size=value.shape).astype(np.float32) for name, value in start().items()}
        for _ in range(steps)
    ]


def run_ours(optim: Optim, *, per_epoch: int, epochs: int) -> list[dict[str, np.ndarray]]:
    tx = make_optimizer(optim, steps_per_epoch=per_epoch, epochs=epochs)
    params: Any = jax.tree.map(jnp.asarray, start())
    state = tx.init(params)
    seen = []
    for gradient in gradients(per_epoch * epochs):
        updates, state = tx.update(jax.tree.map(jnp.asarray, gradient), state, params)
        params = optax.apply_updates(params, updates)
        seen.append(jax.tree.map(np.asarray, params))
    return seen


def run_torch(
    optim: Optim, *, per_epoch: int, epochs: int, per_batch: bool, learning_rate: Any
) -> tuple[list[dict[str, np.ndarray]], list[float]]:
    params = {name: torch.nn.Parameter(torch.tensor(v)) for name, v in start().items()}
    adamw = torch.optim.AdamW(
        list(params.values()),
        lr=optim.lr,
        betas=(optim.b1, optim.b2),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
    )
    schedule = learning_rate(adamw)
    seen, rates = [], []
    grads = gradients(per_epoch * epochs)
    for epoch in range(epochs):
        for step in range(per_epoch):
            for name, value in params.items():
                value.grad = torch.tensor(grads[epoch * per_epoch + step][name])
            rates.append(adamw.param_groups[0]["lr"])
            if optim.clip is not None:
                torch.nn.utils.clip_grad_norm_(list(params.values()), optim.clip)
            adamw.step()
            seen.append({name: v.detach().numpy().copy() for name, v in params.items()})
            if per_batch:
                schedule.step()
        if not per_batch:
            schedule.step()
    return seen, rates


def assert_same(ours: list[dict[str, np.ndarray]], theirs: list[dict[str, np.ndarray]]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_cosine_is_adamw_with_cosine_annealing_every_batch(clip: float | None) -> None:
    optim = Optim(lr=5e-3, weight_decay=0.1, clip=clip)
    total = 7 * 3
    theirs, rates = run_torch(
        optim,
        per_epoch=7,
        epochs=3,
        per_batch=True,
        learning_rate=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=total),
    )
    assert_same(run_ours(optim, per_epoch=7, epochs=3), theirs)
    rate = make_schedule(optim, steps_per_epoch=7, epochs=3)
    np.testing.assert_allclose([float(rate(s)) for s in range(total)], rates, atol=1e-9)
    assert float(rate(total)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("first", "every"), [(5, 1), (2, 1), (1, 3)])
def test_steps_is_adamw_with_milestones_every_epoch(first: int, every: int) -> None:
    optim = Optim(
        lr=1e-3,
        schedule="steps",
        weight_decay=0.05,
        b2=0.999,
        eps=1e-8,
        decay_start=first,
        decay_every=every,
    )
    milestones = list(range(first, 1000, every))
    theirs, rates = run_torch(
        optim,
        per_epoch=3,
        epochs=9,
        per_batch=False,
        learning_rate=lambda o: torch.optim.lr_scheduler.MultiStepLR(o, milestones, gamma=0.85),
    )
    assert_same(run_ours(optim, per_epoch=3, epochs=9), theirs)
    rate = make_schedule(optim, steps_per_epoch=3, epochs=9)
    np.testing.assert_allclose([float(rate(s)) for s in range(27)], rates, atol=1e-9)


def test_the_presets_are_those_of_the_papers() -> None:
    aat = Optim.aat()
    assert (aat.lr, aat.schedule, aat.weight_decay) == (1e-4, "steps", 0.05)
    assert (aat.b1, aat.b2, aat.eps) == (0.9, 0.999, 1e-8)
    assert (aat.decay_start, aat.decay_rate, aat.decay_every) == (5, 0.85, 1)
    moa = Optim.soft_moa()
    assert (moa.lr, moa.schedule, moa.weight_decay) == (5e-3, "cosine", 0.1)
    assert (moa.b1, moa.b2, moa.eps) == (0.9, 0.98, 1e-6)


def test_a_schedule_shorter_than_its_first_decay_is_constant() -> None:
    rate = make_schedule(Optim.aat(), steps_per_epoch=4, epochs=3)
    assert {float(rate(s)) for s in range(12)} == {float(np.float32(1e-4))}


def test_warm_up_rises_to_the_peak_and_the_cosine_ends_at_zero() -> None:
    rate = make_schedule(Optim(lr=1.0, warmup_steps=4), steps_per_epoch=5, epochs=4)
    np.testing.assert_allclose([float(rate(s)) for s in range(5)], [0, 0.25, 0.5, 0.75, 1.0])
    assert float(rate(12)) == pytest.approx(0.5)
    assert float(rate(20)) == pytest.approx(0, abs=1e-7)


def test_warm_up_does_not_move_the_epochs_of_the_steps() -> None:
    optim = Optim(lr=1.0, schedule="steps", warmup_steps=4, decay_start=2)
    rate = make_schedule(optim, steps_per_epoch=5, epochs=6)
    assert float(rate(9)) == 1.0
    assert float(rate(10)) == pytest.approx(0.85)


def decayed(model: AST, optim: Optim) -> dict[str, bool]:
    """Which leaves shrink when their gradients are zero."""
    trainable = surgery.split(model).trainable
    ones = jax.tree.map(jnp.ones_like, trainable)
    tx = make_optimizer(optim, steps_per_epoch=1, epochs=10)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, ones), tx.init(ones), ones)
    parts = surgery.split(model)
    moved = surgery.join(parts.graphdef, updates, parts.stats, parts.frozen)
    arrays = surgery.arrays(moved, nnx.Param)
    return {path: bool((np.asarray(value) != 0).all()) for path, value in arrays.items()}


@pytest.mark.parametrize(
    "method", [petl.SoftMoA(reduction=8.0), pytest.param(petl.Full(), marks=pytest.mark.slow)]
)
def test_decay_mask_leaves_biases_and_norms_alone(method: petl.Method) -> None:
    model = adapted(method)
    everything = decayed(model, Optim())
    assert all(everything.values())
    matrices = decayed(model, Optim(decay_mask="no_bias_ln"))
    assert set(matrices) == set(everything)
    for path, decays in matrices.items():
        last = path.rpartition("/")[2]
        spared = last in ("bias", "scale", "b_down", "b_up")
        assert decays is not spared, path
    assert any(matrices.values()) and not all(matrices.values())


@pytest.mark.parametrize(
    "method", [petl.Linear(), petl.AAT(), petl.SoftMoA(reduction=8.0), petl.Full()]
)
@pytest.mark.parametrize("optim", [Optim(), Optim.aat(), Optim(clip=1.0, decay_mask="no_bias_ln")])
def test_optimiser_state_has_exactly_the_trainable_leaves(
    method: petl.Method, optim: Optim
) -> None:
    model = adapted(method)
    parts = surgery.split(model)
    tx = make_optimizer(optim, steps_per_epoch=3, epochs=2)
    state = init_state(parts.trainable, parts.stats, tx, average=False)
    leaves = jax.tree.leaves(state.opt_state)
    counters = [leaf for leaf in leaves if leaf.ndim == 0]
    moments = [leaf for leaf in leaves if leaf.ndim > 0]
    trainable = jax.tree.leaves(parts.trainable)
    assert len(moments) == 2 * len(trainable)
    assert len(counters) == 2 and all(c.dtype == jnp.int32 for c in counters)
    shapes = sorted(leaf.shape for leaf in trainable)
    assert sorted(leaf.shape for leaf in moments) == sorted(shapes + shapes)
    assert sum(leaf.size for leaf in trainable) == sum(
        value.size for value in surgery.arrays(model, nnx.Param).values()
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0.0},
        {"lr": float("nan")},
        {"lr": float("inf")},
        {"lr": -1e-3},
        {"schedule": "cosin"},
        {"decay_mask": "none"},
        {"decay_every": 0},
        {"decay_start": 0},
        {"weight_decay": -0.1},
        {"weight_decay": float("nan")},
        {"warmup_steps": -1},
        {"b1": 1.0},
        {"b2": -0.1},
        {"eps": 0.0},
        {"clip": 0.0},
        {"decay_rate": -1.0},
    ],
)
def test_values_that_cannot_be_are_refused_by_name(wrong: dict[str, Any], unchecked: None) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Optim(**wrong)
