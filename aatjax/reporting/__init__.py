"""A report of a trained adapter as one HTML file that needs nothing else: `aatjax report`."""
