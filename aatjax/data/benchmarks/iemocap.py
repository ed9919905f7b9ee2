"""IEMOCAP: four emotions in acted dialogues (Busso et al., LREC 2008)."""

from __future__ import annotations

from pathlib import Path

from aatjax.data.benchmarks.base import PETL, Benchmark, Division, Protocol, present
from aatjax.data.source import Clip, Source
from aatjax.errors import DataError

CLASSES = ("neutral", "happy", "sad", "angry")
LABELS = {"neu": 0, "hap": 1, "exc": 1, "sad": 2, "ang": 3}
SESSIONS = ("1", "2", "3", "4", "5")
SPEAKERS = tuple(f"{session}{sex}" for session in SESSIONS for sex in "FM")


def read(root: Path) -> Source:
    """Utterances of the evaluation files; a fold is one speaker: session and sex, as `5F`.

    `happy` holds the labels happy and excited; all others than the four are left out.

    Raises:
        DataError: a line that is no evaluation, or the files of a session are not there.
    """
    clips: list[Clip] = []
    for session in SESSIONS:
        folder = root / f"Session{session}"
        tables = sorted(
            path
            for path in (folder / "dialog/EmoEvaluation").glob("*.txt")
            if not path.name.startswith(".")
        )
        for table in tables:
            text = table.read_text(encoding="utf-8", errors="replace")
            for number, line in enumerate(text.splitlines(), 1):
                if line.startswith("["):
                    clips += _clip(folder, session, table, number, line)
    if not clips:
        raise DataError(
            f"{root}: no evaluation of the four emotions in Session1 to Session5/dialog/"
            "EmoEvaluation/*.txt; give the whole release, IEMOCAP_full_release"
        )
    here, skipped = present(root, clips)
    return Source(here, CLASSES, name="IEMOCAP", skipped=skipped)


def _clip(folder: Path, session: str, table: Path, number: int, line: str) -> list[Clip]:
    fields = line.split("\t")
    if len(fields) < 3:
        raise DataError(
            f"{table}: line {number}: {len(fields)} fields between tabs, expected time, name and "
            "emotion"
        )
    name, emotion = fields[1].strip(), fields[2].strip()
    sex = name.rpartition("_")[2][:1]
    if sex not in ("F", "M"):
        raise DataError(f"{table}: line {number}: {name!r} names no speaker, F or M, at its end")
    if emotion not in LABELS:
        return []
    path = folder / "sentences/wav" / name.rpartition("_")[0] / f"{name}.wav"
    speaker = f"{session}{sex}"
    return [
        Clip(
            f"Session{session}/{name}.wav",
            (LABELS[emotion],),
            str(path),
            fold=speaker,
            group=speaker,
        )
    ]


def _runs() -> tuple[Division, ...]:
    """Four sessions train; of the fifth one speaker chooses and the other is tested."""
    runs = []
    for session in ("5", "1", "2", "3", "4"):
        train = tuple(s for s in SPEAKERS if s[0] != session)
        for valid, test in (("F", "M"), ("M", "F")):
            runs.append(Division(session + test, train, (session + valid,), (session + test,)))
    return tuple(runs)


IEMOCAP = Benchmark(
    name="iemocap",
    title="IEMOCAP",
    paper="Busso et al., IEMOCAP: Interactive Emotional Dyadic Motion Capture Database, "
    "Language Resources and Evaluation 42, 2008",
    licence="by agreement with the University of Southern California",
    marks=("Session1/dialog/EmoEvaluation", "Session1/sentences/wav"),
    reader=read,
    classes=CLASSES,
    clips=1708 + 1636 + 1084 + 1103,
    parts={},
    metric="accuracy",
    statistics=None,
    protocols=(
        Protocol(
            "honest",
            "ten runs: four sessions train, one speaker of the fifth chooses the "
            "epoch, the other is tested",
            _runs(),
            selection="best",
        ),
        Protocol("petl", PETL, _runs(), few_shot="first"),
    ),
    home="sail.usc.edu/iemocap",
)
