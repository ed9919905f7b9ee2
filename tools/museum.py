"""Writes an entry of the museum in `tests/museum`: files as this version writes them.

python tools/museum.py NAME
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import tyro
from flax import nnx

import aatjax
from aatjax import petl, surgery
from aatjax.config import Config, Data, Model
from aatjax.convert import write_native
from aatjax.convert.load import make_front_end
from aatjax.experiments.run import train
from aatjax.export import export
from aatjax.models.ast import AST, ASTConfig
from aatjax.train.adapter_file import read_info, save_adapter
from aatjax.train.optim import Optim
from aatjax.train.training import Training

MUSEUM = Path(__file__).resolve().parents[1] / "tests" / "museum"
TINY = ASTConfig(
    dim=8, depth=2, heads=2, mlp_dim=16, stride=(16, 16), mels=32, frames=48, num_classes=4
)
CLASSES = ("bell", "rain", "voice")
BASE = "base.safetensors"
METHODS = {
    "linear": ("embedded", petl.Linear()),
    "soft_moa": (BASE, petl.SoftMoA(num_experts=2, slots=2)),
    "aat": (BASE, petl.AAT()),
    "conformer": (BASE, petl.Adapter(block="conformer", location="both", blocks="last1")),
    "lora": (BASE, petl.LoRA()),
    "prompt": (BASE, petl.Prompt(tokens=2)),
    "partial": (BASE, petl.Partial(blocks="last1")),
    "combined": (BASE, petl.Combined((petl.AAT(ratio=0.5), petl.Prefix(tokens=2)))),
    "full": (BASE, petl.Full()),
}
"""Source of the base and method by name of the adapter; sizes are the defaults of the version."""
EXPORTS = ("safetensors", "hf", "stablehlo")
RUN = Config(
    name="museum",
    petl=petl.LoRA(),
    model=Model(source=BASE),
    data=Data(format="synthetic", train_clips=10, test_clips=2, valid_fraction=0.2),
    training=Training(epochs=2, batch_size=16),
    optim=Optim(lr=5e-3),
)


def make_clip(samples: int = 7200) -> np.ndarray:
    """Return a sweep `[samples]` at 16 kHz, shorter than the input of every model here."""
    time = np.arange(samples) / 16000
    return (13000 * np.sin(2 * np.pi * (100 * time + 1900 * time**2))).astype(np.int16)


def write_adapters() -> None:
    """Write the small base, and an adapter of each method with parameters that are not initial."""
    write_native(BASE, surgery.arrays(AST(TINY, rngs=nnx.Rngs(0))), TINY)
    for name, (source, method) in METHODS.items():
        model = petl.adapt(aatjax.load(source, num_classes=len(CLASSES)), method, seed=1)
        rng = np.random.default_rng(0)
        for variable in surgery.variables(model).values():
            if isinstance(variable, nnx.Param):
                variable[...] = variable[...] + 0.05 * rng.normal(size=variable.shape)
        save_adapter(
            f"{name}.safetensors",
            model,
            classes=CLASSES,
            multi_label=name in ("aat", "full"),
            frontend=make_front_end(model),
            extra={"note": {"of": name}},
        )


def write_runs() -> None:
    """Write a finished run, and the same run as if killed after its first epoch."""
    train(RUN, run_dir="finished", show=None)
    for name in (".lock", "best.safetensors"):
        Path("finished", name).unlink(missing_ok=True)
    shutil.rmtree("finished/tensorboard", ignore_errors=True)
    shutil.copytree("finished", "interrupted")
    shutil.rmtree("finished/checkpoints")
    first, last = sorted(Path("interrupted/checkpoints").iterdir(), key=lambda path: int(path.name))
    shutil.rmtree(last)
    for name in ("result.json", "test_clips.json", "adapter.safetensors"):
        Path("interrupted", name).unlink(missing_ok=True)
    metrics = Path("interrupted/metrics.jsonl")
    metrics.write_text(metrics.read_text().splitlines(keepends=True)[0])
    print(f"interrupted at step {first.name}")


def write_expected() -> None:
    """Write what each adapter computes: logits of its golden sample, probabilities of the sweep."""
    expected = {}
    for path in [*sorted(Path().glob("*.safetensors")), Path("finished/adapter.safetensors")]:
        if path.name == BASE:
            continue
        info = read_info(path) or {}
        found = aatjax.Classifier.load(path).predict_waveform(make_clip())
        expected[path.as_posix()] = {
            "logits": info["golden"]["logits"],
            "probabilities": [float(f"{p:.7g}") for p in found.probabilities],
        }
    Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def main(name: tyro.conf.Positional[str]) -> None:
    """Write the entry `tests/museum/NAME`; it must be new."""
    folder = MUSEUM / name
    folder.mkdir(parents=True)
    os.chdir(folder)  # paths that the files hold are relative
    write_adapters()
    write_runs()
    for to in EXPORTS:
        export("lora.safetensors", to, Path("exports", to), platforms=("cpu",))
    write_expected()


if __name__ == "__main__":
    tyro.cli(main)
