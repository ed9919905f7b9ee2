"""Counts and times the methods, and Soft-MoA and Dense-MoA of many sizes."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from tyro.conf import OmitArgPrefixes

from aatjax.cli.arguments import Count, Frames, Switch
from aatjax.cli.output import Columns, fill_rows, format_table

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
        quiet: no progress
    """

    size: Literal["tiny", "small", "base"] = "base"
    frames: Frames = 1024
    classes: Count = 50
    json: Switch = False
    markdown: Switch = False
    quiet: Switch = False


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


def _print(options: BenchOptions, columns: Columns, items: Iterable[Any]) -> None:
    heads, rows = list(columns), fill_rows(columns, items)
    if options.markdown:
        from aatjax.experiments.compare.tables import make_markdown_table

        print(make_markdown_table(heads, rows))
    else:
        print(format_table(heads, rows))


def _format(value: float | None, unit: float = 1, digits: int = 2) -> str:
    return "" if value is None else f"{value / unit:.{digits}f}"


def print_flops(options: Common, *, methods: tuple[str, ...] = DEFAULTS) -> None:
    """Count FLOPs, kept activations, parameters and file size per clip and method.

    Args:
        methods: rows of `aatjax methods`
    """
    import json

    from aatjax.analysis.method_costs import compare_costs
    from aatjax.io.progress import track

    config = _config(options)
    costs = track(compare_costs(config, _make_methods(methods, config)), "methods", len(methods))
    if options.json:
        for cost in costs:
            print(json.dumps(cost.to_json()))
        return
    print(f"AST-{options.size}, {options.frames} frames, GFLOPs per clip (1 multiply-add = 2)\n")
    columns: Columns = {
        "method": lambda c: c.name,
        "trainable": lambda c: f"{c.trainable:,}",
        "adapters forward": lambda c: f"{c.forward.adapter / 1e9:.3f}",
        "forward": lambda c: f"{c.forward.total / 1e9:.1f}",
        "adapters training": lambda c: f"{c.training.adapter / 1e9:.3f}",
        "training": lambda c: f"{c.training.total / 1e9:.1f}",
        "MiB kept": lambda c: f"{c.activation_bytes / 2**20:.0f}",
        "file MB": lambda c: f"{c.file_bytes / 1e6:.1f}",
        "inside, forward MFLOPs": lambda c: ", ".join(
            f"{name} {flops / 1e6:.0f}" for name, flops in c.forward.inside.items()
        ),
    }
    _print(options, columns, costs)


def measure_steps(
    options: Common = SMALL,
    *,
    methods: tuple[str, ...] = STEP_ROWS,
    batch_size: Count = 8,
    rounds: Count = 9,
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
    columns: Columns = {
        "method": lambda t: t.name,
        "trainable": lambda t: f"{t.trainable:,}",
        "step ms": lambda t: f"{1e3 * t.train_s:.0f}",
        "quartiles": lambda t: "-".join(f"{1e3 * q:.0f}" for q in t.train_quartiles_s),
        "over linear": lambda t: _format(t.over_linear),
        "over dense_moa": lambda t: _format(t.over_dense),
        "inference ms": lambda t: f"{1e3 * t.infer_s:.0f}",
        "temporaries MiB": lambda t: _format(t.temporaries, 2**20, 0),
    }
    _print(options, columns, timings)


def sweep_sizes(
    options: Common,
    *,
    experts: tuple[int, ...] = (1, 2, 4, 7, 8, 15, 16, 24, 32),
    slots: tuple[int, ...] = (1, 2, 4, 8),
    lengths: tuple[int, ...] = (100, 512, 1024, 3000),
    budget: Count = BUDGET,
    time: bool = False,
    batch_size: Count = 4,
    rounds: Count = 5,
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
    columns: Columns = {
        **{
            name: lambda p, name=name: str(getattr(p, name))
            for name in ("frames", "tokens", "experts", "slots", "width")
        },
        "soft": lambda p: f"{p.soft / 1e9:.3f}",
        "dense": lambda p: f"{p.dense / 1e9:.3f}",
        "dense/soft": lambda p: f"{p.dense / p.soft:.2f}",
        "whole step": lambda p: f"{p.step_dense / p.step_soft:.3f}",
        "measured": lambda p: _format(p.measured),
    }
    _print(options, columns, points)


KINDS: dict[str, Callable[..., None]] = {
    "flops": print_flops,
    "step": measure_steps,
    "scaling": sweep_sizes,
}
