"""Class-balanced sampling: clips of rare classes are drawn more often."""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Float64

from aatjax.data.source import Source

Balance = Literal["none", "sampler", "loss"]
"""What makes classes count alike: nothing, how often their clips are drawn, or their weights."""


def compute_draw_shares(
    source: Source, weights: np.ndarray | None = None
) -> Float64[np.ndarray, " n"]:
    """Return the probability with which each clip is drawn in balanced sampling.

    It is proportional to the sum over the clip's classes of 1 / (clips of that class), as in the
    AudioSet recipe of AST (Gong, Chung, Glass, Interspeech 2021; arXiv 2104.01778): in a
    single-label set all classes are drawn alike, and in a multi-label set the rarest class of a
    clip decides. Clips without any class count as a class of their own.

    Args:
        source: the clips.
        weights: of each clip `[n]`, such as those of the windows of a longer clip; 1 by default.
    """
    count = len(source.classes)
    labels = [clip.label or (count,) for clip in source.clips]
    owner = np.repeat(np.arange(len(labels)), [len(label) for label in labels])
    classes = np.array([c for label in labels for c in label], np.int64)
    each = np.ones(len(labels)) if weights is None else np.asarray(weights, np.float64)
    sizes = np.bincount(classes, each[owner], count + 1)
    shares = each * np.bincount(owner, 1 / sizes[classes], len(labels))
    return shares / shares.sum()
