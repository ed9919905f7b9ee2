"""Pallas, imported when a kernel is traced: it takes a second, and most programs have no kernel."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu
else:

    class _Module:
        """A module that is imported when an attribute of it is asked for."""

        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            return getattr(importlib.import_module(self._name), attribute)

    pl = _Module("jax.experimental.pallas")
    pltpu = _Module("jax.experimental.pallas.tpu")

__all__ = ["pl", "pltpu"]
