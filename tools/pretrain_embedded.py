"""Makes the weights inside the package: a small AST pretrained on 20 synthetic sound classes.

    python tools/pretrain_embedded.py --out aatjax/weights/ast_mini_synthetic.safetensors

About half an hour on 2 CPU cores. The 10 classes that the default run adapts to
(`TARGET_SOUNDS`) are not among the 20. Re-running continues from the last checkpoint in --run.
"""

import argparse
import time
from pathlib import Path

import numpy as np
from flax import nnx

from aatjax import petl, surgery
from aatjax.audio.augment import Augment
from aatjax.convert import write_native
from aatjax.data.pipeline import keep_in_memory
from aatjax.data.synthetic.dataset import Synthetic
from aatjax.data.synthetic.synthesize import PRETRAIN_SOUNDS
from aatjax.models.ast import AST, ASTConfig
from aatjax.train.fit import fit
from aatjax.train.loop import Training
from aatjax.train.optim import Optim

MINI = ASTConfig(
    dim=128,
    depth=4,
    heads=4,
    mlp_dim=512,
    stride=(16, 16),
    frames=198,
    num_classes=len(PRETRAIN_SOUNDS),
)


def main() -> None:
    """Pretrains, reports the held-out accuracy, and writes the weights in float16."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--run", type=Path, default=Path("runs/pretrain_embedded"))
    parser.add_argument("--clips", type=int, default=250, help="training clips a class")
    parser.add_argument("--epochs", type=int, default=30)
    args = parser.parse_args()

    started = time.monotonic()
    train = keep_in_memory(Synthetic(PRETRAIN_SOUNDS, clips=args.clips, seed=0))
    test = Synthetic(PRETRAIN_SOUNDS, clips=30, seed=0, first=1_000_000)
    model = petl.adapt(AST(MINI, rngs=nnx.Rngs(0)), petl.Full())
    run = fit(
        model,
        train,
        test,
        training=Training(epochs=args.epochs, batch_size=64),
        optim=Optim(lr=1e-3, warmup_steps=200, weight_decay=0.05, clip=1.0, b2=0.98),
        augment=Augment(mixup=0.5, freq_mask=24, time_mask=40, roll=True),
        run_dir=args.run,
    )
    assert run.test is not None
    print(run.test.table())
    params = {name: np.asarray(value) for name, value in surgery.arrays(run.model).items()}
    write_native(args.out, params, run.model.config, labels=train.classes, dtype="float16")
    minutes = (time.monotonic() - started) / 60
    size = args.out.stat().st_size / 1e6
    print(f"{args.out}: {size:.2f} MB, {minutes:.0f} minutes")


if __name__ == "__main__":
    main()
