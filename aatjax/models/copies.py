"""Calls of a copy of a module, as JAX's transformations need them, with what the call changed."""

from collections.abc import Callable
from typing import Any

from flax import nnx


def call_copy(graphdef: Any, state: Any, function: Callable[[Any], Any]) -> tuple[Any, Any]:
    """Call a function of a module that is made from a structure and arrays.

    Args:
        graphdef, state: the module from `nnx.split`.
        function: what to call with it.

    Returns:
        The result, and for `nnx.update` the variables that the call set, such as batch statistics:
        what it left as it was is not among them, so that a transformation returns no weights.
    """
    known = {path: variable.get_raw_value() for path, variable in nnx.to_flat_state(state)}
    module = nnx.merge(graphdef, state, copy=True)
    result = function(module)
    flat = nnx.to_flat_state(nnx.state(module))
    changed = [(path, new) for path, new in flat if known.get(path) is not new.get_raw_value()]
    return result, nnx.from_flat_state(changed)
