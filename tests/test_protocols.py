"""Protocols: several runs with one result, and weights never chosen by the reported clips."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from official_layouts import MAKERS

from aatjax import petl
from aatjax.cli.main import run
from aatjax.config import load_config
from aatjax.data.synthetic.dataset import Synthetic
from aatjax.data.synthetic.synthesize import TARGET_SOUNDS
from aatjax.errors import UsageError
from aatjax.experiments.cross_validation import cross_validate
from aatjax.models.ast import AST
from aatjax.models.config import ASTConfig
from aatjax.train.fit import FitContext, fit
from aatjax.train.logging import read_metrics
from aatjax.train.metrics.intervals import mean_interval
from aatjax.train.training import Training


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MAKERS["esc10"](tmp_path_factory.mktemp("sounds"))


def flags(sounds: Path, weights: str, folder: Path) -> list[str]:
    return [
        "--data.path",
        str(sounds),
        "--model.source",
        weights,
        "--model.frames",
        "64",
        "--training.epochs",
        "3",
        "--training.batch-size",
        "16",
        "--out",
        str(folder),
        "--quiet",
    ]


@pytest.mark.slow
def test_one_epoch_is_chosen_over_all_folds_and_reported(
    sounds, small_ast, tmp_path, capsys
) -> None:
    command = ["train", "esc10_lora", *flags(sounds, small_ast, tmp_path), "--protocol", "aat"]
    assert run([*command, "--cross-validate"]) == 0
    report = capsys.readouterr().out
    assert "NOTE: weights were chosen by the test clips, as in arXiv 2401.10544" in report
    curves = []
    for fold in "12345":
        result = json.loads((tmp_path / f"fold{fold}/result.json").read_text())
        assert result["data"]["chosen_on_test"] == "arXiv 2401.10544"
        assert result["data"]["protocol"] == "aat"
        rows = read_metrics(tmp_path / f"fold{fold}/metrics.jsonl")
        curves.append([row["valid/accuracy"] for row in rows])
        assert rows[-1]["valid/accuracy"] == pytest.approx(result["headline"][1])
    mean = np.mean(curves, axis=0)
    best = int(mean.argmax())
    found = json.loads((tmp_path / "cross_validation.json").read_text())
    assert (found["epoch"], found["chosen_on_test"]) == (best + 1, "arXiv 2401.10544")
    wanted = mean_interval([curve[best] for curve in curves])
    assert [found["mean"], found["low"], found["high"]] == pytest.approx(wanted)
    assert found["mean_of_last_epoch"] == pytest.approx(mean[-1])
    assert run([*command, "--cross-validate", "--training.patience", "3"]) == 2
    assert "patience 3 ends the folds at different epochs" in capsys.readouterr().err
    ridge = [*command, "--cross-validate", "--method", "ridge", "--out", str(tmp_path / "ridge")]
    assert run(ridge) == 0  # it has no epoch to choose
    assert json.loads((tmp_path / "ridge/cross_validation.json").read_text())["epoch"] is None
    assert f"mean, epoch {best + 1}" in report and "mean, last epoch" in report


@pytest.mark.slow
def test_few_shot_draws_are_averaged_and_differ(small_ast, tmp_path, capsys) -> None:
    MAKERS["iemocap"](tmp_path / "iemocap")
    command = [
        "train",
        "iemocap_linear",
        *flags(tmp_path / "iemocap", small_ast, tmp_path / "run"),
        "--data.shots",
        "2",
        "--draws",
        "3",
    ]
    assert run(command) == 0
    assert "draw 2" in capsys.readouterr().out
    found = json.loads((tmp_path / "run/cross_validation.json").read_text())
    assert list(found["folds"]) == ["draw0", "draw1", "draw2"]
    assert found["mean"] == pytest.approx(np.mean(list(found["folds"].values())))
    clips = [
        json.loads((tmp_path / f"run/draw{k}/clips.json").read_text())["parts"]["train"]
        for k in range(3)
    ]
    assert all(len(part) == 8 for part in clips)
    assert clips[0] != clips[1] != clips[2]
    assert run([*command[:-4], "--draws", "2"]) == 2
    assert "add --data.shots K" in capsys.readouterr().err


def test_choosing_on_the_test_clips_is_refused() -> None:
    config = ASTConfig(
        dim=16, depth=1, heads=2, mlp_dim=16, stride=(16, 16), frames=48, num_classes=2
    )
    model = petl.adapt(AST(config, rngs=nnx.Rngs(0)), petl.find_method("linear")())
    made = Synthetic(TARGET_SOUNDS[:2], 4, seconds=0.4)
    train, test = made.split(0.5)
    best = Training(epochs=1, batch_size=4, select="best", threads=0)
    with pytest.raises(UsageError, match=r"clips are in valid and test.*would choose weights by"):
        fit(model, train, test, valid=test, training=best, show=None)
    named = fit(
        model,
        train,
        test,
        valid=test,
        training=best,
        show=None,
        context=FitContext(chosen_on_test="arXiv 0"),
    )
    assert named.selected == "best"
    last = dataclasses.replace(best, select="last")
    fit(model, train, test, valid=test, training=last, show=None)  # a curve chooses nothing


def test_a_protocol_is_chosen_by_its_name(sounds, capsys) -> None:
    assert run(["train", "default", "--protocol", "aat"]) == 2
    assert "applies to benchmarks only" in capsys.readouterr().err
    assert run(["train", "gtzan_aat", "--protocol", "petl"]) == 2
    assert "GTZAN has no protocol 'petl': there are honest, aat" in capsys.readouterr().err
    config = load_config("speech_commands_v2_lora")
    assert config.training.select == "best"
    assert config.with_protocol("petl").training.select == "last"
    assert config.with_protocol("petl").data.protocol == "petl"
    with pytest.raises(UsageError, match=r"add --data\.shots K"):
        cross_validate(config, draws=2, folds=False, show=None)
