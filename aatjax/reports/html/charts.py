"""Figures as inline SVG: curves, bars, a reliability diagram, a confusion matrix, maps.

Curves differ by colour (Okabe and Ito 2008, safe for colour-blind eyes) and by dashes, so that they
part in grey too; text and lines take the page's colour. Widths are those of a phone's page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from aatjax.reports.html.assets import colour, picture
from aatjax.reports.html.markup import Markup, tag

WIDTH = 360.0
STROKES = (
    ("var(--c1)", None),
    ("var(--c2)", "6 3"),
    ("var(--c3)", "2 3"),
    ("var(--c4)", "8 3 2 3"),
)
MOST_NAMED = 30  # classes whose names fit beside a confusion matrix


@dataclass(frozen=True)
class Curve:
    """One line of a chart; y may have gaps (NaN)."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Frame:
    """A plotting area: data ranges and where they lie in the figure."""

    x: tuple[float, float]
    y: tuple[float, float]
    left: float = 52.0
    right: float = 10.0
    top: float = 10.0
    bottom: float = 38.0
    height: float = 220.0

    def at_x(self, value: float) -> float:
        """Figure coordinate of a data x."""
        inner = WIDTH - self.left - self.right
        return self.left + inner * (value - self.x[0]) / ((self.x[1] - self.x[0]) or 1.0)

    def at_y(self, value: float) -> float:
        """Figure coordinate of a data y."""
        inner = self.height - self.top - self.bottom
        return (
            self.height
            - self.bottom
            - inner * (value - self.y[0]) / ((self.y[1] - self.y[0]) or 1.0)
        )

    def axes(self, x_label: str, y_label: str) -> list[Markup]:
        """Grid lines, ticks and labels."""
        parts: list[Markup] = []
        base = self.height - self.bottom
        for value in ticks(*self.y):
            y = self.at_y(value)
            parts.append(_line(self.left, y, WIDTH - self.right, y, class_="grid"))
            parts.append(_text(self.left - 5, y + 4, short(value), anchor="end"))
        for value in ticks(*self.x, most=6):
            x = self.at_x(value)
            parts.append(_line(x, base, x, base + 4, class_="axis"))
            parts.append(_text(x, base + 16, short(value), anchor="middle"))
        parts.append(_line(self.left, base, WIDTH - self.right, base, class_="axis"))
        middle = (self.left + WIDTH - self.right) / 2
        parts.append(_text(middle, self.height - 5, x_label, anchor="middle"))
        parts.append(
            tag(
                "text",
                y_label,
                x=0,
                y=0,
                text_anchor="middle",
                transform=f"translate(10 {(self.top + base) / 2:.1f}) rotate(-90)",
            )
        )
        return parts


def chart(
    curves: Sequence[Curve],
    *,
    x_label: str,
    y_label: str,
    title: str,
    y: tuple[float, float] | None = None,
) -> Markup:
    """Curves over a common x, with a legend where there are several."""
    xs = [float(v) for curve in curves for v in curve.x]
    ys = [float(v) for curve in curves for v in curve.y if math.isfinite(v)]
    if not xs or not ys:
        return tag("p", "Nothing was written down to draw.", class_="quiet")
    low, high = y or (min(ys), max(ys))
    if y is None:
        room = 0.06 * (high - low) or 0.5
        low, high = low - room, high + room
    legend = 18.0 if len(curves) > 1 else 0.0
    frame = Frame((min(xs), max(xs)), (low, high), top=10.0 + legend, height=220.0 + legend)
    parts: list[object] = [frame.axes(x_label, y_label)]
    at = frame.left
    for number, curve in enumerate(curves):
        stroke, dashes = STROKES[number % len(STROKES)]
        for run in _runs(curve):
            points = " ".join(f"{frame.at_x(x):.1f},{frame.at_y(v):.1f}" for x, v in run)
            parts.append(
                tag(
                    "polyline",
                    points=points,
                    fill="none",
                    stroke=stroke,
                    stroke_width="2",
                    stroke_dasharray=dashes,
                    stroke_linejoin="round",
                )
            )
            if len(run) == 1:
                x, v = run[0]
                parts.append(tag("circle", cx=frame.at_x(x), cy=frame.at_y(v), r=3, fill=stroke))
        if legend:
            parts.append(
                tag(
                    "line",
                    x1=at,
                    y1=10,
                    x2=at + 22,
                    y2=10,
                    stroke=stroke,
                    stroke_width="2",
                    stroke_dasharray=dashes,
                )
            )
            parts.append(_text(at + 26, 14, curve.name))
            at += 42 + 6.2 * len(curve.name)
    return figure(parts, frame.height, title)


def reliability(
    series: Sequence[tuple[str, Sequence[float], Sequence[float], Sequence[float]]], *, title: str
) -> Markup:
    """Share that is right over confidence, one mark a bin, its area by how many there are.

    Args:
        series: (name, confidence, accuracy, count) for each; empty bins are NaN.
        title: for those who cannot see it.
    """
    frame = Frame((0.0, 1.0), (0.0, 1.0), top=28.0, height=300.0)
    parts: list[object] = [frame.axes("confidence", "share that is right")]
    parts.append(
        tag(
            "line",
            x1=frame.at_x(0),
            y1=frame.at_y(0),
            x2=frame.at_x(1),
            y2=frame.at_y(1),
            class_="ideal",
        )
    )
    at = frame.left
    for number, (name, confidence, accuracy, count) in enumerate(series):
        stroke, dashes = STROKES[number % len(STROKES)]
        total = max(1.0, float(np.nansum(count)))
        there = [
            (c, a, n)
            for c, a, n in zip(confidence, accuracy, count, strict=True)
            if n and math.isfinite(c)
        ]
        points = " ".join(f"{frame.at_x(c):.1f},{frame.at_y(a):.1f}" for c, a, _ in there)
        parts.append(
            tag(
                "polyline",
                points=points,
                fill="none",
                stroke=stroke,
                stroke_width="1.5",
                stroke_dasharray=dashes,
            )
        )
        for c, a, n in there:
            x, y, size = frame.at_x(c), frame.at_y(a), 2.5 + 8 * math.sqrt(n / total)
            told = tag("title", f"{name}: {a:.2f} right at {c:.2f}, {n:.0f} entries")
            if number:
                parts.append(
                    tag(
                        "rect",
                        told,
                        x=x - size,
                        y=y - size,
                        width=2 * size,
                        height=2 * size,
                        fill=stroke,
                        fill_opacity="0.55",
                    )
                )
            else:
                parts.append(
                    tag("circle", told, cx=x, cy=y, r=size, fill=stroke, fill_opacity="0.55")
                )
        if number:
            parts.append(tag("rect", x=at, y=5, width=10, height=10, fill=stroke))
        else:
            parts.append(tag("circle", cx=at + 5, cy=10, r=5, fill=stroke))
        parts.append(_text(at + 15, 14, name))
        at += 34 + 6.4 * len(name)
    return figure(parts, frame.height, title)


def confusion(matrix: Int[np.ndarray, "c c"], names: Sequence[str], *, title: str) -> Markup:
    """Clips by true class (row) and predicted one (column), dark where few of the row's lie."""
    size = len(names)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    named = size <= MOST_NAMED
    longest = min(15, max(map(len, names)))
    left, top = (14.0 + 6.2 * longest, 16.0 + 4.9 * longest) if named else (30.0, 24.0)
    right = max(18.0, 4.0 * min(15, len(names[-1]))) if named else 8.0  # the last name leans over
    cell = (WIDTH - left - right) / size
    height = top + size * cell + 8.0
    parts: list[object] = []
    if named:
        for i, name in enumerate(names):
            middle = (i + 0.5) * cell
            text = shortened(name, 15)
            parts.append(_text(left - 5, top + middle + 4, text, anchor="end"))
            parts.append(
                tag(
                    "text",
                    text,
                    x=0,
                    y=0,
                    text_anchor="start",
                    transform=f"translate({left + middle + 4:.1f} {top - 5:.1f}) rotate(-50)",
                )
            )
    else:
        parts.append(_text(left, top - 8, "columns: predicted, rows: true, in the table's order"))
    if size > 60:
        parts.append(_image(picture(share[::-1], 0, 1), left, top, size * cell, size * cell))
    else:
        for i in range(size):
            for j in range(size):
                said = f"{names[i]} as {names[j]}: {matrix[i, j]} of {matrix[i].sum()}"
                parts.append(
                    tag(
                        "rect",
                        tag("title", said),
                        x=left + j * cell,
                        y=top + i * cell,
                        width=cell - min(1.0, cell / 12),
                        height=cell - min(1.0, cell / 12),
                        fill=colour(float(share[i, j])),
                    )
                )
                if size <= 14 and matrix[i, j]:
                    dark = share[i, j] < 0.6
                    parts.append(
                        tag(
                            "text",
                            str(matrix[i, j]),
                            x=left + (j + 0.5) * cell - 0.5,
                            y=top + (i + 0.5) * cell + 3.5,
                            text_anchor="middle",
                            style=f"fill:{'#fff' if dark else '#000'}",
                        )
                    )
    return figure(parts, height, title)


def interval(value: float | None, low: float | None, high: float | None) -> Markup:
    """A number between 0 and 1 as a dot on a line with its interval, to stand in a table."""
    parts: list[Markup] = [_line(4, 7, 76, 7, class_="grid")]
    if low is not None and high is not None:
        parts.append(
            tag(
                "line",
                x1=4 + 72 * low,
                y1=7,
                x2=4 + 72 * high,
                y2=7,
                stroke="var(--c1)",
                stroke_width="3",
                stroke_opacity="0.5",
            )
        )
    if value is not None:
        parts.append(tag("circle", cx=4 + 72 * value, cy=7, r=3.5, fill="var(--c1)"))
    return tag("svg", parts, viewBox="0 0 80 14", class_="spark", aria_hidden="true")


def spectrogram(
    values: Float[np.ndarray, "t f"],
    *,
    seconds: float,
    hertz: Sequence[tuple[float, str]],
    title: str,
) -> Markup:
    """A log-mel spectrogram, low frequencies at the bottom.

    Args:
        values: log-mel of the frames that are shown.
        seconds: length of what is shown.
        hertz: (place from 0, the bottom, to 1, text) of the marks of frequency.
        title: for those who cannot see it.
    """
    low, high = np.quantile(values, 0.02), np.quantile(values, 0.995)
    frame = Frame((0.0, seconds), (0.0, 1.0), height=170.0, bottom=36.0, top=6.0)
    width, height = WIDTH - frame.left - frame.right, frame.height - frame.top - frame.bottom
    base = frame.height - frame.bottom
    parts: list[object] = [
        _image(picture(values.T, float(low), float(high)), frame.left, frame.top, width, height)
    ]
    for place, text in hertz:
        parts.append(_text(frame.left - 5, frame.at_y(place) + 4, text, anchor="end"))
    for value in ticks(0.0, seconds, most=6):
        x = frame.at_x(value)
        parts.append(_line(x, base, x, base + 4, class_="axis"))
        parts.append(_text(x, base + 15, short(value), anchor="middle"))
    parts.append(_text((frame.left + WIDTH) / 2, frame.height - 5, "seconds", anchor="middle"))
    return figure(parts, frame.height, title)


def grid_map(values: Float[np.ndarray, "r k"], *, title: str, reach: float = 4.0) -> Markup:
    """A map over the patches: from 1/reach (dark) over 1 (even) to `reach` times even (light)."""
    level = np.log(np.maximum(np.nan_to_num(values, nan=1.0), 1e-9)) / math.log(reach)
    return tag("img", src=picture(level, -1.0, 1.0), alt=title, title=title, class_="map")


def scale(reach: float = 4.0) -> Markup:
    """The legend of `grid_map`."""
    steps = np.linspace(-1, 1, 33)
    parts: list[object] = [
        tag(
            "rect",
            x=20 + 320 * i / 33,
            y=4,
            width=320 / 33 + 0.5,
            height=12,
            fill=colour((float(step) + 1) / 2),
        )
        for i, step in enumerate(steps)
    ]
    for share, text in ((0, f"1/{reach:g} or less"), (0.5, "even"), (1, f"{reach:g}x or more")):
        anchor = ("start", "middle", "end")[round(2 * share)]
        parts.append(_text(20 + 320 * share, 30, text, anchor=anchor))
    return figure(parts, 36.0, "colours of the maps, from little to much")


def bars(values: Sequence[float], names: Sequence[str], *, title: str, even: float = 1.0) -> Markup:
    """Small upright bars, with a line at what would be even."""
    most = max([*values, even]) * 1.15 or 1.0
    width = 300.0 / max(1, len(values))
    parts: list[object] = []
    for i, (value, name) in enumerate(zip(values, names, strict=True)):
        height = 56 * value / most
        parts.append(
            tag(
                "rect",
                tag("title", f"{name}: {value:.2f}"),
                x=30 + i * width + width * 0.15,
                y=62 - height,
                width=width * 0.7,
                height=height,
                fill="var(--c1)",
            )
        )
        if len(values) <= 24:
            parts.append(_text(30 + (i + 0.5) * width, 76, name, anchor="middle"))
    y = 62 - 56 * even / most
    parts.append(_line(30, y, 332, y, class_="ideal"))
    parts.append(_text(334, y + 4, "even"))
    return figure(parts, 80.0, title)


def figure(parts: Sequence[object], height: float, title: str) -> Markup:
    """An SVG that is as wide as the page lets it, up to a bound."""
    return tag(
        "svg",
        list(parts),
        viewBox=f"0 0 {WIDTH:.0f} {height:.0f}",
        role="img",
        aria_label=title,
        class_="figure",
    )


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from low to high, about `most`."""
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    rough = span / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [(first + i) * step for i in range(int(math.floor(high / step + 1e-9) - first) + 1)]


def short(value: float) -> str:
    """A number as short as it can be read."""
    return f"{value:.4g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.0e}"


def shortened(text: str, most: int) -> str:
    """A text of at most so many characters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def _runs(curve: Curve) -> list[list[tuple[float, float]]]:
    """The stretches of a curve without a gap."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(curve.x, curve.y, strict=True):
        if math.isfinite(y):
            runs[-1].append((float(x), float(y)))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _image(uri: str, x: float, y: float, width: float, height: float) -> Markup:
    return tag(
        "image",
        href=uri,
        x=x,
        y=y,
        width=width,
        height=height,
        preserveAspectRatio="none",
        class_="pixels",
    )


def _line(x1: float, y1: float, x2: float, y2: float, *, class_: str) -> Markup:
    return tag("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=class_)


def _text(x: float, y: float, text: str, *, anchor: str = "start") -> Markup:
    return tag("text", text, x=float(x), y=float(y), text_anchor=anchor)
