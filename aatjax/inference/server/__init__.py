"""HTTP server: many adapters on one backbone; `aatjax serve` and `aatjax demo` run it."""

from aatjax.inference.server.limits import ServerLimits
from aatjax.inference.server.serve import serve_adapters

__all__ = ["ServerLimits", "serve_adapters"]
