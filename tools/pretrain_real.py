"""Pretrains a small AST on real recordings plus the synthetic sounds, as a source for transfer.

    python tools/pretrain_real.py --data ESC-50-fold4 --out runs/real/backbone.safetensors

Learns to tell the classes of a labelled set of recordings and the synthetic sounds apart in one
head, at three seconds. By default it starts from random weights of the shape of those in the
package, and leaves out the synthetic sounds that ESC-10 has a class of, so that nothing of the
target task is in the source task; `--source embedded --without` takes all. The weights carry the
licence of the recordings: they are for measuring, not for shipping.
"""

import argparse
import time
from pathlib import Path

import numpy as np

from aatjax import petl, surgery
from aatjax.audio.augment import Augment
from aatjax.config import Data, Model
from aatjax.convert import write_native
from aatjax.data.pipeline import keep_in_memory
from aatjax.data.source import Clip, Reader, Source
from aatjax.data.synthetic.dataset import Synthetic
from aatjax.data.synthetic.synthesize import SOUNDS
from aatjax.experiments.run import load_backbone, open_data
from aatjax.train.fit import fit
from aatjax.train.loop import Training
from aatjax.train.optim import Optim

IN_ESC10 = ("rain", "waves", "fire", "clock", "helicopter", "chainsaw", "bark")
"""Synthetic sounds of which ESC-10 has recordings."""


class _Either(Reader):
    """Reads a clip with the reader of the source that its id names first."""

    def __init__(self, sources: list[Source]) -> None:
        self.clips = {f"{i}:{c.id}": (s.reader, c) for i, s in enumerate(sources) for c in s.clips}

    def read(self, clip: Clip) -> np.ndarray:
        reader, own = self.clips[clip.id]
        return reader.read(own)


def join(sources: list[Source]) -> Source:
    """One source of all clips, the classes of each kept apart."""
    clips: list[Clip] = []
    classes: list[str] = []
    for number, source in enumerate(sources):
        first = len(classes)
        classes += [f"{source.name}/{name}" for name in source.classes]
        for clip in source.clips:
            label = tuple(first + index for index in clip.label)
            group = None if clip.group is None else f"{number}:{clip.group}"
            clips.append(Clip(f"{number}:{clip.id}", label, clip.path, group=group))
    return Source(clips, classes, name="joined", reader=_Either(sources))


def main() -> None:
    """Pretrains, reports accuracy on held-out clips, and writes the weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="labelled recordings")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--run", type=Path, default=Path("runs/pretrain_real"))
    parser.add_argument("--source", help="weights to start from (default: random ones)")
    parser.add_argument("--frames", type=int, default=298)
    parser.add_argument("--synthetic", type=int, default=40, help="synthetic clips a class")
    parser.add_argument(
        "--without", nargs="*", default=IN_ESC10, choices=SOUNDS, help="synthetic sounds left out"
    )
    parser.add_argument("--epochs", type=int, default=60)
    args = parser.parse_args()

    started = time.monotonic()
    real = open_data(Data(path=args.data))
    train, test = real.split(0.125)
    names = [name for name in SOUNDS if name not in args.without]
    sounds = Synthetic(names, clips=args.synthetic, seconds=5.0)
    train = keep_in_memory(join([train, sounds]))
    test = join([test, Synthetic(names, clips=1, seconds=5.0, first=1_000_000)])
    start = Model(source=args.source or "embedded", frames=args.frames, reset=args.source is None)
    model = load_backbone(start, num_classes=len(train.classes), seed=0)
    run = fit(
        petl.adapt(model, petl.Full()),
        train,
        test,
        training=Training(epochs=args.epochs, batch_size=32, crop="random"),
        optim=Optim(lr=1e-3, warmup_steps=60, weight_decay=0.05, clip=1.0),
        augment=Augment(mixup=0.5, freq_mask=24, time_mask=96, roll=True),
        run_dir=args.run,
    )
    assert run.test is not None
    print(run.test.table())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    params = {name: np.asarray(value) for name, value in surgery.arrays(run.model).items()}
    write_native(args.out, params, run.model.config, labels=train.classes)
    print(f"{args.out}: {(time.monotonic() - started) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
