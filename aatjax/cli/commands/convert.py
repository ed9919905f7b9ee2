"""Reads any published weights and writes aatjax, Hugging Face or Orbax files."""

import sys
from pathlib import Path
from typing import Any, Literal

from aatjax.errors import UsageError

GROUP = "weights"


def main(
    source: str,
    out: Path,
    *,
    to: Literal["native", "hf", "orbax"] | None = None,
    dtype: Literal["float32", "float16"] = "float32",
    frames: int | None = None,
    rgb: Literal["sum", "mean"] = "sum",
    revision: str | None = None,
    force: bool = False,
) -> None:
    """Run `aatjax convert`.

    Args:
        source: a file, a folder, a Hugging Face id (owner/name), embedded, or random:base
        out: NAME.safetensors, or a folder
        to: form of a folder (default: hf, which transformers loads)
        dtype: type of the stored weights, of .safetensors only
        frames: another input length in 10 ms frames; positions are fitted to it
        rgb: how three input channels become one
        revision: commit or branch of a Hugging Face id
        force: replace OUT if it exists
    """
    from aatjax.audio.frontend import PRESETS
    from aatjax.convert import write_hf, write_native, write_orbax
    from aatjax.convert.load import fit_positions, read_source

    form = _choose_form(out, to, dtype)
    _check_output(out, force)
    checkpoint = read_source(source, revision=revision, rgb=rgb)
    if frames is not None or form == "hf":
        checkpoint = fit_positions(checkpoint, frames)
    weights = checkpoint.params, checkpoint.config, checkpoint.labels
    about: dict[str, Any] = {
        "grid": checkpoint.grid,
        "rule": checkpoint.rule,
        "statistics": checkpoint.statistics,
    }
    notes: tuple[str, ...] = ()
    if form == "hf":
        mean, std = checkpoint.statistics or PRESETS["audioset"]
        notes = write_hf(out, *weights, mean=mean, std=std, replace=force)
    elif form == "native":
        write_native(out, *weights, dtype, **about)
    else:
        write_orbax(out, *weights, **about, replace=force)
    if checkpoint.wrapper:
        notes += (f"the names in {source} begin with {checkpoint.wrapper!r}, which was removed",)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    count = sum(value.size for value in checkpoint.params.values())
    print(f"{out}: {form}, from {checkpoint.layout}, {count:,} parameters")


def _choose_form(out: Path, to: str | None, dtype: str) -> str:
    """The form to write: the ending of a file names it, a folder has the form of --to."""
    from aatjax.io.hub import FILE_ENDINGS

    ending = out.suffix.lower()
    form = "native" if ending == ".safetensors" else to or "hf"
    if to not in (None, form):
        raise UsageError(f"{out}: --to {to} writes a folder: give a name without .safetensors")
    if (ending in FILE_ENDINGS or to == "native") and ending != ".safetensors":
        raise UsageError(f"{out}: weights are written as NAME.safetensors, or into a folder")
    if form != "native" and dtype != "float32":
        raise UsageError(f"--dtype {dtype} goes with NAME.safetensors only")
    return form


def _check_output(out: Path, force: bool) -> None:
    """Refuse to replace a file without --force, and ever a folder that holds something else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not force:
        raise UsageError(f"{out}: exists: choose another name, or add --force to replace it")
    is_ours = any((out / name).is_file() for name in ("config.json", "aatjax.json"))
    if out.is_dir() is (out.suffix == ".safetensors") or (out.is_dir() and not is_ours):
        raise UsageError(f"{out}: is not what would be written there: choose another name")
