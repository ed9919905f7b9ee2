"""Models from published weights, from the package, or at random."""

import dataclasses
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, cast

import jax
import numpy as np
from flax import nnx

from aatjax import surgery
from aatjax.audio.frontend import PRESETS, FrontEnd
from aatjax.convert.known_weights import remember_weights
from aatjax.convert.memory import NAME, HasStateDict, is_in_memory
from aatjax.convert.read import Checkpoint, read_checkpoint
from aatjax.errors import DataError, UsageError, suggest
from aatjax.io.host import multiplies_bfloat16
from aatjax.io.hub import fetch_weights, is_repository_id
from aatjax.models.ast import AST, Head, make_abstract
from aatjax.models.config import ASTConfig, Pooling, PositionInit
from aatjax.models.pool import make_pool
from aatjax.models.positions import resize_positions
from aatjax.models.provenance import LoadedArrays, Origin, fingerprint_backbone

_WEIGHTS = Path(__file__).parents[1] / "weights"
EMBEDDED = {
    "embedded": _WEIGHTS / "ast_mini_sounds.safetensors",
    "embedded-1": _WEIGHTS / "ast_mini_synthetic.safetensors",
    "embedded-2": _WEIGHTS / "ast_mini_sounds.safetensors",
}
"""The weights in the package by name: the present ones, then those of each version."""


WeightSource = str | os.PathLike[str] | Mapping[str, Any] | HasStateDict
"""What `load` takes: the name of weights, or weights in memory."""


class LoadOptions(TypedDict, total=False):
    """Options of `load`. One that is omitted or None keeps what the weights were made with.

    Attributes:
        frames: input length in 10 ms frames; the position grid is cut or interpolated for it
            (AST, sec. 2.2).
        mels: mel bins of the input.
        pool: pooling of the tokens, see `ASTConfig`.
        head_norm: whether a new head has a LayerNorm.
        dtype: compute type, float32 by default; `auto` is bfloat16 where the first device
            multiplies it (`aatjax.io.host.multiplies_bfloat16`), else float32.
        scan: run the blocks as one scanned body, which compiles once.
        remat: recompute activations in the backward pass.
        positions: `learned`, or `zeros` to discard the checkpoint's, as the published
            parameter-efficient code (arXiv 2312.03694, 2402.00828) does.
        implementation: `reference` for plain operations, with derivatives of every kind and order.
        mask_padding: mask out patches that lie wholly in the padding of a clip, see `ASTConfig`.
        rgb: sum the colour channels of an ImageNet patch kernel (published code), or average them
            (`mean`).
    """

    frames: int | None
    mels: int | None
    pool: Pooling | None
    head_norm: bool | None
    dtype: Literal["float32", "bfloat16", "auto"] | None
    scan: bool | None
    remat: bool | None
    positions: PositionInit | None
    mask_padding: bool | None
    implementation: Literal["fastest", "reference"] | None
    rgb: Literal["sum", "mean"] | None


def load(
    source: WeightSource,
    *,
    num_classes: int | None = None,
    revision: str | None = None,
    seed: int = 0,
    **options: Unpack[LoadOptions],
) -> AST:
    """Load an AST; every expected tensor must be there and no other one.

    Args:
        source: a `.safetensors`, `.pth` or `.bin` file, a folder (Hugging Face or Orbax), a
            Hugging Face repository id such as `MIT/ast-finetuned-audioset-10-10-0.4593`,
            `embedded` for the small AST in the package, or
            `random:tiny|small|base`, also changed, `random:tiny,depth=4,stride=16`; or weights in
            memory: a transformers model, a state dictionary of tensors, a dictionary of arrays. An
            adapter on these is loaded again with `load_adapter(path, base=model)`.
        num_classes: outputs of a new head; None keeps the checkpoint's head.
        revision: commit or branch of a repository id.
        seed: seed of a new head, or of all weights of `random:...`.
        **options: see `LoadOptions`.

    Returns:
        An AST with all parameters frozen, for `aatjax.adapt`.

    Raises:
        UsageError: an unknown option, or options that do not fit the checkpoint.
        DataError: the file is missing, damaged, or of another model.
        UnavailableError: a repository that cannot be reached and is not in the cache.
    """
    _check_names(options)
    if options.get("dtype") == "bfloat16" and not multiplies_bfloat16(jax.devices()[0]):
        warnings.warn(
            "bfloat16 is emulated on this device, which takes more time than float32: use "
            "dtype='auto', or float32",
            stacklevel=2,
        )
    return load_model(source, num_classes, revision, seed, options)


def load_model(
    source: WeightSource,
    num_classes: int | None,
    revision: str | None,
    seed: int,
    options: LoadOptions,
    *,
    draw_head: bool = True,
) -> AST:
    """Load an AST as `load` does, without a word on a compute type that is slow here.

    Without `draw_head` a new head is zero: that of an adapter takes its place.
    """
    name = NAME if is_in_memory(source) else os.fspath(cast("str", source))
    if name.startswith("random:"):
        size = ASTConfig.from_text(name.removeprefix("random:"))
        return _initialize(name, apply_load_options(size, options, num_classes), seed)
    rgb = options.get("rgb") or "sum"
    checkpoint = read_source(source, revision=revision, rgb=rgb)
    new_head = num_classes is not None
    if not new_head and not checkpoint.has_head:
        raise UsageError(f"{name} has no classification head: give num_classes=")
    config = apply_load_options(checkpoint.config, options, num_classes)
    for field, option in (("head_norm", "head_norm"), ("pooling", "pool")):
        if not new_head and getattr(config, field) != getattr(checkpoint.config, field):
            raise UsageError(
                f"{option}= changes the head, so it needs a new one: give num_classes="
            )
    origin = Origin(name, fingerprint_backbone(checkpoint.params), seed, revision, rgb)
    _remember(origin)
    head_seed = seed if draw_head else None
    return build_model(checkpoint, config, origin=origin, new_head=new_head, head_seed=head_seed)


def select_load_options(fields: object) -> LoadOptions:
    """Return the options that an object, such as a config, has as attributes."""
    names = [name for name in LoadOptions.__annotations__ if hasattr(fields, name)]
    return LoadOptions(**{name: getattr(fields, name) for name in names})  # pyright: ignore


def apply_load_options(
    config: ASTConfig, options: LoadOptions, num_classes: int | None = None, device: Any = None
) -> ASTConfig:
    """Return the config of a checkpoint with these options, and another head if asked for.

    The device is the one that `dtype="auto"` is for, by default the first.
    """
    changes = {**options, "num_classes": num_classes, "rgb": None}
    if options.get("dtype") == "auto":
        native = multiplies_bfloat16(device or jax.devices()[0])
        changes["dtype"] = "bfloat16" if native else "float32"
    return dataclasses.replace(config, **{k: v for k, v in changes.items() if v is not None})


def _check_names(options: LoadOptions) -> None:
    for name in options:
        if name not in LoadOptions.__annotations__:
            hint = suggest(name, LoadOptions.__annotations__, cutoff=0.0)
            raise UsageError(f"load has no option {name!r}{hint}")


def build_model(
    checkpoint: Checkpoint,
    config: ASTConfig,
    *,
    origin: Origin,
    new_head: bool,
    head_seed: int | None,
) -> AST:
    """Build an AST of `config` from a checkpoint, with positions fitted to its grid.

    A new head is drawn by `head_seed`, or zero without one.
    """
    fitted = fit_positions(dataclasses.replace(checkpoint, config=config))
    values: dict[str, Any] = {
        path: value
        for path, value in fitted.params.items()
        if not (new_head and path.startswith(("head/", "pool/")))
    }
    model = make_abstract(config)
    drawn = {"head": model.head, "pool": model.pool} if new_head else {}
    if new_head and head_seed is not None:
        rngs = nnx.Rngs(head_seed)
        drawn = {"head": Head(config, rngs=rngs), "pool": make_pool(config, rngs=rngs)}
    for part, module in drawn.items():
        for path, old in surgery.variables(module).items():
            new = np.zeros(old.shape, old.dtype) if head_seed is None else old.get_raw_value()
            values[f"{part}/{path}"] = new
    if config.positions == "zeros":
        values["embed/pos"] = np.zeros_like(values["embed/pos"])
    surgery.assign(model, values, what=origin.source, complete=True)
    _finish(model, origin)
    model.labels = None if new_head else checkpoint.labels
    model.statistics = checkpoint.statistics
    return model


def reset_weights(model: AST, seed: int) -> None:
    """Replace every weight by a random one, in place, to train the same shape from scratch."""
    values = surgery.arrays(AST(model.config, rngs=nnx.Rngs(seed)))
    surgery.assign(model, values, what="random weights", complete=True)
    if model.origin is not None:
        arrays = surgery.fetch_arrays(model)
        found = fingerprint_backbone(arrays)
        model.origin = dataclasses.replace(model.origin, fingerprint=found, seed=seed, reset=True)
        _remember(model.origin)
        model.loaded = LoadedArrays.of(arrays)


def make_front_end(model: AST) -> FrontEnd:
    """Return the front end of a model, with AudioSet's statistics where its weights have none."""
    mean, std = model.statistics or PRESETS["audioset"]
    return FrontEnd(frames=model.config.frames, mels=model.config.mels, mean=mean, std=std)


def fit_positions(checkpoint: Checkpoint, frames: int | None = None) -> Checkpoint:
    """Cut or interpolate the positions of a checkpoint to `frames`, by default the config's."""
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


def read_source(
    source: WeightSource,
    *,
    revision: str | None = None,
    rgb: Literal["sum", "mean"] = "sum",
) -> Checkpoint:
    """Read the weights of a source of `load`, without building a model from a file."""
    if is_in_memory(source):
        return read_checkpoint(source, rgb=rgb)
    name = os.fspath(cast("str", source))
    if not name.startswith("random:"):
        return read_checkpoint(locate_weights(name, revision), rgb=rgb)
    model = load(name)
    params = {path: np.asarray(value) for path, value in surgery.arrays(model).items()}
    config = model.config
    return Checkpoint(config, params, config.grid, "audioset", None, name, True, config.num_prefix)


def find_embedded(fingerprint: str) -> str:
    """Return the name of the weights in the package that have this fingerprint, else `embedded`."""
    for name, path in EMBEDDED.items():
        if fingerprint_backbone(read_checkpoint(path).params) == fingerprint:
            return name
    return "embedded"


def check_source(name: str, revision: str | None = None) -> None:
    """Check that there are weights of this name, without reading them.

    Raises:
        UsageError, DataError, UnavailableError: as of `load`.
    """
    if name.startswith("random:"):
        ASTConfig.from_text(name.removeprefix("random:"))
    else:
        locate_weights(name, revision)


def locate_weights(name: str, revision: str | None = None) -> Path:
    """Find the file or folder of a source: a path, `embedded`, or a repository id.

    Raises:
        DataError: there is none.
        UnavailableError: a repository that cannot be reached and is not in the cache.
    """
    if name in EMBEDDED:
        return EMBEDDED[name]
    if name == NAME:
        raise DataError("the weights were given in memory: give them again")
    path = Path(os.path.expanduser(name))  # an unknown user is no error here
    if path.exists():
        return path
    if is_repository_id(name) or revision is not None:
        return fetch_weights(name, revision=revision)
    raise DataError(
        f"{name}: no such file or folder (a Hugging Face repository id has the form owner/name; "
        "'embedded' and 'random:base' need no file)"
    )


def _initialize(name: str, config: ASTConfig, seed: int) -> AST:
    # One compiled program: an eager init would pay a dispatch for each of some 200 tensors.
    parts = jax.jit(lambda: nnx.state(AST(config, rngs=nnx.Rngs(seed))))()
    model = make_abstract(config)
    nnx.update(model, parts)
    if config.positions == "zeros":
        surgery.assign(model, {"embed/pos": np.zeros(model.embed.pos.shape)}, what="zero positions")
    tensors = {path: np.asarray(value) for path, value in surgery.arrays(model).items()}
    _finish(model, Origin(name, fingerprint_backbone(tensors), seed))
    return model


def _remember(origin: Origin) -> None:
    """Note the file or folder of weights, for adapter files that name their fingerprint."""
    path = Path(os.path.expanduser(origin.source))
    if origin.source not in (*EMBEDDED, NAME) and path.exists():
        remember_weights(origin.fingerprint, path)


def _finish(model: AST, origin: Origin) -> None:
    """Freeze a model and remember what it was loaded from."""
    surgery.freeze(model)
    model.origin = origin
    model.loaded = LoadedArrays.of(surgery.fetch_arrays(model))
