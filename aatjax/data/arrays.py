"""Labelled sounds that are in memory already: arrays of waveforms or of log-mel."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Int16

from aatjax.audio.waveform import as_waveform
from aatjax.data.source import Clip, Reader, Source
from aatjax.data.splits import order_names
from aatjax.errors import AatjaxError, DataError, UsageError, check_names
from aatjax.io.digest import hash_arrays

MOST_CHANNELS, MOST_MELS = 8, 512  # what has few and many of both is channels and samples


class ArrayReader(Reader):
    """Reads waveforms from memory, or log-mel in their place.

    Args:
        arrays: by the id of the clip: int16 samples `[s]` at 16 kHz, or log-mel `[t, f]`.
    """

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self._arrays = arrays
        self._keys: dict[str, str] = {}

    def read(self, clip: Clip) -> Int16[np.ndarray, " s"]:
        """Return the samples of a clip."""
        if self.read_log_mel(clip) is not None:
            raise UsageError(
                f"clip {clip.id!r} is log-mel, of which nothing but fit and evaluate can be made: "
                "give waveforms"
            )
        return self._arrays[clip.id]

    def read_log_mel(self, clip: Clip) -> Float32[np.ndarray, "t f"] | None:
        """Return the log-mel of a clip that is given as such."""
        array = self._arrays[clip.id]
        return array if array.ndim == 2 else None

    def key(self, clip: Clip) -> str:
        """Return the digest of the clip's numbers."""
        if clip.id not in self._keys:
            self._keys[clip.id] = hash_arrays({"": self._arrays[clip.id]})
        return self._keys[clip.id]


class Arrays(Source):
    """Labelled sounds in memory.

        data.Arrays(X, y, classes=("dog", "rain"), rate=44100)

    Args:
        x: one sound per row: waveforms `[n, s]` or a list of `[s]`, as integers or as floats in
            [-1, 1]; or log-mel `[n, t, f]` or a list of `[t, f]`, in 10 ms frames, before the
            normalisation of the front end (x - mean) / (2 std). For features that are normalised
            already, give `fit` a front end with mean 0 and standard deviation 0.5.
        y: one class per row, `[n]`, as an index or a name; or `[n, c]` zeros and ones (NaN where it
            is not known) for any number of classes per sound.
        classes: class names; by default the names in `y`, sorted, or the numbers.
        rate: sampling rate of waveforms in Hz.
        groups: the recording or speaker of each row; `split` never cuts a group.
        ids: names of the rows, by default their numbers.
        name: name shown to people.

    Raises:
        DataError: a row that cannot be used; the message names it.
        UsageError: lengths, classes or shapes that do not fit together.
    """

    def __init__(
        self,
        x: Sequence[Any] | np.ndarray,
        y: Sequence[Any] | np.ndarray,
        classes: Sequence[str] | None = None,
        *,
        rate: int = 16000,
        groups: Sequence[Any] | None = None,
        ids: Sequence[Any] | None = None,
        name: str = "arrays",
    ) -> None:
        if classes is not None:
            check_names(f"{name}: classes", classes)
        if len(x) != len(y):
            raise UsageError(f"{name}: {len(x)} sounds and {len(y)} labels: give one per sound")
        for what, column in (("groups", groups), ("ids", ids)):
            if column is not None and len(column) != len(x):
                raise UsageError(f"{name}: {len(x)} sounds and {len(column)} {what}")
        target = np.asarray(y)
        names = [str(value) for value in (range(len(x)) if ids is None else ids)]
        labels, observed, found = _read_labels(target, classes, name)
        clips = [
            Clip(
                names[row],
                labels[row],
                None,
                group=None if groups is None else str(groups[row]),
                observed=None if observed is None else observed[row],
            )
            for row in range(len(x))
        ]
        arrays = {}
        for row, value in enumerate(x):
            try:
                arrays[names[row]] = _read_row(np.asarray(value), rate)
            except AatjaxError as error:
                raise DataError(f"{name}: row {row}: {error}") from None
            except (TypeError, ValueError, RuntimeError) as error:  # of another library's array
                raise DataError(
                    f"{name}: row {row}: {type(value).__name__} that NumPy cannot read: {error}"
                ) from None
        super().__init__(
            clips, found, name=name, multi_label=target.ndim == 2, reader=ArrayReader(arrays)
        )


def _read_row(value: np.ndarray, rate: int) -> np.ndarray:
    if value.ndim == 2 and 1 in value.shape:
        value = value.reshape(-1)  # [1, s] and [s, 1], as audio libraries return mono sound
    if value.ndim == 1:
        return as_waveform(value, rate)
    if value.ndim == 2 and 0 < min(value.shape) <= MOST_CHANNELS and max(value.shape) > MOST_MELS:
        raise DataError(
            f"shape {list(value.shape)} looks like a sound of {min(value.shape)} channels: give "
            "mono [s], such as their mean"
        )
    if value.ndim != 2 or 0 in value.shape or not np.issubdtype(value.dtype, np.floating):
        raise DataError(
            f"{value.dtype} of shape {list(value.shape)} is neither a waveform [s] nor log-mel "
            "[frames, mel bins]"
        )
    if not np.isfinite(value).all():
        raise DataError("the log-mel holds NaN or infinity")
    return value.astype(np.float32)


def _read_labels(
    target: np.ndarray, classes: Sequence[str] | None, name: str
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]] | None, tuple[str, ...]]:
    """Return the classes of each row, those that are known of it, and the names of all."""
    if target.ndim == 2:
        count = target.shape[1]
        known = tuple(classes) if classes is not None else tuple(map(str, range(count)))
        if len(known) != count:
            raise UsageError(f"{name}: labels of {count} classes, and {len(known)} class names")
        numbers = target.astype(np.float64)
        unknown = np.isnan(numbers)
        if not np.isin(numbers[~unknown], (0, 1)).all():
            raise UsageError(f"{name}: labels [n, classes] must be 0, 1 or NaN (not known)")
        labels = [tuple(np.flatnonzero(row == 1).tolist()) for row in numbers]
        if not unknown.any():
            return labels, None, known
        return labels, [tuple(np.flatnonzero(~row).tolist()) for row in unknown], known
    if target.ndim != 1:
        raise UsageError(f"{name}: labels of shape {list(target.shape)}: give [n] or [n, classes]")
    if target.dtype == bool:
        target = target.astype(np.int64)
    if np.issubdtype(target.dtype, np.floating):
        broken = target[target != np.round(target)]
        if broken.size:
            raise UsageError(f"{name}: the label {broken[0]} is not a class: give numbers or names")
        target = target.astype(np.int64)
    if np.issubdtype(target.dtype, np.integer):
        known = classes if classes is not None else map(str, range(int(target.max(initial=0)) + 1))
        return [(int(index),) for index in target], None, tuple(known)
    values = [str(value) for value in target]
    found = order_names(set(values)) if classes is None else tuple(classes)
    if strange := sorted(set(values) - set(found)):
        raise UsageError(f"{name}: the label {strange[0]!r} is not among the classes {found}")
    place = {value: number for number, value in enumerate(found)}
    return [(place[value],) for value in values], None, found
