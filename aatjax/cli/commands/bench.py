"""Counts and times the methods, and Soft-MoA and Dense-MoA of many sizes."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from tyro.conf import OmitArgPrefixes

from aatjax.cli.arguments import Switch

GROUP = "plan"
DEFAULTS = ("soft_moa", "dense_moa", "bottleneck_budget", "aat_ms", "lora", "linear", "full")
BUDGET = 903_672
"""Parameters of Soft-MoA on AST-base with 7 experts of width 6 and one slot each."""

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
class BenchOptions:
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


Common = OmitArgPrefixes[BenchOptions]
SMALL = BenchOptions("small", 256)


def _config(options: BenchOptions, **changes: Any) -> Any:
    from aatjax.models.config import ASTConfig

    return ASTConfig.size(
        options.size, frames=options.frames, num_classes=options.classes, **changes
    )


def _make_methods(names: Sequence[str], config: Any) -> dict[str, Any]:
    """Return rows of the papers' tables, `looped_moa`, `bottleneck_budget` (Soft-MoA's size)."""
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


def _print(options: BenchOptions, heads: list[str], rows: list[list[str]]) -> None:
    from aatjax.cli.output import format_table

    if options.markdown:
        lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
        print("\n".join("| " + " | ".join(line) + " |" for line in lines))
    else:
        print(format_table(heads, rows))


def print_flops(options: Common, *, methods: tuple[str, ...] = DEFAULTS) -> None:
    """Count FLOPs, kept activations, parameters and file size per clip and method.

    Args:
        methods: rows of `aatjax methods`
    """
    import json

    from aatjax.analysis.method_costs import compare_costs

    config = _config(options)
    costs = compare_costs(config, _make_methods(methods, config))
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
            f"{c.activation_bytes / 2**20:.0f}",
            f"{c.file_bytes / 1e6:.1f}",
            ", ".join(f"{k} {v / 1e6:.0f}" for k, v in c.forward.inside.items()),
        ]
        for c in costs
    ]
    print(f"AST-{options.size}, {options.frames} frames, GFLOPs per clip (1 multiply-add = 2)\n")
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
    """Measure training steps and inference of each method, interleaved in one process.

    Args:
        methods: rows of `aatjax methods`
        batch_size: clips per step
        rounds: measurements of each method
        dtype: compute type
        variants: measure each method plain, scanned, and scanned with remat
    """
    import json

    import jax

    from aatjax.analysis.step_timing import time_methods

    plain = _config(options, dtype=dtype)
    configs = {"": plain}
    if variants:
        configs["+scan"] = dataclasses.replace(plain, scan=True)
        configs["+scan+remat"] = dataclasses.replace(plain, scan=True, remat=True)
    models = {
        name + mark: (config, method)
        for name, method in _make_methods(methods, plain).items()
        for mark, config in configs.items()
    }
    timings = time_methods(models, batch_size=batch_size, rounds=rounds)
    device = jax.devices()[0]
    if options.json:
        for timing in timings:
            row = {"device": device.device_kind, **dataclasses.asdict(timing)}
            print(json.dumps(row))
        return

    print(
        f"{device.device_kind}, jax {jax.__version__}: AST-{options.size}, {options.frames} "
        f"frames, {batch_size} clips per step, {dtype}, {rounds} rounds\n"
    )
    _print(options, *_tabulate_steps(timings))


def _tabulate_steps(timings: Sequence[Any]) -> tuple[list[str], list[list[str]]]:
    def ratio(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

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
    return heads, [
        [
            t.name,
            f"{t.trainable:,}",
            f"{1e3 * t.train_s:.0f}",
            "-".join(f"{1e3 * q:.0f}" for q in t.train_quartiles_s),
            ratio(t.over_linear),
            ratio(t.over_dense),
            f"{1e3 * t.infer_s:.0f}",
            "" if t.temporaries is None else f"{t.temporaries / 2**20:.0f}",
        ]
        for t in timings
    ]


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

    from aatjax.analysis.scaling import sweep_mixtures

    points = sweep_mixtures(
        _config(options),
        experts=experts,
        slots=slots,
        lengths=lengths,
        budget=budget,
        timed=(batch_size, rounds) if time else None,
    )
    if options.json:
        for point in points:
            print(json.dumps(dataclasses.asdict(point)))
        return
    print(
        f"AST-{options.size}, budget {budget:,}: training GFLOPs per clip in the mixtures, "
        "Dense over Soft there and in the whole step\n"
    )
    _print(options, *_tabulate_points(points))


def _tabulate_points(points: Sequence[Any]) -> tuple[list[str], list[list[str]]]:
    heads = ["frames", "tokens", "experts", "slots", "width", "soft", "dense", "dense/soft"]
    return [*heads, "whole step", "measured"], [
        [
            *map(str, (p.frames, p.tokens, p.experts, p.slots, p.width)),
            f"{p.soft / 1e9:.3f}",
            f"{p.dense / 1e9:.3f}",
            f"{p.dense / p.soft:.2f}",
            f"{p.step_dense / p.step_soft:.3f}",
            "" if p.measured is None else f"{p.measured:.2f}",
        ]
        for p in points
    ]


KINDS = {"flops": print_flops, "step": measure_steps, "scaling": sweep_sizes}
