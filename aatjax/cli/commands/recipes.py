"""Lists the papers' benchmarks and methods: settings, published figures, commands."""

from importlib import import_module
from typing import Any

from tyro.conf import Positional

from aatjax.cli.arguments import nearest
from aatjax.cli.output import format_table
from aatjax.errors import UsageError

GROUP = "plan"
PEAK = 197e12  # bfloat16 FLOPs a second of one TPU v5e chip


def main(name: Positional[str | None] = None, *, json: bool = False) -> None:
    """Run `aatjax recipes`.

    Args:
        name: one recipe, with its settings, expected figure and commands (default: the list)
        json: print the configs as JSON
    """
    from json import dumps

    recipes: dict[str, Any] = import_module("aatjax.configs.recipes").RECIPES
    if name is None:
        if json:
            print(dumps({key: r.config.to_json() for key, r in recipes.items()}, indent=2))
        else:
            print(_overview(recipes))
        return
    if name not in recipes:
        hint = nearest(name, list(recipes))
        raise UsageError(f"no recipe {name!r}{hint}; `aatjax recipes` lists them")
    found = recipes[name]
    print(dumps(found.config.to_json(), indent=2) if json else _text(name, found))


def _overview(recipes: dict[str, Any]) -> str:
    from aatjax.data.benchmarks import BENCHMARKS

    rows = [
        [
            b.name,
            f"{b.clips:,}",
            str(len(b.classes)),
            b.metric,
            "yes" if b.url else "no",
            ", ".join(p.name for p in b.protocols),
        ]
        for b in BENCHMARKS.values()
    ]
    methods = dict.fromkeys(r.method for r in recipes.values())
    heads = ["benchmark", "clips", "classes", "metric", "--download", "protocols"]
    return "\n".join(
        [
            format_table(heads, rows),
            "",
            f"methods: {', '.join(methods)}",
            "a recipe is BENCHMARK_METHOD; `aatjax recipes esc50_soft_moa` tells one whole",
        ]
    )


def _text(name: str, recipe: Any) -> str:
    from aatjax.data.benchmarks import BENCHMARKS

    benchmark, config, setting = BENCHMARKS[recipe.benchmark], recipe.config, recipe.setting
    trained, flops = _work(recipe)
    lines = [
        f"{name}: {benchmark.title} with {config.petl.name}",
        "",
        f"  set         {benchmark.paper}",
        f"              {benchmark.clips:,} clips, {len(benchmark.classes)} classes; "
        f"{benchmark.licence}",
        f"  input       {setting.frames} frames of 10 ms, statistics {config.data.statistics}",
        f"  training    {config.training.epochs} epochs of batches of "
        f"{config.training.batch_size}, lr {config.optim.lr:g} ({config.optim.schedule}), loss "
        f"{config.training.loss}",
        f"  trains      {trained:,} parameters, {flops / 1e9:.1f} GFLOPs a clip forward",
        f"  expected    {recipe.expected}",
        *(f"  remark      {remark}" for remark in recipe.remarks),
        *(
            f"  protocol    {p.name}: {p.paper}; weights: {p.selection}"
            + ("; CHOOSES ON TEST CLIPS" if p.chooses_on_test else "")
            for p in benchmark.protocols
        ),
        f"  time        {_time(recipe, flops)}",
        "",
        f"  aatjax prepare {benchmark.name} "
        + ("--download" if benchmark.url else f"--from ARCHIVE   ({benchmark.home})"),
        f"  aatjax train {name}"
        + (" --cross-validate" if len(benchmark.protocols[0].divisions) > 1 else ""),
    ]
    return "\n".join(lines)


def _work(recipe: Any) -> tuple[int, float]:
    """Trained parameters, and FLOPs of a clip forward, on AST-base."""
    from aatjax.analysis.method_costs import MethodCost
    from aatjax.data.benchmarks import BENCHMARKS
    from aatjax.models.config import ASTConfig

    changes = {}
    if recipe.config.model.pool is not None:
        changes = {"pool": recipe.config.model.pool, "head_norm": recipe.config.model.head_norm}
    config = ASTConfig.size(
        "base",
        frames=recipe.setting.frames,
        num_classes=len(BENCHMARKS[recipe.benchmark].classes),
        **changes,
    )
    cost = MethodCost(config, recipe.method, recipe.config.petl)
    return cost.trainable, cost.forward.total


def _time(recipe: Any, flops: float) -> str:
    from aatjax.data.benchmarks import BENCHMARKS

    benchmark = BENCHMARKS[recipe.benchmark]
    runs = benchmark.protocols[0].divisions
    parts = benchmark.parts
    clips = sum(
        sum(parts[name] for name in run.train) if parts else benchmark.clips * 4 / 5 for run in runs
    )
    # Backward: as much as forward for the activations, and as much again for trained weights.
    passes = 3 if recipe.method == "full" else 1 if recipe.method == "linear" else 2
    total = clips * recipe.config.training.epochs * flops * passes
    return (
        f"not measured; {total / 1e15:,.0f} PFLOPs for {len(runs)} "
        f"run{'s' * (len(runs) > 1)}, {total / PEAK / 60:,.0f} minutes at the peak of one TPU v5e "
        "chip, a lower bound"
    )
