"""Seconds an epoch of `fit`, and of a plain PyTorch loop with the same weights, clips and order."""

import dataclasses
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import torch
from flax import nnx

from aatjax import load, petl
from aatjax.audio.frontend import FrontEnd
from aatjax.convert.load import make_front_end
from aatjax.data.pipeline import keep_in_memory, make_eval_batches, make_train_batches
from aatjax.data.source import Source
from aatjax.data.synthetic.dataset import Synthetic
from aatjax.models.ast import AST
from aatjax.models.config import ASTConfig
from aatjax.train.fit import FitContext, fit
from aatjax.train.optim import Optim, make_schedule
from aatjax.train.training import Training
from benchmarks import append_row, describe_cpu
from benchmarks.compare import METHODS as SETTINGS
from benchmarks.torch_model import make_torch_model

METHODS = {
    name: setting.method
    for name, setting in SETTINGS.items()
    if not (setting.scratch or setting.method.closed_form)
}
LR = 1e-3
OPTIM = Optim(lr=LR)


@dataclasses.dataclass(frozen=True)
class Epoch:
    """One epoch: its mean loss, seconds, processor seconds, and minor page faults per step."""

    loss: float
    seconds: float
    cpu_seconds: float
    faults: float


def epochs(
    width: int = 0,
    depth: int = 2,
    frames: int | None = None,
    methods: tuple[str, ...] = tuple(METHODS),
    clips: int = 24,
    batch: int = 16,
    epochs: int = 3,
    rounds: int = 5,
    attention: Literal["sdpa", "eager"] = "sdpa",
    out: Path | None = None,
) -> None:
    """Train each method with `fit` and with a plain PyTorch loop in turn, and compare the time.

    PyTorch trains transformers' AST (not compiled, float32) from the same weights, on log-mel that
    was computed before, in the same order. Neither augments. The first epoch of each run, in which
    aatjax compiles, is left out. Prints, and appends to a CSV file, medians over the epochs of all
    rounds, and the largest relative difference of the losses.

    Args:
        width: of a random backbone with heads of 64 and MLPs of 4 times the width; 0 takes
            `embedded-1`, which has square patches as transformers' AST has.
        depth: its blocks.
        frames: input length; 198 for the embedded backbone, 1024 for another, by default.
        methods: which of them.
        clips: clips per class, of 10 classes.
        batch: clips per step; the clips must be a multiple of it.
        epochs: epochs of a run.
        rounds: runs of each.
        attention: of PyTorch: fused, or plain as in the papers' code.
        out: CSV file.
    """
    model = (
        load("embedded-1", num_classes=10, frames=frames)
        if not width
        else make_model(width, depth, frames or 1024)
    )
    frontend = make_front_end(model)
    source = keep_in_memory(Synthetic(clips=clips, seconds=frontend.samples / frontend.rate))
    if len(source) % batch:
        raise SystemExit(f"{len(source)} clips are not a multiple of {batch}")
    cpu, label = describe_cpu(), f"width {model.config.dim}, {model.config.depth} blocks"
    print(f"{cpu}\n{label}, {model.config.frames} frames, batch {batch}", flush=True)
    steps = len(source) // batch
    order = find_order(source, frontend, batch, epochs)
    features, targets = compute_features(source, frontend)
    for name in methods:
        adapted = petl.adapt(model, METHODS[name])
        runs: dict[str, list[list[Epoch]]] = {"aatjax": [], "pytorch": []}
        for _ in range(rounds):
            runs["aatjax"].append(run_fit(adapted, source, batch, epochs, steps))
            theirs = make_torch_model(adapted, attention)
            runs["pytorch"].append(run_torch(theirs, features, targets, order, epochs))
        row = {
            "cpu": cpu,
            "model": label,
            "frames": model.config.frames,
            "batch": batch,
            "attention": attention,
            "method": name,
            **summarize(runs),
        }
        print("  ".join(f"{k} {v}" for k, v in list(row.items())[5:]), flush=True)
        append_row(out, row)


def make_model(width: int, depth: int, frames: int) -> AST:
    """Return an AST with random weights and AST-base's patches."""
    config = ASTConfig(
        dim=width, depth=depth, heads=width // 64, mlp_dim=4 * width, frames=frames, num_classes=10
    )
    return AST(config, rngs=nnx.Rngs(0))


def find_order(source: Source, frontend: FrontEnd, batch: int, epochs: int) -> list[np.ndarray]:
    """Return the clips of each step of `fit`."""
    made = make_train_batches(source, frontend, batch_size=batch, epochs=epochs, seed=0)
    return [rows["index"] for rows in made]


def compute_features(source: Source, frontend: FrontEnd) -> tuple[torch.Tensor, torch.Tensor]:
    """Return normalised log-mel and classes of every clip."""
    compute = jax.jit(frontend)
    parts = [
        np.asarray(compute(rows["audio"], rows["length"]))[rows["weight"] > 0]
        for rows in make_eval_batches(source, frontend, batch_size=8)
    ]
    return torch.tensor(np.concatenate(parts)), torch.tensor(source.targets().argmax(1))


class Meter:
    """Wall time, processor time and page faults since it was made."""

    def __init__(self) -> None:
        self._start = self._read()

    def _read(self) -> tuple[float, float, int]:
        use = resource.getrusage(resource.RUSAGE_SELF)
        return time.perf_counter(), use.ru_utime + use.ru_stime, use.ru_minflt

    def epoch(self, loss: float, steps: int) -> Epoch:
        """Return what was used, with a loss."""
        wall, cpu, faults = (
            now - then for now, then in zip(self._read(), self._start, strict=True)
        )
        return Epoch(loss, wall, cpu, faults / steps)


def run_fit(model: AST, source: Source, batch: int, epochs: int, steps: int) -> list[Epoch]:
    """Train with `fit`."""
    found: list[Epoch] = []
    meter: Meter | None = None

    def beat(phase: str, step: int) -> None:
        nonlocal meter
        if phase == "input" and meter is None:
            meter = Meter()
        if phase == "eval" and meter is not None:
            found.append(meter.epoch(0.0, steps))
            meter = None

    training = Training(epochs=epochs, batch_size=batch)
    run = fit(
        model, source, training=training, optim=OPTIM, show=None, context=FitContext(beat=beat)
    )
    rows = zip(found, run.history, strict=False)  # the evaluation of the test clips comes after
    return [dataclasses.replace(each, loss=row["train/loss"]) for each, row in rows]


def run_torch(
    model: Any,
    features: torch.Tensor,
    targets: torch.Tensor,
    order: list[np.ndarray],
    epochs: int,
) -> list[Epoch]:
    """Train with a plain loop in PyTorch."""
    steps = len(order) // epochs
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, LR, (OPTIM.b1, OPTIM.b2), OPTIM.eps, OPTIM.weight_decay)
    schedule: Any = make_schedule(OPTIM, steps_per_epoch=steps, epochs=epochs)
    rates = [float(schedule(step)) for step in range(len(order))]
    found = []
    for epoch in range(epochs):
        meter, total = Meter(), 0.0
        for step in range(epoch * steps, (epoch + 1) * steps):
            rows = torch.tensor(order[step])
            optimizer.param_groups[0]["lr"] = rates[step]
            optimizer.zero_grad()
            logits = model(features[rows]).logits
            loss = torch.nn.functional.cross_entropy(logits, targets[rows])
            loss = loss + sum(getattr(module, "penalty", 0.0) for module in model.modules())
            loss.backward()
            optimizer.step()
            total += loss.item()
        found.append(meter.epoch(total / steps, steps))
    return found


def summarize(runs: dict[str, list[list[Epoch]]]) -> dict[str, Any]:
    """Return the columns of a row: seconds, their ratio, losses and page faults."""

    def median(name: str, value: Callable[[Epoch], float]) -> float:
        return statistics.median(value(each) for run in runs[name] for each in run[1:])

    ours, theirs = (runs[name][0] for name in ("aatjax", "pytorch"))
    pairs = zip(ours, theirs, strict=True)
    ratios = [
        sum(each.seconds for each in b[1:]) / sum(each.seconds for each in a[1:])
        for a, b in zip(runs["aatjax"], runs["pytorch"], strict=True)
    ]
    return {
        "pytorch_s": f"{median('pytorch', lambda e: e.seconds):.3f}",
        "aatjax_s": f"{median('aatjax', lambda e: e.seconds):.3f}",
        "ratio": f"{statistics.median(ratios):.2f}",
        "pytorch_cpu_s": f"{median('pytorch', lambda e: e.cpu_seconds):.3f}",
        "aatjax_cpu_s": f"{median('aatjax', lambda e: e.cpu_seconds):.3f}",
        "pytorch_loss": f"{theirs[-1].loss:.6f}",
        "aatjax_loss": f"{ours[-1].loss:.6f}",
        "loss_difference": f"{max(abs(a.loss - b.loss) / b.loss for a, b in pairs):.1e}",
        "aatjax_faults_a_step": f"{median('aatjax', lambda e: e.faults):.0f}",
    }
