"""What the ops cost on an H100, read from programs that XLA compiles without one.

    python tools/gpu_costs.py
    python tools/gpu_costs.py --op attention --shapes 32,590,12,64 --only both

For every shape and implementation it compiles forward, backward and both together, and prints

    HBM/N       operands and results of all kernels over N, the bytes of one activation tensor; what
                the L2 cache spares is not known
    kernels     device operations
    temporaries MiB beside arguments and results
    Pallas      registers a thread and spilled bytes of each Pallas kernel

XLA cannot compile some plain programs without trying its tilings on a device: these say so. Nothing
was timed. Needs XLA's CUDA compiler and an assembler, but neither a GPU nor CUDA:

    pip install --no-deps jax-cuda13-plugin==VERSION_OF_JAX jax-cuda13-pjrt==VERSION_OF_JAX
    pip install triton
"""

import argparse
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

import kernel_costs

from aatjax.analysis.hlo import Program

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
SEEN = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers", re.S)


def compile_program(job: dict[str, Any]) -> dict[str, Any]:
    """HBM bytes, kernels and temporaries of a program; its PTX goes where XLA_FLAGS says."""
    logging.disable(logging.CRITICAL)
    import jax
    import jax_plugins.xla_cuda13 as plugin
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    with contextlib.suppress(Exception):  # without a device the compiler is registered all the same
        plugin.initialize()
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=H100, topology="1x1x1"
    )
    mesh = Mesh(np.array(topology.devices[:1]), ("data",))
    whole = NamedSharding(mesh, PartitionSpec())
    function, given = kernel_costs.program(job)
    with jax.set_mesh(mesh):
        jitted = jax.jit(function, in_shardings=whole, out_shardings=whole)
        compiled = jitted.lower(*given).compile()
    program = Program(compiled.as_text() or "")
    memory: Any = compiled.memory_analysis()
    movers = list(program.movers())
    return dict(bytes=program.traffic(), kernels=len(movers), temporaries=memory.temp_size_in_bytes)


def assembled(path: Path, assembler: str) -> str:
    """Registers and spilled bytes of one PTX file."""
    command = [assembler, "-v", "-arch=sm_90a", str(path), "-o", os.devnull]
    found = SEEN.search(subprocess.run(command, capture_output=True, text=True).stderr)
    if found is None:
        return "not assembled"
    stores, loads, registers = map(int, found.groups())
    return f"{registers} registers" + (f", {stores}+{loads} bytes spilled" if stores else "")


def find_assembler() -> str:
    """ptxas: NVIDIA's own, or the one that comes with the package triton."""
    candidates = []
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folder = Path(triton.origin).parent / "backends/nvidia/bin"
        candidates = [folder / "ptxas-blackwell", folder / "ptxas"]
    for candidate in candidates:
        if candidate.is_file():
            return str(candidate)
    installed = shutil.which("ptxas")
    if installed is None:
        raise SystemExit("no ptxas: pip install triton")
    return installed


def cost(job: dict[str, Any], assembler: str) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """Figures of one program, None where XLA needs a device, and of each Pallas kernel in it."""
    with tempfile.TemporaryDirectory() as folder:
        environment = dict(JAX_PLATFORMS="cpu", XLA_FLAGS=f"--xla_dump_to={folder}")
        command = [sys.executable, __file__, "--job", json.dumps(job)]
        done = subprocess.run(
            command, env=os.environ | environment, capture_output=True, text=True, check=False
        )
        if "find output tile sizes" in done.stderr:
            return None, {}
        if done.returncode:
            raise SystemExit(f"{job}: the compile failed\n{done.stderr[-3000:]}")
        kernels = {}
        for path in Path(folder).glob("*.ptx"):
            name = re.search(r"\.entry (_\w+)", path.read_text())
            if name:
                kernels[name.group(1)] = assembled(path, assembler)
    return json.loads(done.stdout.splitlines()[-1]), kernels


def main() -> None:
    """Prints one row for each shape, implementation and pass."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--op", default="soft_moe", choices=kernel_costs.SHAPES)
    parser.add_argument("--shapes", nargs="+", metavar="N,N,...", help="see kernel_costs.py")
    passes = list(kernel_costs.PASSES["soft_moe"])
    parser.add_argument("--only", nargs="+", default=passes, choices=passes)
    parser.add_argument("--implementations", nargs="+", metavar="NAME")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    args = parser.parse_args()
    if args.job:
        print(json.dumps(compile_program(json.loads(args.job))), flush=True)
        os._exit(0)  # XLA's CUDA plugin does not end cleanly without a device
    assembler = find_assembler()
    for shape in args.shapes or kernel_costs.SHAPES[args.op]:
        for implementation in args.implementations or IMPLEMENTATIONS[args.op]:
            job: dict[str, Any] = dict(
                op=args.op,
                shape=[int(n) for n in shape.split(",")],
                implementation=implementation,
                dtype=args.dtype,
            )
            for only in args.only:
                got, kernels = cost({**job, "pass": only}, assembler)
                row = f"{shape:16} {implementation:9} {only:8}"
                if got is None:
                    print(f"{row} XLA needs a device to choose its tiles", flush=True)
                    continue
                row += f" {got['bytes'] / kernel_costs.tensor(job):6.2f}N"
                row += f" {got['kernels']:3} kernels {got['temporaries'] / 2**20:7.1f} MiB"
                row += "".join(f"; {name} {said}" for name, said in sorted(kernels.items()))
                print(row, flush=True)


if __name__ == "__main__":
    main()
