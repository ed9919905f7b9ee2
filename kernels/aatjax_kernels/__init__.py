"""Kernels of aatjax: one folder an op, each with a plain-jnp reference that is the truth."""
