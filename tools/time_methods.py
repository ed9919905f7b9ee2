"""Times a training step of every method, in turn in one process, as a ratio to the linear probe.

    python tools/time_methods.py
    python tools/time_methods.py --source random:tiny --frames 498 --batch 8 --rounds 7

Every round runs each method once; the first rounds are not counted. Printed are the median and
the quartiles of milliseconds a step, and the median ratio to the linear probe of the same round.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from compare_methods import METHODS

from aatjax import petl, surgery
from aatjax.audio.augment import Augment
from aatjax.convert.load import load, make_front_end
from aatjax.train.optim import Optim, make_optimizer
from aatjax.train.state import init_state
from aatjax.train.step import make_steps

CLASSES = 10
WARM_UP = 3


def stepper(source: str, frames: int, method: petl.Method, batch: int) -> Callable[[], None]:
    """A function that runs one training step of a method to its end."""
    model = petl.adapt(load(source, num_classes=CLASSES, frames=frames), method)
    frontend = make_front_end(model)
    parts = surgery.split(model)
    tx = make_optimizer(Optim(), steps_per_epoch=10, epochs=10)
    steps = make_steps(parts.graphdef, tx, frontend=frontend, augment=Augment(), loss="ce")
    rng = np.random.default_rng(0)
    rows: dict[str, Any] = {
        "audio": (3000 * rng.normal(size=(batch, frontend.samples))).astype(np.int16),
        "length": np.full(batch, frontend.samples, np.int32),
        "target": np.eye(CLASSES, dtype=np.float32)[rng.integers(0, CLASSES, batch)],
        "weight": np.ones(batch, np.float32),
    }
    state = [init_state(parts.trainable, parts.stats, tx, average=False)]
    key = jax.random.key(0)

    def step() -> None:
        state[0], sums = steps.train(state[0], parts.frozen, rows, key)
        jax.block_until_ready((state[0], sums))

    return step


def main() -> None:
    """Times the methods and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", default="embedded")
    parser.add_argument("--frames", type=int, default=298)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--methods", nargs="+", default=[m for m in METHODS if m != "scratch"])
    args = parser.parse_args()

    names = ["linear", *(name for name in args.methods if name != "linear")]
    steps = {n: stepper(args.source, args.frames, METHODS[n].method, args.batch) for n in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(args.rounds + WARM_UP):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if number >= WARM_UP:
                times[name].append(time.perf_counter() - began)
    device = jax.devices()[0]
    print(f"{device.device_kind}, {args.source}, {args.frames} frames, batch {args.batch}")
    for name, values in times.items():
        low, middle, high = (1e3 * q for q in statistics.quantiles(values, n=4))
        ratio = statistics.median(a / b for a, b in zip(values, times["linear"], strict=True))
        print(f"{name:<15} {middle:7.1f} ms [{low:.1f}, {high:.1f}]  {ratio:.2f} x linear")


if __name__ == "__main__":
    main()
