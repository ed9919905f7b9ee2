"""How the processes of a run find each other: the cluster's variables, and the meeting."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from aatjax.errors import AatjaxError, UnavailableError, UsageError
from aatjax.train import meeting
from aatjax.train.cluster import (
    Place,
    Processes,
    choose_local_devices,
    find_first_node,
    find_place,
)
from aatjax.train.meeting import check_address, meet

SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "3",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
JOBSET = {"TPU_WORKER_HOSTNAMES": "s-0-0.s,s-0-1.s", "TPU_WORKER_ID": "1"}
SLICES = {
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "s-0-0.s:8080",
}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        (SLURM, Place(3, 8, "gpu07:61441", 2, 3, launched=True)),
        (
            {**SLURM, "JAX_COORDINATOR_PORT": "99"},
            Place(3, 8, "gpu07:99", 2, 3, launched=True),
        ),
        (
            {**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.1.0.1:34911"},
            Place(2, 4, f"10.96.0.1:{61440 + 1531576320 // 4096 % 4096}", 2, 0, launched=True),
        ),
        (
            {**OPEN_MPI, "JAX_COORDINATOR_ADDRESS": "here:1"},
            Place(2, 4, "here:1", 2, 0, launched=True),
        ),
        (JOBSET, Place(1, 2, "s-0-0.s:8482", 2, launched=True)),
        ({**JOBSET, **SLICES}, Place(3, 4, "s-0-0.s:8482", 4, launched=True)),
        (SLICES, Place(1, 2, "s-0-0.s:8482", 2, launched=True)),
        ({}, None),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),  # no srun
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"JOB_COMPLETION_INDEX": "1"}, None),
    ],
)
def test_the_place_of_a_process_is_that_of_its_cluster(
    environment: dict[str, str], place: Place | None
) -> None:
    assert find_place(Processes(), environment) == place


def test_processes_of_open_mpi_on_one_host_meet_there() -> None:
    place = find_place(Processes(), {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4"})
    assert place is not None and place.address[0] == "localhost" and place.hosts == 1


def test_what_the_cluster_does_not_say_is_given() -> None:
    assert find_place(Processes("h:1", 3), {"JOB_COMPLETION_INDEX": "2"}) == Place(2, 3, "h:1")
    place = find_place(Processes("h:1"), OPEN_MPI)
    assert place == Place(2, 4, "h:1", 2, 0)
    with pytest.raises(UsageError, match="without --coordinator HOST:PORT, and the variables of"):
        find_place(Processes(), OPEN_MPI)


@pytest.mark.parametrize("given", [("h:1", None, None), (None, 2, None), (None, None, 1)])
def test_flags_of_the_processes_go_together(given: Any) -> None:
    with pytest.raises(UsageError, match="go together"):
        find_place(Processes(*given), {})


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU slice: the variable TPU_WORKER_ID is not set"),
        ({**JOBSET, "TPU_WORKER_ID": "x"}, "TPU_WORKER_ID is 'x', not a number"),
        ({**JOBSET, "TPU_WORKER_ID": "2"}, "TPU slice: process 2 must lie between 0 and 1"),
        ({**OPEN_MPI, "JAX_COORDINATOR_ADDRESS": "here"}, "'here' is not host:port"),
    ],
)
def test_variables_that_contradict_are_refused(environment: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        find_place(Processes(), environment)


def test_numbers_out_of_range() -> None:
    for given in (("h:1", 2, 2), ("h:1", 0, 0)):
        with pytest.raises(UsageError):
            Processes(*given)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("a1", "a1"),
        ("a1,b2", "a1"),
        ("a[07-09,11],b2", "a07"),
        ("n[001-003]-ib,b", "n001-ib"),
        ("", None),
    ],
)
def test_the_first_node_of_a_list(nodes: str, first: str | None) -> None:
    assert find_first_node(nodes) == first


def test_the_gpus_of_a_process() -> None:
    """All where it is alone on its host, or is shown its own only."""
    alone, shared = Place(1, 2, "h:1", 2, 0), Place(3, 8, "h:1", 2, 3)
    assert choose_local_devices(alone, {}) is None
    assert choose_local_devices(shared, {}) == [3]
    assert choose_local_devices(shared, {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}) == [3]
    assert choose_local_devices(shared, {"CUDA_VISIBLE_DEVICES": "3"}) is None


# The meeting.


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits of a second instead of ten."""
    for name, seconds in {"PREFLIGHT": 0.6, "GREETING": 0.6, "PATIENCE": 0.1}.items():
        monkeypatch.setattr(meeting, name, seconds)


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def program(port: int) -> Iterator[Callable[[bytes], None]]:
    """Another program at the port: sends something, then is mute."""
    with socket.create_server(("127.0.0.1", port)) as server:

        def answer(data: bytes) -> None:
            link, _ = server.accept()
            link.sendall(data)
            time.sleep(1.5)

        yield lambda data: threading.Thread(target=answer, args=(data,), daemon=True).start()


class Process:
    """One process of a meeting, in a thread; what came of it, and what it said."""

    def __init__(self, port: int, index: int, count: int = 2, limit: float = 8.0) -> None:
        self.said: list[str] = []
        self.result: Any = None
        place = Place(index, count, f"localhost:{port}")

        def run() -> None:
            try:
                self.result = meet(place, limit, self.said.append)
            except AatjaxError as error:
                self.result = error

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def until_said(self, words: str) -> None:
        end = time.monotonic() + 8.0
        while not any(words in line for line in self.said):
            assert time.monotonic() < end, self.said
            time.sleep(0.05)

    def finish(self) -> Any:
        self.thread.join(8.0)
        assert not self.thread.is_alive()
        return self.result


def test_processes_meet_whoever_comes_first_and_stay_connected(port: int) -> None:
    last = Process(port, 1, count=3)
    zero = Process(port, 0, count=3)
    for one in (last, zero):
        one.until_said("waiting for process 2 of 3 (")
    other = Process(port, 2, count=3)
    assert set(zero.finish()) == {1, 2}
    link = last.finish()[0]
    assert set(other.finish()) == {0}
    zero.result[1].send({"x": 1})
    assert json.loads(link.file.readline()) == {"x": 1}


def test_a_process_that_does_not_come_is_named_by_the_others(port: int) -> None:
    found = [Process(port, index, count=4, limit=1.5) for index in (0, 2)]
    for one in found:
        error = one.finish()
        assert isinstance(error, UnavailableError) and error.exit_code == 69
        assert "processes 1, 3 of 4 did not come to localhost:" in str(error)
        assert "within 2 s (--stuck-after); there were process 0; process 2 on " in str(error)


def test_a_process_0_that_is_killed_before_the_run_is_named(port: int) -> None:
    process = Process(port, 1)
    listener = meeting.open_port(port)
    connection, _ = listener.accept()
    meeting.Link("?", connection, connection.makefile("rb")).send({"host": "there"})
    connection.recv(4096)
    connection.close()
    assert "process 0 (host there, localhost:" in str(process.finish())
    assert "was lost before the run began" in str(process.result)
    listener.close()


def test_a_process_that_comes_again_takes_its_old_place(port: int) -> None:
    zero = Process(port, 0, count=3)
    time.sleep(0.2)
    with socket.create_connection(("localhost", port)) as gone:
        gone.sendall(json.dumps({"process": 1, "count": 3, "host": "x"}).encode() + b"\n")
        time.sleep(0.2)
    other = Process(port, 2, count=3)
    time.sleep(0.2)  # it has come: the run would begin if the one that is gone still counted
    again = Process(port, 1, count=3)
    assert set(zero.finish()) == {1, 2}
    assert set(other.finish()) == set(again.finish()) == {0}


def test_processes_of_the_same_number_or_of_other_runs_are_refused(port: int) -> None:
    zero, first = Process(port, 0, count=3), Process(port, 1, count=3)
    time.sleep(0.3)
    twice = Process(port, 1, count=3).finish()
    assert isinstance(twice, UsageError) and "process 1 of 3 is there already" in str(twice)
    wrong = Process(port, 2, count=4).finish()
    for error in (wrong, zero.finish(), first.finish()):
        assert isinstance(error, UsageError), error
        assert "process 2 of 4 (host " in str(error) and "a run of 3 processes" in str(error)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "accepts connections and sends nothing"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "another protocol"),
        (b"\0\0\x12\4\0\0\0\0\0", "JAX's coordinator of a run that has begun"),
        (b"{1}\n", "another protocol"),
    ],
)
def test_another_program_at_the_port_is_named(
    port: int, program: Callable[[bytes], None], data: bytes, words: str
) -> None:
    program(data)
    error = Process(port, 1).finish()
    assert isinstance(error, UnavailableError) and error.exit_code == 69
    assert f"coordinator localhost:{port}: another program" in str(error) and words in str(error)


def test_a_port_in_use_is_named_at_once(port: int) -> None:
    with socket.create_server(("", port)):
        error = Process(port, 0).finish()
    assert isinstance(error, UnavailableError)
    assert f":{port}) is in use by another program" in str(error)


def test_an_unreachable_coordinator_is_named(port: int) -> None:
    """F10."""
    error = Process(port, 1).finish()
    assert isinstance(error, UnavailableError)
    assert f"localhost:{port}: no answer within 1 s" in str(error)
    with pytest.raises(UnavailableError, match=r"no-such-host.invalid:1: the host .* not resolve"):
        meet(Place(1, 2, "no-such-host.invalid:1"), 5.0, print)


def test_a_coordinator_that_is_each_host_itself_is_refused() -> None:
    """F11."""
    with pytest.raises(UnavailableError, match=r"127.0.0.1, which is each host itself"):
        check_address(Place(0, 4, "127.0.0.1:1234", hosts=2), 5.0)
