"""Evaluates an adapter on labelled sounds and prints its metrics."""

from pathlib import Path

GROUP = "train"


def main(
    adapter: Path,
    path: str | None = None,
    *,
    format: str = "auto",
    base: str | None = None,
    json: bool = False,
) -> None:
    """Run `aatjax eval`.

    Args:
        adapter: adapter.safetensors
        path: labelled sounds (default: the test clips of the run that wrote the adapter)
        format: how PATH is read: auto, folder, manifest, esc or names
        base: the backbone's weights, if they moved since training
        json: print one JSON object
    """
    from json import dumps

    from aatjax.config import Data
    from aatjax.experiments.run import evaluate_adapter
    from aatjax.train.adapter_file import load_adapter

    data = None if path is None else Data(path=path, format=format)  # pyright: ignore[reportArgumentType]
    result, source = evaluate_adapter(load_adapter(adapter, base=base), data)
    if json:
        print(dumps(result.to_json(), indent=2))
    else:
        print(f"{adapter} on {source.name}")
        print(result.table())
