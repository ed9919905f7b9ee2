"""Patch grid of a checkpoint from its number of positions: strides, frames, source grid."""

import dataclasses
import math
from typing import Any

from aatjax.convert.rules import WeightLayout
from aatjax.errors import DataError, UsageError

STRIDES = ((10, 10), (12, 12), (14, 14), (16, 16))
# Lengths that weights are published or commonly fine-tuned for: AudioSet, Speech Commands, ...
FRAMES = (1024, 128, 512, 400, 800, 500, 100, 3000)
MELS = 128


@dataclasses.dataclass(frozen=True)
class GridRequest:
    """Input of the model as asked for by the caller; None where the file decides."""

    stride: tuple[int, int] | None = None
    frames: int | None = None
    mels: int | None = None

    @classmethod
    def from_arguments(
        cls, stride: int | tuple[int, int] | None, frames: int | None, mels: int | None
    ) -> "GridRequest":
        """Check the numbers; one stride stands for both axes."""
        both = (stride, stride) if isinstance(stride, int) else stride
        for name, value in (("stride", min(both or (1,))), ("frames", frames), ("mels", mels)):
            if value is not None and value < 1:
                raise UsageError(f"{name}={value} must be at least 1")
        return cls(None if both is None else (both[0], both[1]), frames, mels)


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Input of the model and the grid its stored positions lie on, (frequency, time)."""

    stride: tuple[int, int]
    mels: int
    frames: int
    source: tuple[int, int]


def compute_grid(
    patch: tuple[int, int], stride: tuple[int, int], mels: int, frames: int
) -> tuple[int, int]:
    """Return patch rows and columns; zero or less where the input is smaller than a patch."""
    return (mels - patch[0]) // stride[0] + 1, (frames - patch[1]) // stride[1] + 1


def find_geometry(
    layout: WeightLayout,
    patches: int,
    patch: tuple[int, int],
    request: GridRequest,
    described: dict[str, Any] | None = None,
    pretrained: tuple[int, int] | None = None,
) -> Geometry:
    """Find the grid of a checkpoint's positions and the input that the model takes.

    Args:
        layout: the file's layout; its position rule decides the procedure.
        patches: stored positions without prefix tokens.
        patch: patch size (frequency, time).
        request: for AST the input of the file; for ImageNet and SSAST weights, which are adapted
            anyway, the input of the model wanted.
        described: a Hugging Face AST `config.json`.
        pretrained: SSAST's pretraining input (mel bins, frames).

    Raises:
        DataError: no grid fits, or more than one does.
    """
    if patches < 1:
        raise DataError("no positions for patches in the weights")
    if layout.rule == "imagenet":
        side = math.isqrt(patches)
        if side * side != patches:
            raise DataError(
                f"{patches} positions are no square grid, as ImageNet weights have: not DeiT/ViT"
            )
        return _adapt_geometry(request, patch, (side, side), MELS, 1024)
    if layout.rule == "ssast":
        bins, length = pretrained or (MELS, 1024)
        source = (bins // patch[0], length // patch[1])
        if source[0] * source[1] != patches:
            raise DataError(
                f"{patches} positions do not fit the pretraining input of {bins} x {length} in "
                f"patches of {patch[0]} x {patch[1]}"
            )
        return _adapt_geometry(request, patch, source, bins, length)
    if described is not None:
        return _read_geometry(patches, patch, request, described)
    return _search_geometry(patches, patch, request)


def _adapt_geometry(
    request: GridRequest, patch: tuple[int, int], source: tuple[int, int], mels: int, frames: int
) -> Geometry:
    mels, frames = request.mels or mels, request.frames or frames
    usual = (patch[0], 1) if patch[0] >= mels else (10, 10)
    return Geometry(request.stride or usual, mels, frames, source)


def _read_geometry(
    patches: int, patch: tuple[int, int], request: GridRequest, described: dict[str, Any]
) -> Geometry:
    stride = request.stride or (
        described.get("frequency_stride", 10),
        described.get("time_stride", 10),
    )
    mels = request.mels or described.get("num_mel_bins", MELS)
    frames = request.frames or described.get("max_length", 1024)
    grid = compute_grid(patch, stride, mels, frames)
    if min(grid) < 1 or grid[0] * grid[1] != patches:
        raise DataError(
            f"{patches} positions in the weights, but config.json (and arguments) make a grid of "
            f"{grid[0]} x {grid[1]} from {mels} mel bins, {frames} frames, stride {stride}: the "
            "two files do not belong together"
        )
    return Geometry(stride, mels, frames, grid)


def _search_geometry(patches: int, patch: tuple[int, int], request: GridRequest) -> Geometry:
    """Try published strides and lengths; strides other than 10 only at their own length."""
    mels = request.mels or MELS
    fits: list[Geometry] = []
    for stride in (request.stride,) if request.stride else STRIDES:
        free = request.stride is not None or stride == STRIDES[0]
        lengths = (request.frames,) if request.frames else FRAMES if free else FRAMES[:1]
        for frames in lengths:
            grid = compute_grid(patch, stride, mels, frames)
            if min(grid) >= 1 and grid[0] * grid[1] == patches:
                fits.append(Geometry(stride, mels, frames, grid))
    if not fits and request.stride and not request.frames:
        rows = compute_grid(patch, request.stride, mels, patch[1])[0]
        if rows >= 1 and patches % rows == 0:
            columns = patches // rows
            frames = patch[1] + request.stride[1] * (columns - 1)
            fits.append(Geometry(request.stride, mels, frames, (rows, columns)))
    if len({fit.source for fit in fits}) == 1:
        return fits[0]
    found = " or ".join(f"{fit.source[0]} x {fit.source[1]}" for fit in fits) or "no known grid"
    given = [f"stride={request.stride}"] if request.stride else []
    given += [f"frames={request.frames}"] if request.frames else []
    raise DataError(
        f"{patches} positions fit {found} of {patch[0]} x {patch[1]} patches"
        f"{' at ' + ', '.join(given) if given else ''}: give the stride and frames (and mels) "
        "these weights were trained with"
    )
