"""Requests a second for many adapters: batched together, an adapter at a time, and one by one.

    python tools/bench_serve.py
    python tools/bench_serve.py --adapters 100 --weights random:small --frames 256

Every adapter is Soft-MoA with random numbers on the same backbone; each round asks every adapter
for one clip. "together" puts clips of different adapters in a batch, "one by one" passes each clip
alone through its adapter's own parameters, as a server with one adapter at a time would. In turn in
one process, after a warm-up; medians, and the median ratio of the same rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import numpy as np

from aatjax import load, petl, surgery
from aatjax.audio.frontend import FrontEnd
from aatjax.inference.server.adapters import AdapterStore
from aatjax.inference.windows import Window
from aatjax.train.adapter_file import save_adapter


def main() -> None:
    """Runs the command line; see above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--weights", default="embedded")
    parser.add_argument("--frames", type=int, default=198)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    frontend = FrontEnd(frames=options.frames)
    store = AdapterStore(largest=options.batch)
    with TemporaryDirectory() as place:
        base = load(options.weights, frames=options.frames, num_classes=10)
        for i in range(options.adapters):
            model = petl.adapt(base, petl.SoftMoA(reduction=24))
            for variable in surgery.variables(model).values():
                if isinstance(variable, surgery.Trainable):
                    noise = 0.02 * rng.normal(size=variable[...].shape)
                    variable[...] = variable[...] + noise.astype(np.float32)
            path = Path(place) / f"a{i}.safetensors"
            save_adapter(
                path,
                model,
                classes=tuple(map(str, range(10))),
                multi_label=False,
                frontend=frontend,
            )
            store.load(f"a{i}", path)
    adapters = store.list_adapters()
    (group,) = {one.group for one in adapters}
    clips = rng.integers(-8000, 8000, (len(adapters), frontend.samples), np.int16)
    windows = [Window(clip, frontend.samples, (0, frontend.samples)) for clip in clips]
    keys = [one.key for one in adapters]

    def together() -> None:
        group.compute_logits(group.stack(), keys, windows)

    def one_by_one() -> None:
        for key, window in zip(keys, windows, strict=True):
            group.compute_logits(group.stack(), [key], [window])

    ways: dict[str, Callable[[], None]] = {"one by one": one_by_one, "together": together}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(1 + options.rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    own = sum(one.parameters for one in adapters)
    print(f"{options.adapters} adapters ({own:,} parameters of their own) on {options.weights}")
    print(f"{options.frames} frames, batch {options.batch}, {jax.devices()[0].device_kind}")
    base_times = seconds["one by one"]
    for name, spent in seconds.items():
        ratio = statistics.median(b / s for b, s in zip(base_times, spent, strict=True))
        print(f"{name:<12} {len(adapters) / statistics.median(spent):8.1f} clips/s {ratio:6.2f}x")


if __name__ == "__main__":
    main()
