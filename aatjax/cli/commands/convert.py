"""Reads any published weights and writes aatjax, Hugging Face or Orbax files."""

import sys
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

GROUP = "weights"


def main(
    source: Positional[str],
    out: Positional[Path],
    *,
    to: Literal["native", "hf", "orbax"] | None = None,
    dtype: Literal["float32", "float16"] = "float32",
    frames: int | None = None,
    rgb: Literal["sum", "mean"] = "sum",
    revision: str | None = None,
) -> None:
    """Run `aatjax convert`.

    Args:
        source: a file, a folder, or a Hugging Face id (owner/name)
        out: file or folder to write
        to: format to write (default: native for a name ending in .safetensors, else hf)
        dtype: type of the stored weights
        frames: another input length in 10 ms frames; positions are fitted to it
        rgb: how three input channels become one
        revision: commit or branch of a Hugging Face id
    """
    from aatjax.audio.frontend import PRESETS
    from aatjax.convert import read_checkpoint, write_hf, write_native, write_orbax
    from aatjax.convert.load import fit_positions, locate_weights

    checkpoint = read_checkpoint(locate_weights(source, revision), rgb=rgb)
    if frames is not None or to == "hf":
        checkpoint = fit_positions(checkpoint, frames)
    weights = checkpoint.params, checkpoint.config, checkpoint.labels
    about: dict[str, Any] = {
        "grid": checkpoint.grid,
        "rule": checkpoint.rule,
        "statistics": checkpoint.statistics,
    }
    form = to or ("native" if out.suffix == ".safetensors" else "hf")
    notes: tuple[str, ...] = ()
    if form == "hf":
        mean, std = checkpoint.statistics or PRESETS["audioset"]
        notes = write_hf(out, *weights, mean=mean, std=std)
    elif form == "native":
        write_native(out, *weights, dtype, **about)
    else:
        write_orbax(out, *weights, **about)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    count = sum(value.size for value in checkpoint.params.values())
    print(f"{out}: {form}, from {checkpoint.layout}, {count:,} parameters")
