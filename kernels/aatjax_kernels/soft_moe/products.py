"""Products as they stand inside kernels: float32 sums of 16-bit or 32-bit operands."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

F32 = jnp.float32
LOW = -1e30
"""Below every score, and finite: the difference of two of them is zero."""

ROWS = (((1,), (0,)), ((), ()))
"""A B."""
LANES = (((1,), (1,)), ((), ()))
"""A B^T."""
COLUMNS = (((0,), (0,)), ((), ()))
"""A^T B."""


def dot(a: Array, b: Array, dims: Any = ROWS) -> Array:
    """The product of two matrices in float32; `dims` is ROWS, LANES or COLUMNS."""
    # Products of 16-bit operands are exact: a higher precision, if one is set, is for float32.
    wide = a.dtype == F32 or b.dtype == F32
    precision = None if wide else lax.Precision.DEFAULT
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=F32)
