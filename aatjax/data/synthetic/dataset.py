"""`Synthetic`: a labelled set of sounds that are synthesized on demand."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int16

from aatjax.data.source import Clip, Reader, Source
from aatjax.data.synthetic.synthesize import TARGET_SOUNDS, synthesize
from aatjax.errors import UsageError


class Synthetic(Source):
    """Sounds made on demand: nothing on disk, the same for the same arguments anywhere.

    Clip k of a sound has one waveform per seed, whatever else is requested, so a training set
    `Synthetic(clips=40)` and a test set `Synthetic(clips=10, first=40)` never share a clip.

    Args:
        sounds: names of the classes, from `aatjax.data.synthetic.synthesize.SOUNDS`.
        clips: clips per class.
        seed: which stream of clips.
        seconds: length of each clip.
        first: number of the first clip of each class.

    Raises:
        UsageError: no sound, an unknown one, or a number out of range.
    """

    def __init__(
        self,
        sounds: Sequence[str] = TARGET_SOUNDS,
        clips: int = 20,
        seed: int = 0,
        seconds: float = 2.0,
        first: int = 0,
    ) -> None:
        if isinstance(sounds, str) or not sounds or clips < 1 or first < 0 or seed < 0:
            raise UsageError(
                f"Synthetic(sounds={sounds!r}, clips={clips}, seed={seed}, first={first}): give a "
                "list of sounds, one clip or more, and numbers that are not negative"
            )
        for sound in sounds:
            synthesize(sound, 0, seconds=min(seconds, 0.1))  # refuses unknown names at once
        made = [
            Clip(f"{sound}/{k:05d}", (label,), None)
            for label, sound in enumerate(sounds)
            for k in range(first, first + clips)
        ]
        super().__init__(made, sounds, name="synthetic", reader=SoundMaker(seed, seconds))


@dataclass(frozen=True)
class SoundMaker(Reader):
    """Synthesizes the clips of `Synthetic` from their ids."""

    seed: int
    seconds: float

    def read(self, clip: Clip) -> Int16[np.ndarray, " s"]:
        sound, _, _ = clip.id.partition("/")
        return synthesize(sound, self.number(clip), seconds=self.seconds)

    def key(self, clip: Clip) -> str:
        return f"synthetic {self.number(clip)} {self.seconds:g}"

    def number(self, clip: Clip) -> int:
        """Return the seed of a clip: 63 bits of a hash, so that nearby clips are unrelated."""
        digest = hashlib.sha256(f"{self.seed}/{clip.id}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1
