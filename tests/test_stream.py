"""Long files: streamed windows equal those of the whole file, in constant memory."""

import contextlib
import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from flax import nnx
from tiny_model import tiny_config

from aatjax import surgery
from aatjax.audio import streams
from aatjax.audio.decode import decode, decode_blocks
from aatjax.audio.frontend import FrontEnd
from aatjax.audio.waveform import FRAME, AudioError
from aatjax.audio.windows import Window, compute_step, count_windows, cut_windows
from aatjax.cli import main
from aatjax.convert import write_native
from aatjax.errors import UsageError
from aatjax.inference.calibration import Calibration
from aatjax.inference.classifier import Classifier
from aatjax.inference.segmentation import SegmentationRules, Track
from aatjax.inference.stream import StreamEnd, StreamResult, segment_files, stream_windows
from aatjax.models.ast import AST, ASTConfig

RATE = 16000
FRONTEND = FrontEnd(frames=98)
SIZE = FRONTEND.samples
CLASSES = ("ant", "bee", "cat")
TINY = tiny_config(depth=2)


def make_model(**changes: Any) -> AST:
    model = AST(ASTConfig(**{**vars(TINY), **changes}), rngs=nnx.Rngs(0))
    model.head.linear.kernel[...] = 100 * model.head.linear.kernel[...]
    return model


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return Classifier(make_model(), CLASSES, FRONTEND)


def sound(seconds: float, rate: int = RATE, channels: int = 1, seed: int = 0) -> np.ndarray:
    """A glide in noise: no two stretches are alike."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate))[:, None] / rate
    wave = np.sin(2 * np.pi * (300 + 90 * time) * time + np.arange(channels))
    return 0.5 * wave + 0.1 * rng.normal(size=(len(time), channels))


def write(path: Path, wave: np.ndarray, rate: int = RATE) -> Path:
    path.parent.mkdir(exist_ok=True)
    soundfile.write(path, wave, rate, subtype="PCM_16")
    return path


def gather(
    events: Iterator[StreamResult | StreamEnd],
) -> list[tuple[np.ndarray, list[Any], StreamEnd]]:
    """Per file: logits of its windows, their spans, its end; checks the order."""
    files: list[tuple[np.ndarray, list[Any], StreamEnd]] = []
    rows: list[np.ndarray] = []
    spans: list[Any] = []
    for event in events:
        assert event.file == len(files)
        if isinstance(event, StreamResult):
            assert len(event.spans) == len(event.logits) > 0
            rows.append(event.logits)
            spans += event.spans
        else:
            files.append((np.concatenate(rows) if rows else np.zeros((0, 3)), spans, event))
            rows, spans = [], []
    assert not rows
    return files


# --- blocks and windows --------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_blocks_are_the_waveform(
    rate: int, channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.flac", sound(3.3, rate, channels), rate)
    whole = decode(path).waveform
    for size in (1 << 17, 1 << 13, 1):  # at least 1024 frames a block
        monkeypatch.setattr(streams, "_BLOCK_SAMPLES", size)
        blocks = list(decode_blocks(path))
        assert all(block.size for block in blocks)
        np.testing.assert_array_equal(np.concatenate(blocks), whole)
    assert len(blocks) > 20


@pytest.mark.parametrize("samples", [1, 100, 399, 400, 401])
@pytest.mark.parametrize("rate", [16000, 44100])
def test_blocks_of_a_short_clip(samples: int, rate: int, tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", sound(1)[:samples], rate)
    found = np.concatenate(list(decode_blocks(path)))
    np.testing.assert_array_equal(found, decode(path).waveform)


def test_blocks_of_bad_files(tmp_path: Path) -> None:
    bad = {"empty.wav": b"", "text.wav": b"hello, this is no sound"}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    write(tmp_path / "none.wav", np.zeros((0, 1)))
    nan = np.full(20000, np.nan)
    soundfile.write(tmp_path / "nan.wav", nan, RATE, subtype="FLOAT")
    for name in (*bad, "none.wav", "nan.wav", "gone.wav"):
        with pytest.raises(AudioError, match=name) as streamed:
            list(decode_blocks(tmp_path / name))
        with pytest.raises(AudioError) as whole:
            decode(tmp_path / name)
        assert (str(streamed.value), streamed.value.reason) == (
            str(whole.value),
            whole.value.reason,
        )


def test_the_rest_of_a_truncated_file_comes_before_the_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", sound(10))
    path.write_bytes(path.read_bytes()[:-100000])
    left = decode(path, truncated="keep")
    blocks = []
    with pytest.raises(AudioError, match=r"a\.wav: truncated 110000/160000 frames$") as caught:
        blocks.extend(iter_into(decode_blocks(path), blocks))
    assert caught.value.reason == "truncated"
    np.testing.assert_array_equal(np.concatenate(blocks), left.waveform)


def iter_into(blocks: Iterator[np.ndarray], into: list[np.ndarray]) -> list[np.ndarray]:
    for block in blocks:
        into.append(block)
    return []


@pytest.mark.parametrize("samples", [1, SIZE - 1, SIZE, SIZE + 1, 3 * SIZE, 3 * SIZE + 7])
@pytest.mark.parametrize("hop", [None, 0.1, 0.5, 2.5])
@pytest.mark.parametrize("block", [997, 4096, 10**6])
def test_windows_do_not_depend_on_blocks(samples: int, hop: float | None, block: int) -> None:
    wave = np.random.default_rng(0).integers(-9999, 9999, samples).astype(np.int16)
    step = compute_step(FRONTEND.samples, hop)
    pieces = (wave[i : i + block] for i in range(0, samples, block))
    found = list(cut_windows(pieces, FRONTEND, step))
    # The rule: a window every step until one reaches the end, none of less than a frame but one.
    starts = [0]
    while starts[-1] + SIZE < samples and starts[-1] + step + FRAME <= samples:
        starts.append(starts[-1] + step)
    assert [w.span for w in found] == [(s, min(s + SIZE, samples)) for s in starts]
    assert count_windows(samples, SIZE, step) == len(starts)
    for window, start in zip(found, starts, strict=True):
        audio, length = FRONTEND.fit(wave, start=start)
        assert window.length == length
        np.testing.assert_array_equal(window.audio, audio)


# --- streamed against whole ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "channels", "hop", "block"),
    [
        (8000, 1, None, 1 << 17),
        (8000, 2, 0.3, 1 << 12),
        (16000, 1, 0.25, 1 << 14),
        (44100, 2, 0.5, 1 << 17),
        (44100, 1, None, 1 << 10),
        (48000, 6, 1.7, 1 << 15),
    ],
)
def test_streamed_windows_are_those_of_the_whole_file(
    classifier: Classifier,
    rate: int,
    channels: int,
    hop: float | None,
    block: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write(tmp_path / "a.wav", sound(7.7, rate, channels), rate)
    found = classifier.compute_window_logits([decode(path).waveform], hop=hop)
    rows, spans = found.logits, list(found.spans)
    monkeypatch.setattr(streams, "_BLOCK_SAMPLES", block)
    ((found, where, end),) = gather(stream_windows(classifier, [path], hop=hop))
    assert where == spans and end == StreamEnd(0, spans[-1][1])
    np.testing.assert_array_equal(found, rows)
    assert np.ptp(rows, axis=0).max() > 0.01, "the windows differ"


@pytest.mark.parametrize("batch", [1, 3, 8, 64])
def test_files_share_batches(classifier: Classifier, batch: int, tmp_path: Path) -> None:
    lengths = (0.5, 3.2, 1.0, 6.1, 0.1)
    paths = [write(tmp_path / f"{i}.wav", sound(s, seed=i)) for i, s in enumerate(lengths)]
    calls: list[int] = []
    run = classifier.run

    class Counting(Classifier):
        def run(self, windows: Sequence[Window], *more: Any, **rest: Any) -> tuple[jax.Array, ...]:
            calls.append(len(windows))
            return run(windows, *more, **rest)

    counting = Counting(classifier.model, CLASSES, FRONTEND)
    files = gather(stream_windows(counting, paths, batch=batch))
    for (found, spans, end), path in zip(files, paths, strict=True):
        whole = classifier.compute_window_logits([decode(path).waveform])
        rows, expected = whole.logits, list(whole.spans)
        assert spans == expected and end.error is None
        np.testing.assert_allclose(found, rows, atol=1e-4)
    total = sum(len(spans) for _, spans, _ in files)
    assert calls == [batch] * (total // batch) + [total % batch] * (total % batch > 0)


def test_bad_files_between_good_ones(classifier: Classifier, tmp_path: Path) -> None:
    good = write(tmp_path / "good.wav", sound(2.5))
    (tmp_path / "bad.wav").write_bytes(b"no sound")
    short = write(tmp_path / "short.wav", sound(10))
    short.write_bytes(short.read_bytes()[:100044])
    files = gather(
        stream_windows(classifier, [tmp_path / "bad.wav", good, short, tmp_path / "gone", good])
    )
    assert [end.samples for *_, end in files] == [0, 40000, 50000, 0, 40000]
    assert [end.error and end.error.reason for *_, end in files] == [
        "undecodable",
        None,
        "truncated",
        "not a regular file",
        None,
    ]
    np.testing.assert_allclose(files[1][0], files[4][0], atol=1e-4)
    found = list(segment_files(classifier, [tmp_path / "bad.wav", good, short]))
    assert isinstance(found[0], AudioError)
    assert isinstance(found[1], Track) and found[1].cut is None and found[1].seconds == 2.5
    assert isinstance(found[2], Track) and found[2].cut and "truncated 50000/160000" in found[2].cut
    assert found[2].segments[-1].end == 3.125


def test_no_readable_file(classifier: Classifier, tmp_path: Path) -> None:
    (end,) = stream_windows(classifier, [tmp_path / "gone.wav"])
    assert isinstance(end, StreamEnd) and end.error is not None
    assert list(stream_windows(classifier, [])) == []


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"hop": 0.0}, {"hop": float("nan")}])
def test_an_invalid_hop_or_batch_is_refused(classifier: Classifier, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        stream_windows(classifier, [], **wrong)


@pytest.mark.parametrize("pool", ["mean_patches", "cls_dist"])
@pytest.mark.parametrize("mask", [False, True])
def test_vectors_are_the_models_tokens(pool: Any, mask: bool, tmp_path: Path) -> None:
    model = make_model(pool=pool, mask_padding=mask)
    classifier = Classifier(model, CLASSES, FRONTEND)
    path = write(tmp_path / "a.wav", sound(2.4))
    wave = decode(path).waveform
    events = [
        e for e in stream_windows(classifier, [path], vectors=True) if isinstance(e, StreamResult)
    ]
    found = np.concatenate([e.vectors for e in events if e.vectors is not None])
    windows = classifier.compute_window_logits([wave])
    rows, spans = windows.logits, list(windows.spans)
    assert len(found) == len(spans) == 3
    np.testing.assert_allclose(events[0].logits, rows, atol=1e-4)
    for vector, (start, end) in zip(found, spans, strict=True):
        audio, length = FRONTEND.fit(wave[start:end])
        features = FRONTEND(jnp.asarray(audio[None]), jnp.asarray([length]))
        valid = model.embed.mask(FRONTEND.count_frames(jnp.asarray([length]))) if mask else None
        tokens = np.asarray(model.tokens(features, valid))[0, TINY.num_prefix :]
        if valid is not None:
            tokens = tokens[np.asarray(valid)[0, TINY.num_prefix :]]
        np.testing.assert_allclose(vector, tokens.mean(axis=0), atol=1e-5)


# --- a tone that changes -------------------------------------------------------------------------


def collect_vectors(classifier: Classifier, paths: list[Any]) -> np.ndarray:
    events = stream_windows(classifier, paths, vectors=True)
    results = [event.vectors for event in events if isinstance(event, StreamResult)]
    return np.concatenate([vectors for vectors in results if vectors is not None])


def tones(change: float, seconds: float, rate: int = RATE) -> np.ndarray:
    time = np.arange(round(seconds * rate)) / rate
    wave = np.where(time < change, np.sin(2 * np.pi * 500 * time), np.sin(2 * np.pi * 3000 * time))
    noise = np.random.default_rng(0).normal(size=len(time))
    return 0.4 * wave + 0.01 * (rate / RATE) ** 0.5 * noise  # as loud in each Hz at every rate


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> AST:
    """A random backbone whose head separates the two tones by the means of its vectors."""
    tmp_path = tmp_path_factory.mktemp("tones")
    model = make_model(num_classes=2)
    plain = Classifier(model, ("low", "high"), FRONTEND)
    waves = [write(tmp_path / f"{i}.wav", tones(100 * (1 - i), 12)) for i in range(2)]
    means = []
    for path in waves:
        vectors = collect_vectors(plain, [path])[:-1]
        if model.head.norm is not None:
            vectors = np.asarray(model.head.norm(jnp.asarray(vectors)))
        means.append(vectors.mean(axis=0))
    away = means[1] - means[0]
    kernel = 10 * np.stack([-away, away], axis=1) / (away @ away)
    model.head.linear.kernel[...] = jnp.asarray(kernel)
    assert model.head.linear.bias is not None
    model.head.linear.bias[...] = jnp.asarray(-(means[0] + means[1]) / 2 @ kernel)
    return model


@pytest.mark.parametrize("change", [3.1, 5.0, 6.87])
@pytest.mark.parametrize("hop", [0.25, 0.5])
def test_a_tone_that_changes_is_segmented_within_a_hop(
    change: float, hop: float, fitted: AST, tmp_path: Path
) -> None:
    classifier = Classifier(fitted, ("low", "high"), FRONTEND)
    path = write(tmp_path / "change.wav", tones(change, 10.495))
    for rules in (
        SegmentationRules(),
        SegmentationRules(smooth=4 * hop),
        SegmentationRules(on=0.5, min_duration=1),
    ):
        (track,) = segment_files(classifier, [path], rules, hop=hop)
        assert isinstance(track, Track)
        assert [s.label for s in track.segments] == ["low", "high"]
        low, high = track.segments
        assert low.start == 0 and high.end == pytest.approx(10.495)  # the last window is whole
        assert abs(low.end - change) <= hop and low.end == high.start


class Perfect(Classifier):
    """Predicts the share of power above 1.5 kHz in a window, without its padding."""

    def run(
        self, windows: Sequence[Window], batch: int = 8, *, vectors: bool = False
    ) -> tuple[jax.Array, ...]:
        rows = np.ones((batch, 2))
        for i, window in enumerate(windows):
            power = np.abs(np.fft.rfft(window.audio[: window.length])) ** 2
            high = power[np.fft.rfftfreq(window.length, 1 / RATE) > 1500].sum() / power.sum()
            rows[i] = 1 - high, high
        return (jnp.asarray(np.log(rows)),)


@pytest.mark.parametrize("change", [0.7, 3.1, 9.0])
@pytest.mark.parametrize("hop", [0.02, 0.1, 0.4, None])
def test_a_perfect_model_finds_the_change_within_a_hop(
    change: float, hop: float | None, tmp_path: Path
) -> None:
    classifier = Perfect(make_model(num_classes=2), ("low", "high"), FRONTEND)
    path = write(tmp_path / "change.wav", tones(change, 10.3))
    (track,) = segment_files(classifier, [path], hop=hop)
    assert isinstance(track, Track)
    low, high = track.segments
    assert (low.label, high.label) == ("low", "high")
    assert low.start == 0 and low.end == high.start and high.end == pytest.approx(10.3)
    assert abs(low.end - change) <= (0.5 * SIZE / RATE if hop is None else 0.5 * hop + 0.01)


# --- the command ---------------------------------------------------------------------------------

ODD = [
    "plain.wav",
    'a, "b"; c.wav',
    "line\nbreak.wav",
    "tab\there.wav",
    "ü 音.wav",
    os.fsdecode(b"broken-\xff.wav"),
]


class Place:
    def __init__(self, root: Path, model: AST) -> None:
        self.weights = root / "weights.safetensors"
        arrays = surgery.arrays(model)
        write_native(self.weights, arrays, model.config, labels=("low", "high"))
        self.names = ODD
        self.paths = [os.fspath(root / "sounds" / name) for name in ODD]
        for i, path in enumerate(self.paths):
            made = write(root / "sounds" / "made.wav", tones(2 + i / 2, 7))
            made.rename(path)

    def run(self, *flags: object, files: list[str] | None = None) -> int:
        files = self.paths if files is None else files
        return main.run(["predict", str(self.weights), *map(str, flags), "--", *files])


@pytest.fixture(scope="module")
def place(fitted: AST, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("place"), fitted)


def rows_of_csv(data: bytes) -> list[dict[str, str]]:
    text = data.decode("utf-8", "surrogateescape")
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_every_format_on_the_command_line(
    place: Place, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    flags = ["--segments", "--hop", "0.25", "--smooth", "1", "--to"]
    assert place.run(*flags, "csv") == 0
    data = capfdbinary.readouterr().out
    rows = rows_of_csv(data)
    assert [row["file"] for row in rows] == [path for path in place.paths for _ in range(2)]
    assert [row["label"] for row in rows] == ["low", "high"] * len(ODD)
    for i, row in enumerate(rows[::2]):
        assert abs(float(row["end"]) - (2 + i / 2)) <= 0.25
    assert place.run(*flags, "csv", "--out", tmp_path / "new" / "a.csv") == 0
    assert (tmp_path / "new" / "a.csv").read_bytes() == data
    assert os.listdir(tmp_path / "new") == ["a.csv"]

    assert place.run(*flags, "json") == 0
    found = [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
    assert [one["path"] for one in found] == place.paths
    assert [s["end"] for one in found for s in one["segments"]] == [float(r["end"]) for r in rows]

    assert place.run(*flags, "rttm") == 0
    text = capfdbinary.readouterr().out.decode("utf-8", "surrogateescape")
    fields = [line.split() for line in text.splitlines()]
    assert {len(row) for row in fields} == {10}
    for row, plain in zip(fields, rows, strict=True):
        assert row[1] == "".join("_" if c.isspace() else c for c in plain["file"])
        assert float(row[3]) == pytest.approx(float(plain["start"]), abs=1e-3)
        assert float(row[3]) + float(row[4]) == pytest.approx(float(plain["end"]), abs=2e-3)
        assert row[7] == plain["label"]

    assert place.run(*flags, "audacity", files=place.paths[2:3]) == 0
    lines = capfdbinary.readouterr().out.decode().splitlines()
    assert [line.split("\t")[2] for line in lines] == ["low", "high"]
    assert [float(line.split("\t")[1]) for line in lines] == [float(r["end"]) for r in rows[4:6]]

    assert place.run(*flags, "table") == 0
    assert len(capfdbinary.readouterr().out.splitlines()) == 3 * len(ODD)
    assert place.run("--segments", files=place.paths[:1]) == 0
    assert b"low" in capfdbinary.readouterr().out, "a table is the default"


@pytest.mark.parametrize("ending", ["npz", "parquet"])
def test_embeddings(
    place: Place, ending: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"v.{ending}"
    assert place.run("--embeddings", path, "--json", "--batch-size", "5") == 0
    printed = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    if ending == "npz":
        with np.load(path, allow_pickle=False) as file:
            columns = {name: file[name] for name in file.files}
    else:
        table = pq.read_table(path)
        columns = {name: np.array(table[name].to_pylist()) for name in table.column_names}
    assert set(columns) == {"file", "start", "end", "vector"}
    names = [os.fsencode(p).decode("utf-8", "backslashreplace") for p in place.paths]
    assert columns["file"].tolist() == [name for name in names for _ in range(8)]
    spans = [(w["start"], w["end"]) for one in printed for w in one["windows"]]
    assert list(zip(columns["start"], columns["end"], strict=True)) == spans
    classifier = Classifier.load(place.weights)
    expected = collect_vectors(classifier, place.paths)
    np.testing.assert_allclose(columns["vector"], expected, atol=1e-5)
    assert columns["vector"].shape == (8 * len(ODD), 32)
    assert os.listdir(tmp_path) == [path.name]
    # Equal to the predictions file by file.
    assert place.run("--json") == 0
    for one, two in zip(capfd.readouterr().out.splitlines(), printed, strict=True):
        plain = json.loads(one)
        assert (plain["path"], plain["label"]) == (two["path"], two["label"])
        assert plain["probabilities"] == pytest.approx(two["probabilities"], abs=1e-5)


def test_embeddings_and_segments_in_one_pass(place: Place, tmp_path: Path) -> None:
    # The last window is 0.035 s of sound and much padding, which this model misclassifies.
    flags = ["--segments", "--min-duration", "0.1", "--to", "csv", "--out", tmp_path / "s.csv"]
    assert place.run(*flags, "--embeddings", tmp_path / "v.npz") == 0
    assert len(rows_of_csv((tmp_path / "s.csv").read_bytes())) == 2 * len(ODD)
    assert len(np.load(tmp_path / "v.npz")["vector"]) == 8 * len(ODD)


def test_bad_and_cut_files(place: Place, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bad, short = tmp_path / "bad.wav", tmp_path / "short.wav"
    bad.write_bytes(b"no sound")
    short.write_bytes(Path(place.paths[0]).read_bytes()[:100044])
    files = [str(bad), str(short), place.paths[1]]
    out, vectors = tmp_path / "s.csv", tmp_path / "v.parquet"
    flags = ["--segments", "--to", "csv", "--out", out, "--embeddings", vectors]
    assert place.run(*flags, files=files) == 65
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("aatjax: ") for line in lines)
    assert "bad.wav: text, not a sound" in lines[0]
    assert "short.wav: truncated 50000/112000 frames; the part before is used" in lines[1]
    assert lines[2].endswith(
        "1 of 3 files could not be read, 1 of 3 files could not be read to the end"
    )
    rows = rows_of_csv(out.read_bytes())
    assert list(dict.fromkeys(row["file"] for row in rows)) == files[1:]
    assert float([row for row in rows if row["file"] == str(short)][-1]["end"]) == 3.125
    assert len(pq.read_table(vectors)) == 4 + 8
    # No readable file: nothing is written.
    out.unlink()
    vectors.unlink()
    assert place.run(*flags, files=[str(bad)]) == 65
    assert sorted(os.listdir(tmp_path)) == ["bad.wav", "short.wav"]
    # Without --segments, --embeddings or --batch-size a truncated file is an error.
    capfd.readouterr()
    assert place.run(files=[str(short)]) == 65
    captured = capfd.readouterr()
    assert captured.out == "" and "--batch-size or --segments use the part" in captured.err


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--to", "rttm"], "--to rttm writes when"),
        (["--min-duration", "0"], "--min-duration needs --segments"),
        (["--json", "--csv"], "exclude each other"),
        (["--segments", "--to", "audacity"], "one file at a time"),
        (["--segments", "--to", "xml"], "no such choice: one of audacity, csv, json, rttm, table"),
        (["--segments", "--threshold", "high"], "0.6:0.4"),
        (["--segments", "--threshold", "0.2:0.4"], "above where it begins"),
        (["--segments", "--threshold", "1:0:1"], "0.6:0.4"),
        (["--segments", "--threshold", "7"], "--threshold 7.0 must be"),
        (["--segments", "--smooth", "1"], "give at least"),
        (["--segments", "--gap", "-1"], "--gap -1.0 must be"),
        (["--segments", "--hop", "0"], "hop"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--embeddings", "v.txt"], ".npz or .parquet"),
        (["--embeddings", "."], "is a folder"),
        (["--segments", "--out", "."], "is a folder"),
        (["--segments", "--out", "v.npz", "--embeddings", "v.npz"], "same file"),
    ],
)
def test_wrong_flags(
    place: Place,
    flags: list[str],
    word: str,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert place.run(*flags) == 2
    captured = capfd.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1 and word in captured.err
    assert os.listdir(tmp_path) == []


def test_names_that_are_equal_in_rttm_are_refused(
    place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    assert place.run("--segments", "--to", "rttm", files=["a b.wav", "a_b.wav"]) == 2
    assert "same name in RTTM" in capfd.readouterr().err


@pytest.mark.parametrize("flag", ["--out", "--embeddings"])
def test_an_unwritable_output_is_an_error(
    place: Place, flag: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert place.run("--segments", flag, tmp_path / "file" / "a.npz") == 74
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1 and "cannot be written" in err


def test_an_interrupted_command_leaves_the_old_file(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "s.csv"
    old.write_text("old")
    run, calls = Classifier.run, [0]

    def breaking(self: Classifier, *args: Any, **more: Any) -> tuple[jax.Array, ...]:
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return run(self, *args, **more)

    monkeypatch.setattr(Classifier, "run", breaking)
    flags = ["--segments", "--to", "csv", "--out", old]
    assert place.run(*flags, "--embeddings", tmp_path / "v.npz") == 130
    assert old.read_text() == "old" and os.listdir(tmp_path) == ["s.csv"]


def test_the_calibration_of_the_adapter_file_is_used(fitted: AST, tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", tones(3, 5.995))

    def find_labels(calibration: Calibration, **options: Any) -> list[str]:
        many = calibration.multi_label
        classifier = Classifier(
            fitted, ("low", "high"), FRONTEND, multi_label=many, calibration=calibration
        )
        (track,) = segment_files(classifier, [path], **options)
        assert isinstance(track, Track)
        assert all(s.unsure == (s.label == "unsure") for s in track.segments)
        return [s.label for s in track.segments]

    assert find_labels(Calibration(1.0, None, 1.0, 0.9, 5)) == ["unsure"]
    assert find_labels(Calibration(1.0, (0.5, 1.0), 1.0, 0.9, 5), hop=0.25) == ["low"]


# --- hours ---------------------------------------------------------------------------------------

HOURS = """
import json, sys, time
from aatjax.inference.classifier import Classifier
from aatjax.inference.embeddings import open_embeddings
from aatjax.inference.stream import StreamResult, segment_stream, stream_windows
from aatjax.inference.segmentation import SegmentationRules
from pathlib import Path
weights, folder, *files = sys.argv[1:]
classifier = Classifier.load(weights)
for file in files:
    begun = time.perf_counter()
    with open_embeddings(Path(folder) / "v.parquet", 32) as add:
        def events():
            for event in stream_windows(classifier, [file], vectors=True):
                if isinstance(event, StreamResult):
                    add(file, event)
                yield event
        (track,) = segment_stream(classifier, [file], events(), SegmentationRules(smooth=3))
    took = time.perf_counter() - begun
    # Not ru_maxrss: a child begins with that of the process that started it.
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    print(json.dumps([track.seconds, len(track.segments), took, peak]))
"""
BOUND = 40  # MiB; the allocator alone differs by 10 to 25


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory from /proc")
@pytest.mark.parametrize("kind", ["wav", "flac"])
def test_two_hours_take_the_memory_of_ten_minutes(place: Place, kind: str, tmp_path: Path) -> None:
    """B11: the whole sound would be 220 MiB at 16 kHz."""
    rate = 44100 if kind == "wav" else 22050
    minute = np.round(tones(30, 60, rate) * 32767).astype(np.int16)
    paths = [tmp_path / f"{minutes}.{kind}" for minutes in (10, 120)]
    for path, minutes in zip(paths, (10, 120), strict=True):
        with soundfile.SoundFile(path, "w", rate, 1, "PCM_16") as file:
            for _ in range(minutes):
                file.write(minute)
    done = subprocess.run(
        [sys.executable, "-c", HOURS, str(place.weights), str(tmp_path), *map(str, paths)],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        # One arena: each thread has one else, the more of them the busier the machine is.
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"MALLOC_ARENA_MAX": "1"},
    )
    assert done.returncode == 0, done.stderr
    short, long = map(json.loads, done.stdout.splitlines())
    print(kind, short, long, f"{long[0] / long[2]:.0f} x real time")
    assert (short[0], long[0]) == (600, 7200)
    assert abs(long[1] - short[1] - 220) <= 1, "two a minute, and one where the end is a window"
    assert long[3] - short[3] < BOUND


def test_a_stream_that_is_closed_closes_its_file(classifier: Classifier, tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", sound(30))
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    events = stream_windows(classifier, [path], batch=2)
    next(events)
    with contextlib.closing(events):  # type: ignore[type-var]
        pass
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before
