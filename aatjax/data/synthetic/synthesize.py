"""Synthetic environmental sounds: a labelled data set that needs no download.

Fifty classes, each clip drawn with its own pitch, pace, timbre, number of events, room,
background noise, stray events, microphone and level. Forty classes are meant for pretraining and
ten others, with near neighbours among themselves and among the forty, for adaptation. Beside them
are spoken words of no language (`aatjax.data.synthetic.speech`), also for pretraining.
"""

import difflib
import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Int16

from aatjax.data.synthetic import creatures, nature, objects, tonal
from aatjax.data.synthetic.primitives import Samples, Take
from aatjax.data.synthetic.scene import record_scene
from aatjax.data.synthetic.speech import WORDS, say
from aatjax.errors import UsageError

# The order is part of what a seed means: the place of a sound seeds its random stream.
MAKERS: dict[str, Callable[[Take], Samples]] = {
    make.__name__.removesuffix("_ticks"): make
    for make in (
        *(nature.rain, nature.wind, nature.waves, nature.thunder, nature.fire),
        *(objects.clock_ticks, tonal.bell, tonal.siren, tonal.alarm, objects.helicopter),
        *(objects.engine, objects.chainsaw, nature.bark, nature.crow, nature.bird),
        *(nature.cricket, nature.frog, nature.drops, objects.knock, objects.steps),
        *(nature.glass, tonal.phone, tonal.horn, objects.applause, objects.typing),
        *(tonal.whistle, tonal.pluck, tonal.organ, tonal.flute, tonal.brass),
        *(creatures.cat, creatures.cow, creatures.sheep, creatures.rooster, creatures.hen),
        *(creatures.pig, creatures.baby, creatures.laugh, creatures.cough, creatures.sneeze),
        *(creatures.snore, creatures.vacuum, creatures.train, creatures.saw, creatures.creak),
        *(creatures.fireworks, creatures.pour, creatures.plane, creatures.washer, creatures.brush),
    )
}
"""Functions that draw a clean sound, at any level, for a take."""

SOUNDS: tuple[str, ...] = tuple(MAKERS)
"""The fifty class names, in a fixed order."""

TARGET_SOUNDS: tuple[str, ...] = (
    *("siren", "alarm", "whistle"),  # pitched signals: they differ in how the pitch moves
    *("bark", "crow", "frog"),  # calls: in length, roughness and pulses
    *("drops", "knock", "clock", "fire"),  # short hits: in rhythm and resonance
)
"""The ten classes kept for adaptation; none of them is in `PRETRAIN_SOUNDS`."""

PRETRAIN_SOUNDS: tuple[str, ...] = tuple(name for name in SOUNDS if name not in TARGET_SOUNDS)
"""The forty classes for pretraining."""

LOWEST_RATE = 4000


def synthesize(
    sound: str, seed: int, *, seconds: float = 2.0, rate: int = 16000
) -> Int16[np.ndarray, " s"]:
    """Return one clip of a class, the same bytes for the same arguments.

    Args:
        sound: one of `SOUNDS` or of `WORDS`.
        seed: which clip of the class: any whole number from 0 on.
        seconds: length of the clip.
        rate: sample rate in Hz, at least 4000. Another rate gives another clip, not the same one
            resampled.

    Returns:
        Mono 16-bit PCM, shape (round(seconds * rate),), with a peak of -30 to -3 dB full scale.

    Raises:
        UsageError: an unknown sound, a negative seed, or a length or rate out of range.
    """
    if sound not in MAKERS and sound not in WORDS:
        near = difflib.get_close_matches(sound, SOUNDS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(SOUNDS)}"
        raise UsageError(f"sound: unknown sound {sound!r}; {hint}")
    if seed < 0:
        raise UsageError(f"seed: {seed} is negative; use a whole number from 0 on")
    if rate < LOWEST_RATE:
        raise UsageError(f"rate: {rate} Hz is too low; use at least {LOWEST_RATE} Hz")
    size = round(seconds * rate) if math.isfinite(seconds) else 0
    if size < 1:
        raise UsageError(f"seconds: {seconds} is no length of a clip; use a number above 0")
    stream = np.random.SeedSequence([(*SOUNDS, *WORDS).index(sound), int(seed)])
    take = Take(np.random.Generator(np.random.PCG64(stream)), rate, size)
    clip = record_scene(take, MAKERS[sound](take) if sound in MAKERS else say(take, sound))
    return np.clip(np.rint(clip * 32767.0), -32768, 32767).astype(np.int16)
