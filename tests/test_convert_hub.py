"""Weights by their published names: downloaded once, found offline, by every command."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hub import COMMIT, DEIT, LABELS, REPOSITORIES, STRIDES, Hub, go_offline, serve_hub
from huggingface_hub import constants

from aatjax import load, petl
from aatjax.analysis.plan import read_shape
from aatjax.cli import main
from aatjax.config import Model
from aatjax.convert import fetch_weights, read_checkpoint
from aatjax.convert.load import make_front_end
from aatjax.errors import DataError, UnavailableError, UsageError
from aatjax.train.adapter_file import load_adapter, save_adapter

NAME = "MIT/ast-finetuned-audioset-10-10-0.4593"
SMALL = ["--training.epochs", "1", "--training.batch-size", "8", "--model.frames", "36"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with serve_hub(tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.fixture
def cache(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    hub.asked.clear()
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("sounds"), np.random.default_rng(0)
    for label, name in enumerate(("hum", "whistle")):
        (root / name).mkdir()
        for i in range(8):
            wave = np.sin(2 * np.pi * 300 * 3**label * np.arange(6400) / 16000)
            soundfile.write(
                root / name / f"{i}.wav", 0.4 * wave + 0.1 * rng.normal(size=6400), 16000
            )
    return root


@pytest.mark.parametrize("name", REPOSITORIES)
def test_a_published_name_is_downloaded_once_and_found_offline(
    name: str, hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(UnavailableError) as caught:
        go_offline(patch)
        load(name, num_classes=3)
    assert "none of it is cached" in str(caught.value) and caught.value.exit_code == 69
    assert not hub.asked
    online = load(name, num_classes=3)
    files = {"config.json", "preprocessor_config.json", "model.safetensors"}
    assert hub.downloaded(name) == files, "neither pickles nor TensorFlow's"
    go_offline(monkeypatch)
    hub.asked.clear()
    offline = load(name, num_classes=3, revision=COMMIT)
    assert not hub.asked
    assert offline.origin is not None and online.origin is not None
    assert offline.origin.fingerprint == online.origin.fingerprint
    if name == DEIT:
        assert read_checkpoint(fetch_weights(name)).layout == "hf-deit"
    else:
        assert load(name).labels == LABELS and load(name).config.stride == (STRIDES[name],) * 2


def test_an_adapter_remembers_the_name_of_its_base(
    hub: Hub,
    cache: Path,
    sounds: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = petl.adapt(load(NAME, num_classes=2, revision=COMMIT, frames=36), petl.Linear())
    path = tmp_path / "a.safetensors"
    front = make_front_end(model)
    save_adapter(path, model, classes=("hum", "whistle"), multi_label=False, frontend=front)
    assert load_adapter(path).model.origin == model.origin
    go_offline(monkeypatch)
    assert main.run(["predict", str(path), str(sounds / "hum" / "0.wav"), "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["probabilities"]) == {"hum", "whistle"}
    assert main.run(["eval", str(path), str(sounds)]) == 0
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    assert main.run(["predict", str(path), str(sounds / "hum" / "0.wav")]) == 69
    error = capsys.readouterr().err
    assert NAME in error and "connect once" in error and "--base" in error


COMMANDS = {
    "convert": ["convert", NAME, "OUT/w.safetensors"],
    "doctor": ["doctor", "SOUNDS", "--base", NAME, "--no-labels", "--quiet"],
    "adapt": ["adapt", "SOUNDS", "--base", NAME, "--dry-run", "--no-labels", "--quiet"],
    "summary": ["summary", "folder", "--data.path", "SOUNDS", "--model.source", NAME],
    "plan": ["plan", "folder", "--model.source", NAME, "--topology", "cpu:4", *SMALL],
    "train": [
        "train",
        "folder",
        "--data.path",
        "SOUNDS",
        "--model.source",
        NAME,
        *SMALL,
        "--out",
        "OUT/run",
        "--data.cache",
        "OUT/cache",
        "--method",
        "linear",
        "--quiet",
    ],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_a_published_name(
    command: str,
    hub: Hub,
    cache: Path,
    sounds: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = [
        w.replace("SOUNDS", str(sounds)).replace("OUT", str(tmp_path)) for w in COMMANDS[command]
    ]
    with monkeypatch.context() as patch:
        go_offline(patch)
        assert main.run(words) == 69
        error = capsys.readouterr().err
        assert NAME in error and "connect once" in error and not hub.asked
    assert main.run(words) == 0, capsys.readouterr().err
    assert "model.safetensors" in hub.downloaded(NAME)


def test_a_plan_reads_the_shape_of_a_published_name(hub: Hub, cache: Path) -> None:
    shape = read_shape(Model(source=NAME, revision=COMMIT), 7)
    assert (shape.dim, shape.frames, shape.num_classes) == (64, 128, 7)


def test_what_the_hub_does_not_have_is_a_data_error(hub: Hub, cache: Path) -> None:
    with pytest.raises(DataError, match="nobody/nothing: no such repository"):
        fetch_weights("nobody/nothing")
    with pytest.raises(DataError, match=r"revision 'gone' of .*: no such revision"):
        fetch_weights(NAME, revision="gone")
    hub.repositories["some/text"] = {"README.md": b"", "sub/model.safetensors": b""}
    with pytest.raises(DataError, match=r"neither \.safetensors nor pytorch_model\.bin"):
        fetch_weights("some/text")
    content = hub.find(NAME)
    assert content is not None
    hub.repositories["some/pickle"] = {
        "pytorch_model.bin": b"x",
        "x.bin": b"",
        "config.json": b"{}",
    }
    path = fetch_weights("some/pickle")
    assert sorted(file.name for file in path.iterdir()) == ["config.json", "pytorch_model.bin"]


def test_an_unreachable_hub_falls_back_to_the_cache(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fetch_weights(NAME)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert fetch_weights(NAME) == path
    with pytest.raises(UnavailableError, match="cannot be reached"):
        fetch_weights(DEIT)


def test_offline_the_cached_revisions_are_named(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fetch_weights(NAME)
    go_offline(monkeypatch)
    with pytest.raises(UnavailableError) as caught:
        fetch_weights(NAME, revision="3" * 40)
    message = str(caught.value)
    assert "offline" in message and f"cached revisions: {COMMIT} (main)" in message
    assert "give the path" in message and "\n" not in message
    (path / "model.safetensors").unlink()
    with pytest.raises(UnavailableError, match="none of it is cached"):
        fetch_weights(NAME)  # half a snapshot


def test_a_sha256_is_compared(hub: Hub, cache: Path) -> None:
    path = fetch_weights(NAME)
    sha = hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
    assert fetch_weights(NAME, sha256=sha.upper()) == path
    with pytest.raises(DataError, match=f"sha256 is {sha}, expected {'0' * 64}.* revision="):
        fetch_weights(NAME, sha256="0" * 64)
    with pytest.raises(DataError, match="sha256"):
        fetch_weights(path / "model.safetensors", sha256="0" * 64)


def test_paths_and_other_names_are_not_asked_of_the_hub(
    hub: Hub, cache: Path, tmp_path: Path
) -> None:
    assert fetch_weights(tmp_path) == tmp_path
    with contextlib.chdir(tmp_path):
        for name in ("absent.pth", "a/b/c", "../up/x", "owner/", "a b/c", "x/..", ""):
            with pytest.raises(UsageError, match="not an owner/name"):
                fetch_weights(name)
    for name in ("weights/ast.pth", "a/b.safetensors", "./x/y", "~/x", "a/b/c"):
        with pytest.raises(DataError, match="no such file or folder"):
            load(name, num_classes=3)
    assert not hub.asked
