"""Labelled sounds: folders, manifests, known layouts, synthetic ones; and the way into batches."""

from aatjax.data.arrays import Arrays
from aatjax.data.batches import Batches
from aatjax.data.folders import ESC, AudioFolder, NamePattern
from aatjax.data.manifest import Manifest
from aatjax.data.source import Clip, Reader, Source
from aatjax.data.synthetic.dataset import Synthetic

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
