"""`aatjax bench`: what the methods cost, counted (flops), measured (step), and as they grow."""

import argparse
import dataclasses
from typing import Any

from aatjax.cli.arguments import Parser, nearest
from aatjax.errors import UsageError

HELP = """usage: aatjax bench flops|step|scaling [...]

flops     FLOPs of a clip by part, activations kept, parameters and file, of each method
step      measured training step and inference of each method, in turn in one process
scaling   Soft-MoA against Dense-MoA: experts at a fixed budget, slots, input lengths

aatjax bench KIND --help tells its flags
"""
DEFAULTS = ("soft_moa", "dense_moa", "bottleneck_budget", "aat_ms", "lora", "linear", "full")
BUDGET = 903_672  # of Soft-MoA at N = 7, r = 6, p = 1 on AST-base
STEP_ROWS = (
    "linear",
    "lora",
    "bottleneck_pfeiffer",
    "conformer_pfeiffer",
    "aat_ms",
    "soft_moa",
    "dense_moa",
    "looped_moa",
    "full",
)


def main(arguments: list[str]) -> None:
    """Runs `aatjax bench`."""
    kinds = {"flops": _flops, "step": _step, "scaling": _scaling}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return
    if arguments[0] not in kinds:
        hint = nearest(arguments[0], list(kinds)) or f" (there are {', '.join(kinds)})"
        raise UsageError(f"bench has no kind {arguments[0]!r}{hint}")
    kinds[arguments[0]](arguments[1:])


def _parser(kind: str, *, size: str, frames: int, what: str) -> argparse.ArgumentParser:
    parser = Parser(prog=f"aatjax bench {kind}", description=what, allow_abbrev=False)
    parser.add_argument("--size", default=size, choices=("tiny", "small", "base"))
    parser.add_argument("--frames", type=int, default=frames, help=f"(default {frames})")
    parser.add_argument("--classes", type=int, default=50)
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    parser.add_argument("--markdown", action="store_true", help="a table for a document")
    return parser


def _config(options: argparse.Namespace, **changes: Any) -> Any:
    from aatjax.models.config import ASTConfig

    return ASTConfig.size(
        options.size, frames=options.frames, num_classes=options.classes, **changes
    )


def _methods(names: list[str], config: Any) -> dict[str, Any]:
    """Rows of the papers' tables, `looped_moa`, and `bottleneck_budget` (of Soft-MoA's size)."""
    from aatjax.analysis.step_timing import LoopedMoA
    from aatjax.petl import Adapter
    from aatjax.petl.presets import make_method

    def method(name: str) -> Any:
        if name == "looped_moa":
            return LoopedMoA()
        if name == "bottleneck_budget":
            width = BUDGET * (config.dim / 768) // (config.depth * 2 * config.dim)
            return Adapter(reduction=config.dim / max(1, width))
        return make_method(name)

    return {name: method(name) for name in names}


def _print(options: argparse.Namespace, heads: list[str], rows: list[list[str]]) -> None:
    from aatjax.cli.arguments import text_table

    if options.markdown:
        lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
        print("\n".join("| " + " | ".join(line) + " |" for line in lines))
    else:
        print(text_table(heads, rows))


def _flops(arguments: list[str]) -> None:
    parser = _parser("flops", size="base", frames=1024, what="FLOPs of a clip, counted")
    parser.add_argument("--methods", nargs="+", default=list(DEFAULTS))
    options = parser.parse_args(arguments)
    import json

    from aatjax.analysis.method_costs import method_cost

    config = _config(options)
    costs = [method_cost(config, n, m) for n, m in _methods(options.methods, config).items()]
    if options.json:
        for cost in costs:
            print(json.dumps(cost.to_json()))
        return
    rows = [
        [
            c.name,
            f"{c.trainable:,}",
            f"{c.forward.adapter / 1e9:.3f}",
            f"{c.forward.total / 1e9:.1f}",
            f"{c.training.adapter / 1e9:.3f}",
            f"{c.training.total / 1e9:.1f}",
            f"{c.kept / 2**20:.0f}",
            f"{c.file / 1e6:.1f}",
            ", ".join(f"{k} {v / 1e6:.0f}" for k, v in c.forward.inside.items()),
        ]
        for c in costs
    ]
    print(f"AST-{options.size}, {options.frames} frames, GFLOPs a clip (1 multiply-add = 2)\n")
    heads = [
        "method",
        "trainable",
        "adapters forward",
        "forward",
        "adapters training",
        "training",
        "MiB kept",
        "file MB",
        "inside, forward MFLOPs",
    ]
    _print(options, heads, rows)


def _step(arguments: list[str]) -> None:
    parser = _parser("step", size="small", frames=256, what="measured time of steps, in turn")
    parser.add_argument("--methods", nargs="+", default=list(STEP_ROWS))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument(
        "--variants", action="store_true", help="each method plain, scanned, and scanned with remat"
    )
    options = parser.parse_args(arguments)
    import json

    import jax

    from aatjax.analysis.step_timing import ready
    from aatjax.analysis.timing import in_turn

    plain = _config(options, dtype=options.dtype)
    variants = {"": plain}
    if options.variants:
        variants["+scan"] = dataclasses.replace(plain, scan=True)
        variants["+scan+remat"] = dataclasses.replace(plain, scan=True, remat=True)
    made = {
        name + mark: ready(config, method, batch_size=options.batch_size)
        for name, method in _methods(options.methods, plain).items()
        for mark, config in variants.items()
    }
    train = in_turn({n: r.train for n, r in made.items()}, rounds=options.rounds)
    infer = in_turn({n: r.infer for n, r in made.items()}, rounds=options.rounds)
    linear, dense = train.get("linear"), train.get("dense_moa")
    device = jax.devices()[0]
    found = [
        {
            "name": name,
            "trainable": r.trainable,
            "train_s": train[name].median,
            "train_quartiles_s": train[name].quartiles,
            "infer_s": infer[name].median,
            "over_linear": None if linear is None else train[name].over(linear),
            "over_dense": None if dense is None else train[name].over(dense),
            "temporaries": r.temporaries,
        }
        for name, r in made.items()
    ]
    if options.json:
        for row in found:
            print(json.dumps({"device": device.device_kind, **row}))
        return

    def ratio(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    rows = [
        [
            f["name"],
            f"{f['trainable']:,}",
            f"{1e3 * f['train_s']:.0f}",
            "-".join(f"{1e3 * q:.0f}" for q in f["train_quartiles_s"]),
            ratio(f["over_linear"]),
            ratio(f["over_dense"]),
            f"{1e3 * f['infer_s']:.0f}",
            "" if f["temporaries"] is None else f"{f['temporaries'] / 2**20:.0f}",
        ]
        for f in found
    ]
    print(
        f"{device.device_kind}, jax {jax.__version__}: AST-{options.size}, {options.frames} "
        f"frames, {options.batch_size} clips a step, {options.dtype}, {options.rounds} rounds\n"
    )
    heads = [
        "method",
        "trainable",
        "step ms",
        "quartiles",
        "over linear",
        "over dense_moa",
        "inference ms",
        "temporaries MiB",
    ]
    _print(options, heads, rows)


def _scaling(arguments: list[str]) -> None:
    parser = _parser(
        "scaling", size="base", frames=1024, what="Soft-MoA and Dense-MoA as they grow"
    )
    parser.add_argument("--experts", nargs="+", type=int, default=[1, 2, 4, 7, 8, 15, 16, 24, 32])
    parser.add_argument("--slots", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument(
        "--lengths",
        nargs="+",
        type=int,
        default=[100, 512, 1024, 3000],
        help="input lengths in frames",
    )
    parser.add_argument("--budget", type=int, default=BUDGET, help="of all mixtures together")
    parser.add_argument("--time", action="store_true", help="also measure the training step")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    import json

    from aatjax.analysis.scaling import sweep

    found = sweep(
        lambda frames: _config(argparse.Namespace(**{**vars(options), "frames": frames})),
        frames=options.frames,
        experts=options.experts,
        slots=options.slots,
        lengths=options.lengths,
        budget=options.budget,
        timed=(options.batch_size, options.rounds) if options.time else None,
    )
    if options.json:
        for row in found:
            print(json.dumps(row))
        return
    rows = [
        [
            str(r["frames"]),
            str(r["tokens"]),
            str(r["experts"]),
            str(r["slots"]),
            str(r["width"]),
            f"{r['soft'] / 1e9:.3f}",
            f"{r['dense'] / 1e9:.3f}",
            f"{r['dense'] / r['soft']:.2f}",
            f"{r['step_dense'] / r['step_soft']:.3f}",
            "" if r["measured"] is None else f"{r['measured']:.2f}",
        ]
        for r in found
    ]
    print(
        f"AST-{options.size}, budget {options.budget:,}: training GFLOPs a clip in the mixtures, "
        "Dense over Soft there and in the whole step\n"
    )
    heads = [
        "frames",
        "tokens",
        "experts",
        "slots",
        "width",
        "soft",
        "dense",
        "dense/soft",
        "whole step",
        "measured",
    ]
    _print(options, heads, rows)
