"""`aatjax.load`: a model from any published weight layout, from the package, or at random."""

import dataclasses
import os
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from aatjax import surgery
from aatjax.audio.frontend import PRESETS, FrontEnd
from aatjax.convert import Checkpoint, fetch_weights, read_checkpoint
from aatjax.errors import DataError, UsageError
from aatjax.io.hub import is_repository_id
from aatjax.models.ast import AST, Head
from aatjax.models.config import ASTConfig, Pooling, PositionInit
from aatjax.models.positions import resize_positions
from aatjax.models.provenance import Origin, fingerprint_backbone

EMBEDDED = Path(__file__).parents[1] / "weights" / "ast_mini_synthetic.safetensors"


def load(
    source: str | os.PathLike[str],
    *,
    num_classes: int | None = None,
    frames: int | None = None,
    mels: int | None = None,
    pool: Pooling | None = None,
    head_norm: bool | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    scan: bool = False,
    remat: bool = False,
    positions: PositionInit = "learned",
    mask_padding: bool = False,
    rgb: Literal["sum", "mean"] = "sum",
    revision: str | None = None,
    seed: int = 0,
) -> AST:
    """Loads an AST; every expected tensor is found and every unexpected one is named.

    Args:
        source: a `.safetensors`, `.pth` or `.bin` file, a folder (Hugging Face or Orbax), a
            Hugging Face repository id such as `MIT/ast-finetuned-audioset-10-10-0.4593`,
            `embedded` for the small AST inside the package, or `random:tiny|small|base`.
        num_classes: gives a new head with that many outputs; by default the checkpoint's head is
            kept.
        frames: input length in 10 ms frames; the position grid is cut or interpolated for it
            (AST, sec. 2.2). By default the checkpoint's.
        mels: mel bins of the input.
        pool: pooling; by default what the checkpoint was made with.
        head_norm: whether a new head has a LayerNorm.
        dtype: compute type.
        scan: run the blocks as one scanned body.
        remat: recompute activations in the backward pass.
        positions: `learned`, or `zeros` to throw the checkpoint's away, as the published
            parameter-efficient code (arXiv 2312.03694, 2402.00828) does.
        mask_padding: patches that lie wholly in a clip's padding are seen by nobody but adapters
            that convolve along the tokens (conformer, convpass).
        rgb: how the colour channels of an ImageNet patch kernel become one.
        revision: commit or branch of a repository id.
        seed: seed of a new head, or of everything in `random:...`.

    Returns:
        An AST whose parameters are all frozen, to be given to `aatjax.adapt`.

    Raises:
        UsageError: options that do not fit the checkpoint.
        DataError: the file is missing, damaged, or of another model.
        UnavailableError: a repository that cannot be reached and is not in the cache.
    """
    changes: dict[str, Any] = {
        "dtype": dtype,
        "scan": scan,
        "remat": remat,
        "positions": positions,
        "mask_padding": mask_padding,
    }
    given = {"num_classes": num_classes, "frames": frames, "mels": mels, "pool": pool}
    changes |= {name: value for name, value in given.items() if value is not None}
    name = os.fspath(source)
    if name.startswith("random:"):
        if head_norm is not None:
            changes["head_norm"] = head_norm
        return _random(name, changes, seed)

    checkpoint = read_checkpoint(locate_weights(name, revision), rgb=rgb)
    new_head = num_classes is not None
    if not new_head and not checkpoint.has_head:
        raise UsageError(f"{name} has no classification head: give num_classes=")
    if head_norm is not None:
        if not new_head and head_norm != checkpoint.config.head_norm:
            raise UsageError(
                "head_norm= changes the head, so it needs a new one: give num_classes="
            )
        changes["head_norm"] = head_norm
    config = dataclasses.replace(checkpoint.config, **changes)
    origin = Origin(name, fingerprint_backbone(checkpoint.params), seed, revision, rgb)
    return build_model(checkpoint, config, origin=origin, new_head=new_head)


def build_model(
    checkpoint: Checkpoint, config: ASTConfig, *, origin: Origin, new_head: bool
) -> AST:
    """An AST of `config` with the checkpoint's weights, positions fitted to the new grid."""
    fitted = fit_positions(dataclasses.replace(checkpoint, config=config))
    values: dict[str, Any] = {
        path: value
        for path, value in fitted.params.items()
        if not (new_head and path.startswith("head/"))
    }
    model: AST = nnx.eval_shape(lambda: AST(config, rngs=nnx.Rngs(0)))
    if new_head:
        head = Head(config, rngs=nnx.Rngs(origin.seed))
        values |= {f"head/{path}": value for path, value in surgery.arrays(head).items()}
    if config.positions == "zeros":
        values["embed/pos"] = np.zeros_like(values["embed/pos"])
    surgery.assign(model, values, what=origin.source, complete=True)
    model.origin = origin
    model.labels = None if new_head else checkpoint.labels
    model.statistics = checkpoint.statistics
    return model


def reset_weights(model: AST, seed: int) -> None:
    """Replaces every weight by a random one, in place: training from scratch in the same shape."""
    values = surgery.arrays(AST(model.config, rngs=nnx.Rngs(seed)))
    surgery.assign(model, values, what="random weights", complete=True)
    if model.origin is not None:
        found = fingerprint_backbone({path: np.asarray(value) for path, value in values.items()})
        model.origin = dataclasses.replace(model.origin, fingerprint=found, seed=seed, reset=True)


def make_front_end(model: AST) -> FrontEnd:
    """The front end that a model's weights were trained with: AudioSet's unless they tell."""
    mean, std = model.statistics or PRESETS["audioset"]
    return FrontEnd(frames=model.config.frames, mels=model.config.mels, mean=mean, std=std)


def fit_positions(checkpoint: Checkpoint, frames: int | None = None) -> Checkpoint:
    """The same weights with positions cut or interpolated to `frames` (default: the config's)."""
    config = checkpoint.config
    if frames is not None:
        config = dataclasses.replace(config, frames=frames)
    positions = resize_positions(
        checkpoint.params["embed/pos"],
        checkpoint.grid,
        config.grid,
        prefix=checkpoint.num_prefix,
        rule=checkpoint.rule,
    )
    params = {**checkpoint.params, "embed/pos": np.asarray(positions)}
    return dataclasses.replace(checkpoint, params=params, config=config, grid=config.grid)


def locate_weights(name: str, revision: str | None = None) -> Path:
    """The file or folder that a source names: a path, `embedded`, or a repository id.

    Raises:
        DataError: nothing of that name.
        UnavailableError: a repository that cannot be reached and is not in the cache.
    """
    if name == "embedded":
        return EMBEDDED
    path = Path(name).expanduser()
    if path.exists():
        return path
    if is_repository_id(name) or revision is not None:
        return fetch_weights(name, revision=revision)
    raise DataError(
        f"{name}: no such file or folder (a Hugging Face repository id has the form owner/name; "
        "'embedded' and 'random:base' need no file)"
    )


def _random(name: str, changes: dict[str, Any], seed: int) -> AST:
    config = ASTConfig.size(name.removeprefix("random:"), **changes)
    # One compiled program: an eager init would pay a dispatch for each of some 200 tensors.
    parts = jax.jit(lambda: nnx.state(AST(config, rngs=nnx.Rngs(seed))))()
    model: AST = nnx.eval_shape(lambda: AST(config, rngs=nnx.Rngs(0)))
    nnx.update(model, parts)
    if config.positions == "zeros":
        surgery.assign(model, {"embed/pos": np.zeros(model.embed.pos.shape)}, what="zero positions")
    tensors = {path: np.asarray(value) for path, value in surgery.arrays(model).items()}
    model.origin = Origin(name, fingerprint_backbone(tensors), seed)
    return model
