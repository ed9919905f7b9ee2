"""Weights in and out: every published layout to canonical parameters, and Hugging Face files."""

from aatjax.convert.read import Checkpoint, read_checkpoint
from aatjax.convert.write import write_hf, write_native, write_orbax
from aatjax.io.hub import fetch_weights

__all__ = [
    "Checkpoint",
    "read_checkpoint",
    "fetch_weights",
    "write_hf",
    "write_native",
    "write_orbax",
]
