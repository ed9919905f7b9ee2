"""Soft-MoA against Dense-MoA as experts, slots and input grow (arXiv 2402.00828, section 4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from aatjax.analysis.method_costs import MethodCost
from aatjax.analysis.step_timing import prepare_steps
from aatjax.errors import UsageError
from aatjax.io.progress import track
from aatjax.io.timing import time_interleaved
from aatjax.models.config import ASTConfig
from aatjax.petl import DenseMoA, SoftMoA

BUDGET = 903_672
"""Parameters of Soft-MoA on AST-base with 7 experts of width 6 and one slot each."""


@dataclasses.dataclass(frozen=True)
class ScalingPoint:
    """Soft-MoA and Dense-MoA with the same experts.

    Attributes:
        frames, tokens: length of the input.
        experts, slots, width: the mixture.
        parameters: trainable parameters of Soft-MoA.
        soft, dense: training FLOPs per clip in the mixtures.
        step_soft, step_dense: training FLOPs per clip.
        measured: time of Dense-MoA's training step over Soft-MoA's, if timed.
    """

    frames: int
    tokens: int
    experts: int
    slots: int
    width: int
    parameters: int
    soft: int
    dense: int
    step_soft: int
    step_dense: int
    measured: float | None = None


def sweep_mixtures(
    config: ASTConfig,
    *,
    experts: Sequence[int],
    slots: Sequence[int],
    lengths: Sequence[int],
    budget: int = BUDGET,
    timed: tuple[int, int] | None = None,
) -> list[ScalingPoint]:
    """Vary the experts at one slot, then slots and input lengths at seven experts.

    The budget determines the bottleneck width, at least 1. Mixtures that exceed the budget at width
    1 are left out.

    Args:
        config: the model; its input length is that of the first two sweeps.
        experts, slots, lengths: the values of each sweep, lengths in frames.
        budget: parameters of all mixtures of the model.
        timed: (clips per step, rounds) to measure the training steps too.

    Raises:
        UsageError: no mixture is within the budget.
    """
    points = [(config.frames, n, 1) for n in experts]
    points += [(config.frames, 7, p) for p in slots]
    points += [(length, 7, 1) for length in lengths]
    rows = []
    distinct = dict.fromkeys(points)
    for length, n, p in track(distinct, "sizes", len(distinct)):
        width = fit_width(config, n, p, budget)
        if width >= 1:
            changed = dataclasses.replace(config, frames=length)
            rows.append(_compare_mixtures(changed, n, p, width, timed))
    if not rows:
        raise UsageError(f"budget {budget:,} is below the smallest mixture: give more, or fewer")
    return rows


def _compare_mixtures(
    config: ASTConfig, experts: int, slots: int, width: int, timed: tuple[int, int] | None
) -> ScalingPoint:
    methods = {
        "soft": SoftMoA(num_experts=experts, slots=slots, width=width),
        "dense": DenseMoA(num_experts=experts, width=width),
    }
    soft, dense = (MethodCost(config, name, method) for name, method in methods.items())
    measured = None
    if timed is not None:
        batch_size, rounds = timed
        steps = {
            name: prepare_steps(config, method, batch_size=batch_size).train
            for name, method in methods.items()
        }
        timings = time_interleaved(steps, rounds=rounds)
        measured = timings["dense"].compute_ratio(timings["soft"])
    return ScalingPoint(
        frames=config.frames,
        tokens=config.num_tokens,
        experts=experts,
        slots=slots,
        width=width,
        parameters=soft.trainable,
        soft=soft.training.adapter,
        dense=dense.training.adapter,
        step_soft=soft.training.total,
        step_dense=dense.training.total,
        measured=measured,
    )


def fit_width(config: ASTConfig, experts: int, slots: int, budget: int) -> int:
    """Return the widest bottleneck of one Soft-MoA per block within the budget, or less than 1."""
    each = budget // (config.depth * experts)
    return (each - config.dim * (1 + slots)) // (2 * config.dim + 1)
