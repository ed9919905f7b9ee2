"""Bad calls of every command: one line, an exit code of the list, nothing half-written."""

import importlib
import json
import os
import re
import signal
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from adapter_files import TINY, trained, write_base

from aatjax import errors, petl
from aatjax.audio.frontend import FrontEnd
from aatjax.cli.arguments import list_own_flags
from aatjax.cli.main import COMMANDS, run
from aatjax.io.signals import _list_ends
from aatjax.train.adapter_file import save_adapter

ROOT = Path(__file__).parents[1]
CODES = {
    int(code)
    for code in re.findall(
        r"^\| (\d+) \|", (ROOT / "docs" / "commands.md").read_text(encoding="utf-8"), re.MULTILINE
    )
}


def test_the_list_of_exit_codes_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.SIG_DFL)  # also under nohup
    kinds = list(errors.AatjaxError.__subclasses__())
    for kind in kinds:
        kinds += kind.__subclasses__()
    own = {kind.exit_code for kind in kinds} | {128 + number for number in _list_ends()}
    assert own | {130, 141} == CODES
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = readme[readme.index("exit codes (") :].split("signals")[0]
    assert {int(code) for code in re.findall(r"\b\d+\b", listed)} == CODES


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a good adapter, good sounds, and all that can be wrong."""
    root = tmp_path_factory.mktemp("place")
    base = write_base(root / "base.safetensors", config=TINY)
    model = trained(base, petl.Linear(), classes=2)
    save_adapter(
        root / "good.safetensors",
        model,
        classes=("hum", "whistle"),
        multi_label=False,
        frontend=FrontEnd(frames=39),
    )
    rng = np.random.default_rng(0)
    for name in ("hum", "whistle"):
        (root / "sounds" / name).mkdir(parents=True)
        for number in range(6):
            sound = (3000 * rng.standard_normal(8000)).astype(np.int16)
            soundfile.write(root / "sounds" / name / f"{number}.wav", sound, 16000)
    (root / "empty_folder").mkdir()
    (root / "full_folder").mkdir()
    (root / "full_folder" / "mine.txt").write_text("keep me")
    (root / "empty").write_bytes(b"")
    (root / "text").write_text("hello, this is neither sound nor weights\n")
    (root / "zeros.safetensors").write_bytes(bytes(4096))
    whole = (root / "good.safetensors").read_bytes()
    (root / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    huge = struct.pack("<Q", 2**60) + b"{}"
    (root / "huge_header.safetensors").write_bytes(huge)
    changed = bytearray(whole)
    changed[-3] ^= 1
    (root / "changed.safetensors").write_bytes(bytes(changed))
    (root / "page.wav").write_text("<!DOCTYPE html><html><body>404</body></html>")
    (root / "pointer.wav").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
    )
    (root / "bad.json").write_text('{"petl": ')
    (root / "bad.py").write_text("config = 3\n")
    (root / "raises.py").write_text("raise ValueError('mine')\n")
    (root / "bad.csv").write_text("path,label\nnowhere.wav,hum\n")
    (root / "latin.csv").write_bytes("path,label\nsounds/hum/0.wav,caf\xe9\n".encode("latin-1"))
    with zipfile.ZipFile(root / "archive.zip", "w") as archive:
        archive.writestr("ESC-50-master/README.md", "x")
    (root / "dangling").symlink_to(root / "nowhere")
    (root / "loop").symlink_to(root / "loop")
    return root


@pytest.fixture(autouse=True)
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs there; what a call leaves behind is an error."""
    monkeypatch.chdir(place)
    before = sorted(str(path) for path in place.rglob("*"))
    yield
    assert sorted(str(path) for path in place.rglob("*")) == before


def check(arguments: list[str], code: int, pattern: str, capfd: pytest.CaptureFixture[str]) -> None:
    found = run(arguments)
    out, err = capfd.readouterr()
    assert found == code, (out, err)
    assert "Traceback" not in err and "error of this program" not in err, err
    said = [line for line in err.splitlines() if line.startswith("aatjax: ")]
    assert len(said) == 1 and len(said[0]) < 1500, err
    assert re.search(pattern, said[0]), said[0]
    assert code in CODES


# What is no adapter.

NO_ADAPTER = {
    "gone.safetensors": "no such file",
    "empty": "empty",
    "text": "text",
    "zeros.safetensors": "zeros.safetensors",
    "cut.safetensors": "cut.safetensors",
    "huge_header.safetensors": "huge_header.safetensors",
    "changed.safetensors": "changed.safetensors",
    "empty_folder": "empty_folder",
    "sounds": "sounds",
    "dangling": "dangling",
    "loop": "loop",
    "page.wav": "page.wav",
    "/dev/null": "/dev/null",
    "base.safetensors/x": "base.safetensors/x",
    "n" * 300: "nnn",
}
WITH_ADAPTER = {
    "predict": ["sounds/hum/0.wav"],
    "eval": ["sounds"],
    "report": ["sounds", "--out", "r.html"],
    "export": ["exported", "--to", "safetensors"],
    "verify": [],
    "demo": ["--no-browser"],
}


@pytest.mark.parametrize("name", NO_ADAPTER, ids=lambda name: name[:30])
@pytest.mark.parametrize("command", WITH_ADAPTER)
def test_what_is_no_adapter(command: str, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    check([command, name, *WITH_ADAPTER[command]], 65, NO_ADAPTER[name], capfd)


# What is no weights.

NO_WEIGHTS = [name for name in NO_ADAPTER if name != "changed.safetensors"]
WITH_WEIGHTS = {
    "convert": ["out.safetensors"],
    "predict": ["sounds/hum/0.wav"],
}


@pytest.mark.parametrize("name", NO_WEIGHTS, ids=lambda name: name[:30])
def test_what_is_no_weights(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    check(["convert", name, "out.safetensors"], 65, NO_ADAPTER[name], capfd)


@pytest.mark.parametrize("name", NO_WEIGHTS, ids=lambda name: name[:30])
@pytest.mark.parametrize("command", ["predict", "eval", "verify"])
def test_what_is_no_backbone(command: str, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = [command, "good.safetensors", *WITH_ADAPTER[command], "--base", name]
    check(arguments, 65, NO_ADAPTER[name], capfd)


# What is no set of labelled sounds.

NO_SOUNDS = {
    "gone": "no such file",
    "empty_folder": "empty_folder",
    "full_folder": "full_folder",
    "text": "text",
    "bad.csv": "bad.csv",
    "latin.csv": "latin.csv",
    "dangling": "dangling",
    "loop": "loop",
    "/dev/null": "/dev/null",
    "good.safetensors": "good.safetensors",
}
WITH_SOUNDS = {
    "adapt": lambda name: ["adapt", name, "--out", "run", "--quiet"],
    "doctor": lambda name: ["doctor", name, "--quiet"],
    "eval": lambda name: ["eval", "good.safetensors", name],
    "report": lambda name: ["report", "good.safetensors", name, "--out", "r.html"],
    "train": lambda name: ["train", "folder", "--data", name, "--out", "run", "--quiet"],
    "summary": lambda name: ["summary", "folder", "--data", name],
}


@pytest.mark.parametrize("name", NO_SOUNDS)
@pytest.mark.parametrize("command", WITH_SOUNDS)
def test_what_is_no_labelled_sounds(
    command: str, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    check(WITH_SOUNDS[command](name), 65, NO_SOUNDS[name], capfd)


@pytest.mark.parametrize(
    "name", ["gone.wav", "empty", "page.wav", "pointer.wav", "empty_folder", "/dev/null", "x*.wav"]
)
@pytest.mark.parametrize("flags", [[], ["--segments"], ["--csv"]], ids=str)
def test_what_is_no_sound(flags: list[str], name: str, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["predict", "good.safetensors", name, *flags]
    assert run(arguments) == 65
    out, err = capfd.readouterr()
    assert name.rstrip("*.wav") in err and "Traceback" not in err and "program" not in err
    assert not out or flags == ["--csv"]


# What is no config.


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("gone.py", "gone.py: no such"),
        ("gone.json", "gone.json"),
        ("bad.json", "bad.json"),
        ("bad.py", "bad.py: does not bind"),
        ("raises.py", "raises.py.*mine"),
        ("sounds", "is a folder, not a config"),
        ("defualt", "did you mean 'default'"),
        ("", "no config ''"),
    ],
)
@pytest.mark.parametrize("command", ["train", "summary", "compare", "plan"])
def test_what_is_no_config(
    command: str, name: str, pattern: str, capfd: pytest.CaptureFixture[str]
) -> None:
    check([command, name], 2, pattern, capfd)


# Flags.

NUMBERS = {
    "train": ["stuck-after", "draws", "processes", "process"],
    "compare": ["budget", "seeds"],
    "plan": ["per-device", "classes"],
    "methods": ["frames", "classes"],
    "bench flops": ["frames", "classes"],
    "bench step": ["frames", "classes", "batch-size", "rounds"],
    "bench scaling": ["budget", "batch-size", "rounds"],
}
NEEDED = {
    "predict": ["good.safetensors", "sounds/hum/0.wav"],
    "doctor": ["sounds"],
    "export": ["good.safetensors", "exported", "--to", "hf"],
    "convert": ["base.safetensors", "out.safetensors"],
    "demo": ["good.safetensors", "--no-browser"],
    "serve": ["."],
    "chaos": ["default", "--out", "chaos"],
    "prepare": ["esc50"],
}
NUMBERS |= {
    "predict": ["top", "batch-size", "hop"],
    "doctor": ["frames", "show", "workers"],
    "export": ["tolerance"],
    "convert": ["frames"],
    "demo": ["port"],
    "serve": ["port", "batch-size", "queue", "wait", "timeout", "max-seconds"],
    "chaos": ["interruptions", "seed"],
    "prepare": ["max-bad", "workers"],
}


@pytest.mark.parametrize("value", ["-1", "nan", "many", "1e400"])
@pytest.mark.parametrize(
    ("command", "flag"), [(command, flag) for command, flags in NUMBERS.items() for flag in flags]
)
def test_numbers_that_are_none(
    command: str, flag: str, value: str, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [*command.split(), *NEEDED.get(command, []), f"--{flag}", value]
    check(arguments, 2, f"--{flag}", capfd)


FIELDS = [
    "training.epochs",
    "training.batch-size",
    "training.seed",
    "training.save-every",
    "training.threads",
    "optim.lr",
    "optim.warmup-steps",
    "optim.weight-decay",
    "data.seed",
    "data.valid-fraction",
    "data.test-fraction",
    "data.shots",
    "data.max-bad",
    "model.frames",
    "augment.mixup",
    "augment.freq-mask",
    "petl.num-experts",
]


@pytest.mark.parametrize("value", ["-1", "nan", "many"])
@pytest.mark.parametrize("field", FIELDS)
def test_fields_that_are_no_numbers(
    field: str, value: str, capfd: pytest.CaptureFixture[str]
) -> None:
    check(["train", "default", f"--{field}", value, "--out", "run"], 2, f"--{field}", capfd)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_a_flag_that_is_not_there(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    check([command, *NEEDED.get(command, []), "--no-such-flag", "3"], 2, ".", capfd)


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["train", "--optim.epochs", "3"], "did you mean '--training.epochs'"),
        (["train", "--petl.rank", "4"], "--method lora"),
        (["train", "--epoch", "3"], "did you mean '--epochs'"),
        (["train", "--optim.schedule", "cosin"], "did you mean 'cosine'"),
        (["train", "--method", "lorra"], "did you mean 'lora'"),
        (
            ["train", "--allow-change", "optm.lr", "--out", "run"],
            "--allow-change: there is no field 'optm.lr', did you mean 'optim.lr'",
        ),
        (["train", "--method", ""], "unknown method ''"),
        (["adapt", "sounds", "--method", "lorra"], "did you mean 'lora'"),
        (["export", "good.safetensors", "x", "--to", "tflite"], "--to 'tflite': no such choice"),
        (["export", "good.safetensors", "x", "--to", "hff"], "did you mean 'hf'"),
        (["predict", "good.safetensors", "text", "--to", "rttm"], "--segments"),
        (["predict", "good.safetensors", "text", "--json", "--csv"], "exclude each other"),
        (["eval", "good.safetensors", "--data.format", "folder"], "name the sounds too"),
        (["doctor", "sounds", "--lr", "3"], "--optim.lr is of no use here"),
        (["completion", "csh"], "'csh': no such choice"),
        (["bench", "steps"], "did you mean 'step'"),
        (["plan"], "--topology"),
        (["plan", "--topology", "v9:2x2"], "v9"),
        (["plan", "--topology", "cpu:0"], "cpu:0"),
        (["prepare", "esc51", "--from", "x"], "did you mean 'esc50'"),
        (["recipes", "esc50_aatt"], "did you mean 'esc50_aat'"),
        (["compare", "default"], "two rows"),
        (["compare", "--methods", "lora", "lorra"], "did you mean 'lora'"),
    ],
)
def test_other_wrong_flags(
    arguments: list[str], pattern: str, capfd: pytest.CaptureFixture[str]
) -> None:
    check(arguments, 2, pattern, capfd)


# Places that cannot be written.

NO_PLACE = ["text/run", "/dev/null/run", "/proc/run", "loop/run"]
WRITERS = {
    "train": lambda out: ["train", "default", "--quiet", "--out", out],
    "adapt": lambda out: ["adapt", "sounds", "--quiet", "--out", out],
    "report": lambda out: ["report", "good.safetensors", "sounds", "--out", out],
    "export": lambda out: ["export", "good.safetensors", out, "--to", "safetensors"],
    "convert": lambda out: ["convert", "base.safetensors", f"{out}.safetensors"],
    "predict": lambda out: ["predict", "good.safetensors", "sounds/hum/0.wav", "--out", out],
}


@pytest.mark.parametrize("out", NO_PLACE)
@pytest.mark.parametrize("command", WRITERS)
def test_places_that_cannot_be_written(
    command: str, out: str, capfd: pytest.CaptureFixture[str]
) -> None:
    check(WRITERS[command](out), 74, os.path.dirname(out), capfd)


# Dry runs, and results as JSON.

GOOD = {
    "train": ["train", "folder", "--data", "sounds", "--base", "base.safetensors", "--out", "run"],
    "adapt": ["adapt", "sounds", "--base", "base.safetensors", "--no-labels", "--out", "run"],
    "compare": [
        *("compare", "folder", "--methods", "linear", "lora", "--data.path", "sounds"),
        *("--base", "base.safetensors", "--out", "run"),
    ],
    "eval": ["eval", "good.safetensors", "sounds"],
    "report": ["report", "good.safetensors", "sounds", "--out", "r.html"],
    "export": ["export", "good.safetensors", "exported", "--to", "safetensors"],
    "convert": ["convert", "base.safetensors", "out.safetensors"],
    "predict": ["predict", "good.safetensors", "sounds", "--out", "p.csv", "--csv"],
    "prepare": ["prepare", "esc50", "--from", "archive.zip"],
    "chaos": ["chaos", "default", "--out", "run"],
}


@pytest.mark.parametrize("command", GOOD)
def test_a_dry_run_computes_and_writes_nothing(
    command: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for work in ("experiments.run.fit", "train.evaluation.score_clips"):
        monkeypatch.setattr(f"aatjax.{work}", None)
    assert run([*GOOD[command], "--dry-run"]) == 0, capfd.readouterr().err
    out, err = capfd.readouterr()
    assert "dry run: all is well so far" in out.splitlines()[-1]
    assert "Traceback" not in err


def test_a_dry_run_finds_what_the_run_would_find(capfd: pytest.CaptureFixture[str]) -> None:
    best = ["--training.select", "best", "--dry-run"]
    check([*GOOD["train"], *best], 2, "needs validation clips", capfd)
    check([*GOOD["compare"], *best], 2, "needs validation clips", capfd)
    vulkan = [*GOOD["export"][:3], "--to", "stablehlo", "--platforms", "vulkan", "--dry-run"]
    check(vulkan, 2, "--platforms vulkan: give one or more of", capfd)
    check([*GOOD["export"], "--check", "text", "--dry-run"], 65, "text", capfd)
    check([*GOOD["chaos"][:3], "full_folder", "--dry-run"], 2, "is not empty", capfd)


def test_every_command_that_writes_has_a_dry_run() -> None:
    for name in COMMANDS:
        module = importlib.import_module(f"aatjax.cli.commands.{name}")
        for function in (getattr(module, "KINDS", None) or {"": module.main}).values():
            flags, _ = list_own_flags(function)
            if "--out" in flags:
                assert {"--dry-run", "--json"} <= set(flags), name


@pytest.mark.parametrize(
    ("arguments", "fields"),
    [
        (["verify", "good.safetensors"], {"path", "largest", "allowed", "by"}),
        (["summary", "default"], {"trainable", "frozen", "rows"}),
        (["eval", "good.safetensors", "sounds"], {"accuracy"}),
        (["convert", "base.safetensors", "{tmp}/o.safetensors"], {"out", "form", "parameters"}),
        (["export", "good.safetensors", "{tmp}/x", "--to", "safetensors"], {"folder", "largest"}),
        (["report", "good.safetensors", "sounds", "--out", "{tmp}/r.html"], {"report", "bytes"}),
        (["recipes"], set()),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_results_as_json(
    arguments: list[str], fields: set[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    assert run([*given, "--json"]) == 0, capfd.readouterr().err
    found = json.loads(capfd.readouterr().out)
    assert fields <= set(found)


def test_an_export_is_replaced_only_when_asked(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "exported"
    call = ["export", "good.safetensors", str(out), "--to", "safetensors"]
    assert run(call) == 0
    before = sorted(path.name for path in out.iterdir())
    capfd.readouterr()
    check(call, 74, "holds an export: choose another name, or replace it \\(--force\\)", capfd)
    (out / "README.md").unlink()
    assert run([*call, "--force"]) == 0
    assert sorted(path.name for path in out.iterdir()) == before
    capfd.readouterr()
    full = ["export", "good.safetensors", "full_folder", "--to", "safetensors", "--force"]
    check(full, 74, "exists and is not an empty folder", capfd)
