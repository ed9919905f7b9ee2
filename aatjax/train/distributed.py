"""Runs of several processes: joining them, and making sure that they agree."""

import json
import os
import socket
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from aatjax.errors import AatjaxError, UnavailableError, UsageError
from aatjax.io.digest import hash_bytes
from aatjax.train.cluster import Place, Processes, choose_local_devices, find_place
from aatjax.train.meeting import Coordinator, attend, meet, open_port
from aatjax.train.watchdog import Watchdog

DAY = 24 * 3600 * 1000  # milliseconds

_watchdog = Watchdog()  # of this process
_meetings = 0  # number of barriers so far, each of which has its own name


def is_main() -> bool:
    """Return whether this process writes the run's files."""
    return jax.process_index() == 0


def is_distributed() -> bool:
    """Return whether the run has more than one process."""
    return jax.process_count() > 1


def start_processes(given: Processes | None = None, *, stuck_after: float = 600.0) -> None:
    """Join the other processes, if there are any; call it before anything asks JAX for devices.

    By default the cluster's variables are used (Slurm, Open MPI, TPU hosts, GKE). A single process
    does nothing. From here on the loss of a process ends all others, which name it.

    Args:
        given: the processes, where no cluster's variables say it.
        stuck_after: seconds to wait for the last process to come, and then in which a process that
            others wait for must make progress.

    Raises:
        UnavailableError: the coordinator's port is in use, it does not answer within 10 seconds,
            another program does, or it is this very host in a job of several; or a process has
            not come in time.
        UsageError: the processes were given wrongly.
    """
    place = find_place(given or Processes(), os.environ)
    if place is None:
        return
    global _watchdog
    _watchdog = watchdog = Watchdog(place.index, place.count, stuck=stuck_after)
    watchdog.start(meet(place, stuck_after, print_message))
    try:
        jax.distributed.initialize(
            coordinator_address=place.coordinator,
            num_processes=place.count,
            process_id=place.index,
            local_device_ids=choose_local_devices(place, os.environ),
            cluster_detection_method="deactivate",
            heartbeat_timeout_seconds=30,
        )
    except (RuntimeError, ValueError, OSError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnavailableError(
            f"the processes could not be joined: {why}; check that the coordinator's port "
            f"({place.coordinator}) is open between their hosts"
        ) from error


def get_watchdog(stuck_after: float) -> Watchdog:
    """Return the watchdog of this process; one is started where JAX was joined by other means.

    All processes must call it.

    Args:
        stuck_after: seconds in which a process that others wait for must make progress.
    """
    global _watchdog
    if is_distributed() and not _watchdog.is_watching:
        rank, count = jax.process_index(), jax.process_count()
        watchdog = Watchdog(rank, count)
        listener = open_port(0) if rank == 0 else None
        own = "" if listener is None else f"{socket.gethostname()}:{listener.getsockname()[1]}"
        place = Place(rank, count, gather_bytes(own.encode())[0].decode())
        if listener is None:
            watchdog.start({0: attend(place, stuck_after, print_message)})
        else:
            with listener:
                watchdog.start(Coordinator(place, stuck_after, print_message).gather(listener))
        _watchdog = watchdog
    _watchdog.stuck = stuck_after
    return _watchdog


def name_process() -> str:
    """Return `process 3 of 8 on host X: ` for the messages of a run of several; else nothing."""
    name = str(_watchdog)
    return f"{name}: " if name else ""


def print_message(text: str) -> None:
    """Print a line of this process on standard error."""
    print(f"aatjax: {name_process()}{text}", file=sys.stderr, flush=True)


def leave(code: int) -> None:
    """Say to the other processes that this one exits."""
    _watchdog.leave(code)


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
        if (shown := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
            why += f" (CUDA_VISIBLE_DEVICES={shown!r} hides all other GPUs)"
        raise UnavailableError(
            f"JAX finds no device on platform {asked!r}: {why}; install the plugin that matches "
            "the driver (aatjax[cuda12], aatjax[cuda13] or aatjax[tpu]), or set JAX_PLATFORMS=cpu "
            "to run on the CPU"
        ) from error


def line_up() -> None:
    """Wait until all processes are here: the exchanges of JAX on CPUs wait 30 s for the others.

    Without a limit of its own: the watchdog ends the run where a process is lost or stuck.

    Raises:
        UnavailableError: the connection to process 0 broke.
    """
    global _meetings
    from jax._src import distributed  # JAX has no public barrier that needs no devices

    client = distributed.global_state.client
    if client is None:  # TPU hosts that were joined by the TPU's own runtime
        return
    _meetings += 1
    with _watchdog.waiting():
        try:
            client.wait_at_barrier(f"aatjax/{_meetings}", DAY)
        except RuntimeError as error:
            raise _watchdog.blame(error) or error from error


def gather_bytes(data: bytes) -> list[bytes]:
    """Return the data of every process, in their order, on all of them."""
    if not is_distributed():
        return [data]
    line_up()
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
