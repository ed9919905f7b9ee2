"""Pretraining of small ASTs.

python tools/pretrain.py embedded --out aatjax/weights/ast_mini_synthetic.safetensors
python tools/pretrain.py real --data ESC-50-fold4 --out runs/real/backbone.safetensors
"""

import time
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from flax import nnx

from aatjax import petl, surgery
from aatjax.audio.augment import Augment
from aatjax.config import Data, Model
from aatjax.convert import write_native
from aatjax.data.pipeline import keep_in_memory
from aatjax.data.source import Clip, Reader, Source
from aatjax.data.synthetic.dataset import Synthetic
from aatjax.data.synthetic.synthesize import PRETRAIN_SOUNDS, SOUNDS
from aatjax.experiments.run import load_backbone, open_data
from aatjax.models.ast import AST, ASTConfig
from aatjax.train.fit import Run, fit
from aatjax.train.optim import Optim
from aatjax.train.training import Training

MINI = ASTConfig(
    dim=128,
    depth=4,
    heads=4,
    mlp_dim=512,
    stride=(16, 16),
    frames=198,
    num_classes=len(PRETRAIN_SOUNDS),
)
IN_ESC10 = ("rain", "waves", "fire", "clock", "helicopter", "chainsaw", "bark")
"""Synthetic sounds of which ESC-10 has recordings."""


def embedded(
    out: Path, run: Path = Path("runs/pretrain_embedded"), clips: int = 250, epochs: int = 30
) -> None:
    """Pretrain the weights inside the package: a small AST on 20 synthetic sound classes.

    About half an hour on 2 CPU cores. The 10 classes that the default run adapts to
    (`TARGET_SOUNDS`) are not among the 20. A second call continues from the last checkpoint.

    Args:
        out: file of the weights, float16.
        run: folder of the run.
        clips: training clips per class.
        epochs: epochs.
    """
    began = time.monotonic()
    result = fit(
        petl.adapt(AST(MINI, rngs=nnx.Rngs(0)), petl.Full()),
        keep_in_memory(Synthetic(PRETRAIN_SOUNDS, clips=clips, seed=0)),
        Synthetic(PRETRAIN_SOUNDS, clips=30, seed=0, first=1_000_000),
        training=Training(epochs=epochs, batch_size=64),
        optim=Optim(lr=1e-3, warmup_steps=200, weight_decay=0.05, clip=1.0, b2=0.98),
        augment=Augment(mixup=0.5, freq_mask=24, time_mask=40, roll=True),
        run_dir=run,
    )
    write_weights(result, out, began, dtype="float16")


def real(
    data: str,
    out: Path,
    run: Path = Path("runs/pretrain_real"),
    source: str | None = None,
    frames: int = 298,
    synthetic: int = 40,
    without: tuple[str, ...] = IN_ESC10,
    epochs: int = 60,
) -> None:
    """Pretrain a small AST on recordings and the synthetic sounds, as a source for transfer.

    One head learns the classes of both. By default the weights start at random, and synthetic
    sounds that ESC-10 has a class of are left out, so that nothing of the target task is in the
    source task. The weights have the licence of the recordings: they are for measurements.

    Args:
        data: labelled recordings.
        out: file of the weights.
        run: folder of the run.
        source: weights to start from (default: random ones).
        frames: input length.
        synthetic: synthetic clips per class.
        without: synthetic sounds left out.
        epochs: epochs.
    """
    began = time.monotonic()
    train, test = open_data(Data(path=data)).split(0.125)
    names = [name for name in SOUNDS if name not in without]
    sounds = Synthetic(names, clips=synthetic, seconds=5.0)
    train = keep_in_memory(join_sources([train, sounds]))
    test = join_sources([test, Synthetic(names, clips=1, seconds=5.0, first=1_000_000)])
    start = Model(source=source or "embedded", frames=frames, reset=source is None)
    model = load_backbone(start, num_classes=len(train.classes), seed=0)
    result = fit(
        petl.adapt(model, petl.Full()),
        train,
        test,
        training=Training(epochs=epochs, batch_size=32),
        windows="random",
        optim=Optim(lr=1e-3, warmup_steps=60, weight_decay=0.05, clip=1.0),
        augment=Augment(mixup=0.5, freq_mask=24, time_mask=96, roll=True),
        run_dir=run,
    )
    write_weights(result, out, began)


def write_weights(
    run: Run, out: Path, began: float, dtype: Literal["float32", "float16"] = "float32"
) -> None:
    """Print the accuracy on held-out clips, and write the weights."""
    assert run.test is not None
    print(run.test.table())
    out.parent.mkdir(parents=True, exist_ok=True)
    params = {name: np.asarray(value) for name, value in surgery.arrays(run.model).items()}
    write_native(out, params, run.model.config, labels=run.classes, dtype=dtype)
    minutes = (time.monotonic() - began) / 60
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB, {minutes:.0f} minutes")


class JoinedReader(Reader):
    """Reads a clip with the reader of its own source, which its id begins with."""

    def __init__(self, sources: list[Source]) -> None:
        self.clips = {f"{i}:{c.id}": (s.reader, c) for i, s in enumerate(sources) for c in s.clips}

    def read(self, clip: Clip) -> np.ndarray:
        reader, own = self.clips[clip.id]
        return reader.read(own)


def join_sources(sources: list[Source]) -> Source:
    """Return one source of all clips, the classes of each kept apart."""
    clips: list[Clip] = []
    classes: list[str] = []
    for number, source in enumerate(sources):
        first = len(classes)
        classes += [f"{source.name}/{name}" for name in source.classes]
        for clip in source.clips:
            label = tuple(first + index for index in clip.label)
            group = None if clip.group is None else f"{number}:{clip.group}"
            clips.append(Clip(f"{number}:{clip.id}", label, clip.path, group=group))
    return Source(clips, classes, name="joined", reader=JoinedReader(sources))


if __name__ == "__main__":
    commands = {"embedded": embedded, "real": real}
    tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
