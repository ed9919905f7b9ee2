"""Reads every published weight layout into canonical flat parameters, completely or not at all."""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from aatjax.convert.detect import (
    EXPECTED,
    choose_layout,
    expand_layout,
    guess_origin,
)
from aatjax.convert.infer_config import Sizes, infer_sizes
from aatjax.convert.lazy_tensor import FLOATS, StoredTensor
from aatjax.convert.metadata import (
    HfDescription,
    Statistics,
    read_hf_description,
    read_native_description,
    read_statistics,
)
from aatjax.convert.patch_grid import GridRequest, find_geometry
from aatjax.convert.rules import NATIVE, TensorRule, WeightLayout
from aatjax.convert.sources import open_weights
from aatjax.convert.tensor_files import TensorFile, read_description
from aatjax.errors import DataError, UsageError
from aatjax.models.config import ASTConfig
from aatjax.models.positions import PositionRule

Expected = dict[str, tuple[TensorRule, tuple[str, ...], tuple[int, ...]]]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Weights of an AST from any source.

    Attributes:
        config: the model they belong to, or (ImageNet, SSAST) can be adapted to.
        params: canonical '/'-joined names to float32 arrays; `embed/pos` lies on `grid`.
        grid: (frequency, time) patches that the stored positions cover.
        rule: how these positions are adapted to `config.grid`, see `resize_positions`.
        labels: names of the classes, where the file has them.
        layout: short name of the layout.
        has_head: whether `params` hold a classifier.
        num_prefix: tokens before the patches, 2 (CLS, DIST) or 1.
        statistics: mean and standard deviation of the log-mel that the model was trained on,
            where the file or its preprocessor_config.json has them.
        wrapper: prefix of all names in the file that was removed, such as `module.`.
    """

    config: ASTConfig
    params: dict[str, np.ndarray] = dataclasses.field(repr=False)
    grid: tuple[int, int]
    rule: PositionRule
    labels: tuple[str, ...] | None
    layout: str
    has_head: bool
    num_prefix: int
    statistics: Statistics | None = None
    wrapper: str = ""


def read_checkpoint(
    path: str | os.PathLike[str] | object,
    *,
    heads: int | None = None,
    stride: int | tuple[int, int] | None = None,
    frames: int | None = None,
    mels: int | None = None,
    rgb: Literal["sum", "mean"] = "sum",
    allow_nan: bool = False,
) -> Checkpoint:
    """Read AST weights: Hugging Face, original, SSAST, PETL_AST, ImageNet DeiT/ViT, aatjax, Orbax.

    Every expected tensor must be there in the right shape and no other one, otherwise nothing is
    loaded. Pickles are read as data (see `read_pickle`): untrusted files execute nothing.

    Args:
        path: a .safetensors, .pth or .bin file, or a folder holding one (sharded too) with its
            config.json, or an Orbax folder that aatjax wrote; or weights in memory, see
            `aatjax.convert.memory`.
        heads: attention heads, which no weight shows; else config.json, else one per 64 of width.
        stride: patch stride, (frequency, time) or one for both, if the file does not hold it.
            For ImageNet and SSAST weights: the stride of the model wanted.
        frames: 10 ms frames of the input, likewise.
        mels: mel bins of the input, likewise.
        rgb: ImageNet patch kernels are summed over colours (published code), or averaged.
        allow_nan: load tensors that hold NaN or infinity.

    Raises:
        DataError: not such a file, damaged, incomplete, or of an unknown grid.
        UsageError: impossible arguments.
    """
    if rgb not in ("sum", "mean"):
        raise UsageError(f"rgb={rgb!r} is neither 'sum' nor 'mean'")
    if heads is not None and heads < 1:
        raise UsageError(f"heads={heads} must be at least 1")
    request = GridRequest.from_arguments(stride, frames, mels)
    return read_tensors(open_weights(path), request, heads, rgb, allow_nan)


def read_tensors(
    file: TensorFile,
    request: GridRequest,
    heads: int | None = None,
    rgb: Literal["sum", "mean"] = "sum",
    allow_nan: bool = False,
) -> Checkpoint:
    """Read an open file; see `read_checkpoint`."""
    path = file.path
    if "aatjax" in file.metadata:
        return _read_native(file, heads, request, allow_nan)
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    layout = _recognise(path, shapes)
    described = read_hf_description(file.config, layout, path)
    sizes = infer_sizes(layout, shapes, qkv_bias=described.qkv_bias)
    expected = _check_tensors(file, layout, sizes, described.find_contradictions(sizes))
    try:
        config, grid = _make_config(file, layout, sizes, described, request, heads)
    except (DataError, UsageError) as error:
        raise type(error)(f"{path}: {error}") from None
    return Checkpoint(
        config=config,
        params=_load(file, expected, layout, rgb, allow_nan),
        grid=grid,
        rule=layout.rule,
        labels=described.labels if sizes.classes else None,
        layout=layout.name,
        has_head=sizes.classes is not None,
        num_prefix=config.num_prefix,
        statistics=_read_extractor(file) if layout.name == "hf-ast" else None,
        wrapper=layout.wrapper,
    )


def _recognise(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> WeightLayout:
    layout = choose_layout(shapes)
    if layout is None:
        origin = guess_origin(shapes) or f"its tensors are named {list_some(shapes)}"
        raise DataError(f"{path}: not AST weights: {origin}; {EXPECTED}")
    if layout.name == "native":
        raise DataError(
            f"{path}: canonical names, but the description that aatjax writes into the header is "
            "gone, so the model is unknown: fetch the file again, or write arrays of your own by "
            f"aatjax.convert.write_native(path, arrays, config); {EXPECTED}"
        )
    return layout


def _make_config(
    file: TensorFile,
    layout: WeightLayout,
    sizes: Sizes,
    described: HfDescription,
    request: GridRequest,
    heads: int | None,
) -> tuple[ASTConfig, tuple[int, int]]:
    """The model of the weights, and the grid of their positions."""
    fields = described.fields if described.is_ast else None
    pretrained = _read_numbers(file, layout)
    geometry = find_geometry(layout, sizes.patches, sizes.patch, request, fields, pretrained)
    heads = heads or described.heads
    if heads is None and sizes.dim % 64:
        raise DataError(f"a width of {sizes.dim} does not show the number of heads: give heads=")
    eps, head_eps = described.eps or layout.eps
    config = ASTConfig(
        dim=sizes.dim,
        depth=sizes.depth,
        heads=heads or sizes.dim // 64,
        mlp_dim=sizes.mlp_dim,
        patch=sizes.patch,
        stride=geometry.stride,
        mels=geometry.mels,
        frames=geometry.frames,
        num_classes=sizes.classes or ASTConfig.num_classes,
        distilled=sizes.distilled,
        pool=layout.pool,
        eps=eps,
        head_eps=head_eps,
        qkv_bias=sizes.qkv_bias,
        head_norm=sizes.head_norm,
    )
    return config, geometry.source


def _read_extractor(file: TensorFile) -> Statistics | None:
    """Mean and standard deviation from the feature extractor beside Hugging Face weights."""
    if file.form == "memory":
        return None
    path = (file.path if file.path.is_dir() else file.path.parent) / "preprocessor_config.json"
    entries = read_description(path)
    if entries is None or "mean" not in entries or not entries.get("do_normalize", True):
        return None
    try:
        return read_statistics([entries["mean"], entries.get("std")])
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _read_native(
    file: TensorFile, heads: int | None, request: GridRequest, allow_nan: bool
) -> Checkpoint:
    """Weights that aatjax wrote, with a complete description."""
    described = read_native_description(file.metadata["aatjax"], file.path, file.tensors)
    config, labels = described.config, described.labels
    for name, value in {"heads": heads, **dataclasses.asdict(request)}.items():
        if value is not None and value != getattr(config, name):
            raise UsageError(
                f"{file.path}: says {name}={getattr(config, name)}, the argument {name}={value}: "
                "omit the argument"
            )
    has_head = any(name.startswith("head/") for name in file.tensors)
    sizes = Sizes.from_config(config, described.grid, has_head=has_head)
    problems = []
    if labels is not None and len(labels) != config.num_classes:
        problems.append(f"{len(labels)} labels for {config.num_classes} classes")
    expected = _check_tensors(file, NATIVE, sizes, problems)
    return Checkpoint(
        config=config,
        params=_load(file, expected, NATIVE, "sum", allow_nan),
        grid=described.grid,
        rule=described.rule,
        labels=labels,
        layout="orbax" if file.form == "orbax" else "native",
        has_head=has_head,
        num_prefix=config.num_prefix,
        statistics=described.statistics,
    )


def _check_tensors(
    file: TensorFile, layout: WeightLayout, sizes: Sizes, problems: list[str]
) -> Expected:
    """What the file must hold; a DataError names all that differs, and `problems`."""
    expected = expand_layout(layout, sizes.shapes(), sizes.depth)
    found = _compare(file.tensors, expected, layout)
    if found or problems:
        unexpected = any("unexpected" in problem for problem in found)
        origin = guess_origin(file.tensors) if unexpected else None
        raise DataError(
            f"{file.path}: read as {layout.title}, but of its tensors "
            f"{'; '.join([*found, *problems])}. Nothing was loaded"
            f"{f': {origin}' if origin else ''}; {EXPECTED}"
        )
    return expected


def _compare(
    tensors: Mapping[str, StoredTensor], expected: Expected, layout: WeightLayout
) -> list[str]:
    """The differences between the file and what it must hold, one phrase per kind."""
    found = {name: shape for name, (_, _, shape) in expected.items() if name in tensors}
    shapes, types = [], []
    for name, shape in found.items():
        tensor = tensors[name]
        if tensor.shape != shape:
            turned = len(shape) > 1 and sorted(tensor.shape) == sorted(shape)
            hint = ", transposed" if turned else ""
            shapes.append(f"{name} is {tensor.shape}, expected {shape}{hint}")
        elif tensor.dtype not in FLOATS:
            types.append(f"{name} is {tensor.dtype}")
    known = {*expected, *layout.numbers}
    groups = {
        "missing": [name for name in (*expected, *layout.numbers) if name not in tensors],
        "of the wrong shape": shapes,
        "not of a floating type": types,
        "unexpected": [n for n in tensors if n not in known and not layout.is_ignored(n)],
    }
    return [f"{len(names)} {kind} ({list_some(names)})" for kind, names in groups.items() if names]


def list_some(names: Iterable[str], shown: int = 3) -> str:
    """Return the first few names, printable on one line."""
    listed = [" ".join(name.split())[:120] for name in names]
    more = f", and {len(listed) - shown} more" if len(listed) > shown else ""
    return ", ".join(name if name.isprintable() else repr(name) for name in listed[:shown]) + more


def _read_numbers(file: TensorFile, layout: WeightLayout) -> tuple[int, int] | None:
    """SSAST's pretraining input (mel bins, frames)."""
    if not layout.numbers:
        return None
    values = []
    for name in layout.numbers:
        tensor = file.tensors[name]
        value = float(np.asarray(tensor.load()).reshape(-1)[0]) if tensor.size == 1 else 0.0
        if not 1 <= value <= 1e6:
            raise DataError(f"{name} is not a length of the pretraining input")
        values.append(int(value))
    return values[0], values[1]


def _load(
    file: TensorFile, expected: Expected, layout: WeightLayout, rgb: str, allow_nan: bool
) -> dict[str, np.ndarray]:
    """Read the numbers as float32, after all names, shapes and sizes were checked."""
    items = sum(file.tensors[name].size for name in expected)
    if items > max(file.size, 1):
        raise DataError(
            f"{file.path}: {items} numbers declared in {file.size} bytes: tensors share storage, "
            "which weights of AST never do"
        )
    params: dict[str, np.ndarray] = {}
    bad: list[str] = []
    for name, (rule, targets, _) in expected.items():
        stored = file.tensors[name].load()
        with np.errstate(over="ignore", invalid="ignore"):
            value = np.asarray(stored, np.float32)
        if not np.isfinite(value).all():
            bad.append(f"{name} ({np.count_nonzero(~np.isfinite(value))} of {value.size})")
        if rule.turn == "conv" and value.shape[1] == 3 and layout.rule == "imagenet":
            value = getattr(value, rgb)(axis=1, keepdims=True, dtype=np.float32)
        for target, part in zip(targets, rule.to_canonical(value), strict=True):
            params[target] = np.array(part) if part.base is not None else part
    if bad and not allow_nan:
        raise DataError(
            f"{file.path}: NaN or infinity in {len(bad)} tensors: {list_some(bad)}: the weights "
            "are damaged (read_checkpoint(allow_nan=True) loads them)"
        )
    return params
