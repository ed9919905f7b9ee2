"""Throughput of inference with many adapters on one backbone."""

from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import numpy as np
from flax import nnx

from aatjax import load, petl, surgery
from aatjax.audio.frontend import FrontEnd
from aatjax.audio.windows import Window
from aatjax.inference.server.adapters import AdapterStore
from aatjax.io.timing import time_interleaved
from aatjax.train.adapter_file import save_adapter
from benchmarks import print_timings


def serve(
    adapters: int = 100,
    weights: str = "embedded",
    frames: int = 198,
    batch: int = 16,
    rounds: int = 7,
) -> None:
    """Compare clips of many adapters batched together with one adapter at a time.

    Every adapter is Soft-MoA with random numbers on the same backbone; each round has one clip for
    every adapter. "one by one" runs each clip alone with its adapter's own parameters.

    Args:
        adapters: number of adapters.
        weights: the backbone.
        frames: input length.
        batch: clips per batch.
        rounds: rounds that count.
    """
    rng = np.random.default_rng(0)
    frontend = FrontEnd(frames=frames)
    store = AdapterStore(largest=batch)
    base = load(weights, frames=frames, num_classes=10)
    classes = tuple(map(str, range(10)))
    with TemporaryDirectory() as folder:
        for i in range(adapters):
            model = petl.adapt(base, petl.SoftMoA(reduction=24))
            for variable in surgery.variables(model).values():
                if isinstance(variable, nnx.Param):
                    noise = 0.02 * rng.normal(size=variable[...].shape)
                    variable[...] = variable[...] + noise.astype(np.float32)
            path = Path(folder) / f"a{i}.safetensors"
            save_adapter(path, model, classes=classes, multi_label=False, frontend=frontend)
            store.load(f"a{i}", path)
    loaded = store.list_adapters()
    (group,) = {adapter.group for adapter in loaded}
    clips = rng.integers(-8000, 8000, (len(loaded), frontend.samples), np.int16)
    windows = [Window(clip, frontend.samples, (0, frontend.samples)) for clip in clips]
    keys = [adapter.key for adapter in loaded]

    def run_together() -> None:
        group.compute_logits(group.stack(), keys, windows)

    def run_one_by_one() -> None:
        for key, window in zip(keys, windows, strict=True):
            group.compute_logits(group.stack(), [key], [window])

    functions = {"one by one": run_one_by_one, "together": run_together}
    timings = time_interleaved(functions, rounds=rounds, warm_up=1)
    own = sum(adapter.parameters for adapter in loaded)
    print(f"{adapters} adapters ({own:,} parameters of their own) on {weights}")
    print(f"{frames} frames, batch {batch}, {jax.devices()[0].device_kind}")
    print_timings(timings, "one by one", len(loaded))
