"""The README does what it says: its Python runs, its commands and names exist."""

import re
import shutil
from pathlib import Path

import pytest
import soundfile

import aatjax
from aatjax.cli.main import COMMANDS
from aatjax.data.synthetic.synthesize import synthesize
from aatjax.petl import METHODS

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(marker: str) -> list[str]:
    return re.findall(rf"<!-- test: {marker} -->\n```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def sounds(tmp_path, monkeypatch):
    """A folder `my_sounds` of two classes and a file `dog.wav`, in the working folder."""
    monkeypatch.chdir(tmp_path)
    for sound in ("bark", "clock"):
        folder = tmp_path / "my_sounds" / sound
        folder.mkdir(parents=True)
        for k in range(6):
            soundfile.write(folder / f"{k}.wav", synthesize(sound, k, seconds=1.0), 16000)
    shutil.copy(tmp_path / "my_sounds" / "bark" / "0.wav", tmp_path / "dog.wav")
    return tmp_path


@pytest.mark.slow
def test_the_example_runs_and_leaves_an_adapter(sounds, capsys):
    (code,) = blocks("example")
    code = code.replace("epochs=20", "epochs=2")
    namespace: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "trainable share" in printed and "dog.wav: " in printed
    adapter = aatjax.load_adapter(sounds / "adapter.safetensors")
    assert adapter.classes == ("bark", "clock")


def test_both_commands_are_there_once_each():
    assert len(re.findall(r"^pip install \. && aatjax train$", README, re.MULTILINE)) == 1
    assert len(re.findall(r"^pip install '\.\[test,tpu\]' && pytest$", README, re.MULTILINE)) == 1


def test_every_verb_and_method_is_named():
    for verb in COMMANDS:
        assert f"`aatjax {verb}" in README, verb
    for name, method in METHODS.items():
        assert f"`{name}`" in README and f"`{method.__name__}(" in README


def test_every_path_in_the_picture_of_the_house_exists():
    root = Path(__file__).parents[1]
    picture = README.split("## The house")[1].split("```")[1]
    names = re.findall(r"([a-z_]+(?:\.py|/))", picture)
    assert len(names) > 15
    for name in names:
        places = [root / name, root / "aatjax" / name]
        assert any(place.exists() for place in places), name
