"""Which way the doors open: who may import whom, and what stays cheap."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOTS = {"aatjax": ROOT / "aatjax", "aatjax_kernels": ROOT / "kernels" / "aatjax_kernels"}
ROOTS["aatjax.configs"] = ROOT / "configs"

# What the modules of a room may import of the project; a name stands for all below it.
# `train` knows methods and models as such, and names no concrete one.
RULES = {
    "errors": (),
    "atomic": ("errors",),
    "ops": ("errors", "aatjax_kernels"),
    "models": ("errors", "ops", "models"),
    "surgery": ("errors",),
    "interrupt": ("errors",),
    "counts": ("errors", "surgery"),
    "flops": ("errors",),
    "audio": ("errors", "audio"),
    "data": ("errors", "atomic", "audio", "data"),
    "convert": ("errors", "atomic", "models", "convert"),
    "loading": ("errors", "surgery", "audio", "models", "convert"),
    "petl": ("errors", "ops", "surgery", "models", "petl"),
    "train": (
        *("errors", "atomic", "interrupt", "ops", "surgery", "counts", "audio", "data", "models"),
        *("loading", "convert", "train"),
        *("petl.base", "petl.adapt", "petl.Method", "petl.find"),
    ),
}
KERNELS = {"jax", "jaxtyping", "numpy"}
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


def forbidden(module: str, imports: set[str]) -> set[str]:
    """The project's own imports of a module that the rules do not allow."""
    room = module.removeprefix("aatjax.").split(".")[0]
    if module == "aatjax" or room not in RULES:
        return set()
    allowed = [name if name.startswith("aatjax_") else f"aatjax.{name}" for name in RULES[room]]
    ours = {name for name in imports if name.split(".")[0] in ("aatjax", "aatjax_kernels")}
    return {name for name in ours if not any(below(name, door) for door in allowed)}


def test_the_walk_sees_the_rooms():
    assert len(MODULES) > 50
    rooms = {name.split(".")[1] for name in MODULES if name.count(".")}
    assert set(RULES) <= rooms
    assert "aatjax.surgery" in MODULES["aatjax.petl.aat"]
    assert "aatjax_kernels.soft_moe" in MODULES["aatjax.ops"]
    assert "aatjax.configs.folder" in MODULES


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_what_its_room_may(module):
    assert not forbidden(module, MODULES[module])


@pytest.mark.parametrize("module", sorted(m for m in MODULES if m.startswith("aatjax_kernels")))
def test_kernels_know_only_jax(module):
    tops = {name.split(".")[0] for name in MODULES[module]}
    assert tops - sys.stdlib_module_names <= KERNELS | {"aatjax_kernels"}


def test_nothing_imports_the_command_line():
    users = {m for m, names in MODULES.items() if any(below(n, "aatjax.cli.main") for n in names)}
    assert not users


# Rooms that stand on everything else, and who enters them besides the verbs.
ENTRANCES = {
    "verbs": ("cli",),
    "comparing": (),
    "reporting": (),
    "exporting": (),
    "plan": (),
    "chaos": (),
    "serving": (),
    "demo": ("exporting",),
    "bench": ("comparing",),
    "doctor": ("choices",),
}


@pytest.mark.parametrize("room", list(ENTRANCES))
def test_rooms_at_the_top_are_entered_by_few(room: str) -> None:
    doors = [f"aatjax.{name}" for name in (room, "verbs", *ENTRANCES[room])]
    users = {m for m, names in MODULES.items() if any(below(n, f"aatjax.{room}") for n in names)}
    assert not {user for user in users if not any(below(user, door) for door in doors)}


def test_only_ops_opens_the_door_to_the_kernels():
    users = {
        module
        for module, names in MODULES.items()
        if any(below(n, "aatjax_kernels") for n in names) and below(module, "aatjax")
    }
    assert users == {"aatjax.ops"}


def test_no_module_has_a_name_that_says_nothing():
    assert not {m for m in MODULES if NAMELESS & set(re.split(r"[._]", m))}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("aatjax.errors", "from aatjax import surgery"),
        ("aatjax.models.ast", "from aatjax.surgery import Trainable"),
        ("aatjax.models.ast", "from ..surgery import Trainable"),
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


HEAVY = ("jax", "flax", "numpy", "scipy", "torch", "orbax", "grain", "librosa")


@pytest.mark.parametrize(
    "code",
    [
        "import aatjax; dir(aatjax)",
        "import sys; from aatjax.cli.main import run; assert run(['--help']) == 0",
        "import sys; from aatjax.cli.main import run; assert run(['--version']) == 0",
        "import sys; from aatjax.cli.main import run; assert run(['trian']) == 2",
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
