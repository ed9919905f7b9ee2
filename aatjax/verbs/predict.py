"""`aatjax predict`: what an adapter hears."""

import sys
from pathlib import Path
from typing import Any

from aatjax.errors import DataError
from aatjax.verbs.arguments import parser_of


def main(arguments: list[str]) -> None:
    """Runs `aatjax predict`."""
    parser = parser_of("predict")
    parser.add_argument("adapter", type=Path, help="adapter.safetensors, or weights with a head")
    parser.add_argument("files", nargs="+", help="sound files of any length")
    parser.add_argument("--base", help="the backbone's weights, where they have moved")
    parser.add_argument("--hop", type=float, help="seconds between windows (default: no overlap)")
    parser.add_argument("--top", type=int, default=3, help="classes shown (default 3)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, with windows")
    options = parser.parse_args(arguments)
    import json

    from aatjax.audio.listing import show
    from aatjax.audio.waveform import BadAudio
    from aatjax.classifier import Classifier

    classifier = Classifier.load(options.adapter, base=options.base)
    failed: list[BadAudio] = []
    for path in options.files:
        try:
            prediction = classifier.predict(path, hop=options.hop)
        except BadAudio as error:
            failed.append(error)
            print(f"aatjax: {error}", file=sys.stderr)
            continue
        if options.json:
            print(json.dumps(prediction.to_json()), flush=True)
        else:
            best = "  ".join(f"{label} {p:.3f}" for label, p in prediction.top(options.top))
            print(f"{show(path)}  {best}{_doubt(prediction)}", flush=True)
    if failed:
        raise DataError(f"{len(failed)} of {len(options.files)} files could not be read")


def _doubt(prediction: Any, most: int = 5) -> str:
    """What is said of a sound that may be one of several classes; nothing where that is unknown."""
    if not prediction.unsure:
        return ""
    names, more = prediction.possible[:most], len(prediction.possible) - most
    named = ", ".join(names) + (f" and {more} more" if more > 0 else "")
    if len(prediction.possible) == len(prediction.classes):
        named = "any class"
    return f"  unsure: {named} ({prediction.coverage:.0%})"
