"""The golden sample: a synthetic sound and what the model of a file computes for it."""

import contextlib
import math
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from aatjax.audio.frontend import FrontEnd
from aatjax.data.synthetic.synthesize import synthesize
from aatjax.models.ast import AST
from aatjax.train.forward import bind_forward

GOLDEN: dict[str, Any] = {"sound": "siren", "seed": 0, "seconds": 1.0}
"""The sound; see `synthesize`."""

TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
"""Largest difference of a logit on another device or with other versions, see `find_limit`."""


def compute_golden_logits(
    model: AST, frontend: FrontEnd, *, sound: str, seed: int, seconds: float
) -> Float[np.ndarray, " c"]:
    """Return a model's logits `[c]` for a synthetic sound, matrix products in full precision."""
    clip = synthesize(sound, seed, seconds=seconds, rate=frontend.rate)
    audio, length = frontend.fit(clip)
    # On a CPU every precision is full: without the setting, predictions share this program.
    is_cpu = jax.default_backend() == "cpu"
    with contextlib.nullcontext() if is_cpu else jax.default_matmul_precision("highest"):
        forward = bind_forward(model, frontend)
        return np.asarray(forward(audio[None], np.array([length], np.int32)))[0]


def make_golden(model: AST, frontend: FrontEnd) -> dict[str, Any]:
    """Return the sample for the metadata; without logits where they are not finite."""
    logits = [float(f"{value:.7g}") for value in compute_golden_logits(model, frontend, **GOLDEN)]
    return {**GOLDEN, "logits": logits if all(map(math.isfinite, logits)) else None}


def find_limit(want: Float[np.ndarray, "*b c"], tolerance: float) -> float:
    """Return the largest allowed difference of a logit.

    Args:
        want: the expected logits.
        tolerance: in units of the largest logit, or of 1 if none is larger.
    """
    return tolerance * max(1.0, float(np.abs(want).max()))


def differs(model: AST, frontend: FrontEnd, golden: dict[str, Any] | None) -> float | None:
    """Return by how much a model's logits differ from those of a sample, if by more than allowed.

    None where they agree, and where there is no sample with finite logits.
    """
    if golden is None or golden["logits"] is None:
        return None
    want = np.asarray(golden["logits"], np.float32)
    sample = {name: golden[name] for name in GOLDEN}
    largest = np.abs(compute_golden_logits(model, frontend, **sample) - want).max()
    limit = find_limit(want, TOLERANCE[model.config.dtype])
    return None if largest <= limit else float(largest)
