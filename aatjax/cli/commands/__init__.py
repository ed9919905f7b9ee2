"""The commands of `aatjax`, one a file.

A file states `GROUP`, its place in `aatjax --help`, and holds `main`, a typed function whose
parameters are the arguments and flags. The first line of the file's docstring is the summary in
`aatjax --help`, which reads the files without importing them. What is heavy to import is imported
inside `main`.
"""
