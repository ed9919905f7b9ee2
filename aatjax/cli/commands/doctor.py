"""Checks a set of labelled sounds before training: files, labels, leaks and duplicates.

exit code: 0 training takes the set, 1 it does, but there is a warning (with --strict), 2 wrong
usage, 65 training refuses the set, or no usable data found.

error: training refuses the set; warning: training leaves the clip out or takes it as it is, and
the model or its figures suffer; note: for information.
"""

from typing import Annotated

from tyro.conf import UseAppendAction

from aatjax.cli.arguments import Count, Frames, SoundsArguments
from aatjax.errors import Range

GROUP = "data"


def main(
    sounds: SoundsArguments,
    *,
    fields: list[str],
    frames: Frames | None = None,
    no_labels: bool = False,
    base: str = "embedded",
    strict: bool = False,
    ignore: UseAppendAction[tuple[str, ...]] = (),
    show: Annotated[int, Range(0)] = 5,
    workers: Count | None = None,
    json: bool = False,
    quiet: bool = False,
) -> None:
    """Run `aatjax doctor`.

    Args:
        sounds: every field of a config's data is a flag, such as --data.columns path=file
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

    from aatjax.cli.fields import keep_data
    from aatjax.config import Config
    from aatjax.doctor import KINDS
    from aatjax.errors import UsageError, suggest
    from aatjax.experiments.check import diagnose_data
    from aatjax.io.progress import StageBar
    from aatjax.petl.simple import Linear

    for kind in ignore:
        if kind not in KINDS:
            hint = suggest(kind, list(KINDS)) or f"; there are {', '.join(KINDS)}"
            raise UsageError(f"--ignore {kind}: no such finding{hint}")
    data = sounds.load(Config(petl=Linear()), keep_data(fields)).data
    with StageBar(quiet=quiet) as bar:
        _, diagnosis = diagnose_data(
            data,
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
