"""Pretraining of a backbone on sounds, with or without their labels."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from aatjax import surgery
from aatjax.audio.augment import Augment
from aatjax.config import Config, Data, Model
from aatjax.convert.write import write_native
from aatjax.data.joined import join_sources
from aatjax.data.pipeline import keep_in_memory
from aatjax.data.source import Source
from aatjax.data.synthetic.dataset import Synthetic
from aatjax.data.synthetic.speech import WORDS
from aatjax.data.synthetic.synthesize import PRETRAIN_SOUNDS
from aatjax.experiments.partition import list_partition, make_partition
from aatjax.experiments.run import load_backbone, prepare_front_end
from aatjax.io.progress import TextStream
from aatjax.models.ast import AST
from aatjax.petl import adapt
from aatjax.petl.simple import Full
from aatjax.train.fit import Run, fit
from aatjax.train.masked_patches import mask_patches, read_loss
from aatjax.train.optim import Optim
from aatjax.train.training import Training

Objective = Literal["supervised", "masked"]
MADE = {"synthetic": PRETRAIN_SOUNDS, "words": WORDS}
"""Sets that the package makes itself: environmental sounds, and words of no language."""
HELD_OUT = 1_000_000
"""Number of the first synthetic clip that is held out."""

PRETRAINING = Config(
    name="pretrain",
    petl=Full(),
    model=Model(source="random:d128x4,patch=16,stride=16", frames=198),
    data=Data(test_fraction=0.05, train_clips=300, test_clips=30),
    training=Training(epochs=30, batch_size=64, save_every=1),
    optim=Optim(lr=1e-3, warmup_steps=200, weight_decay=0.05, clip=1.0, b2=0.98),
    augment=Augment(mixup=0.5, freq_mask=24, time_mask=40, roll=True),
)
"""The settings where no flag says otherwise."""


def open_sets(
    paths: Sequence[str], data: Data, *, seconds: float, show: TextStream | None = None
) -> tuple[Source, Source]:
    """Return the training clips and the held-out clips of several sets, each joined.

    A set of `MADE` has `data.train_clips` per class of `synthetic`, or as many in all.

    Args:
        paths: folders, CSV files and so on, or a name of `MADE`.
        data: how each is read and divided.
        seconds: length of the synthetic clips.
        show: where progress goes.
    """
    for path in paths:
        if path not in MADE:
            list_partition(dataclasses.replace(data, path=path))  # before hours of decoding
    pairs: list[tuple[Source, Source]] = []
    for path in paths:
        if path in MADE:
            share = len(PRETRAIN_SOUNDS) / len(MADE[path])
            both = ((data.train_clips, 0), (data.test_clips, HELD_OUT))
            train, test = (
                Synthetic(
                    MADE[path], clips=max(1, round(clips * share)), first=first, seconds=seconds
                )
                for clips, first in both
            )
            pairs.append((keep_in_memory(train), test))
            continue
        parts = make_partition(dataclasses.replace(data, path=path), show=show)
        pairs.append((parts.train, parts.test or parts.valid or parts.train))
    names = [
        path if path in MADE else train.name for path, (train, _) in zip(paths, pairs, strict=True)
    ]
    train, test = (join_sources(sources, names) for sources in zip(*pairs, strict=True))
    return train, test


def pretrain(
    config: Config,
    paths: Sequence[str],
    out: Path,
    *,
    objective: Objective = "supervised",
    run_dir: Path | None = None,
    show: TextStream | None = None,
    begin: Callable[[], None] = lambda: None,
) -> Run:
    """Pretrain a backbone and write its weights, in float16.

    Args:
        config: shape and start of the model (`model`), reading of the sounds (`data`), training.
        paths: see `open_sets`.
        out: file of the weights: a source for `aatjax.load`.
        objective: `supervised` learns the labels of all sets with one head, which is kept; `masked`
            reconstructs masked patches (`aatjax.train.masked_patches`), and keeps no head.
        run_dir: folder of checkpoints; called again with it, the run goes on.
        show: where progress goes.
        begin: called when everything was checked that can be known before training.
    """
    seconds = (config.model.frames or 198) / 100 + 0.02
    train, test = open_sets(paths, config.data, seconds=seconds, show=show)
    seed = config.training.seed
    backbone = load_backbone(config.model, num_classes=len(train.classes), seed=seed)
    masked = objective == "masked"
    model = mask_patches(backbone, seed=seed) if masked else adapt(backbone, Full(), seed=seed)
    frontend = prepare_front_end(config, backbone, train)
    begin()
    run = fit(
        model,
        train,
        test,
        training=config.training,
        optim=config.optim,
        augment=config.augment,
        frontend=frontend,
        windows=config.data.windows,
        scoring=config.data.scoring,
        run_dir=run_dir,
        show=show,
        loss=read_loss if masked else None,
    )
    write_backbone(out, backbone, run, keep_head=not masked)
    return run


def write_backbone(out: Path, backbone: AST, run: Run, *, keep_head: bool) -> None:
    """Write the arrays of a pretrained body, by the names that they had before, in float16."""
    found = surgery.fetch_arrays(run.model)
    names = surgery.variables(backbone)
    kept = [name for name in names if keep_head or not name.startswith(("head/", "pool/"))]
    params = {name: np.asarray(found[name]) for name in kept}
    labels = run.classes if keep_head else None
    frontend = run.frontend
    write_native(
        out,
        params,
        backbone.config,
        labels=labels,
        statistics=(frontend.mean, frontend.std),
        dtype="float16",
    )
