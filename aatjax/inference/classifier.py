"""Predictions for sound files of any length, by windows."""

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, overload

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, Int16

from aatjax import surgery
from aatjax.audio.decode import decode_blocks
from aatjax.audio.frontend import FrontEnd
from aatjax.audio.waveform import AudioError
from aatjax.convert.load import load, make_front_end
from aatjax.errors import DataError, UsageError
from aatjax.inference.calibration import Calibration, decide, read_calibration, select_names
from aatjax.models.ast import AST
from aatjax.models.tokens import average_tokens
from aatjax.train.adapter_file import load_adapter, read_info

RATE = 16000
BATCH = 8
KEEP = "pass truncated='keep' to use the rest"


@dataclasses.dataclass(frozen=True)
class Window:
    """Class probabilities of one stretch of a file, from `start` to `end` in seconds."""

    start: float
    end: float
    probabilities: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a model hears in one file.

    Attributes:
        path: the file.
        label: the most probable class.
        probability: its probability.
        probabilities: probability of every class, averaged over the windows by their length.
        classes: class names.
        windows: the same for each window.
        given: of a multi-label task, the classes above their thresholds; else the label alone.
        possible: classes among which the true ones are with probability `coverage`, the most


        coverage: see `possible`.

    The probabilities are calibrated, and the last three there, where the adapter was trained with
    validation clips; otherwise they are None.
    """

    path: str
    label: str
    probability: float
    probabilities: tuple[float, ...]
    classes: tuple[str, ...]
    windows: tuple[Window, ...]
    given: tuple[str, ...] | None = None
    possible: tuple[str, ...] | None = None
    coverage: float | None = None

    @property
    def unsure(self) -> bool | None:
        """Whether more classes are possible than are given; None where that is not known."""
        if self.possible is None or self.given is None:
            return None
        return set(self.possible) > set(self.given)

    def top(self, count: int = 5) -> list[tuple[str, float]]:
        """The most probable classes with their probabilities."""
        order = np.argsort(self.probabilities)[::-1][:count]
        return [(self.classes[i], self.probabilities[i]) for i in order]

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; what validation clips tell is left out where there were none."""
        decided: dict[str, Any] = {}
        if self.given is not None and self.possible is not None:
            decided = {
                "given": list(self.given),
                "unsure": self.unsure,
                "possible": list(self.possible),
                "coverage": self.coverage,
            }
        return {
            "path": self.path,
            "label": self.label,
            "probability": self.probability,
            **decided,
            "probabilities": dict(zip(self.classes, self.probabilities, strict=True)),
            "windows": [
                {
                    "start": window.start,
                    "end": window.end,
                    "label": self.classes[int(np.argmax(window.probabilities))],
                    "probability": max(window.probabilities),
                }
                for window in self.windows
            ],
        }

    def __str__(self) -> str:
        return f"{self.path}: {self.label} ({self.probability:.3f})"


class Classifier:
    """A model with its class names and front end, ready for sound files.

    Args:
        model: an AST.
        classes: class names in the order of the logits.
        frontend: the front end that the model was trained with.
        multi_label: sigmoid instead of softmax.
        calibration: what validation clips told of how far the logits can be trusted; None for
            nothing: plain probabilities, no `possible` classes.
    """

    def __init__(
        self,
        model: AST,
        classes: Sequence[str],
        frontend: FrontEnd | None = None,
        *,
        multi_label: bool = False,
        calibration: Calibration | None = None,
    ) -> None:
        self.model = model
        self.classes = tuple(classes)
        self.frontend = frontend or make_front_end(model)
        self.multi_label = multi_label
        self.calibration = calibration
        config = model.config
        if len(self.classes) != config.num_classes:
            raise UsageError(
                f"{len(self.classes)} class names for a head of {config.num_classes} outputs: "
                "give one for each output, in their order"
            )
        if (self.frontend.frames, self.frontend.mels) != (config.frames, config.mels):
            raise UsageError(
                f"the front end makes {self.frontend.frames} frames of {self.frontend.mels} mel "
                f"bins, the model takes {config.frames} of {config.mels}: give one that fits"
            )
        parts = surgery.split(model)
        state = nnx.merge_state(parts.trainable, parts.stats, parts.frozen)

        temperature = 1.0 if calibration is None else calibration.temperature

        def outputs(
            state: Any, audio: jax.Array, length: jax.Array, vectors: bool
        ) -> tuple[jax.Array, ...]:
            whole = nnx.merge(parts.graphdef, state, copy=True)
            features, valid = self.frontend(audio, length), self.frontend.count_frames(length)
            more: tuple[jax.Array, ...] = ()
            if vectors:
                mask = whole.embed.mask(valid) if config.mask_padding else None
                tokens = whole.tokens(features, mask)
                logits = whole.head(whole.pool(tokens, mask))
                patches = config.num_tokens - config.num_prefix  # behind any prompts
                more = (average_tokens(tokens, mask, tokens.shape[1] - patches),)
            else:
                logits = whole(features, valid)
            link = jax.nn.sigmoid if multi_label else jax.nn.softmax
            return (link(logits / temperature), link(logits), *more)

        compiled = jax.jit(outputs, static_argnums=3)
        self._outputs: Callable[[np.ndarray, np.ndarray, bool], tuple[jax.Array, ...]] = (
            lambda audio, length, vectors: compiled(state, audio, length, vectors)
        )

    @classmethod
    def load(
        cls, source: str | os.PathLike[str], *, base: str | os.PathLike[str] | None = None
    ) -> "Classifier":
        """From an adapter file, or from weights whose head names its classes.

        Raises:
            UsageError: weights without class names.
            DataError: a file that cannot be read (see `aatjax.load` and `load_adapter`).
        """
        if Path(source).is_file() and read_info(source) is not None:
            adapter = load_adapter(source, base=base)
            try:
                calibration = read_calibration(adapter.info, len(adapter.classes))
            except DataError as error:
                raise DataError(f"{source}: {error}") from error
            return cls(
                adapter.model,
                adapter.classes,
                adapter.frontend,
                multi_label=adapter.multi_label,
                calibration=calibration,
            )
        model = load(source)
        labels = model.labels or tuple(str(i) for i in range(model.config.num_classes))
        return cls(model, labels)

    def window_probabilities(
        self, waveform: Int16[np.ndarray, " s"], *, hop: float | None = None
    ) -> tuple[Float[np.ndarray, "w c"], list[tuple[int, int]]]:
        """Probabilities `[w, c]` of every window, and its first and last sample.

        Args:
            waveform: mono int16 at 16 kHz.
            hop: seconds between window starts; by default windows do not overlap. The last
                window is shorter than the others where the length does not divide.
        """
        probabilities, _, spans = self._windows([waveform], hop)
        return probabilities, spans

    def run(
        self, windows: Sequence["Cut"], batch: int = BATCH, *, vectors: bool = False
    ) -> tuple[jax.Array, ...]:
        """The model on up to `batch` windows, as one batch of that size.

        Returns:
            Calibrated probabilities `[batch, c]` and those at temperature 1; with `vectors` also
            the mean patch token after the last LayerNorm `[batch, d]`. The rows after those of
            the windows mean nothing.
        """
        full = [*windows, *[windows[-1]] * (batch - len(windows))]
        audio = np.stack([window.audio for window in full])
        length = np.array([window.length for window in full], np.int32)
        return self._outputs(audio, length, vectors)

    def _windows(
        self, blocks: Iterable[Int16[np.ndarray, " s"]], hop: float | None
    ) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]:
        """Calibrated probabilities, those at temperature 1, and the span of every window."""
        rows: list[list[np.ndarray]] = []
        spans: list[tuple[int, int]] = []
        windows = cut(blocks, self.frontend, step_of(self.frontend, hop))
        while group := list(islice(windows, BATCH)):
            rows.append([np.asarray(part)[: len(group)] for part in self.run(group)])
            spans += [window.span for window in group]
        if not rows:
            raise DataError("the waveform has no samples")
        found, plain = (np.concatenate(part) for part in zip(*rows, strict=True))
        return found, plain, spans

    def predict_waveform(
        self, waveform: Int16[np.ndarray, " s"], *, path: str = "", hop: float | None = None
    ) -> Prediction:
        """Prediction for mono int16 samples at 16 kHz."""
        return self.summary(path, *self._windows([waveform], hop))

    def summary(
        self,
        path: str,
        probabilities: Float[np.ndarray, "w c"],
        plain: Float[np.ndarray, "w c"],
        spans: Sequence[tuple[int, int]],
    ) -> Prediction:
        """Prediction for a file from its windows.

        Args:
            path: the file.
            probabilities: calibrated, one row a window.
            plain: those at temperature 1.
            spans: first and last sample of each window.
        """
        lengths = np.array([end - start for start, end in spans], float)
        mean = (probabilities * lengths[:, None]).sum(0) / lengths.sum()
        best = int(mean.argmax())
        windows = tuple(
            Window(start / RATE, end / RATE, tuple(map(float, row)))
            for (start, end), row in zip(spans, probabilities, strict=True)
        )
        prediction = Prediction(
            path,
            self.classes[best],
            float(mean[best]),
            tuple(map(float, mean)),
            self.classes,
            windows,
        )
        if self.calibration is None:
            return prediction
        plain = (plain * lengths[:, None]).sum(0) / lengths.sum()
        applied = decide(mean[None], plain[None], self.calibration)
        order = np.argsort(-mean, kind="stable")
        ranked = [self.classes[i] for i in order]
        return dataclasses.replace(
            prediction,
            given=select_names(applied.given[0][order], ranked),
            possible=select_names(applied.possible[0][order], ranked),
            coverage=self.calibration.coverage,
        )

    def predict(self, path: str | os.PathLike[str], *, hop: float | None = None) -> Prediction:
        """Prediction for a sound file.

        Raises:
            AudioError: the file cannot be decoded; the message names it and the reason.
        """
        try:
            windows = self._windows(decode_blocks(path, channels=self.frontend.channels), hop)
        except AudioError as error:
            if error.reason == "truncated" and error.__cause__ is None:  # there is a rest
                raise AudioError(error.reason, f"{error}; {KEEP}") from error
            raise
        return self.summary(os.fspath(path), *windows)


@dataclasses.dataclass(frozen=True)
class Cut:
    """A window as the model takes it.

    Attributes:
        audio: `frontend.samples` int16 samples at 16 kHz.
        length: how many of them are valid.
        span: first and last sample, counted from the start of the file.
    """

    audio: Int16[np.ndarray, " s"]
    length: int
    span: tuple[int, int]


def step_of(frontend: FrontEnd, hop: float | None) -> int:
    """Samples between window starts for `hop` seconds; None: windows do not overlap.

    Raises:
        UsageError: a hop that is not at least one sample.
    """
    if hop is None:
        return frontend.samples
    if not (math.isfinite(hop) and round(hop * RATE) >= 1):
        raise UsageError(f"hop={hop} must be a number of seconds above 0")
    return round(hop * RATE)


def cut(blocks: Iterable[Int16[np.ndarray, " n"]], frontend: FrontEnd, step: int) -> Iterator[Cut]:
    """Windows of a waveform that comes in blocks; no more of it is held than a window and a block.

    Windows start every `step` samples, as long as the one before left something unheard. The last
    is shorter than the others where the length does not divide.
    """
    size = frontend.samples
    held = np.zeros(0, np.int16)
    parts: list[np.ndarray] = []
    first = start = total = 0  # samples: of what is held, of the next window, seen so far
    for block in blocks:
        parts.append(block)
        total += len(block)
        if start + size > total:
            continue
        held, parts = np.concatenate([held, *parts]), []
        while start + size <= total:
            audio, length = frontend.fit(held[start - first :][:size])
            yield Cut(audio, length, (start, start + size))
            start += step
        past = min(start, total) - first
        held, first = held[past:].copy(), first + past
    if total > start and (start == 0 or start - step + size < total):
        held = np.concatenate([held, *parts])
        audio, length = frontend.fit(held[start - first :])
        yield Cut(audio, length, (start, total))


@overload
def predict(
    source: str | os.PathLike[str] | Classifier,
    files: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    hop: float | None = None,
) -> Prediction: ...
@overload
def predict(
    source: str | os.PathLike[str] | Classifier,
    files: list[Path] | list[str],
    *,
    base: str | os.PathLike[str] | None = None,
    hop: float | None = None,
) -> list[Prediction]: ...
def predict(
    source: str | os.PathLike[str] | Classifier,
    files: str | os.PathLike[str] | list[Path] | list[str],
    *,
    base: str | os.PathLike[str] | None = None,
    hop: float | None = None,
) -> Prediction | list[Prediction]:
    """What a trained adapter hears in sound files of any length.

    Args:
        source: an adapter file, weights with a head, or a Classifier.
        files: one path, or several.
        base: the backbone's weights where they are not where they were in training.
        hop: seconds between windows; by default they do not overlap.

    Returns:
        One Prediction for one path, a list for several.
    """
    classifier = source if isinstance(source, Classifier) else Classifier.load(source, base=base)
    if isinstance(files, str | os.PathLike):
        return classifier.predict(files, hop=hop)
    return [classifier.predict(path, hop=hop) for path in files]
