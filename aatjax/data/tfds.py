"""Prepared sets: decoded sound and labels as a TFDS dataset in ArrayRecord, without TensorFlow.

A prepared folder is an ordinary TFDS dataset (`tfds.builder_from_directory` opens it) with one
split per fold or official part, records in the order of the clips, and two more files:
`clips.jsonl`, all of each clip but its sound, so that opening the set does not read the sound; and
`prepared.json`, which describes the set and its origin.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Int16

from aatjax.data.source import Clip, Progress, Reader, Source
from aatjax.errors import AatjaxError, DataError, UsageError
from aatjax.io.digest import hash_bytes, hash_file
from aatjax.io.json_fields import read_json_fields, shorten
from aatjax.io.json_file import parse_json, read_json_object, write_json
from aatjax.io.optional import need

T = TypeVar("T")
VERSION = "1.0.0"
CLIPS, FACTS = "clips.jsonl", "prepared.json"
FORMAT = 1
AGAIN = "prepare the set again"


def is_prepared(folder: Path) -> bool:
    """Whether a folder, or its newest version folder, is a prepared set."""
    return _find_version(folder) is not None


def read_facts(folder: Path) -> dict[str, Any]:
    """Return the content of `prepared.json` of a prepared folder.

    Raises:
        DataError: not a prepared set, or one of an unknown format.
    """
    place = _find_version(folder)
    if place is None:
        raise DataError(f"{folder}: is not a prepared set: it has no {FACTS}")
    found = read_json_object(place / FACTS, advice=AGAIN)
    form = found.get("format")
    if form != FORMAT:
        raise DataError(
            f"{place}: was prepared in format {shorten(form)}, this version reads {FORMAT}: {AGAIN}"
        )
    if not isinstance(found.setdefault("duplicates", []), list):
        raise DataError(f"{place / FACTS}: duplicates is not a list: {AGAIN}")
    return found


def write_prepared(
    source: Source,
    folder: Path,
    *,
    name: str,
    facts: Mapping[str, Any],
    progress: Progress | None = None,
) -> None:
    """Write every clip of a source into an empty folder, which is to be renamed afterwards.

    Args:
        source: clips whose waveforms can be read.
        folder: an empty folder for the files of the TFDS version.
        name: name of the TFDS dataset.
        facts: more entries of `prepared.json`; plain JSON.
        progress: called after each clip, with the stage `write`.

    Raises:
        UnavailableError: TFDS or ArrayRecord is not installed.
        UsageError: a class name with a line break.
    """
    parts: dict[str, list[int]] = {}
    for i, clip in enumerate(source.clips):
        parts.setdefault(_name_split(clip), []).append(i)
    rows: list[dict[str, Any]] = []

    def generate(part: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for at, i in enumerate(parts[part]):
            clip, waveform = source.clips[i], np.array(source.waveform(i))
            place = {"part": part, "at": at, "samples": len(waveform)}
            content = hash_bytes(np.ascontiguousarray(waveform, "<i2").tobytes())
            rows.append({**_make_row(clip), **place, "sha256": content})
            yield at, _make_record(clip, waveform, source.multi_label)
            if progress is not None:
                progress("write", len(rows), len(source))

    work = folder / ".tfds"
    made = _build(source, work, name, {part: functools.partial(generate, part) for part in parts})
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    (made / CLIPS).write_text(text, encoding="utf-8")
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
    write_json(made / FACTS, about)
    for file in sorted(made.iterdir()):
        file.rename(folder / file.name)
    shutil.rmtree(work)


def _build(source: Source, folder: Path, name: str, parts: Mapping[str, Any]) -> Path:
    """Write a TFDS dataset from one generator of records per split; return its version folder."""
    need("tensorflow_datasets", "array_record", extra="prepare")
    import tensorflow_datasets as tfds

    if broken := [c for c in source.classes if "\n" in c]:
        raise UsageError(f"class {broken[0]!r} has a line break in its name: rename it")
    classes = tfds.features.ClassLabel(names=list(source.classes))
    labels = {"label": classes}
    if source.multi_label:
        several = tfds.features.Sequence(classes)
        labels = {"labels": several, "observed": several}
    features = {
        "audio": tfds.features.Tensor(shape=(None,), dtype=np.int16),
        "id": tfds.features.Text(),
        "group": tfds.features.Text(),
        **labels,
    }

    class Sounds(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Labelled sounds, decoded: mono int16 at 16 kHz."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self,
                description=f"{source.name}: mono int16 waveforms at 16 kHz",
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            del dl_manager
            return {part: self._generate_examples(part) for part in parts}

        def _generate_examples(self, part: str) -> Iterator[tuple[int, dict[str, Any]]]:
            return parts[part]()

    Sounds.name = name
    tfds.disable_progress_bar()  # there is one already
    with contextlib.redirect_stdout(io.StringIO()):
        builder = Sounds(data_dir=str(folder), file_format="array_record")
        builder.download_and_prepare()
    return Path(str(builder.data_dir))


class Prepared(Source):
    """A set written by `aatjax prepare`.

    Args:
        folder: the folder of the version, or the one above it.

    Raises:
        DataError: not a prepared set, or a file of it is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder).expanduser().absolute()
        facts = read_facts(folder)
        place = _find_version(folder)
        assert place is not None
        try:
            content = (place / CLIPS).read_bytes()
        except OSError as error:
            raise DataError(f"{place / CLIPS}: cannot be read: {error}; {AGAIN}") from error
        known = _read_fields(place / FACTS, facts, PreparedFacts)
        if hash_bytes(content) != known.clips_sha256:
            raise DataError(f"{place / CLIPS}: is damaged (its checksum differs): {AGAIN}")
        rows = list(_read_rows(place / CLIPS, content))
        super().__init__(
            (
                Clip(r.id, r.label, None, r.fold, r.split, r.group, observed=r.observed)
                for r in rows
            ),
            known.classes,
            name=known.name,
            multi_label=known.multi_label,
            reader=PreparedReader(
                place,
                {row.id: (row.part, row.at) for row in rows},
                {row.id: row.sha256 for row in rows},
            ),
            skipped=known.skipped,
            notes=known.notes,
        )


@dataclasses.dataclass(frozen=True)
class PreparedFacts:
    """What `prepared.json` states of a set; `aatjax.data.prepare` adds more."""

    name: str
    classes: tuple[str, ...]
    multi_label: bool
    clips_sha256: str
    skipped: tuple[tuple[str, str], ...]
    notes: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class PreparedRow:
    """A clip of a prepared set: what a `Clip` has, and where its record is."""

    id: str
    label: tuple[int, ...]
    fold: str | None
    split: str | None
    group: str | None
    part: str
    at: int
    sha256: str
    observed: tuple[int, ...] | None = None


def _read_fields(path: Path, fields: Any, cls: type[T]) -> T:
    try:
        return read_json_fields("entry", fields, cls, ignore_others=True)
    except UsageError as error:
        raise DataError(f"{path}: {error}: {AGAIN}") from error


def _read_rows(path: Path, content: bytes) -> Iterator[PreparedRow]:
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            fields = parse_json(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: line {number}: not JSON: {error}: {AGAIN}") from error
        yield _read_fields(path, fields, PreparedRow)


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
        where = f"{self.folder}: record {at} of split {part!r}"
        try:
            record = _open_records(self.folder)[part][at]
        except AatjaxError:
            raise
        except Exception as error:  # the reader of ArrayRecord has no error of its own
            why = " ".join(str(error).split())[:200]
            raise DataError(f"{where} ({clip.id}) cannot be read: {why}; {AGAIN}") from error
        found = record["id"].decode()
        if found != clip.id:
            raise DataError(
                f"{where} is {found!r}, not {clip.id!r}: files of two sets are mixed; {AGAIN}"
            )
        return record["audio"]

    def key(self, clip: Clip) -> str | None:
        return self.keys.get(clip.id)


@functools.lru_cache(maxsize=16)
def _open_records(folder: Path) -> Mapping[str, Any]:
    need("tensorflow_datasets", "array_record", extra="prepare")
    import tensorflow_datasets

    tfds: Any = tensorflow_datasets  # its signatures are lost in decorators
    builder = tfds.builder_from_directory(str(folder))
    return {part: builder.as_data_source(part) for part in builder.info.splits}


def _find_version(folder: Path) -> Path | None:
    if (folder / FACTS).is_file():
        return folder
    try:
        versions = [child for child in folder.iterdir() if (child / FACTS).is_file()]
    except OSError:
        return None
    return max(versions, key=lambda path: path.name, default=None)


def _name_split(clip: Clip) -> str:
    """The TFDS split of a clip: `fold3`, `train`, or `all` where there is no division."""
    return f"fold{clip.fold}" if clip.fold is not None else clip.split or "all"


def _make_row(clip: Clip) -> dict[str, Any]:
    row = {key: getattr(clip, key) for key in ("id", "label", "fold", "split", "group")}
    return row if clip.observed is None else {**row, "observed": clip.observed}


def _make_record(clip: Clip, waveform: np.ndarray, multi_label: bool) -> dict[str, Any]:
    record: dict[str, Any] = {"audio": waveform, "id": clip.id, "group": clip.group or ""}
    if not multi_label:
        return {**record, "label": clip.label[0]}
    observed = clip.label if clip.observed is None else clip.observed
    return {**record, "labels": list(clip.label), "observed": list(observed)}
