"""Lists the papers' benchmarks and methods: settings, published figures, commands."""

from typing import Any

from aatjax.cli.output import format_table
from aatjax.errors import UsageError, format_count, suggest

GROUP = "plan"
PEAK = 197e12  # bfloat16 FLOPs per second of one TPU v5e chip


def main(name: str | None = None, *, json: bool = False) -> None:
    """Run `aatjax recipes`.

    Args:
        name: one recipe, with its settings, published figure and commands (default: the list)
        json: print the configs as JSON
    """
    from json import dumps

    from aatjax.configs.recipes import list_recipes, make_recipe

    names = list_recipes()
    if name is None and not json:
        print(_format_overview())
    elif name is None:
        print(dumps({name: make_recipe(name).config.to_json() for name in names}, indent=2))
    elif name not in names:
        hint = suggest(name, names)
        raise UsageError(f"no recipe {name!r}{hint}; `aatjax recipes` lists them")
    elif json:
        print(dumps(make_recipe(name).config.to_json(), indent=2))
    else:
        print(_format_recipe(name))


def _format_overview() -> str:
    from aatjax.configs.recipes import METHODS
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
    heads = ["benchmark", "clips", "classes", "metric", "--download", "protocols"]
    return (
        f"{format_table(heads, rows)}\n\nmethods: {', '.join(METHODS)}\n"
        "a recipe is BENCHMARK_METHOD; `aatjax recipes esc50_soft_moa` prints one"
    )


def _format_recipe(name: str) -> str:
    from aatjax.configs.recipes import make_recipe
    from aatjax.data.benchmarks import BENCHMARKS

    recipe = make_recipe(name)
    benchmark, config, setting = BENCHMARKS[recipe.benchmark], recipe.config, recipe.setting
    trained, flops = count_cost(config)
    training = config.training
    source = "--download" if benchmark.url else f"--from ARCHIVE   ({benchmark.home})"
    folds = " --cross-validate" if len(benchmark.protocols[0].divisions) > 1 else ""
    lines = [
        f"{name}: {benchmark.title} with {config.petl.name}",
        "",
        f"  set         {benchmark.paper}",
        f"              {benchmark.clips:,} clips, {len(benchmark.classes)} classes; "
        f"{benchmark.licence}",
        f"  input       {setting.frames} frames of 10 ms, statistics {config.data.statistics}",
        f"  training    {training.epochs} epochs, batch size {training.batch_size}, lr "
        f"{config.optim.lr:g} ({config.optim.schedule}), loss {training.loss}",
        f"  trainable   {trained:,} parameters; {flops / 1e9:.1f} GFLOPs per clip forward",
        f"  expected    {recipe.expected}",
        *(f"  remark      {remark}" for remark in recipe.remarks),
        *(
            f"  protocol    {p.name}: {p.paper}; weights: {p.selection}"
            + ("; CHOOSES ON TEST CLIPS" if p.chooses_on_test else "")
            for p in benchmark.protocols
        ),
        f"  time        {estimate_time(config, flops)}",
        "",
        f"  aatjax prepare {benchmark.name} {source}",
        f"  aatjax train {name}{folds}",
    ]
    return "\n".join(lines)


def count_cost(config: Any) -> tuple[int, float]:
    """Return the trainable parameters, and the FLOPs per clip forward, on AST-base."""
    from aatjax.analysis.method_costs import MethodCost
    from aatjax.data.benchmarks import BENCHMARKS
    from aatjax.models.config import ASTConfig

    model = config.model
    changes = {} if model.pool is None else {"pool": model.pool, "head_norm": model.head_norm}
    classes = len(BENCHMARKS[config.data.format].classes)
    shape = ASTConfig.size("base", frames=model.frames, num_classes=classes, **changes)
    cost = MethodCost(shape, config.petl.name, config.petl)
    return cost.trainable, cost.forward.total


def estimate_time(config: Any, flops: float) -> str:
    """Return a lower bound on the time of all runs, from the FLOPs per clip forward."""
    from aatjax.data.benchmarks import BENCHMARKS

    benchmark = BENCHMARKS[config.data.format]
    runs = benchmark.protocols[0].divisions
    parts = benchmark.parts
    clips = sum(
        sum(parts[name] for name in run.train) if parts else benchmark.clips * 4 / 5 for run in runs
    )
    # Backward: as much as forward for the activations, and as much again for trained weights.
    passes = {"full": 3, "linear": 1}.get(config.petl.name, 2)
    total = clips * config.training.epochs * flops * passes
    return (
        f"not measured; {total / 1e15:,.0f} PFLOPs for {format_count(len(runs), 'run')}, at least "
        f"{total / PEAK / 60:,.0f} minutes on one TPU v5e chip (its peak)"
    )
