"""Faults of runs with several processes, and signals, seen from outside: codes, lines, files."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

HERE = Path(__file__).parent
CONFIG = str(HERE / "small_config.py")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled programs are shared by the runs of this file."""
    return tmp_path_factory.mktemp("cache")


def environment(cache: Path, devices: int = 1, **more: str) -> dict[str, str]:
    flags = (
        f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0 "
        "--xla_cpu_multi_thread_eigen=false"
    )
    return {
        **os.environ,
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "XDG_CACHE_HOME": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **more,
    }


def begin(cache: Path, run: Path, *flags: str, code: str = "", **more: Any) -> Any:
    """`aatjax train` in a process of its own; `code` is run before."""
    program = f"import sys\n{code}\nfrom aatjax.cli.main import main\nmain(sys.argv[1:])"
    return subprocess.Popen(
        [sys.executable, "-c", program, "train", CONFIG, "--out", str(run), *flags],
        env=environment(cache, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: Any, seconds: float = 900.0) -> tuple[int, str]:
    _, said = process.communicate(timeout=seconds)
    return process.returncode, said


def until(process: Any, pattern: str, seconds: float = 900.0) -> str:
    """Read standard error of the process until a line matches."""
    seen, end = "", time.monotonic() + seconds
    while time.monotonic() < end:
        line = process.stderr.readline()
        seen += line
        if re.search(pattern, line):
            return seen
        if not line and process.poll() is not None:
            break
    raise AssertionError(f"{pattern!r} was not said: {seen[-2000:]}")


def weights(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "adapter.safetensors")


def assert_same(run: Path, other: Path) -> None:
    one, two = weights(run), weights(other)
    assert set(one) == set(two)
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


@pytest.fixture(scope="module")
def straight(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    run = tmp_path_factory.mktemp("straight") / "run"
    code, said = finish(begin(cache, run))
    assert code == 0, said
    return run


def pair(cache: Path, run: Path, *flags: str, codes: tuple[str, str] = ("", "")) -> list[Any]:
    """Two processes of one run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    return [
        begin(
            cache,
            run,
            "--coordinator",
            address,
            "--processes",
            "2",
            "--process",
            str(index),
            *flags,
            code=codes[index],
        )
        for index in (0, 1)
    ]


SLOW = """
from aatjax.train import loop
import time
first = loop.Feed.take
def take(self):
    time.sleep(0.4)
    return first(self)
loop.Feed.take = take
"""


BUSY = """
from aatjax.train import loop
import sys
import threading
import time
first, count = loop.Feed.take, 0
def spin():
    while True:
        pass
def take(self):
    global count
    count += 1
    if count == 3:
        sys.setswitchinterval(0.2)
        threading.Thread(target=spin, daemon=True).start()
    time.sleep(0.4)
    return first(self)
loop.Feed.take = take
"""


def test_two_processes_through_the_command_line(cache: Path, tmp_path: Path) -> None:
    """One folder, written once; alike to a run of one process."""
    found = [finish(process) for process in pair(cache, tmp_path / "run")]
    assert [code for code, _ in found] == [0, 0], found
    assert "epoch 3/3" in found[0][1] and "epoch" not in found[1][1]
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 3


@pytest.mark.parametrize("lost", [0, 1])
def test_the_survivor_of_a_killed_process_names_it(cache: Path, tmp_path: Path, lost: int) -> None:
    """F9: within 60 s, with the rank, though JAX's own abort comes sooner than a busy Python."""
    code = SLOW if lost else BUSY
    running = pair(cache, tmp_path / "run", "--training.epochs", "200", codes=(code, code))
    until(running[0], r"^epoch 1/200")
    running[lost].kill()
    began = time.monotonic()
    code, said = finish(running[1 - lost], 300)
    print("TOOK", time.monotonic() - began)
    assert code == 69
    assert re.search(rf"process {lost} \(host \S+\) was lost", said), said[-2000:]
    assert "same command goes on" in said


def test_a_process_that_hangs_is_named_with_its_stacks(cache: Path, tmp_path: Path) -> None:
    """F14: one rank sleeps where it reads its input."""
    hang = """
from aatjax.train import loop
import time
first, count = loop.Feed.fetch, 0
def fetch(self):
    global count
    count += 1
    if count > 6:
        time.sleep(600)
    return first(self)
loop.Feed.fetch = fetch
"""
    flags = ("--training.epochs", "200", "--stuck-after", "20")
    running = pair(cache, tmp_path / "run", *flags, codes=("", hang))
    found = [finish(process, 900) for process in running]
    assert [code for code, _ in found] == [69, 69], [said[-1500:] for _, said in found]
    for _, said in found:
        assert re.search(r"process 1 \(host \S+\) is stuck: \d+ s in 'input'", said), said[-2000:]
    assert "in fetch" in found[1][1]  # where it was


def join(action: str, stuck_after: float, late: int = 1) -> list[Any]:
    """Two processes that join and exchange a byte; one of them does something before."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = f"""
import os, time
from aatjax.train.cluster import Processes
from aatjax.train.distributed import check_devices, gather_bytes, start_processes
place = Processes("localhost:{port}", 2, INDEX)
start_processes(place, stuck_after={stuck_after})
check_devices()
if INDEX == {late}:
    {action}
assert gather_bytes(bytes([INDEX])) == [bytes([0]), bytes([1])]
"""
    return [
        subprocess.Popen(
            [sys.executable, "-c", program.replace("INDEX", str(index))],
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in (0, 1)
    ]


def test_a_process_that_is_late_at_the_first_exchange_is_waited_for() -> None:
    """Longer than the 30 s of JAX's exchanges on CPUs."""
    found = [finish(process) for process in join("time.sleep(33)", 600)]
    assert [code for code, _ in found] == [0, 0], found
    assert re.search(r"process 0 of 2 on host \S+: waiting for process 1 \(host \S+\)", found[0][1])


def test_a_process_that_does_not_come_to_the_first_exchange_is_named() -> None:
    found = [finish(process) for process in join("time.sleep(300)", 5)]
    assert [code for code, _ in found] == [69, 69], found
    for _, said in found:
        assert re.search(r"process 1 \(host \S+\) is stuck: \d+ s in 'start'", said), said


def test_a_process_0_that_is_killed_before_the_first_exchange_is_named() -> None:
    found = [finish(process, 60) for process in join("os.kill(os.getpid(), 9)", 600, late=0)]
    assert [code for code, _ in found] == [-9, 69], found
    assert re.search(r"process 0 \(host \S+\) was lost: its connection ended", found[1][1])


def test_processes_with_other_settings_are_refused(cache: Path, tmp_path: Path) -> None:
    """F12."""
    code = "import aatjax.experiments.run as e; first = e.train; import dataclasses\n"
    code += "e.train = lambda c, **k: first(dataclasses.replace(c, "
    code += "optim=dataclasses.replace(c.optim, lr=0.5)), **k)"
    found = [finish(p) for p in pair(cache, tmp_path / "run", codes=("", code))]
    assert [code for code, _ in found] == [2, 2], found
    for _, said in found:
        assert re.search(
            r"do not agree: config.optim.lr is 0.001 in process 0 and 0.5 in process 1", said
        ), said
        assert "Traceback" not in said
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_process_that_sees_fewer_files_is_named(cache: Path, tmp_path: Path) -> None:
    """F13."""
    code = "import aatjax.experiments.run as e; first = e.make_partition; import dataclasses\n"
    code += "def make_partition(*a, **k):\n    p = first(*a, **k)\n"
    code += "    return dataclasses.replace(p, train=p.train.subset(range(len(p.train) - 1)))\n"
    code += "e.make_partition = make_partition"
    found = [finish(p) for p in pair(cache, tmp_path / "run", codes=("", code))]
    assert [code for code, _ in found] == [2, 2], found
    for _, said in found:
        assert re.search(r"process 1 \(host \S+\) lacks 1 of the train clips, first '", said), said


# Signals.


def held(where: str) -> str:
    """Code that makes a place of the run say so and take two seconds longer."""
    module, name = where.rsplit(".", 1)
    owner, _, attribute = name.partition(":")
    target = f"m.{owner}" if attribute else "m"
    return f"""
import importlib, time, sys
m = importlib.import_module({module!r})
first = getattr({target}, {attribute or owner!r})
def slow(*args, **kwargs):
    print("HERE", file=sys.stderr, flush=True)
    end = time.monotonic() + 2
    while time.monotonic() < end:
        time.sleep(0.05)
    return first(*args, **kwargs)
setattr({target}, {attribute or owner!r}, slow)
"""


PHASES = {
    "compile": ("aatjax.train.loop.Loop:_make_feed", False),
    "train": ("aatjax.train.loop.Feed:take", False),
    "eval": ("aatjax.train.evaluation.Evaluator:predict", True),
    "save": ("aatjax.train.checkpoint.Checkpoints:save", True),
    "data": ("aatjax.experiments.run.make_partition", False),
}


@pytest.mark.parametrize(
    ("phase", "number"),
    [*((phase, signal.SIGTERM) for phase in PHASES), ("train", signal.SIGINT)],
    ids=lambda value: value if isinstance(value, str) else signal.Signals(value).name,
)
def test_a_signal_in_any_phase_loses_nothing(
    cache: Path, tmp_path: Path, straight: Path, phase: str, number: signal.Signals
) -> None:
    """F7, F8: exit code 143 or 130, what there is saved, and the next run ends the same."""
    where, saved = PHASES[phase]
    process = begin(cache, tmp_path / "run", code=held(where))
    until(process, "HERE")
    time.sleep(0.2)
    process.send_signal(number)
    code, said = finish(process, 60)
    assert code == 128 + number, said[-2000:]
    assert "Traceback" not in said
    found = any((tmp_path / "run" / "checkpoints").glob("[0-9]*"))
    assert found or not saved
    code, said = finish(begin(cache, tmp_path / "run"))
    assert code == 0, said[-2000:]
    assert_same(tmp_path / "run", straight)


def test_a_second_signal_ends_a_run_that_is_still_saving(cache: Path, tmp_path: Path) -> None:
    """F7: while the first is being served."""
    process = begin(cache, tmp_path / "run", code=held(PHASES["save"][0]).replace("+ 2", "+ 60"))
    until(process, "HERE")
    process.terminate()
    time.sleep(0.3)
    began = time.monotonic()
    process.terminate()
    code, _ = finish(process, 30)
    assert code == 143 and time.monotonic() - began < 10


def test_a_folder_in_use_is_refused(cache: Path, tmp_path: Path) -> None:
    """F21."""
    process = begin(cache, tmp_path / "run", code=SLOW)
    until(process, r"trainable of")
    code, said = finish(begin(cache, tmp_path / "run"))
    assert code == 2
    assert f"is in use by process {process.pid} on host {socket.gethostname()}" in said
    process.kill()
    finish(process)
    code, said = finish(begin(cache, tmp_path / "run"))  # the lock went with its holder
    assert code == 0, said


def test_resumed_on_another_number_of_devices(cache: Path, tmp_path: Path, straight: Path) -> None:
    """F15: four devices, then one, then two; the same numbers within 1e-5."""
    run = tmp_path / "run"
    for devices, stop in ((4, r"^epoch 1/3"), (1, r"^epoch 2/3")):
        process = begin(cache, run, code=SLOW, devices=devices)
        until(process, stop)
        process.terminate()
        assert finish(process)[0] == 143
    code, said = finish(begin(cache, run, devices=2))
    assert code == 0 and "going on from step" in said, said
    one, two = weights(run), weights(straight)
    for name in two:
        np.testing.assert_allclose(one[name], two[name], atol=1e-5, err_msg=name)
    rows = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (run, straight)
    ]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    for here, there in zip(*rows, strict=True):
        assert here["train/loss"] == pytest.approx(there["train/loss"], abs=1e-5)
