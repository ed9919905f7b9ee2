"""What the reuse of the frozen prefix saves: epochs with and without it, in turn in one process.

    python tools/bench_prefix.py
    python tools/bench_prefix.py --weights random:base --frames 1024 --clips 2 --batch 4 --rounds 2

Each run trains three epochs on synthetic sounds; the first, which compiles, is left out. Printed
are medians over the rounds: seconds of an epoch without and with the stored prefix, their ratio,
and the seconds that storing takes once.
"""

import argparse
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import jax

from aatjax import load, petl
from aatjax.data.decode_cache import decode_all
from aatjax.data.source import Source
from aatjax.data.synthetic.dataset import Synthetic
from aatjax.train.fit import FitContext, fit
from aatjax.train.loop import Training

EPOCHS = 3


def methods(depth: int) -> dict[str, petl.Method]:
    """The methods by what the table calls them; the adapters lie in the last third."""
    last = max(1, depth // 3)
    return {
        "linear": petl.Linear(),
        f"soft_moa, last {last} of {depth}": petl.SoftMoA(last_blocks=last),
        f"aat_ms, last {last} of {depth}": petl.AAT(last_blocks=last),
        f"lora, last {last} of {depth}": petl.LoRA(last_blocks=last),
    }


def main() -> None:
    """Runs the command line; see above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", default="embedded")
    parser.add_argument("--frames", type=int)
    parser.add_argument("--clips", type=int, default=20, help="of each of 10 classes")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with TemporaryDirectory() as place:
        source = decode_all(Synthetic(clips=options.clips), Path(place) / "cache")
        measure(options, source)


def measure(options: argparse.Namespace, source: Source) -> None:
    """Prints one line a method."""
    frames, classes = options.frames, len(source.classes)
    model = load(options.weights, frames=frames, num_classes=classes)
    print(
        f"{options.weights}, {model.config.frames} frames, {len(source)} clips, "
        f"batch {options.batch}, {jax.devices()[0].device_kind}"
    )
    for name, method in methods(model.config.depth).items():
        adapted = petl.adapt(model, method)
        epochs: dict[bool, list[float]] = {False: [], True: []}
        storing: list[float] = []
        for _ in range(options.rounds):
            for reuse in (False, True):
                with TemporaryDirectory() as place:
                    training = Training(epochs=EPOCHS, batch_size=options.batch, cache_prefix=reuse)
                    began = time.perf_counter()
                    run = fit(
                        adapted,
                        source,
                        training=training,
                        show=None,
                        context=FitContext(prefix_folder=Path(place)),
                    )
                    whole = time.perf_counter() - began
                seconds = [row["train/seconds"] for row in run.history]
                epochs[reuse] += seconds[1:]
                if reuse:
                    storing.append(whole - sum(seconds))
        plain, reused = (statistics.median(epochs[reuse]) for reuse in (False, True))
        print(
            f"{name:<28} {plain:8.3f} s {reused:8.3f} s {plain / reused:7.1f}x, "
            f"storing at most {statistics.median(storing):.1f} s"
        )


if __name__ == "__main__":
    main()
