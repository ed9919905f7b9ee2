"""Evaluates an adapter on labelled sounds and prints its metrics."""

from pathlib import Path

from aatjax.cli.arguments import OtherSounds
from aatjax.cli.dry_run import make_begin
from aatjax.errors import printable

GROUP = "train"


def main(
    adapter: Path,
    sounds: OtherSounds,
    *,
    fields: list[str],
    base: str | None = None,
    dry_run: bool = False,
    json: bool = False,
    quiet: bool = False,
) -> None:
    """Run `aatjax eval`.

    Args:
        adapter: adapter.safetensors, or its run folder
        base: the backbone's weights, if they moved since training
        dry_run: open the adapter and the sounds, and stop
        json: print one JSON object
        quiet: no progress
    """
    from json import dumps

    from aatjax.experiments.evaluate import evaluate_adapter
    from aatjax.train.adapter_file import load_adapter

    data = sounds.load(fields)
    begin = make_begin(dry_run, "nothing was evaluated")
    result, source = evaluate_adapter(load_adapter(adapter, base=base), data, begin=begin)
    if json:
        print(dumps(result.to_json(), indent=2))
    else:
        print(f"{printable(adapter)} on {printable(source.name)}")
        print(result.table())
