"""Labelled sounds: folders, manifests, known layouts, synthetic ones; and the way into batches."""

from aatjax.data.folders import ESC, AudioFolder, NamePattern, Synthetic
from aatjax.data.manifest import Manifest
from aatjax.data.source import Clip, Reader, Source

__all__ = ["ESC", "AudioFolder", "Clip", "Manifest", "NamePattern", "Reader", "Source", "Synthetic"]
