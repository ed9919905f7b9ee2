"""The processes of a run: from flags, or the variables of Slurm, Open MPI, GKE, TPU hosts."""

import dataclasses
import re
import socket
import zlib
from collections.abc import Callable, Mapping

from aatjax.errors import UsageError

PORTS = 61440
"""First of the 4096 ports that JAX, too, chooses from by the number of a Slurm or Open MPI job."""
TPU_PORT = 8482


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of a run as given; what is None is read from the cluster's variables.

    Attributes:
        coordinator: host:port of process 0, reachable from all.
        count: number of processes.
        index: number of this one, from 0.
    """

    coordinator: str | None = None
    count: int | None = None
    index: int | None = None

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise UsageError(f"--processes {self.count} must be at least 1")
        if self.index is not None and self.count is not None:
            _check_index("--process", self.index, self.count)


@dataclasses.dataclass(frozen=True)
class Cluster:
    """What the environment says of the processes; None where it says nothing.

    Attributes:
        kind: its name.
        index: number of this process.
        count: number of processes.
        hosts: number of hosts.
        coordinator: host:port of process 0.
        local: number of this process among those of its host, where each has one GPU.
    """

    kind: str
    index: int
    count: int | None = None
    hosts: int = 1
    coordinator: str | None = None
    local: int | None = None


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of this process in a run of several; attributes as in `Cluster`.

    Attributes:
        launched: whether a launcher started all processes, so that their hosts may still come up.
    """

    index: int
    count: int
    coordinator: str
    hosts: int = 1
    local: int | None = None
    launched: bool = False

    def __str__(self) -> str:
        return f"process {self.index} of {self.count} on host {socket.gethostname()}"

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of process 0."""
        host, _, port = self.coordinator.rpartition(":")
        return host.removeprefix("[").removesuffix("]"), int(port)


class _Variables:
    """Variables of an environment, as numbers."""

    def __init__(self, environment: Mapping[str, str], kind: str) -> None:
        self.environment, self.kind = environment, kind

    def find(self, *names: str) -> int | None:
        """Return the first of these that is a number."""
        for name in names:
            if (text := self.environment.get(name, "").strip()).isdecimal():
                return int(text)
        return None

    def read(self, name: str) -> int:
        """Return a number that must be there.

        Raises:
            UsageError: it is missing, or no number.
        """
        if (value := self.find(name)) is None:
            said = self.environment.get(name)
            what = "is not set" if said is None else f"is {said!r}, not a number"
            raise UsageError(
                f"{self.kind}: the variable {name} {what}; give --coordinator HOST:PORT, "
                "--processes and --process"
            )
        return value

    def join(self, host: str | None, port: int) -> str | None:
        """Return host:port, with `JAX_COORDINATOR_PORT` if it is set."""
        return None if host is None else f"{host}:{self.find('JAX_COORDINATOR_PORT') or port}"


def detect_cluster(environment: Mapping[str, str]) -> Cluster | None:
    """Return what the variables of Slurm, Open MPI, TPU hosts or a Kubernetes Job say, or None.

    Raises:
        UsageError: they contradict each other, or one is missing.
    """
    readers: dict[str, Callable[[_Variables], Cluster | None]] = {
        "Slurm job": _read_slurm,
        "Open MPI job": _read_open_mpi,
        "TPU slice": _read_tpu_hosts,
        "Kubernetes Job": _read_kubernetes_job,
    }
    for kind, read in readers.items():
        if (found := read(_Variables(environment, kind))) is not None:
            if found.count is not None:
                _check_index(f"{kind}: process", found.index, found.count)
            return found
    return None


def find_place(given: Processes, environment: Mapping[str, str]) -> Place | None:
    """Return the place of this process; None if it runs alone.

    Raises:
        UsageError: something is neither given nor in the environment.
    """
    cluster = detect_cluster(environment)
    count = given.count if given.count is not None else cluster and cluster.count
    is_given = any(value is not None for value in dataclasses.astuple(given))
    if not is_given and (count is None or count == 1):
        return None
    index = given.index if given.index is not None else cluster and cluster.index
    coordinator = given.coordinator or environment.get("JAX_COORDINATOR_ADDRESS")
    coordinator = coordinator or (cluster and cluster.coordinator)
    flags = {"--coordinator HOST:PORT": coordinator, "--processes": count, "--process": index}
    if coordinator is None or count is None or index is None:
        missing = ", ".join(flag for flag, value in flags.items() if value is None)
        where = "there are no variables of a cluster"
        if cluster is not None:
            where = f"the variables of the {cluster.kind} say no more"
        raise UsageError(
            "--coordinator, --processes and --process go together, or none of them under Slurm, "
            f"Open MPI, GKE and on TPU hosts: without {missing}, and {where}"
        )
    _check_index("--process", index, count)
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(f"--coordinator {coordinator!r} is not host:port")
    if cluster is None:
        return Place(index, count, coordinator)
    launched = given.coordinator is None
    return Place(index, count, coordinator, cluster.hosts, cluster.local, launched)


def choose_local_devices(place: Place, environment: Mapping[str, str]) -> list[int] | None:
    """Return the GPUs of a process; None for all that it sees.

    Where several processes share a host, each has the GPU of its number there, unless the launcher
    shows it one only.
    """
    if place.local is None or place.count <= place.hosts:
        return None
    shown = environment.get("CUDA_VISIBLE_DEVICES")
    return None if shown is not None and "," not in shown else [place.local]


def _check_index(what: str, index: int, count: int) -> None:
    if not 0 <= index < count:
        raise UsageError(f"{what} {index} must lie between 0 and {count - 1}")


def _read_slurm(variables: _Variables) -> Cluster | None:
    """Read a task of `srun`; in a batch script itself there is one process."""
    environment = variables.environment
    in_step = any(f"SLURM_STEP_{name}" in environment for name in ("ID", "NODELIST", "NUM_TASKS"))
    count = variables.find("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    if not in_step or "SLURM_PROCID" not in environment or count is None or count < 2:
        return None
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    nodes = next((environment[name] for name in names if environment.get(name)), "")
    port = PORTS + (variables.find("SLURM_JOB_ID", "SLURM_JOBID") or 0) % 4096
    return Cluster(
        variables.kind,
        variables.read("SLURM_PROCID"),
        count,
        variables.find("SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES") or 1,
        variables.join(find_first_node(nodes), port),
        variables.find("SLURM_LOCALID"),
    )


def find_first_node(nodes: str) -> str | None:
    """Return the first host of Slurm's list: a1 of `a1,b2`, a07 of `a[07-09,11],b2`."""
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?", nodes)
    return "".join(part or "" for part in match.groups()) if match else None


def _read_open_mpi(variables: _Variables) -> Cluster | None:
    environment = variables.environment
    count = variables.find("OMPI_COMM_WORLD_SIZE")
    if count is None or count < 2:
        return None
    on_host = variables.find("OMPI_COMM_WORLD_LOCAL_SIZE") or count
    hosts = -(-count // on_host)
    # Version 4: `1531576320.0;tcp://10.96.0.1,10.148.0.1:34911`, the addresses of the launcher.
    uri = environment.get("OMPI_MCA_orte_hnp_uri", "")
    match = re.search(r"tcp://(.+?)[,:]|tcp6://\[(.+?)[,\]]", uri)
    if match:
        host = match.group(1) or f"[{match.group(2)}]"
        job = uri.partition(".")[0]
        number = int(job) // 4096 if job.isdecimal() else 0
    else:
        host = "localhost" if hosts == 1 else None
        number = zlib.crc32(environment.get("PMIX_NAMESPACE", "").encode())
    return Cluster(
        variables.kind,
        variables.read("OMPI_COMM_WORLD_RANK"),
        count,
        hosts,
        variables.join(host, PORTS + number % 4096),
        variables.find("OMPI_COMM_WORLD_LOCAL_RANK"),
    )


def _read_tpu_hosts(variables: _Variables) -> Cluster | None:
    """Read the hosts of a slice, and the slices where there are several (GKE, queued resources)."""
    environment = variables.environment
    names = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "")
    workers = [name.strip() for name in names.split(",") if name.strip()]
    slices = variables.find("MEGASCALE_NUM_SLICES") or 1
    hosts = slices * max(1, len(workers))
    if hosts == 1:
        return None
    index = variables.read("TPU_WORKER_ID") if len(workers) > 1 else 0
    if slices > 1:
        index += variables.read("MEGASCALE_SLICE_ID") * max(1, len(workers))
    first = environment.get("MEGASCALE_COORDINATOR_ADDRESS") or next(iter(workers), "")
    host = first.partition(":")[0] or None
    return Cluster(variables.kind, index, hosts, hosts, variables.join(host, TPU_PORT))


def _read_kubernetes_job(variables: _Variables) -> Cluster | None:
    """Read the number of a Pod of an indexed Job; how many there are is not among its variables."""
    index = variables.find("JOB_COMPLETION_INDEX")
    return None if index is None else Cluster(variables.kind, index)
