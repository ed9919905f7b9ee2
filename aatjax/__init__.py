"""aatjax: parameter-efficient fine-tuning of the Audio Spectrogram Transformer in JAX and Flax.

The public names are imported when first used, so that `import aatjax` is cheap.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aatjax import data, petl
    from aatjax.classifier import Classifier, Prediction, predict
    from aatjax.config import Config
    from aatjax.counts import Summary, summary
    from aatjax.loading import load
    from aatjax.models.ast import AST
    from aatjax.models.config import ASTConfig
    from aatjax.petl.base import adapt
    from aatjax.petl.merging import merge
    from aatjax.train.adapters import Adapters, average
    from aatjax.train.artefact import Adapter, load_adapter
    from aatjax.train.evaluation import evaluate
    from aatjax.train.fit import Run, fit
    from aatjax.train.loop import Training
    from aatjax.train.optim import Optim

_HOMES = {
    "AST": "aatjax.models.ast",
    "ASTConfig": "aatjax.models.config",
    "Adapter": "aatjax.train.artefact",
    "Adapters": "aatjax.train.adapters",
    "Classifier": "aatjax.classifier",
    "Config": "aatjax.config",
    "Optim": "aatjax.train.optim",
    "Prediction": "aatjax.classifier",
    "Run": "aatjax.train.fit",
    "Summary": "aatjax.counts",
    "Training": "aatjax.train.loop",
    "adapt": "aatjax.petl.base",
    "average": "aatjax.train.adapters",
    "evaluate": "aatjax.train.evaluation",
    "fit": "aatjax.train.fit",
    "load": "aatjax.loading",
    "load_adapter": "aatjax.train.artefact",
    "merge": "aatjax.petl.merging",
    "predict": "aatjax.classifier",
    "summary": "aatjax.counts",
}

__all__ = [
    "AST",
    "ASTConfig",
    "Adapter",
    "Adapters",
    "Classifier",
    "Config",
    "Optim",
    "Prediction",
    "Run",
    "Summary",
    "Training",
    "adapt",
    "average",
    "data",
    "evaluate",
    "fit",
    "load",
    "load_adapter",
    "merge",
    "petl",
    "predict",
    "summary",
]


def __getattr__(name: str) -> Any:
    if name in ("data", "petl"):
        return importlib.import_module(f"aatjax.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'aatjax' has no attribute {name!r}")
