"""Stored outputs of the frozen blocks below the first trained one.

The tokens that enter that block are the same in every epoch as long as nothing below is trained and
the sound is the same each time. They are stored in the compute type, one row per clip, keyed by the
weights below, the front end, the compute type and the sounds, and training begins from them.
"""

from __future__ import annotations

import dataclasses
import shutil
import tokenize
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from aatjax import surgery
from aatjax.audio.augment import Augment
from aatjax.audio.frontend import FrontEnd
from aatjax.data.pipeline import Crop, StoredTokens, make_eval_batches
from aatjax.data.source import Source
from aatjax.errors import DataError, UsageError, WriteError
from aatjax.io.atomic import write_folder
from aatjax.io.digest import hash_arrays, hash_bytes
from aatjax.io.json_file import read_json, write_json
from aatjax.io.progress import track
from aatjax.models.ast import AST
from aatjax.petl.base import find_first_trained
from aatjax.train.distributed import is_distributed
from aatjax.train.forward import ModelState, make_forward
from aatjax.train.sharding import fetch, put_batch

DAMAGED = (OSError, ValueError, EOFError, SyntaxError, tokenize.TokenError)
"""What NumPy raises for a damaged .npy file."""


def check_prefix(model: AST, augment: Augment, crop: Crop, longest: int, samples: int) -> int:
    """Return the block that training begins at where its inputs can be stored.

    Args:
        model: the adapted model.
        augment: augmentation of the training batches.
        crop: where long clips are cut.
        longest: samples of the longest training clip.
        samples: samples that the model takes.

    Raises:
        UsageError: the tokens change during training; the message says why and what to change.
    """
    if reason := find_obstacle(model, augment, crop, longest, samples):
        raise UsageError(f"training.cache_prefix: {reason}, or set training.cache_prefix=false")
    start = find_first_trained(model)
    assert start is not None
    return start


def find_obstacle(
    model: AST, augment: Augment, crop: Crop, longest: int, samples: int
) -> str | None:
    """Return why the tokens cannot be stored, and what to change; arguments as `check_prefix`."""
    start = find_first_trained(model)
    none = Augment()
    changed = [
        field.name
        for field in dataclasses.fields(augment)
        if getattr(augment, field.name) != getattr(none, field.name)
    ]
    reasons = {
        "the method trains parameters before the first block": start is None,
        "block 0 is trained or adapted, so every token changes at each step: adapt the last "
        "blocks only (petl.blocks=last3)": start == 0,
        f"augmentation changes the sounds every epoch ({', '.join(changed)}): switch it off": (
            augment != none
        ),
        "data.windows='random' cuts long clips at another place every epoch: use "
        "data.windows='every'": crop == "random" and longest > samples,
        "it needs a single process": is_distributed(),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


@dataclasses.dataclass(frozen=True)
class TokensBefore:
    """Reads the tokens that enter block `start` from a model, see `make_forward`."""

    start: int

    def __call__(self, model: AST, x: jax.Array, valid: jax.Array) -> jax.Array:
        return model.run_until(x, valid, self.start)


@dataclasses.dataclass(frozen=True)
class PrefixCache:
    """The part of a model below a block, and its stored outputs.

    Attributes:
        graphdef: the model's structure.
        state: its parameters, on the devices.
        frontend: log-mel front end.
        start: the first block that is not part of it. Behind the last block, only the tokens that
            are pooled are stored.
        key: identifies weights, front end and compute type, see `make_prefix_key`.
        folder: where tokens are stored; None keeps them in memory.
        dtype: the compute type, in which tokens are stored.
        batch: clips per batch: that of training, so that tokens are computed in the same shape.
        mesh: the devices.
        known: tokens that were loaded or computed, by what they depend on.
    """

    graphdef: Any
    state: ModelState
    frontend: FrontEnd
    start: int
    key: str
    folder: Path | None
    dtype: str
    batch: int
    mesh: Mesh
    known: dict[str, StoredTokens] = dataclasses.field(default_factory=dict)

    def load(self, source: Source) -> StoredTokens:
        """Return the tokens of a source's clips; compute and store them where they are missing.

        Raises:
            WriteError: they cannot be written.
        """
        digest = hash_bytes(f"{self.key} {source.fingerprint()}")[:32]
        if digest not in self.known:
            self.known[digest] = self._find(source, digest)
        return self.known[digest]

    def _find(self, source: Source, digest: str) -> StoredTokens:
        if self.folder is None:
            return self._compute(source, np.empty)
        place = self.folder / digest
        if (found := _read(place)) is not None:
            return found
        try:
            write_folder(place, lambda folder: self._store(source, folder))
        except WriteError as error:
            if (found := _read(place)) is not None:  # another run stored the same tokens first
                return found
            raise WriteError(
                f"{error}; choose another folder (--data.cache) or set training.cache_prefix=false"
            ) from error
        found = _read(place)
        assert found is not None
        return found

    def _store(self, source: Source, folder: Path) -> None:
        def allocate(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
            # .npy files do not know bfloat16: its bits are stored.
            plain = np.dtype(np.uint16) if dtype == jnp.bfloat16 else dtype
            return np.lib.format.open_memmap(folder / "tokens.npy", "w+", plain, shape)

        stored = self._compute(source, allocate)
        np.save(folder / "length.npy", stored.length)
        stored.tokens.flush()  # pyright: ignore[reportAttributeAccessIssue]
        digest = hash_arrays({"tokens": stored.tokens, "length": stored.length})
        write_json(folder / "about.json", {"dtype": self.dtype, "sha256": digest})

    def _compute(
        self, source: Source, allocate: Callable[[tuple[int, ...], np.dtype], np.ndarray]
    ) -> StoredTokens:
        """Return the tokens and valid samples of every clip, in an array that `allocate` makes."""
        forward = make_forward(self.graphdef, self.frontend, TokensBefore(self.start))
        dtype = jnp.dtype(self.dtype)
        tokens: np.ndarray | None = None
        length = np.zeros(len(source), np.int32)
        done = 0
        batches = make_eval_batches(source, self.frontend, batch_size=self.batch)
        for rows in track(batches, "tokens", len(source), self.batch):
            kept = int((rows["weight"] > 0).sum())
            given = {name: rows[name] for name in ("audio", "length")}
            batch = put_batch(given, self.mesh, self.batch)
            out = fetch(forward(self.state, batch["audio"], batch["length"]))[:kept]
            if tokens is None:
                tokens = allocate((len(source), *out.shape[1:]), dtype)
            tokens[done : done + kept] = out.astype(dtype).view(tokens.dtype)
            length[done : done + kept] = rows["length"][:kept]
            done += kept
        assert tokens is not None
        return StoredTokens(tokens, length)


def measure_tokens(model: AST, start: int) -> int:
    """Return the bytes of the tokens of one clip that enter a block, in the compute type."""
    config = model.config
    x = jax.ShapeDtypeStruct((1, config.frames, config.mels), jnp.float32)
    found = nnx.eval_shape(lambda model, x: model.run_until(x, None, start), model, x)
    return found.size * found.dtype.itemsize


def make_prefix_key(model: AST, frontend: FrontEnd, start: int) -> str:
    """Return a digest of what stored tokens depend on, except the sounds."""
    weights = {}
    for path, value in surgery.arrays(model).items():
        part, _, rest = path.partition("/")
        if part == "embed" or (part == "blocks" and int(rest.partition("/")[0]) < start):
            weights[path] = value
    frontend_and_config = f"{frontend} {start} {model.config}"
    return hash_bytes(f"{frontend_and_config} {hash_arrays(weights)}")


def _read(place: Path) -> StoredTokens | None:
    """Return stored tokens, or None where there are none or damaged ones, which are removed."""
    if not place.is_dir():
        return None
    try:
        about = read_json(place / "about.json")
        tokens = np.load(place / "tokens.npy", mmap_mode="r")
        length = np.load(place / "length.npy", mmap_mode="r")
        if about["sha256"] != hash_arrays({"tokens": tokens, "length": length}):
            raise ValueError("its checksum does not match")
        return StoredTokens(tokens.view(jnp.dtype(about["dtype"])), length)
    except (*DAMAGED, KeyError, TypeError, DataError) as error:
        warnings.warn(f"{place}: damaged ({error}); computed again", stacklevel=2)
        shutil.rmtree(place, ignore_errors=True)
        return None
