"""Position embeddings for another input length: the frequency-by-time grid, cut or interpolated."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from aatjax.errors import DataError, UsageError

PositionRule = Literal["audioset", "imagenet", "ssast"]
RULES: tuple[PositionRule, ...] = ("audioset", "imagenet", "ssast")


def resize_positions(
    pos: Float[Array, "1 n d"] | Float[np.ndarray, "1 n d"],
    source: tuple[int, int],
    target: tuple[int, int],
    *,
    prefix: int,
    rule: PositionRule,
) -> Float[Array, "1 m d"] | Float[np.ndarray, "1 m d"]:
    """Adapt position embeddings to another patch grid.

    Time first, then frequency: a shorter axis keeps its central window
    `[source // 2 - target // 2, + target)`, a longer one is interpolated bilinearly (half-pixel
    centres, no antialiasing) in float32. Positions of the prefix tokens (CLS, DIST) are kept. AST
    does this from ImageNet and from AudioSet weights (Gong et al. 2021, section 2.2), SSAST from
    its own (Gong et al. 2022); the three rules are one function once SSAST's window of rows ends
    after `target` rows instead of columns.

    Args:
        pos: `[1, prefix + rows * columns, d]`, NumPy or JAX; patches frequency-major.
        source: (rows, columns) = (frequency, time) patches of `pos`.
        target: (rows, columns) wanted.
        prefix: tokens before the patches.
        rule: origin of the positions: "audioset" (AST checkpoints), "imagenet" (DeiT, ViT: a
            square grid) or "ssast".

    Returns:
        `[1, prefix + target rows * target columns, d]`, an array of the kind and type of `pos`.

    Raises:
        UsageError: an impossible grid or an unknown rule.
        DataError: `pos` does not have the tokens of `source`.
    """
    if rule not in RULES:
        raise UsageError(f"position rule {rule!r} is not one of {', '.join(RULES)}")
    if min(*source, *target) < 1 or prefix < 0:
        raise UsageError(f"position grids {source} -> {target} with {prefix} prefix tokens")
    if rule == "imagenet" and source[0] != source[1]:
        raise UsageError(f"ImageNet positions lie on a square grid, not {source[0]} x {source[1]}")
    _, tokens, dim = pos.shape
    if tokens != prefix + source[0] * source[1]:
        raise DataError(
            f"{tokens} positions are not {prefix} prefix tokens and a grid of "
            f"{source[0]} x {source[1]} patches: give the stride and length of these weights"
        )
    if source == target:
        return pos
    grid = jnp.asarray(pos[0, prefix:], jnp.float32).reshape(*source, dim)
    for axis in (1, 0):
        grid = _resize_axis(grid, axis, target[axis])
    patches = grid.reshape(1, -1, dim)
    if isinstance(pos, np.ndarray):
        return np.concatenate([pos[:, :prefix], np.asarray(patches, pos.dtype)], axis=1)
    return jnp.concatenate([pos[:, :prefix], patches.astype(pos.dtype)], axis=1)


def _resize_axis(grid: Float[Array, "f t d"], axis: int, size: int) -> Float[Array, "f2 t2 d"]:
    old = grid.shape[axis]
    if size <= old:
        return jax.lax.slice_in_dim(
            grid, old // 2 - size // 2, old // 2 - size // 2 + size, axis=axis
        )
    shape = list(grid.shape)
    shape[axis] = size
    return jax.image.resize(grid, shape, "bilinear", antialias=False)
