"""Labelled sounds: folders, manifests, known layouts, synthetic ones; and the way into batches."""

from aatjax.data.folders import ESC, AudioFolder, NamePattern
from aatjax.data.manifest import Manifest
from aatjax.data.source import Clip, Reader, Source
from aatjax.data.synthetic.dataset import Synthetic

__all__ = ["ESC", "AudioFolder", "Clip", "Manifest", "NamePattern", "Reader", "Source", "Synthetic"]
