"""A config whose runs take a second: short noises and tones, a small base, a linear head."""

from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from adapter_files import write_base

from aatjax import petl
from aatjax.config import Config, Data, Model
from aatjax.experiments import run as experiment
from aatjax.train.optim import Optim
from aatjax.train.training import Training


def make_config(folder: Path, *, clips: int = 5, training: Any = None, **data: Any) -> Config:
    """Write the clips of each of two classes, and the base, into a folder."""
    rng = np.random.default_rng(0)
    for label in ("hiss", "tone"):
        (folder / "sounds" / label).mkdir(parents=True)
        for i in range(clips):
            wave = 0.1 * rng.normal(size=4000) + (label == "tone") * np.sin(np.arange(4000) / 5)
            soundfile.write(folder / "sounds" / label / f"{i}.wav", 0.5 * wave, 16000)
    return Config(
        petl=petl.Linear(),
        model=Model(source=str(write_base(folder / "base.safetensors"))),
        data=Data(
            path=str(folder / "sounds"), test_fraction=0.2, cache=str(folder / "cache"), **data
        ),
        training=Training(**{"epochs": 2, "batch_size": 4, "threads": 0, **(training or {})}),
        optim=Optim(lr=1e-2, schedule="constant"),
    )


def train(config: Config, run: Path) -> experiment.ExperimentResult:
    """Train in this process, without a display."""
    return experiment.train(config, run_dir=run, show=None)
