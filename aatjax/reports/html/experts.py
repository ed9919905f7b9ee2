"""The expert atlas: where each expert of a mixture reads and writes, and whom it serves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from aatjax.reports.html import charts
from aatjax.reports.html.markup import Markup, join, tag
from aatjax.reports.routing_maps import Atlas, Expert, Site

MOST_MAPS = 240  # pictures of the atlas: beyond, evenly spaced mixtures are drawn


def section(drawn: Atlas | str) -> Markup | None:
    """The atlas, or why there is none."""
    heading = tag("h2", "Atlas of the experts")
    if isinstance(drawn, str):
        return None if "no mixture" in drawn else join([heading, tag("p", f"{drawn}.")])
    alarms = [
        tag("p", alarm.text, class_="warn" if alarm.severity == "alarm" else "quiet")
        for alarm in drawn.alarms[:20]
    ]
    if not any(alarm.severity == "alarm" for alarm in drawn.alarms):
        alarms.insert(0, tag("p", "No mixture has collapsed: every expert is used."))
    chosen = _chosen(drawn.sites)
    lead = (
        f"Mean routing weights over {drawn.clips} clips. Above, what an expert's slots are made of "
        "(dispatch); below, which tokens take its output (combine); up is higher frequency, right "
        "is later; CLS and DIST are on the same scale. Use 1 is a fair share. "
    )
    if all(expert.read is None for site in drawn.sites for expert in site.experts):
        lead = (
            f"Mean gates over {drawn.clips} clips: which tokens take an expert's output; up is "
            "higher frequency, right is later. Use 1 is a fair share. "
        )
    left_out = len(drawn.sites) - len(chosen)
    if left_out:
        lead += f"{left_out} of {len(drawn.sites)} mixtures are left out to bound the file. "
    parts: list[object] = [heading, alarms, tag("p", lead, class_="quiet"), _overview(drawn)]
    parts.append(tag("figure", charts.scale(), class_="legend"))
    for number, site in enumerate(chosen):
        parts.append(
            tag(
                "details",
                tag("summary", tag("strong", site.path), f" - {_told(site)}"),
                tag(
                    "div",
                    [_expert(drawn, site, i) for i in range(len(site.experts))],
                    class_="experts",
                ),
                open=number in (0, len(chosen) - 1),
            )
        )
    return join(parts)


def _chosen(sites: Sequence[Site]) -> list[Site]:
    maps = max(1, sum(2 if e.read is not None else 1 for e in sites[0].experts)) if sites else 1
    most = max(1, MOST_MAPS // maps)
    if len(sites) <= most:
        return list(sites)
    return [sites[round(i)] for i in np.linspace(0, len(sites) - 1, most)]


def _told(site: Site) -> str:
    text = f"balance {site.balance:.2f}, writing entropy {site.combine_entropy:.2f}"
    spread = [expert.entropy for expert in site.experts if expert.entropy is not None]
    if spread:
        text += f", reading entropy {np.mean(spread):.2f}"
    if site.similarity is not None:
        text += f", likeness of slots {site.similarity:.2f}"
    return text


def _overview(drawn: Atlas) -> Markup:
    """Use of the experts of every mixture."""
    rows = []
    for site in drawn.sites:
        use = [expert.use for expert in site.experts]
        names = [str(i) for i in range(len(use))]
        rows.append(
            tag(
                "figure",
                charts.bars(use, names, title=f"use of the experts of {site.path}"),
                tag("figcaption", f"{site.path}: use of its experts"),
            )
        )
    return tag("div", rows, class_="cards")


def _expert(drawn: Atlas, site: Site, index: int) -> Markup:
    expert = site.experts[index]
    parts: list[object] = [tag("h3", f"Expert {index}")]
    text = f"use {expert.use:.2f}"
    if expert.entropy is not None:
        text += f", reading entropy {expert.entropy:.2f}"
    parts.append(tag("p", text, class_="quiet"))
    where = f"{site.path}, expert {index}"
    pairs = [
        ("reads", expert.read, expert.read_special),
        ("writes", expert.write, expert.write_special),
    ]
    maps = [
        tag(
            "figure",
            charts.grid_map(grid, title=f"where {where} {verb}"),
            tag("figcaption", f"{verb} {_place(drawn, grid)}{_special(drawn, special)}"),
        )
        for verb, grid, special in pairs
        if grid is not None
    ]
    parts.append(tag("div", maps, class_="pair"))
    parts.append(tag("p", _serves(drawn, expert), class_="quiet"))
    return tag("div", parts, class_="card")


def _place(drawn: Atlas, grid: np.ndarray) -> str:
    band, span = drawn.band(grid), drawn.span(grid)
    text = "all frequencies alike" if band is None else f"{band[0]:.0f} to {band[1]:.0f} Hz"
    return text if span is None else f"{text}, {span[0]:.2f} to {span[1]:.2f} s"


def _special(drawn: Atlas, weights: tuple[float, ...]) -> str:
    if not weights:
        return ""
    pairs = zip(drawn.special, weights, strict=True)
    return "; " + ", ".join(f"{name} {value:.2f}" for name, value in pairs)


def _serves(drawn: Atlas, expert: Expert) -> str:
    found = drawn.serves(expert)
    if not found:
        return "serves all classes alike"
    return "serves " + ", ".join(f"{name} (x{lift:.2f})" for name, lift in found)
