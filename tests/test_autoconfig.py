"""`aatjax adapt`: the rules, and one command from a folder to adapter and report."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from aatjax.cli.main import run
from aatjax.config import Data, Model
from aatjax.data.source import Clip, Source
from aatjax.data.synthetic.synthesize import TARGET_SOUNDS, synthesize
from aatjax.doctor.findings import ClipMeasurements, Diagnosis, Finding, Item
from aatjax.experiments.autoconfig import (
    choose_division,
    choose_frames,
    choose_settings,
    describe_training,
    suggest_next_steps,
)
from aatjax.experiments.partition import divide
from aatjax.models.config import ASTConfig
from aatjax.petl.soft_moa import SoftMoA


def sounds(folder: Path, clips: int, kinds: int = 3) -> Path:
    for kind in TARGET_SOUNDS[:kinds]:
        (folder / kind).mkdir(parents=True)
        for k in range(clips):
            wave = synthesize(kind, 100 + k, seconds=0.7)
            soundfile.write(folder / kind / f"{k}.wav", wave, 16000)
    return folder


def diagnosis(seconds: list[float], *findings: Finding) -> Diagnosis:
    measurements = tuple(ClipMeasurements(str(i), None, seconds=s) for i, s in enumerate(seconds))
    return Diagnosis("made", 198, {}, {}, measurements, findings)


SMALL = ASTConfig.from_text("d128x4,patch=32x8,stride=32x8,frames=198")


def choose(source: Source, seconds: list[float], shape: ASTConfig = SMALL):
    frames = choose_frames(seconds, shape.frames)
    found = dataclasses.replace(diagnosis(seconds), frames=frames)
    data, first = choose_division(source, Data(path="p"))
    parts = divide(data, source)
    config, more = choose_settings(source, parts, found, Model(), data, shape)
    return config, [*first, *more]


def source(counts: list[int], **fields) -> Source:
    clips = [
        Clip(f"{c}-{k}", (c,), "x", **{n: f(c, k) for n, f in fields.items()})
        for c, count in enumerate(counts)
        for k in range(count)
    ]
    return Source(clips, [f"class{c}" for c in range(len(counts))], name="made")


def test_the_rules() -> None:
    config, why = choose(source([40, 40, 30]), [1.0] * 100)
    assert config.petl.name == "soft_moa" and config.model.frames == 100
    assert (config.data.test_fraction, config.data.valid_fraction) == (0.2, 0.15)
    assert config.data.statistics == "train" and config.data.windows == "every"
    assert config.training.head_init == "ridge" and config.model.pool == "bands"
    assert config.training.ridge_suffices == 0.85 and config.data.pad == "repeat"
    assert {c.what for c in why} >= {"model.frames", "method", "training.batch_size", "optim.lr"}
    assert all(c.why for c in why)

    few, _ = choose(source([40, 5]), [9.0] * 45)
    assert few.petl.name == "ridge" and few.training.head_init == "model"
    assert few.model.frames == 297 and few.data.windows == "random"  # 1.5 times the base's 198
    assert few.model.pool == "bands"
    assert few.data.valid_fraction == 0.0 and few.augment.mixup == 0.0

    folds, _ = choose(source([40, 40], fold=lambda c, k: str(k % 4)), [1.0] * 80)
    assert folds.data.fold == "3"
    parts, _ = choose(source([40, 40], split=lambda c, k: "train" if k % 4 else "test"), [1.0] * 80)
    assert parts.data.fold is None and parts.data.test_fraction == 0.2  # not used
    big, _ = choose(source([400, 400]), [10.0] * 800, shape=ASTConfig())
    assert big.petl == SoftMoA() and big.training.batch_size == 32
    assert big.model.pool == "stats"  # 25 x 768 numbers by frequency band
    assert big.model.frames == 1000 and big.training.ridge_suffices is None
    short, _ = choose(source([40, 40]), [0.4] * 80)
    assert short.model.frames == 100


def test_the_counts_are_those_of_the_division() -> None:
    """ESC-10's folds: 240 clips train on four folds, less those that validate."""
    made = source([40] * 8, fold=lambda c, k: str(k % 4), group=lambda c, k: f"{c}-{k}")
    data, _ = choose_division(made, Data(path="p"))
    parts = divide(data, made)
    config, why = choose(made, [5.0] * 320)
    assert len(parts.train) == 240 - len(parts.valid or ()) and len(parts.test or ()) == 80
    assert config.training.batch_size == 16
    steps = -(-len(parts.train) // 16)
    text = describe_training(config, parts)
    assert text.startswith(f"{len(parts.train)} training clips, ")
    assert text.endswith(f"80 for testing; {steps} steps per epoch")
    epochs = next(c for c in why if c.what == "training.epochs")
    assert f"at {steps} per epoch" in epochs.why


def test_a_soft_speaker_is_answered_by_gain() -> None:
    made = source([40, 40], group=lambda c, k: f"s{k % 4}")
    levels = [-45.0 if clip.group == "s3" else -26.4 for clip in made.clips]
    measured = tuple(
        ClipMeasurements(clip.id, None, seconds=1.0, level=level, peak=0.5)
        for clip, level in zip(made.clips, levels, strict=True)
    )
    found = dataclasses.replace(diagnosis([]), measurements=measured, frames=100)
    data, _ = choose_division(made, Data(path="p"))
    parts = divide(data, made)
    config, why = choose_settings(made, parts, found, Model(), data, SMALL)
    assert config.augment.gain == 19.0
    assert any("gain since speakers" in setting.why for setting in why)
    assert choose(made, [1.0] * 80)[0].augment.gain == 0.0


def test_next_steps_name_the_findings_first() -> None:
    found = diagnosis([1.0], Finding("clipped", (Item("a"), Item("b"))))
    lines = suggest_next_steps(found, None, "embedded")
    assert lines[0].startswith("2 x clipped") and "AudioSet" in lines[-1]
    assert suggest_next_steps(diagnosis([1.0]), None, "x.pth") == []


@pytest.mark.slow
def test_from_a_folder_to_a_report_in_one_command(small_ast, tmp_path, capsys) -> None:
    folder = sounds(tmp_path / "sounds", 8)
    command = [
        "adapt",
        str(folder),
        "--out",
        str(tmp_path / "run"),
        "--quiet",
        "--no-labels",
        "--training.epochs",
        "2",
        "--base",
        small_ast,
    ]
    assert run([*command, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "model.frames" in out and "nothing was trained" in out
    assert not (tmp_path / "run").exists()
    assert run(command) == 0
    out = capsys.readouterr().out
    assert "replaced by your flags: --training.epochs 2" in out
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["training"]["epochs"] == 2 and config["model"]["source"] == small_ast
    page = (tmp_path / "run/report.html").read_text()
    assert "aatjax adapt" in page and TARGET_SOUNDS[0] in page
    assert json.loads((tmp_path / "run/diagnosis.json").read_text())["findings"] is not None
    assert run(["eval", str(tmp_path / "run/adapter.safetensors"), "--json"]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert evaluated["accuracy"] == pytest.approx(result["headline"][1])
    assert np.isfinite(result["headline"][1])


def test_mistakes_are_one_line(tmp_path, capsys, small_ast) -> None:
    assert run(["adapt", str(tmp_path / "none")]) == 65
    assert "no such file or folder" in capsys.readouterr().err
    folder = sounds(tmp_path / "sounds", 2, kinds=2)
    flags = ["--quiet", "--no-labels", "--dry-run", "--base", small_ast]
    assert run(["adapt", str(folder), *flags, "--training.epoch", "2"]) == 2
    assert "epoch" in capsys.readouterr().err
    assert run(["adapt", str(folder), *flags, "--method", "soft_mao"]) == 2
    assert "did you mean 'soft_moa'" in capsys.readouterr().err
