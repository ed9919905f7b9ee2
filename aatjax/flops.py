"""Floating-point operations of a function, counted from its jaxpr: 1 multiply-add = 2 FLOPs.

Products and convolutions are counted, nothing else; elementwise work and reductions are a few per
cent of a Transformer. Scanned bodies count as often as they run.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters import partial_eval

from aatjax.errors import UsageError


def count(function: Callable[..., Any], *args: Any) -> int:
    """FLOPs of the products and convolutions of one call.

    Args:
        function: any function that JAX can trace; nothing is computed.
        args: its arguments, arrays or shapes.

    Raises:
        UsageError: it holds a loop whose length is not known before it runs.
    """
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    # What nothing depends on, such as the weight gradients that a rule makes along with others, is
    # not computed.
    needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _of(needed)


def _of(jaxpr: Jaxpr) -> int:
    return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    match name:
        case "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            return (
                2
                * math.prod(equation.outvars[0].aval.shape)
                * math.prod(left[axis] for axis in contracted)
            )
        case "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            outputs = params["dimension_numbers"].rhs_spec[0]
            per_output = math.prod(kernel) // kernel[outputs]
            return 2 * math.prod(equation.outvars[0].aval.shape) * per_output
        case "scan":
            return params["length"] * _of(params["jaxpr"].jaxpr)
        case "cond" if params.get("branches_platforms"):
            # A choice by platform, the plain form last: all do the same products.
            return _of(params["branches"][-1].jaxpr)
        case "cond":
            return max(_of(branch.jaxpr) for branch in params["branches"])
        case "shard_map":  # inside are the shapes of one device
            return params["mesh"].size * _of(params["jaxpr"])
        case "while":
            inside = _of(params["body_jaxpr"].jaxpr) + _of(params["cond_jaxpr"].jaxpr)
            if inside:
                raise UsageError(
                    "the FLOPs of a while loop with products in it depend on how long it runs: "
                    "use lax.scan"
                )
            return 0
        case _:
            return sum(_of(inner) for inner in _inside(params))


def _inside(params: dict[str, Any]) -> list[Jaxpr]:
    """The jaxprs that an equation such as jit, remat or custom_vjp calls."""
    found: list[Jaxpr] = []
    for value in params.values():
        if isinstance(value, ClosedJaxpr):
            found.append(value.jaxpr)
        elif isinstance(value, Jaxpr):
            found.append(value)
    return found
