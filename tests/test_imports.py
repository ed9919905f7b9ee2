"""Import rules: which package may import which, and what stays cheap to import."""

import ast
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOTS = {"aatjax": ROOT / "aatjax", "aatjax_kernels": ROOT / "kernels" / "aatjax_kernels"}
ROOTS["aatjax.configs"] = ROOT / "configs"

# The packages from bottom to top: each may import those below it and, but for the base of the
# house, itself. A package or module without a place here fails `test_every_room_has_a_place`.
FLOORS = (
    ("errors",),
    ("io", "kernels"),
    ("ops", "surgery", "audio"),
    ("models",),
    ("petl", "convert", "data"),
    ("train",),
    ("doctor",),
    ("inference", "config"),
    ("analysis", "export"),
    ("experiments",),
    ("configs",),
    ("reports",),
    ("cli",),
)
# Doors that stay shut although they lead down, and what alone may pass them.
SHUT = {
    ("surgery", "io"): (),
    ("surgery", "kernels"): (),
    ("models", "surgery"): (),
    ("audio", "kernels"): (),
    ("models", "io"): ("io.digest", "io.json_fields"),
    ("models", "audio"): (),
    ("models", "kernels"): (),
    ("petl", "kernels"): (),
    ("petl", "io"): ("io.json_fields",),
    ("petl", "audio"): (),
    ("data", "models"): (),
    ("data", "ops"): (),
    ("convert", "kernels"): (),
    ("train", "petl"): ("petl.base", "petl.adapt", "petl.Method", "petl.find_method"),
}
# Modules that one more room is open to.
EXEMPT = {
    ("aatjax.models.ast", "surgery"),  # in training mode, what is frozen stays in evaluation mode
    ("aatjax.models.summary", "surgery"),  # counts what is trainable
    ("aatjax.config", "configs"),  # finds a config by its name
}
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
KERNELS = {"jax", "jaxtyping", "numpy", "tokamax"}  # the last one where it is installed
NAMELESS = {"utils", "util", "common", "helpers", "helper", "manager", "managers", "misc"}


def name_of(path: Path, package: str, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join((package, *(part for part in parts if part != "__init__")))


def imports_of(source: str, module: str, *, is_package: bool = False) -> set[str]:
    """Absolute dotted names that a module's source imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                kept = parts[: len(parts) - node.level + is_package]
                base = ".".join([*kept, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and "import_module" in ast.dump(node.func):
            found |= {
                arg.value
                for arg in node.args
                if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
            }
    return found


def walk() -> dict[str, set[str]]:
    modules: dict[str, set[str]] = {}
    for package, root in ROOTS.items():
        for path in sorted(root.rglob("*.py")):
            name = name_of(path, package, root)
            is_package = path.name == "__init__.py"
            modules[name] = imports_of(path.read_text(), name, is_package=is_package)
    return modules


MODULES = walk()


def below(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}.")


def room_of(name: str) -> str:
    """The package or loose module that a dotted name belongs to."""
    if name.split(".")[0] == "aatjax_kernels":
        return "kernels"
    return name.removeprefix("aatjax").strip(".").split(".")[0]


def forbidden(module: str, imports: set[str]) -> set[str]:
    """The project's own imports of a module that its floor does not allow."""
    room = room_of(module)
    wrong = set()
    for name in imports:
        if name.split(".")[0] not in ("aatjax", "aatjax_kernels"):
            continue
        other = room_of(name)
        if other == room or (module, other) in EXEMPT:
            continue
        passes = SHUT.get((room, other))
        if passes is not None:
            if not any(below(name, f"aatjax.{door}") for door in passes):
                wrong.add(name)
        elif FLOOR_OF.get(other, len(FLOORS)) >= FLOOR_OF[room]:
            wrong.add(name)
    return wrong


def test_the_walk_sees_the_rooms():
    assert len(MODULES) > 50
    assert "aatjax.surgery" in MODULES["aatjax.petl.aat"]
    assert "aatjax_kernels.soft_moe" in MODULES["aatjax.ops"]
    assert "aatjax.configs.folder" in MODULES


def test_every_room_has_a_place():
    rooms = {room_of(name) for name in MODULES} - {"", "weights", "__main__"}
    assert rooms == set(FLOOR_OF)


def test_the_floors_of_the_contributing_page_are_these():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (picture,) = re.findall(r"^```\n(errors <.*?)```", page, re.MULTILINE | re.DOTALL)
    floors = [tuple(re.findall(r"\w+", floor)) for floor in picture.split("<")]
    assert floors == list(FLOORS)


def test_few_modules_stand_outside_a_package():
    assert len(list((ROOT / "aatjax").glob("*.py"))) <= 6


def build_wheel(folder: Path, version: str) -> zipfile.ZipFile:
    command = [sys.executable, "-m", "hatchling", "build", "-t", f"wheel:{version}", "-d", folder]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel)


def test_the_wheel_holds_every_module(tmp_path):
    expected = {
        "/".join((*package.split("."), *module.relative_to(root).parts))
        for package, root in ROOTS.items()
        for module in root.rglob("*.py")
    }
    held = set(build_wheel(tmp_path, "standard").namelist())
    assert {name for name in held if name.endswith(".py")} == expected
    assert {"aatjax/py.typed", "aatjax_kernels/py.typed"} <= held


def test_an_editable_install_is_a_list_of_folders_that_editors_follow(tmp_path):
    wheel = build_wheel(tmp_path, "editable")
    (name,) = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert name.endswith(".pth")
    folders = wheel.read(name).decode().splitlines()
    assert {Path(folder) for folder in folders} == {ROOT, ROOT / "kernels"}


def test_the_configs_of_a_checkout_and_of_a_wheel_have_one_name():
    code = "from aatjax.configs import esc; from aatjax.config import list_configs as list; "
    code += "print(esc.__file__, *list())"
    paths = os.pathsep.join(str(folder) for folder in (ROOT, ROOT / "kernels"))
    environment = {**os.environ, "PYTHONPATH": paths}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
    )
    file, *names = run.stdout.split()
    assert Path(file) == ROOT / "configs" / "esc.py"
    assert set(names) == {p.stem for p in (ROOT / "configs").glob("*.py")} - {"recipes"}


@pytest.mark.parametrize("room", [room for floor in FLOORS for room in floor])
def test_a_room_imports_only_from_below(room: str) -> None:
    modules = {name: found for name, found in MODULES.items() if room_of(name) == room}
    assert modules
    wrong = {name: forbidden(name, found) for name, found in modules.items()}
    assert not {name: found for name, found in wrong.items() if found}


@pytest.mark.parametrize("module", sorted(m for m in MODULES if m.startswith("aatjax_kernels")))
def test_kernels_know_only_jax(module):
    tops = {name.split(".")[0] for name in MODULES[module]}
    assert tops - sys.stdlib_module_names <= KERNELS | {"aatjax_kernels"}


def test_nothing_imports_the_command_line():
    users = {m for m, names in MODULES.items() if any(below(n, "aatjax.cli.main") for n in names)}
    assert users == {"aatjax.__main__"}


def test_only_ops_opens_the_door_to_the_kernels():
    users = {
        module
        for module, names in MODULES.items()
        if any(below(n, "aatjax_kernels") for n in names) and below(module, "aatjax")
    }
    assert {room_of(module) for module in users} == {"ops"}


def test_no_module_has_a_name_that_says_nothing():
    assert not {m for m in MODULES if NAMELESS & set(re.split(r"[._]", m))}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("aatjax.errors", "from aatjax import surgery"),
        ("aatjax.models.scan", "from aatjax.surgery import Frozen"),
        ("aatjax.models.scan", "from ..surgery import Frozen"),
        ("aatjax.audio.fbank", "import aatjax.data"),
        ("aatjax.train.loop", "from aatjax.petl.aat import AAT"),
        ("aatjax.train.loop", "def f():\n    from aatjax.petl import SoftMoA"),
        ("aatjax.convert.tensor_files", "from aatjax import loading"),
        ("aatjax.petl.base", "import importlib\nimportlib.import_module('aatjax.train.loop')"),
        ("aatjax.surgery", "from aatjax_kernels import soft_moe"),
    ],
)
def test_the_rules_catch_a_wrong_door(module, source):
    assert forbidden(module, imports_of(source, module))


def test_a_room_without_a_place_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODULES, "aatjax.extras.thing", set())
    with pytest.raises(AssertionError):
        test_every_room_has_a_place()


HEAVY = ("jax", "flax", "numpy", "scipy", "torch", "orbax", "grain", "librosa")


@pytest.mark.parametrize(
    "code",
    [
        "import aatjax; dir(aatjax)",
        "import sys; from aatjax.cli.main import run; assert run(['--help']) == 0",
        "import sys; from aatjax.cli.main import run; assert run(['--version']) == 0",
        "import sys; from aatjax.cli.main import run; assert run(['trian']) == 2",
        "from aatjax.cli.main import COMMANDS, run\n"
        "for n in COMMANDS: assert run([n, '--help']) == 0",
    ],
)
def test_import_and_help_are_cheap(code):
    report = f"import sys; print('heavy:', [m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_every_public_name_is_there():
    import aatjax

    for name in aatjax.__all__:
        assert getattr(aatjax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Adaptor'"):
        aatjax.Adaptor  # noqa: B018
