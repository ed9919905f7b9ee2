"""Log-mel of a run's clips, computed once and kept in the host's memory.

On CPU the front end takes a tenth or more of a training step. Where each clip is read alike in
every epoch and nothing changes its waveform, its features are the same each time: masks, noise and
roll are applied to them after. On accelerators the front end costs next to nothing, and the sound
is smaller to send.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from aatjax.audio.augment import Augment
from aatjax.audio.frontend import FrontEnd
from aatjax.data.pipeline import Crop, Fitted
from aatjax.data.source import Source


@dataclasses.dataclass(frozen=True)
class KeptLogMel:
    """The log-mel of the clips of a source, before normalisation; computed when first read.

    Each clip is computed alone, so that its values do not depend on the order of the clips.

    Attributes:
        compute: `[1, s]` samples and `[1]` valid samples to `[1, t, f]`.
        features: `[clips, t, f]`.
        length: valid samples of each clip, 0 where it was not read yet.
    """

    compute: Callable[[np.ndarray, np.ndarray], jax.Array]
    features: np.ndarray
    length: np.ndarray

    def read(self, index: int, fit: Callable[[], Fitted]) -> Fitted:
        """Return the log-mel of a clip and its valid samples."""
        if not self.length[index]:
            audio, length = fit()
            self.features[index] = self.compute(audio[None], np.array([length], np.int32))[0]
            self.length[index] = length  # last: another thread may read it now
        return self.features[index], int(self.length[index])


@dataclasses.dataclass(frozen=True)
class LogMelCache:
    """The log-mel of the clips of a run's sources.

    Attributes:
        frontend: log-mel front end.
        known: what is kept, by the fingerprint of the source.
    """

    frontend: FrontEnd
    known: dict[str, KeptLogMel] = dataclasses.field(default_factory=dict)

    def load(self, source: Source) -> KeptLogMel:
        """Return what is kept of a source, the same object at each call."""
        key, frontend = source.fingerprint(), self.frontend
        if key not in self.known:
            features = np.empty((len(source), frontend.frames, frontend.mels), np.float32)
            length = np.zeros(len(source), np.int32)
            self.known[key] = KeptLogMel(_compile(frontend), features, length)
        return self.known[key]


@functools.lru_cache(16)
def _compile(frontend: FrontEnd) -> Any:
    return jax.jit(frontend.features)


def is_read_alike(augment: Augment, mesh: Mesh, crop: Crop) -> bool:
    """Return whether a run on CPU has the same log-mel of each clip in every epoch.

    Args:
        augment: augmentation of training batches.
        mesh: the devices.
        crop: where long training clips are cut.
    """
    platforms = {device.platform for device in mesh.devices.flat}
    on_cpu = platforms == {"cpu"} and jax.process_count() == 1
    return on_cpu and augment.mixup == 0 and crop == "start"


def measure_log_mel(sources: Mapping[str, Source], frontend: FrontEnd) -> int:
    """Return the bytes of the log-mel of all clips."""
    return 4 * frontend.frames * frontend.mels * sum(map(len, sources.values()))
