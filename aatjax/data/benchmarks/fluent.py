"""Fluent Speech Commands: 31 intents of spoken commands (Lugosch et al., Interspeech 2019)."""

from collections.abc import Iterator
from pathlib import Path

from aatjax.data.benchmarks.base import Benchmark, make_list_protocols
from aatjax.data.source import Clip
from aatjax.data.tables import read_table

# "action|object|location", in the order of arXiv 2312.03694's code
INTENTS = (
    *("change language|none|none", "activate|music|none", "activate|lights|none"),
    *("deactivate|lights|none", "increase|volume|none", "decrease|volume|none"),
    *("increase|heat|none", "decrease|heat|none", "deactivate|music|none", "activate|lamp|none"),
    *("deactivate|lamp|none", "activate|lights|kitchen", "activate|lights|bedroom"),
    *("activate|lights|washroom", "deactivate|lights|kitchen", "deactivate|lights|bedroom"),
    *("deactivate|lights|washroom", "increase|heat|kitchen", "increase|heat|bedroom"),
    *("increase|heat|washroom", "decrease|heat|kitchen", "decrease|heat|bedroom"),
    *("decrease|heat|washroom", "bring|newspaper|none", "bring|juice|none", "bring|socks|none"),
    *("change language|Chinese|none", "change language|Korean|none"),
    *("change language|English|none", "change language|German|none", "bring|shoes|none"),
)
CLASSES = tuple(" ".join(w for w in intent.split("|") if w != "none") for intent in INTENTS)
COLUMNS = ("path", "speakerId", "action", "object", "location")


def _list_clips(root: Path) -> Iterator[Clip]:
    """Yield the clips of the three tables; groups are speakers.

    Raises:
        DataError: a row with an intent that the set does not have.
    """
    position = {intent: c for c, intent in enumerate(INTENTS)}
    for split in ("train", "valid", "test"):
        table = root / "data" / f"{split}_data.csv"
        for row in read_table(table, COLUMNS, loose="transcription"):
            path, speaker, *words = (row[c] for c in COLUMNS)
            intent = "|".join(words)
            if intent not in position:
                raise row.error(f"unknown intent {intent!r}")
            yield Clip(path, (position[intent],), str(root / path), split=split, group=speaker)


FLUENT = Benchmark(
    name="fluent_speech_commands",
    title="Fluent Speech Commands",
    paper="Lugosch et al., Speech Model Pre-training for End-to-End Spoken Language "
    "Understanding, Interspeech 2019",
    licence="academic research only; ask Fluent.ai",
    marks=("data/train_data.csv", "data/valid_data.csv", "data/test_data.csv", "wavs"),
    signs=("wavs/speakers",),
    list_clips=_list_clips,
    classes=CLASSES,
    clips=30_043,
    parts={"train": 23_132, "valid": 3_118, "test": 3_793},
    protocols=make_list_protocols("petl"),
    home="fluent.ai/fluent-speech-commands-a-dataset-for-spoken-language-understanding-research",
)
