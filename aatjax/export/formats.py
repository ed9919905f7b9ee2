"""What a format of exports has to offer, and reasons why a model does not fit one."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aatjax.errors import UsageError
from aatjax.export.merged_model import MergedModel, ParityClips

Logits = tuple[dict[str, np.ndarray], str]
"""Logits by the kind of input, and the program that computed them."""

TO_GRAPH = "export it to onnx or stablehlo"


@dataclasses.dataclass(frozen=True)
class ExportFormat:
    """One kind of files; each module of a format holds one.

    Attributes:
        name: on the command line.
        check: raises a UsageError for a model that the format cannot hold.
        write: fills a folder; returns notes for the user.
        run: computes the logits of the files in a folder, from its entries in `export.json` and
            the clips.
        usage: how to use the files, as Markdown, a template of `str.format`.
        libraries: modules that writing or running the files needs, of the extra `export`.
    """

    name: str
    check: Callable[[MergedModel], None]
    write: Callable[..., tuple[str, ...]]
    run: Callable[[Path, dict[str, Any], ParityClips], Logits]
    usage: str
    libraries: tuple[str, ...] = ()


def refuse(model: MergedModel, name: str, reasons: Sequence[str], advice: str = TO_GRAPH) -> None:
    """Raise a UsageError if there are reasons."""
    if reasons:
        raise UsageError(
            f"{name} cannot hold this {model.method.name} model: {'; '.join(reasons)}: {advice}"
        )


def explain_parts(model: MergedModel, place: str) -> list[str]:
    """Why the model is not just an AST, for a format that holds nothing else."""
    if model.is_plain:
        return []
    return [
        f"what {model.method.name} adds stays beside the frozen layers and cannot be merged "
        f"into them, and {place} has no place for it"
    ]
