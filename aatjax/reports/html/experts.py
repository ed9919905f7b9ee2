"""The section of a report on the routing of experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from markupsafe import Markup

from aatjax.reports.html import charts
from aatjax.reports.html.page import clean
from aatjax.reports.routing_maps import ExpertMap, MixtureMap, RoutingMap

MOST_MAPS = 240  # maps in a report: beyond, evenly spaced mixtures are shown
MOST_ISSUES = 20


def describe_experts(routing: RoutingMap) -> dict[str, Any]:
    """The values of experts.html."""
    kept = _choose_mixtures(routing.mixtures)
    return {
        "clips": routing.clips,
        "collapsed": any(issue.severity == "warning" for issue in routing.issues),
        "issues": routing.issues[:MOST_ISSUES],
        "slots": any(e.read is not None for mixture in routing.mixtures for e in mixture.experts),
        "omitted": len(routing.mixtures) - len(kept),
        "use": [
            (
                mixture.path,
                charts.draw_use(
                    [expert.use for expert in mixture.experts],
                    f"use of the experts of {mixture.path}",
                ),
            )
            for mixture in routing.mixtures
        ],
        "scale": charts.draw_map_scale(),
        "mixtures": [
            {
                "path": mixture.path,
                "text": _describe_mixture(mixture),
                "experts": [_describe_expert(routing, expert) for expert in mixture.experts],
            }
            for mixture in kept
        ],
    }


def _choose_mixtures(mixtures: Sequence[MixtureMap]) -> Sequence[MixtureMap]:
    maps = sum(2 if expert.read is not None else 1 for expert in mixtures[0].experts)
    most = max(1, MOST_MAPS // maps)
    if len(mixtures) <= most:
        return mixtures
    return [mixtures[round(i)] for i in np.linspace(0, len(mixtures) - 1, most)]


def _describe_mixture(mixture: MixtureMap) -> str:
    text = f"balance {mixture.balance:.2f}, combine entropy {mixture.combine_entropy:.2f}"
    entropies = [expert.entropy for expert in mixture.experts if expert.entropy is not None]
    if entropies:
        text += f", dispatch entropy {np.mean(entropies):.2f}"
    if mixture.similarity is not None:
        text += f", slot similarity {mixture.similarity:.2f}"
    return text


def _describe_expert(routing: RoutingMap, expert: ExpertMap) -> dict[str, Any]:
    entropy = "" if expert.entropy is None else f", dispatch entropy {expert.entropy:.2f}"
    ranked = routing.rank_classes(expert)
    classes = Markup(", ").join(
        Markup("{} (x{:.2f})").format(clean(name), lift) for name, lift in ranked
    )
    grids = [
        ("reads", expert.read, expert.read_special),
        ("writes", expert.write, expert.write_special),
    ]
    return {
        "text": f"use {expert.use:.2f}{entropy}",
        "maps": [
            (verb, charts.encode_map(grid), _describe_grid(routing, grid, special))
            for verb, grid, special in grids
            if grid is not None
        ],
        "classes": classes,
    }


def _describe_grid(
    routing: RoutingMap, grid: Float[np.ndarray, "r k"], special: tuple[float, ...]
) -> str:
    band, span = routing.find_band(grid), routing.find_span(grid)
    text = "all frequencies equally" if band is None else f"{band[0]:.0f} to {band[1]:.0f} Hz"
    if span is not None:
        text += f", {span[0]:.2f} to {span[1]:.2f} s"
    if special:
        pairs = zip(routing.special, special, strict=True)
        text += "; " + ", ".join(f"{name} {value:.2f}" for name, value in pairs)
    return text
