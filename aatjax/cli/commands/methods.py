"""`aatjax methods`: what each method trains and costs."""

from aatjax.cli.arguments import parser_of, text_table


def main(arguments: list[str]) -> None:
    """Runs `aatjax methods`."""
    parser = parser_of("methods")
    parser.add_argument("--size", default="base", choices=("tiny", "small", "base"))
    parser.add_argument("--frames", type=int, default=500, help="input length (default 500)")
    parser.add_argument("--classes", type=int, default=50, help="classes (default 50)")
    parser.add_argument(
        "--body-norm",
        action="store_true",
        help="the head is a linear layer alone, after the mean of all tokens (arXiv 2312.03694)",
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    import json

    from aatjax.analysis.method_table import compare
    from aatjax.models.config import ASTConfig

    changes = {"pool": "mean_all", "head_norm": False} if options.body_norm else {}
    config = ASTConfig.size(
        options.size, frames=options.frames, num_classes=options.classes, **changes
    )
    costs = compare(config)
    if options.json:
        rows = [
            {
                "name": c.name,
                "trainable": c.trainable,
                "share": c.share,
                "flops": c.flops,
                "method": c.method.to_json(),
            }
            for c in costs
        ]
        print(json.dumps(rows, indent=2))
        return
    table = [
        [
            c.name,
            c.method.name,
            c.placement,
            f"{c.trainable:,}",
            f"{c.share:.2%}",
            f"{c.flops / 1e9:+.3f}",
        ]
        for c in costs
    ]
    heads = ["row", "method", "placement", "trainable", "share", "GFLOPs a clip"]
    print(text_table(heads, table))
