"""`python -m aatjax`: the same as the command `aatjax`."""

from aatjax.cli.main import main

main()
