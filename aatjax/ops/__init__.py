"""Ops with a choice of implementation: the only module of aatjax that imports the kernels."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax import lax
from jaxtyping import Array, Bool, Float

from aatjax.errors import UsageError
from aatjax_kernels import attention as attention_kernels
from aatjax_kernels import elementwise, matmul, selection
from aatjax_kernels import soft_moe as soft_moe_kernels
from aatjax_kernels.attention import weights as attention_weights
from aatjax_kernels.mesh import as_auto, find_explicit, over_batch
from aatjax_kernels.mesh import pin as over_batch_only
from aatjax_kernels.soft_moe import combine as soft_combine
from aatjax_kernels.soft_moe import dispatch as soft_dispatch
from aatjax_kernels.soft_moe import routing as soft_routing

__all__ = ["as_auto", "attention", "attention_weights", "check_kernels"]
__all__ += ["choosing_kernels", "dot_general", "find_choice", "find_explicit", "gelu"]
__all__ += ["layer_norm", "over_batch", "over_batch_only", "plain_operations", "soft_combine"]
__all__ += ["soft_dispatch", "soft_moe", "soft_routing"]

_plain: contextvars.ContextVar[bool] = contextvars.ContextVar("plain", default=False)


@contextlib.contextmanager
def plain_operations() -> Iterator[None]:
    """Trace every op as plain operations, without kernels or derivative rules of our own.

    They have derivatives of every kind and order, and take more memory and time.
    """
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


@contextlib.contextmanager
def choosing_kernels(
    kernels: str | None = None,
    *,
    backward: bool,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[None]:
    """Choose the implementation of each op that is traced in the context.

    Args:
        kernels: `measured`: the fastest on this device, timed once for the shapes of a clip and
            kept in the user's cache; `fixed`: a rule; `none`: plain JAX; or names with commas,
            which the rule may take. None takes `AATJAX_KERNELS`, or `measured`. Several processes
            take `fixed`, so that all run one program.
        backward: time the backward pass too, as in training.
        say: gets a line for each op that is timed.

    Raises:
        UsageError: there is no implementation of a name.
    """
    timer = None
    chosen = kernels or selection.read_choice()
    check_kernels(chosen, "kernels" if kernels else selection.VARIABLE)
    if chosen == selection.MEASURED and jax.process_count() == 1:
        from aatjax.ops.kernel_timer import get_timer  # most programs time nothing

        timer = get_timer(backward=backward)
        timer.say = say
    with selection.choosing(chosen, timer):
        yield


def check_kernels(text: str, source: str) -> None:
    """Raise a UsageError where a choice of implementations names an unknown one.

    Args:
        text: see `choosing_kernels`.
        source: where it comes from, for the message.
    """
    with _as_usage_error():
        selection.parse_choice(text, source)


def find_choice() -> tuple[str, bool]:
    """Return how implementations are chosen here, for a key of compiled programs."""
    return selection.read_choice(), selection.is_timed()


@contextlib.contextmanager
def _as_usage_error() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


def gelu(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """x Phi(x) with the exact (erf) Phi: see `aatjax_kernels.elementwise.plain_gelu`."""
    return elementwise.plain_gelu(x) if _plain.get() else elementwise.gelu(x)


def layer_norm(
    x: Float[Array, "*b d"], scale: Float[Array, " d"], bias: Float[Array, " d"], eps: float
) -> Float[Array, "*b d"]:
    """LayerNorm over the last axis: see `aatjax_kernels.elementwise.plain_layer_norm`."""
    norm = elementwise.plain_layer_norm if _plain.get() else elementwise.layer_norm
    return norm(x, scale, bias, eps)


def dot_general(x: Array, kernel: Array, dimensions: Any, *args: Any, **options: Any) -> Array:
    """Multiply as `lax.dot_general` does: see `aatjax_kernels.matmul.dot_general`."""
    product = lax.dot_general if _plain.get() else matmul.dot_general
    return product(x, kernel, dimensions, *args, **options)


def attention(
    query: Float[Array, "b n h k"],
    key: Float[Array, "b m h k"],
    value: Float[Array, "b m h k"],
    *,
    mask: Bool[Array, "b m"] | None = None,
) -> Float[Array, "b n h k"]:
    """Scaled dot-product attention, softmax(Q K^T / sqrt(k)) V, with a float32 softmax.

    Args:
        query: `[b, n, h, k]`.
        key: `[b, m, h, k]`.
        value: `[b, m, h, k]`.
        mask: False for keys that are masked out; None for none. Each clip needs one True.

    Returns:
        `[b, n, h, k]` in the type of `value`.

    Raises:
        UsageError: `AATJAX_KERNELS` names a kernel that does not exist.

    Source: Vaswani et al. 2017, eq. 1.
    """
    name = "reference" if _plain.get() else None
    with _as_usage_error():
        return attention_kernels.attention(query, key, value, mask=mask, implementation=name)


def soft_moe(
    x: Float[Array, "b n d"],
    phi: Float[Array, "d e p"],
    w_down: Float[Array, "e d r"],
    b_down: Float[Array, "e r"],
    w_up: Float[Array, "e r d"],
    b_up: Float[Array, "e d"],
    *,
    mask: Bool[Array, "b n"] | None = None,
    normalize: bool = False,
    implementation: soft_moe_kernels.SoftMoeImplementation | None = None,
) -> Float[Array, "b n d"]:
    """Soft mixture of bottleneck experts (2402.00828): see `aatjax_kernels.soft_moe.soft_moe`.

    Raises:
        UsageError: an implementation of that name does not exist, or cannot run here.
    """
    implementation = "reference" if _plain.get() else implementation
    with _as_usage_error():
        return soft_moe_kernels.soft_moe(
            x,
            phi,
            w_down,
            b_down,
            w_up,
            b_up,
            mask=mask,
            normalize=normalize,
            implementation=implementation,
        )
