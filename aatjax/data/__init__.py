"""Labelled sounds: folders, manifests, known layouts, synthetic ones; and the way into batches.

The public names are imported when first used: a file of synthetic sounds needs no reader of tables.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aatjax.data.arrays import Arrays
    from aatjax.data.batches import Batches
    from aatjax.data.folders import ESC, AudioFolder, NamePattern
    from aatjax.data.manifest import Manifest
    from aatjax.data.source import Clip, Reader, Source
    from aatjax.data.synthetic.dataset import Synthetic

_HOMES = {
    "ESC": "aatjax.data.folders",
    "Arrays": "aatjax.data.arrays",
    "AudioFolder": "aatjax.data.folders",
    "Batches": "aatjax.data.batches",
    "Clip": "aatjax.data.source",
    "Manifest": "aatjax.data.manifest",
    "NamePattern": "aatjax.data.folders",
    "Reader": "aatjax.data.source",
    "Source": "aatjax.data.source",
    "Synthetic": "aatjax.data.synthetic.dataset",
}

__all__ = [
    "ESC",
    "Arrays",
    "AudioFolder",
    "Batches",
    "Clip",
    "Manifest",
    "NamePattern",
    "Reader",
    "Source",
    "Synthetic",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
