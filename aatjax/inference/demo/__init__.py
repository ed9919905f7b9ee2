"""`aatjax demo`: a page on this machine to try an adapter on microphone and files."""

import json
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

from aatjax.inference.classifier import RATE, Classifier

PAGE = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    **dict.fromkeys(
        ("page.js", "decide.js", "sound.js", "resample.js", "recorder.js", "server.js"),
        "text/javascript; charset=utf-8",
    ),
}
"""Files of the page and their types."""
ONNX = "onnx.js"
THRESHOLD = 0.5


def page_file(name: str) -> bytes:
    """The content of one of the page's files."""
    return (files("aatjax.inference.demo") / "page" / name).read_bytes()


def page_config(classifier: Classifier, *, title: str, method: str, backend: str) -> str:
    """What the page knows of the model, as JSON.

    Args:
        classifier: classes, front end and calibration.
        title: heading of the page.
        method: name of the adaptation method.
        backend: `server` or `onnx`.
    """
    frontend, calibration = classifier.frontend, classifier.calibration
    told: dict[str, Any] = {
        "title": title,
        "method": method,
        "backend": backend,
        "classes": list(classifier.classes),
        "multi_label": classifier.multi_label,
        "rate": RATE,
        "samples": frontend.samples,
        "mels": frontend.mels,
        "pad": frontend.pad,
        "channels": frontend.channels,
        "threshold": THRESHOLD,
        "calibration": None if calibration is None else calibration.to_json(),
    }
    return json.dumps(told, indent=1)


def title_of(path: str | os.PathLike[str]) -> str:
    """What a page calls an adapter: its run folder's name, or the file's."""
    path = Path(path).absolute()
    return path.parent.name if path.stem == "adapter" else path.stem
