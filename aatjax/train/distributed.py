"""Runs of several processes: joining them, and making sure that they agree."""

import dataclasses
import ipaddress
import json
import os
import socket
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from aatjax.errors import AatjaxError, UnavailableError, UsageError
from aatjax.io.digest import hash_bytes

PREFLIGHT = 10.0  # seconds in which the coordinator must answer


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of a run. All None: those of the cluster, else this process alone.

    Attributes:
        coordinator: host:port of process 0, reachable from all.
        count: number of processes.
        index: number of this one, from 0.
    """

    coordinator: str | None = None
    count: int | None = None
    index: int | None = None

    def __post_init__(self) -> None:
        given = dataclasses.astuple(self)
        if any(value is not None for value in given) and None in given:
            raise UsageError(
                "--coordinator, --processes and --process go together: give all three, or none "
                "under SLURM, Open MPI, GKE and on TPU hosts"
            )
        if self.count is None or self.index is None:
            return
        if self.count < 1:
            raise UsageError(f"--processes {self.count} must be at least 1")
        if not 0 <= self.index < self.count:
            raise UsageError(f"--process {self.index} must lie between 0 and {self.count - 1}")


def is_main() -> bool:
    """Return whether this process writes the run's files."""
    return jax.process_index() == 0


def is_distributed() -> bool:
    """Return whether the run has more than one process."""
    return jax.process_count() > 1


def detect_cluster(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """Return (processes, hosts) from the variables of SLURM, Open MPI or TPU hosts, or None."""

    def read(name: str, default: int = 0) -> int:
        text = environment.get(name, "")
        return int(text) if text.isdigit() else default

    workers = [name for name in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    if read("SLURM_STEP_NUM_TASKS") > 1 and "SLURM_PROCID" in environment:
        return read("SLURM_STEP_NUM_TASKS"), read("SLURM_STEP_NUM_NODES", 1)
    if (size := read("OMPI_COMM_WORLD_SIZE")) > 1:
        return size, -(-size // max(1, read("OMPI_COMM_WORLD_LOCAL_SIZE", size)))
    hosts = len(workers)
    if hosts <= 1:
        slices = read("MEGASCALE_NUM_SLICES")
        hosts = slices * max(1, hosts) if slices > 1 else 0
    return (hosts, hosts) if hosts else None


def start_processes(given: Processes | None = None) -> None:
    """Join the other processes, if there are any; call it before anything asks JAX for devices.

    By default the cluster's variables are used (SLURM, Open MPI, TPU VMs, GKE). A single process
    does nothing.

    Raises:
        UnavailableError: the coordinator does not answer within 10 seconds, or is this very host
            in a job of several hosts.
    """
    given = given or Processes()
    cluster = detect_cluster(os.environ)
    if given.coordinator is None and cluster is None:
        return
    arguments: dict[str, Any] = {}
    if given.coordinator is not None:
        _check_coordinator(given.coordinator, given.index or 0, cluster[1] if cluster else 1)
        arguments = {
            "coordinator_address": given.coordinator,
            "num_processes": given.count,
            "process_id": given.index,
        }
    try:
        jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=30)
    except (RuntimeError, ValueError, OSError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnavailableError(
            f"the processes could not be joined: {why}; check that all of them were started and "
            "that the coordinator's port is open between their hosts"
        ) from error


def check_devices() -> None:
    """Check that JAX finds a device.

    Raises:
        UnavailableError: the requested platform has no plugin or no device here.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked = os.environ.get("JAX_PLATFORMS") or "the default"
        why = (str(error).strip().splitlines() or ["no such platform"])[0]
        raise UnavailableError(
            f"JAX finds no device on platform {asked!r}: {why}; install the plugin that matches "
            "the driver (aatjax[cuda12], aatjax[cuda13] or aatjax[tpu]), or set JAX_PLATFORMS=cpu "
            "to run on the CPU"
        ) from error


def _check_coordinator(address: str, index: int, hosts: int) -> None:
    """Try the coordinator with a plain connection: JAX itself would abort the process."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(f"--coordinator {address!r} is not host:port")
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, int(port))}
    except OSError as error:
        raise UnavailableError(
            f"coordinator {address}: the host name {host!r} does not resolve: {error}"
        ) from error
    loopback = all(ipaddress.ip_address(one.partition("%")[0]).is_loopback for one in found)
    if loopback and hosts > 1:
        raise UnavailableError(
            f"coordinator {address} is {', '.join(sorted(found))}, which is each host itself, and "
            f"the job has {hosts} hosts: give --coordinator a name or address that all reach"
        )
    until = time.monotonic() + PREFLIGHT
    while index > 0:
        try:
            socket.create_connection((host, int(port)), timeout=2.0).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise UnavailableError(
                    f"coordinator {address}: no answer within {PREFLIGHT:.0f} s ({error}): is "
                    "process 0 running there, and the port open?"
                ) from error
            time.sleep(0.2)


def gather_bytes(data: bytes) -> list[bytes]:
    """Return the data of every process, in their order, on all of them."""
    if not is_distributed():
        return [data]
    from jax.experimental.multihost_utils import process_allgather

    lengths = np.asarray(process_allgather(np.array([len(data)], np.int32))).reshape(-1)
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    rows = np.asarray(process_allgather(padded)).reshape(len(lengths), -1)
    return [row[:size].tobytes() for row, size in zip(rows, lengths, strict=True)]


def run_on_main(function: Callable[[], Any]) -> Any:
    """Call a function in process 0 only; all processes get its (JSON) result, or its error."""
    if not is_distributed():
        return function()
    answer: dict[str, Any] = {}
    caught: AatjaxError | None = None
    if is_main():
        try:
            answer["result"] = function()
        except AatjaxError as error:
            caught, answer["error"] = error, [str(error), error.exit_code]
    answer = json.loads(gather_bytes(json.dumps(answer).encode())[0])
    if caught is not None:
        raise caught
    if "error" in answer:
        message, code = answer["error"]
        elsewhere = AatjaxError(f"process 0: {message}")
        elsewhere.exit_code = code
        raise elsewhere
    return answer["result"]


def any_process(flag: bool) -> bool:
    """Return whether the flag is set in any process; all of them must call this."""
    return any(one != b"\0" for one in gather_bytes(b"\1" if flag else b"\0"))


def agree(values: Mapping[str, Any], lists: Mapping[str, Sequence[str]]) -> None:
    """Refuse a run whose processes were started with different values or data.

    Args:
        values: values by name, such as the config and the version, compared as JSON.
        lists: items by what they are, such as the clips of the training part.

    Raises:
        UsageError: in every process, with the first differences and the ranks that have them.
    """
    if not is_distributed():
        return
    text = json.dumps({"values": values, "lists": lists}, sort_keys=True, default=str)
    if len(set(gather_bytes(hash_bytes(text).encode()))) == 1:
        return
    own = {"host": socket.gethostname(), **json.loads(text)}
    packed = zlib.compress(json.dumps(own).encode())
    first, *others = (json.loads(zlib.decompress(data)) for data in gather_bytes(packed))
    problems = [
        problem for rank, other in enumerate(others, 1) for problem in _compare(first, other, rank)
    ]
    more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
    raise UsageError(
        f"the processes do not agree: {'; '.join(problems[:5])}{more}; start all of them with the "
        "same command, version and data"
    )


def _compare(first: dict[str, Any], other: dict[str, Any], rank: int) -> Iterator[str]:
    """Yield the differences between process 0 and another one."""
    for path, here, there in find_differences(first["values"], other["values"]):
        yield f"{path} is {here!r} in process 0 and {there!r} in process {rank}"
    where = f"process {rank} (host {other['host']})"
    for name, wanted in first["lists"].items():
        found = other["lists"][name]
        missing, extra = set(wanted) - set(found), set(found) - set(wanted)
        for items, verb in ((missing, "lacks"), (extra, "has in addition")):
            if items:
                yield f"{where} {verb} {len(items)} of the {name}, first {min(items)!r}"
        if not missing and not extra and wanted != found:
            yield f"{where} has the {name} in another order"


def find_differences(one: Any, two: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Return (path, value in one, value in two) where two trees of dictionaries differ."""
    if not (isinstance(one, dict) and isinstance(two, dict)):
        return [] if one == two else [(path, one, two)]
    found: list[tuple[str, Any, Any]] = []
    for key in sorted(set(one) | set(two)):
        found += find_differences(one.get(key), two.get(key), f"{path}.{key}" if path else key)
    return found
