"""Adaptation methods, one file a family; each is found by its class name and by its short name."""

import importlib
import pkgutil
from typing import Any

from aatjax.petl.base import METHODS, Method, adapt, find_method
from aatjax.petl.merge import merge
from aatjax.petl.presets import TABLE, make_method
from aatjax.petl.routing_weights import Routing, diagnose_routing, routing

__all__ = [
    "METHODS",
    "Method",
    "Routing",
    "TABLE",
    "adapt",
    "diagnose_routing",
    "find_method",
    "merge",
    "make_method",
    "routing",
]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def __getattr__(name: str) -> Any:
    for method in METHODS.values():
        if method.__name__ == name:
            return method
    known = ", ".join(sorted(method.__name__ for method in METHODS.values()))
    raise AttributeError(f"aatjax.petl has no method {name!r}; there are {known}")


def __dir__() -> list[str]:
    return [*__all__, *(method.__name__ for method in METHODS.values())]
