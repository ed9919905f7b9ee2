"""Counts and times the methods, and Soft-MoA against Dense-MoA as they grow."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from tyro.conf import OmitArgPrefixes

from aatjax.cli.arguments import Switch

GROUP = "plan"
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


@dataclasses.dataclass(frozen=True)
class Options:
    """The backbone and the output.

    Attributes:
        size: size of the backbone
        frames: input length in 10 ms frames
        classes: number of classes
        json: print one JSON object per row
        markdown: print a table for a document
    """

    size: Literal["tiny", "small", "base"] = "base"
    frames: int = 1024
    classes: int = 50
    json: Switch = False
    markdown: Switch = False


Common = OmitArgPrefixes[Options]
SMALL = Options("small", 256)


def _config(options: Options, **changes: Any) -> Any:
    from aatjax.models.config import ASTConfig

    return ASTConfig.size(
        options.size, frames=options.frames, num_classes=options.classes, **changes
    )


def _make_methods(names: Sequence[str], config: Any) -> dict[str, Any]:
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


def _print(options: Options, heads: list[str], rows: list[list[str]]) -> None:
    from aatjax.cli.output import format_table

    if options.markdown:
        lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
        print("\n".join("| " + " | ".join(line) + " |" for line in lines))
    else:
        print(format_table(heads, rows))


def count_flops(options: Common, *, methods: tuple[str, ...] = DEFAULTS) -> None:
    """Count FLOPs, kept activations, parameters and file size per clip and method.

    Args:
        methods: rows of `aatjax methods`
    """
    import json

    from aatjax.analysis.method_costs import method_cost

    config = _config(options)
    costs = [method_cost(config, n, m) for n, m in _make_methods(methods, config).items()]
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


def measure_steps(
    options: Common = SMALL,
    *,
    methods: tuple[str, ...] = STEP_ROWS,
    batch_size: int = 8,
    rounds: int = 9,
    dtype: Literal["float32", "bfloat16"] = "float32",
    variants: bool = False,
) -> None:
    """Measure training steps and inference of each method, in turn in one process.

    Args:
        methods: rows of `aatjax methods`
        batch_size: clips per step
        rounds: measurements of each method
        dtype: compute type
        variants: measure each method plain, scanned, and scanned with remat
    """
    import json

    import jax

    from aatjax.analysis.step_timing import ready
    from aatjax.analysis.timing import in_turn

    plain = _config(options, dtype=dtype)
    variants = {"": plain}
    if variants:
        variants["+scan"] = dataclasses.replace(plain, scan=True)
        variants["+scan+remat"] = dataclasses.replace(plain, scan=True, remat=True)
    made = {
        name + mark: ready(config, method, batch_size=batch_size)
        for name, method in _make_methods(methods, plain).items()
        for mark, config in variants.items()
    }
    train = in_turn({n: r.train for n, r in made.items()}, rounds=rounds)
    infer = in_turn({n: r.infer for n, r in made.items()}, rounds=rounds)
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
        f"frames, {batch_size} clips a step, {dtype}, {rounds} rounds\n"
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


def sweep_sizes(
    options: Common,
    *,
    experts: tuple[int, ...] = (1, 2, 4, 7, 8, 15, 16, 24, 32),
    slots: tuple[int, ...] = (1, 2, 4, 8),
    lengths: tuple[int, ...] = (100, 512, 1024, 3000),
    budget: int = BUDGET,
    time: bool = False,
    batch_size: int = 4,
    rounds: int = 5,
) -> None:
    """Compare Soft-MoA with Dense-MoA over experts, slots and input lengths.

    Args:
        experts: numbers of experts at a fixed budget
        slots: numbers of slots per expert
        lengths: input lengths in 10 ms frames
        budget: parameters of all mixtures together
        time: also measure the training step
        batch_size: clips per step
        rounds: measurements of each
    """
    import json

    from aatjax.analysis.scaling import sweep

    found = sweep(
        lambda frames: _config(dataclasses.replace(options, frames=frames)),
        frames=options.frames,
        experts=experts,
        slots=slots,
        lengths=lengths,
        budget=budget,
        timed=(batch_size, rounds) if time else None,
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
        f"AST-{options.size}, budget {budget:,}: training GFLOPs a clip in the mixtures, "
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


KINDS = {"flops": count_flops, "step": measure_steps, "scaling": sweep_sizes}
