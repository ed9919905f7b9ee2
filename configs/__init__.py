"""Experiments: one Python file each, binding `config`."""
