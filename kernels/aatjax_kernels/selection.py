"""What runs where no implementation is named: the fastest by a timer, or by a fixed rule.

A timer is a function of an `Op` and the shapes of its arguments on one device. It returns the name
of an implementation, or None for the fixed rule. Nothing is timed unless one is given (`choosing`).
"""

import contextlib
import contextvars
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

PLATFORMS = {"tpu": "tpu", "gpu": "cuda", "cudnn": "cuda", "tokamax": "cuda"}
"""Implementations that run on one platform, with its name in JAX."""

FIXED = ("tpu", "cudnn")
"""Those of them that the fixed rule takes on their platform, for the shapes that they take.

TPU: by the static schedules and bytes of the compiled programs, at every shape tried
(kernels/README.md). cuDNN: it moves 12 tensors where `blocked` moves 66 (110 tokens) or 1,099
(3,590 tokens).
"""

VARIABLE = "AATJAX_KERNELS"
MEASURED, RULE, NONE = "measured", "fixed", "none"


class Op(NamedTuple):
    """An op with several implementations.

    Attributes:
        name: its name.
        candidates: implementations by platform; the first is that of the fixed rule.
        batched: places of the arguments that have a leading batch axis.
        run: `(implementation, *arguments)` to the output.
        count_flops: FLOPs of a forward pass, of the arguments.
    """

    name: str
    candidates: Mapping[str, tuple[str, ...]]
    batched: tuple[int, ...]
    run: Callable[..., Any]
    count_flops: Callable[..., float]


Timer = Callable[[Op, tuple[Any, ...]], str | None]

_timer: contextvars.ContextVar[Timer | None] = contextvars.ContextVar("timer", default=None)
_kernels: contextvars.ContextVar[str | None] = contextvars.ContextVar("kernels", default=None)


def read_choice() -> str:
    """Return what may run unasked: `measured`, `fixed`, `none` or names, as it was set.

    That of `choosing`, else the environment's `AATJAX_KERNELS`, else `measured`, which is `fixed`
    where no timer is given.
    """
    return _kernels.get() or os.environ.get(VARIABLE) or MEASURED


def parse_choice(text: str, source: str = VARIABLE) -> tuple[str, ...]:
    """Return the implementations that the fixed rule may take: libraries first, then kernels.

    Raises:
        ValueError: there is none of a name.
    """
    if text in (MEASURED, RULE):
        return FIXED
    names = tuple(name.strip() for name in text.split(",") if name.strip() not in ("", NONE))
    for name in names:
        if name not in PLATFORMS:
            raise ValueError(
                f"{source}={text!r}: unknown kernel {name!r}; use {', '.join(PLATFORMS)}, a list "
                f"with commas, {NONE}, {RULE} or {MEASURED}"
            )
    return names


@contextlib.contextmanager
def choosing(kernels: str, timer: Timer | None = None) -> Iterator[None]:
    """Choose implementations as `kernels` says within the context, measured ones by a timer."""
    tokens = _kernels.set(kernels), _timer.set(timer)
    try:
        yield
    finally:
        _kernels.reset(tokens[0])
        _timer.reset(tokens[1])


def is_timed() -> bool:
    """Return whether implementations are chosen by a timer."""
    return _timer.get() is not None and read_choice() == MEASURED


def select(op: Op, *arrays: Any) -> str | None:
    """Return the name of the fastest implementation of an op, or None for the fixed rule.

    Args:
        op: the op.
        arrays: shapes and types of its arguments, as one device holds them.
    """
    timer = _timer.get()
    if timer is None or not is_timed():
        return None
    lengths = (length for leaf in jax.tree.leaves(arrays) for length in leaf.shape)
    if not all(isinstance(length, int) for length in lengths):
        return None  # a symbolic shape (`jax.export`)
    return timer(op, arrays)
