"""Reads any published weights and writes aatjax, Hugging Face or Orbax files, or an adapter."""

import sys
from collections.abc import Callable
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from aatjax.cli.arguments import Frames
from aatjax.cli.dry_run import make_begin
from aatjax.errors import UsageError

if TYPE_CHECKING:
    from aatjax.convert.published import PublishedFile

GROUP = "weights"
AAT_SETS = ("esc50", "urbansound8k", "openmic2018")
"""Benchmarks whose classes AAT numbers as their owners do."""


def main(
    source: str,
    out: Path,
    *,
    fields: list[str],
    to: Literal["native", "hf", "orbax"] | None = None,
    dtype: Literal["float32", "float16"] = "float32",
    frames: Frames | None = None,
    rgb: Literal["sum", "mean"] = "sum",
    revision: str | None = None,
    base: str | None = None,
    classes: str | None = None,
    statistics: str | None = None,
    pool: Literal["cls"] | None = None,
    multi_label: bool = False,
    force: bool = False,
    dry_run: bool = False,
    json: bool = False,
) -> None:
    """Run `aatjax convert`.

    What the code of AAT or PETL_AST saved of a model with adapters, LoRA, prompts, prefixes or
    experts becomes an adapter file. The names of its tensors do not show everything: flags such as
    --petl.alpha 16 or --petl.location ffn replace what is assumed, which is printed.

    Args:
        source: a file, a folder, a Hugging Face id (owner/name), embedded, or random:base
        out: NAME.safetensors, or a folder
        to: form of a folder (default: hf, which transformers loads)
        dtype: type of the stored weights, of .safetensors only
        frames: another input length in 10 ms frames; positions are fitted to it (of an adapter: the
            length that it was trained with, where the positions fit several)
        rgb: how three input channels become one
        revision: commit or branch of a Hugging Face id
        base: of an adapter: the weights that were fine-tuned, so that OUT holds only what was
            trained (default: OUT holds the backbone too)
        classes: of an adapter: class names, a benchmark (esc50) or a file: AAT's CSV of class
            labels, or a name per line (default: numbers)
        statistics: of an adapter: the normalisation that it was trained with, such as esc50
            (default: audioset, which PETL_AST uses always; AAT: that of the benchmark)
        pool: of an adapter of PETL_AST that was trained with final_output CLS
        multi_label: of an adapter: a clip may have any number of classes
        force: replace OUT if it exists
        dry_run: read the weights and check the rest, and stop
        json: print one JSON object
    """
    from aatjax.audio.frontend import PRESETS
    from aatjax.convert import write_hf, write_native, write_orbax
    from aatjax.convert.load import fit_positions, read_source

    form = _choose_form(out, to, dtype)
    _check_output(out, force)
    begin = make_begin(dry_run, f"would write {out}")
    if (found := _open_adapter(source, frames)) is not None:
        if form != "native" or dtype != "float32":
            raise UsageError(
                f"{source}: a model with added modules becomes an adapter, NAME.safetensors of "
                f"float32, not {form} of {dtype}; `aatjax export` writes other forms of it"
            )
        _write_adapter(
            found,
            out,
            fields,
            base=base,
            classes=classes,
            statistics=statistics,
            pool=pool,
            multi_label=multi_label,
            begin=begin,
            json=json,
        )
        return
    flags = {"base": base, "classes": classes, "statistics": statistics, "pool": pool}
    flags |= {"multi-label": multi_label or None}
    given = [*fields[:1], *(f"--{name}" for name, value in flags.items() if value is not None)]
    if given:
        raise UsageError(
            f"{source}: has no added modules, so it becomes a whole model: omit {given[0]}, which "
            "is of an adapter"
        )
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
    begin()
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
    text = f"{out}: {form}, from {checkpoint.layout}, {count:,} parameters"
    what = {"out": str(out), "form": form, "layout": checkpoint.layout, "parameters": count}
    print(dumps(what) if json else text)


def _open_adapter(source: str, frames: int | None) -> "PublishedFile | None":
    """Open a fine-tuned checkpoint of AAT or PETL_AST; None if the source is something else."""
    from aatjax.convert.published import open_published

    path = Path(source).expanduser()
    return open_published(path, frames=frames) if path.is_file() else None


def _write_adapter(
    found: "PublishedFile",
    out: Path,
    fields: list[str],
    *,
    base: str | None,
    classes: str | None,
    statistics: str | None,
    pool: Literal["cls"] | None,
    multi_label: bool,
    begin: Callable[[], None],
    json: bool,
) -> None:
    """Write the adapter of a checkpoint, and print what it is and what was assumed."""
    from aatjax.cli.fields import replace_fields
    from aatjax.config import Config
    from aatjax.data.benchmarks import BENCHMARKS
    from aatjax.data.class_names import read_class_names
    from aatjax.models.summary import summary
    from aatjax.petl import Method
    from aatjax.train.adapter_file import save_adapter
    from aatjax.train.published import build_published

    is_aat = found.checkpoint.layout != "petl-ast"
    benchmark = BENCHMARKS.get(classes or "")
    if is_aat and benchmark is not None and benchmark.name not in AAT_SETS:
        raise UsageError(
            f"--classes {classes}: AAT numbers the classes of this set in an order of its own: "
            "give its class_labels_indices.csv"
        )
    if benchmark is not None:
        multi_label = multi_label or benchmark.metric == "mean_ap"
        statistics = statistics or (benchmark.statistics if is_aat else None)
    method = Method.from_json(found.method)
    flags = [field.partition("=")[0] for field in fields if field.startswith("--")]
    if other := next((flag for flag in flags if not flag.startswith("--petl.")), None):
        raise UsageError(f"aatjax convert has no flag {other!r}; see aatjax convert --help")
    if fields:
        prog = f"aatjax train --method {method.name}"  # its --flags lists these
        method = replace_fields(Config(petl=method), fields, prog).petl
    adapter = build_published(
        found,
        method=method,
        base=base,
        pool=pool,
        classes=None if classes is None else read_class_names(classes),
        statistics=statistics or "audioset",
        multi_label=multi_label,
    )
    begin()
    save_adapter(
        out,
        adapter.model,
        classes=adapter.classes,
        multi_label=multi_label,
        frontend=adapter.frontend,
        extra=adapter.info,
    )
    notes = [f"assumed: {p}" for p in found.assumed if f"--petl.{p.split()[0]}" not in flags]
    if is_aat and statistics is None:
        notes.append("assumed: AudioSet's statistics; AAT has some per data set: --statistics")
    if classes is None:
        notes.append("the classes have numbers for names: --classes")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    stands = "the backbone is in the file" if base is None else f"stands on {base}"
    trained = summary(adapter.model).trainable
    text = f"{out}: adapter {method.name}, {trained:,} trained parameters; {stands}"
    what = {"out": str(out), "form": "adapter", "method": method.to_json(), "trained": trained}
    print(dumps(what) if json else text)


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
    from aatjax.io.atomic import check_output

    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        check_output(out / "x" if out.is_dir() else out)
        return
    if not force:
        raise UsageError(f"{out}: exists: choose another name, or add --force to replace it")
    is_ours = any((out / name).is_file() for name in ("config.json", "aatjax.json"))
    if out.is_dir() is (out.suffix == ".safetensors") or (out.is_dir() and not is_ours):
        raise UsageError(f"{out}: is not what would be written there: choose another name")
