"""Writes an adapter as Hugging Face, PEFT, ONNX, StableHLO or plain weights, checked first."""

import sys
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import UseAppendAction

from aatjax.cli.dry_run import make_begin
from aatjax.errors import Range

GROUP = "weights"


def main(
    adapter: Path,
    out: Path,
    *,
    to: Literal["hf", "peft", "onnx", "stablehlo", "safetensors", "web"],
    base: str | None = None,
    check: UseAppendAction[tuple[tuple[str, ...], ...]] = (),
    tolerance: Annotated[float, Range(above=0)] = 1e-4,
    platforms: str = "cpu,cuda,tpu",
    runtime: str | None = None,
    licence: str = "unknown",
    force: bool = False,
    dry_run: bool = False,
    json: bool = False,
    quiet: bool = False,
) -> None:
    """Run `aatjax export`.

    Args:
        adapter: adapter.safetensors, or its run folder
        out: folder to write; it must be new or empty, or an export that --force replaces
        to: transformers, LoRA for PEFT, ONNX, jax.export, plain weights for aatjax.load, or a page
            of static files that runs in a browser
        base: the backbone's weights, if they moved since training
        check: sound files to compare model and export on (default: synthetic sounds)
        tolerance: how far a logit may move, in units of the largest one
        platforms: of stablehlo, with commas between
        runtime: of web: the onnxruntime-web package (.tgz), where there is no network
        licence: for the model card, such as mit
        force: replace OUT if it is an export
        dry_run: check the method, the format, the libraries and the sounds, and stop
        json: print one JSON object
        quiet: no progress
    """
    from json import dumps

    from aatjax.export import export

    done = export(
        adapter,
        to,
        out,
        base=base,
        check=[file for files in check for file in files],
        tolerance=tolerance,
        platforms=platforms.split(","),
        runtime=runtime,
        licence=licence,
        replace=force,
        begin=make_begin(dry_run, f"would write {out}"),
    )
    for note in done.notes:
        print(f"note: {note}", file=sys.stderr)
    largest = max(done.largest.values())
    if json:
        print(dumps({**vars(done), "folder": str(out)}))
        return
    print(f"{out}: {done.to}, logits within {largest:.2g} of the model's, computed by {done.by}")
