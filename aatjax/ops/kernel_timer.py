"""The fastest implementation of each op on this device, timed once and kept in the user's cache."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import threading
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aatjax.errors import AatjaxError
from aatjax.io.host import find_compiled, find_user_cache
from aatjax.io.json_file import read_json_object, write_json
from aatjax.io.timing import time_interleaved
from aatjax_kernels.selection import Op

SECONDS = 3.0
"""Time that a process may spend on timing, compilation included."""
MARGIN = 0.03
"""Share of its time by which another implementation must be faster than that of the fixed rule."""
CPU_WORK = 1e9
"""FLOPs of a forward pass on a CPU: fewer clips are timed where the batch has more."""
ROUNDS, ROUND_SECONDS = 15, 0.4
"""Rounds at most, and their seconds in all."""

Times = dict[str, float]
"""Milliseconds by implementation, of those that run."""


@dataclasses.dataclass
class KernelTimer:
    """Times the implementations of an op at the shapes that a program asks for.

    Attributes:
        path: file of the times; None keeps them in memory.
        backward: time forward and backward pass, as in training, or the forward pass alone.
        seconds: time that is left.
        table: times by op, shapes and type, as found in the file or measured.
        say: gets a line for each op that is timed.
    """

    path: Path | None
    backward: bool = True
    seconds: float = SECONDS
    table: dict[str, Times] = dataclasses.field(default_factory=dict)
    say: Callable[[str], None] = lambda line: None
    lock: Any = dataclasses.field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        if self.path is not None:
            self.table = read_times(self.path)

    def __call__(self, op: Op, arrays: tuple[Any, ...]) -> str | None:
        """Return the fastest implementation, or None for that of the fixed rule."""
        names = op.candidates[find_platform()]
        case = describe(op, arrays, backward=self.backward)
        with self.lock:
            if case not in self.table and not self._measure(op, names, case, arrays):
                return None
            return find_fastest(names, self.table[case])

    def _measure(self, op: Op, names: tuple[str, ...], case: str, arrays: tuple[Any, ...]) -> bool:
        """Time the implementations and keep the times; return whether they could be kept.

        A run that goes on in another process must choose as it did: times that could not be kept
        do not count, and where there was not the time for all implementations, none are kept, with
        which the fixed rule holds from then on.
        """
        began = time.perf_counter()
        found: list[Times] = []

        def measure() -> None:
            found.append(time_op(op, names, arrays, backward=self.backward, limit=self.seconds))

        if self.seconds > 0:
            # Of its own thread: what is being traced, and its mesh, are those of the thread.
            thread = threading.Thread(target=measure, name="kernel timer")
            thread.start()
            thread.join()
            self.seconds -= time.perf_counter() - began
        times = found[0] if found else {}
        if self.path is not None:
            known = read_times(self.path)
            times = known.get(case, times)  # another process may have been first
            try:
                write_json(self.path, {**known, case: times})
            except (AatjaxError, OSError):
                self.seconds = 0.0
                return False
        self.table[case] = times
        if not times:
            self.say(f"{case.split(',')[0]}: no time was left to time it; the fixed rule holds")
            return True
        ordered = sorted(times, key=lambda name: times[name])
        shown = ", ".join(f"{name} {times[name]:.3g} ms" for name in ordered)
        self.say(f"{case.split(',')[0]}, timed once on this device: {shown}")
        return True


def time_op(
    op: Op, names: tuple[str, ...], arrays: tuple[Any, ...], *, backward: bool, limit: float
) -> Times:
    """Return the milliseconds of implementations on random arrays; none if there was not the time.

    Args:
        op: the op.
        names: the implementations.
        arrays: shapes and types of the arguments on one device.
        backward: run the backward pass too.
        limit: seconds after which no other implementation is tried.
    """
    values = make_arrays(op, arrays)
    began = time.perf_counter()
    calls: dict[str, Callable[[], object]] = {}
    spent = 0.0
    for name in names:
        if time.perf_counter() - began > limit:
            return {}
        call = _make_call(op, name, values, backward=backward)
        with contextlib.suppress(Exception):  # it does not take these shapes, or not this machine
            call()
            start = time.perf_counter()
            call()
            spent += time.perf_counter() - start
            calls[name] = call
    left = min(ROUND_SECONDS, limit - (time.perf_counter() - began))
    rounds = max(3, min(ROUNDS, int(left / max(spent, 1e-9))))
    found = time_interleaved(calls, rounds=rounds, warm_up=0)
    return {name: 1e3 * timing.median for name, timing in found.items()}


def _make_call(op: Op, name: str, values: tuple[Any, ...], *, backward: bool) -> Any:
    """Return a function that runs an implementation and waits for it."""
    places = [
        place
        for place, value in enumerate(values)
        if value is not None and jnp.issubdtype(value.dtype, jnp.floating)
    ]

    @jax.jit
    def run(*values: Any) -> Any:
        def apply(*floats: Any) -> Any:
            given = dict(enumerate(values)) | dict(zip(places, floats, strict=True))
            return op.run(name, *(given[place] for place in range(len(values))))

        if not backward:
            return apply(*(values[place] for place in places))
        out, pull = jax.vjp(apply, *(values[place] for place in places))
        return out, pull(out)

    return lambda: jax.block_until_ready(run(*values))


def make_arrays(op: Op, arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return random arrays; fewer clips on a CPU, where the time grows with them."""
    first = arrays[op.batched[0]]
    clips = first.shape[0]
    if find_platform() == "cpu":
        clips = max(1, min(clips, int(clips * CPU_WORK / op.count_flops(*arrays))))
    rng = np.random.default_rng(0)

    def make(place: int, like: Any) -> Any:
        if like is None:
            return None
        shape = (clips, *like.shape[1:]) if place in op.batched else like.shape
        if like.dtype == jnp.bool_:
            return jnp.asarray(np.broadcast_to(np.arange(shape[-1]) < 0.8 * shape[-1], shape))
        scale = 1.0 if place in op.batched else like.shape[-2] ** -0.5 if like.ndim > 1 else 0.1
        return jnp.asarray(scale * rng.normal(size=shape), like.dtype)

    return tuple(make(place, like) for place, like in enumerate(arrays))


def find_platform() -> str:
    """Return the platform of the default devices, as the kernels name it."""
    name = jax.default_backend()
    return {"gpu": "cuda"}.get(name, name if name == "tpu" else "cpu")


def find_fastest(names: tuple[str, ...], times: Mapping[str, float]) -> str | None:
    """Return the fastest implementation; None unless the first one is slower by `MARGIN`."""
    fastest = min(names, key=lambda name: times.get(name, math.inf))
    first = times.get(names[0], math.inf)
    return fastest if times.get(fastest, math.inf) < first * (1 - MARGIN) else None


def describe(op: Op, arrays: tuple[Any, ...], *, backward: bool) -> str:
    """Return op, shapes of a clip and type of the arguments in words."""
    shapes = []
    for place, array in enumerate(arrays):
        if array is not None:
            shape = array.shape[1:] if place in op.batched else array.shape
            shapes.append("mask" if array.dtype == jnp.bool_ else "x".join(map(str, shape)))
    passes = "forward and backward" if backward else "forward"
    shown = ", ".join(dict.fromkeys(shapes))
    return f"{op.name} of {shown} in {arrays[op.batched[0]].dtype}, {passes}"


def find_times() -> Path:
    """Return the file of the times of this device, with these versions."""
    device = jax.devices()[0]
    kind = find_compiled().name if device.platform == "cpu" else device.device_kind
    name = "".join(c if c.isalnum() else "-" for c in kind).strip("-").lower()
    versions = f"jax-{version('jax')}-aatjax-{version('aatjax')}"
    return find_user_cache() / "kernels" / f"{name}-{jax.device_count()}-{versions}.json"


def read_times(path: Path) -> dict[str, Times]:
    """Return the times in a file; none where it is not there or does not hold any."""
    try:
        found = read_json_object(path)
        return {
            str(case): {str(name): float(ms) for name, ms in times.items()}
            for case, times in found.items()
        }
    except (AatjaxError, OSError, AttributeError, TypeError, ValueError):
        return {}


@functools.cache
def get_timer(*, backward: bool) -> KernelTimer:
    """Return the timer of this process, for training or for inference."""
    return KernelTimer(find_times(), backward)
