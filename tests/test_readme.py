"""The README does what it says: its Python runs, its commands and names exist."""

import re
import shlex
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import soundfile

import aatjax
from aatjax import petl
from aatjax.cli import commands, main
from aatjax.cli.arguments import ConfigChoice, SoundsChoice
from aatjax.cli.fields import replace_fields
from aatjax.cli.main import COMMANDS
from aatjax.config import Config
from aatjax.data.synthetic.synthesize import synthesize
from aatjax.petl import METHODS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md")), ROOT / "kernels" / "README.md"]


def blocks(marker: str) -> list[str]:
    return re.findall(rf"<!-- test: {marker} -->\n```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def sounds(tmp_path, monkeypatch):
    """A folder `my_sounds` of two classes and a file `dog.ogg`, in the working folder."""
    monkeypatch.chdir(tmp_path)
    for sound in ("bark", "clock"):
        folder = tmp_path / "my_sounds" / sound
        folder.mkdir(parents=True)
        for k in range(6):
            soundfile.write(folder / f"{k}.wav", synthesize(sound, k, seconds=1.0), 16000)
    shutil.copy(tmp_path / "my_sounds" / "bark" / "0.wav", tmp_path / "dog.ogg")
    return tmp_path


@pytest.mark.slow
def test_the_example_runs_and_leaves_an_adapter(sounds, capsys):
    (code,) = blocks("example")
    code = code.replace("epochs=20", "epochs=2")
    namespace: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "trainable share" in printed and "dog.ogg: " in printed
    adapter = aatjax.load_adapter(sounds / "adapter.safetensors")
    assert adapter.classes == ("bark", "clock")


def test_the_loop_of_ones_own_prints_what_the_page_says(capsys):
    (code,) = blocks("loop")
    expected = re.findall(r"^# (.*)$", code, re.MULTILINE)
    exec(compile(code, "README.md", "exec"), {})
    assert len(expected) == 1 and capsys.readouterr().out.splitlines() == expected


def read_contributing() -> list[str]:
    """The programs of the page: a method, a command."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_command_of_the_contributing_page_runs(monkeypatch, tmp_path, capfd):
    _, code = read_contributing()
    module = types.ModuleType("aatjax.cli.commands.loudness", code.split('"""')[1])
    exec(compile(code, "CONTRIBUTING.md", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(COMMANDS, "loudness", (module.GROUP, module.__doc__))
    assert module.GROUP in commands.GROUPS
    soundfile.write(tmp_path / "half.wav", np.full(1600, 0.5), 16000)
    half, missing = str(tmp_path / "half.wav"), str(tmp_path / "missing.wav")
    assert main.run(["loudness", half, missing]) == 65
    out, err = capfd.readouterr()
    assert out == f"{half}  0.5\n"
    assert f"{missing}: No such file" in err and "1 of 2 files could not be read" in err
    assert main.run(["loudness", "--decibels", half]) == 0
    assert capfd.readouterr().out == f"{half}  -6.021\n"


def test_the_method_of_the_contributing_page_can_be_adapted(monkeypatch, small_ast):
    code, _ = read_contributing()
    monkeypatch.setattr("aatjax.petl.base.METHODS", dict(METHODS))
    namespace = {"__name__": "mlp_scale"}
    exec(compile(code, "CONTRIBUTING.md", "exec"), namespace)
    model = aatjax.load(small_ast)
    adapted = aatjax.adapt(model, namespace["MlpScale"]())
    dim, depth = model.config.dim, model.config.depth
    linear = aatjax.adapt(model, petl.Linear())
    counts = [aatjax.summary(m).trainable for m in (adapted, linear)]
    assert counts[0] - counts[1] == dim * depth
    x = np.random.default_rng(0).normal(size=(1, model.config.frames, 128)).astype(np.float32)
    np.testing.assert_allclose(adapted(x), model(x), rtol=1e-5)
    masked = aatjax.load(small_ast, mask_padding=True, dtype="bfloat16")
    logits = aatjax.adapt(masked, namespace["MlpScale"]())(x, np.array([40]))
    np.testing.assert_array_equal(logits, masked(x, np.array([40])))


def test_both_commands_are_there_once_each():
    assert len(re.findall(r"^pip install \. && aatjax train$", README, re.MULTILINE)) == 1
    assert len(re.findall(r"^pip install '\.\[test\]' && pytest$", README, re.MULTILINE)) == 1


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200


def test_every_command_and_method_is_named():
    for command in COMMANDS:
        assert f"`{command}`" in README, f"README.md, Commands: add `{command}`"
        text = (DOCS / "commands.md").read_text()
        assert f"`aatjax {command}" in text, f"docs/commands.md: add a row of `aatjax {command}`"
    for name, method in METHODS.items():
        if not method.__module__.startswith("aatjax.petl."):
            continue  # of a benchmark or another test
        row = f"README.md, Methods: add a row with `{method.__name__}()` and `{name}`"
        assert f"`{name}`" in README and f"`{method.__name__}(" in README, row


def test_every_path_in_the_map_exists():
    picture = README.split("## The map")[1].split("```")[1]
    names = re.findall(r"([a-z_]+(?:\.py|/))", picture)
    assert len(names) > 15
    for name in names:
        assert any((place / name).exists() for place in (ROOT, ROOT / "aatjax")), name


def list_commands(page: Path) -> list[str]:
    """The commands in the programs and the sentences of a page; `NAME` stands for an argument."""
    text = page.read_text(encoding="utf-8")
    programs = re.findall(r"^```(?:sh)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for program in programs for line in program.replace("\\\n", " ").splitlines()]
    sentences = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", sentences)]
    found = [re.split(r" +#| & | && | > | \| ", line)[0] for line in lines]
    return [
        re.sub(r"\[([A-Z]+)\]", r"\1", line.replace(" ...", "")).partition(" ")[2]
        for line in found
        if re.match(r"aatjax [a-z]", line) and not re.search(r"--\S+ [A-Z]|[|\[]", line)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_are_understood(page: Path) -> None:
    for line in list_commands(page):
        words = shlex.split(line)
        if len(words) == 1 or words[0] == "help" or words[1] in ("--help", "--flags"):
            assert words[0] in [*COMMANDS, "help"], line
            continue
        if "mlp_scale" in words:  # the method that CONTRIBUTING.md adds
            continue
        values = main.find_command(*words).keywords  # pyright: ignore
        fields = values.get("fields", [])
        for choice in values.values():
            if isinstance(choice, ConfigChoice) and choice.config.islower():
                choice.load(words[0], fields)
            elif isinstance(choice, SoundsChoice):
                sounds = ["--data.path", *choice.path] if choice.path else []
                replace_fields(Config(petl=petl.Linear()), [*sounds, *fields], line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_tools_of_a_page_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / link).exists(), link
    for tool, command in re.findall(r"python (tools/\w+\.py) ([a-z][a-z-]*)", text):
        source = (ROOT / tool).read_text(encoding="utf-8")
        assert f'"{command}"' in source or f"def {command}(" in source, (tool, command)
