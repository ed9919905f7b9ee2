"""Checks that an adapter or an export is as it was written, and computes what it did."""

from pathlib import Path

GROUP = "weights"


def main(file: Path, *, base: str | None = None, json: bool = False) -> None:
    """Run `aatjax verify`.

    Args:
        file: adapter.safetensors, its run folder, or the folder of an export
        base: the backbone's weights, if they moved since training
        json: print one JSON object
    """
    from json import dumps

    from aatjax.errors import printable
    from aatjax.export import verify

    done = verify(file, base=base)
    if json:
        print(dumps({**vars(done), "path": str(done.path)}))
        return
    print(
        f"{printable(file)}: unchanged, logits within {done.largest:.2g} "
        f"({done.allowed:.2g} is allowed), computed by {done.by}"
    )
