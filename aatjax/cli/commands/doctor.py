"""Checks a set of labelled sounds before training: files, labels, leaks and duplicates.

exit code: 0 no error was found, 1 an error was found (with --strict, or a warning), 2 wrong usage,
65 no usable data found.

error: training stops, leaves the clip out, or a figure would be too high; warning: the clip is
trained on as it is; note: for information.
"""

from tyro.conf import UseAppendAction

GROUP = "data"


def main(
    path: str,
    *,
    format: str = "auto",
    pattern: str | None = None,
    frames: int | None = None,
    no_labels: bool = False,
    base: str = "embedded",
    strict: bool = False,
    ignore: UseAppendAction[tuple[str, ...]] = (),
    show: int = 5,
    workers: int | None = None,
    json: bool = False,
    quiet: bool = False,
) -> None:
    """Run `aatjax doctor`.

    Args:
        path: a folder of class folders, a CSV or JSON-lines file, ...
        format: how PATH is read, as --data.format of `aatjax train`
        pattern: regular expression for --format names
        frames: input length in 10 ms frames (default: that of --base)
        no_labels: skip the search for labels that look wrong
        base: weights of the model that checks the labels
        strict: exit with 1 on warnings too
        ignore: a finding that does not change the exit code
        show: cases shown per finding
        workers: decoding threads (default: one per core)
        json: print everything as one JSON object
        quiet: no progress
    """
    from json import dumps

    from aatjax.cli.progress import StageBar
    from aatjax.doctor import KINDS, diagnose
    from aatjax.errors import UsageError, suggest

    for kind in ignore:
        if kind not in KINDS:
            hint = suggest(kind, list(KINDS)) or f"; there are {', '.join(KINDS)}"
            raise UsageError(f"--ignore {kind}: no such finding{hint}")
    if show < 0:
        raise UsageError(f"--show {show} must be 0 or more")
    with StageBar(quiet=quiet) as bar:
        diagnosis = diagnose(
            path,
            format=format,
            pattern=pattern,
            frames=frames,
            labels=not no_labels,
            base=base,
            workers=workers,
            progress=bar.update,
        )
    if json:
        print(dumps(diagnosis.to_json(), indent=2, allow_nan=False))
    else:
        print(diagnosis.text(most=show))
    code = diagnosis.exit_code(strict=strict, ignore=ignore)
    if code:
        raise SystemExit(code)
