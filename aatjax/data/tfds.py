"""Prepared sets: decoded sound and labels as a TFDS dataset in ArrayRecord, without TensorFlow.

A prepared folder is an ordinary TFDS dataset (`tfds.builder_from_directory` opens it) with one
split for each fold or official part, records in the order of the clips, and two more files:
`clips.jsonl`, which tells of every clip what a record holds beside the sound, so that opening the
set does not read the sound; and `prepared.json`, which tells what was prepared from what.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int16

from aatjax.data.source import Clip, Progress, Reader, Source
from aatjax.errors import DataError, UsageError
from aatjax.io.digest import hash_bytes, hash_file
from aatjax.io.json_file import read_json_object, write_json

VERSION = "1.0.0"
CLIPS, TOLD = "clips.jsonl", "prepared.json"
FORMAT = 1


def split_name(clip: Clip) -> str:
    """The TFDS split of a clip: `fold3`, `train`, or `all` where there is no division."""
    return f"fold{clip.fold}" if clip.fold is not None else clip.split or "all"


def is_prepared(folder: Path) -> bool:
    """Whether a folder, or its newest version folder, is a prepared set."""
    return _version_folder(folder) is not None


def read_facts(folder: Path) -> dict[str, Any]:
    """What `prepared.json` tells of a prepared folder.

    Raises:
        DataError: it is not one, or was made by a version that is not known here.
    """
    place = _version_folder(folder)
    if place is None:
        raise DataError(f"{folder}: is not a prepared set: it has no {TOLD}")
    try:
        found = read_json_object(place / TOLD, advice="prepare the set again")
        form = found["format"]
    except KeyError as error:
        raise DataError(f"{place / TOLD}: names no format; prepare the set again") from error
    if form != FORMAT:
        raise DataError(
            f"{place}: was prepared in format {form}, this version reads {FORMAT}: prepare it anew"
        )
    return found


def write_prepared(
    source: Source,
    folder: Path,
    *,
    name: str,
    facts: Mapping[str, Any],
    progress: Progress | None = None,
) -> None:
    """Writes every clip of a source into an empty folder, which is to be renamed when it is done.

    Args:
        source: clips whose waveforms can be read.
        folder: an empty folder; the files of the TFDS version come right into it.
        name: name of the TFDS dataset.
        facts: what `prepared.json` shall tell beside the format; plain JSON.
        progress: called after each clip, with the stage `write`.
    """
    import contextlib
    import io

    import tensorflow_datasets as tfds

    parts: dict[str, list[int]] = {}
    for i, clip in enumerate(source.clips):
        parts.setdefault(split_name(clip), []).append(i)
    rows: list[dict[str, Any]] = []

    def records(part: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for at, i in enumerate(parts[part]):
            clip, waveform = source.clips[i], np.array(source.waveform(i))
            rows.append(_row(clip, part, at, waveform))
            yield at, _record(clip, waveform, source.multi_label)
            if progress is not None:
                progress("write", len(rows), len(source))

    class Sounds(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Labelled sounds, decoded: mono int16 at 16 kHz."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> Any:
            classes = tfds.features.ClassLabel(names=[_single_line(c) for c in source.classes])
            labels = {"label": classes}
            if source.multi_label:
                labels = {
                    "labels": tfds.features.Sequence(classes),
                    "observed": tfds.features.Sequence(classes),
                }
            return tfds.core.DatasetInfo(
                builder=self,
                description=f"{source.name}: mono int16 waveforms at 16 kHz",
                features=tfds.features.FeaturesDict(
                    {
                        "audio": tfds.features.Tensor(shape=(None,), dtype=np.int16),
                        "id": tfds.features.Text(),
                        "group": tfds.features.Text(),
                        **labels,
                    }
                ),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            del dl_manager
            return {part: self._generate_examples(part) for part in parts}

        def _generate_examples(self, part: str) -> Iterator[tuple[int, dict[str, Any]]]:
            return records(part)

    Sounds.name = name
    place = folder / ".tfds"
    tfds.disable_progress_bar()  # there is one already
    with contextlib.redirect_stdout(io.StringIO()):
        builder = Sounds(data_dir=str(place), file_format="array_record")
        builder.download_and_prepare()
    made = Path(str(builder.data_dir))
    with (made / CLIPS).open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
    about = {
        "format": FORMAT,
        "name": source.name,
        "classes": list(source.classes),
        "multi_label": source.multi_label,
        "clips": len(source),
        "clips_sha256": hash_file(made / CLIPS),
        "skipped": [list(pair) for pair in source.skipped],
        "notes": [list(pair) for pair in source.notes],
        **facts,
    }
    write_json(made / TOLD, about)
    for file in sorted(made.iterdir()):
        file.rename(folder / file.name)
    made.rmdir()
    made.parent.rmdir()
    for left in ("downloads/extracted", "downloads", ""):
        if (place / left).is_dir():
            (place / left).rmdir()


class Prepared(Source):
    """A set written by `aatjax prepare`.

    Args:
        folder: the folder of the version, or the one above it.

    Raises:
        DataError: it is no prepared set, or a file of it is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder).expanduser().absolute()
        facts = read_facts(folder)
        place = _version_folder(folder)
        assert place is not None
        try:
            content = (place / CLIPS).read_bytes()
        except OSError as error:
            raise DataError(f"{place / CLIPS}: cannot be read: {error}; prepare anew") from error
        if hash_bytes(content) != facts["clips_sha256"]:
            raise DataError(f"{place / CLIPS}: is damaged (its checksum is another): prepare anew")
        rows = [json.loads(line) for line in content.decode().splitlines()]
        super().__init__(
            (_clip(row) for row in rows),
            facts["classes"],
            name=facts["name"],
            multi_label=facts["multi_label"],
            reader=PreparedReader(
                place,
                {row["id"]: (row["part"], row["at"]) for row in rows},
                {row["id"]: row["sha256"] for row in rows},
            ),
            skipped=[(what, why) for what, why in facts["skipped"]],
            notes=[(what, why) for what, why in facts["notes"]],
        )


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedReader(Reader):
    """Reads waveforms from the records of a prepared set.

    Attributes:
        folder: the version folder.
        places: clip id to its split and its number there.
        keys: clip id to the SHA-256 of its samples.
    """

    folder: Path
    places: Mapping[str, tuple[str, int]]
    keys: Mapping[str, str]

    def read(self, clip: Clip) -> Int16[np.ndarray, " s"]:
        part, at = self.places[clip.id]
        try:
            record = self._records(part)[at]
        except Exception as error:  # the reader of ArrayRecord has no error of its own
            raise DataError(
                f"{self.folder}: record {at} of split {part!r} ({clip.id}) cannot be read: "
                f"{' '.join(str(error).split())[:200]}; prepare the set anew"
            ) from error
        if record["id"].decode() != clip.id:
            raise DataError(
                f"{self.folder}: record {at} of split {part!r} is {record['id'].decode()!r}, not "
                f"{clip.id!r}: files of two sets are mixed; prepare the set anew"
            )
        return record["audio"]

    def key(self, clip: Clip) -> str | None:
        return self.keys.get(clip.id)

    def _records(self, part: str) -> Any:
        return _opened(self.folder)[part]


@functools.lru_cache(maxsize=16)
def _opened(folder: Path) -> Mapping[str, Any]:
    import tensorflow_datasets

    tfds: Any = tensorflow_datasets  # its signatures are lost in decorators
    builder = tfds.builder_from_directory(str(folder))
    return {part: builder.as_data_source(part) for part in builder.info.splits}


def _version_folder(folder: Path) -> Path | None:
    if (folder / TOLD).is_file():
        return folder
    try:
        versions = [child for child in folder.iterdir() if (child / TOLD).is_file()]
    except OSError:
        return None
    return max(versions, key=lambda path: path.name, default=None)


def samples_hash(waveform: Int16[np.ndarray, " s"]) -> str:
    """SHA-256 of the samples as little-endian int16."""
    return hash_bytes(np.ascontiguousarray(waveform, "<i2").tobytes())


def _row(clip: Clip, part: str, at: int, waveform: np.ndarray) -> dict[str, Any]:
    fields = {
        "id": clip.id,
        "label": list(clip.label),
        "fold": clip.fold,
        "split": clip.split,
        "group": clip.group,
        "part": part,
        "at": at,
        "samples": len(waveform),
        "sha256": samples_hash(waveform),
    }
    return fields if clip.observed is None else {**fields, "observed": list(clip.observed)}


def _clip(row: dict[str, Any]) -> Clip:
    observed = row.get("observed")
    return Clip(
        row["id"],
        tuple(row["label"]),
        None,
        fold=row["fold"],
        split=row["split"],
        group=row["group"],
        observed=None if observed is None else tuple(observed),
    )


def _record(clip: Clip, waveform: np.ndarray, multi_label: bool) -> dict[str, Any]:
    record: dict[str, Any] = {"audio": waveform, "id": clip.id, "group": clip.group or ""}
    if not multi_label:
        return {**record, "label": clip.label[0]}
    observed = clip.label if clip.observed is None else clip.observed
    return {**record, "labels": list(clip.label), "observed": list(observed)}


def _single_line(name: str) -> str:
    if "\n" in name:
        raise UsageError(f"class {name!r} has a line break in its name: rename it")
    return name
