"""The front end: clips of any length to fixed, normalised log-mel spectrograms.

On the host `FrontEnd.fit` brings a clip to a fixed number of int16 samples; on the device the
front end itself turns a batch of those into features. It is a frozen, hashable dataclass, so it
can be closed over or passed as a static argument of `jax.jit`, and it travels with every trained
adapter as a small JSON object.
"""

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int16, Integer

from aatjax.audio.fbank import FRAME, HOP, LOG_FLOOR, count_samples, log_mel, mel_bank
from aatjax.audio.waveform import Channels, check_channels
from aatjax.errors import DataError, UsageError

Pad = Literal["log_mel_zero", "silence", "repeat"]

PRESETS: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "audioset": (-4.2677393, 4.5689974),
        "esc50": (-6.6268077, 5.358466),
        "us8k": (-4.451961, 3.9357858),
        "speech_commands_v1": (-6.785136, 5.496325),
        "speech_commands_v2": (-6.845978, 5.5654526),
        "openmic": (-4.0147066, 4.0522056),
        "gtzan": (-3.0708861, 3.4615202),
    }
)
"""Mean and standard deviation of padded log-mel features, by data set."""


@dataclasses.dataclass(frozen=True)
class FrontEnd:
    """Waveform to normalised log-mel spectrogram of a fixed size.

    Attributes:
        rate: sampling rate of the waveforms in Hz.
        mels: number of mel filters.
        frames: number of frames of every spectrogram (10 ms each at 16 kHz).
        mean: mean of the features of the data set the weights were trained on.
        std: standard deviation of those features. The normalised feature is
            (x - mean) / (2 std), so it has a standard deviation of 1/2.
        pad: what fills a clip that is too short. 'log_mel_zero' as AST does: missing frames are
            0.0 in the log-mel domain before normalisation, which is as loud as a sound, not
            silence. 'silence': the value digital silence has. 'repeat': the clip is repeated.
        channels: which channel of a file is heard: 'mean' of all, 'left', or an index from 0 on.
    """

    rate: int = 16000
    mels: int = 128
    frames: int = 1024
    mean: float = PRESETS["audioset"][0]
    std: float = PRESETS["audioset"][1]
    pad: Pad = "log_mel_zero"
    channels: Channels = "mean"

    def __post_init__(self) -> None:
        for name in ("rate", "mels", "frames"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UsageError(f"front end: {name} is {value!r}, give a whole number above 0")
        for name in ("mean", "std"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise UsageError(f"front end: {name} is {value!r}, give a number")
            if not math.isfinite(value):
                raise UsageError(f"front end: {name} is {value!r}, give a finite number")
        if self.std <= 0:
            raise UsageError(f"front end: std is {self.std!r}, give a number above 0")
        if self.pad not in get_args(Pad):
            choices = ", ".join(map(repr, get_args(Pad)))
            raise UsageError(f"front end: pad is {self.pad!r}, give one of {choices}")
        check_channels(self.channels)
        mel_bank(self.rate, self.mels)

    @property
    def samples(self) -> int:
        """Samples of a fitted clip: exactly `frames` frames and no sample more."""
        return count_samples(self.frames)

    def fit(
        self, waveform: Int16[np.ndarray, " n"], *, start: int = 0
    ) -> tuple[Int16[np.ndarray, " s"], int]:
        """Cuts or fills a clip on the host.

        Args:
            waveform: mono int16 samples at `rate`.
            start: first sample to take.

        Returns:
            The fitted clip of `samples` samples, and how many of them are valid. A clip shorter
            than one frame counts as one frame of zero-padded sound, so one frame is always valid.
            With pad='repeat' what was taken is repeated and every sample is valid.

        Raises:
            UsageError: not one row of int16, or `start` outside the clip.
            DataError: the clip has no samples.
        """
        if waveform.ndim != 1 or waveform.dtype != np.int16:
            raise UsageError(
                f"front end: a clip is one row of int16, this is {waveform.dtype} of shape "
                f"{waveform.shape}; convert it with aatjax.audio.decode.as_waveform"
            )
        if waveform.size == 0:
            raise DataError("front end: the clip has no samples; leave it out")
        if not 0 <= start < waveform.size:
            raise UsageError(f"front end: start {start} is outside the {waveform.size} samples")
        taken = waveform[start : start + self.samples]
        if self.pad == "repeat":
            return np.resize(taken, self.samples), self.samples
        fitted = np.zeros(self.samples, np.int16)
        fitted[: taken.size] = taken
        return fitted, max(taken.size, FRAME)

    def features(
        self, audio: Int16[Array, "b s"] | Float[Array, "b s"], length: Integer[Array, " b"]
    ) -> Float[Array, "b t f"]:
        """Log-mel features before normalisation; frames past the clip hold the padding value.

        Args:
            audio: fitted clips of `samples` samples, int16 or float in [-1, 1].
            length: valid samples of each clip. A clip has 1 + (length - 400) // 160 valid frames.

        Returns:
            Float32 features of shape (b, frames, mels).

        Raises:
            UsageError: clips that are not `samples` long.
        """
        if audio.shape[-1] != self.samples:
            raise UsageError(
                f"front end: clips have {audio.shape[-1]} samples, but {self.frames} frames need "
                f"{self.samples}; bring them to length with FrontEnd.fit"
            )
        wave = audio.astype(jnp.float32)
        if audio.dtype == jnp.int16:
            wave = wave * (1.0 / 32768.0)
        x = log_mel(wave, rate=self.rate, mels=self.mels)
        return jnp.where(self.valid_frames(length)[:, :, None], x, self.fill)

    @property
    def fill(self) -> float:
        """Log-mel value of a missing frame, before normalisation."""
        return 0.0 if self.pad == "log_mel_zero" else LOG_FLOOR

    def valid_frames(self, length: Integer[Array, " b"]) -> Bool[Array, "b t"]:
        """Mask (b, frames) of the frames that lie wholly inside `length` samples."""
        ends = FRAME + HOP * jnp.arange(self.frames)
        return ends[None, :] <= jnp.maximum(length, FRAME)[:, None]

    def count_frames(self, length: Integer[Array, " b"]) -> Integer[Array, " b"]:
        """How many frames lie wholly inside `length` samples."""
        return self.valid_frames(length).sum(axis=-1)

    def normalise(self, x: Float[Array, "*b t f"]) -> Float[Array, "*b t f"]:
        """(x - mean) / (2 std), padding included (Gong et al. 2021)."""
        return (x - self.mean) / (2.0 * self.std)

    def __call__(
        self, audio: Int16[Array, "b s"] | Float[Array, "b s"], length: Integer[Array, " b"]
    ) -> Float[Array, "b t f"]:
        """Normalised features: `normalise(features(audio, length))`."""
        return self.normalise(self.features(audio, length))

    def with_statistics(self, mean: float, std: float) -> "FrontEnd":
        """The same front end with another mean and standard deviation."""
        return dataclasses.replace(self, mean=float(mean), std=float(std))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "FrontEnd":
        """Inverse of `to_dict`; absent fields take their defaults.

        Raises:
            UsageError: an unknown field or a value out of range.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                near = difflib.get_close_matches(str(name), names, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(names)}"
                raise UsageError(f"front end: unknown field {name!r}; {hint}")
        return cls(**values)


def compute_statistics(
    frontend: FrontEnd,
    batches: Iterable[tuple[Int16[np.ndarray, "_ s"], Integer[np.ndarray, " _"]]],
) -> tuple[float, float]:
    """Normalisation statistics of a data set, computed the way AST computes them.

    Args:
        frontend: gives size and padding; its own mean and std do not matter.
        batches: pairs of fitted clips and their valid samples.

    Returns:
        The average over batches of the mean, and of the unbiased standard deviation, of the
        padded, unnormalised features.

    Raises:
        DataError: no batch at all.
    """
    features = jax.jit(frontend.features)
    means, stds = [], []
    for audio, length in batches:
        x = np.asarray(features(jnp.asarray(audio), jnp.asarray(length)), np.float64)
        means.append(x.mean())
        stds.append(x.std(ddof=1))
    if not means:
        raise DataError("statistics: no batch of audio was given")
    return float(np.mean(means)), float(np.mean(stds))
