"""Learned positions for another input length: cut or interpolate the frequency-by-time grid."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from aatjax.errors import DataError, UsageError

Rule = Literal["audioset", "imagenet", "ssast"]
RULES: tuple[Rule, ...] = ("audioset", "imagenet", "ssast")

Positions = Float[Array, "1 n d"] | Float[np.ndarray, "1 n d"]
Resized = Float[Array, "1 m d"] | Float[np.ndarray, "1 m d"]


def window(source: int, target: int) -> slice:
    """The central `target` of `source` places: `[source//2 - target//2, + target)`.

    Raises:
        UsageError: the window is longer than the source.
    """
    if not 0 < target <= source:
        raise UsageError(f"no window of {target} places in {source}")
    start = source // 2 - target // 2
    return slice(start, start + target)


def resize_positions(
    pos: Positions,
    source: tuple[int, int],
    target: tuple[int, int],
    *,
    prefix: int,
    rule: Rule,
) -> Resized:
    """Adapts position embeddings from one patch grid to another.

    Time first, then frequency: a shorter axis keeps its central window, a longer one is
    interpolated bilinearly (half-pixel centres, no antialiasing) in float32. Rows of the prefix
    tokens (CLS, DIST) are kept as they are. This is what AST (Gong et al. 2021, section 2.2) does
    from ImageNet and from AudioSet weights, and SSAST (Gong et al. 2022) from its own; the three
    rules are the same function once SSAST's row window ends after `target` rows, not columns.

    Args:
        pos: `[1, prefix + rows * columns, d]`, NumPy or JAX; the patches frequency-major.
        source: (rows, columns) = (frequency, time) patches of `pos`.
        target: (rows, columns) wanted.
        prefix: tokens before the patches.
        rule: where the positions come from: "audioset" (AST checkpoints), "imagenet"
            (DeiT/ViT: a square grid) or "ssast".

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
        grid = _fit(grid, axis, target[axis])
    patches = grid.reshape(1, -1, dim)
    if isinstance(pos, np.ndarray):
        return np.concatenate([pos[:, :prefix], np.asarray(patches, pos.dtype)], axis=1)
    return jnp.concatenate([pos[:, :prefix], patches.astype(pos.dtype)], axis=1)


def _fit(grid: Float[Array, "f t d"], axis: int, places: int) -> Float[Array, "f2 t2 d"]:
    """Cuts or interpolates one axis of the grid to a number of places."""
    have = grid.shape[axis]
    if places <= have:
        cut = window(have, places)
        return grid[cut] if axis == 0 else grid[:, cut]
    shape = list(grid.shape)
    shape[axis] = places
    return jax.image.resize(grid, shape, "bilinear", antialias=False)
