"""Devices of a topology that is not there: TPU pods by the TPU's own compiler, fake CPUs."""

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax

from aatjax.errors import UsageError

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak bf16 FLOP/s of a chip, bytes of high-bandwidth memory, and its bytes/s."""

    flops: float
    memory: float
    bandwidth: float


CHIPS = {
    "v4": Chip(275e12, 32 * GIB, 1228e9),
    "v5e": Chip(197e12, 16 * GIB, 819e9),
    "v5p": Chip(459e12, 95 * GIB, 2765e9),
    "v6e": Chip(918e12, 32 * GIB, 1640e9),
    "tpu7x": Chip(2307e12, 192 * GIB, 7380e9),
}
"""Google's figures (docs.cloud.google.com/tpu/docs, pages of each version), whole chips."""

LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""Environment in which libtpu compiles without a TPU."""


def hide_accelerators(topologies: Sequence[str]) -> None:
    """Keep JAX from starting an accelerator, unless the GPU is one of the topologies."""
    if all(not name.startswith("gpu") for name in topologies):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])


def find_devices(topology: str) -> tuple[list[Any], Chip | None]:
    """Return the devices of a topology such as `v5e:4x4`, `cpu:8` or `gpu`, and one's figures.

    Raises:
        UsageError: an unknown name, or a size that libtpu does not support.
    """
    kind, _, grid = topology.partition(":")
    if kind == "cpu":
        return _find_cpus(topology, grid), None
    if kind == "gpu":
        try:
            devices = jax.devices("gpu")
        except RuntimeError as error:
            raise UsageError(f"topology 'gpu': no GPU found: {error}") from error
        return devices[: int(grid)] if grid.isdigit() else devices, None
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+)+", grid):
        raise UsageError(
            f"topology {topology!r}: give a TPU as {', '.join(CHIPS)} with its grid (v5e:16x16, "
            "v5p:4x4x4), cpu:8, or gpu"
        )
    for name, value in LIBTPU.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:
        message = (str(error).splitlines() or [type(error).__name__])[0][:200]
        if "libtpu" in message.lower() or "not implemented" in message:
            message += "; pip install 'aatjax[tpu]' for the TPU compiler"
        raise UsageError(f"topology {topology!r}: {message}") from error
    chip = CHIPS[kind]
    each = len(devices) / count_chips(topology, len(devices))  # devices per chip
    return list(devices), Chip(chip.flops / each, chip.memory / each, chip.bandwidth / each)


def find_memory(devices: Sequence[Any], chip: Chip | None) -> int | None:
    """Return the bytes that a device has for programs and arrays; None for CPUs."""
    if chip is not None:
        return int(chip.memory)
    if devices[0].platform == "cpu":
        return None
    return (devices[0].memory_stats() or {}).get("bytes_limit")


def _find_cpus(topology: str, count: str) -> list[Any]:
    if not count.isdigit() or int(count) < 1:
        raise UsageError(f"topology {topology!r}: give the number of devices, such as cpu:8")
    with contextlib.suppress(RuntimeError):  # the backend has started already
        jax.config.update("jax_num_cpu_devices", int(count))
    devices = jax.devices("cpu")
    if len(devices) < int(count):
        raise UsageError(
            f"topology {topology!r}: JAX has started with {len(devices)} CPU devices: run it in a "
            f"new process, or set XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return devices[: int(count)]


def count_chips(topology: str, devices: int) -> int:
    """Return the number of chips; a chip of some generations is two devices."""
    kind, _, grid = topology.partition(":")
    return math.prod(map(int, grid.split("x"))) if kind in CHIPS else devices
