"""Labelled sounds: folders, manifests, known layouts, synthetic ones; and the way into batches."""

from aatjax.data.clips import Clip, Reader, Source
from aatjax.data.manifest import Manifest
from aatjax.data.sources import ESC, AudioFolder, NamePattern, Synthetic

__all__ = ["ESC", "AudioFolder", "Clip", "Manifest", "NamePattern", "Reader", "Source", "Synthetic"]
