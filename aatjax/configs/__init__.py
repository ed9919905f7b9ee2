"""Experiments: one Python file each, binding `config`; in a checkout, those of its `configs/`."""

from pathlib import Path

if not Path(__file__).with_name("default.py").exists():  # a wheel holds them here
    __path__ = [str(Path(__file__).parents[2] / "configs")]
