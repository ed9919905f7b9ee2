"""Folding what can be folded into the backbone, so that it costs nothing in use."""

from flax import nnx

from aatjax import surgery
from aatjax.errors import UsageError
from aatjax.models.ast import AST


def merge(model: AST) -> AST:
    """A model without its mergeable wrappers (LoRA's), computing the same.

    A wrapper that can be merged has a method `merged` that returns the plain module. Others, such
    as adapters beside a LoRA, stay as they are. A model with nothing left to train but head and
    LayerNorms comes back as a plain, frozen AST.

    Args:
        model: an adapted AST; it is left as it is.

    Raises:
        UsageError: nothing in it can be merged.
    """
    whole = surgery.clone(model)

    def build(_: str, module: nnx.Module) -> nnx.Module | None:
        merged = getattr(module, "merged", None)
        return None if merged is None else merged()

    if not surgery.replace(whole, build):
        name = getattr(model.method, "name", "this model")
        raise UsageError(
            f"{name} has nothing that can be merged into the backbone: its adapters are not linear "
            "maps of what a frozen matrix reads (LoRA's are)"
        )
    whole.method = None
    inside = {v for v in surgery.modules(whole).values() if hasattr(v, surgery.BASE)}
    if not inside:
        surgery.retag(whole, "**", nnx.Param)
    return whole
