"""`aatjax plan` as a table of methods and pods."""

import json
import subprocess
import sys
from typing import Annotated, Any

import tyro

HEADS = (
    "method",
    "topology",
    "trainable",
    "memory per chip",
    "of it arguments",
    "all-reduce per step",
    "other collectives",
    "kernels",
    "FLOPs per chip",
    "step at least",
    "clips/s per host",
    "compile",
)


def plan_table(
    topologies: tuple[str, ...] = ("v5e:4x4", "v5e:16x16", "v5p:4x4x4", "v6e:16x16"),
    methods: tuple[str, ...] = ("soft_moa", "dense_moa", "aat", "full"),
    per_device: int = 16,
    frames: int = 1024,
    more: Annotated[str, tyro.conf.arg(metavar="FLAGS")] = "",
) -> None:
    """Print `aatjax plan` of AST-base for several methods and pods as a Markdown table.

    Every row is a compilation of a minute or two on two cores. Needs `pip install 'aatjax[tpu]'`.

    Args:
        topologies: pods.
        methods: rows of `aatjax methods`.
        per_device: clips per chip.
        frames: input length.
        more: further flags of `aatjax plan`, in one string.
    """
    print(f"| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}", flush=True)
    flags = ["--per-device", str(per_device), "--model.frames", str(frames), *more.split()]
    for topology in topologies:
        for method in methods:
            row = make_row(method, plan(method, topology, flags))
            print(f"| {' | '.join(row)} |", flush=True)


def plan(method: str, topology: str, flags: list[str]) -> dict[str, Any]:
    """Return the plan of one method on one pod, from a process of its own."""
    command = [sys.executable, "-c", "from aatjax.cli.main import main; main()", "plan", "default"]
    command += ["--method", method, "--topology", topology, "--json", "--classes", "50"]
    command += ["--model.source", "random:base", "--model.dtype", "bfloat16", "--model.scan"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True)
    if not done.stdout.strip():
        raise SystemExit(f"{method} on {topology}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[0])


def make_row(method: str, found: dict[str, Any]) -> list[str]:
    """Return the cells of one plan."""
    moved = dict(found["collectives"])
    reduced = moved.pop("all-reduce", (0, 0))[1]
    rest = ", ".join(f"{kind} {size / 1e6:.1f} MB" for kind, (_, size) in moved.items()) or "none"
    verdict = "" if found["fits"] else f" (over by {found['over'] / 2**30:.1f})"
    step, hosts = found["step_s"], found["clips_per_host"]
    return [
        method,
        found["topology"],
        f"{found['trainable']:,}",
        f"{found['needed'] / 2**30:.1f} of {found['memory'] / 2**30:.0f} GiB{verdict}",
        f"{found['arguments'] / 2**20:.0f} MiB",
        f"{reduced / 1e6:.2f} MB",
        rest,
        str(found["kernels"]),
        f"{found['flops'] / 1e12:.2f} T",
        "" if step is None else f"{1e3 * step:.0f} ms",
        "" if hosts is None else f"{hosts:,.0f}",
        f"{found['compile_s']:.0f} s",
    ]
