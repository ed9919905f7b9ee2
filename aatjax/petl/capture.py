"""Intermediate values of a forward pass, by the paths of the modules that compute them."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Integer

from aatjax import surgery
from aatjax.errors import UsageError
from aatjax.models.ast import AST, Attention, check_model
from aatjax.petl.routing_weights import copy_unrolled

MIXTURE_VALUES = ("combine", "dispatch", "slots")


class Tap(nnx.Module):
    """A module that keeps its output as `recorded_output`."""

    reads = None  # of a pool: every token is computed, also those that it does not read

    def __init__(self, base: nnx.Module):
        self.base = base

    def __call__(self, *args: Any, **options: Any) -> Any:
        output = self.base(*args, **options)  # pyright: ignore[reportCallIssue]
        self.recorded_output: nnx.Intermediate[Any] = nnx.Intermediate(output)
        return output

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in ("base", "recorded_output"):
            raise AttributeError(name)
        return getattr(self.base, name)


def list_values(model: AST) -> list[str]:
    """Return the names of all values that `capture` can return, in the order of the model."""
    names: list[str] = []
    for path, module in surgery.modules(model).items():
        if path and not isinstance(module, nnx.List):
            names.append(path)
    for parts, module in nnx.iter_modules(model):
        path = _join(parts)
        if isinstance(module, Attention):
            names.append(f"{path}/weights")
        elif hasattr(module, "watched"):
            values = MIXTURE_VALUES if hasattr(module, "phi") else MIXTURE_VALUES[:1]
            names += [f"{path}/{name}" for name in values]
    return sorted(names)


def capture(
    model: AST,
    x: Float[Array, "b t f"],
    *patterns: str,
    valid: Integer[Array, " b"] | None = None,
) -> dict[str, Array]:
    """Return intermediate values of a forward pass by name, under `jax.jit` and `jax.grad` too.

        aatjax.capture(model, x, "blocks/*", "blocks/*/attn/weights")

    Args:
        model: an AST, adapted or not; it is not changed, and its blocks run one after the other.
        x: normalised log-mel.
        patterns: globs over path segments, as for `surgery.wrap`. The path of a module is the name
            of its output: `blocks/*` tokens `[b, n, d]`, `blocks/*/attn`, `norm`, `pool` `[b, d]`,
            `head` the logits. `blocks/*/attn/weights` are the attention weights `[b, h, n, m]`; of
            a mixture, for instance `blocks/*/attn/soft_moa/dispatch`, see `petl.Routing`.
        valid: number of frames of each clip that are not padding, for models with `mask_padding`.

    Raises:
        UsageError: no pattern, or one that matches nothing; the message lists what there is.
    """
    check_model(model, "capture")
    probe = copy_unrolled(model)
    known = list_values(probe)
    if not patterns:
        raise UsageError(
            f"capture: give patterns of values; there are: {surgery.list_paths(known)}"
        )
    wanted: set[str] = set()
    for pattern in patterns:
        found = {name for name in known if surgery.matches(name, pattern)}
        if not found:
            listed = surgery.list_paths(known)
            raise UsageError(f"{pattern!r} matches no value of the model; there are: {listed}")
        wanted |= found
    for parts, module in nnx.iter_modules(probe):
        path = _join(parts)
        if isinstance(module, Attention):
            module.keeps_weights = f"{path}/weights" in wanted
        elif hasattr(module, "watched"):
            values = {f"{path}/{name}" for name in MIXTURE_VALUES}
            module.watched = bool(values & wanted)  # pyright: ignore[reportAttributeAccessIssue]
    for path in sorted({"pool", *(wanted & surgery.modules(probe).keys())}, reverse=True):
        surgery.wrap(probe, path, lambda _, module: Tap(module))
    probe(x, valid)
    values = {
        path.removesuffix("/recorded_output").replace("/recorded_", "/"): value
        for path, value in surgery.arrays(probe, nnx.Intermediate).items()
    }
    return {name: values[name] for name in sorted(wanted)}


def _join(parts: tuple[Any, ...]) -> str:
    """Return the path of a module from the keys of Flax, without wrappers."""
    return "/".join(str(part) for part in parts if part != surgery.BASE)
