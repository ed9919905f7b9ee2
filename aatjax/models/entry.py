"""What surrounds every call of a model: Explicit meshes, and the choice of plain operations."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx

from aatjax import ops
from aatjax.models.copies import call_copy

Method = TypeVar("Method", bound=Callable[..., Any])


def entry(method: Method) -> Method:
    """Decorate a method of an AST whose first argument and result have a leading batch axis.

    With `config.implementation="reference"` all operations are plain.

    Where the first argument or a parameter lies on a mesh with Explicit axes, XLA partitions the
    computation, and the result is split over the batch as the first argument is. Without this, each
    reshape in the model would have to name the sharding of its result.
    """

    @functools.wraps(method)
    def call(self: Any, x: jax.Array, *args: Any, **options: Any) -> jax.Array:
        if self.config.implementation == "reference":
            with ops.plain_operations():
                return follow_sharding(self, x, args, options)
        return follow_sharding(self, x, args, options)

    def follow_sharding(self: Any, x: jax.Array, args: Any, options: Any) -> jax.Array:
        mesh = ops.find_explicit(x) or ops.find_explicit(*jax.tree.leaves(nnx.state(self)))
        if mesh is None:
            return method(self, x, *args, **options)
        graphdef, state = nnx.split(self)

        def run(x: jax.Array, state: Any, args: Any) -> tuple[jax.Array, Any]:
            return call_copy(graphdef, state, lambda copy: method(copy, x, *args, **options))

        result, changed = ops.as_auto(run, mesh, x, state, args)
        nnx.update(self, changed)
        return result

    return call  # pyright: ignore[reportReturnType]
