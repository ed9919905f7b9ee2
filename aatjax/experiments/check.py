"""The doctor's checks of the data of a config, with what training would refuse."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from aatjax.config import Data
from aatjax.data.source import Progress, Source
from aatjax.doctor import ClipMeasurements, Diagnosis, diagnose, open_with_faults
from aatjax.errors import printable
from aatjax.experiments.partition import divide, omit_unusable, open_listed


def diagnose_data(
    data: Data,
    *,
    frames: int | Callable[[Sequence[float]], int] | None = None,
    labels: bool = True,
    base: str = "embedded",
    workers: int | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> tuple[Source, Diagnosis]:
    """Check the sounds of a config; what `train` would refuse is the finding `refused`.

    Args:
        data: the sounds and their division.
        frames, labels, base, workers, progress: as in `aatjax.doctor.diagnose`.

    Returns:
        The set without the clips that cannot be decoded, and the findings.

    Raises:
        DataError: no usable data found, or `base` cannot be read.
        UsageError: settings that do not fit the set.
    """
    source, wrong_rows = open_with_faults(lambda strict: open_listed(data, strict=strict))
    kept = [source]

    def check(measurements: Sequence[ClipMeasurements]) -> None:
        if wrong_rows is not None:
            raise wrong_rows
        kept[0] = omit_unusable(data, source, list_unusable(data, measurements))
        divide(data, kept[0])

    diagnosis = diagnose(
        source,
        frames=frames,
        labels=labels,
        base=base,
        workers=workers,
        progress=progress,
        check=check,
    )
    return kept[0], diagnosis


def list_unusable(data: Data, measurements: Sequence[ClipMeasurements]) -> dict[str, str]:
    """Return why training omits a clip, by the clip's id."""
    return {
        m.id: f"{printable(m.path or m.id)}: {m.detail}"
        for m in measurements
        if m.problem and not (m.problem == "truncated" and data.truncated == "keep")
    }
