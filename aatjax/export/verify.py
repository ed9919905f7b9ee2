"""Verification: a file is as it was written, and computes what it did."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from aatjax.audio.frontend import FrontEnd
from aatjax.errors import DataError, UsageError, printable
from aatjax.export.manifest import CARD, MANIFEST, read_bundle
from aatjax.export.merged_model import ParityClips
from aatjax.export.model_card import find_figures, list_figures
from aatjax.export.parity import compare_outputs, synthesize_clip
from aatjax.train.adapter_file import ARTEFACT, find_adapter, find_versions, load_adapter
from aatjax.train.adapter_metadata import AdapterMetadata
from aatjax.train.golden import GOLDEN, TOLERANCE, compute_golden_logits, find_limit


@dataclasses.dataclass(frozen=True)
class Verified:
    """A file that passed.

    Attributes:
        path: the adapter, or the folder of an export.
        largest: the largest difference of logits.
        allowed: the largest that would have passed.
        by: the program that computed them.
    """

    path: Path
    largest: float
    allowed: float
    by: str


def verify(path: str | os.PathLike[str], *, base: str | os.PathLike[str] | None = None) -> Verified:
    """Check that an adapter file or an export is as it was written, and computes what it did.

    The digest of an adapter file covers its tensors and all that it states; that of an export its
    files and entries, and the figures of its model card are compared with them. Then the golden
    sample is computed again.

    Args:
        path: `adapter.safetensors`, its run folder, or the folder of an export.
        base: the backbone's weights, if they moved since training.

    Raises:
        ExportMismatchError: the logits differ from the stored ones.
        DataError: the file is damaged or changed, of another format, or has no golden sample.
        UnavailableError: a library of the export's format is not installed.
    """
    path = Path(path)
    if path.is_dir() and not (path / ARTEFACT).is_file():
        return _verify_bundle(path)
    path = find_adapter(path)[0]
    adapter = load_adapter(path, base=base, check=False)
    sample, want = _read_sample(path, adapter.info)
    logits = compute_golden_logits(adapter.model, adapter.frontend, **sample)
    written = adapter.info["versions"].get("jax", "unknown")
    here = find_versions()["jax"]
    by = f"jax {here}" if here == written else f"jax {here} (written with jax {written})"
    tolerance = TOLERANCE[adapter.model.config.dtype]
    return _compare(path, want, {"the golden sample": logits[None]}, by, tolerance)


def _verify_bundle(folder: Path) -> Verified:
    from aatjax.export.writer import FORMATS

    entries = read_bundle(folder)
    sample, want = _read_sample(folder, entries)
    to = FORMATS.get(str(entries.get("to")))
    if to is None:
        raise DataError(f"{printable(folder)}: unknown export format {entries.get('to')!r}")
    _check_card(folder, entries)
    frontend = FrontEnd.from_dict(entries["frontend"])
    name, waveform = synthesize_clip(frontend, **sample)
    found, by = to.run(folder, entries, ParityClips.from_waveforms(frontend, [name], [waveform]))
    found = {f"the golden sample ({given})": logits for given, logits in found.items()}
    return _compare(folder, want, found, by, TOLERANCE["float32"])


def _check_card(folder: Path, entries: Mapping[str, Any]) -> None:
    """Refuse a model card with other figures than the export; it may have fewer, or be missing."""
    if "test" not in entries or not (folder / CARD).is_file():
        return
    text = (folder / CARD).read_text(encoding="utf-8", errors="replace")
    stated, right = find_figures(text), list_figures(entries["test"])
    if wrong := [figure for figure in stated if figure not in right]:
        raise DataError(
            f"{printable(folder / CARD)}: states {printable(wrong[0][:80])!r}, which is no figure "
            f"of the export ({MANIFEST} has {'; '.join(right)}): put it right, or export again"
        )


def _read_sample(path: Path, entries: Mapping[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
    """The golden sample's sound and its stored logits."""
    try:
        golden = AdapterMetadata.from_json({**entries, "kind": "adapter"}).golden
    except (UsageError, DataError) as error:
        raise DataError(f"{printable(path)}: damaged or changed: {error}") from error
    if golden is None:
        raise DataError(
            f"{printable(path)}: has no golden sample (it was written without one, or by an older "
            "aatjax): nothing to verify; save it again to add one"
        )
    if golden.logits is None:
        raise DataError(f"{printable(path)}: its logits were not finite when it was written")
    sample = {name: getattr(golden, name) for name in GOLDEN}
    return sample, np.asarray(golden.logits, np.float32)


def _compare(
    path: Path, want: np.ndarray, found: Mapping[str, np.ndarray], by: str, tolerance: float
) -> Verified:
    largest = compare_outputs(
        want[None],
        found,
        tolerance,
        what=printable(path),
        reference="the stored ones",
        consequence=f"its weights, its base or the software changed ({by})",
    )
    return Verified(path, max(largest.values()), find_limit(want, tolerance), by)
