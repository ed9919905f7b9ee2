"""Checks of an op's arguments: one sentence with what was expected and what came."""

from typing import Any

import jax.numpy as jnp


def check_arrays(op: str, **arrays: tuple[Any, str]) -> None:
    """Refuse arrays whose types or shapes do not fit together.

    Args:
        op: name of the op, for the message.
        **arrays: by argument, the array and its axes, such as `b n d`, or `* d` with any number of
            axes in front. The same axis has the same length everywhere, and only the first may be
            empty. An argument `mask` is boolean and may be None, all others are floating.

    Raises:
        ValueError: the first array that does not fit.
    """
    lengths: dict[str, tuple[Any, str]] = {}
    for name, (array, text) in arrays.items():
        if name == "mask" and array is None:
            continue
        axes = text.split()
        expected = f"{'bool' if name == 'mask' else 'float'} [{', '.join(axes)}]"
        if not hasattr(array, "shape") or not hasattr(array, "dtype"):
            kind = "None" if array is None else f"a {type(array).__name__}"
            raise ValueError(f"{op}: {name} is {kind}, not an array {expected}")
        if axes[0] == "*":
            del axes[0]
            axes[:0] = ["*"] * (len(array.shape) - len(axes))
        given = f"{op}: {name} is {array.dtype} {list(array.shape)}"
        kind = jnp.bool_ if name == "mask" else jnp.floating
        if len(array.shape) != len(axes) or not jnp.issubdtype(array.dtype, kind):
            raise ValueError(f"{given}, not {expected}")
        for index, (axis, length) in enumerate(zip(axes, array.shape, strict=True)):
            if axis == "*":
                continue
            known, other = lengths.setdefault(axis, (length, name))
            if known != length:
                raise ValueError(
                    f"{given}, not {expected}: {axis} is {length} there and {known} in {other}"
                )
            if length == 0 and (index or name == "mask"):
                raise ValueError(f"{given}, not {expected}: {axis} is 0")
