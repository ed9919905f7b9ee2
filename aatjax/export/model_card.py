"""The model card: README.md with YAML metadata; whatever comes from a user is escaped."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

MOST_CLASSES = 50
METRICS = {
    "accuracy": "accuracy",
    "mean_ap": "mean_average_precision",
    "mAP": "mean_average_precision",
}


def card(
    entries: Mapping[str, Any],
    info: Mapping[str, Any],
    *,
    usage: str,
    notes: Sequence[str],
    licence: str,
) -> str:
    """The text of an export's README.md.

    Args:
        entries: what its `export.json` says.
        info: the metadata of the adapter.
        usage: how to use it, as Markdown.
        notes: what a user must know besides.
        licence: identifier, such as `mit`.
    """
    method, base, test = info["method"], entries["base"], info.get("test")
    about = info.get("about") if isinstance(info.get("about"), Mapping) else {}
    assert about is not None
    name = f"{method['name']} adapter of an Audio Spectrogram Transformer"
    gate = entries["gate"]
    lines = [
        *_metadata(entries, info, about, name, licence),
        "",
        f"# {markdown(name)}",
        "",
        f"Sounds to {len(entries['classes'])} classes"
        + (", any number of them a clip." if entries["multi_label"] else ", one a clip."),
        "",
        "## How to use",
        "",
        usage,
        *(f"\nNote: {markdown(note)}." for note in notes),
        "",
        "## Model",
        "",
        f"- method: {_pairs(method)}",
        f"- base: {markdown(base['source'])}, fingerprint {markdown(base['fingerprint'][:12])}",
        f"- front end: {_pairs(entries['frontend'])}",
        f"- classes: {_classes(entries['classes'])}",
        f"- licence: {markdown(licence)}",
        "",
        "## Data and protocol",
        "",
        *(
            [f"- {markdown(key)}: {markdown(_text(value))}" for key, value in about.items()]
            or ["- not told by the adapter's file"]
        ),
        f"- fingerprint of the training clips: {markdown(_text(info.get('data'))[:12])}",
        f"- weights: {markdown(_text(info.get('weights')))}",
        "",
        "## Metrics",
        "",
        *_metrics(test),
        "",
        "## Checked",
        "",
        f"By {markdown(gate['by'])}, on {len(gate['clips'])} clips; largest differences of logits, "
        f"tolerance {gate['tolerance']:g}:",
        "",
        *(f"- {markdown(given)}: {apart:.2g}" for given, apart in gate["largest"].items()),
    ]
    return "\n".join(lines) + "\n"


def _metadata(
    entries: Mapping[str, Any],
    info: Mapping[str, Any],
    about: Mapping[str, Any],
    name: str,
    licence: str,
) -> list[str]:
    source, test = entries["base"]["source"], info.get("test")
    lines = ["---", f"license: {scalar(licence)}", "library_name: aatjax"]
    lines += ["pipeline_tag: audio-classification"]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        lines.append(f"base_model: {scalar(source)}")
    lines += ["tags:", "- audio-spectrogram-transformer", f"- {scalar(info['method']['name'])}"]
    if isinstance(test, Mapping) and _number(test.get("value")):
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


def _metrics(test: Any) -> list[str]:
    if not isinstance(test, Mapping) or not _number(test.get("value")):
        return ["Not told by the adapter's file."]
    low, high = test.get("low"), test.get("high")
    bounds = f" [{low:.3f}, {high:.3f}]" if _number(low) and _number(high) else ""
    clips = markdown(_text(test.get("clips")))
    name = markdown(_text(test.get("metric")))
    return [f"- {name} {test['value']:.3f}{bounds} on {clips} test clips"]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _classes(classes: Sequence[str]) -> str:
    more = len(classes) - MOST_CLASSES
    shown = ", ".join(markdown(name) for name in classes[:MOST_CLASSES])
    return f"{shown}, and {more} more" if more > 0 else shown


def _pairs(fields: Mapping[str, Any]) -> str:
    named = [markdown(str(fields["name"]))] if "name" in fields else []
    others = [f"{markdown(k)} {markdown(_text(v))}" for k, v in fields.items() if k != "name"]
    return ", ".join([*named, *others])


def _text(value: Any) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def visible(text: str) -> str:
    """The text in one line: control characters, broken and invisible ones as \\x, \\u or \\U."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode()
        for c in text
    )


def markdown(text: str) -> str:
    """Text that Markdown shows as it is: no mark-up, no link, no HTML comes of it."""
    entities = {"<": "&lt;", ">": "&gt;", "&": "&amp;", "@": "&#64;"}
    return "".join(
        entities.get(c) or (f"\\{c}" if c in "\\`*_{}[]()#+-.!|~$:\"'=^" else c)
        for c in visible(text)
    )


def scalar(value: Any) -> str:
    """A YAML scalar in double quotes that reads back as the text."""
    parts = []
    for c in str(value):
        if c in '"\\':
            parts.append(f"\\{c}")
        elif c.isprintable():
            parts.append(c)
        elif 0xD800 <= ord(c) < 0xE000:  # half a character: there is no such thing in a file
            parts.append(f"\\\\u{ord(c):04x}")
        else:
            parts.append(f"\\U{ord(c):08x}")
    return f'"{"".join(parts)}"'


def public(source: str) -> str:
    """Where a base came from, without the folders of the machine that trained on it."""
    looks_like_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) and not PurePath(source).suffix
    if looks_like_id or ":" in source:
        return source
    return PurePath(source).name
