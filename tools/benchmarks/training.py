"""Time of training: steps of the methods, a step in PyTorch, epochs with a stored prefix."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from aatjax import load, petl, surgery
from aatjax.analysis.step_timing import prepare_steps
from aatjax.data.decode_cache import decode_all
from aatjax.data.source import Source
from aatjax.data.synthetic.dataset import Synthetic
from aatjax.io.timing import time_interleaved
from aatjax.models.ast import AST
from aatjax.models.config import ASTConfig
from aatjax.train.fit import FitContext, fit
from aatjax.train.sharding import MeshShape, choose_devices, place_arrays, put_batch
from aatjax.train.training import Training
from benchmarks import append_row, describe_cpu, print_timings
from benchmarks.compare import METHODS

CLASSES, WIDTH, EPOCHS = 50, 64, 3


def methods(
    source: str = "embedded",
    frames: int = 298,
    batch: int = 16,
    rounds: int = 15,
    methods: tuple[str, ...] = tuple(name for name in METHODS if name != "scratch"),
) -> None:
    """Time a training step of every method, relative to the linear probe.

    Prints median and quartiles of milliseconds per step, and the median of each round's ratio to
    the linear probe.

    Args:
        source: weights.
        frames: input length.
        batch: clips per step.
        rounds: rounds that count.
        methods: rows of `compare-methods`.
    """
    names = dict.fromkeys(("linear", *methods))
    model = load(source, num_classes=10, frames=frames)
    steps = {
        name: prepare_steps(model, METHODS[name].method, batch_size=batch).train for name in names
    }
    timings = time_interleaved(steps, rounds=rounds, warm_up=3)
    print(f"{jax.devices()[0].device_kind}, {source}, {frames} frames, batch {batch}")
    for name, timing in timings.items():
        low, high = (1e3 * quartile for quartile in timing.quartiles)
        ratio = timing.compute_ratio(timings["linear"])
        figure = f"{1e3 * timing.median:7.1f} ms [{low:.1f}, {high:.1f}]"
        print(f"{name:<15} {figure}  {ratio:.2f} x linear")


def step(
    batch: int = 4,
    frames: int = 512,
    rounds: int = 7,
    torch_bfloat16: bool = False,
    out: Path | None = None,
) -> None:
    """Time a training step of AST-base with adapters, relative to PyTorch.

    The step is forward and backward pass of a frozen AST-base with a bottleneck of width 64 beside
    each MLP and a trained head; the optimiser is left out of both. PyTorch runs transformers' AST
    (SDPA) with the same adapters, eagerly.

    Args:
        batch: clips per step.
        frames: input length.
        rounds: rounds that count.
        torch_bfloat16: also run PyTorch in bfloat16.
        out: CSV file that gets a row for each.
    """
    x = np.random.default_rng(0).normal(size=(batch, frames, 128)).astype(np.float32)
    steps = {
        "torch float32": make_torch_step(x, "float32"),
        "aatjax float32": make_jax_step(x, "float32"),
        "aatjax bfloat16": make_jax_step(x, "bfloat16"),
    }
    if torch_bfloat16:
        steps["torch bfloat16"] = make_torch_step(x, "bfloat16")
    timings = time_interleaved(steps, rounds=rounds)
    print(f"{describe_cpu()}\njax {jax.__version__}, batch {batch}, {frames} frames")
    print_timings(timings, "torch float32")
    for name, timing in timings.items():
        row = {"cpu": describe_cpu(), "batch": batch, "frames": frames, "step": name}
        ratio = timings["torch float32"].compute_ratio(timing)
        row |= {"ms": f"{1e3 * timing.median:.0f}", "pytorch_float32_over": f"{ratio:.2f}"}
        append_row(out, row)


def make_jax_step(x: np.ndarray, dtype: Any) -> Callable[[], object]:
    """Return forward and backward pass in aatjax, on the devices that `fit` would use.

    The frozen weights are held in `dtype`.
    """
    config = ASTConfig(frames=x.shape[1], num_classes=CLASSES, dtype=dtype)
    model = petl.adapt(AST(config, rngs=nnx.Rngs(0)), petl.Adapter(width=WIDTH))
    parts = surgery.split(model)
    frozen = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), parts.frozen)
    mesh = MeshShape().make(choose_devices(len(x), surgery.count_bytes(model), jax.devices()))
    trainable, stats, frozen = place_arrays((parts.trainable, parts.stats, frozen), mesh)
    array = put_batch({"x": x}, mesh, len(x))["x"]

    @jax.jit
    def run(trainable: Any, stats: Any, frozen: Any, x: jax.Array) -> Any:
        def loss(trainable: Any) -> jax.Array:
            return (surgery.join(parts.graphdef, trainable, stats, frozen)(x) ** 2).mean()

        return jax.value_and_grad(loss)(trainable)

    def step() -> None:
        with jax.set_mesh(mesh):
            jax.block_until_ready(run(trainable, stats, frozen, array))

    return step


def make_torch_step(x: np.ndarray, dtype: str) -> Callable[[], object]:
    """Return the same with transformers' AST."""
    import torch
    from transformers import ASTConfig as HubConfig
    from transformers import ASTForAudioClassification

    fields: Any = dict(max_length=x.shape[1], num_labels=CLASSES, attn_implementation="sdpa")
    config = HubConfig(**fields)
    model = ASTForAudioClassification(config).to(getattr(torch, dtype))
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)

    class Bottleneck(torch.nn.Module):
        """An adapter beside a module."""

        def __init__(self, base: Any):
            super().__init__()
            self.base = base
            self.down = torch.nn.Linear(config.hidden_size, WIDTH)
            self.up = torch.nn.Linear(WIDTH, config.hidden_size)

        def forward(self, hidden: Any) -> Any:
            return self.base(hidden) + self.up(torch.nn.functional.gelu(self.down(hidden)))

    sites = [
        (module, name)
        for module in model.modules()
        for name, child in module.named_children()
        if type(child).__name__ == "ASTMLP"
    ]
    assert len(sites) == config.num_hidden_layers, "transformers' AST has no MLP of that name"
    for module, name in sites:
        setattr(module, name, Bottleneck(getattr(module, name)).to(getattr(torch, dtype)))
    tensor = torch.tensor(x).to(getattr(torch, dtype))

    def step() -> None:
        model.zero_grad()
        (model(tensor).logits ** 2).mean().backward()

    return step


def prefix(
    weights: str = "embedded",
    frames: int | None = None,
    clips: int = 20,
    batch: int = 16,
    rounds: int = 3,
    out: Path | None = None,
) -> None:
    """Time epochs with and without the stored output of the frozen prefix, in turn.

    Each run trains three epochs on synthetic sounds; the first, which compiles, is left out. Prints
    medians over the rounds: seconds per epoch without and with the stored prefix, their ratio, and
    the seconds that storing takes once.

    Args:
        weights: the backbone.
        frames: input length.
        clips: clips per class, of 10 classes.
        batch: clips per step.
        rounds: rounds.
        out: CSV file that gets a row for each method.
    """
    with TemporaryDirectory() as folder:
        source = decode_all(Synthetic(clips=clips), Path(folder) / "cache")
        model = load(weights, frames=frames, num_classes=len(source.classes))
        device = jax.devices()[0].device_kind
        print(
            f"{weights}, {model.config.frames} frames, {len(source)} clips, batch {batch}, {device}"
        )
        last = max(1, model.config.depth // 3)
        rows = {
            "linear": petl.Linear(),
            f"soft_moa, last {last} blocks": petl.SoftMoA(blocks=f"last{last}"),
            f"aat_ms, last {last} blocks": petl.AAT(blocks=f"last{last}"),
            f"lora, last {last} blocks": petl.LoRA(blocks=f"last{last}"),
        }
        for name, method in rows.items():
            adapted = petl.adapt(model, method)
            epochs: dict[bool, list[float]] = {False: [], True: []}
            storing: list[float] = []
            for reuse in (False, True) * rounds:
                seconds, rest = time_epochs(adapted, source, batch, reuse)
                epochs[reuse] += seconds
                storing += [rest] * reuse
            plain, reused = (statistics.median(epochs[reuse]) for reuse in (False, True))
            print(
                f"{name:<28} {plain:8.3f} s {reused:8.3f} s {plain / reused:7.1f}x, "
                f"storing at most {statistics.median(storing):.1f} s",
                flush=True,
            )
            row = {"device": describe_cpu() if device == "cpu" else device, "weights": weights}
            row |= {"frames": model.config.frames, "clips": len(source), "batch": batch}
            row |= {"method": name, "without_s": f"{plain:.3f}", "with_s": f"{reused:.3f}"}
            append_row(out, row | {"ratio": f"{plain / reused:.1f}"})


def time_epochs(model: Any, source: Source, batch: int, reuse: bool) -> tuple[list[float], float]:
    """Return the seconds of each epoch after the first, and those outside the epochs."""
    nothing_kept = patch("aatjax.train.input_cache.LIMIT", 0)
    with TemporaryDirectory() as folder, nothing_kept:
        training = Training(epochs=EPOCHS, batch_size=batch, cache_prefix=reuse)
        began = time.perf_counter()
        context = FitContext(prefix_folder=Path(folder))
        run = fit(model, source, training=training, show=None, context=context)
        total = time.perf_counter() - began
    seconds = [row["train/seconds"] for row in run.history]
    return seconds[1:], total - sum(seconds)
