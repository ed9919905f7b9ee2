"""A small run for `test_sharding`, in a process of its own: prints its result as JSON.

usage: run_sharded.py METHOD DATA,FSDP,MODEL[/DATA,FSDP,MODEL] RUN_DIR [HOST:PORT PROCESSES PROCESS]
"""

import contextlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from aatjax import evaluate, fit, petl, surgery
from aatjax.data.source import Clip, Reader, Source
from aatjax.models.ast import AST, ASTConfig
from aatjax.train.cluster import Processes
from aatjax.train.distributed import start_processes
from aatjax.train.optim import Optim
from aatjax.train.sharding import MeshShape
from aatjax.train.training import Training

METHODS = {
    "aat": petl.AAT(),
    "conformer": petl.Adapter(block="conformer", reduction=4, kernel=5),
    "soft_moa": petl.SoftMoA(reduction=8.0),
    "full": petl.Full(),
}
CONFIG = ASTConfig(
    dim=32,
    depth=1,
    heads=2,
    mlp_dim=48,
    stride=(16, 16),
    frames=39,
    num_classes=3,
    pool="mean_patches",
)


class Tones(Reader):
    """A tone in noise; records which clips were read."""

    def __init__(self):
        self.seen = []

    def read(self, clip):
        self.seen.append(int(clip.id))
        rng = np.random.default_rng(int(clip.id))
        wave = np.sin(2 * np.pi * 400 * 2 ** clip.label[0] * np.arange(7000) / 16000)
        return (8000 * wave + 2000 * rng.normal(size=7000)).astype(np.int16)


def tones(count, first=0):
    clips = [Clip(str(i), (i % 3,), None) for i in range(first, first + count)]
    return Source(clips, ["a", "b", "c"], name="tones", reader=Tones())


class Stopped(Exception):
    """The run was stopped after an epoch."""


def run_in_turn(method, meshes, run_dir):
    """Each mesh but the last trains for one epoch and leaves its checkpoint to the next."""

    def stop(moment):
        raise Stopped

    *first, last = meshes
    for mesh in first:
        with contextlib.suppress(Stopped):
            run(method, mesh, run_dir, on_epoch=stop)
            raise AssertionError("it was not stopped")
    return run(method, last, run_dir)


def run(method, mesh, run_dir=None, on_epoch=None, **training):
    """Twenty clips in batches of eight, the last one half padding: three steps an epoch."""
    model = petl.adapt(AST(CONFIG, rngs=nnx.Rngs(0)), METHODS[method])
    options = {"epochs": 2, "batch_size": 8, "threads": 0, **training}
    source = tones(20)
    done = fit(
        model,
        source,
        valid=tones(5, first=50),
        training=Training(**options),
        optim=Optim(lr=1e-3),
        mesh=mesh,
        run_dir=run_dir,
        on_epoch=on_epoch,
        windows="random",
        show=None,
    )
    kinds = (nnx.Param, nnx.BatchStat)
    weights = {
        path: np.asarray(variable[...])
        for path, variable in surgery.variables(done.model).items()
        if isinstance(variable, kinds)
    }
    return {
        "losses": [row["train/loss"] for row in done.history],
        "evaluated": evaluate(done.model, tones(5, first=50)).accuracy,
        "valid": [row["valid/accuracy"] for row in done.history],
        "seen": source.reader.seen,
        "weights": weights,
        "devices": jax.device_count(),
    }


if __name__ == "__main__":
    jax.config.update("jax_default_matmul_precision", "highest")
    method, sizes, folder = sys.argv[1:4]
    if len(sys.argv) > 4:
        address, count, index = sys.argv[4:7]
        start_processes(Processes(address, int(count), int(index)))
    meshes = [MeshShape(*map(int, one.split(","))) for one in sizes.split("/")]
    found = run_in_turn(method, meshes, Path(folder) / "run")
    np.savez(Path(folder) / f"weights{jax.process_index()}.npz", **found.pop("weights"))
    print(json.dumps(found))
