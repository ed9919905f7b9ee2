"""`aatjax convert`: weights from one format to another."""

import sys
from pathlib import Path

from aatjax.cli.arguments import parser_of


def main(arguments: list[str]) -> None:
    """Runs `aatjax convert`."""
    parser = parser_of("convert")
    parser.add_argument("source", help="file, folder or Hugging Face id (owner/name)")
    parser.add_argument("out", type=Path, help="file or folder to write")
    parser.add_argument(
        "--to",
        choices=("native", "hf", "orbax"),
        help="default: native for a name ending in .safetensors, else hf",
    )
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument("--frames", type=int, help="another input length, positions fitted")
    parser.add_argument("--rgb", choices=("sum", "mean"), default="sum")
    parser.add_argument("--revision")
    options = parser.parse_args(arguments)

    from aatjax.audio.frontend import PRESETS
    from aatjax.convert import read_checkpoint, write_hf, write_native, write_orbax
    from aatjax.convert.load import fit_positions, locate_weights

    checkpoint = read_checkpoint(locate_weights(options.source, options.revision), rgb=options.rgb)
    if options.frames is not None or options.to == "hf":
        checkpoint = fit_positions(checkpoint, options.frames)
    params, config, labels = checkpoint.params, checkpoint.config, checkpoint.labels
    form = options.to or ("native" if options.out.suffix == ".safetensors" else "hf")
    notes: tuple[str, ...] = ()
    if form == "hf":
        mean, std = checkpoint.statistics or PRESETS["audioset"]
        notes = write_hf(options.out, params, config, labels, mean=mean, std=std)
    elif form == "native":
        write_native(
            options.out,
            params,
            config,
            labels,
            options.dtype,
            grid=checkpoint.grid,
            rule=checkpoint.rule,
            statistics=checkpoint.statistics,
        )
    else:
        write_orbax(
            options.out,
            params,
            config,
            labels,
            grid=checkpoint.grid,
            rule=checkpoint.rule,
            statistics=checkpoint.statistics,
        )
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    count = sum(value.size for value in params.values())
    print(f"{options.out}: {form}, from {checkpoint.layout}, {count:,} parameters")
