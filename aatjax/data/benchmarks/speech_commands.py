"""Speech Commands v0.01 and v0.02: single words of up to a second (Warden, arXiv 1804.03209)."""

import dataclasses
from functools import partial
from pathlib import Path

from aatjax.data.benchmarks.base import Benchmark, make_list_protocols, split_names
from aatjax.data.folders import AudioFolder, read_split_lists
from aatjax.data.source import Clip, Source
from aatjax.errors import DataError

WORDS = split_names(
    "bed bird cat dog down eight five four go happy house left marvin nine no off on one right "
    "seven sheila six stop three tree two up wow yes zero"
)
NEW_WORDS = ("backward", "follow", "forward", "learn", "visual")
ALL_WORDS = tuple(sorted(WORDS + NEW_WORDS))


def _list_clips(root: Path, *, words: tuple[str, ...], title: str) -> Source:
    """Return the clips of the word folders, divided by the official lists; groups are speakers.

    Raises:
        DataError: a folder is no word of this version.
    """
    found = AudioFolder(root)
    other = sorted(set(found.classes) - set(words))
    if other:
        version = " (v0.02 has it)" if other[0] in NEW_WORDS else ""
        raise DataError(f"{root}: folder {other[0]!r} is no word of {title}{version}")
    clips = {
        clip.id: dataclasses.replace(clip, label=(words.index(found.classes[clip.label[0]]),))
        for clip in found.clips
    }
    for id, split in (read_split_lists(root) or {}).items():
        word = id.partition("/")[0]
        if id not in clips and word in words:
            clips[id] = Clip(id, (words.index(word),), str(root / id), split=split)
    return Source(clips.values(), words, name=title, skipped=found.skipped)


V2 = Benchmark(
    name="speech_commands_v2",
    title="Speech Commands v0.02",
    paper="Warden, Speech Commands: A Dataset for Limited-Vocabulary Speech Recognition, "
    "arXiv 1804.03209",
    licence="CC BY 4.0",
    marks=("testing_list.txt", "validation_list.txt", "backward"),
    list_clips=partial(_list_clips, words=ALL_WORDS, title="Speech Commands v0.02"),
    classes=ALL_WORDS,
    clips=105_829,
    parts={"train": 84_843, "valid": 9_981, "test": 11_005},
    statistics="speech_commands_v2",
    protocols=make_list_protocols("aat", "petl"),
    home="download.tensorflow.org/data/speech_commands_v0.02.tar.gz",
    url="https://storage.googleapis.com/download.tensorflow.org/data/speech_commands_v0.02.tar.gz",
    checksum="sha256:af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58",
)

V1 = dataclasses.replace(
    V2,
    name="speech_commands_v1",
    title="Speech Commands v0.01",
    marks=("testing_list.txt", "validation_list.txt", "bed"),
    list_clips=partial(_list_clips, words=WORDS, title="Speech Commands v0.01"),
    classes=WORDS,
    clips=64_721,
    parts={"train": 51_088, "valid": 6_798, "test": 6_835},
    statistics="speech_commands_v1",
    home="download.tensorflow.org/data/speech_commands_v0.01.tar.gz",
    url="https://storage.googleapis.com/download.tensorflow.org/data/speech_commands_v0.01.tar.gz",
    checksum="sha256:743935421bb51cccdb6bdd152e04c5c70274e935c82119ad7faeec31780d811d",
)
