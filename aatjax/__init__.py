"""aatjax: parameter-efficient fine-tuning of the Audio Spectrogram Transformer in JAX and Flax.

The public names are imported when first used, so that `import aatjax` is cheap.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aatjax import data, petl
    from aatjax.config import Config
    from aatjax.convert.load import LoadOptions, load
    from aatjax.inference.adapters import Adapters, average
    from aatjax.inference.classifier import Classifier, Prediction, predict
    from aatjax.models.ast import AST
    from aatjax.models.config import ASTConfig
    from aatjax.models.summary import Summary, summary
    from aatjax.petl.base import adapt
    from aatjax.petl.merge import merge
    from aatjax.train.adapter_file import TrainedAdapter, load_adapter
    from aatjax.train.evaluation import evaluate
    from aatjax.train.fit import FitSettings, Run, fit
    from aatjax.train.loop import Training
    from aatjax.train.optim import Optim

_HOMES = {
    "AST": "aatjax.models.ast",
    "ASTConfig": "aatjax.models.config",
    "Adapters": "aatjax.inference.adapters",
    "Classifier": "aatjax.inference.classifier",
    "Config": "aatjax.config",
    "FitSettings": "aatjax.train.fit",
    "LoadOptions": "aatjax.convert.load",
    "Optim": "aatjax.train.optim",
    "Prediction": "aatjax.inference.classifier",
    "Run": "aatjax.train.fit",
    "Summary": "aatjax.models.summary",
    "TrainedAdapter": "aatjax.train.adapter_file",
    "Training": "aatjax.train.loop",
    "adapt": "aatjax.petl.base",
    "average": "aatjax.inference.adapters",
    "evaluate": "aatjax.train.evaluation",
    "fit": "aatjax.train.fit",
    "load": "aatjax.convert.load",
    "load_adapter": "aatjax.train.adapter_file",
    "merge": "aatjax.petl.merge",
    "predict": "aatjax.inference.classifier",
    "summary": "aatjax.models.summary",
}

__all__ = [
    "AST",
    "ASTConfig",
    "Adapters",
    "Classifier",
    "Config",
    "FitSettings",
    "LoadOptions",
    "Optim",
    "Prediction",
    "Run",
    "Summary",
    "TrainedAdapter",
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
