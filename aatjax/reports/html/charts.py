"""Charts as inline SVG, drawn by matplotlib without a display.

Colours are those of Okabe and Ito 2008, safe for colour-blind readers, and follow the page's dark
mode; markers and dashes tell rows apart in grey. Maps use cividis, whose lightness rises evenly.
"""

from __future__ import annotations

import base64
import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import soundfile
from jaxtyping import Float, Int, Int16
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import MaxNLocator

from aatjax.audio.fbank import LOW_HZ, hertz_to_mel
from aatjax.errors import printable
from aatjax.inference.calibration import Reliability

INK, QUIET, RULE = "#1b1d21", "#5b626c", "#d5d9df"
SERIES = ("#0072b2", "#c44e00", "#007a5a", "#8f4a7a")
MARKERS = "osD^v<>PX*hd"
DASHES = ("-", "--", ":", "-.")
VARIABLES = {
    INK: "var(--ink)",
    QUIET: "var(--quiet)",
    RULE: "var(--rule)",
    **{colour: f"var(--c{number})" for number, colour in enumerate(SERIES, 1)},
}
"""The page's CSS variable for each colour of the charts."""
STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "text.color": INK,
    "text.parse_math": False,  # class names are text
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": RULE,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "image.cmap": "cividis",
    "image.interpolation": "none",
    "savefig.transparent": True,
    "svg.fonttype": "none",
}
WIDTH = 3.75  # inches of a figure that fits a phone
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
XLINK = "{http://www.w3.org/1999/xlink}href"
MOST_NAMED = 30  # classes whose names fit beside a confusion matrix
MOST_COUNTED = 14  # classes whose counts fit into its cells
MOST_BARS = 24  # bars with a name and a value each
MAP_RANGE = 4.0  # maps of routing weights run from 1/4 to 4 times the mean
LEVELS = 64  # colours of a map
HERTZ = (200, 500, 1000, 2000, 4000)


@dataclass(frozen=True)
class Curve:
    """One line of a chart; y may have gaps (NaN)."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def make_figure(
    build: Callable[..., object], width: float, height: float, *, columns: int = 1
) -> Figure:
    """A figure in the style of the reports, of a size in inches; `build` draws on its axes."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that matplotlib's font lacks; the page's has them
        figure = Figure(figsize=(width, height), layout="constrained")
        build(*np.atleast_1d(figure.subplots(1, columns)))
    return figure


def save_figure(figure: Figure, target: Any, kind: str, *, salt: str = "aatjax") -> None:
    """Write a figure as `svg` or `png` to a path or an open file, the same bytes every time."""
    style = {**STYLE, "svg.hashsalt": salt}  # of the ids in the file
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metadata = NO_METADATA if kind == "svg" else None
        figure.savefig(target, format=kind, dpi=150, metadata=metadata, transparent=kind == "svg")


def embed_figure(figure: Figure, title: str) -> Markup:
    """A figure as an SVG element of an HTML page; `title`, its text alternative, is unique."""
    written = io.StringIO()
    save_figure(figure, written, "svg", salt=title)
    root = ElementTree.fromstring(written.getvalue())
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "class": "figure",
        "style": f"max-width: {7 * figure.get_figwidth():.0f}rem",
        "role": "img",
        "aria-label": printable(title),
    }
    root.remove(root[0])  # a style for the whole document; style.css has it
    for node in root.iter():
        node.tag = node.tag.rpartition("}")[2]
        node.tail = node.text = (node.text or "").strip() if node.tag == "text" else None
        if node.tag == "g":
            node.attrib.pop("id", None)  # figure_1, axes_1, ... are the same in every figure
        if XLINK in node.attrib:
            node.set("href", node.attrib.pop(XLINK).replace("\n", ""))
        style = re.sub(r"font: ([\d.]+px)[^;]*", r"font-size: \1", node.get("style", ""))
        if style:
            for colour, variable in VARIABLES.items():
                style = style.replace(colour, variable)
            node.set("style", style)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def draw_curves(
    curves: Sequence[Curve], *, y_label: str, limits: tuple[float, float] | None = None
) -> Markup | None:
    """Curves by epoch, with a legend where there are several; None without a finite value."""
    if not any(math.isfinite(value) for curve in curves for value in curve.y):
        return None

    def build(axes: Axes) -> None:
        for number, curve in enumerate(curves):
            axes.plot(curve.x, curve.y, label=printable(curve.name), **choose_style(number))
        axes.set(xlabel="epoch", ylabel=y_label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(axis="y")
        if limits is not None:
            axes.set_ylim(limits[0] - 0.02, limits[1] + 0.02)
        if len(curves) > 1:
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(curves))

    title = f"{', '.join(curve.name for curve in curves)} by epoch"
    return embed_figure(make_figure(build, WIDTH, 2.5), title)


def draw_reliability(curves: Sequence[tuple[str, Reliability]]) -> Markup:
    """Accuracy over confidence, one mark a bin, its area by the number of entries in it."""

    def build(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=QUIET, linestyle="--", linewidth=1, label="calibrated")
        for number, (name, curve) in enumerate(curves):
            filled = curve.count > 0
            x, y, count = curve.confidence[filled], curve.accuracy[filled], curve.count[filled]
            style = choose_style(number)
            axes.plot(x, y, **{**style, "marker": None, "linewidth": 1})
            area = 15 + 250 * count / count.sum()
            axes.scatter(
                x, y, area, color=style["color"], marker=style["marker"], alpha=0.6, label=name
            )
        axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(-0.05, 1.05))
        axes.grid()
        legend = axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
        for handle in legend.legend_handles[1:]:
            handle.set_sizes([30])  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]

    return embed_figure(make_figure(build, WIDTH, 3.6), "reliability diagram")


def draw_confusion(matrix: Int[np.ndarray, "c c"], names: Sequence[str]) -> Markup:
    """Clips by true class (row) and predicted class (column), light where most of a row is."""
    size = len(names)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)

    def build(axes: Axes) -> None:
        image = axes.imshow(share, vmin=0, vmax=1)
        axes.set(xlabel="predicted class", ylabel="true class")
        if size <= MOST_NAMED:
            short = [shorten(printable(name), 15) for name in names]
            axes.set_xticks(range(size), short, rotation=50, ha="right", rotation_mode="anchor")
            axes.set_yticks(range(size), short)
        if size <= MOST_COUNTED:
            for (i, j), count in np.ndenumerate(matrix):
                if count:
                    colour = "#ffffff" if share[i, j] < 0.6 else "#111111"
                    axes.text(
                        float(j), float(i), str(count), ha="center", va="center", color=colour
                    )
        bar = axes.figure.colorbar(image, ax=axes, shrink=0.7)
        bar.set_label("share of the true class")

    height = 3.4 if size <= MOST_COUNTED else 4.2
    return embed_figure(make_figure(build, 4.4, height), "confusion matrix")


def draw_spectrogram(
    features: Float[np.ndarray, "t f"], seconds: float, rate: int, title: str
) -> Markup:
    """A log-mel spectrogram over its length in seconds, with marks in Hz on the mel axis."""
    low, high = np.quantile(features, (0.02, 0.995))
    edges = hertz_to_mel(np.array([LOW_HZ, rate / 2]))
    marks = [hertz for hertz in HERTZ if hertz < rate / 2.2]
    places = (hertz_to_mel(np.array(marks, float)) - edges[0]) / (edges[1] - edges[0])

    def build(axes: Axes) -> None:
        image = features.T
        axes.imshow(
            image,
            cmap=matplotlib.colormaps["cividis"].resampled(LEVELS),
            vmin=low,
            vmax=high,
            origin="lower",
            aspect="auto",
            extent=(0, seconds, 0, 1),
        )
        axes.set_yticks(places, [str(hertz) for hertz in marks])
        axes.set(xlabel="time (s)", ylabel="frequency (Hz)")

    return embed_figure(make_figure(build, WIDTH, 1.8), title)


def draw_use(values: Sequence[float], title: str) -> Markup:
    """Use of the experts of one mixture as bars, with a line at the fair share, 1."""

    def build(axes: Axes) -> None:
        bars = axes.bar(range(len(values)), values, color=SERIES[0])
        if len(values) <= MOST_BARS:
            axes.bar_label(bars, fmt="%.2f", fontsize=7)
            axes.set_xticks(range(len(values)))
        axes.axhline(1, color=QUIET, linestyle="--", linewidth=1, zorder=0)
        axes.set(xlabel="expert", ylabel="use", ylim=(0, 1.2 * max(1.0, *values)))

    return embed_figure(make_figure(build, WIDTH, 1.5), title)


def draw_map_scale() -> Markup:
    """The colour bar of the maps of routing weights."""

    def build(axes: Axes) -> None:
        reach = math.log(MAP_RANGE)
        colours = ScalarMappable(Normalize(-reach, reach), cmap="cividis")
        bar = axes.figure.colorbar(colours, cax=axes, orientation="horizontal")
        bar.set_ticks([-reach, 0, reach], labels=["1/4 or less", "mean", "4 times or more"])

    return embed_figure(
        make_figure(build, WIDTH, 0.45), "colours of the maps: weight over its mean"
    )


def encode_map(values: Float[np.ndarray, "r k"]) -> str:
    """A PNG of a map over the patches as a data URI, from 1/4 of the mean (dark) to 4 times."""
    level = np.log(np.maximum(np.nan_to_num(values, nan=1.0), 1e-9)) / math.log(MAP_RANGE)
    file = io.BytesIO()
    imsave(file, level, vmin=-1, vmax=1, cmap="cividis", origin="lower", format="png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def encode_sound(samples: Int16[np.ndarray, " s"], rate: int) -> str:
    """A mono WAV of 16 bits as a data URI."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="PCM_16")
    return f"data:audio/wav;base64,{base64.b64encode(file.getvalue()).decode()}"


def choose_style(index: int) -> dict[str, Any]:
    """Colour, marker and dashes of row number `index`."""
    return {
        "color": SERIES[index % len(SERIES)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[index % len(DASHES)],
        "markersize": 3.5,
        "linewidth": 1.4,
    }


def shorten(text: str, most: int) -> str:
    """A text of at most `most` characters."""
    return text if len(text) <= most else f"{text[: most - 1]}\N{HORIZONTAL ELLIPSIS}"
