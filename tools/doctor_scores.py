"""How much of what is planted `aatjax doctor` finds, and how much of what it finds was planted.

    python tools/doctor_scores.py [ESC-FOLDER] [--seed N]

Copies a set in ESC-50's layout, or sounds made from nothing, into a temporary folder, plants
faults of each kind in it, and prints precision and recall of each finding as a table. Findings that
the doctor has about the set before anything is planted are counted as false, and given apart.
"""

import argparse
import csv
import dataclasses
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
import soxr

from aatjax.data.formats import open_source
from aatjax.data.synthetic.synthesize import TARGET_SOUNDS, synthesize
from aatjax.doctor import KINDS, Diagnosis, diagnose

COPIES = 10
WRONG = 10
FOLDS = 4
ODD_NAMES = (
    "with space.wav",
    "quo\"te's.wav",
    "semi;colon.wav",
    "line\nbreak.wav",
    "caf\u00e9.wav",
    "nai\u0308ve.wav",
    "-dash.wav",
    "comma, and [bold]red.wav",
    "\u72d7.wav",
    "x" * 251 + ".wav",
)
Key = str | frozenset[str]


@dataclasses.dataclass
class Row:
    """A row of the manifest: file name below the folder, class, fold and recording."""

    path: str
    label: str
    fold: str
    source: str


@dataclasses.dataclass
class Planted:
    """A folder with faults.

    Attributes:
        manifest: the CSV file.
        truth: kind of finding to what should be found: clip ids, or rows.
        harmless: ids of clips that are odd and must be in no error.
    """

    manifest: Path
    truth: dict[str, set[Key]]
    harmless: set[str]


def made_rows(folder: Path, clips: int = 20, *, seed: int = 0) -> list[Row]:
    """Writes a clean set of made sounds: ten classes, four folds, a recording for each clip."""
    rows: list[Row] = []
    for label in TARGET_SOUNDS:
        for k in range(clips):
            name = f"{label}-{k:02d}.wav"
            soundfile.write(folder / name, synthesize(label, 1000 * seed + k), 16000)
            rows.append(Row(name, label, str(k % FOLDS + 1), f"{label}-{k}"))
    return rows


def copied_rows(folder: Path, origin: Path) -> list[Row]:
    """Copies a set in ESC-50's layout."""
    source = open_source(origin, "esc")
    rows: list[Row] = []
    for clip in source.clips:
        shutil.copy(str(clip.path), folder / clip.id)
        label = source.classes[clip.label[0]]
        rows.append(Row(clip.id, label, str(clip.fold), str(clip.group)))
    return rows


def write_manifest(folder: Path, rows: list[Row], extra: list[list[str]]) -> Path:
    """The CSV file of the rows, and of wrong ones below."""
    path = folder / "clips.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "fold", "source"])
        writer.writerows(dataclasses.astuple(row) for row in rows)
        writer.writerows(extra)
    return path


class Planter:
    """Plants faults in the clips of a folder, each clip at most once."""

    def __init__(self, folder: Path, rows: list[Row], seed: int) -> None:
        self.folder, self.rows = folder, rows
        self.rng = np.random.default_rng(seed)
        self.free = self.rng.permutation(len(rows)).tolist()
        self.labels = sorted({row.label for row in rows})
        self.truth: dict[str, set[Key]] = {}
        self.harmless: set[str] = set()

    def take(self) -> tuple[Row, np.ndarray, int]:
        """A clip that nothing was done to: its row, samples (mono, float) and rate."""
        row = self.rows[self.free.pop()]
        samples, rate = soundfile.read(self.folder / row.path, always_2d=True)
        return row, samples[:, 0], rate

    def rename(self, row: Row, name: str) -> Path:
        """Gives the clip another file name; its old file is gone."""
        (self.folder / row.path).unlink()
        row.path = name
        return self.folder / name

    def found(self, kind: str, *ids: str) -> None:
        """Something is to be found: one clip, or a pair."""
        self.truth.setdefault(kind, set()).add(frozenset(ids))

    def alter(
        self,
        kinds: str,
        name: str,
        change: Callable[[np.ndarray], np.ndarray] = lambda x: x,
        *,
        rate: int | None = None,
        format: str = "WAV",
        subtype: str = "PCM_16",
    ) -> Path:
        """Writes a changed clip under another name; `kinds` is what is to be found of it."""
        row, samples, own = self.take()
        if rate is not None:
            samples = soxr.resample(samples, own, rate)
        path = self.rename(row, name)
        soundfile.write(path, change(samples), rate or own, format=format, subtype=subtype)
        for kind in kinds.split():
            self.found(kind, name)
        if not kinds:
            self.harmless.add(name)
        return path

    def copy(self, *, exact: bool, across: bool, k: int) -> None:
        """Adds a copy of a clip, as it is or coded anew at half the level."""
        row, samples, rate = self.take()
        name = f"copy-{k}-of-{Path(row.path).stem}{Path(row.path).suffix if exact else '.ogg'}"
        if exact:
            shutil.copy(self.folder / row.path, self.folder / name)
        elif k % 2:
            soundfile.write(self.folder / name, 0.5 * samples, rate, format="OGG", subtype="VORBIS")
        else:
            name = name.replace(".ogg", ".mp3")
            soundfile.write(self.folder / name, 0.5 * samples, rate, format="MP3")
        fold = str((int(row.fold) + (k % (FOLDS - 1))) % FOLDS + 1) if across else row.fold
        self.rows.append(Row(name, row.label, fold, f"copy-{k}"))
        kind = ("" if exact else "near-") + "duplicate" + ("-across" if across else "")
        self.found(kind, row.path, name)


def plant(folder: Path, rows: list[Row], *, seed: int = 0) -> Planted:
    """Plants faults of every kind in a clean folder of at least 150 clips."""
    p = Planter(folder, list(rows), seed)
    noise = p.rng.standard_normal

    for k, content in enumerate((b"", b"ID3\x04" + bytes(16), b"this is a text, not a sound\n")):
        p.alter("undecodable", f"bad-{k}.mp3").write_bytes(content)
    header = p.alter("undecodable", "header-only.wav")
    header.write_bytes(header.read_bytes()[:44])
    p.alter("undecodable", "no samples.wav", lambda x: x[:0])

    for format, subtype in (
        ("WAV", "PCM_16"),
        ("WAV", "FLOAT"),
        ("AIFF", "PCM_16"),
        ("FLAC", "PCM_16"),
        ("OGG", "VORBIS"),
    ):
        name = f"cut-{subtype.lower()}.{format.lower()}"
        path = p.alter("truncated", name, format=format, subtype=subtype)
        content = path.read_bytes()  # a short OGG is mostly its header
        path.write_bytes(content[: int(len(content) * (0.8 if format == "OGG" else 0.5))])

    for samples in (1, 100, 399):
        p.alter(
            "too-short", f"short-{samples}.wav", lambda x, n=samples: x[8000 : 8000 + n], rate=16000
        )
    p.alter("silent", "zeros.wav", np.zeros_like)
    p.alter("silent", "constant.wav", lambda x: np.full_like(x, 0.25))
    for k in range(3):
        p.alter("clipped", f"clipped-{k}.wav", lambda x: np.clip(30 * x / np.abs(x).max(), -1, 1))
    p.alter("offset", "offset.wav", lambda x: 0.5 * x / np.abs(x).max() + 0.2)
    p.alter("quiet", "quiet.wav", lambda x: 0.001 * x / np.abs(x).max(), subtype="PCM_24")
    for value in (np.nan, np.inf, -np.inf):
        p.alter(
            "non-finite",
            f"not-{value}.wav",
            lambda x, v=value: np.where(np.arange(len(x)) == len(x) // 2, v, x),
            subtype="FLOAT",
        )
    for subtype in ("FLOAT", "DOUBLE"):
        p.alter(
            "unscaled",
            f"unscaled-{subtype}.wav",
            lambda x: 32768 * x / np.abs(x).max() / 2,
            subtype=subtype,
        )
    p.alter("cancels", "cancels.wav", lambda x: np.stack([x, -x], axis=1))
    for count in (2, 6, 8):
        p.alter("", f"channels-{count}.wav", lambda x, n=count: np.tile(x[:, None], (1, n)))
    for subtype in ("PCM_U8", "PCM_24", "PCM_32", "DOUBLE", "ULAW", "IMA_ADPCM"):
        p.alter("", f"{subtype}.wav", subtype=subtype)
    for rate in (4000, 8000, 11025):
        p.alter("low-rate", f"rate-{rate}.wav", lambda x: 0.5 * x / np.abs(x).max(), rate=rate)
    for rate in (44100, 96000, 192000):
        p.alter("", f"rate-{rate}.wav", lambda x: 0.5 * x / np.abs(x).max(), rate=rate)
    for k in range(2):

        def hiss(x: np.ndarray) -> np.ndarray:
            return 0.01 * x + 0.05 * np.diff(noise(len(x) + 2), 2)

        p.alter("high-band", f"hiss-{k}.wav", hiss, rate=48000)
    for k in range(2):
        p.alter("extension", f"mp3-{k}.wav", format="MP3", subtype="MPEG_LAYER_III")
    p.alter("", "UPPER.WAV")
    p.alter("", "no-extension", format="FLAC")
    for name in ODD_NAMES:
        p.alter("", name)
    p.alter("undecodable", "odd\nand empty.wav").write_bytes(b"")

    for k in range(COPIES):
        p.copy(exact=True, across=True, k=k)
        p.copy(exact=False, across=True, k=COPIES + k)
    for k in range(3):
        p.copy(exact=True, across=False, k=2 * COPIES + k)
        p.copy(exact=False, across=False, k=3 * COPIES + k)

    for _ in range(3):  # one recording in two folds
        first = p.rows[p.free.pop()]
        second = next(
            p.rows[i]
            for i in p.free
            if p.rows[i].fold != first.fold and p.rows[i].label == first.label
        )
        p.free.remove(p.rows.index(second))
        clips = [row.path for row in p.rows if row.source in (first.source, second.source)]
        for row in p.rows:
            if row.path in clips:
                row.source = first.source
        p.found("source-in-parts", *clips)

    for _ in range(WRONG):
        row = p.rows[p.free.pop()]
        row.label = str(p.rng.choice([label for label in p.labels if label != row.label]))
        p.found("wrong-label", row.path)

    good, last = p.rows[p.free.pop()].path, len(p.rows) + 1
    other = "other.wav"
    shutil.copy(folder / good, folder / other)
    extra = [
        ["missing.wav", p.labels[0], "1", "m"],
        [good, p.labels[0], "1", "twice"],
        [other, "", "1", "no label"],
        [other, p.labels[0], "", "no fold"],
    ]
    p.truth["row"] = {f"row {last + 1 + k}" for k in range(len(extra))}
    return Planted(write_manifest(folder, p.rows, extra), p.truth, p.harmless)


@dataclasses.dataclass(frozen=True)
class Score:
    """Of one kind of finding: planted, found, and found of the planted."""

    planted: int
    found: int
    both: int

    @property
    def precision(self) -> float:
        return self.both / self.found if self.found else float("nan")

    @property
    def recall(self) -> float:
        return self.both / self.planted if self.planted else float("nan")


def keys_of(diagnosis: Diagnosis, kind: str) -> set[Key]:
    """What was found of a kind, as in `Planted.truth`."""
    return {frozenset(i.clips) if i.clips else i.subject for i in diagnosis.cases(kind)}


def scores(planted: Planted, diagnosis: Diagnosis) -> dict[str, Score]:
    """Precision and recall of each kind that was planted."""
    result: dict[str, Score] = {}
    for kind in KINDS:
        if kind in planted.truth:
            truth, found = planted.truth[kind], keys_of(diagnosis, kind)
            result[kind] = Score(len(truth), len(found), len(truth & found))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("origin", nargs="?", type=Path, help="a folder in ESC-50's layout")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frames", type=int)
    parser.add_argument("--base", default="embedded")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        rows = (
            copied_rows(folder, options.origin)
            if options.origin
            else made_rows(folder, seed=options.seed)
        )
        clean = diagnose(write_manifest(folder, rows, []), frames=options.frames, base=options.base)
        planted = plant(folder, rows, seed=options.seed)
        began = time.perf_counter()
        found = diagnose(planted.manifest, frames=options.frames, base=options.base)
        spent = time.perf_counter() - began
    print("| finding | severity | planted | found | precision | recall | before planting |")
    print("|---|---|---|---|---|---|---|")
    for kind, score in scores(planted, found).items():
        print(
            f"| `{kind}` | {KINDS[kind][0]} | {score.planted} | {score.found} "
            f"| {score.precision:.2f} | {score.recall:.2f} | {len(clean.cases(kind))} |"
        )
    others = {f.kind: len(f.items) for f in found.findings if f.kind not in planted.truth}
    print(
        f"\n{len(found.measurements)} clips in {spent:.1f} s on {os.cpu_count()} cores; "
        f"agreement {found.labels.agreement}; not planted: {others}"
    )


if __name__ == "__main__":
    main()
