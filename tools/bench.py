"""Benchmarks and measurements: the figures of README, docs and kernels/README.md.

    python tools/bench.py COMMAND [flags]
    python tools/bench.py COMMAND --help

Each command runs in one process, prints a table, and names what it needs beyond aatjax.
"""

import importlib
import sys

import tyro

from aatjax.io.host import prepare_process

COMPILED = ("tpu_costs", "gpu_costs", "plans")
"""Modules that compile for other devices; the others run as a command of aatjax does."""

COMMANDS = {
    "epochs": ("epochs", "epochs of `fit`, relative to a plain PyTorch loop"),
    "methods": ("training", "training step of every method, relative to a linear probe"),
    "step": ("training", "training step of AST-base, relative to PyTorch"),
    "prefix": ("training", "epochs with and without the stored frozen prefix"),
    "compare-methods": ("compare", "accuracy of several methods on one task"),
    "long-tail": ("long_tail", "macro-F1 with and without balance, on few clips of some classes"),
    "adapt": ("adapt_sets", "`aatjax adapt` on the folds of real sets, without any setting"),
    "verdict": ("verdict", "every method on the folds of five tasks, as configs/verdict.py says"),
    "kernels": ("kernels", "Soft-MoA layer in every implementation that runs here"),
    "kernel-costs": ("tpu_costs", "cost of the kernels on a TPU, compiled without one"),
    "gpu-costs": ("gpu_costs", "cost of the kernels on an H100, compiled without one"),
    "gpu-step": (
        "gpu_costs",
        "cost of a step of AST-base on an H100, compiled without one",
    ),
    "plan-table": ("plans", "`aatjax plan` for several methods and pods"),
    "features": ("data", "log-mel features, relative to transformers"),
    "reading": ("data", "clips per second: decoded, cached, prepared"),
    "scale": ("scale", "time and memory of a start with a million rows, thousands of classes"),
    "serve": ("serving", "clips per second for many adapters"),
    "serve-latency": ("latency", "latency and memory of `aatjax serve` under load"),
    "coverage": ("coverage", "how often conformal sets contain the true class"),
    "intervals": ("intervals", "coverage of the intervals, false alarms and power of the tests"),
    "doctor-scores": ("doctor_scores", "precision and recall of `aatjax doctor` on planted faults"),
    "tables": ("tables", "tables of the documents, made again from the CSV files of docs/figures"),
}


def main(arguments: list[str]) -> None:
    """Run one command."""
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        rows = (f"  {name:<16} {text}" for name, (_, text) in COMMANDS.items())
        print((__doc__ or "") + "\n" + "\n".join(rows))
        return
    if name not in COMMANDS:
        raise SystemExit(f"unknown command {name!r}: one of {', '.join(COMMANDS)}")
    if COMMANDS[name][0] not in COMPILED:
        prepare_process()
    module = importlib.import_module(f"benchmarks.{COMMANDS[name][0]}")
    function = getattr(module, name.replace("-", "_"))
    tyro.cli(function, prog=f"bench.py {name}", args=arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
