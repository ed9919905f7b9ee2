"""Frozen-prefix reuse: what lies below the first trained block is computed once and stored.

The tokens that enter that block are the same in every epoch as long as nothing below is trained and
the sound is the same each time. They are stored in the compute type, one row a clip, keyed by the
weights below, the front end, the compute type and the sounds, and training begins from there.
"""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from aatjax import surgery
from aatjax.audio.augment import Augment
from aatjax.audio.frontend import FrontEnd
from aatjax.data.pipeline import Crop, StoredTokens, make_eval_batches
from aatjax.data.source import Source
from aatjax.errors import DataError, UsageError, WriteError
from aatjax.io.atomic import write_folder
from aatjax.io.digest import hash_arrays, hash_bytes, hash_json
from aatjax.io.json_file import read_json, write_json
from aatjax.models.ast import AST
from aatjax.petl.base import find_first_trained
from aatjax.train.distributed import several
from aatjax.train.sharding import fetch, put_batch


def check_prefix(model: AST, augment: Augment, crop: Crop, longest: int, samples: int) -> int:
    """The block that training begins at, where a prefix may be reused.

    Args:
        model: the adapted model.
        augment: augmentation of the training batches.
        crop: where long clips are cut.
        longest: samples of the longest training clip.
        samples: samples that the model takes.

    Raises:
        UsageError: with the reason and what to change.
    """
    start = find_first_trained(model)
    if start is None:
        raise UsageError(
            "cache_prefix: the method trains something in front of the blocks, so nothing can be "
            "reused: leave training.cache_prefix out"
        )
    if start == 0:
        raise UsageError(
            "cache_prefix: block 0 is trained or adapted, so every token changes from step to "
            "step: adapt the last blocks only (petl.last_blocks), or leave training.cache_prefix"
        )
    if augment != Augment():
        changed = [
            field.name
            for field in dataclasses.fields(augment)
            if getattr(augment, field.name) != getattr(Augment(), field.name)
        ]
        raise UsageError(
            f"cache_prefix: augmentation makes other sounds every epoch ({', '.join(changed)}): "
            "switch it off, or leave training.cache_prefix"
        )
    if crop == "random" and longest > samples:
        raise UsageError(
            "cache_prefix: training.crop='random' cuts clips elsewhere every epoch: take "
            "crop='start', or leave training.cache_prefix"
        )
    if several():
        raise UsageError("cache_prefix: not with several processes: leave training.cache_prefix")
    return start


@dataclasses.dataclass(frozen=True)
class Prefix:
    """The part of a model below a block, and where its outputs are stored.

    Attributes:
        graphdef, trainable, stats, frozen: the split model, on the devices.
        frontend: log-mel front end.
        start: the first block that is not part of it.
        key: identifies weights, front end and compute type.
        folder: where tokens are stored; None keeps them in memory.
        known: what was stored or found, by what it depends on.
        dtype: the compute type, in which tokens are stored.
        batch: clips a step, that of training, so that the same program shape computes them.
        mesh: the devices.
    """

    graphdef: Any
    trainable: Any
    stats: Any
    frozen: Any
    frontend: FrontEnd
    start: int
    key: str
    folder: Path | None
    dtype: str
    batch: int
    mesh: Mesh
    known: dict[str, StoredTokens] = dataclasses.field(default_factory=dict)

    def of(self, source: Source) -> StoredTokens:
        """The stored tokens of a source, computed now where they are not there.

        Raises:
            WriteError: they cannot be written.
        """
        digest = hash_bytes(f"{self.key} {source.fingerprint()}")[:32]
        if digest not in self.known:
            place = None if self.folder is None else self.folder / digest
            found = None if place is None else _read(place)
            if found is None:
                found = self._computed(source, place)
            self.known[digest] = found
        return self.known[digest]

    def _computed(self, source: Source, place: Path | None) -> StoredTokens:
        if place is None:
            return self._compute(source, np.empty)
        dtype = jnp.dtype(self.dtype)

        def fill(folder: Path) -> None:
            stored = self._compute(
                source,
                lambda shape, dtype: np.lib.format.open_memmap(
                    folder / "tokens.npy", "w+", _plain(dtype), shape
                ),
            )
            np.save(folder / "length.npy", stored.length)
            getattr(stored.tokens, "flush", lambda: None)()
            digest = hash_arrays({"tokens": stored.tokens, "frames": stored.length})
            write_json(folder / "about.json", {"dtype": dtype.name, "sha256": digest})

        try:
            write_folder(place, fill)
        except WriteError as error:
            if not place.is_dir():  # else another run was first: the same tokens
                raise WriteError(
                    f"{error} (--data.cache), or omit training.cache_prefix"
                ) from error
        found = _read(place)
        assert found is not None
        return found

    def _compute(self, source: Source, make: Callable[[Any, Any], np.ndarray]) -> StoredTokens:
        before = self._program()
        dtype = jnp.dtype(self.dtype)
        tokens: np.ndarray | None = None
        frames = np.zeros(len(source), np.int32)
        at = 0
        for rows in make_eval_batches(source, self.frontend, batch_size=self.batch):
            kept = int((rows["weight"] > 0).sum())
            given = {name: rows[name] for name in ("audio", "length")}
            out = fetch(before(put_batch(given, self.mesh, self.batch)))[:kept]
            if tokens is None:
                tokens = make((len(source), *out.shape[1:]), dtype)
            tokens[at : at + kept] = out.astype(dtype).view(tokens.dtype)
            frames[at : at + kept] = rows["length"][:kept]
            at += kept
        assert tokens is not None
        return StoredTokens(tokens, frames)

    def _program(self) -> Callable[[Any], jax.Array]:
        def before(trainable: Any, stats: Any, frozen: Any, batch: Any) -> jax.Array:
            model: AST = surgery.join(self.graphdef, trainable, stats, frozen)
            model.eval()
            x = self.frontend(batch["audio"], batch["length"])
            return model.run_until(x, self.frontend.count_frames(batch["length"]), self.start)

        jitted = jax.jit(before)
        return lambda batch: jitted(self.trainable, self.stats, self.frozen, batch)


def prefix_key(model: AST, frontend: FrontEnd, start: int) -> str:
    """Identifies what the stored tokens depend on beside the sounds."""
    weights = {}
    for path, value in surgery.arrays(model).items():
        room, _, rest = path.partition("/")
        if room == "embed" or (room == "blocks" and int(rest.partition("/")[0]) < start):
            weights[path] = value
    about = {**dataclasses.asdict(frontend), "start": start, "config": repr(model.config)}
    about = {name: str(value) for name, value in about.items()}
    return hash_json({**about, "weights": hash_arrays(weights)})


def _plain(dtype: Any) -> np.dtype:
    """A type that .npy files know: bfloat16 is stored as its bits."""
    return np.dtype(np.uint16) if jnp.dtype(dtype) == jnp.bfloat16 else np.dtype(dtype)


def _read(place: Path) -> StoredTokens | None:
    """StoredTokens tokens; None where there are none, or damaged ones, which are computed anew."""
    if not place.is_dir():
        return None
    try:
        about = read_json(place / "about.json")
        tokens = np.load(place / "tokens.npy", mmap_mode="r")
        frames = np.load(place / "length.npy")
        if about["sha256"] != hash_arrays({"tokens": tokens, "frames": frames}):
            raise ValueError("the checksum does not fit")
        return StoredTokens(tokens.view(jnp.dtype(about["dtype"])), frames)
    except (OSError, ValueError, KeyError, TypeError, DataError) as error:
        warnings.warn(f"{place}: damaged ({error}); computed anew", stacklevel=2)
        shutil.rmtree(place, ignore_errors=True)
        return None
