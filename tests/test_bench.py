"""FLOPs and costs of methods against closed formulas, XLA and manual counts; timing."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aatjax.analysis import method_costs
from aatjax.analysis.flops import count_flops, count_flops_by_scope
from aatjax.analysis.method_costs import MethodCost, compute_mixture_flops, make_program
from aatjax.analysis.scaling import fit_width, sweep_mixtures
from aatjax.analysis.step_timing import LoopedMoA, prepare_steps
from aatjax.cli.main import run
from aatjax.errors import UsageError
from aatjax.io.timing import time_interleaved
from aatjax.models.ast import AST
from aatjax.models.config import ASTConfig
from aatjax.petl import TABLE, adapt
from aatjax.petl.dense_moa import DenseMoA
from aatjax.petl.soft_moa import SoftMoA

BASE = ASTConfig.size("base", frames=1024, num_classes=50, scan=True)
"""Scanned: one block of twelve is traced, and counted twelve times."""
TINY = ASTConfig.size("tiny", frames=98, num_classes=5)


@functools.cache
def cost(name: str) -> MethodCost:
    """The cost of a row of the papers' tables on AST-base."""
    return MethodCost(BASE, name, TABLE[name])


def test_the_mixtures_cost_what_the_formula_says() -> None:
    """N = 7, r = 6, p = 1 on 1,214 tokens of width 768, twelve sites, written out."""
    m, d, n, r = 1214, 768, 7, 6
    soft = 12 * 2 * (3 * m * n * d + 2 * n * d * r)
    dense = 12 * 2 * (2 * m * n * d * r + 2 * m * n * d)
    assert compute_mixture_flops(BASE, SoftMoA()) == soft
    assert compute_mixture_flops(BASE, DenseMoA()) == dense
    assert 6 * (compute_mixture_flops(BASE, SoftMoA(blocks="last2")) or 0) == soft
    assert 4 * (compute_mixture_flops(BASE, DenseMoA(blocks="last3")) or 0) == dense
    assert cost("soft_moa").forward.adapter == soft
    assert cost("dense_moa").forward.adapter == dense
    both = MethodCost(BASE, "both", SoftMoA(location="both", slots=2)).forward
    assert both.adapter == 24 * 2 * (6 * m * n * d + 4 * n * d * r)


def test_the_parts_of_a_mixture_add_up() -> None:
    for name in ("soft_moa", "dense_moa"):
        forward, training = cost(name).forward, cost(name).training
        for part in (forward, training):
            assert sum(part.inside.values()) == part.adapter
        assert 2 * forward.adapter <= training.adapter <= 4 * forward.adapter
    inside = cost("soft_moa").forward.inside
    assert inside["logits"] == inside["dispatch"] == inside["combine"] == 12 * 2 * 1214 * 7 * 768
    assert inside["experts"] == 12 * 2 * 2 * 7 * 768 * 6


def test_a_formula_that_disagrees_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(method_costs, "compute_mixture_flops", lambda config, method: 1_000_000)
    with pytest.raises(UsageError, match="the closed formula gives 1,000,000"):
        MethodCost(TINY, "soft", SoftMoA()).forward  # noqa: B018


@pytest.mark.parametrize("name", ["soft_moa", "dense_moa", "aat_ms", "lora"])
def test_xla_counts_the_same_and_element_wise_work(name) -> None:
    """One block of AST-base with no loop in it, where XLA's count is complete."""
    config = dataclasses.replace(ASTConfig.size("base", frames=128, num_classes=50), depth=1)
    model = nnx.eval_shape(lambda: adapt(AST(config, rngs=nnx.Rngs(0)), TABLE[name]))
    forward, *arguments = make_program(model)
    counted = jax.jit(forward).lower(*arguments).cost_analysis()["flops"]
    assert 1 < counted / MethodCost(config, name, TABLE[name]).forward.total < 1.02


def test_the_backbone_is_the_same_whatever_is_added() -> None:
    plain = cost("linear").forward
    assert plain.adapter == 0
    for name in ("soft_moa", "lora", "full"):
        assert cost(name).forward.backbone == plain.backbone
    longer = cost("spt_300").forward
    assert longer.backbone > 1.2 * plain.backbone  # 300 more tokens


def test_no_weight_gradient_of_a_frozen_backbone_is_counted() -> None:
    linear = cost("linear")
    assert linear.training.backbone == linear.forward.backbone and linear.activation_bytes < 100_000
    soft, full = (cost(n) for n in ("soft_moa", "full"))
    assert 1.9 < soft.training.backbone / soft.forward.backbone < 2.4
    assert 2.9 < full.training.backbone / full.forward.backbone < 3.2
    assert soft.activation_bytes < full.activation_bytes


def test_scopes_survive_transformations() -> None:
    @jax.jit
    def f(w, x):
        with jax.named_scope("outer"), jax.named_scope("inner"):
            return jnp.sum(jnp.sin(x @ w) @ w)

    def loop(w, x):
        return jax.lax.scan(lambda c, _: (jax.checkpoint(f)(w, c) * c, None), x, length=3)[0].sum()

    w, x = jnp.ones((4, 4)), jnp.ones((4, 4))
    found = count_flops_by_scope(jax.grad(loop), w, x)
    assert all({"outer", "inner"} <= set(names) for names in found)
    assert sum(found.values()) == count_flops(jax.grad(loop), w, x)
    assert count_flops(loop, w, x) == 3 * 2 * 2 * 4**3


def test_a_kernels_products_are_counted() -> None:
    from aatjax_kernels.attention import attention

    q = jnp.ones((1, 256, 2, 64))
    count = count_flops(lambda q: attention(q, q, q, implementation="tpu", interpret=True), q)
    assert count == 2 * 2 * 2 * 256 * 256 * 64


def test_looped_experts_are_the_same_function_of_the_same_size() -> None:
    assert "looped_moa" not in TABLE
    config = dataclasses.replace(TINY, num_classes=3)
    looped = MethodCost(config, "a", LoopedMoA())
    batched = MethodCost(config, "b", DenseMoA())
    assert looped.trainable == batched.trainable
    assert abs(looped.forward.adapter / batched.forward.adapter - 1) < 0.35


def test_steps_run() -> None:
    steps = prepare_steps(dataclasses.replace(TINY, depth=1), TABLE["lora"], batch_size=2)
    steps.train()
    steps.infer()
    assert steps.trainable > 0 and (steps.temporary_bytes or 1) > 0


def test_timing_is_interleaved_by_round() -> None:
    calls: list[str] = []
    found = time_interleaved(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3
    )
    assert calls == ["a", "b"] * 5 and len(found["a"].seconds) == 3
    slow = dataclasses.replace(found["a"], seconds=(2.0, 4.0, 9.0))
    fast = dataclasses.replace(found["a"], seconds=(1.0, 4.0, 3.0))
    assert slow.compute_ratio(fast) == 2.0 and slow.median == 4.0


def test_the_sweep_keeps_the_budget() -> None:
    # The paper's settings (N, r) near 900 K; 32 experts exceed it even at one hidden unit.
    widths = [fit_width(BASE, experts, 1, 903_672) for experts in (1, 7, 24, 32)]
    assert 46 <= widths[0] <= 49 and widths[1:3] == [6, 1] and widths[3] < 1
    short = dataclasses.replace(BASE, frames=100)
    rows = sweep_mixtures(short, experts=[32], slots=[8], lengths=[512], budget=903_672)
    shapes = [(row.frames, row.experts, row.slots, row.width) for row in rows]
    assert shapes == [(100, 7, 8, 2), (512, 7, 1, 6)]
    for row in rows:
        assert row.soft > 0 and (row.dense > row.soft) == (row.slots == 1)
    with pytest.raises(UsageError, match="below the smallest mixture"):
        sweep_mixtures(TINY, experts=[2], slots=[], lengths=[], budget=10)


def test_the_command_line(capsys) -> None:
    command = ["bench", "flops", "--size", "tiny", "--frames", "98", "--methods", "soft_moa"]
    assert run(command) == 0
    assert "logits" in capsys.readouterr().out
    assert run([*command, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["forward"]["total"] == sum(
        row["forward"][k] for k in ("backbone", "adapter", "head")
    )
    assert run([*command[:-1], "linear", "--markdown"]) == 0
    assert capsys.readouterr().out.count("|") > 20
    assert run(["bench", "flop"]) == 2
    assert "did you mean 'flops'" in capsys.readouterr().err
    assert run(["bench", "flops", "--methods", "soft_mao"]) == 2
    assert "did you mean 'soft_moa'" in capsys.readouterr().err
    assert run(["bench"]) == 0
    assert "scaling" in capsys.readouterr().out


@pytest.mark.slow
def test_a_step_is_measured(capsys) -> None:
    command = [
        "bench",
        "step",
        "--size",
        "tiny",
        "--frames",
        "98",
        "--batch-size",
        "2",
        "--rounds",
        "2",
        "--methods",
        "linear",
        "dense_moa",
        "--json",
    ]
    assert run(command) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["name"] for row in rows] == ["linear", "dense_moa"]
    assert rows[0]["over_linear"] == rows[1]["over_dense"] == 1.0
    assert np.isfinite([row["train_s"] for row in rows]).all()
