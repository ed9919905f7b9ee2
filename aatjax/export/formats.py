"""`aatjax.export.export`: an adapter into the files of another runtime, whole or not at all."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aatjax.errors import DataError, UsageError, WriteError, printable
from aatjax.export import hugging_face, onnx_file, peft_file, safetensors_file, stablehlo, web
from aatjax.export.manifest import CARD, seal
from aatjax.export.merged_model import Clips, Subject
from aatjax.export.model_card import card, public
from aatjax.export.parity import TOLERANCE, compare, sounds_of, synthetic, synthetic_sounds
from aatjax.inference.demo import find_title
from aatjax.io.atomic import write_folder
from aatjax.train.adapter_file import GOLDEN, TrainedAdapter, find_versions, load_adapter

Run = Callable[[Path, dict[str, Any], Clips], tuple[dict[str, np.ndarray], str]]


@dataclasses.dataclass(frozen=True)
class Format:
    """One kind of files.

    Attributes:
        refused: raises a UsageError for a model that the format cannot hold.
        write: fills a folder; returns what a user must know besides.
        run: logits of the files in a folder, by what they were given, and what ran them.
        usage: how to use them, as Markdown.
    """

    refused: Callable[[Subject], None]
    write: Callable[..., tuple[str, ...]]
    run: Run
    usage: Callable[..., str]


FORMATS: dict[str, Format] = {
    name: Format(module.refused, module.write, module.run, module.usage)
    for name, module in {
        "hf": hugging_face,
        "peft": peft_file,
        "onnx": onnx_file,
        "stablehlo": stablehlo,
        "safetensors": safetensors_file,
        "web": web,
    }.items()
}


@dataclasses.dataclass(frozen=True)
class Exported:
    """An export that was written.

    Attributes:
        folder: where.
        to: the format.
        largest: the largest difference of logits, by what the export was given.
        by: what ran it.
        notes: what a user must know besides.
    """

    folder: Path
    to: str
    largest: dict[str, float]
    by: str
    notes: tuple[str, ...]


def export(
    artefact: str | os.PathLike[str] | TrainedAdapter,
    to: str,
    out: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    check: Sequence[str | os.PathLike[str]] = (),
    tolerance: float = TOLERANCE,
    platforms: Sequence[str] = stablehlo.PLATFORMS,
    runtime: str | None = None,
    licence: str = "unknown",
) -> Exported:
    """Writes an adapter in another format, once both were run and said the same.

    Args:
        artefact: `adapter.safetensors`, or what `aatjax.load_adapter` gave for one.
        to: `hf`, `peft`, `onnx`, `stablehlo`, `safetensors` or `web`.
        out: the folder; it must not exist yet, or be empty.
        base: the backbone's weights where they are not where they were in training.
        check: sound files to compare on; by default a few synthetic sounds.
        tolerance: how far a logit may move, in units of the largest logit (of 1 if none is larger).
        platforms: of `stablehlo`: cpu, cuda, tpu.
        runtime: of `web`: the onnxruntime-web package where it cannot be fetched.
        licence: for the model card, such as `mit`.

    Raises:
        UsageError: a format that cannot hold the method; the message names those that can.
        UnavailableError: a library of the format is not installed.
        Moved: the export's logits are not the model's; nothing is written.
        WriteError: the folder could not be written; nothing is left under its name.
    """
    out = Path(out)
    if to not in FORMATS:
        raise UsageError(f"no format {to!r}: use {', '.join(FORMATS)}")
    if out.suffix in (".safetensors", ".onnx"):
        raise UsageError(
            f"{printable(out)}: an export is a folder: give a name without {out.suffix}"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise WriteError(
            f"{printable(out)}: exists and is not an empty folder: choose another name"
        )
    kind = FORMATS[to]
    if isinstance(artefact, TrainedAdapter):
        name, adapter = "the adapter", artefact
    else:
        name, adapter = printable(artefact), load_adapter(artefact, base=base)
    subject = Subject.of(adapter)
    kind.refused(subject)
    options: dict[str, Any] = {"platforms": tuple(platforms)} if to == "stablehlo" else {}
    if to == "web":
        options["runtime"] = runtime
        if not isinstance(artefact, TrainedAdapter):
            options["title"] = find_title(artefact)
    frontend = subject.frontend
    sounds = sounds_of(check) if check else synthetic_sounds(frontend)
    sounds.append(synthetic(frontend, **GOLDEN))
    clips = Clips.of(frontend, *zip(*sounds, strict=True))
    want = subject.logits(clips)
    if not np.isfinite(want).all():
        raise DataError(f"{name}: its logits are not finite: train it anew")
    entries = _entries(subject, to, want[-1])
    if to == "stablehlo":
        entries["platforms"] = list(platforms)
    results: list[Exported] = []

    def fill(folder: Path) -> None:
        notes = kind.write(folder, subject, **options)
        found, by = kind.run(folder, entries, clips)
        largest = compare(want, found, tolerance, what=f"{to} export of {name}")
        gate = {"tolerance": tolerance, "by": by, "clips": list(clips.names), "largest": largest}
        sealed = {**entries, "gate": gate}
        text = card(
            sealed,
            subject.adapter.info,
            usage=kind.usage(subject, **options),
            notes=notes,
            licence=licence,
        )
        (folder / CARD).write_text(text, encoding="utf-8")
        seal(folder, sealed)
        results.append(Exported(out, to, largest, by, notes))

    write_folder(out, fill)
    return results[0]


def _entries(subject: Subject, to: str, golden: np.ndarray) -> dict[str, Any]:
    """What every export tells of its model."""
    info = subject.adapter.info
    return {
        "to": to,
        "classes": list(subject.adapter.classes),
        "multi_label": subject.adapter.multi_label,
        "frontend": subject.frontend.to_dict(),
        "samples": subject.frontend.samples,
        "model": subject.served.config.to_json(),
        "method": info["method"],
        "base": {**info["base"], "source": public(info["base"]["source"])},
        "versions": find_versions(),
        "golden": {**GOLDEN, "logits": [float(f"{value:.7g}") for value in golden]},
    }
