"""The model card: README.md with YAML metadata; whatever comes from a user is escaped."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, TypeGuard

from aatjax.errors import printable

MOST_CLASSES = 50
METRICS = {
    "accuracy": "accuracy",
    "mean_ap": "mean_average_precision",
    "mAP": "mean_average_precision",
}


TEMPLATE = """\
{metadata}

# {name}

Sounds to {count} classes, {labels}.

## How to use

{usage}
{notes}
## Model

- method: {method}
- base: {base}, fingerprint {fingerprint}
- front end: {frontend}
- classes: {classes}
- licence: {licence}

## Data and protocol

{about}
- fingerprint of the training clips: {data}
- weights: {weights}

## Confidence

{confidence}

## Metrics

{metrics}

## Checked

By {by}, on {clips} sounds; largest differences of logits, tolerance {tolerance:g}:

{differences}

Probabilities of whole files differ from those of `aatjax predict` by {probabilities:.2g} at most.
"""


def make_card(
    entries: Mapping[str, Any],
    info: Mapping[str, Any],
    *,
    usage: str,
    notes: Sequence[str],
    licence: str,
) -> str:
    """Return the text of an export's README.md.

    Args:
        entries: of its `export.json`.
        info: the metadata of the adapter.
        usage: how to use it, as Markdown.
        notes: for the user.
        licence: identifier, such as `mit`.
    """
    method, base, parity = info["method"], entries["base"], entries["parity"]
    about = info["about"] if isinstance(info.get("about"), Mapping) else {}
    name = f"{method['name']} adapter of an Audio Spectrogram Transformer"
    lines = [f"- {markdown(key)}: {markdown(_text(value))}" for key, value in about.items()]
    largest = [f"- {markdown(given)}: {apart:.2g}" for given, apart in parity["largest"].items()]
    return TEMPLATE.format(
        metadata="\n".join(_make_metadata(entries, info, about, name, licence)),
        name=markdown(name),
        count=len(entries["classes"]),
        labels="any number of them per clip" if entries["multi_label"] else "one per clip",
        usage=usage,
        notes="".join(f"\nNote: {markdown(note)}.\n" for note in notes),
        method=_format_fields(method),
        base=markdown(base["source"]),
        fingerprint=markdown(base["fingerprint"][:12]),
        frontend=_format_fields(entries["frontend"]),
        classes=_format_classes(entries["classes"]),
        licence=markdown(licence),
        about="\n".join(lines or ["- not in the adapter's file"]),
        data=markdown(_text(info.get("data"))[:12]),
        weights=markdown(_text(info.get("weights"))),
        confidence=_format_confidence(entries),
        metrics=_format_metrics(info.get("test")),
        by=markdown(parity["by"]),
        clips=len(parity["clips"]),
        tolerance=parity["tolerance"],
        differences="\n".join(largest),
        probabilities=parity["probabilities"],
    )


def _make_metadata(
    entries: Mapping[str, Any],
    info: Mapping[str, Any],
    about: Mapping[str, Any],
    name: str,
    licence: str,
) -> list[str]:
    """The YAML before the text."""
    source, test = entries["base"]["source"], info.get("test")
    lines = ["---", f"license: {scalar(licence)}", "library_name: aatjax"]
    lines += ["pipeline_tag: audio-classification"]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        lines.append(f"base_model: {scalar(source)}")
    lines += ["tags:", "- audio-spectrogram-transformer", f"- {scalar(info['method']['name'])}"]
    if _has_value(test):
        data = about.get("benchmark", "own recordings")
        kind = METRICS.get(str(test.get("metric")), str(test.get("metric")))
        lines += [
            "model-index:",
            f"- name: {scalar(name)}",
            "  results:",
            "  - task:",
            "      type: audio-classification",
            "    dataset:",
            f"      name: {scalar(data)}",
            f"      type: {scalar(data)}",
            "    metrics:",
            f"    - type: {scalar(kind)}",
            f"      value: {test['value']:.6g}",
        ]
    return [*lines, "---"]


def list_figures(test: Any) -> list[str]:
    """Return every line of a card that states a figure on the test clips."""
    values = [f"value: {test['value']:.6g}"] if _has_value(test) else []
    return [*values, _format_metrics(test)]


def find_figures(card: str) -> list[str]:
    """Return the lines of a card that state figures: in its YAML, and in its section on metrics."""
    lines, found, inside = [line.strip() for line in card.splitlines()], [], False
    for line in lines:
        inside = line == "## Metrics" if line.startswith("#") else inside
        if line.startswith("value:") or (inside and line and not line.startswith("#")):
            found.append(line)
    return found


def _has_value(test: Any) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(test, Mapping) and _is_number(test.get("value"))


def _format_metrics(test: Any) -> str:
    if not _has_value(test):
        return "Not in the adapter's file."
    low, high = test.get("low"), test.get("high")
    bounds = f" [{low:.3f}, {high:.3f}]" if _is_number(low) and _is_number(high) else ""
    clips = markdown(_text(test.get("clips")))
    name = markdown(_text(test.get("metric")))
    return f"- {name} {test['value']:.3f}{bounds} on {clips} test clips"


def _format_confidence(entries: Mapping[str, Any]) -> str:
    """What the probabilities mean, and how `aatjax predict` decides by them."""
    fitted = entries["calibration"]
    if fitted is None:
        return "Not calibrated: the adapter's file holds no calibration on validation clips."
    lines = [
        f"Calibrated on {fitted['clips']} validation clips. The temperature "
        f"{fitted['temperature']:.6g} is in the weights of the head: logits are divided by it "
        "already."
    ]
    if fitted["thresholds"] is not None:
        pairs = zip(entries["classes"], fitted["thresholds"], strict=True)
        shown = ", ".join(f"{markdown(name)} {limit:.4g}" for name, limit in pairs)
        lines.append(f"A class is given from this probability on: {shown}.")
    lines.append(
        f"With a coverage of {fitted['coverage']:.0%}, a class is possible where its probability "
        f"from logits times {fitted['temperature']:.6g} is at least {1 - fitted['quantile']:.6g} "
        "(split conformal prediction)."
    )
    return "\n".join(lines)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _format_classes(classes: Sequence[str]) -> str:
    more = len(classes) - MOST_CLASSES
    shown = ", ".join(markdown(name) for name in classes[:MOST_CLASSES])
    return f"{shown}, and {more} more" if more > 0 else shown


def _format_fields(fields: Mapping[str, Any]) -> str:
    named = [markdown(str(fields["name"]))] if "name" in fields else []
    others = [f"{markdown(k)} {markdown(_text(v))}" for k, v in fields.items() if k != "name"]
    return ", ".join([*named, *others])


def _text(value: Any) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def markdown(text: str) -> str:
    """Return the text escaped for Markdown: no mark-up, no link, no HTML."""
    entities = {"<": "&lt;", ">": "&gt;", "&": "&amp;", "@": "&#64;"}
    return "".join(
        entities.get(c) or (f"\\{c}" if c in "\\`*_{}[]()#+-.!|~$:\"'=^" else c)
        for c in printable(text)
    )


def scalar(value: Any) -> str:
    """Return a YAML scalar in double quotes that reads back as the text."""
    parts = []
    for c in str(value):
        if c in '"\\':
            parts.append(f"\\{c}")
        elif c.isprintable():
            parts.append(c)
        elif 0xD800 <= ord(c) < 0xE000:  # half of a surrogate pair
            parts.append(f"\\\\u{ord(c):04x}")
        else:
            parts.append(f"\\U{ord(c):08x}")
    return f'"{"".join(parts)}"'


def hide_folders(source: str) -> str:
    """Return the source of a base without the folders of the machine that trained on it."""
    looks_like_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) and not PurePath(source).suffix
    if looks_like_id or ":" in source:
        return source
    return PurePath(source).name
