"""A trained adapter in the files of other runtimes, checked against the model it came from."""

from aatjax.export.formats import FORMATS, Exported, export
from aatjax.export.manifest import read_bundle
from aatjax.export.verify import Differs, verify

__all__ = ["FORMATS", "Differs", "Exported", "export", "read_bundle", "verify"]
