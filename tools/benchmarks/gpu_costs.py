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
from benchmarks import append_row, programs
from benchmarks.programs import Job

IMPLEMENTATIONS = {
    "soft_moe": ("gpu", "xla", "reference"),
    "attention": ("cudnn", "gpu", "blocked"),
}
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
LIBRARY_PRODUCTS = "--xla_gpu_enable_triton_gemm=false"
"""Products by cuBLAS: XLA's own would ask a device for their tiles."""
CUDNN = 91500
"""Version of cuDNN that the programs are for."""
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


def gpu_step(
    method: str = "soft_moa",
    frames: int = 1024,
    batch: int = 16,
    kernels: tuple[str, ...] = ("none", "cudnn", "gpu"),
    out: Path | None = None,
) -> None:
    """Estimate the cost of a training step of AST-base on an H100, compiled without one.

    bfloat16, blocks scanned. Prints the bytes that all kernels read and write, without the L2
    cache, their number, and the temporaries. Needs what `gpu-costs` needs.

    Args:
        method: the method.
        frames: input length.
        batch: clips per step.
        kernels: what runs attention and the mixture, each in a row: see `--kernels` of training.
        out: CSV file that gets a row for each.
    """
    for name in kernels:
        row: dict[str, Any] = {"method": method, "frames": frames, "batch": batch}
        row["kernels"] = name
        done = run_alone(json.dumps({"step": row}), {"XLA_FLAGS": LIBRARY_PRODUCTS})
        if done is None:
            print(f"{name:16} XLA needs a device to choose its tiles", flush=True)
            continue
        print(
            f"{name:16} {done['bytes'] / 1e9:6.1f} GB, {done['kernels']} kernels, temporaries "
            f"{done['temporaries'] / 2**30:.2f} GiB",
            flush=True,
        )
        append_row(out, {**row, "kernels_run": done.pop("kernels"), **done})


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
        cost = run_alone(job.to_json(), {"XLA_FLAGS": f"--xla_dump_to={folder}"})
        if cost is None:
            return None, {}
        kernels = {}
        for path in Path(folder).glob("*.ptx"):
            name = re.search(r"\.entry (_\w+)", path.read_text())
            if name:
                kernels[name.group(1)] = assemble(path, assembler)
    return cost, kernels


def run_alone(job: str, variables: dict[str, str]) -> dict[str, Any] | None:
    """Compile a program in a process of its own; None where XLA needs a device for it."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_costs", job],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"JAX_PLATFORMS": "cpu", **variables},
        capture_output=True,
        text=True,
    )
    if "find output tile sizes" in done.stderr:
        return None
    if done.returncode:
        raise SystemExit(f"{job}: the compilation failed\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def assemble(path: Path, assembler: str) -> str:
    """Return registers and spilled bytes of one PTX file."""
    command = [assembler, "-v", "-arch=sm_90a", str(path), "-o", os.devnull]
    match = PTXAS.search(subprocess.run(command, capture_output=True, text=True).stderr)
    if match is None:
        return "not assembled"
    stores, loads, registers = map(int, match.groups())
    return f"{registers} registers" + (f", {stores}+{loads} bytes spilled" if stores else "")


def make_mesh() -> Any:
    """Return a mesh of one H100 that is not there, with its compiler and cuDNN."""
    logging.disable(logging.CRITICAL)
    import jax_plugins.xla_cuda13 as plugin
    from jax._src.cudnn import fused_attention_stablehlo as cudnn
    from jax.experimental import topologies

    import aatjax_kernels.attention as attention
    from aatjax.train.sharding import MeshShape

    with contextlib.suppress(Exception):  # it registers the compiler, then finds no device
        plugin.initialize()
    stated: Any = cudnn
    stated.check_cudnn_version = lambda: CUDNN
    stated.check_compute_capability = lambda least: True
    stated.is_cuda_compute_capability_equal = lambda other: False
    reasons = {"tokamax": "not stated here"}
    attention.explain_unsupported = lambda name, query: reasons.get(name)
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=H100, topology="1x1x1"
    )
    return MeshShape().make(list(topology.devices[:1]))


def compile_program(job: Job) -> dict[str, Any]:
    """Return HBM bytes, kernels and temporaries of a program; XLA writes its PTX to a file."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = make_mesh()
    whole = NamedSharding(mesh, PartitionSpec())
    function, arguments = programs.make_program(job)
    with jax.set_mesh(mesh):
        jitted = jax.jit(function, in_shardings=whole, out_shardings=whole)
        return measure(jitted.lower(*arguments).compile())


def compile_step(method: str, frames: int, batch: int, kernels: str) -> dict[str, Any]:
    """Return the same of a training step of AST-base."""
    import jax

    from aatjax import ops
    from aatjax.analysis.plan import make_abstract_step
    from aatjax.config import Config
    from aatjax.models.config import ASTConfig
    from aatjax.petl import make_method
    from aatjax.train.training import Training

    mesh = make_mesh()
    config = Config(petl=make_method(method), training=Training(batch_size=batch))
    shape = ASTConfig(frames=frames, num_classes=50, dtype="bfloat16", scan=True)
    with ops.choosing_kernels(kernels, backward=True), jax.set_mesh(mesh):
        step, arguments, _ = make_abstract_step(config, shape, mesh, batch)
        return measure(step.lower(*arguments).compile())


def measure(compiled: Any) -> dict[str, Any]:
    """Return HBM bytes, kernels and temporaries of a compiled program."""
    program, memory = Program(compiled.as_text() or ""), compiled.memory_analysis()
    return {
        "bytes": program.count_traffic(),
        "kernels": len(program.list_movers()),
        "temporaries": getattr(memory, "temp_size_in_bytes", 0),
    }


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    found = (
        compile_step(**asked["step"])
        if "step" in asked
        else compile_program(Job.from_json(sys.argv[1]))
    )
    print(json.dumps(found), flush=True)
    os._exit(0)  # XLA's CUDA plugin does not end cleanly without a device
