"""aatjax: parameter-efficient fine-tuning of the Audio Spectrogram Transformer in JAX and Flax.

The public names are imported when first used, so that `import aatjax` is cheap.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aatjax import data, petl, surgery
    from aatjax.audio.frontend import FrontEnd
    from aatjax.audio.scoring import Scoring
    from aatjax.config import Config
    from aatjax.convert.load import LoadOptions, load
    from aatjax.inference.adapters import Adapters, average
    from aatjax.inference.classifier import Classifier, predict
    from aatjax.inference.prediction import Prediction
    from aatjax.models.ast import AST
    from aatjax.models.config import ASTConfig
    from aatjax.models.summary import Summary, summary
    from aatjax.petl.base import adapt
    from aatjax.petl.capture import capture
    from aatjax.petl.merge import merge
    from aatjax.train.adapter_file import TrainedAdapter, load_adapter, save_adapter
    from aatjax.train.evaluation import Embeddings, embed, evaluate
    from aatjax.train.fit import FitSettings, Moment, Run, fit
    from aatjax.train.optim import Optim
    from aatjax.train.published import load_published
    from aatjax.train.training import Training

_HOMES = {
    "AST": "aatjax.models.ast",
    "ASTConfig": "aatjax.models.config",
    "Adapters": "aatjax.inference.adapters",
    "Classifier": "aatjax.inference.classifier",
    "Config": "aatjax.config",
    "Embeddings": "aatjax.train.evaluation",
    "FitSettings": "aatjax.train.fit",
    "FrontEnd": "aatjax.audio.frontend",
    "LoadOptions": "aatjax.convert.load",
    "Moment": "aatjax.train.fit",
    "Optim": "aatjax.train.optim",
    "Prediction": "aatjax.inference.prediction",
    "Run": "aatjax.train.fit",
    "Scoring": "aatjax.audio.scoring",
    "Summary": "aatjax.models.summary",
    "TrainedAdapter": "aatjax.train.adapter_file",
    "Training": "aatjax.train.training",
    "adapt": "aatjax.petl.base",
    "average": "aatjax.inference.adapters",
    "capture": "aatjax.petl.capture",
    "embed": "aatjax.train.evaluation",
    "evaluate": "aatjax.train.evaluation",
    "fit": "aatjax.train.fit",
    "load": "aatjax.convert.load",
    "load_adapter": "aatjax.train.adapter_file",
    "load_published": "aatjax.train.published",
    "merge": "aatjax.petl.merge",
    "predict": "aatjax.inference.classifier",
    "save_adapter": "aatjax.train.adapter_file",
    "summary": "aatjax.models.summary",
}

__all__ = [
    "AST",
    "ASTConfig",
    "Adapters",
    "Classifier",
    "Config",
    "Embeddings",
    "FitSettings",
    "FrontEnd",
    "LoadOptions",
    "Moment",
    "Optim",
    "Prediction",
    "Run",
    "Scoring",
    "Summary",
    "TrainedAdapter",
    "Training",
    "adapt",
    "average",
    "capture",
    "data",
    "embed",
    "evaluate",
    "fit",
    "load",
    "load_adapter",
    "load_published",
    "merge",
    "petl",
    "predict",
    "save_adapter",
    "summary",
    "surgery",
]


def __getattr__(name: str) -> Any:
    if name in ("data", "petl", "surgery"):
        return importlib.import_module(f"aatjax.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'aatjax' has no attribute {name!r}")
