"""`aatjax.export.export`: an adapter in the files of another runtime, complete or not at all."""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aatjax.audio.windows import Window, compute_step, cut_windows
from aatjax.errors import DataError, UsageError, WriteError, printable
from aatjax.export.formats import ExportFormat
from aatjax.export.hugging_face import HF_FORMAT
from aatjax.export.manifest import CARD, MANIFEST, seal_bundle
from aatjax.export.merged_model import MergedModel, ParityClips, compute_logits
from aatjax.export.model_card import hide_folders, make_card
from aatjax.export.onnx_file import ONNX_FORMAT
from aatjax.export.parity import (
    MOST_WINDOWS,
    TOLERANCE,
    compare_files,
    compare_outputs,
    read_clips,
    synthesize_clip,
    synthesize_clips,
)
from aatjax.export.peft_file import PEFT_FORMAT
from aatjax.export.recipe import write_recipe
from aatjax.export.safetensors_file import SAFETENSORS_FORMAT
from aatjax.export.stablehlo import PLATFORMS, STABLEHLO_FORMAT, check_platforms
from aatjax.export.web import WEB_FORMAT
from aatjax.inference.calibration import compute_probabilities
from aatjax.inference.demo import find_title
from aatjax.io.atomic import check_output, write_folder
from aatjax.io.optional import need
from aatjax.io.progress import describe_compiling, report
from aatjax.train.adapter_file import TrainedAdapter, find_versions, load_adapter
from aatjax.train.golden import GOLDEN

FORMATS: dict[str, ExportFormat] = {
    format.name: format
    for format in (
        HF_FORMAT,
        PEFT_FORMAT,
        ONNX_FORMAT,
        STABLEHLO_FORMAT,
        SAFETENSORS_FORMAT,
        WEB_FORMAT,
    )
}


@dataclasses.dataclass(frozen=True)
class Exported:
    """A written export.

    Attributes:
        folder: its folder.
        to: the format.
        largest: the largest difference of logits, by kind of input.
        by: the program that computed them.
        notes: notes for the user.
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
    platforms: Sequence[str] = PLATFORMS,
    runtime: str | None = None,
    licence: str = "unknown",
    replace: bool = False,
    begin: Callable[[], None] = lambda: None,
) -> Exported:
    """Write an adapter in another format, if its files compute what the model does.

    Args:
        artefact: `adapter.safetensors`, or the result of `aatjax.load_adapter`.
        to: `hf`, `peft`, `onnx`, `stablehlo`, `safetensors` or `web`.
        out: the folder; new, empty or, with `replace`, an export.
        base: the backbone's weights, if they moved since training.
        check: sound files to compare on; by default a few synthetic sounds.
        tolerance: largest difference of a logit, in units of the largest (of 1 if none is larger).
        platforms: of `stablehlo`: cpu, cuda, tpu.
        runtime: of `web`: the onnxruntime-web package, where it cannot be downloaded.
        licence: for the model card, such as `mit`.
        replace: take the place of an export that is there.
        begin: called when everything was checked, before the first logits are computed.

    Raises:
        UsageError: the format cannot hold the method; the message names those that can.
        UnavailableError: a library of the format is not installed.
        ExportMismatchError: the logits differ from the model's; nothing is written.
        WriteError: the folder could not be written; nothing is left under its name.
    """
    out = Path(out)
    _check_target(to, out, replace)
    format = FORMATS[to]
    need(*format.libraries, extra="export")
    options: dict[str, Any] = {}
    if to == "stablehlo":
        check_platforms(platforms)
        options["platforms"] = tuple(platforms)
    sounds = read_clips(check) if check else None
    if isinstance(artefact, TrainedAdapter):
        name, adapter = "the adapter", artefact
    else:
        name, adapter = printable(artefact), load_adapter(artefact, base=base)
        if to == "web":
            options["title"] = find_title(artefact)
    if to == "web":
        options["runtime"] = runtime
    model = MergedModel.from_adapter(adapter)
    format.check(model)
    begin()
    sounds = sounds or synthesize_clips(model.frontend)
    files = [(sound, _cut(model, waveform)) for sound, waveform in sounds]
    golden, waveform = synthesize_clip(model.frontend, **GOLDEN)
    files.append((golden, _cut(model, waveform)[:1]))
    clips = ParityClips.from_windows(model.frontend, files)
    report(describe_compiling())
    want = compute_logits(model.adapted, clips)
    if not np.isfinite(want).all():
        raise DataError(f"{name}: its logits are not finite: retrain it")
    entries = _make_entries(model, to, want[-1])
    if to == "stablehlo":
        entries["platforms"] = list(platforms)
    results: list[Exported] = []

    def fill(folder: Path) -> None:
        report(f"writing {to}")
        notes = format.write(folder, model, **options)
        report("comparing its outputs with the model's")
        found, by = format.run(folder, entries, clips)
        what = f"{to} export of {name}"
        largest = compare_outputs(want, found, tolerance, what=what)
        pool = functools.partial(_pool_files, model, files)
        entries["parity"] = {
            "tolerance": tolerance,
            "by": by,
            "clips": [sound for sound, _ in files],
            "largest": largest,
            "probabilities": compare_files(want, found, pool, max(tolerance, TOLERANCE), what=what),
        }
        platform = [*platforms, "cpu"][0]
        usage = format.usage.format(**_describe_inputs(model), platform=platform)
        usage += _describe_long_files(model, to, platform)
        text = make_card(entries, model.adapter.info, usage=usage, notes=notes, licence=licence)
        (folder / CARD).write_text(text, encoding="utf-8")
        seal_bundle(folder, entries)
        results.append(Exported(out, to, largest, by, notes))

    write_folder(out, fill, replace=replace)
    return results[0]


def _cut(model: MergedModel, waveform: np.ndarray) -> list[Window]:
    step = compute_step(model.frontend.samples, model.adapter.scoring.hop)
    return list(itertools.islice(cut_windows([waveform], model.frontend, step), MOST_WINDOWS))


def _pool_files(
    model: MergedModel, files: Sequence[tuple[str, Sequence[Window]]], logits: np.ndarray
) -> list[tuple[str, np.ndarray]]:
    """Return the calibrated probabilities of each file with sound, from the exported logits."""
    scoring, temperature = model.adapter.scoring, model.temperature
    several, row, found = model.adapter.multi_label, 0, []
    for name, windows in files:
        part = temperature * logits[row : row + len(windows)].astype(np.float64)
        row += len(windows)
        rows = [i for i, window in enumerate(windows) if not window.silent]
        if rows:
            lengths = np.array([windows[i].span[1] - windows[i].span[0] for i in rows])
            pooled = scoring.pool(part[rows], lengths, several)
            found.append((name, compute_probabilities(pooled[None], temperature, several)[0]))
    return found


def _describe_long_files(model: MergedModel, to: str, platform: str) -> str:
    """Return a section of the card: what is read of a long file, and the recipe."""
    scoring, frontend = model.adapter.scoring, model.frontend
    seconds = frontend.samples / frontend.rate
    recipe = write_recipe(
        to,
        frontend,
        scoring,
        temperature=model.temperature,
        multi_label=model.adapter.multi_label,
        platform=platform,
    )
    if not recipe:
        return ""
    return (
        f"\n\n### Files of any length\n\nThe model reads {seconds:.2f} s. Of a longer file the "
        f"code above uses the first {seconds:.2f} s alone. `aatjax predict` reads all windows and "
        f"pools their probabilities ({scoring.pooling}); this gives the same numbers:\n\n{recipe}"
    )


def _check_target(to: str, out: Path, replace: bool) -> None:
    if to not in FORMATS:
        raise UsageError(f"no format {to!r}: use {', '.join(FORMATS)}")
    if out.suffix in (".safetensors", ".onnx"):
        raise UsageError(f"{printable(out)}: an export is a folder: omit {out.suffix}")
    if out.is_dir() and (out / MANIFEST).is_file():
        if not replace:
            raise WriteError(
                f"{printable(out)}: holds an export: choose another name, or replace it (--force)"
            )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise WriteError(
            f"{printable(out)}: exists and is not an empty folder: choose another name"
        )
    check_output(out / MANIFEST)


def _describe_inputs(model: MergedModel) -> dict[str, Any]:
    """Words of the usage texts that depend on the model."""
    frontend, masks = model.frontend, model.masks_padding
    return {
        "samples": frontend.samples,
        "rate": frontend.rate,
        "frames": frontend.frames,
        "mels": frontend.mels,
        "mask_padding": ", mask_padding=True" if masks else "",
        "valid": ", and `valid`, the valid frames of each clip, int32" if masks else "",
    }


def _make_entries(model: MergedModel, to: str, golden: np.ndarray) -> dict[str, Any]:
    """The entries of `export.json` that describe the model."""
    info = model.adapter.info
    return {
        "to": to,
        "classes": list(model.adapter.classes),
        "multi_label": model.adapter.multi_label,
        "frontend": model.frontend.to_dict(),
        "scoring": dataclasses.asdict(model.adapter.scoring),
        "calibration": None if model.calibration is None else model.calibration.to_json(),
        "samples": model.frontend.samples,
        "model": model.merged.config.to_json(),
        "method": info["method"],
        "base": {**info["base"], "source": hide_folders(info["base"]["source"])},
        "versions": find_versions(),
        "test": info.get("test"),
        "golden": {**GOLDEN, "logits": [float(f"{value:.7g}") for value in golden]},
    }
