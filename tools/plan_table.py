"""`aatjax plan` of AST-base for several methods and pods, as a Markdown table.

    python tools/plan_table.py
    python tools/plan_table.py --topologies v5e:4x4 --methods soft_moa --per-device 32

Every cell is a compile of its own, a minute or two on two cores. Needs `pip install 'aatjax[tpu]'`.
"""

import argparse
import json
import subprocess
import sys
from typing import Any

TOPOLOGIES = ("v5e:4x4", "v5e:16x16", "v5p:4x4x4", "v6e:16x16")
METHODS = ("soft_moa", "dense_moa", "aat", "full")
HEADS = (
    "method",
    "topology",
    "trainable",
    "memory a chip",
    "of it arguments",
    "all-reduce a step",
    "other collectives",
    "kernels",
    "FLOPs a chip",
    "step at least",
    "clips/s a host",
    "compile",
)


def cell(method: str, topology: str, args: argparse.Namespace) -> dict[str, Any]:
    """The plan of one method on one pod."""
    command = [
        sys.executable,
        "-c",
        "from aatjax.cli.main import main; main()",
        "plan",
        "default",
        "--method",
        method,
        "--topology",
        topology,
        "--per-device",
        str(args.per_device),
        "--json",
        "--classes",
        "50",
        "--model.source",
        "random:base",
        "--model.frames",
        str(args.frames),
        "--model.dtype",
        "bfloat16",
        "--model.scan",
        *args.more,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if not done.stdout.strip():
        raise SystemExit(f"{method} on {topology}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[0])


def row(method: str, found: dict[str, Any]) -> list[str]:
    """One row of the table."""
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


def main() -> None:
    """Prints the table, a row as soon as it is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topologies", nargs="+", default=TOPOLOGIES)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--per-device", type=int, default=16, help="clips a chip (default 16)")
    parser.add_argument("--frames", type=int, default=1024, help="10 ms frames (default 1024)")
    parser.add_argument("more", nargs="*", help="more flags of `aatjax plan`, after --")
    args = parser.parse_args()
    print(f"| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}", flush=True)
    for topology in args.topologies:
        for method in args.methods:
            print(f"| {' | '.join(row(method, cell(method, topology, args)))} |", flush=True)


if __name__ == "__main__":
    main()
