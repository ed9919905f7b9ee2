"""Lists the adaptation methods with their trainable parameters and FLOPs."""

from typing import Literal

from aatjax.cli.arguments import Count, Frames
from aatjax.cli.output import Columns, fill_rows, format_table

GROUP = "plan"


def main(
    *,
    size: Literal["tiny", "small", "base"] = "base",
    frames: Frames = 500,
    classes: Count = 50,
    body_norm: bool = False,
    json: bool = False,
    quiet: bool = False,
) -> None:
    """Run `aatjax methods`.

    Args:
        size: size of the backbone
        frames: input length in 10 ms frames
        classes: number of classes
        body_norm: head of a linear layer alone, after the mean of all tokens
            (arXiv 2312.03694)
        json: print JSON
        quiet: no progress
    """
    from json import dumps

    from aatjax.analysis.method_costs import compare_costs
    from aatjax.io.progress import track
    from aatjax.models.config import ASTConfig

    changes = {"pool": "mean_all", "head_norm": False} if body_norm else {}
    costs = compare_costs(ASTConfig.size(size, frames=frames, num_classes=classes, **changes))
    counted = track(costs, "methods", len(costs))
    if json:
        rows = [
            {
                "name": c.name,
                "trainable": c.trainable,
                "share": c.share,
                "flops": c.added_flops,
                "method": c.method.to_json(),
            }
            for c in counted
        ]
        print(dumps(rows, indent=2))
        return
    columns: Columns = {
        "row": lambda c: c.name,
        "method": lambda c: c.method.name,
        "placement": lambda c: c.placement,
        "trainable": lambda c: f"{c.trainable:,}",
        "share": lambda c: f"{c.share:.2%}",
        "GFLOPs per clip": lambda c: f"{c.added_flops / 1e9:+.3f}",
    }
    print(format_table(list(columns), fill_rows(columns, counted)))
