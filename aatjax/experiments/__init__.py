"""Experiments: from a config to figures, cross-validation and comparisons of methods."""
