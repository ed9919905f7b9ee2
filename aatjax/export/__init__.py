"""Exports of trained adapters to other runtimes, each checked against its model."""

from aatjax.export.manifest import read_bundle
from aatjax.export.parity import ExportMismatchError
from aatjax.export.verify import verify
from aatjax.export.writer import FORMATS, Exported, export

__all__ = ["FORMATS", "ExportMismatchError", "Exported", "export", "read_bundle", "verify"]
