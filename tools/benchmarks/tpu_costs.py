"""Cost of the kernels on a TPU, read from programs that libtpu compiles without one."""

import os
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from aatjax.analysis.hlo import Program
from aatjax.analysis.topology import LIBTPU
from benchmarks import programs
from benchmarks.programs import Job

CHIPS = {
    "v5e": ("v5e:2x2", 1.5e9, 819e9),
    "v5p": ("v5p:2x2x1", 1.75e9, 2765e9),
    "v6e": ("v6e:2x2", 1.75e9, 1640e9),
}
"""Topology, clock and memory bandwidth."""

IMPLEMENTATIONS = {
    "soft_moe": ("tpu", "xla", "reference"),
    "attention": ("tpu", "splash", "blocked"),
}
FLOORS = {
    "soft_moe": {"forward": 2, "backward": 3, "both": 5},
    "attention": {"forward": 4, "backward": 8, "both": 12},
}
"""Activation tensors that must move."""


def kernel_costs(
    chips: tuple[Literal["v5e", "v5p", "v6e"], ...] = ("v5e", "v5p", "v6e"),
    op: programs.Op = "soft_moe",
    shapes: tuple[str, ...] = (),
    only: tuple[programs.Pass, ...] = ("forward", "backward", "both"),
    implementations: tuple[str, ...] = (),
    dtype: programs.Dtype = "bfloat16",
) -> None:
    """Estimate the cost of the kernels on a TPU from programs that libtpu compiles without one.

    For every chip, shape and implementation it compiles forward, backward and both, and prints

    kernel: static cycles of the Pallas kernels over those of their floor, the bytes that must move
    (soft_moe 2N forward and 3N backward, attention 4N and 8N, N one activation tensor) at the
    chip's bandwidth.
    us: sum over the program's operations of max(static cycles / clock, HBM bytes / bandwidth).
    HBM/N: bytes moved to and from HBM over N: operands and results that are not in VMEM.

    The cycles are those of the compiler's schedule and DMA model; nothing is timed. They let reads
    and writes overlap at full bandwidth each, so a kernel may come out below its floor.

    Every program is compiled twice in processes of their own: once for its text, once with the
    profile written out, since libtpu may abort after writing it. Needs `pip install 'aatjax[tpu]'`.

    Args:
        chips: TPUs.
        op: the op.
        shapes: batch,tokens,experts,slots,bottleneck, or batch,tokens,heads,width of attention.
        only: passes.
        implementations: names; splash is JAX's own kernel.
        dtype: type of the activations.
    """
    for chip in chips:
        for shape in shapes or programs.SHAPES[op]:
            for name in implementations or IMPLEMENTATIONS[op]:
                row = f"{chip} {shape:16} {name:10}"
                for which in only:
                    job = Job(op, tuple(map(int, shape.split(","))), name, dtype, which, chip)
                    cost, size = estimate(job), job.tensor_bytes
                    floor = FLOORS[op][which] * size / CHIPS[chip][2]
                    row += f"  {which} {1e6 * cost['seconds']:6.0f} us {cost['bytes'] / size:5.2f}N"
                    row += f" kernel {cost['kernel'] / floor:4.2f}" if cost["kernel"] else ""
                    row += f" ({cost['missing']} unprofiled)" if cost["missing"] else ""
                print(row, flush=True)


def estimate(job: Job) -> dict[str, float]:
    """Return the kernel's seconds, the modelled seconds and the HBM bytes of one program."""
    program = Program(run_job(job, {}))
    _, clock, bandwidth = CHIPS[job.chip]
    cycles: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        profile = Path(folder) / "profile"
        profile.mkdir()
        flags = (
            f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
            "--xla_jf_dump_llo_pass_label_regex=^NONE$ "
            f"--xla_jf_dump_static_llo_profile_to={profile}"
        )
        run_job(job, {"LIBTPU_INIT_ARGS": flags})
        for path in profile.glob("*.textproto"):
            text = path.read_text()
            name = re.search(r'hlo_op_name: "(.*)"', text)
            spent = re.search(r"estimated_cycles: (\d+)", text)
            if name and spent:
                cycles[name.group(1)] = int(spent.group(1))
    kernel, seconds, missing = 0, 0.0, 0
    for one, moved in program.list_movers():
        spent = cycles.get(one.name, 0)
        missing += one.name not in cycles and not one.kind.endswith("-done")
        seconds += max(spent / clock, moved / bandwidth)
        kernel += spent if one.kind == "custom-call" else 0
    traffic = program.count_traffic()
    return dict(kernel=kernel / clock, seconds=seconds, bytes=traffic, missing=missing)


def run_job(job: Job, environment: Mapping[str, str]) -> str:
    """Compile in a process of its own and return the program's text."""
    limit = resource.getrlimit(resource.RLIMIT_CORE)[1]
    # No logs: a profile that fails writes gigabytes of them.
    more = {**LIBTPU, "JAX_PLATFORMS": "cpu", "TPU_LOG_DIR": "disabled", **environment}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.tpu_costs", job.to_json()],
        cwd=Path(__file__).parents[1],
        env=os.environ | more,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, limit)),
    )
    if not environment and done.returncode:
        raise SystemExit(f"{job}: the compilation failed\n{done.stderr[-3000:]}")
    return done.stdout


def compile_program(job: Job) -> str:
    """Return the program's text, with activations row-major as they are inside a model."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.experimental.layout import Format, Layout
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[job.chip][0])
    mesh = Mesh(np.array(topology.devices[:1]), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec())
    function, arguments = programs.make_program(job)

    def place(value: Any) -> Format:
        return Format(Layout(tuple(range(value.ndim))), sharding)

    places = jax.tree.map(place, (arguments, jax.eval_shape(function, *arguments)))
    with jax.set_mesh(mesh):
        jitted = jax.jit(function, in_shardings=places[0], out_shardings=places[1])
        return jitted.lower(*arguments).compile().as_text() or ""


if __name__ == "__main__":
    print(compile_program(Job.from_json(sys.argv[1])))
