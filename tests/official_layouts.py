"""The benchmarks' official layouts in small, with sounds that are made here.

Each function fills a folder as the archive of that benchmark unpacks, and returns the folder that
the archive holds at its top. Names, columns and oddities are those of facts known of the sets.
"""

import csv
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile

from aatjax.data.benchmarks import fluent, gtzan, openmic, speech_commands, urbansound8k
from aatjax.data.benchmarks.esc50 import CLASSES as ESC

SECONDS = 0.5


def sound(path: Path, number: int, *, rate: int = 16000, channels: int = 1, seconds=SECONDS):
    """A tone with noise, another for each number; the format goes by the name."""
    rng = np.random.default_rng(number)
    t = np.arange(int(rate * seconds)) / rate
    pitch = 150.0 * 2 ** (5 * rng.random())
    swell = np.interp(t, np.linspace(0, seconds, 9), rng.random(9))
    wave = 0.4 * swell * np.sin(2 * np.pi * pitch * t) + 0.05 * rng.standard_normal(len(t))
    wave = np.repeat(wave[:, None], channels, axis=1) if channels > 1 else wave
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, rate)


def table(path: Path, rows: list[list[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def esc50(root: Path, *, targets=range(0, 50, 10)) -> Path:
    """Two clips of one recording for each class and fold; 44.1 kHz."""
    top = root / "ESC-50-master"
    rows: list[list[object]] = [
        ["filename", "fold", "target", "category", "esc10", "src_file", "take"]
    ]
    for fold in range(1, 6):
        for target in targets:
            for take in "AB":
                source = 10_000 * fold + target
                name = f"{fold}-{source}-{take}-{target}.wav"
                sound(top / "audio" / name, len(rows), rate=44100)
                small = target in (0, 10, 20, 40)
                rows.append([name, fold, target, ESC[target], small, source, take])
    table(top / "meta/esc50.csv", rows)
    (top / "LICENSE").write_text("CC BY-NC")
    (top / ".gitignore").write_text("*.pyc")
    return top


def urbansound8k_(root: Path) -> Path:
    """Two classes a fold, hidden files, one stereo file and one at 96 kHz."""
    top = root / "UrbanSound8K"
    head = ["slice_file_name", "fsID", "start", "end", "salience", "fold", "classID", "class"]
    rows: list[list[object]] = [head]
    for fold in range(1, 11):
        for c in (0, 3, 9):
            fs_id = 1000 * fold + c
            name = f"{fs_id}-{c}-0-{len(rows)}.wav"
            rate = 96000 if len(rows) == 1 else 44100
            channels = 2 if len(rows) == 2 else 1
            path = top / f"audio/fold{fold}" / name
            sound(path, len(rows), rate=rate, channels=channels)
            rows.append([name, fs_id, 0.0, 0.5, 1, fold, c, urbansound8k.CLASSES[c]])
        (top / f"audio/fold{fold}/.DS_Store").write_bytes(b"\0\0\0\1Bud1")
        (top / f"audio/fold{fold}/._hidden.wav").write_bytes(b"\0\5\26\7")
    table(top / "metadata/UrbanSound8K.csv", rows)
    (top / "UrbanSound8K_README.txt").write_text("Salamon et al.")
    return top


def speech_commands_(root: Path, *, v2: bool) -> Path:
    """Three speakers a word, one in each part; background noise; no folder at the top."""
    words = [*speech_commands.WORDS[:4], *(speech_commands.NEW_WORDS[:1] if v2 else [])]
    lists = {"validation_list.txt": [], "testing_list.txt": []}
    for i, word in enumerate(words):
        for j, speaker in enumerate(("0a7c2a8d", "1b4c9b89", "00176480", "004ae714")):
            name = f"{word}/{speaker}_nohash_0.wav"
            sound(root / name, 10 * i + j, seconds=0.4)
            if j >= 2:
                lists[("validation_list.txt", "testing_list.txt")[j - 2]].append(name)
    for name, clips in lists.items():
        (root / name).write_text("\n".join(clips) + "\n")
    sound(root / "_background_noise_/white_noise.wav", 99, seconds=2)
    (root / "README.md").write_text("Speech Commands")
    return root


def openmic_(root: Path) -> Path:
    """Twelve tracks, each asked about two or three instruments; one clip of negatives only."""
    top = root / "openmic-2018"
    rows: list[list[object]] = [["sample_key", "instrument", "relevance", "num_responses"]]
    keys = [f"{i:06d}_{3840 * (i + 1)}" for i in range(12)]
    for i, key in enumerate(keys):
        sound(top / "audio" / key[:3] / f"{key}.ogg", i, rate=44100)
        for j in range(2 + i % 2):
            c = (i + 7 * j) % 20
            relevance = 0.17105 if j or i == 11 else 0.99995
            rows.append([key, openmic.CLASSES[c], relevance, 3])
    rows.append([keys[0], "voice", 0.5, 3])
    table(top / openmic.LABELS, rows)
    (top / "class-map.json").write_text(json.dumps({n: i for i, n in enumerate(openmic.CLASSES)}))
    for name, part in (("train", keys[:8]), ("test", keys[8:])):
        (top / "partitions").mkdir(exist_ok=True)
        (top / f"partitions/split01_{name}.csv").write_text("\n".join(part) + "\n")
    return top


def gtzan_(root: Path) -> Path:
    """Three genres, the parts' first excerpts, and jazz.00054, which cannot be read."""
    top = root / "Data"
    for g, genre in enumerate(gtzan.CLASSES):
        (top / "genres_original" / genre).mkdir(parents=True)
        for s, part in enumerate(("train", "valid", "test")):
            for number in gtzan.parse_ranges(gtzan.LISTS[part][genre])[
                : 2 if part == "train" else 1
            ]:
                name = f"{genre}/{genre}.{number:05d}.wav"
                sound(top / "genres_original" / name, 100 * g + 10 * s + number, rate=22050)
    (top / "genres_original/jazz/jazz.00054.wav").write_bytes(b"\0" * 4096)
    (top / "features_30_sec.csv").write_text("filename,length\n")
    return top


def fluent_(root: Path) -> Path:
    """Transcriptions with commas that no quotes guard."""
    top = root / "fluent_speech_commands_dataset"
    number = 0
    for split, speakers in (("train", "ab"), ("valid", "c"), ("test", "d")):
        lines = [",path,speakerId,transcription,action,object,location"]
        for speaker in speakers:
            for c in (0, 1, 11, 23):
                path = f"wavs/speakers/{speaker}/{number:08x}.wav"
                sound(top / path, number)
                said = "Turn on, please, the lights" if c == 11 else "Bring it"
                lines.append(
                    f"{number},{path},{speaker},{said},{fluent.INTENTS[c].replace('|', ',')}"
                )
                number += 1
        (top / "data").mkdir(exist_ok=True)
        (top / f"data/{split}_data.csv").write_text("\n".join(lines) + "\n")
    return top


def iemocap_(root: Path) -> Path:
    """Two speakers a session; evaluation files with other emotions and other lines in them."""
    top = root / "IEMOCAP_full_release"
    number = 0
    for session in range(1, 6):
        dialog = f"Ses0{session}F_impro01"
        folder = top / f"Session{session}"
        lines = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]", ""]
        for sex in "FM":
            for emotion in ("neu", "hap", "exc", "sad", "ang", "fru", "xxx"):
                name = f"{dialog}_{sex}{number:03d}"
                lines.append(f"[6.2901 - 8.2357]\t{name}\t{emotion}\t[2.5000, 2.5000, 2.5000]")
                lines.append("C-E2:\tNeutral;\t()")
                sound(folder / "sentences/wav" / dialog / f"{name}.wav", number)
                number += 1
        (folder / "dialog/EmoEvaluation").mkdir(parents=True)
        (folder / f"dialog/EmoEvaluation/{dialog}.txt").write_text("\n".join(lines) + "\n")
        (folder / f"dialog/EmoEvaluation/._{dialog}.txt").write_bytes(b"\0\5\26\7[")
    return top


MAKERS: dict[str, Callable[[Path], Path]] = {
    "esc50": esc50,
    "esc10": lambda root: esc50(root, targets=(0, 10, 20, 40)),
    "urbansound8k": urbansound8k_,
    "speech_commands_v1": lambda root: speech_commands_(root, v2=False),
    "speech_commands_v2": lambda root: speech_commands_(root, v2=True),
    "openmic2018": openmic_,
    "gtzan": gtzan_,
    "fluent_speech_commands": fluent_,
    "iemocap": iemocap_,
}
PACKED = {"esc50": "zip", "esc10": "zip", "gtzan": "zip"}  # the others come as tar.gz


def make_archive(name: str, folder: Path) -> Path:
    """The archive of a benchmark, packed as its owner packs it."""
    content = folder / "content"
    content.mkdir(parents=True)
    MAKERS[name](content)
    files = sorted(path for path in content.rglob("*") if path.is_file())
    if PACKED.get(name) == "zip":
        archive = folder / f"{name}.zip"
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as out:
            for path in files:
                out.write(path, path.relative_to(content))
    else:
        archive = folder / f"{name}.tar.gz"
        with tarfile.open(archive, "w:gz") as out:
            for path in files:
                # Speech Commands' members begin with ./
                lead = "./" if name.startswith("speech") else ""
                out.add(path, lead + path.relative_to(content).as_posix())
    shutil.rmtree(content)
    return archive
