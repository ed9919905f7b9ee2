"""The front end: clips of any length to normalised log-mel spectrograms of a fixed size.

On the host, `FrontEnd.fit` cuts or pads a clip to a fixed number of int16 samples; on the device,
the front end converts a batch of them to features. It is a frozen, hashable dataclass: a jitted
function can close over it or take it as a static argument. Every adapter file contains it as JSON.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int16, Integer

from aatjax.audio.fbank import FRAME, HOP, LOG_FLOOR, count_samples, log_mel, mel_bank
from aatjax.audio.waveform import Channels, check_channels
from aatjax.errors import DataError, Range, UsageError, check_fields
from aatjax.io.json_fields import check_json_fields

Pad = Literal["log_mel_zero", "silence", "repeat"]

PRESETS: Mapping[str, tuple[float, float]] = {
    "audioset": (-4.2677393, 4.5689974),
    "esc50": (-6.6268077, 5.358466),
    "us8k": (-4.451961, 3.9357858),
    "speech_commands_v1": (-6.785136, 5.496325),
    "speech_commands_v2": (-6.845978, 5.5654526),
    "openmic": (-4.0147066, 4.0522056),
    "gtzan": (-3.0708861, 3.4615202),
}
"""Mean and standard deviation of padded log-mel features, by data set."""

MOST: Mapping[str, float] = {"rate": 10**6, "mels": 2**12, "frames": 10**6, "channels": 2**10}
"""The largest sizes that a file may state: more is damage, or meant to fill the memory."""


@dataclasses.dataclass(frozen=True)
class FrontEnd:
    """Waveform to normalised log-mel spectrogram of a fixed size.

    Attributes:
        rate: sampling rate of the waveforms in Hz.
        mels: number of mel filters.
        frames: frames per spectrogram (10 ms each at 16 kHz).
        mean: mean of the features of the data set that the weights were trained on.
        std: standard deviation of those features. The normalised feature is
            (x - mean) / (2 std), so it has a standard deviation of 1/2.
        pad: padding of clips that are too short. 'log_mel_zero', as in AST: missing frames are 0.0
            in the log-mel domain before normalisation, which is a loud sound, not silence.
            'silence': the value of digital silence. 'repeat': the clip is repeated.
        channels: channel of a file: 'mean' of all, 'left', or an index from 0 on.
    """

    rate: Annotated[int, Range(1)] = 16000
    mels: Annotated[int, Range(1)] = 128
    frames: Annotated[int, Range(1)] = 1024
    mean: Annotated[float, Range()] = PRESETS["audioset"][0]
    std: Annotated[float, Range(above=0)] = PRESETS["audioset"][1]
    pad: Pad = "log_mel_zero"
    channels: Channels = "mean"

    def __post_init__(self) -> None:
        check_fields(self, "front end: ")
        check_channels(self.channels)
        mel_bank(self.rate, self.mels)

    @property
    def samples(self) -> int:
        """Samples of a fitted clip: the least number with `frames` frames."""
        return count_samples(self.frames)

    def fit(
        self, waveform: Int16[np.ndarray, " n"], *, start: int = 0
    ) -> tuple[Int16[np.ndarray, " s"], int]:
        """Cut or pad a clip on the host.

        Args:
            waveform: mono int16 samples at `rate`.
            start: first sample to use.

        Returns:
            The fitted clip of `samples` samples, and how many of them are valid: at least one
            frame, since a shorter clip counts as one zero-padded frame; all of them with
            pad='repeat'.

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
            raise DataError("front end: the clip has no samples; omit it")
        if not 0 <= start < waveform.size:
            raise UsageError(f"front end: start {start} is outside the {waveform.size} samples")
        taken = waveform[start : start + self.samples]
        if self.pad == "repeat":
            return np.resize(taken, self.samples), self.samples
        fitted = np.zeros(self.samples, np.int16)
        fitted[: taken.size] = taken
        return fitted, max(taken.size, FRAME)

    def fit_log_mel(
        self, x: Float[np.ndarray, "n f"], *, start: int = 0
    ) -> tuple[Float[np.ndarray, "t f"], int]:
        """Cut or pad log-mel before normalisation on the host, as `fit` does a waveform.

        Args:
            x: log-mel of one clip.
            start: first frame to use.

        Returns:
            `[frames, mels]`, and the samples that have as many frames as are valid.

        Raises:
            UsageError: other mel bins than `mels`.
        """
        if x.shape[1] != self.mels:
            raise UsageError(
                f"front end: log-mel of {x.shape[1]} mel bins, the front end has {self.mels}: load "
                f"the model with mels={x.shape[1]}"
            )
        taken = x[start : start + self.frames]
        if self.pad == "repeat":
            return np.resize(taken, (self.frames, self.mels)), self.samples
        fitted = np.full((self.frames, self.mels), self.fill, np.float32)
        fitted[: len(taken)] = taken
        return fitted, count_samples(len(taken))

    def features(
        self,
        audio: Int16[Array, "b s"] | Float[Array, "b s"],
        length: Integer[Array, " b"] | None = None,
    ) -> Float[Array, "b t f"]:
        """Compute log-mel features before normalisation; frames after the clip are `fill`.

        Args:
            audio: fitted clips of `samples` samples, int16 or float in [-1, 1].
            length: valid samples of each clip, by default all. A clip has 1 + (length - 400) // 160
                valid frames.

        Returns:
            Float32 features of shape (b, frames, mels).

        Raises:
            UsageError: clips that are not `samples` long.
        """
        if audio.shape[-1] != self.samples:
            raise UsageError(
                f"front end: clips have {audio.shape[-1]} samples, but {self.frames} frames need "
                f"{self.samples}; cut or pad them with FrontEnd.fit"
            )
        wave = audio.astype(jnp.float32)
        if audio.dtype == jnp.int16:
            wave = wave * (1.0 / 32768.0)
        x = log_mel(wave, rate=self.rate, mels=self.mels)
        if length is None:
            return x
        return jnp.where(self.valid_frames(length)[:, :, None], x, self.fill)

    @property
    def fill(self) -> float:
        """Log-mel value of a missing frame, before normalisation."""
        return 0.0 if self.pad == "log_mel_zero" else LOG_FLOOR

    def valid_frames(self, length: Integer[Array, " b"]) -> Bool[Array, "b t"]:
        """Return a mask `[b, frames]` of the frames that lie wholly inside `length` samples."""
        ends = FRAME + HOP * jnp.arange(self.frames, dtype=jnp.int32)
        return ends[None, :] <= jnp.maximum(jnp.asarray(length, jnp.int32), FRAME)[:, None]

    def count_frames(self, length: Integer[Array, " b"]) -> Integer[Array, " b"]:
        """Return the number of frames that lie wholly inside `length` samples."""
        return self.valid_frames(length).sum(axis=-1, dtype=jnp.int32)

    def normalise(self, x: Float[Array, "*b t f"]) -> Float[Array, "*b t f"]:
        """Return (x - mean) / (2 std), padding included (Gong et al. 2021)."""
        return (x - self.mean) / (2.0 * self.std)

    def __call__(
        self,
        audio: Int16[Array, "b s"] | Float[Array, "b s"],
        length: Integer[Array, " b"] | None = None,
    ) -> Float[Array, "b t f"]:
        """Compute normalised features: `normalise(features(audio, length))`."""
        return self.normalise(self.features(audio, length))

    def with_statistics(self, mean: float, std: float) -> "FrontEnd":
        """Return the same front end with another mean and standard deviation."""
        return dataclasses.replace(self, mean=float(mean), std=float(std))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "FrontEnd":
        """Rebuild a front end from `to_dict`; omitted fields have their defaults.

        Raises:
            UsageError: an unknown field, or a value of the wrong type or size.
        """
        check_json_fields("front end", values, cls, most=MOST)
        return cls(**values)


def compute_statistics(
    frontend: FrontEnd,
    batches: Iterable[tuple[Int16[np.ndarray, "_ s"], Integer[np.ndarray, " _"]]],
) -> tuple[float, float]:
    """Compute the normalisation statistics of a data set as AST does.

    Args:
        frontend: gives size and padding; its own mean and std are not used.
        batches: pairs of fitted clips and their valid samples.

    Returns:
        The average over batches of the mean, and of the unbiased standard deviation, of the
        padded, unnormalised features.

    Raises:
        DataError: there is no batch.
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
