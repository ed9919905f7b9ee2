"""The HTML report of one trained adapter: `aatjax report`."""
