"""The commands of `aatjax`, one a file.

A file states `GROUP`, its group in `aatjax --help` (one of `aatjax.cli.commands.GROUPS`), and holds
`main`, a typed function: its parameters are the arguments, those after `*` the flags, its docstring
their help. The first line of the file's docstring is the summary in `aatjax --help`, which reads
the files without importing them. What is heavy to import is imported inside `main`.

A user's mistake raises an error of `aatjax.errors`, which `aatjax` prints as one line. A command of
several files prints the errors of single files and goes on, then raises: see `predict.py`.
"""

import re
from pathlib import Path

GROUPS = ("train", "use", "data", "weights", "plan")
"""Groups of the overview, in its order; a command's file states its own."""


def find_commands() -> dict[str, tuple[str, str]]:
    """Group and summary of every command: the file's GROUP, and the first line of its docstring."""
    found = {}
    for path in Path(__file__).parent.glob("[a-z]*.py"):
        text = path.read_text(encoding="utf-8")
        group = re.search(r'^GROUP = "(\w+)"$', text, re.MULTILINE)
        found[path.stem] = (
            group[1] if group else "other",
            text.split('"""')[1].split(".\n")[0].rstrip("."),
        )
    order = {group: number for number, group in enumerate(GROUPS)}
    return dict(sorted(found.items(), key=lambda c: (order.get(c[1][0], len(order)), c[0])))


COMMANDS = find_commands()
