"""The report itself: its sections, in the order in which they are read."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aatjax.audio.fbank import LOW_HZ, hertz_to_mel
from aatjax.audio.frontend import FrontEnd
from aatjax.experiments.partition import Parts, describe
from aatjax.inference.calibration import (
    Reliability,
    apply_calibration,
    compute_probabilities,
    compute_reliability,
)
from aatjax.reports.html import assets, experts
from aatjax.reports.html import charts as figures
from aatjax.reports.html.class_intervals import confused, wilson
from aatjax.reports.html.collect import Evaluated, Evidence, Mistake
from aatjax.reports.html.markup import Markup, join, page, tag
from aatjax.reports.html.style import STYLE
from aatjax.train.adapter_file import versions
from aatjax.train.metrics.results import NAMES

MOST_ROWS = 1000  # classes in a table
GRAVE = ("SUBSET", "LEAK", "NOTE", "different parts")  # what no reader may overlook
NEAR = 5e-4  # by how much a figure may differ from the one in result.json


def render(evidence: Evidence, command: Sequence[str]) -> str:
    """The whole report as HTML.

    Args:
        evidence: what `gather` found.
        command: the words of the command line that asked for it.
    """
    name = Path(evidence.run or evidence.path).absolute().name
    sections = [
        _summary(evidence, name),
        _findings(evidence),
        _figures(evidence),
        _classes(evidence),
        _calibration(evidence),
        _mistakes(evidence),
        _curves(evidence),
        _cost(evidence),
        experts.section(evidence.atlas),
        _origin(evidence, command),
    ]
    return page(f"{name} - aatjax report", STYLE, tag("main", sections))


def number(value: float | None, digits: int = 3) -> str:
    """A figure, or n/a where it is not defined."""
    return "n/a" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def bounds(pair: Sequence[float] | None, digits: int = 3) -> str:
    """An interval in brackets, or nothing."""
    return "" if pair is None else f"[{pair[0]:.{digits}f}, {pair[1]:.{digits}f}]"


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]], numbers: int = 1) -> Markup:
    """A table that scrolls by itself; columns from `numbers` on are numbers."""

    def cell(name: str, at: int, value: object) -> Markup:
        return tag(name, value, class_="number" if at >= numbers else "name")

    head = tag("tr", [cell("th", i, text) for i, text in enumerate(heads)])
    body = [tag("tr", [cell("td", i, value) for i, value in enumerate(row)]) for row in rows]
    whole = tag("table", tag("thead", head) if any(heads) else None, tag("tbody", body))
    return tag("div", whole, class_="scroll")


def warn(*text: object) -> Markup:
    """Something that must not be overlooked."""
    return tag("p", *text, class_="warn")


def figure(drawing: Markup, *caption: object) -> Markup:
    """A figure with its caption."""
    return tag("figure", drawing, tag("figcaption", *caption))


def _summary(evidence: Evidence, name: str) -> Markup:
    method = evidence.adapter.info.get("method", {}).get("name", "adapter")
    share = 100 * evidence.counts.trainable / max(1, evidence.counts.total)
    trained = f"{method} ({evidence.counts.trainable:,} trained parameters, {share:.2f}%)"
    told = evidence.evaluated
    parts: list[object] = [tag("h1", name)]
    if isinstance(told, str):
        parts.append(tag("p", f"{trained}; not evaluated: {told}.", class_="lead"))
    else:
        title, value, low, high = told.metrics.headline
        pair = None if low is None or high is None else (low, high)
        kind = "test clips" if told.own else "clips"
        text = (
            f"{trained} reaches {title} {number(value)} {bounds(pair)} on "
            f"{told.metrics.clips} {kind} of {len(told.source.classes)} classes "
            f"({told.source.name})"
        )
        worst = told.metrics.confusion
        if worst is not None and (pairs := confused(worst, told.source.classes, 1)):
            true, said, count, whole = pairs[0]
            text += f"; most often it takes {true} for {said} ({count} of {whole})"
        parts.append(tag("p", f"{text}.", class_="lead"))
    return join([*parts, *_warnings(evidence)])


def _warnings(evidence: Evidence) -> list[Markup]:
    """What must be said of the data before any figure is read."""
    about, told = evidence.about, evidence.evaluated
    found = [
        warn(line) if any(word in line for word in GRAVE) else tag("p", line, class_="quiet")
        for line in _of_the_data(evidence, about)
    ]
    if isinstance(told, Evaluated):
        before = evidence.result.get("test") if told.own else None
        name = "mean_ap" if told.metrics.multi_label else "accuracy"
        old = before.get(name) if isinstance(before, dict) else None
        now = getattr(told.metrics, name)
        if isinstance(old, int | float) and now is not None and abs(old - now) > NEAR:
            found.append(
                warn(
                    f"result.json says {NAMES[name]} {number(old)}, evaluated now it is "
                    f"{number(now)}: the sounds or the weights have changed since"
                )
            )
        found += [tag("p", f"Note: {note}.", class_="quiet") for note in told.metrics.notes]
    return found


def _of_the_data(evidence: Evidence, about: dict[str, Any]) -> list[str]:
    """The lines that `aatjax train` prints of the data."""
    if not about:
        return []
    chosen = about.get("chosen_on_test")
    source = evidence.evaluated.source if isinstance(evidence.evaluated, Evaluated) else None
    parts: Any = Parts(source, None, None, about, chosen)  # pyright: ignore[reportArgumentType]
    try:
        return describe(parts)
    except (KeyError, TypeError):  # written by another version
        return [f"data: {json.dumps(about)}"]


def _findings(evidence: Evidence) -> Markup | None:
    if isinstance(evidence.findings, str):
        return join([tag("h2", "Findings of the doctor"), warn(evidence.findings)])
    if not evidence.findings:
        return None
    rows = []
    for one in evidence.findings[:MOST_ROWS]:
        cells = [one.get("severity", ""), one.get("kind", ""), one.get("text", one.get("message"))]
        items = one.get("items")
        named = (
            [str(item.get("subject")) for item in items if isinstance(item, dict)][:3]
            if (isinstance(items, list))
            else []
        )
        rows.append([*map(str, cells), ", ".join(named), str(one.get("count", ""))])
    heads = ["severity", "kind", "what", "such as", "count"]
    return join([tag("h2", "Findings of the doctor"), table(heads, rows, numbers=4)])


def _figures(evidence: Evidence) -> Markup | None:
    told = evidence.evaluated
    if isinstance(told, str):
        return None
    metrics = told.metrics
    rows = [
        [shown, number(getattr(metrics, name), 4), bounds(metrics.intervals.get(name), 4)]
        for name, shown in NAMES.items()
        if getattr(metrics, name) is not None
    ]
    note = (
        "Intervals: percentiles over bootstrap resamples of the clips; the spread over training "
        "runs is not in them. The same as aatjax eval."
    )
    numbers = tag(
        "div",
        table(["metric", "value", f"{metrics.interval:.0%} interval"], rows),
        tag("p", note, class_="quiet"),
        _commonest(told),
    )
    return join([tag("h2", "Figures"), tag("div", numbers, _confusion(told), class_="columns")])


def _confusion(told: Evaluated) -> Markup | None:
    if told.metrics.confusion is None:
        return None
    names = told.source.classes
    drawing = figures.confusion(told.metrics.confusion, names, title="confusion matrix")
    caption = "Rows: true class; columns: what the adapter says; light where most of a row lies."
    return figure(drawing, caption)


def _commonest(told: Evaluated) -> Markup | None:
    if told.metrics.confusion is None:
        return None
    pairs = confused(told.metrics.confusion, told.source.classes, 5)
    lines = [
        tag("li", f"{true} taken for {said}: {count} of {whole}")
        for true, said, count, whole in pairs
    ]
    return join([tag("h3", "Commonest mistakes"), tag("ul", lines)]) if lines else None


def _classes(evidence: Evidence) -> Markup | None:
    told = evidence.evaluated
    if isinstance(told, str):
        return None
    rows = []
    pairs = list(zip(told.metrics.per_class, told.intervals, strict=True))
    for row, sure in pairs[:MOST_ROWS]:
        cells: list[object] = [row.name, f"{row.support:,}"]
        for value, pair in (
            (row.precision, sure.precision),
            (row.recall, sure.recall),
            (row.average_precision, sure.average_precision),
        ):
            low, high = pair or (None, None)
            spark = figures.interval(value, low, high)
            cells.append(join([number(value), f" {bounds(pair, 2)} ", spark]))
        rows.append([*cells, number(row.f1), number(row.auc)])
    heads = ["class", "clips", "precision", "recall", "AP", "F1", "AUC"]
    more = len(pairs) - MOST_ROWS
    return join(
        [
            tag("h2", "Classes"),
            table(heads, rows),
            tag("p", f"{more} more classes are left out.") if more > 0 else None,
            tag(
                "p",
                "95% intervals: precision and recall by Wilson's score, average precision "
                "(AP) by bootstrap over the clips.",
                class_="quiet",
            ),
        ]
    )


def _calibration(evidence: Evidence) -> Markup | None:
    told, decisions = evidence.evaluated, evidence.decisions
    if isinstance(told, str):
        return None
    many = told.source.multi_label
    curves = [
        (
            "as trained",
            compute_reliability(compute_probabilities(told.logits, 1.0, many), told.targets, many),
        )
    ]
    if decisions is not None:
        scaled = compute_probabilities(told.logits, decisions.temperature, many)
        curves.append(
            (f"T = {decisions.temperature:.2f}", compute_reliability(scaled, told.targets, many))
        )
    drawing = figures.reliability(
        [(name, list(c.confidence), list(c.accuracy), list(c.count)) for name, c in curves],
        title="reliability diagram",
    )
    rows = [[name, number(c.error, 4), number(_lean(c), 4)] for name, c in curves]
    parts: list[object] = [
        table(["probabilities", "ECE", "confidence - right"], rows),
        tag(
            "p",
            "ECE: expected calibration error over 15 bins (Guo et al. 2017). Confidence less "
            "the share that is right: above 0 the model is too sure of itself.",
            class_="quiet",
        ),
    ]
    if decisions is None:
        parts.append(
            tag(
                "p",
                "No validation clips were set apart in training (data.valid_fraction), so "
                "probabilities are as trained, and aatjax predict never says that it is unsure.",
            )
        )
    else:
        parts += _coverage(told, evidence)
    both = tag(
        "div",
        figure(
            drawing,
            "Area: how many there are. On the dashed line, what is said "
            "with 0.8 is right 8 times of 10.",
        ),
        tag("div", parts),
        class_="columns",
    )
    return join([tag("h2", "How far its probabilities can be trusted"), both])


def _lean(curve: Reliability) -> float:
    """Mean confidence less the share that is right."""
    gap = np.nan_to_num(curve.confidence - curve.accuracy)
    return float((gap * curve.count).sum() / max(1.0, curve.count.sum()))


def _coverage(told: Evaluated, evidence: Evidence) -> list[Markup]:
    """How the conformal sets do on these clips."""
    decisions = evidence.decisions
    assert decisions is not None
    applied = apply_calibration(told.logits, decisions)
    truth = told.targets == 1
    covered = (applied.possible | ~truth).all(axis=1)
    right = ((applied.given == truth) | np.isnan(told.targets)).all(axis=1)
    sure = ~applied.unsure
    count, clips = int(covered.sum()), len(covered)
    what = "its class" if not told.source.multi_label else "all its classes"
    rows = [
        ["clips whose set holds " + what, f"{count / clips:.3f} {bounds(wilson(count, clips), 2)}"],
        ["wanted", f"{decisions.coverage:.3f}"],
        ["classes in a set, on average", f"{applied.possible.sum(axis=1).mean():.2f}"],
        ["sure (nothing else is possible)", f"{sure.mean():.3f} of the clips"],
        ["right where sure", _share(right[sure])],
        ["right where unsure", _share(right[~sure])],
    ]
    text = (
        f"Temperature {decisions.temperature:.3f} and conformal quantile {decisions.quantile:.3f}, "
        f"both fitted on {decisions.clips} validation clips (split conformal prediction; "
        "Sadinle, Lei and Wasserman 2019). The promise is for sounds like those, on average over "
        "all classes."
    )
    parts = [table(["sets of possible classes", ""], rows), tag("p", text, class_="quiet")]
    if evidence.about.get("chosen_on_test") and told.own:
        parts.append(
            warn("The validation clips are the clips reported here: these figures are too good.")
        )
    if decisions.quantile >= 1:
        few = f"{decisions.clips} validation clips are too few for a coverage of"
        parts.append(warn(f"{few} {decisions.coverage:.0%}: every class is always possible."))
    return parts


def _share(right: np.ndarray) -> str:
    if not len(right):
        return "n/a"
    count = int(right.sum())
    return f"{count / len(right):.3f} {bounds(wilson(count, len(right)), 2)}"


def _mistakes(evidence: Evidence) -> Markup | None:
    told = evidence.evaluated
    if isinstance(told, str):
        return None
    heading = tag("h2", "Wrong and most sure of it")
    if not told.mistakes:
        return join([heading, tag("p", "There is no mistake on these clips.")])
    cards = [_card(one, evidence.adapter.frontend) for one in told.mistakes]
    lead = tag(
        "p",
        "A wrong label, a sound of two classes, or what the model cannot hear: listen. "
        "Only the beginning of what the model heard is here.",
        class_="quiet",
    )
    return join([heading, lead, tag("div", cards, class_="cards")])


def _card(one: Mistake, frontend: FrontEnd) -> Markup:
    seconds = len(one.samples) / frontend.rate
    drawing = figures.spectrogram(
        one.features, seconds=seconds, hertz=_marks(frontend), title=f"spectrogram of {one.clip}"
    )
    more = ""
    if one.possible is not None and len(one.possible) > 1:
        more = f" Possible: {', '.join(one.possible[:6])}"
        more += f" and {len(one.possible) - 6} more." if len(one.possible) > 6 else "."
    return tag(
        "div",
        tag("h3", one.clip),
        tag(
            "p",
            "says ",
            tag("strong", one.said),
            f" ({one.probability:.3f}), labelled ",
            tag("strong", one.truth),
            ".",
            more,
        ),
        tag("p", one.path, class_="quiet") if one.path and one.path != one.clip else None,
        drawing,
        tag("audio", controls=True, preload="none", src=assets.sound(one.samples, frontend.rate)),
        class_="card",
    )


def _marks(frontend: FrontEnd) -> list[tuple[float, str]]:
    """Marks of the frequency axis, at their place on the mel scale."""
    low, high = hertz_to_mel(np.array([LOW_HZ, frontend.rate / 2]))
    wanted = [200, 500, 1000, 2000, 4000]
    marks = []
    for hertz in wanted:
        place = float((hertz_to_mel(np.array([float(hertz)]))[0] - low) / (high - low))
        if 0 < place < 0.97:
            text = f"{hertz}" if hertz < 1000 else f"{hertz / 1000:g}k"
            marks.append((place, text))
    return marks


def _curves(evidence: Evidence) -> Markup | None:
    rows = [row for row in evidence.rows if isinstance(row.get("epoch"), int | float)]
    if not rows:
        return None

    def curve(name: str, key: str) -> figures.Curve | None:
        values = [row.get(key) for row in rows]
        if not any(isinstance(v, int | float) for v in values):
            return None
        ys = [float(v) if isinstance(v, int | float) else math.nan for v in values]
        return figures.Curve(name, [float(row["epoch"]) for row in rows], ys)

    def drawn(pairs: Sequence[tuple[str, str]], label: str, span: Any = None) -> Markup | None:
        curves = [one for one in (curve(*pair) for pair in pairs) if one is not None]
        if not curves:
            return None
        title = f"{', '.join(one.name for one in curves)} by epoch"
        return tag(
            "figure", figures.chart(curves, x_label="epoch", y_label=label, title=title, y=span)
        )

    valid = sorted({key for row in rows for key in row if key.startswith("valid/")})
    scores = [
        ("train accuracy", "train/accuracy"),
        *((key.replace("/", " "), key) for key in valid[:3]),
    ]
    mixture = [
        ("balance of use", "mixture/balance"),
        ("reading", "mixture/dispatch_entropy"),
        ("writing", "mixture/combine_entropy"),
    ]
    charts = [
        drawn([("training loss", "train/loss")], "training loss"),
        drawn(scores, "score", (0.0, 1.0)),
        drawn(mixture, "entropy over its largest", (0.0, 1.0)),
        drawn([("learning rate", "train/lr")], "learning rate"),
    ]
    return join([tag("h2", "Training"), tag("div", charts, class_="columns")])


def _cost(evidence: Evidence) -> Markup:
    counts, result = evidence.counts, evidence.result
    rows = [
        ["trained parameters", f"{counts.trainable:,}"],
        ["frozen", f"{counts.frozen:,}"],
        ["share trained", f"{100 * counts.trainable / max(1, counts.total):.2f}%"],
        ["adapter file", f"{evidence.size / 1e6:.2f} MB"],
    ]
    if evidence.flops is not None:
        rows.append(["one clip forward", f"{evidence.flops / 1e9:.3f} GFLOPs"])
    if isinstance(result.get("seconds"), int | float):
        rows.append(["time in training steps", f"{result['seconds']:.0f} s"])
    if isinstance(result.get("train_clips"), int):
        rows.append(["training clips", f"{result['train_clips']:,}"])
    speed = [
        row["train/clips_per_s"]
        for row in evidence.rows
        if isinstance(row.get("train/clips_per_s"), int | float)
    ]
    if speed:
        rows.append(["median speed", f"{float(np.median(speed)):.0f} clips/s"])
    modules = [[row.path, f"{row.trainable:,}", f"{row.frozen:,}"] for row in counts.rows]
    return join(
        [
            tag("h2", "What is trained, and what it costs"),
            table(["", ""], rows),
            tag(
                "details",
                tag("summary", "By module"),
                table(["module", "trained", "frozen"], modules),
            ),
        ]
    )


def _origin(evidence: Evidence, command: Sequence[str]) -> Markup:
    info = evidence.adapter.info
    then, now = info.get("versions"), versions()
    then = then if isinstance(then, dict) else {}
    rows = [[name, str(then.get(name, "unknown")), version] for name, version in now.items()]
    base = evidence.adapter.model.origin
    commands = []
    if evidence.run is not None:
        config = evidence.run / "config.json"
        words = ["aatjax", "train", str(config), "--run", str(evidence.run) + "-again"]
        commands.append(shlex.join(words))
        commands.append(shlex.join(["aatjax", "eval", str(evidence.path)]))
    commands.append(shlex.join(command))
    facts = [
        ["adapter", str(evidence.path)],
        ["weights", str(info.get("weights", "unknown"))],
        ["backbone", "unknown" if base is None else f"{base.source}, {base.fingerprint[:16]}"],
        ["training clips (SHA-256)", str(info.get("data", "unknown"))],
    ]
    if isinstance(evidence.evaluated, Evaluated):
        facts.append(["reported clips (SHA-256)", evidence.evaluated.source.fingerprint()])
    config = {key: info[key] for key in ("config", "method", "frontend") if key in info}
    return join(
        [
            tag("h2", "Where it comes from"),
            tag(
                "p",
                "The same training anew, the same figures, this report:"
                if evidence.run
                else "This report:",
            ),
            tag("pre", "\n".join(commands)),
            table(["", ""], facts, numbers=2),
            table(["version of", "training", "report"], rows, numbers=3),
            tag("details", tag("summary", "Config"), tag("pre", json.dumps(config, indent=2))),
        ]
    )
