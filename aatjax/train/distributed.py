"""Several processes, one run: starting together, agreeing, and noticing that a peer is gone."""

import dataclasses
import ipaddress
import json
import os
import socket
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from aatjax.errors import AatjaxError, UnavailableError, UsageError
from aatjax.io.digest import hash_json

PREFLIGHT = 10.0  # seconds in which the coordinator must answer


@dataclasses.dataclass(frozen=True)
class Processes:
    """Which processes make up the run. All None: as the cluster says, else this process alone.

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
        if self.count is not None and self.index is not None:
            if self.count < 1:
                raise UsageError(f"--processes {self.count} must be at least 1")
            if not 0 <= self.index < self.count:
                raise UsageError(f"--process {self.index} must lie between 0 and {self.count - 1}")


def is_main() -> bool:
    """Whether this process writes the run's files."""
    return jax.process_index() == 0


def several() -> bool:
    """Whether the run has more than one process."""
    return jax.process_count() > 1


def surroundings(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """(processes, hosts) that the environment tells of: SLURM, Open MPI, TPU hosts; else None."""

    def number(name: str, default: int = 0) -> int:
        text = environment.get(name, "")
        return int(text) if text.isdigit() else default

    if number("SLURM_STEP_NUM_TASKS") > 1 and "SLURM_PROCID" in environment:
        return number("SLURM_STEP_NUM_TASKS"), number("SLURM_STEP_NUM_NODES", 1)
    if number("OMPI_COMM_WORLD_SIZE") > 1:
        size = number("OMPI_COMM_WORLD_SIZE")
        return size, -(-size // max(1, number("OMPI_COMM_WORLD_LOCAL_SIZE", size)))
    workers = [name for name in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    if len(workers) > 1:
        return len(workers), len(workers)
    if number("MEGASCALE_NUM_SLICES") > 1:
        slices = number("MEGASCALE_NUM_SLICES")
        return slices * max(1, len(workers)), slices * max(1, len(workers))
    return None


def start(given: Processes | None = None) -> None:
    """Joins the other processes, if there are any; before anything else asks JAX for devices.

    With no argument, the cluster's own variables are used (SLURM, Open MPI, TPU VMs, GKE); with
    `given`, those. Where this process is alone, nothing happens.

    Raises:
        UnavailableError: the coordinator does not answer within 10 seconds, or is this very host
            in a job of several.
    """
    given = given or Processes()
    around = surroundings(os.environ)
    if given.coordinator is None and around is None:
        return
    hosts = 1 if around is None else around[1]
    if given.coordinator is not None:
        _preflight(given.coordinator, given.index or 0, hosts)
    arguments: dict[str, Any] = {}
    if given.coordinator is not None:
        arguments = {
            "coordinator_address": given.coordinator,
            "num_processes": given.count,
            "process_id": given.index,
        }
    try:
        jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=30)
    except (RuntimeError, ValueError, OSError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnavailableError(
            f"the processes could not be joined: {said}; check that all of them were started and "
            "that the coordinator's port is open between their hosts"
        ) from error


def check_devices() -> None:
    """Makes sure that JAX finds a device.

    Raises:
        UnavailableError: the platform that was asked for has no plugin or no device here.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked = os.environ.get("JAX_PLATFORMS") or "the default"
        said = (str(error).strip().splitlines() or ["no such platform"])[0]
        raise UnavailableError(
            f"JAX finds no device on platform {asked!r}: {said}; install the plugin that matches "
            "the driver (aatjax[cuda12], aatjax[cuda13] or aatjax[tpu]), or set JAX_PLATFORMS=cpu "
            "to run on the CPU"
        ) from error


def _preflight(address: str, index: int, hosts: int) -> None:
    """Tries the coordinator with a plain connection: JAX itself would abort the process."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(f"--coordinator {address!r} is not host:port")
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, int(port))}
    except OSError as error:
        raise UnavailableError(
            f"coordinator {address}: the name {host!r} is not known here: {error}"
        ) from error
    loopback = all(ipaddress.ip_address(one.partition("%")[0]).is_loopback for one in found)
    if loopback and hosts > 1:
        raise UnavailableError(
            f"coordinator {address} is {', '.join(sorted(found))}, which is each host itself, and "
            f"the job has {hosts} hosts: give a name or address that all of them reach"
        )
    if index == 0:
        return
    until = time.monotonic() + PREFLIGHT
    while True:
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
    """What every process gave, in their order, on all of them."""
    if not several():
        return [data]
    from jax.experimental import multihost_utils

    length = np.array([len(data)], np.int32)
    lengths = np.asarray(multihost_utils.process_allgather(length)).reshape(-1)
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(lengths), -1)
    return [row[:size].tobytes() for row, size in zip(rows, lengths, strict=True)]


def on_main(function: Callable[[], Any]) -> Any:
    """Calls a function in process 0 alone; all processes get its (JSON) result, or its error."""
    if not several():
        return function()
    told: dict[str, Any] = {}
    caught: AatjaxError | None = None
    if is_main():
        try:
            told["result"] = function()
        except AatjaxError as error:
            caught, told["error"] = error, [str(error), error.exit_code]
    told = json.loads(gather_bytes(json.dumps(told).encode())[0])
    if caught is not None:
        raise caught
    if "error" in told:
        message, code = told["error"]
        elsewhere = AatjaxError(f"process 0: {message}")
        elsewhere.exit_code = code
        raise elsewhere
    return told["result"]


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process; all of them must ask."""
    return any(one != b"\0" for one in gather_bytes(b"\1" if flag else b"\0"))


def agree(said: Mapping[str, Any], lists: Mapping[str, Sequence[str]]) -> None:
    """Refuses a run whose processes were started with different things.

    Args:
        said: values by name, such as the config and the version, compared as JSON.
        lists: names by what they are, such as the clips of the training part.

    Raises:
        UsageError: in every process, with the first differences and the ranks that have them.
    """
    if not several():
        return
    whole = json.dumps(said, sort_keys=True, default=str)
    digest = hash_json([whole, {name: list(names) for name, names in lists.items()}])
    if len(set(gather_bytes(digest.encode()))) == 1:
        return
    everyone = [
        json.loads(zlib.decompress(data))
        for data in gather_bytes(
            zlib.compress(
                json.dumps(
                    {
                        "host": socket.gethostname(),
                        "said": json.loads(whole),
                        "lists": {name: list(names) for name, names in lists.items()},
                    }
                ).encode()
            )
        )
    ]
    first, problems = everyone[0], []
    for rank, other in enumerate(everyone[1:], 1):
        for path, here, there in differing(first["said"], other["said"]):
            problems.append(f"{path} is {here!r} in process 0 and {there!r} in process {rank}")
        for name in lists:
            one, two = set(first["lists"][name]), set(other["lists"][name])
            where = f"process {rank} (host {other['host']})"
            for gone, what in ((one - two, "lacks"), (two - one, "has besides")):
                if gone:
                    problems.append(
                        f"{where} {what} {len(gone)} of the {name}, first {min(gone)!r}"
                    )
            if one == two and first["lists"][name] != other["lists"][name]:
                problems.append(f"{where} has the {name} in another order")
    more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
    raise UsageError(
        f"the processes do not agree: {'; '.join(problems[:5])}{more}; start all of them with the "
        "same command, version and data"
    )


def differing(one: Any, two: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """(path, value here, value there) of what differs between two trees of dictionaries."""
    if isinstance(one, dict) and isinstance(two, dict):
        found: list[tuple[str, Any, Any]] = []
        for key in sorted(set(one) | set(two)):
            here = f"{path}.{key}" if path else key
            found += differing(one.get(key), two.get(key), here)
        return found
    return [] if one == two else [(path, one, two)]
