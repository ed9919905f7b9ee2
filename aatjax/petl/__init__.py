"""Adaptation methods, one file per family; each has a class name and a short name (`soft_moa`)."""

import importlib
import pkgutil
from typing import TYPE_CHECKING

from aatjax.errors import suggest
from aatjax.petl.aat import AAT
from aatjax.petl.adapter import Adapter
from aatjax.petl.base import METHODS, Method, adapt, find_method
from aatjax.petl.combined import Combined, Stacked
from aatjax.petl.dense_moa import DenseMoA, TopKMoA
from aatjax.petl.loaa import LoAA
from aatjax.petl.lora import LoRA
from aatjax.petl.merge import merge
from aatjax.petl.prefix import Prefix
from aatjax.petl.presets import TABLE, make_method
from aatjax.petl.prompt import Prompt
from aatjax.petl.routing_weights import Routing, diagnose_routing, routing
from aatjax.petl.simple import BitFit, Full, LayerNormTuning, Linear, Partial, Ridge
from aatjax.petl.soft_moa import SoftMoA

# The methods, so that editors and type checkers know them; then what is done with them.
__all__ = ["AAT", "Adapter", "BitFit", "Combined", "DenseMoA", "Full", "LayerNormTuning", "Linear"]
__all__ += ["LoAA", "LoRA", "Partial", "Prefix", "Prompt", "Ridge", "SoftMoA", "Stacked", "TopKMoA"]
__all__ += ["METHODS", "Method", "Routing", "TABLE", "adapt", "diagnose_routing", "find_method"]
__all__ += ["make_method", "merge", "routing"]

# A method in a file of this folder is found without a line above, too.
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

if not TYPE_CHECKING:  # to a type checker, only the names above exist

    def __getattr__(name: str) -> type[Method]:
        classes = {method.__name__: method for method in METHODS.values()}
        if name in classes:
            return classes[name]
        hint = suggest(name, [*classes, *__all__])
        methods = ", ".join(sorted(classes))
        raise AttributeError(f"aatjax.petl has no {name!r}{hint} (methods: {methods})")

    def __dir__() -> list[str]:
        return sorted({*__all__, *(method.__name__ for method in METHODS.values())})
