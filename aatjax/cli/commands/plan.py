"""`aatjax plan`: whether a step fits a machine that is not here."""

import argparse
import sys
from typing import Any

from aatjax.cli.arguments import config_of
from aatjax.errors import UsageError

HELP = """usage: aatjax plan [CONFIG] --topology NAME ... [--method NAME] [--FIELD VALUE ...]

Compiles the train step of CONFIG for a TPU, a pod, fake CPU devices or the GPU here, and prints
whether it fits, bytes a device, collectives, FLOPs, and lower bounds on time and input. Needs no
TPU, no data and no weights. Exit code 1 where it does not fit.

  --topology NAME    v4, v5e, v5p, v6e or tpu7x with a grid (v5e:16x16, v5p:4x4x4), cpu:8, gpu
  --per-device N     clips a device a step (default: training.batch-size over all devices)
  --classes N        outputs of the head where the data do not tell (default 50)
  --advise           also compile what could be changed, as is done where it does not fit
  --json             one JSON object a topology
  --method NAME      another method: a row of `aatjax methods`, or one at its defaults

configs: {configs}
every field of the config is a flag: aatjax plan CONFIG --flags lists them
"""


def main(arguments: list[str]) -> None:
    """Runs `aatjax plan`."""
    config, options = config_of("plan", arguments, HELP, _flags)
    import json

    from aatjax.analysis import plan

    if not options.topology:
        raise UsageError("plan needs --topology, such as v5e:4x4, cpu:8 or gpu")
    plan.prepare_environment(options.topology)
    classes = options.classes or plan.classes_of(config) or 50
    more = {"num_classes": classes, "batch_per_device": options.per_device}
    _, remark = plan.shape_of(config.model, classes)
    if remark is not None:
        print(f"aatjax: {remark}", file=sys.stderr)
    fits = True
    for topology in options.topology:
        found = plan.plan(config, topology, **more)
        fits = fits and found.fits
        rows = []
        if options.advise or not found.fits:
            rows = plan.advice(config, topology, found, **more)
        if options.json:
            changes = {what: one.to_json() for what, one in rows}
            print(json.dumps({**found.to_json(), "advice": changes}), flush=True)
        else:
            print(_plan_text(config.petl.name, found, rows), flush=True)
    if not fits:
        raise SystemExit(1)


def _plan_text(method: str, found: Any, rows: list[tuple[str, Any]]) -> str:
    """A plan as a person reads it."""

    def gib(size: float) -> str:
        return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"

    have = "" if found.memory is None else f" of {gib(found.memory)}"
    verdict = "fits" if found.fits else f"does not fit, by {gib(found.over)}"
    chips = f"{found.chips} chips, " if found.chips != found.devices else ""
    lines = [
        f"{method} on {found.topology}: {chips}{found.devices} devices, {found.hosts} hosts, "
        f"{found.batch_size} clips a step, {found.dtype}, {found.trainable:,} trainable",
        f"  memory a device   {verdict}: {gib(found.needed)}{have}",
    ]
    if found.arguments:
        kept = found.outputs - found.aliased
        parts = [f"arguments {gib(found.arguments)}", f"temporaries {gib(found.temporaries)}"]
        lines.append(f"                    {', '.join([*parts, f'outputs {gib(kept)}'])}")
        moved = [f"{n} {kind} {gib(size)}" for kind, (n, size) in found.collectives.items()]
        lines.append(f"  collectives       {', '.join(moved) or 'none'}")
        lines.append(f"  kernels           {found.kernels} Pallas calls a step")
    total = found.flops * found.devices
    lines.append(
        f"  FLOPs             {total / 1e12:.2f} T a step, {found.flops / 1e12:.3f} T a device"
    )
    if found.step_s is not None:
        bound = "compute" if found.step_s == found.compute_s else "memory"
        lines += [
            f"  step              at least {1e3 * found.step_s:.1f} ms ({bound}; "
            f"{1e3 * found.compute_s:.1f} ms compute, {1e3 * found.memory_s:.1f} ms memory, "
            f"{gib(found.traffic)} moved)",
            f"  input             up to {found.clips_per_host:,.0f} clips/s from each host",
        ]
    lines.append(f"  compiled in       {found.compile_s:.0f} s")
    for what, one in rows:
        saved = gib(abs(found.needed - one.needed))
        word = "saves" if one.needed < found.needed else "adds"
        lines.append(
            f"  {what:<26} {word} {saved}: {gib(one.needed)}, {'fits' if one.fits else 'too much'}"
        )
    return "\n".join(lines)


def _flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--topology", nargs="+", default=[])
    parser.add_argument("--per-device", type=int)
    parser.add_argument("--classes", type=int)
    parser.add_argument("--advise", action="store_true")
    parser.add_argument("--json", action="store_true")
