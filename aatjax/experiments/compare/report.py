"""The folder of a comparison: tables, pictures, and one page of HTML that holds all of them."""

from __future__ import annotations

import html
import json
from pathlib import Path

from aatjax.errors import WriteError
from aatjax.experiments.compare.plots import draw
from aatjax.experiments.compare.runs import Comparison
from aatjax.experiments.compare.tables import as_csv, as_json, as_latex, as_markdown, shown

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #111; background: #fff; }
h1, p, li { overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { padding: 0.3rem 0.7rem; border-bottom: 1px solid #ccc; text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
svg { max-width: 100%; height: auto; }
figure { margin: 2rem 0; }
"""
CAPTIONS = {
    "pareto_parameters": "The metric against what is trained; the dashed line joins what no other "
    "beats.",
    "pareto_flops": "The metric against the FLOPs of a training step, a clip.",
    "curves": "Means over all seeds and folds.",
}


def write_report(comparison: Comparison, folder: Path, command: str) -> list[Path]:
    """Writes results.csv, results.json, table.md, table.tex, the pictures and report.html.

    Raises:
        WriteError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        texts = {
            "results.csv": as_csv(comparison),
            "results.json": json.dumps(as_json(comparison), indent=2) + "\n",
            "table.md": as_markdown(comparison),
            "table.tex": as_latex(comparison),
        }
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        pictures = draw(comparison, folder)
        page = folder / "report.html"
        page.write_text(_page(comparison, pictures, command), encoding="utf-8")
    except OSError as error:
        raise WriteError(f"{folder}: cannot be written: {error.strerror or error}") from error
    return [*(folder / name for name in texts), *pictures, page]


def _page(comparison: Comparison, pictures: list[Path], command: str) -> str:
    heads, rows = shown(comparison)
    cells = "".join(f"<th>{html.escape(h)}</th>" for h in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows
    )
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in comparison.notes)
    figures = ""
    for path in pictures:
        if path.suffix == ".svg":
            drawn = path.read_text(encoding="utf-8")
            drawn = drawn[drawn.index("<svg") :]
            figures += f"<figure>{drawn}<figcaption>{CAPTIONS[path.stem]}</figcaption></figure>"
    best = max(comparison.entries, key=lambda name: comparison.summaries[name].mean)
    found = comparison.summaries[best]
    sentence = (
        f"{best} is highest with {100 * found.mean:.1f} %, training "
        f"{comparison.costs[best].trainable:,} parameters."
    )
    title = html.escape(comparison.title)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{STYLE}</style></head><body>
<h1>{title}</h1><p>{html.escape(sentence)}</p>
<div class="wide"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>
<ul>{notes}</ul>{figures}
<p>Made by <code>{html.escape(command)}</code></p></body></html>
"""
