"""The command line: `aatjax VERB ...`."""
