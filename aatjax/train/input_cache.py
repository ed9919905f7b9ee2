"""The choice of what a run reads in place of its sounds.

Tokens that enter the first trained block, where the user asks for it or they fit in memory; or
log-mel; or nothing. Values are those of the sounds in each case.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from aatjax.audio.augment import Augment
from aatjax.audio.frontend import FrontEnd
from aatjax.data.pipeline import Crop
from aatjax.data.source import Source
from aatjax.errors import WriteError
from aatjax.models.ast import AST
from aatjax.petl.base import find_first_trained
from aatjax.train.forward import ModelState
from aatjax.train.log_mel_cache import LogMelCache, is_read_alike, measure_log_mel
from aatjax.train.prefix_cache import (
    PrefixCache,
    check_prefix,
    find_obstacle,
    make_prefix_key,
    measure_tokens,
)
from aatjax.train.training import Training

LIMIT = 2**30
"""Bytes that a run keeps in memory at most in place of the sounds: of log-mel 2,000 clips of 10
seconds, or 20,000 of one.
"""


def make_input_cache(
    model: AST,
    sources: Mapping[str, Source],
    training: Training,
    *,
    augment: Augment,
    frontend: FrontEnd,
    crop: Crop,
    mesh: Mesh,
    graphdef: Any,
    state: ModelState,
    folder: Path | None,
) -> PrefixCache | LogMelCache | None:
    """Return what replaces the sounds of a run, or None; tokens are computed before it returns.

    Args:
        model: the adapted model.
        sources: clips by part of the run, training clips as `train`.
        training: whether tokens are asked for, batch size.
        augment: augmentation of the training batches.
        frontend: log-mel front end.
        crop: where training clips longer than the input are cut.
        mesh: the devices.
        graphdef: the model's structure.
        state: its parameters, on the devices.
        folder: where tokens that were asked for are stored; None keeps them in memory. One that
            cannot be written costs only time: a warning says so.

    Raises:
        UsageError: tokens are asked for, and change during training.
    """
    has_log_mel = any(source.log_mel(0) is not None for source in sources.values())
    start = find_first_trained(model)
    if training.cache_prefix:
        longest, train = 0, sources["train"]
        if crop == "random" and not has_log_mel:
            longest = max(len(train.waveform(i)) for i in range(len(train)))
        start = check_prefix(model, augment, crop, longest, frontend.samples)
    else:
        folder = None
        if not is_read_alike(augment, mesh, crop):
            return None
        fixed = start and find_obstacle(model, augment, "start", 0, 0) is None
        clips = sum(map(len, sources.values()))
        if not start or not fixed or clips * measure_tokens(model, start) > LIMIT:
            fits = measure_log_mel(sources, frontend) <= LIMIT and not has_log_mel
            return LogMelCache(frontend) if fits else None
    cache = PrefixCache(
        graphdef,
        state,
        frontend,
        start,
        make_prefix_key(model, frontend, start),
        folder,
        model.config.dtype,
        training.batch_size,
        mesh,
    )
    try:
        _fill(cache, sources)
    except WriteError as error:  # costs only time
        fits = measure_tokens(model, start) * sum(map(len, sources.values())) <= LIMIT
        where = "kept in memory" if fits else "computed at every step"
        warnings.warn(f"{error}; until then tokens are {where}", stacklevel=2)
        if not fits:
            return None
        cache = dataclasses.replace(cache, folder=None)
        _fill(cache, sources)
    return cache


def _fill(cache: PrefixCache, sources: Mapping[str, Source]) -> None:
    with jax.set_mesh(cache.mesh):  # before the first step takes the memory of the state
        for source in sources.values():
            cache.load(source)
