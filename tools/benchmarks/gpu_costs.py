"""Cost of the kernels on an H100, read from programs that XLA compiles without one."""

import contextlib
import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from aatjax.analysis.hlo import Program
from benchmarks import programs
from benchmarks.programs import Job

IMPLEMENTATIONS = {"soft_moe": ("gpu", "xla", "reference"), "attention": ("gpu", "blocked")}
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
PTXAS = re.compile(
    r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers", re.S
)


def gpu_costs(
    op: programs.Op = "soft_moe",
    shapes: tuple[str, ...] = (),
    only: tuple[programs.Pass, ...] = ("forward", "backward", "both"),
    implementations: tuple[str, ...] = (),
    dtype: programs.Dtype = "bfloat16",
) -> None:
    """Estimate the cost of the kernels on an H100 from programs that XLA compiles without one.

    For every shape and implementation it compiles forward, backward and both, and prints

    HBM/N: operands and results of all kernels over N, the bytes of one activation tensor, without
    the L2 cache.
    kernels: device operations.
    MiB: temporaries beside arguments and results.
    Then registers per thread and spilled bytes of each Pallas kernel.

    XLA cannot compile some plain programs without trying its tilings on a device; these are
    reported. Nothing is timed. Needs XLA's CUDA compiler and an assembler, but no GPU or CUDA:

    pip install --no-deps jax-cuda13-plugin==VERSION_OF_JAX jax-cuda13-pjrt==VERSION_OF_JAX;
    pip install triton

    Args:
        op: the op.
        shapes: batch,tokens,experts,slots,bottleneck, or batch,tokens,heads,width of attention.
        only: passes.
        implementations: names.
        dtype: type of the activations.
    """
    assembler = find_assembler()
    for shape in shapes or programs.SHAPES[op]:
        for name in implementations or IMPLEMENTATIONS[op]:
            for which in only:
                job = Job(op, tuple(map(int, shape.split(","))), name, dtype, which)
                cost, kernels = estimate(job, assembler)
                row = f"{shape:16} {name:9} {which:8}"
                if cost is None:
                    print(f"{row} XLA needs a device to choose its tiles", flush=True)
                    continue
                row += f" {cost['bytes'] / job.tensor_bytes:6.2f}N {cost['kernels']:3} kernels"
                row += f" {cost['temporaries'] / 2**20:7.1f} MiB"
                row += "".join(f"; {name} {text}" for name, text in sorted(kernels.items()))
                print(row, flush=True)


def find_assembler() -> str:
    """Return ptxas: NVIDIA's own, or the one of the package triton."""
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folder = Path(triton.origin).parent / "backends/nvidia/bin"
        for candidate in (folder / "ptxas-blackwell", folder / "ptxas"):
            if candidate.is_file():
                return str(candidate)
    installed = shutil.which("ptxas")
    if installed is None:
        raise SystemExit("no ptxas: pip install triton")
    return installed


def estimate(job: Job, assembler: str) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """Return the figures of a program, None where XLA needs a device, and of its Pallas kernels."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.gpu_costs", job.to_json()],
            cwd=Path(__file__).parents[1],
            env=os.environ | dict(JAX_PLATFORMS="cpu", XLA_FLAGS=f"--xla_dump_to={folder}"),
            capture_output=True,
            text=True,
        )
        if "find output tile sizes" in done.stderr:
            return None, {}
        if done.returncode:
            raise SystemExit(f"{job}: the compilation failed\n{done.stderr[-3000:]}")
        kernels = {}
        for path in Path(folder).glob("*.ptx"):
            name = re.search(r"\.entry (_\w+)", path.read_text())
            if name:
                kernels[name.group(1)] = assemble(path, assembler)
    return json.loads(done.stdout.splitlines()[-1]), kernels


def assemble(path: Path, assembler: str) -> str:
    """Return registers and spilled bytes of one PTX file."""
    command = [assembler, "-v", "-arch=sm_90a", str(path), "-o", os.devnull]
    match = PTXAS.search(subprocess.run(command, capture_output=True, text=True).stderr)
    if match is None:
        return "not assembled"
    stores, loads, registers = map(int, match.groups())
    return f"{registers} registers" + (f", {stores}+{loads} bytes spilled" if stores else "")


def compile_program(job: Job) -> dict[str, Any]:
    """Return HBM bytes, kernels and temporaries of a program; XLA writes its PTX to a file."""
    logging.disable(logging.CRITICAL)
    import jax
    import jax_plugins.xla_cuda13 as plugin
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    with contextlib.suppress(Exception):  # it registers the compiler, then finds no device
        plugin.initialize()
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=H100, topology="1x1x1"
    )
    mesh = Mesh(np.array(topology.devices[:1]), ("data",))
    whole = NamedSharding(mesh, PartitionSpec())
    function, arguments = programs.make_program(job)
    with jax.set_mesh(mesh):
        jitted = jax.jit(function, in_shardings=whole, out_shardings=whole)
        compiled = jitted.lower(*arguments).compile()
    program, memory = Program(compiled.as_text() or ""), compiled.memory_analysis()
    return {
        "bytes": program.count_traffic(),
        "kernels": len(program.list_movers()),
        "temporaries": getattr(memory, "temp_size_in_bytes", 0),
    }


if __name__ == "__main__":
    print(json.dumps(compile_program(Job.from_json(sys.argv[1]))), flush=True)
    os._exit(0)  # XLA's CUDA plugin does not end cleanly without a device
