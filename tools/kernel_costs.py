"""What the ops cost on a TPU, read from programs that libtpu compiles without one.

    python tools/kernel_costs.py
    python tools/kernel_costs.py --chips v6e --shapes 128,1214,8,1,6 --only backward
    python tools/kernel_costs.py --op attention --only both

For every chip, shape and implementation it compiles forward, backward and both together, and prints

    kernel   static cycles of the Pallas kernels over those of their floor, the bytes that must move
             (soft_moe 2N forward and 3N backward, attention 4N and 8N, N one activation tensor) at
             the chip's bandwidth
    us       sum over the program's ops of max(static cycles / clock, HBM bytes / bandwidth)
    HBM/N    bytes moved to and from HBM over N: operands and results that are not placed in VMEM

The cycles are those of the compiler's schedule and DMA model: nothing was timed. They let reads and
writes overlap at full bandwidth each, so a kernel may come out below its floor.

Every program is compiled twice in processes of their own: once for its text, once with the profile
written out, since libtpu may abort after writing that. Needs `pip install 'aatjax[tpu]'`.
"""

import argparse
import functools
import json
import math
import os
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from aatjax.analysis.hlo import Program

CHIPS = {"v5e": ("v5e:2x2", 1.5e9, 819e9), "v5p": ("v5p:2x2x1", 1.75e9, 2765e9)}
CHIPS["v6e"] = ("v6e:2x2", 1.75e9, 1640e9)
SHAPES = {
    "soft_moe": (
        "128,1214,8,1,6",
        "32,1214,8,1,6",
        "32,590,8,1,6",
        "128,110,8,1,6",
        "32,1214,16,8,6",
    ),
    "attention": ("128,110,12,64", "32,590,12,64", "32,1214,12,64", "8,3590,12,64"),
}
"""soft_moe: batch,tokens,experts,slots,bottleneck; attention: batch,tokens,heads,width."""
IMPLEMENTATIONS = {
    "soft_moe": ("tpu", "xla", "reference"),
    "attention": ("tpu", "splash", "blocked"),
}
PASSES = {
    "soft_moe": {"forward": 2, "backward": 3, "both": 5},
    "attention": {"forward": 4, "backward": 8, "both": 12},
}
DIM = 768

LIBTPU = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
}
"""No logs: a profile that fails writes gigabytes of them."""


def program(job: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    """The function to compile and the shapes of its arguments."""
    return attention(job) if job["op"] == "attention" else soft_mixture(job)


def tensor(job: dict[str, Any]) -> int:
    """Bytes of one activation tensor."""
    batch, tokens, *rest = job["shape"]
    width = math.prod(rest) if job["op"] == "attention" else DIM
    return batch * tokens * width * (2 if job["dtype"] == "bfloat16" else 4)


def attention(job: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    """Attention without a mask, of [b, n, h k] as products leave it."""
    import jax
    import jax.numpy as jnp

    from aatjax_kernels.attention import attention, fused

    name, shape = job["implementation"], tuple(job["shape"])
    flat = (*shape[:2], math.prod(shape[2:]))
    x: Any = jax.ShapeDtypeStruct(flat, jnp.dtype(job["dtype"]))

    def forward(*values: Any) -> Any:
        values = tuple(value.reshape(shape) for value in values)
        layer: Any = attention
        out = splash(*values) if name == "splash" else layer(*values, implementation=name)
        return out.reshape(flat)

    def both(*values: Any) -> Any:
        out, pull = jax.vjp(forward, *values[:-1])
        return out, pull(values[-1])

    if job["pass"] == "forward":
        return forward, (x, x, x)
    if job["pass"] == "both" or name not in fused.KERNELS:
        return both, (x, x, x, x)
    heads: Any = jax.ShapeDtypeStruct(shape, x.dtype)
    static = fused.static(name, heads, heads, interpret=False)
    sums = jax.ShapeDtypeStruct((shape[0], shape[2], shape[1]), jnp.float32)

    def pull(*values: Any) -> Any:
        *given, out, dout = (value.reshape(shape) for value in values[:-1])
        grads = fused._backward(static, (*given, None, out, values[-1]), dout)
        return tuple(grad.reshape(flat) for grad in grads if grad is not None)

    return pull, (x, x, x, x, x, sums)


def splash(query: Any, key: Any, value: Any) -> Any:
    """JAX's own kernel for TPU, at the block sizes that it takes: tokens padded to them."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, tokens, heads, width = query.shape
    blocks = range(128, 769, 128)
    block = min(blocks, key=lambda size: (-(-tokens // size) * size, -size))
    padded = -(-tokens // block) * block
    sizes = kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    mask = masks.MultiHeadMask([masks.FullMask((padded, padded))] * heads)
    run = kernel.make_splash_mha(mask=mask, head_shards=1, q_seq_shards=1, block_sizes=sizes)
    there = (jnp.arange(padded) < tokens).astype(jnp.int32)
    segments = kernel.SegmentIds(there, there) if padded > tokens else None
    query, key, value = (
        jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, padded - tokens), (0, 0)))
        for x in (query * width**-0.5, key, value)
    )
    out: Any = jax.vmap(lambda q, k, v: run(q, k, v, segment_ids=segments))(query, key, value)
    return jnp.swapaxes(out[:, :, :tokens], 1, 2)


def soft_mixture(job: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    """The layer with all its parameters."""
    import jax
    import jax.numpy as jnp

    from aatjax_kernels.soft_moe import fused, soft_moe
    from aatjax_kernels.soft_moe.packing import Options

    batch, tokens, experts, slots, width = job["shape"]
    dtype, plain = jnp.dtype(job["dtype"]), jnp.float32
    shaped: Any = jax.ShapeDtypeStruct
    x = shaped((batch, tokens, DIM), dtype)
    given = (
        x,
        shaped((DIM, experts, slots), plain),
        shaped((experts, DIM, width), plain),
        shaped((experts, width), plain),
        shaped((experts, width, DIM), plain),
        shaped((experts, DIM), plain),
    )

    def forward(*values: Any) -> Any:
        layer: Any = soft_moe
        return layer(*values, implementation=job["implementation"])

    def both(*values: Any) -> Any:
        out, pull = jax.vjp(forward, *values[:-1])
        return out, pull(values[-1])

    if job["pass"] == "forward":
        return forward, given
    if job["pass"] == "both" or job["implementation"] == "reference":
        return both, (*given, x)
    # The backward pass alone: what the forward pass kept comes from HBM.
    static = fused.static(job["implementation"], *given[:2], width, Options())
    kept = jax.eval_shape(functools.partial(fused.forward, static), *given, None)[1]
    pull: Any = functools.partial(fused.backward, static)
    return pull, (kept, x)


def compile_program(job: dict[str, Any]) -> str:
    """The program's text for one chip, with activations row-major as they are inside a model."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.experimental.layout import Format, Layout
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[job["chip"]][0])
    mesh = Mesh(np.array(topology.devices[:1]), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec())
    function, given = program(job)

    def place(value: Any) -> Format:
        return Format(Layout(tuple(range(value.ndim))), sharding)

    places = jax.tree.map(place, (given, jax.eval_shape(function, *given)))
    with jax.set_mesh(mesh):
        jitted = jax.jit(function, in_shardings=places[0], out_shardings=places[1])
        return jitted.lower(*given).compile().as_text() or ""


def child(job: dict[str, Any], **environment: str) -> str:
    """Runs one compile in a process of its own and returns what it printed last."""
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    limit = resource.getrlimit(resource.RLIMIT_CORE)[1]
    done = subprocess.run(
        command,
        env=os.environ | LIBTPU | environment,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, limit)),
    )
    if not environment and done.returncode:
        raise SystemExit(f"{job}: the compile failed\n{done.stderr[-3000:]}")
    return done.stdout


def cost(job: dict[str, Any]) -> dict[str, float]:
    """Kernel cycles, modelled seconds and HBM bytes of one program."""
    text = child(job)
    _, clock, bandwidth = CHIPS[job["chip"]]
    cycles: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "profile").mkdir()
        flags = (
            f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
            "--xla_jf_dump_llo_pass_label_regex=^NONE$ "
            f"--xla_jf_dump_static_llo_profile_to={folder}/profile"
        )
        child(job, LIBTPU_INIT_ARGS=flags)
        for path in (Path(folder) / "profile").glob("*.textproto"):
            profile = path.read_text()
            name = re.search(r'hlo_op_name: "(.*)"', profile)
            spent = re.search(r"estimated_cycles: (\d+)", profile)
            if name and spent:
                cycles[name.group(1)] = int(spent.group(1))
    kernel, seconds, missing = 0, 0.0, 0
    program = Program(text)
    for one, moved in program.movers():
        spent = cycles.get(one.name, 0)
        missing += one.name not in cycles and not one.kind.endswith("-done")
        seconds += max(spent / clock, moved / bandwidth)
        kernel += spent if one.kind == "custom-call" else 0
    return dict(kernel=kernel / clock, seconds=seconds, bytes=program.traffic(), missing=missing)


def main() -> None:
    """Prints one row for each chip, shape and implementation."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--chips", nargs="+", default=list(CHIPS), choices=CHIPS)
    parser.add_argument("--op", default="soft_moe", choices=SHAPES)
    parser.add_argument(
        "--shapes",
        nargs="+",
        metavar="N,N,...",
        help="soft_moe: batch,tokens,experts,slots,bottleneck; attention: batch,tokens,heads,width",
    )
    passes = list(PASSES["soft_moe"])
    parser.add_argument("--only", nargs="+", default=passes, choices=passes)
    parser.add_argument("--implementations", nargs="+", metavar="NAME")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    args = parser.parse_args()
    if args.job:
        print(compile_program(json.loads(args.job)))
        return
    for chip in args.chips:
        for shape in args.shapes or SHAPES[args.op]:
            for implementation in args.implementations or IMPLEMENTATIONS[args.op]:
                row = f"{chip} {shape:16} {implementation:10}"
                job: dict[str, Any] = dict(
                    chip=chip,
                    op=args.op,
                    shape=[int(n) for n in shape.split(",")],
                    implementation=implementation,
                    dtype=args.dtype,
                )
                size = tensor(job)
                for only in args.only:
                    got = cost({**job, "pass": only})
                    floor = PASSES[args.op][only] * size / CHIPS[chip][2]
                    row += f"  {only} {1e6 * got['seconds']:6.0f} us {got['bytes'] / size:5.2f}N"
                    row += f" kernel {got['kernel'] / floor:4.2f}" if got["kernel"] else ""
                    row += f" ({got['missing']} unprofiled)" if got["missing"] else ""
                print(row, flush=True)


if __name__ == "__main__":
    main()
