"""IEMOCAP: four emotions in acted dialogues (Busso et al., LREC 2008)."""

import re
from collections.abc import Iterator
from pathlib import Path

from aatjax.data.benchmarks.base import PETL, Benchmark, Division, Protocol
from aatjax.data.source import Clip
from aatjax.errors import DataError

CLASSES = ("neutral", "happy", "sad", "angry")
LABELS = {"neu": 0, "hap": 1, "exc": 1, "sad": 2, "ang": 3}
SESSIONS = ("1", "2", "3", "4", "5")
SPEAKERS = tuple(f"{session}{sex}" for session in SESSIONS for sex in "FM")
EVALUATION = re.compile(r"\[[^\t]*\t\s*((\S+)_([FM])[^_\t]*?)\s*\t\s*([^\t]*?)\s*(\t.*)?")


def _list_clips(root: Path) -> Iterator[Clip]:
    """Yield the utterances of the evaluation files; a fold is one speaker, such as `5F`.

    `happy` holds the labels happy and excited; labels other than the four are left out.

    Raises:
        DataError: a line that is no evaluation, or no evaluation file.
    """
    tables = sorted(root.glob("Session[1-5]/dialog/EmoEvaluation/[!.]*.txt"))
    if not tables:
        raise DataError(
            f"{root}: no Session1 to Session5/dialog/EmoEvaluation/*.txt; give the whole release, "
            "IEMOCAP_full_release"
        )
    for table in tables:
        session = table.relative_to(root).parts[0]
        text = table.read_text(encoding="utf-8", errors="replace")
        for number, line in enumerate(text.splitlines(), 1):
            if not line.startswith("["):
                continue
            found = EVALUATION.fullmatch(line)
            if not found:
                raise DataError(
                    f"{table}: line {number}: expected time, name with the speaker F or M in its "
                    "last part, and emotion, between tabs"
                )
            name, dialogue, sex, emotion = found.groups()[:4]
            if emotion in LABELS:
                path = root / session / "sentences/wav" / dialogue / f"{name}.wav"
                id, label, speaker = f"{session}/{name}.wav", LABELS[emotion], session[-1] + sex
                yield Clip(id, (label,), str(path), fold=speaker, group=speaker)


def _speaker_runs() -> tuple[Division, ...]:
    """Four sessions train; of the fifth one speaker chooses and the other is tested."""
    return tuple(
        Division(
            session + test,
            tuple(speaker for speaker in SPEAKERS if speaker[0] != session),
            (session + valid,),
            (session + test,),
        )
        for session in ("5", "1", "2", "3", "4")
        for valid, test in ("FM", "MF")
    )


IEMOCAP = Benchmark(
    name="iemocap",
    title="IEMOCAP",
    paper="Busso et al., IEMOCAP: Interactive Emotional Dyadic Motion Capture Database, "
    "Language Resources and Evaluation 42, 2008",
    licence="by agreement with the University of Southern California",
    marks=("Session1/dialog/EmoEvaluation", "Session1/sentences/wav"),
    signs=("Session1/dialog/EmoEvaluation",),
    list_clips=_list_clips,
    classes=CLASSES,
    clips=1708 + 1636 + 1084 + 1103,
    parts={},
    protocols=(
        Protocol(
            "honest",
            "ten runs: four sessions train, one speaker of the fifth chooses the epoch, the other "
            "is tested",
            _speaker_runs(),
            selection="best",
        ),
        Protocol("petl", PETL, _speaker_runs(), few_shot="first"),
    ),
    home="sail.usc.edu/iemocap",
)
