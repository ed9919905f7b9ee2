"""Reports of trained adapters as HTML files that need no network."""
