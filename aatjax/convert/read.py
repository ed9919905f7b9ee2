"""Reads every published weight layout into canonical flat parameters, wholly or not at all."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np

from aatjax.convert.detect import EXPECTED, guess_origin
from aatjax.convert.infer_config import Sizes, infer_sizes
from aatjax.convert.lazy_tensor import FLOATS, StoredTensor
from aatjax.convert.matching import choose_layout, expand
from aatjax.convert.metadata import (
    HfDescription,
    Statistics,
    read_native_description,
    read_statistics,
)
from aatjax.convert.patch_grid import Wishes, find_geometry
from aatjax.convert.rules import NATIVE, Layout, Positions, Rule
from aatjax.convert.tensor_files import TensorFile, open_tensors, read_json
from aatjax.errors import DataError, UsageError
from aatjax.models.config import ASTConfig

Expected = dict[str, tuple[Rule, tuple[str, ...], tuple[int, ...]]]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Weights of an AST, wherever they came from.

    Attributes:
        config: the model they belong to, or (ImageNet, SSAST) can be adapted to.
        params: canonical '/'-joined names to float32 arrays; `embed/pos` lies on `grid`.
        grid: (frequency, time) patches that the stored positions cover.
        rule: how these positions are adapted to `config.grid`, see `resize_positions`.
        labels: names of the classes, where the file has them.
        layout: what kind of file it was.
        has_head: whether `params` hold a classifier.
        num_prefix: tokens before the patches, 2 (CLS, DIST) or 1.
        statistics: mean and standard deviation of the log-mel that the model was trained on,
            where the file or its preprocessor_config.json tells.
    """

    config: ASTConfig
    params: dict[str, np.ndarray] = dataclasses.field(repr=False)
    grid: tuple[int, int]
    rule: Positions
    labels: tuple[str, ...] | None
    layout: str
    has_head: bool
    num_prefix: int
    statistics: Statistics | None = None


def read_checkpoint(
    path: str | Path,
    *,
    heads: int | None = None,
    stride: int | tuple[int, int] | None = None,
    frames: int | None = None,
    mels: int | None = None,
    rgb: Literal["sum", "mean"] = "sum",
    allow_nan: bool = False,
) -> Checkpoint:
    """Reads AST weights: Hugging Face, original, SSAST, ImageNet DeiT/ViT, aatjax, Orbax.

    Every expected tensor must be there in the right shape and no other one, otherwise nothing is
    loaded. Pickles are read as data (see `pickle_values`): files of strangers run nothing.

    Args:
        path: a .safetensors, .pth or .bin file, or a folder holding one (sharded too) with its
            config.json, or an Orbax folder that aatjax wrote.
        heads: attention heads, which no weight shows; else config.json, else one for 64 of width.
        stride: patch stride, (frequency, time) or one for both, if the file does not tell.
            For ImageNet and SSAST weights: the stride of the model wanted.
        frames: 10 ms frames of the input, likewise.
        mels: mel bins of the input, likewise.
        rgb: ImageNet patch kernels are summed over colours (published code), or averaged.
        allow_nan: load even tensors that hold NaN or infinity.

    Raises:
        DataError: not such a file, damaged, incomplete, or the grid cannot be told.
        UsageError: impossible arguments.
    """
    path = Path(path)
    if rgb not in ("sum", "mean"):
        raise UsageError(f"rgb={rgb!r} is neither 'sum' nor 'mean'")
    if heads is not None and heads < 1:
        raise UsageError(f"heads={heads} must be at least 1")
    wishes = Wishes.of(stride, frames, mels)
    file = open_tensors(path)
    if "aatjax" in file.metadata:
        return _read_native(file, heads, wishes, allow_nan)
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    layout = choose_layout(shapes)
    if layout is None:
        seen = guess_origin(shapes) or f"its tensors are named {_some(shapes)}"
        raise DataError(f"{path}: not AST weights: {seen}; {EXPECTED}")
    if layout is NATIVE:
        raise DataError(
            f"{path}: canonical names, but the description that aatjax writes into the header is "
            f"gone, so the model is unknown: fetch the file again; {EXPECTED}"
        )
    described = HfDescription.of(file.config, layout, path)
    sizes = infer_sizes(layout, shapes, qkv_bias=described.qkv_bias)
    expected = expand(layout, sizes.shapes(), sizes.depth)
    problems = _compare(file.tensors, expected, layout) + described.contradictions(sizes)
    if problems:
        _refuse(path, layout, problems, shapes)
    pretrained = _read_numbers(file, layout)
    params = _load(file, expected, layout, rgb, allow_nan)
    try:
        geometry = find_geometry(
            layout, sizes.patches, sizes.patch, wishes, described.ast, pretrained
        )
        eps, head_eps = described.eps or layout.eps
        config = ASTConfig(
            dim=sizes.dim,
            depth=sizes.depth,
            heads=heads or described.heads or _default_heads(sizes.dim),
            mlp_dim=sizes.mlp_dim,
            patch=sizes.patch,
            stride=geometry.stride,
            mels=geometry.mels,
            frames=geometry.frames,
            num_classes=sizes.classes or ASTConfig.num_classes,
            distilled=sizes.distilled,
            pool="mean_patches" if layout.rule == "ssast" else "cls_dist",
            eps=eps,
            head_eps=head_eps,
            qkv_bias=sizes.qkv_bias,
        )
    except (DataError, UsageError) as error:
        raise type(error)(f"{path}: {error}") from None
    return Checkpoint(
        config=config,
        params=params,
        grid=geometry.source,
        rule=layout.rule,
        labels=described.labels if sizes.classes else None,
        layout=layout.name,
        has_head=sizes.classes is not None,
        num_prefix=config.num_prefix,
        statistics=_extractor_statistics(file) if layout.name == "hf-ast" else None,
    )


def _extractor_statistics(file: TensorFile) -> Statistics | None:
    """Mean and standard deviation from the feature extractor beside Hugging Face weights."""
    folder = file.path if file.path.is_dir() else file.path.parent
    entries = read_json(folder / "preprocessor_config.json")
    if entries is None or "mean" not in entries or not entries.get("do_normalize", True):
        return None
    try:
        return read_statistics([entries["mean"], entries.get("std")])
    except DataError as error:
        raise DataError(f"{folder / 'preprocessor_config.json'}: {error}") from None


def _read_native(
    file: TensorFile, heads: int | None, wishes: Wishes, allow_nan: bool
) -> Checkpoint:
    """Weights that aatjax wrote: their description says all."""
    names = list(file.tensors)
    described = read_native_description(file.metadata["aatjax"], file.path, names)
    config, grid = described.config, described.grid
    said = {"heads": heads, **dataclasses.asdict(wishes)}
    for name, value in said.items():
        if value is not None and value != getattr(config, name):
            raise UsageError(
                f"{file.path}: says {name}={getattr(config, name)}, the argument {name}={value}: "
                "leave the argument out"
            )
    has_head = any(name.startswith("head/") for name in names)
    sizes = Sizes.of(config, grid, has_head=has_head)
    expected = expand(NATIVE, sizes.shapes(), sizes.depth)
    problems = _compare(file.tensors, expected, NATIVE)
    labels = described.labels
    if labels is not None and len(labels) != config.num_classes:
        problems.append(f"{len(labels)} labels for {config.num_classes} classes")
    if problems:
        _refuse(file.path, NATIVE, problems, names)
    params = _load(file, expected, NATIVE, "sum", allow_nan)
    layout = "orbax" if file.form == "orbax" else "native"
    return Checkpoint(
        config,
        params,
        grid,
        described.rule,
        labels,
        layout,
        has_head,
        config.num_prefix,
        described.statistics,
    )


def _compare(tensors: Mapping[str, StoredTensor], expected: Expected, layout: Layout) -> list[str]:
    """Everything that keeps the file from being loaded whole, a phrase a group."""
    missing = [name for name in (*expected, *layout.numbers) if name not in tensors]
    unknown = [
        name
        for name in tensors
        if name not in expected and name not in layout.numbers and not layout.is_ignored(name)
    ]
    shapes, types = [], []
    for name, (_, _, shape) in expected.items():
        if name not in tensors:
            continue
        have = tensors[name]
        if have.shape != shape:
            turned = len(shape) > 1 and sorted(have.shape) == sorted(shape)
            hint = ", transposed" if turned else ""
            shapes.append(f"{name} is {have.shape}, expected {shape}{hint}")
        elif have.dtype not in FLOATS:
            types.append(f"{name} is {have.dtype}")
    groups = (
        ("missing", missing),
        ("of the wrong shape", shapes),
        ("not of a floating type", types),
        ("unexpected", unknown),
    )
    return [f"{len(names)} {what} ({_some(names)})" for what, names in groups if names]


def _refuse(path: Path, layout: Layout, problems: list[str], names: Iterable[str]) -> NoReturn:
    seen = guess_origin(names) if any("unexpected" in problem for problem in problems) else None
    raise DataError(
        f"{path}: read as {layout.title}, but of its tensors {'; '.join(problems)}. Nothing was "
        f"loaded{f': {seen}' if seen else ''}; {EXPECTED}"
    )


def _some(names: Iterable[str], shown: int = 3) -> str:
    """The first few names, safe to print on one line."""
    listed = [" ".join(name.split())[:120] for name in names]
    more = f", and {len(listed) - shown} more" if len(listed) > shown else ""
    return ", ".join(name if name.isprintable() else repr(name) for name in listed[:shown]) + more


def _read_numbers(file: TensorFile, layout: Layout) -> tuple[int, int] | None:
    """SSAST's pretraining input (mel bins, frames)."""
    if not layout.numbers:
        return None
    values = []
    for name in layout.numbers:
        tensor = file.tensors[name]
        value = float(np.asarray(tensor.load()).reshape(-1)[0]) if tensor.size == 1 else 0.0
        if not 1 <= value <= 1e6:
            raise DataError(f"{file.path}: {name} is not a length of the pretraining input")
        values.append(int(value))
    return values[0], values[1]


def _default_heads(dim: int) -> int:
    if dim % 64:
        raise DataError(f"heads cannot be told from a width of {dim}: give heads=")
    return dim // 64


def _load(
    file: TensorFile, expected: Expected, layout: Layout, rgb: str, allow_nan: bool
) -> dict[str, np.ndarray]:
    """Reads the numbers, in float32, after all names, shapes and sizes were found right."""
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
            f"{file.path}: NaN or infinity in {len(bad)} tensors: {_some(bad)}: the weights are "
            "damaged; allow_nan=True loads them all the same"
        )
    return params
