"""Settings of the process: memory, programs, cores, and what a processor multiplies."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from aatjax.convert.load import load
from aatjax.io import host
from aatjax.train.sharding import choose_devices


def run_python(code: str, **environment: str) -> str:
    """The output of a new process, in which nothing of malloc or JAX is set."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MALLOC_", "JAX_", "XLA_")) and name != "GLIBC_TUNABLES"
    }
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env={**kept, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


FAULTS = """
import resource, numpy as np
from aatjax.io.host import keep_memory
print(keep_memory())
def count():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        np.ones(4_000_000)  # 32 MB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
count()
print(count())
"""


@pytest.mark.skipif(host.platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_freed_memory_is_not_mapped_again():
    done, faults = run_python(FAULTS).split()
    assert done == "True" and int(faults) < 100
    done, faults = run_python(FAULTS, MALLOC_MMAP_MAX_="65536").split()
    assert done == "False" and int(faults) > 200  # 20 times 7,800 pages, or 16 huge ones


PREPARE = """
import os, sys, json
{before}
from aatjax.io.host import prepare_process
prepare_process()
names = [name for name in os.environ if name.startswith("JAX_")]
print(json.dumps({{name: os.environ[name] for name in names}}))
"""


def test_a_command_uses_every_core_and_keeps_programs(tmp_path):
    found = json.loads(run_python(PREPARE.format(before=""), XDG_CACHE_HOME=str(tmp_path)))
    assert found["JAX_NUM_CPU_DEVICES"] == str(host.count_cores())
    assert found["JAX_COMPILATION_CACHE_DIR"].startswith(str(tmp_path / "aatjax" / "compiled"))
    assert found["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "0"


def test_what_the_environment_says_is_kept():
    code = PREPARE.format(before="")
    asked = {"JAX_NUM_CPU_DEVICES": "1", "JAX_COMPILATION_CACHE_DIR": "/elsewhere"}
    found = json.loads(run_python(code, **asked))
    assert asked.items() <= found.items()
    flags = "--xla_force_host_platform_device_count=3"
    assert "JAX_NUM_CPU_DEVICES" not in json.loads(run_python(code, XLA_FLAGS=flags))
    assert json.loads(run_python(PREPARE.format(before="import jax"))) == {}


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path):
    (tmp_path / "file").touch()
    code = PREPARE.format(before="import warnings; warnings.simplefilter('error')")
    code = code.replace(
        "prepare_process()\n", "try: prepare_process()\nexcept UserWarning as e: print(e)\n"
    )
    said, found = run_python(code, XDG_CACHE_HOME=str(tmp_path / "file")).splitlines()
    assert "compiled programs cannot be kept here (Not a directory)" in said
    assert "JAX_COMPILATION_CACHE_DIR" not in json.loads(found)


def test_cores_of_a_container(tmp_path):
    limit = tmp_path / "cpu.max"
    for text, cores in (("150000 100000\n", 2), ("100000 100000\n", 1), ("max 100000\n", None)):
        limit.write_text(text)
        assert host.read_quota(limit) == (cores or sys.maxsize)
    assert host.read_quota(tmp_path / "none") == sys.maxsize
    assert 1 <= host.count_cores() <= (os.cpu_count() or 1)


DEVICES = jax.devices()  # before a test changes XLA_FLAGS
CPU = SimpleNamespace(platform="cpu")


@pytest.mark.parametrize(
    ("about", "native"),
    [
        ({"flags": "sse2 avx2 fma"}, False),
        ({"flags": "avx2 avx512f avx512_bf16"}, True),
        ({"flags": "avx2 avx512f amx_bf16 amx_tile"}, True),
        ({"Features": "asimd bf16 i8mm"}, True),
        ({}, False),
    ],
)
def test_processors_that_multiply_bfloat16(monkeypatch, about, native):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr(host, "read_cpu_info", lambda: about)
    assert host.multiplies_bfloat16(CPU) == native
    assert load("embedded", dtype="auto").config.dtype == ("bfloat16" if native else "float32")
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_max_isa=AVX2")
    assert not host.multiplies_bfloat16(CPU)


def test_accelerators_that_multiply_bfloat16():
    def gpu(capability):
        return SimpleNamespace(platform="gpu", compute_capability=capability)

    assert host.multiplies_bfloat16(SimpleNamespace(platform="tpu"))
    assert host.multiplies_bfloat16(gpu("9.0")) and host.multiplies_bfloat16(gpu("8.0"))
    assert not host.multiplies_bfloat16(gpu("7.5"))
    assert host.multiplies_bfloat16(gpu("12.0")) and host.multiplies_bfloat16(gpu("gfx90a"))


def test_an_emulated_type_is_said_where_it_is_asked_for(monkeypatch, recwarn):
    monkeypatch.setattr(host, "read_cpu_info", dict)
    with pytest.warns(UserWarning, match=r"bfloat16 is emulated .*dtype='auto'"):
        assert load("embedded", dtype="bfloat16").config.dtype == "bfloat16"
    recwarn.clear()
    load("embedded", dtype="auto")
    load("embedded")
    assert not recwarn.list


def test_the_cores_that_a_batch_is_split_over(monkeypatch):
    devices = DEVICES
    assert len(devices) == 4

    def count(batch: int, weights: int = 1) -> int:
        return len(choose_devices(batch, weights, devices))

    assert [count(batch) for batch in (32, 6, 7, 1)] == [4, 3, 1, 1]
    monkeypatch.setattr("aatjax.train.sharding.measure_memory", lambda: 800)
    assert [count(32, weights) for weights in (50, 100, 101, 10_000)] == [4, 2, 1, 1]
    other = [
        SimpleNamespace(platform="cpu", process_index=rank, id=(rank, number))
        for rank in range(2)
        for number in range(3)
    ]
    monkeypatch.setattr("aatjax.train.sharding.measure_memory", lambda: 2**40)
    assert [d.id for d in choose_devices(8, 1, other)] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert len(choose_devices(12, 1, other)) == 6
    chips = [SimpleNamespace(platform="tpu", process_index=0)] * 8
    assert choose_devices(3, 1, chips) == chips  # refused later: chips are not left idle


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The installed packages that JAX finds its platforms by."""
    found = {"libtpu"}
    monkeypatch.setattr(host.importlib.util, "find_spec", lambda name: name in found or None)
    monkeypatch.setattr(host, "entry_points", lambda group: [])
    return found


def test_a_tpu_that_is_not_there_is_not_tried(plugins: set[str], tmp_path: Path) -> None:
    assert host.choose_platforms({}, tmp_path) == "cpu"
    assert host.choose_platforms({"JAX_PLATFORMS": "tpu"}, tmp_path) is None
    for name in ("TPU_WORKER_ID", "TPU_NAME", "MEGASCALE_NUM_SLICES", "JAX_FORCE_TPU_INIT"):
        assert host.choose_platforms({name: "0"}, tmp_path) is None
    plugins.add("jax_plugins")  # of a GPU
    assert host.choose_platforms({}, tmp_path) is None
    plugins.clear()
    assert host.choose_platforms({}, tmp_path) is None  # nothing to keep JAX from


@pytest.mark.parametrize("path", ["dev/accel0", "dev/vfio/0", "sys/bus/pci/devices/1/vendor"])
def test_a_tpu_that_is_there_is_tried(plugins: set[str], tmp_path: Path, path: str) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text("0x1234\n")
    assert host.choose_platforms({}, tmp_path) == ("cpu" if "pci" in path else None)
    file.write_text("0x1ae0\n")
    assert host.choose_platforms({}, tmp_path) is None
