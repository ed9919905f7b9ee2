"""`aatjax verify`: what a file said of its golden sample once, and what it says now."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from aatjax.audio.frontend import FrontEnd
from aatjax.data.synthetic.synthesize import synthesize
from aatjax.errors import AatjaxError, DataError, UsageError, printable
from aatjax.export.manifest import read_bundle
from aatjax.export.merged_model import Clips
from aatjax.export.parity import synthetic
from aatjax.train.adapter_file import compute_golden_logits, find_versions, load_adapter

TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
"""By compute type: how far a logit may be, in units of the largest (of 1 if none is larger)."""


class Differs(AatjaxError):
    """A file does not give its golden sample the logits it gave when it was written."""


@dataclasses.dataclass(frozen=True)
class Verified:
    """A file that still says what it said.

    Attributes:
        path: the adapter, or the folder of an export.
        largest: the largest difference of logits.
        allowed: the largest that would have passed.
        by: what ran it.
    """

    path: Path
    largest: float
    allowed: float
    by: str


def verify(path: str | os.PathLike[str], *, base: str | os.PathLike[str] | None = None) -> Verified:
    """Recomputes the golden sample of an adapter file or of an export.

    Args:
        path: `adapter.safetensors`, or the folder of an export.
        base: the backbone's weights where they are not where they were in training.

    Raises:
        Differs: the logits are not what they were.
        DataError: the file is damaged or changed, of another format, or has no golden sample.
        UnavailableError: a library of the export's format is not installed.
    """
    path = Path(path)
    if path.is_dir():
        return _verify_bundle(path)
    adapter = load_adapter(path, base=base)
    sample, want = _sample(path, adapter.info)
    found = compute_golden_logits(adapter.model, adapter.frontend, **sample)
    dtype = adapter.model.config.dtype
    written = adapter.info.get("versions", {}).get("jax", "unknown")
    here = find_versions()["jax"]
    by = f"jax {here}" if here == written else f"jax {here} (written with jax {written})"
    return _compared(path, want, {by: found[None]}, by, TOLERANCE[dtype])


def _verify_bundle(folder: Path) -> Verified:
    from aatjax.export.formats import FORMATS

    entries = read_bundle(folder)
    sample, want = _sample(folder, entries)
    kind = FORMATS.get(str(entries.get("to")))
    if kind is None:
        raise DataError(
            f"{printable(folder)}: an export to {entries.get('to')!r}, which is unknown here"
        )
    frontend = FrontEnd.from_dict(entries["frontend"])
    name, waveform = synthetic(frontend, **sample)
    clips = Clips.of(frontend, [name], [waveform])
    found, by = kind.run(folder, entries, clips)
    return _compared(folder, want, found, by, TOLERANCE["float32"])


def _sample(path: Path, entries: Mapping[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
    golden = entries.get("golden")
    if golden is None:
        raise DataError(
            f"{printable(path)}: has no golden sample (it was written without one, or by an older "
            "aatjax): nothing to verify; save it anew for one"
        )
    try:
        sample = {name: golden[name] for name in ("sound", "seed", "seconds")}
        if golden["logits"] is None:
            raise DataError(f"{printable(path)}: its logits were not finite when it was written")
        want = np.asarray(golden["logits"], np.float32)
        synthesize(sample["sound"], sample["seed"], seconds=min(1.0, sample["seconds"]))
        count = len(entries["classes"])
        if want.shape != (count,) or not 0 < sample["seconds"] < 3600:
            raise ValueError(f"{list(want.shape)} logits for {count} classes")
    except DataError:
        raise
    except (UsageError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{printable(path)}: its golden sample is damaged ({error})") from None
    return sample, want


def _compared(
    path: Path, want: np.ndarray, found: Mapping[str, np.ndarray], by: str, tolerance: float
) -> Verified:
    allowed = tolerance * max(1.0, float(np.abs(want).max()))
    largest = max(float(np.nan_to_num(np.abs(v - want), nan=np.inf).max()) for v in found.values())
    if largest > allowed:
        raise Differs(
            f"{printable(path)}: the golden sample's logits are {largest:.2g} away from what they were, "
            f"{allowed:.2g} is allowed ({by}): its weights, its base or the software changed"
        )
    return Verified(path, largest, allowed, by)
