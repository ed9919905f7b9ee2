"""`aatjax demo`: a local page to try an adapter on microphone and files.

The exported web page (`aatjax export --to web`) has the same files, with the model beside them.
"""

import dataclasses
import json
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

from aatjax.audio.windows import RATE
from aatjax.inference.classifier import Classifier

PAGE = (
    "index.html",
    "page.css",
    "page.js",
    "decide.js",
    "names.js",
    "sound.js",
    "resample.js",
    "recorder.js",
    "server.js",
)
"""Files of the page."""
ONNX = "onnx.js"
THRESHOLD = 0.5


def read_page_file(name: str) -> bytes:
    """Return the content of one of the page's files."""
    return (files("aatjax.inference.demo") / "page" / name).read_bytes()


def make_page_config(classifier: Classifier, *, title: str, method: str, backend: str) -> str:
    """Return the JSON that describes the model to the page.

    Args:
        classifier: classes, front end and calibration.
        title: heading of the page.
        method: name of the adaptation method.
        backend: `server` or `onnx`.
    """
    frontend, calibration = classifier.frontend, classifier.calibration
    config: dict[str, Any] = {
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
        "scoring": dataclasses.asdict(classifier.scoring),
        "calibration": None if calibration is None else calibration.to_json(),
    }
    return json.dumps(config, indent=1)


def find_title(path: str | os.PathLike[str]) -> str:
    """Return the title for an adapter: its run folder's name, or the file's."""
    path = Path(path).absolute()
    return path.parent.name if path.stem == "adapter" else path.stem
