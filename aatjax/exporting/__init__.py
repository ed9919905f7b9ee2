"""A trained adapter in the files of other runtimes, checked against the model it came from."""

from aatjax.exporting.bundle import read_bundle
from aatjax.exporting.formats import FORMATS, Exported, export
from aatjax.exporting.golden import Differs, verify

__all__ = ["FORMATS", "Differs", "Exported", "export", "read_bundle", "verify"]
