"""Precision and recall of `aatjax doctor` on planted faults."""

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
import tyro

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
class ManifestRow:
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
        truth: the expected clip ids, or rows, by kind of finding.
        harmless: ids of unusual clips that must not be errors.
    """

    manifest: Path
    truth: dict[str, set[Key]]
    harmless: set[str]


def make_rows(folder: Path, clips: int = 20, *, seed: int = 0) -> list[ManifestRow]:
    """Write a clean set of synthetic sounds: ten classes, four folds, a recording per clip."""
    rows: list[ManifestRow] = []
    for label in TARGET_SOUNDS:
        for k in range(clips):
            name = f"{label}-{k:02d}.wav"
            soundfile.write(folder / name, synthesize(label, 1000 * seed + k), 16000)
            rows.append(ManifestRow(name, label, str(k % FOLDS + 1), f"{label}-{k}"))
    return rows


def copy_rows(folder: Path, origin: Path) -> list[ManifestRow]:
    """Copy a set in ESC-50's layout."""
    source = open_source(origin, "esc")
    rows: list[ManifestRow] = []
    for clip in source.clips:
        shutil.copy(str(clip.path), folder / clip.id)
        label = source.classes[clip.label[0]]
        rows.append(ManifestRow(clip.id, label, str(clip.fold), str(clip.group)))
    return rows


def write_manifest(folder: Path, rows: list[ManifestRow], extra: list[list[str]]) -> Path:
    """Write the CSV file of the rows, with invalid rows at its end."""
    path = folder / "clips.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "fold", "source"])
        writer.writerows(dataclasses.astuple(row) for row in rows)
        writer.writerows(extra)
    return path


Change = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Fault:
    """A change of one clip, written under another name.

    Attributes:
        kinds: expected findings, separated by spaces; none for a harmless clip.
        name: file name.
        change: change of the samples.
        rate: new sampling rate.
        format, subtype: of the file, as in soundfile.
        cut: change of the file's content.
    """

    kinds: str
    name: str
    change: Change = lambda x: x
    rate: int | None = None
    format: str = "WAV"
    subtype: str = "PCM_16"
    cut: Callable[[bytes], bytes] | None = None


def scale(peak: float, offset: float = 0.0) -> Change:
    """Return a change to a peak, with an offset."""
    return lambda x: peak * x / np.abs(x).max() + offset


def list_faults(noise: Callable[[int], np.ndarray]) -> list[Fault]:
    """Return the faults of single clips, in the order in which clips are taken."""

    def hiss(x: np.ndarray) -> np.ndarray:
        return 0.01 * x + 0.05 * np.diff(noise(len(x) + 2), 2)

    def clip(x: np.ndarray) -> np.ndarray:
        return np.clip(30 * x / np.abs(x).max(), -1, 1)

    broken = enumerate((b"", b"ID3\x04" + bytes(16), b"this is a text, not a sound\n"))
    # A short OGG is mostly its header.
    truncated = (("WAV", "PCM_16", 0.5), ("WAV", "FLOAT", 0.5), ("AIFF", "PCM_16", 0.5))
    truncated += (("FLAC", "PCM_16", 0.5), ("OGG", "VORBIS", 0.8))
    harmless = ("PCM_U8", "PCM_24", "PCM_32", "DOUBLE", "ULAW", "IMA_ADPCM")
    half = scale(0.5)
    return [
        *(Fault("undecodable", f"bad-{k}.mp3", cut=lambda _, c=c: c) for k, c in broken),
        Fault("undecodable", "header-only.wav", cut=lambda content: content[:44]),
        Fault("undecodable", "no samples.wav", lambda x: x[:0]),
        *(
            Fault(
                "truncated",
                f"cut-{subtype.lower()}.{format.lower()}",
                format=format,
                subtype=subtype,
                cut=lambda content, share=share: content[: int(len(content) * share)],
            )
            for format, subtype, share in truncated
        ),
        *(
            Fault("too-short", f"short-{n}.wav", lambda x, n=n: x[8000 : 8000 + n], 16000)
            for n in (1, 100, 399)
        ),
        Fault("silent", "zeros.wav", np.zeros_like),
        Fault("silent", "constant.wav", lambda x: np.full_like(x, 0.25)),
        *(Fault("clipped", f"clipped-{k}.wav", clip) for k in range(3)),
        Fault("offset", "offset.wav", scale(0.5, 0.2)),
        Fault("quiet", "quiet.wav", scale(0.001), subtype="PCM_24"),
        *(
            Fault(
                "non-finite",
                f"not-{v}.wav",
                lambda x, v=v: np.where(np.arange(len(x)) == len(x) // 2, v, x),
                subtype="FLOAT",
            )
            for v in (np.nan, np.inf, -np.inf)
        ),
        *(
            Fault("unscaled", f"unscaled-{s}.wav", scale(16384), subtype=s)
            for s in ("FLOAT", "DOUBLE")
        ),
        Fault("cancels", "cancels.wav", lambda x: np.stack([x, -x], axis=1)),
        *(
            Fault("", f"channels-{n}.wav", lambda x, n=n: np.tile(x[:, None], (1, n)))
            for n in (2, 6, 8)
        ),
        *(Fault("", f"{subtype}.wav", subtype=subtype) for subtype in harmless),
        *(Fault("low-rate", f"rate-{r}.wav", half, r) for r in (4000, 8000, 11025)),
        *(Fault("", f"rate-{r}.wav", half, r) for r in (44100, 96000, 192000)),
        *(Fault("high-band", f"hiss-{k}.wav", hiss, 48000) for k in range(2)),
        *(
            Fault("extension", f"mp3-{k}.wav", format="MP3", subtype="MPEG_LAYER_III")
            for k in range(2)
        ),
        Fault("", "UPPER.WAV"),
        Fault("", "no-extension", format="FLAC"),
        *(Fault("", name) for name in ODD_NAMES),
        Fault("undecodable", "odd\nand empty.wav", cut=lambda _: b""),
    ]


class Planter:
    """Plants faults in the clips of a folder, each clip at most once."""

    def __init__(self, folder: Path, rows: list[ManifestRow], seed: int) -> None:
        self.folder, self.rows = folder, rows
        self.rng = np.random.default_rng(seed)
        self.free = self.rng.permutation(len(rows)).tolist()
        self.truth: dict[str, set[Key]] = {}
        self.harmless: set[str] = set()

    def take(self) -> ManifestRow:
        """Return a clip that was not changed."""
        return self.rows[self.free.pop()]

    def read(self, row: ManifestRow) -> tuple[np.ndarray, int]:
        """Return the samples (mono, float) and their rate."""
        samples, rate = soundfile.read(self.folder / row.path, always_2d=True)
        return samples[:, 0], rate

    def expect(self, kind: str, *ids: str) -> None:
        """Expect a finding about one clip, or a pair."""
        self.truth.setdefault(kind, set()).add(frozenset(ids))

    def alter(self, fault: Fault) -> None:
        """Write a changed clip under another name, in place of the old one."""
        row = self.take()
        samples, own = self.read(row)
        if fault.rate is not None:
            samples = soxr.resample(samples, own, fault.rate)
        (self.folder / row.path).unlink()
        row.path, path = fault.name, self.folder / fault.name
        soundfile.write(
            path,
            fault.change(samples),
            fault.rate or own,
            format=fault.format,
            subtype=fault.subtype,
        )
        if fault.cut is not None:
            path.write_bytes(fault.cut(path.read_bytes()))
        for kind in fault.kinds.split():
            self.expect(kind, fault.name)
        if not fault.kinds:
            self.harmless.add(fault.name)

    def copy(self, *, exact: bool, across: bool, k: int) -> None:
        """Add a copy of a clip, as it is or encoded again at half the level."""
        row = self.take()
        samples, rate = self.read(row)
        old = Path(row.path)
        suffix = old.suffix if exact else ".ogg" if k % 2 else ".mp3"
        name = f"copy-{k}-of-{old.stem}{suffix}"
        if exact:
            shutil.copy(self.folder / row.path, self.folder / name)
        elif k % 2:
            soundfile.write(self.folder / name, 0.5 * samples, rate, format="OGG", subtype="VORBIS")
        else:
            soundfile.write(self.folder / name, 0.5 * samples, rate, format="MP3")
        fold = str((int(row.fold) + (k % (FOLDS - 1))) % FOLDS + 1) if across else row.fold
        self.rows.append(ManifestRow(name, row.label, fold, f"copy-{k}"))
        kind = ("" if exact else "near-") + "duplicate" + ("-across" if across else "")
        self.expect(kind, row.path, name)

    def share_recording(self) -> None:
        """Put one recording into two folds."""
        first = self.take()
        others = (self.rows[i] for i in self.free)
        second = next(row for row in others if row.fold != first.fold and row.label == first.label)
        self.free.remove(self.rows.index(second))
        rows = [row for row in self.rows if row.source in (first.source, second.source)]
        source = first.source
        for row in rows:
            row.source = source
        self.expect("source-in-parts", *(row.path for row in rows))

    def mislabel(self, labels: list[str]) -> None:
        """Give a clip another label."""
        row = self.take()
        row.label = str(self.rng.choice([label for label in labels if label != row.label]))
        self.expect("wrong-label", row.path)


def plant(folder: Path, rows: list[ManifestRow], *, seed: int = 0) -> Planted:
    """Plant faults of every kind in a clean folder of at least 150 clips."""
    planter = Planter(folder, list(rows), seed)
    labels = sorted({row.label for row in rows})
    for fault in list_faults(planter.rng.standard_normal):
        planter.alter(fault)
    for k in range(COPIES):
        planter.copy(exact=True, across=True, k=k)
        planter.copy(exact=False, across=True, k=COPIES + k)
    for k in range(3):
        planter.copy(exact=True, across=False, k=2 * COPIES + k)
        planter.copy(exact=False, across=False, k=3 * COPIES + k)
    for _ in range(3):
        planter.share_recording()
    for _ in range(WRONG):
        planter.mislabel(labels)
    good, last, other = planter.take().path, len(planter.rows) + 1, "other.wav"
    shutil.copy(folder / good, folder / other)
    extra = [
        ["missing.wav", labels[0], "1", "m"],
        [good, labels[0], "1", "twice"],
        [other, "", "1", "no label"],
        [other, labels[0], "", "no fold"],
    ]
    planter.truth["row"] = {f"row {last + 1 + k}" for k in range(len(extra))}
    manifest = write_manifest(folder, planter.rows, extra)
    return Planted(manifest, planter.truth, planter.harmless)


@dataclasses.dataclass(frozen=True)
class Score:
    """Counts of one kind of finding: planted, found, and both."""

    planted: int
    found: int
    both: int

    @property
    def precision(self) -> float:
        return self.both / self.found if self.found else float("nan")

    @property
    def recall(self) -> float:
        return self.both / self.planted if self.planted else float("nan")


def find_keys(diagnosis: Diagnosis, kind: str) -> set[Key]:
    """Return the findings of a kind, as in `Planted.truth`."""
    return {frozenset(i.clips) if i.clips else i.subject for i in diagnosis.cases(kind)}


def score_findings(planted: Planted, diagnosis: Diagnosis) -> dict[str, Score]:
    """Return the score of each kind that was planted."""
    result: dict[str, Score] = {}
    for kind in KINDS:
        if kind in planted.truth:
            truth, found = planted.truth[kind], find_keys(diagnosis, kind)
            result[kind] = Score(len(truth), len(found), len(truth & found))
    return result


def doctor_scores(
    origin: tyro.conf.Positional[Path | None] = None,
    seed: int = 0,
    frames: int | None = None,
    base: str = "embedded",
) -> None:
    """Measure precision and recall of `aatjax doctor` on planted faults.

    Copies a set, or writes synthetic sounds, into a temporary folder, plants faults of each kind in
    it, and prints a table. Findings about the set before planting count as false, and are shown in
    a column of their own.

    Args:
        origin: a folder in ESC-50's layout; omit it for synthetic sounds.
        seed: seed of sounds and faults.
        frames: input length.
        base: backbone of the label checks.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        rows = copy_rows(folder, origin) if origin else make_rows(folder, seed=seed)
        clean = diagnose(write_manifest(folder, rows, []), frames=frames, base=base)
        planted = plant(folder, rows, seed=seed)
        began = time.perf_counter()
        found = diagnose(planted.manifest, frames=frames, base=base)
        spent = time.perf_counter() - began
    print("| finding | severity | planted | found | precision | recall | before planting |")
    print("|---|---|---|---|---|---|---|")
    for kind, score in score_findings(planted, found).items():
        print(
            f"| `{kind}` | {KINDS[kind][0]} | {score.planted} | {score.found} "
            f"| {score.precision:.2f} | {score.recall:.2f} | {len(clean.cases(kind))} |"
        )
    others = {f.kind: len(f.items) for f in found.findings if f.kind not in planted.truth}
    print(
        f"\n{len(found.measurements)} clips in {spent:.1f} s on {os.cpu_count()} cores; "
        f"agreement {found.labels.agreement}; not planted: {others}"
    )
