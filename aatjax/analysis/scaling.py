"""Soft-MoA against Dense-MoA as experts, slots and input grow (arXiv 2402.00828, section 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from aatjax.analysis.method_costs import method_cost
from aatjax.analysis.step_timing import ready
from aatjax.analysis.timing import in_turn
from aatjax.errors import UsageError
from aatjax.models.config import ASTConfig
from aatjax.petl import DenseMoA, SoftMoA


def sweep(
    shape: Callable[[int], ASTConfig],
    *,
    frames: int,
    experts: Sequence[int],
    slots: Sequence[int],
    lengths: Sequence[int],
    budget: int,
    timed: tuple[int, int] | None = None,
) -> list[dict[str, Any]]:
    """Rows of the sweep: experts at one slot, then slots and lengths at seven experts.

    The budget fixes Soft-MoA's bottleneck width, down to 1; Dense-MoA has the same experts.
    Experts that the budget cannot pay even at width 1 are left out.

    Args:
        shape: the model at an input length.
        frames: the length of the first two sweeps.
        experts, slots, lengths: what is swept.
        budget: parameters of all mixtures of the model.
        timed: (clips a step, rounds) to measure the training steps too.

    Raises:
        UsageError: nothing of the sweep fits the budget.
    """
    points = [(frames, n, 1) for n in experts]
    points += [(frames, 7, p) for p in slots]
    points += [(length, 7, 1) for length in lengths]
    rows = []
    for length, n, p in dict.fromkeys(points):
        config = shape(length)
        width = _width(config, n, p, budget)
        if width is None:
            continue
        soft = SoftMoA(num_experts=n, slots=p, reduction=config.dim / width)
        dense = DenseMoA(num_experts=n, reduction=config.dim / width)
        one, two = method_cost(config, "soft", soft), method_cost(config, "dense", dense)
        measured = None
        if timed is not None:
            batch, rounds = timed
            steps = {
                name: ready(config, method, batch_size=batch).train
                for name, method in (("soft", soft), ("dense", dense))
            }
            found = in_turn(steps, rounds=rounds)
            measured = found["dense"].over(found["soft"])
        rows.append(
            {
                "frames": length,
                "tokens": config.num_tokens,
                "experts": n,
                "slots": p,
                "width": width,
                "parameters": one.trainable,
                "soft": one.training.adapter,
                "dense": two.training.adapter,
                "step_soft": one.training.total,
                "step_dense": two.training.total,
                "measured": measured,
            }
        )
    if not rows:
        raise UsageError(f"budget {budget:,} pays for none of the mixtures: give more, or fewer")
    return rows


def _width(config: ASTConfig, experts: int, slots: int, budget: int) -> int | None:
    """The widest bottleneck that the budget pays for; None where even width 1 is too much."""
    dim, sites = config.dim, config.depth

    def size(width: int) -> int:
        return sites * (experts * (2 * dim * width + width + dim) + dim * experts * slots)

    if size(1) > budget:
        return None
    width = 1
    while size(width + 1) <= budget:
        width += 1
    return width
