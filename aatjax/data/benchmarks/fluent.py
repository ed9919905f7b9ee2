"""Fluent Speech Commands: 31 intents of spoken commands (Lugosch et al., Interspeech 2019)."""

from __future__ import annotations

import csv
from pathlib import Path

from aatjax.data.benchmarks.base import PETL, Benchmark, Protocol, official_lists, present
from aatjax.data.source import Clip, Source
from aatjax.errors import DataError

# (action, object, location), in the order of arXiv 2312.03694's code
INTENTS = (
    ("change language", "none", "none"),
    ("activate", "music", "none"),
    ("activate", "lights", "none"),
    ("deactivate", "lights", "none"),
    ("increase", "volume", "none"),
    ("decrease", "volume", "none"),
    ("increase", "heat", "none"),
    ("decrease", "heat", "none"),
    ("deactivate", "music", "none"),
    ("activate", "lamp", "none"),
    ("deactivate", "lamp", "none"),
    ("activate", "lights", "kitchen"),
    ("activate", "lights", "bedroom"),
    ("activate", "lights", "washroom"),
    ("deactivate", "lights", "kitchen"),
    ("deactivate", "lights", "bedroom"),
    ("deactivate", "lights", "washroom"),
    ("increase", "heat", "kitchen"),
    ("increase", "heat", "bedroom"),
    ("increase", "heat", "washroom"),
    ("decrease", "heat", "kitchen"),
    ("decrease", "heat", "bedroom"),
    ("decrease", "heat", "washroom"),
    ("bring", "newspaper", "none"),
    ("bring", "juice", "none"),
    ("bring", "socks", "none"),
    ("change language", "Chinese", "none"),
    ("change language", "Korean", "none"),
    ("change language", "English", "none"),
    ("change language", "German", "none"),
    ("bring", "shoes", "none"),
)
CLASSES = tuple(" ".join(part for part in intent if part != "none") for intent in INTENTS)
SPLITS = {"train": "train", "valid": "valid", "test": "test"}
FIELDS = 7  # index, path, speakerId, transcription, action, object, location


def read(root: Path) -> Source:
    """Clips of the three tables; groups are speakers.

    A transcription may hold commas that no quotes guard: the path is taken from the second field
    and the intent from the last three.

    Raises:
        DataError: a row with too few fields, or with an intent that the set does not have.
    """
    position = {intent: c for c, intent in enumerate(INTENTS)}
    clips = []
    for split in SPLITS:
        table = root / "data" / f"{split}_data.csv"
        try:
            with table.open(encoding="utf-8-sig", newline="") as file:
                rows = list(csv.reader(file))[1:]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{table}: cannot be read: {error}; unpack anew") from error
        for number, row in enumerate(rows, 2):
            if not row:
                continue
            if len(row) < FIELDS:
                raise DataError(f"{table}: row {number}: {len(row)} fields, {FIELDS} are expected")
            intent = (row[-3].strip(), row[-2].strip(), row[-1].strip())
            if intent not in position:
                raise DataError(f"{table}: row {number}: unknown intent {'|'.join(intent)!r}")
            path = root / row[1].strip()
            clips.append(
                Clip(row[1].strip(), (position[intent],), str(path), split=split, group=row[2])
            )
    here, skipped = present(root, clips)
    return Source(here, CLASSES, name="Fluent Speech Commands", skipped=skipped)


FLUENT = Benchmark(
    name="fluent_speech_commands",
    title="Fluent Speech Commands",
    paper="Lugosch et al., Speech Model Pre-training for End-to-End Spoken Language "
    "Understanding, Interspeech 2019",
    licence="academic research only; ask Fluent.ai",
    marks=("data/train_data.csv", "data/valid_data.csv", "data/test_data.csv", "wavs"),
    reader=read,
    classes=CLASSES,
    clips=30_043,
    parts={"train": 23_132, "valid": 3_118, "test": 3_793},
    metric="accuracy",
    statistics=None,
    protocols=(
        Protocol(
            "honest",
            "the official tables; the best epoch on the validation table",
            official_lists(),
            selection="best",
        ),
        Protocol("petl", PETL, official_lists(), few_shot="first"),
    ),
    home="fluent.ai/fluent-speech-commands-a-dataset-for-spoken-language-understanding-research",
)
