"""HTML reports: one file each, no network; needs `aatjax[report]` (jinja2, matplotlib)."""

from aatjax.io.optional import need

need("jinja2", "matplotlib", extra="report")
