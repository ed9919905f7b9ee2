"""Speech Commands v0.01 and v0.02: single words of up to a second (Warden, arXiv 1804.03209)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from aatjax.data.benchmarks.base import AAT, PETL, Benchmark, Protocol, official_lists
from aatjax.data.folders import AudioFolder
from aatjax.data.source import Source
from aatjax.errors import DataError

WORDS = (
    "bed",
    "bird",
    "cat",
    "dog",
    "down",
    "eight",
    "five",
    "four",
    "go",
    "happy",
    "house",
    "left",
    "marvin",
    "nine",
    "no",
    "off",
    "on",
    "one",
    "right",
    "seven",
    "sheila",
    "six",
    "stop",
    "three",
    "tree",
    "two",
    "up",
    "wow",
    "yes",
    "zero",
)
NEW_WORDS = ("backward", "follow", "forward", "learn", "visual")


def read(root: Path, *, classes: Sequence[str], title: str) -> Source:
    """Clips of the word folders, divided by the official lists; groups are speakers.

    Raises:
        DataError: a folder is no word of this version.
    """
    found = AudioFolder(root)
    other = sorted(set(found.classes) - set(classes))
    if other:
        version = " (v0.02 has it)" if other[0] in NEW_WORDS else ""
        raise DataError(f"{root}: folder {other[0]!r} is no word of {title}{version}")
    position = [classes.index(name) for name in found.classes]
    clips = [
        dataclasses.replace(clip, label=tuple(position[c] for c in clip.label))
        for clip in found.clips
    ]
    here = {clip.id for clip in clips}
    missing = []
    for name in ("validation_list.txt", "testing_list.txt"):
        listed = (root / name).read_text(encoding="utf-8-sig").split()
        missing += [(id, f"file in {name} is missing") for id in listed if id not in here]
    return Source(clips, classes, name=title, skipped=[*found.skipped, *missing])


V2 = Benchmark(
    name="speech_commands_v2",
    title="Speech Commands v0.02",
    paper="Warden, Speech Commands: A Dataset for Limited-Vocabulary Speech Recognition, "
    "arXiv 1804.03209",
    licence="CC BY 4.0",
    marks=("testing_list.txt", "validation_list.txt", "backward"),
    reader=partial(read, classes=tuple(sorted(WORDS + NEW_WORDS)), title="Speech Commands v0.02"),
    classes=tuple(sorted(WORDS + NEW_WORDS)),
    clips=105_829,
    parts={"train": 84_843, "valid": 9_981, "test": 11_005},
    metric="accuracy",
    statistics="speech_commands_v2",
    protocols=(
        Protocol(
            "honest",
            "the official lists; the best epoch on the validation list",
            official_lists(),
            selection="best",
        ),
        Protocol("aat", AAT, official_lists(), selection="best"),
        Protocol("petl", PETL, official_lists(), few_shot="first"),
    ),
    home="download.tensorflow.org/data/speech_commands_v0.02.tar.gz",
    url="https://storage.googleapis.com/download.tensorflow.org/data/speech_commands_v0.02.tar.gz",
    checksum="sha256:af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58",
)

V1 = dataclasses.replace(
    V2,
    name="speech_commands_v1",
    title="Speech Commands v0.01",
    marks=("testing_list.txt", "validation_list.txt", "bed"),
    reader=partial(read, classes=WORDS, title="Speech Commands v0.01"),
    classes=WORDS,
    clips=64_721,
    parts={"train": 51_088, "valid": 6_798, "test": 6_835},
    statistics="speech_commands_v1",
    home="download.tensorflow.org/data/speech_commands_v0.01.tar.gz",
    url="https://storage.googleapis.com/download.tensorflow.org/data/speech_commands_v0.01.tar.gz",
    checksum="sha256:743935421bb51cccdb6bdd152e04c5c70274e935c82119ad7faeec31780d811d",
)
