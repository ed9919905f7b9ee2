"""`aatjax chaos`: a run that is killed and resumed, and a comparison that can fail."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from aatjax.cli.main import run
from aatjax.errors import UsageError
from aatjax.train.fault_injection import Trial

CONFIG = str(Path(__file__).parent / "small_config.py")


def may_mount(folder: Path) -> bool:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        return False
    subprocess.run(["umount", str(folder)], check=True)
    return True


@pytest.mark.slow
def test_a_run_survives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """F1, F2, F4, F7: kill -9, SIGTERM, kill -9 while saving, and where it can be a full disk."""
    folder = tmp_path / "chaos"
    code = run(["chaos", CONFIG, "--out", str(folder), "--interruptions", "3", "--seed", "1"])
    said = capsys.readouterr().out
    assert code == 0, said
    assert "bit for bit" in said
    assert "kill -9" in said and "SIGTERM" in said
    assert (folder / "certificate.txt").read_text() == said
    if may_mount(tmp_path / "probe"):
        assert "code 74" in said and "with room: code 0" in said
    else:
        assert "not tried" in said


def test_a_difference_breaks_the_certificate(tmp_path: Path) -> None:
    trial = Trial([CONFIG], tmp_path, seed=0, say=print)
    rows = [{"step": 3, "epoch": 1, "train/loss": 1.0, "train/seconds": 4.0}]
    for name in ("straight", "other"):
        (tmp_path / name).mkdir()
        save_file({"w": np.arange(4.0)}, tmp_path / name / "adapter.safetensors")
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(rows[0]) + "\n")
        rows[0]["train/seconds"] = 5.0  # the clock may differ
    trial._compare(tmp_path / "straight", tmp_path / "other", "it")
    assert trial.found.problems == []
    weights = load_file(tmp_path / "other" / "adapter.safetensors")
    weights["w"] = weights["w"] + np.array([0, 0, 0, 1e-12])
    save_file(weights, tmp_path / "other" / "adapter.safetensors")
    other_row = '{"step": 3, "epoch": 1, "train/loss": 1.5}\n'
    (tmp_path / "other" / "metrics.jsonl").write_text(other_row)
    trial._compare(tmp_path / "straight", tmp_path / "other", "it")
    assert trial.found.problems == [
        "it: 1 of 1 tensors differ, first w",
        "it: metrics.jsonl differs",
    ]
    assert "BROKEN" in trial.found.to_text() and "survived" not in trial.found.to_text()


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="is not empty"):
        Trial([CONFIG], tmp_path, seed=0, say=print).run(1)
    assert run(["chaos", CONFIG, "--out", str(tmp_path), "--interruptions", "0"]) == 2
