"""Merges linear adapters into the backbone."""

from flax import nnx

from aatjax import surgery
from aatjax.errors import UsageError
from aatjax.models.ast import AST, check_model


def merge(model: AST) -> AST:
    """Return a model that computes the same without its mergeable adapters (those of LoRA).

    A mergeable wrapper has a method `merge_into_base` that returns the plain module. Others, such
    as bottleneck adapters, are kept. A model without any other adapter becomes a plain, frozen AST.

    Args:
        model: an adapted AST; not changed.

    Raises:
        UsageError: nothing can be merged.
    """
    check_model(model, "merge")
    merged = surgery.clone(model)

    def build(_: str, module: nnx.Module) -> nnx.Module | None:
        fold = getattr(module, "merge_into_base", None)
        return None if fold is None else fold()

    if not surgery.replace(merged, build):
        name = getattr(model.method, "name", "this model")
        raise UsageError(
            f"{name} has nothing that can be merged into the backbone: its adapters are not linear "
            "maps of what a frozen matrix reads (LoRA's are)"
        )
    merged.method = None
    if not any(hasattr(module, surgery.BASE) for module in surgery.modules(merged).values()):
        surgery.freeze(merged)
    return merged
