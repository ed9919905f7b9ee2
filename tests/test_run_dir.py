"""Claims of a run folder: the same config, the same clips, one run at a time."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from aatjax import petl
from aatjax.config import Config, Data, load_config
from aatjax.data.source import Clip, Reader, Source
from aatjax.errors import UsageError, WriteError
from aatjax.experiments.older_runs import fill_defaults, was_stratified
from aatjax.io.json_file import write_json
from aatjax.io.lock import lock_folder
from aatjax.train.optim import Optim
from aatjax.train.run_dir import RunClaims
from aatjax.train.sharding import MeshShape
from aatjax.train.training import Training

CONFIG = Config(petl=petl.AAT(), data=Data(path="sounds"))


def claim_config(
    folder: Path, config: Config, allow: Sequence[str] = (), *, steps_left: int = 1
) -> None:
    """What `aatjax train` does with its config."""
    claims = RunClaims(folder, allow)
    claims.check("config.json", config.to_json(), upgrade=fill_defaults)
    claims.write(steps_left)


def claim_clips(
    folder: Path, parts: Mapping[str, Source], allow: Sequence[str] = (), *, steps_left: int = 1
) -> None:
    claims = RunClaims(folder, allow)
    claims.check_clips(parts)
    claims.write(steps_left)


class Keyed(Reader):
    """Knows the content of each clip without reading it."""

    def __init__(self, **keys: str) -> None:
        self.keys = keys

    def key(self, clip: Clip) -> str | None:
        return self.keys.get(clip.id)


def source(labels: str = "001", classes: tuple[str, ...] = ("a", "b"), **keys: str) -> Source:
    names = "xyzuv"
    clips = [Clip(names[i], (int(label),), None) for i, label in enumerate(labels)]
    return Source(clips, classes, name="s", reader=Keyed(**keys))


def mark_started(folder: Path) -> None:
    (folder / "checkpoints" / "3").mkdir(parents=True)


def test_another_config_is_refused_with_the_difference(tmp_path: Path) -> None:
    """F17."""
    claim_config(tmp_path, CONFIG)
    other = dataclasses.replace(CONFIG, optim=Optim(lr=0.5), petl=petl.Linear())
    claim_config(tmp_path, other)  # nothing was trained yet: nothing is claimed
    claim_config(tmp_path, CONFIG)
    mark_started(tmp_path)
    claim_config(tmp_path, CONFIG)
    with pytest.raises(UsageError) as caught:
        claim_config(tmp_path, other)
    text = str(caught.value)
    assert "optim.lr: None -> 0.5" in text and "petl.name: 'aat' -> 'linear'" in text
    assert "allow_change=['optim.lr']" in text and "\n" not in text
    assert json.loads((tmp_path / "config.json").read_text())["optim"]["lr"] is None


def test_a_change_that_is_allowed_by_name_goes_through(tmp_path: Path) -> None:
    claim_config(tmp_path, CONFIG)
    mark_started(tmp_path)
    other = dataclasses.replace(CONFIG, optim=Optim(lr=0.5, eps=1e-3))
    with pytest.raises(UsageError, match=r"optim.eps: 1e-06 -> 0.001\)"):
        claim_config(tmp_path, other, ["optim.lr"])
    claim_config(tmp_path, other, ["optim"])
    claim_config(tmp_path, other)  # it is the run's config from now on


def test_how_the_work_is_shared_may_change_freely(tmp_path: Path) -> None:
    claim_config(tmp_path, CONFIG)
    mark_started(tmp_path)
    training = dataclasses.replace(CONFIG.training, threads=7)
    claim_config(tmp_path, dataclasses.replace(CONFIG, mesh=MeshShape(2, 2, 2), training=training))
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["mesh"]["fsdp"], written["training"]["threads"]) == (2, 7)


def test_what_is_checked_is_written_only_when_everything_agrees(tmp_path: Path) -> None:
    claim_config(tmp_path, CONFIG)
    claim_clips(tmp_path, {"train": source()})
    mark_started(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    claims = RunClaims(tmp_path, ["optim"])
    claims.check("config.json", dataclasses.replace(CONFIG, optim=Optim(lr=0.5)).to_json())
    with pytest.raises(UsageError, match="train: new 'u'"):
        claims.check_clips({"train": source("0011")})
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def with_epochs(epochs: int, schedule: Any = "constant") -> Config:
    return dataclasses.replace(
        CONFIG, training=Training(epochs=epochs), optim=Optim(schedule=schedule)
    )


def test_more_epochs_go_on_where_the_learning_rate_does_not_depend_on_them(tmp_path: Path) -> None:
    claim_config(tmp_path, with_epochs(2, "cosine"))
    mark_started(tmp_path)
    with pytest.raises(UsageError, match=r"training.epochs: 2 -> 4 with optim.schedule 'cosine'"):
        claim_config(tmp_path, with_epochs(4, "cosine"), ["training.epochs"])
    # A change of the rate that is allowed too is the user's own.
    claim_config(tmp_path, with_epochs(4), ["training.epochs", "optim.schedule"])
    claim_config(tmp_path, with_epochs(6, "steps"), ["training", "optim"])
    with pytest.raises(UsageError, match=r"has more epochs behind it .*epochs: 6 -> 1"):
        claim_config(tmp_path, with_epochs(1, "steps"), ["training"], steps_left=-3)


def test_a_finished_run_takes_no_change_that_would_have_needed_training(tmp_path: Path) -> None:
    claim_config(tmp_path, CONFIG)
    claim_clips(tmp_path, {"train": source(), "test": source("01")})
    mark_started(tmp_path)
    result = tmp_path / "result.json"
    result.write_text("{}")
    other = dataclasses.replace(CONFIG, optim=Optim(lr=0.5))
    with pytest.raises(UsageError, match=r"nothing left to train .*optim.lr: None -> 0.5"):
        claim_config(tmp_path, other, ["optim"], steps_left=0)
    parts = {"train": source("0011"), "test": source("01")}
    with pytest.raises(UsageError, match=r"nothing left to train .*train: new 'u'"):
        claim_clips(tmp_path, parts, ["clips"], steps_left=0)
    assert result.exists()
    # Other test clips need other figures only; those of before are gone at once.
    parts = {"train": source(), "test": source("011")}
    with pytest.raises(UsageError, match=r"test: new 'z'.*allow_change=\['clips'\]\) to have its"):
        claim_clips(tmp_path, parts)
    claim_clips(tmp_path, parts, ["clips"], steps_left=0)
    assert not result.exists()


@pytest.mark.parametrize(
    ("now", "named"),
    [
        (source("00", y="2"), "train: gone 'z'"),
        (source("0011"), "train: new 'u'"),
        (source("011"), "train: changed 'y'"),
        (source(x="9"), "train: changed 'x'"),
        (source(classes=("b", "a")), r"classes: \['a', 'b'\] -> \['b', 'a'\]"),
    ],
    ids=["removed", "added", "relabelled", "modified", "classes"],
)
def test_other_clips_are_refused_with_a_list(tmp_path: Path, now: Source, named: str) -> None:
    """F18: known by their content, not by their names alone."""
    before = {"train": source(y="2") if len(now) == 2 else source(), "test": source()}
    claim_clips(tmp_path, before)
    mark_started(tmp_path)
    claim_clips(tmp_path, before)
    with pytest.raises(UsageError, match=named) as caught:
        claim_clips(tmp_path, {"train": now, "test": source()})
    assert "allow_change=['clips']" in str(caught.value)
    claim_clips(tmp_path, {"train": now, "test": source()}, ["clips"])
    claim_clips(tmp_path, {"train": now, "test": source()})


def test_clips_in_another_part_are_not_reported_as_gone_and_new(tmp_path: Path) -> None:
    whole = source("0011")
    parts = {"train": whole.subset([0, 1]), "valid": whole.subset([2, 3])}
    claim_clips(tmp_path, parts)
    mark_started(tmp_path)
    parts = {"train": source("00111").subset([0, 3, 4]), "valid": whole.subset([1, 2])}
    with pytest.raises(UsageError) as caught:
        claim_clips(tmp_path, parts)
    assert (
        "(train: new 'v'; train: moved here from valid 'u'; valid: moved here from train 'y')"
    ) in str(caught.value)


def test_the_split_of_a_run_of_before_is_kept(tmp_path: Path) -> None:
    """A run whose config does not name the split had the only one of its version."""
    config = json.loads(json.dumps(CONFIG.to_json()))
    del config["data"]["split_method"]
    assert Config.from_json(config).data.split_method == "stratified"
    assert Config.from_json({**config, "data": {"path": "x"}}).data.split_method == "hash"
    write_json(tmp_path / "config.json", config)
    assert not was_stratified(RunClaims(tmp_path))  # nothing was trained
    mark_started(tmp_path)
    assert was_stratified(RunClaims(tmp_path))
    same = dataclasses.replace(CONFIG, data=Data(path="sounds", split_method="stratified"))
    claim_config(tmp_path, same)
    assert not was_stratified(RunClaims(tmp_path))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """F6."""
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match=r"file/config.json: cannot be written"):
        write_json(tmp_path / "file" / "config.json", {})
    with (
        pytest.raises(WriteError, match="file/run: cannot be written"),
        lock_folder(tmp_path / "file" / "run"),
    ):
        pass


def test_the_lock_names_its_holder_and_goes_with_it(tmp_path: Path) -> None:
    """F21."""
    code = f"""
import sys, time
from pathlib import Path
from aatjax.io.lock import lock_folder
with lock_folder(Path({str(tmp_path)!r})):
    print("held", flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    refused = pytest.raises(UsageError, match=f"in use by process {holder.pid} on host")
    with refused, lock_folder(tmp_path):
        pass
    holder.kill()
    holder.wait()
    with lock_folder(tmp_path):
        holder_info = json.loads((tmp_path / ".lock.json").read_text())
        assert holder_info["pid"] == os.getpid()


def test_a_field_that_a_newer_version_adds_is_no_change(tmp_path: Path) -> None:
    config = load_config("default")
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    fields = json.loads(json.dumps(config.to_json()))
    del fields["training"]["cache_prefix"], fields["petl"]["blocks"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    claim_config(tmp_path, config)
    changed = dataclasses.replace(
        config, training=dataclasses.replace(config.training, cache_prefix=True)
    )
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UsageError, match=r"training\.cache_prefix: False -> True"):
        claim_config(tmp_path, changed)
    (tmp_path / "config.json").write_text(json.dumps({**fields, "gone": 1}))
    with pytest.raises(UsageError, match="gone"):
        claim_config(tmp_path, config)
