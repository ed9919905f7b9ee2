"""Floating-point operations of a function, counted from its jaxpr: 1 multiply-add = 2 FLOPs.

Only products and convolutions are counted; elementwise work and reductions are a few per cent of a
Transformer. Scanned bodies count as often as they run.
"""

import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters import partial_eval

from aatjax.errors import UsageError


def count_flops(function: Callable[..., Any], *args: Any) -> int:
    """Count the FLOPs of the products and convolutions of one call.

    Args:
        function: any function that JAX can trace; nothing is computed.
        args: its arguments, arrays or shapes.

    Raises:
        UsageError: it has a loop whose length is not known before it runs.
    """
    return sum(count_flops_by_scope(function, *args).values())


def count_flops_by_scope(function: Callable[..., Any], *args: Any) -> Counter[tuple[str, ...]]:
    """Count the FLOPs of each stack of names (`jax.named_scope`) that contains products.

    The backward pass of a scope counts under the same names as its forward pass.
    """
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    # Unused results, such as weight gradients that a rule returns with others, are not computed.
    needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    found: Counter[tuple[str, ...]] = Counter()
    _walk(needed, (), 1, found)
    return found


def _walk(jaxpr: Jaxpr, stack: tuple[str, ...], times: int, found: Counter[Any]) -> None:
    for equation in jaxpr.eqns:
        names = (*stack, *_split_names(str(equation.source_info.name_stack)))
        flops = _count_product(equation)
        if flops:
            found[names] += times * flops
        for repeats, inner in _find_inner(equation):
            _walk(inner, names, times * repeats, found)


def _split_names(stack: str) -> list[str]:
    """Split `transpose(jvp(adapter))/dispatch` into adapter, dispatch."""
    return [name for name in re.findall(r"[A-Za-z_]\w*(?!\w*\()", stack) if name != "jit"]


def _count_product(equation: Any) -> int:
    """Return the FLOPs of a product, a convolution or a kernel with an estimate; else 0."""
    params = equation.params
    match equation.primitive.name:
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
        case "pallas_call" if params.get("cost_estimate") is not None:
            return int(params["cost_estimate"].flops)
    return 0


def _find_inner(equation: Any) -> list[tuple[int, Jaxpr]]:
    """Return the jaxprs that an equation runs, each with the number of times."""
    name, params = equation.primitive.name, equation.params
    match name:
        case "scan":
            return [(params["length"], params["jaxpr"].jaxpr)]
        case "by_platform":  # all compute the same products
            return [(1, params["plain"].jaxpr)]
        case "cond" if params.get("branches_platforms"):
            return [(1, params["branches"][-1].jaxpr)]
        case "cond":
            branches = [branch.jaxpr for branch in params["branches"]]
            return [(1, max(branches, key=_count_jaxpr))]
        case "shard_map":  # with the shapes of one device
            return [(params["mesh"].size, params["jaxpr"])]
        case "while":
            bodies = [params["body_jaxpr"].jaxpr, params["cond_jaxpr"].jaxpr]
            if any(map(_count_jaxpr, bodies)):
                raise UsageError(
                    "a while loop with products in it has no known FLOPs: use lax.scan"
                )
            return []
        case "pallas_call":
            # A kernel without an estimate: its body on the blocks of one step, padding included.
            if params.get("cost_estimate") is not None:
                return []
            return [(math.prod(params["grid_mapping"].grid), params["jaxpr"])]
    found: list[tuple[int, Jaxpr]] = []
    for value in params.values():
        if isinstance(value, ClosedJaxpr):
            found.append((1, value.jaxpr))
        elif isinstance(value, Jaxpr):
            found.append((1, value))
    return found


def _count_jaxpr(jaxpr: Jaxpr) -> int:
    found: Counter[Any] = Counter()
    _walk(jaxpr, (), 1, found)
    return sum(found.values())
