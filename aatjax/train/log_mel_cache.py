"""Log-mel features of a run's clips, computed once and kept in the host's memory.

On CPU the front end takes a tenth or more of a training step. Where each clip is read alike in
every epoch and nothing changes its waveform, its features are the same each time: masks, noise and
roll are applied to them after. On accelerators the front end costs next to nothing, and the sound
is smaller to send.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from aatjax.audio.augment import Augment
from aatjax.audio.frontend import FrontEnd
from aatjax.data.pipeline import Crop, StoredTokens, make_eval_batches
from aatjax.data.source import Source
from aatjax.train.forward import BatchFrontEnd
from aatjax.train.sharding import fetch, put_batch

LIMIT = 2**30
"""Bytes that a run keeps at most in place of the sounds: of log-mel 2,000 clips of 10 seconds, or
20,000 of one.
"""


@dataclasses.dataclass(frozen=True)
class LogMelCache:
    """The log-mel of the clips of a run's sources, before normalisation.

    Attributes:
        frontend: log-mel front end.
        batch: clips per batch in which they are computed.
        mesh: the devices.
        known: features by the fingerprint of their source.
    """

    frontend: FrontEnd
    batch: int
    mesh: Mesh
    known: dict[str, StoredTokens] = dataclasses.field(default_factory=dict)

    def load(self, source: Source) -> StoredTokens:
        """Return the features of a source's clips; they are computed by the first call."""
        key = source.fingerprint()
        if key not in self.known:
            self.known[key] = self._compute(source)
        return self.known[key]

    def _compute(self, source: Source) -> StoredTokens:
        frontend = self.frontend
        features = np.empty((len(source), frontend.frames, frontend.mels), np.float32)
        length = np.empty(len(source), np.int32)
        done = 0
        for rows in make_eval_batches(source, frontend, batch_size=self.batch):
            kept = int((rows["weight"] > 0).sum())
            given = {name: rows[name] for name in ("audio", "length")}
            batch = put_batch(given, self.mesh, self.batch)
            found = fetch(_compile(frontend)(batch["audio"], batch["length"]))
            features[done : done + kept] = found[:kept]
            length[done : done + kept] = rows["length"][:kept]
            done += kept
        return StoredTokens(features, length)


@functools.lru_cache(16)
def _compile(frontend: FrontEnd) -> Any:
    return jax.jit(BatchFrontEnd(**dataclasses.asdict(frontend)).features)


def is_read_alike(
    sources: Mapping[str, Source],
    frontend: FrontEnd,
    augment: Augment,
    mesh: Mesh,
    crop: Crop,
) -> bool:
    """Return whether a run on CPU has the same log-mel of each clip in every epoch.

    Args:
        sources: the run's clips; those of `train` may be cropped and augmented.
        frontend: log-mel front end.
        augment: augmentation of training batches.
        mesh: the devices.
        crop: where long training clips are cut.
    """
    platforms = {device.platform for device in mesh.devices.flat}
    if platforms != {"cpu"} or jax.process_count() > 1 or augment.mixup > 0:
        return False
    train = sources["train"]
    lengths = (len(train.waveform(index)) for index in range(len(train)))
    return crop == "start" or all(length <= frontend.samples for length in lengths)


def measure_log_mel(sources: Mapping[str, Source], frontend: FrontEnd) -> int:
    """Return the bytes of the log-mel of all clips."""
    return 4 * frontend.frames * frontend.mels * sum(map(len, sources.values()))
