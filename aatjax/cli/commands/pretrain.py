"""Pretrains a backbone on sounds and writes its weights, for --base."""

import sys
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional

from aatjax.cli.dry_run import make_begin

GROUP = "train"


def main(
    sounds: Annotated[tuple[str, ...], Positional],
    *,
    fields: list[str],
    out: Path,
    objective: Literal["supervised", "masked"] = "supervised",
    run: Path | None = None,
    force: bool = False,
    dry_run: bool = False,
    json: bool = False,
    quiet: bool = False,
) -> None:
    """Pretrain a backbone; the same command goes on after an interruption, with --run.

    Args:
        sounds: labelled sets, joined: folders, CSV files, ..., or synthetic for the package's own
        out: file of the weights (.safetensors)
        objective: learn the labels (supervised), or to reconstruct masked patches (masked)
        run: folder of checkpoints and metrics
        force: replace an existing file
        dry_run: check the sounds, the shape and the paths, and stop
        json: print one JSON object
        quiet: no progress
    """
    from json import dumps

    from aatjax.cli.fields import replace_fields
    from aatjax.errors import UsageError
    from aatjax.experiments.pretrain import PRETRAINING, pretrain
    from aatjax.io.atomic import check_output

    config = replace_fields(PRETRAINING, fields, "aatjax pretrain")
    if out.suffix != ".safetensors":
        raise UsageError(f"--out {out}: the weights are a .safetensors file: give it that ending")
    check_output(out)
    if out.exists() and not force:
        raise UsageError(f"{out}: exists: choose another name, or add --force to replace it")
    result = pretrain(
        config,
        sounds,
        out,
        objective=objective,
        run_dir=run,
        show=None if quiet else sys.stderr,
        begin=make_begin(dry_run, f"nothing was trained; would write {out}"),
    )
    if json:
        print(dumps({"weights": str(out), **result.to_json()}))
        return
    if objective == "supervised" and result.test is not None:
        print(result.test.table())
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB; aatjax adapt SOUNDS --base {out}")
