"""Settings of a process that computes on a CPU: memory and programs are kept, a device per core.

A command sets them before JAX starts; in Python `aatjax.fit` calls `keep_memory`, and nothing else
is set. What the environment says already is never changed.
"""

import contextlib
import ctypes
import errno
import functools
import gc
import importlib.util
import math
import os
import platform
import sys
import warnings
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

# Parameters of glibc's mallopt (malloc.h).
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4
GOOGLE = "0x1ae0"  # vendor of TPUs on the PCI bus


@functools.cache
def keep_memory() -> bool:
    """Have freed memory kept for the next step instead of being given back to the system.

    XLA:CPU takes and frees its buffers at every execution; glibc maps large ones again each time,
    and the system clears them page by page: up to a third of a training step. The process then
    keeps the most that it ever used at once. Nothing happens where the C library is not glibc, or
    where the environment tunes it (`MALLOC_...`, `GLIBC_TUNABLES`).

    Returns:
        Whether it was set.
    """
    tuned = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if tuned or platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = {MMAP_MAX: 0, TRIM_THRESHOLD: -1, TOP_PAD: 2**28}
    return all([mallopt(parameter, value) for parameter, value in settings.items()])


@contextlib.contextmanager
def pause_collection() -> Iterator[None]:
    """Search for no reference cycles in the block, or the function that this decorates.

    Where millions of objects are made that stay, each search visits all of them for nothing: it is
    nearly half of the time in which a long list is opened.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def prepare_process() -> None:
    """Set what a command wants of JAX; without effect once JAX is imported.

    Where compiled programs cannot be kept, a warning says so.
    """
    keep_memory()
    if "jax" in sys.modules:
        return
    wanted = {
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    if (platforms := choose_platforms(os.environ)) is not None:
        wanted["JAX_PLATFORMS"] = platforms
    if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        wanted["JAX_NUM_CPU_DEVICES"] = str(count_cores())
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = find_compiled()
        if (reason := _explain_unwritable(folder)) is None:
            wanted["JAX_COMPILATION_CACHE_DIR"] = str(folder)
        else:
            warnings.warn(
                f"{folder}: compiled programs cannot be kept here ({reason}), so every command "
                "compiles again: set XDG_CACHE_HOME to a folder that can be written",
                stacklevel=2,
            )
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


def choose_platforms(environment: Mapping[str, str], root: Path = Path("/")) -> str | None:
    """Return `cpu` where the TPU is the only accelerator that JAX could use, and there is none.

    With the TPU's compiler installed (`aatjax[tpu]`) JAX would try it, which prints alarms and may
    wait for a metadata server. None where JAX is to choose: a platform is asked for, variables or
    devices of a TPU are there, or a plugin of another accelerator.
    """
    if importlib.util.find_spec("libtpu") is None or environment.get("JAX_PLATFORMS"):
        return None
    if importlib.util.find_spec("jax_plugins") or entry_points(group="jax_plugins"):
        return None
    signs = ("TPU_", "CLOUD_TPU", "COLAB_TPU", "MEGASCALE_", "JAX_FORCE_TPU", "PJRT_")
    if any(name.startswith(signs) for name in environment):
        return None
    patterns = ("dev/accel*", "dev/vfio/*")
    if any(True for pattern in patterns for _ in root.glob(pattern)):
        return None
    vendors = (file.read_text().strip() for file in root.glob("sys/bus/pci/devices/*/vendor"))
    return None if GOOGLE in vendors else "cpu"


def _explain_unwritable(folder: Path) -> str | None:
    """Create a folder, and return why nothing can be written there, or None."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return error.strerror or type(error).__name__
    return None if os.access(folder, os.W_OK | os.X_OK) else os.strerror(errno.EACCES)


def find_user_cache() -> Path:
    """Return the user's cache folder of this package: sounds, compiled programs, downloads."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "aatjax"


def find_compiled() -> Path:
    """Return the folder of compiled programs, for this version of JAX and kind of processor."""
    from aatjax.io.digest import hash_bytes

    about = f"{platform.machine()} {read_cpu_info().get('flags') or platform.processor()}"
    name = f"{version('jaxlib')}-{hash_bytes(about)[:12]}"
    return find_user_cache() / "compiled" / name


@functools.cache
def read_cpu_info() -> dict[str, str]:
    """Return what Linux says of the last processor (`model name`, `flags`); elsewhere nothing."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def multiplies_bfloat16(device: Any) -> bool:
    """Return whether a device of JAX has instructions that multiply bfloat16; others emulate it.

    TPUs, GPUs (NVIDIA from compute capability 8.0 on), CPUs with AMX, AVX512-BF16 or Arm's BF16.
    """
    if device.platform == "cpu":
        about = read_cpu_info()
        units = {*about.get("flags", "").split(), *about.get("Features", "").split()}
        limited = "xla_cpu_max_isa" in os.environ.get("XLA_FLAGS", "")
        return not limited and bool(units & {"amx_bf16", "avx512_bf16", "bf16"})
    # "7.5" on NVIDIA; AMD names an architecture (gfx90a), TPUs have none.
    major = str(getattr(device, "compute_capability", "")).partition(".")[0]
    return not major.isdecimal() or int(major) >= 8


def count_cores() -> int:
    """Return the cores that this process may use: no hyper-threads, no more than its quota."""
    if hasattr(os, "sched_getaffinity"):
        allowed = os.sched_getaffinity(0)
    else:
        allowed = set(range(os.cpu_count() or 1))
    folder = Path("/sys/devices/system/cpu")
    siblings = set()
    for number in allowed:
        try:
            listed = (folder / f"cpu{number}/topology/thread_siblings_list").read_text()
        except OSError:
            listed = str(number)
        siblings.add(listed)
    return max(1, min(len(siblings), read_quota()))


def read_quota(file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Return the cores that a container grants (cgroup 2), or a large number without a limit."""
    try:
        quota, period = file.read_text().split()
        return math.ceil(int(quota) / int(period))
    except (OSError, ValueError):  # no such file, or the quota "max"
        return sys.maxsize


def measure_memory() -> int:
    """Return the bytes of physical memory; 8 GiB where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 2**33
