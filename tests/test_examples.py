"""The programs of examples/ run, each in a folder and a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "examples"
EXPECTED = {
    "arrays_in": "(16, 128) (16,) 0",
    "from_and_to_transformers": "{0: 'frog', 1: 'rain', 2: 'siren'}",
    "inside_an_adapter": "Hessian times vector",
    "kernels_in_equinox": "output (2, 100, 64)",
    "own_loop": "('frog', 'rain', 'siren')",
    "own_mesh": "axis_types=(Explicit,)",
    "own_method": "Gate(tag='', width=4)",
    "sweep_by_vmap": "rate 1e-02  loss",
}


def test_every_example_is_listed():
    assert {path.stem for path in FOLDER.glob("*.py")} == set(EXPECTED)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n != "kernels_in_equinox")) for n in EXPECTED],
)
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert EXPECTED[name] in done.stdout
