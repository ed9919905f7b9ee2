"""Programs of plain operations only, for converters to other runtimes."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from aatjax.export.merged_model import MergedModel

CALLS = frozenset(
    {"jit", "pjit", "closed_call", "core_call", "remat", "checkpoint"}
    | {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}
)
"""Operations that only call a program."""


def inline_calls(function: Callable[..., Any], *examples: Any) -> Callable[..., Any]:
    """Return the function traced for these shapes, with calls and choices of platform removed.

    Calls are inlined without their derivative rules; of branches by platform the default one is
    taken, which is never a kernel; padding becomes concatenation (the ONNX converter cannot pad
    batches of unknown size).

    Args:
        function: of arrays and trees of arrays.
        examples: arrays or shapes.

    Returns:
        A function of the same arguments, which `vmap` can map over a batch of unknown size.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*examples)
    tree = jax.tree.structure(shapes)

    def run(*args: Any) -> Any:
        return tree.unflatten(_run(closed.jaxpr, closed.consts, jax.tree.leaves(args)))

    return run


def inline_model(model: MergedModel) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return (weights, log-mel `[1, t, f]`, valid frames `[1]`) -> logits, inlined; the weights."""
    forward, weights = model.split_weights()
    config = model.merged.config
    one = inline_calls(
        forward,
        {path: jax.ShapeDtypeStruct(v.shape, v.dtype) for path, v in weights.items()},
        jax.ShapeDtypeStruct((1, config.frames, config.mels), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )
    return one, weights


def _run(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    values: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args]))  # noqa: B905

    def read(atom: Any) -> Any:
        return atom.val if hasattr(atom, "val") else values[atom]

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        found = _apply(equation.primitive, equation.params, inputs)
        values.update(zip(equation.outvars, found, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _apply(primitive: Any, params: dict[str, Any], inputs: list[Any]) -> Sequence[Any]:
    name = primitive.name
    if name == "platform_index":
        groups = list(params["platforms"])
        return [groups.index(None)]
    if name == "by_platform":
        return _run(params["plain"].jaxpr, params["plain"].consts, inputs)
    if name == "cond" and isinstance(inputs[0], int):
        chosen = params["branches"][inputs[0]]
        return _run(chosen.jaxpr, chosen.consts, inputs[1:])
    if name in CALLS:
        inner = next(params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in params)
        held = getattr(inner, "jaxpr", inner)
        return _run(held, getattr(inner, "consts", ()), inputs)
    if name == "pad" and all(low >= 0 <= high and not gap for low, high, gap in _padding(params)):
        return [_concatenate(inputs[0], inputs[1], _padding(params))]
    if name == "concatenate":  # the converter cannot reshape empty parts
        inputs = [x for x in inputs if x.shape[params["dimension"]]] or inputs[:1]
    found = primitive.bind(*inputs, **params)
    return found if primitive.multiple_results else [found]


def _padding(params: dict[str, Any]) -> Sequence[tuple[int, int, int]]:
    return [(int(low), int(high), int(gap)) for low, high, gap in params["padding_config"]]


def _concatenate(x: Any, value: Any, padding: Sequence[tuple[int, int, int]]) -> Any:
    for axis, (low, high, _) in enumerate(padding):
        sizes = [(*x.shape[:axis], size, *x.shape[axis + 1 :]) for size in (low, high)]
        filled = [np.zeros(shape, x.dtype) + value for shape in sizes]
        parts = [filled[0], x, filled[1]]
        parts = [part for part in parts if part.shape[axis]]
        x = lax.concatenate(parts, axis) if len(parts) > 1 else x
    return x
