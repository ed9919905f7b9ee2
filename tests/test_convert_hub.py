"""Hub names: the cache offline, revisions, and the sha256 of what was fetched. No network."""

import hashlib

import pytest
from ast_oracle import random_hf_ast, write_layout
from huggingface_hub import constants

from aatjax import load
from aatjax.convert import fetch_weights, read_checkpoint
from aatjax.errors import DataError, UnavailableError, UsageError
from aatjax.io import hub

NAME, FIRST, SECOND = "someone/small-ast", "1" * 40, "2" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache as huggingface_hub lays it out: blobs, snapshots of links, refs."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "cache"
    repository = folder / "models--someone--small-ast"
    for seed, commit in enumerate((FIRST, SECOND)):
        files = write_layout(random_hf_ast(seed), "hf", tmp_path / commit)
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (repository / "blobs").mkdir(exist_ok=True)
        for file in files.iterdir():
            blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            blob.write_bytes(file.read_bytes())
            (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(SECOND)
    return folder


def test_f30_offline_from_the_cache(cache):
    path = fetch_weights(NAME, cache_dir=cache)
    assert path.name == SECOND
    assert read_checkpoint(path).layout == "hf-ast"
    assert fetch_weights(NAME, revision=FIRST, cache_dir=cache).name == FIRST


def test_f30_offline_and_not_cached(cache):
    with pytest.raises(UnavailableError) as caught:
        fetch_weights(NAME, revision="3" * 40, cache_dir=cache)
    message = str(caught.value)
    assert "offline" in message and f"{FIRST}, {SECOND} (main)" in message
    assert "pass the path" in message and "\n" not in message and caught.value.exit_code == 69
    with pytest.raises(UnavailableError, match="none of it is cached"):
        fetch_weights("someone/other", cache_dir=cache)


def test_f30_half_a_snapshot_is_not_in_the_cache(cache):
    (cache / "models--someone--small-ast/snapshots" / SECOND / "model.safetensors").unlink()
    with pytest.raises(UnavailableError, match=f"cached revisions: {FIRST}"):
        fetch_weights(NAME, cache_dir=cache)


def test_f31_sha256(cache):
    path = fetch_weights(NAME, cache_dir=cache)
    sha = hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
    assert fetch_weights(NAME, cache_dir=cache, sha256=sha.upper()) == path
    with pytest.raises(DataError, match=f"sha256 is {sha}, expected {'0' * 64}.* revision="):
        fetch_weights(NAME, cache_dir=cache, sha256="0" * 64)
    with pytest.raises(DataError, match="sha256"):
        fetch_weights(path / "model.safetensors", sha256="0" * 64)


def test_paths_come_back(tmp_path):
    assert fetch_weights(tmp_path) == tmp_path


@pytest.mark.parametrize("name", ["absent.pth", "a/b/c", "../up/x", "owner/", "a b/c", "x/..", ""])
def test_what_is_neither_path_nor_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="not an owner/name"):
        fetch_weights(name)


def test_unreachable_hub_falls_back_to_the_cache(cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def unreachable(*_):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(hub, "_listing", unreachable)
    assert fetch_weights(NAME, cache_dir=cache).name == SECOND
    with pytest.raises(UnavailableError, match="cannot be reached"):
        fetch_weights("someone/other", cache_dir=cache)


@pytest.mark.parametrize(
    "name",
    [
        "MIT/ast-finetuned-audioset-10-10-0.4593",
        "MIT/ast-finetuned-audioset-16-16-0.442",
        "MIT/ast-finetuned-audioset-14-14-0.443",
        "MIT/ast-finetuned-audioset-12-12-0.447",
        "MIT/ast-finetuned-speech-commands-v2",
        "facebook/deit-base-distilled-patch16-384",
    ],
)
def test_published_names_are_asked_of_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UnavailableError, match="none of it is cached"):
        load(name, num_classes=3)


@pytest.mark.parametrize("name", ["weights/ast.pth", "a/b.safetensors", "./x/y", "~/x", "a/b/c"])
def test_missing_paths_are_not_asked_of_the_hub(name):
    with pytest.raises(DataError, match="no such file or folder"):
        load(name, num_classes=3)


def test_what_is_fetched():
    both = ["config.json", "model.safetensors", "pytorch_model.bin", "runs/x.bin"]
    assert "*.safetensors" in hub._patterns(both, "x")
    assert not any("bin" in pattern for pattern in hub._patterns(both, "x"))
    assert "pytorch_model*.bin" in hub._patterns(["pytorch_model.bin"], "x")
    with pytest.raises(DataError, match="neither"):
        hub._patterns(["README.md", "sub/model.safetensors"], "x")
