"""Evaluates an adapter on labelled sounds and prints its metrics."""

from pathlib import Path

from aatjax.cli.arguments import OtherSounds

GROUP = "train"


def main(
    adapter: Path,
    sounds: OtherSounds,
    *,
    fields: list[str],
    base: str | None = None,
    json: bool = False,
) -> None:
    """Run `aatjax eval`.

    Args:
        adapter: adapter.safetensors
        base: the backbone's weights, if they moved since training
        json: print one JSON object
    """
    from json import dumps

    from aatjax.experiments.run import evaluate_adapter
    from aatjax.train.adapter_file import load_adapter

    data = sounds.load(fields)
    result, source = evaluate_adapter(load_adapter(adapter, base=base), data)
    if json:
        print(dumps(result.to_json(), indent=2))
    else:
        print(f"{adapter} on {source.name}")
        print(result.table())
