"""The commands of `aatjax`, one a file.

A file states `GROUP`, its group in `aatjax --help` (one of `aatjax.cli.main.GROUPS`), and holds
`main`, a typed function: its parameters are the arguments, those after `*` the flags, its docstring
their help. The first line of the file's docstring is the summary in `aatjax --help`, which reads
the files without importing them. What is heavy to import is imported inside `main`.

A user's mistake raises an error of `aatjax.errors`, which `aatjax` prints as one line. A command of
several files prints the errors of single files and goes on, then raises: see `predict.py`.
"""
