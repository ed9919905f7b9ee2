"""`Classifier`: predictions for sound files of any length, from windows."""

import dataclasses
import math
import os
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import overload

import jax
import numpy as np
from jaxtyping import Float, Int16

from aatjax.audio.decode import decode_blocks
from aatjax.audio.frontend import FrontEnd
from aatjax.audio.scoring import Scoring, explain_unscored
from aatjax.audio.windows import RATE, Window, compute_step, cut_windows
from aatjax.convert.load import load, make_front_end
from aatjax.errors import DataError, UsageError, check_kind, check_names
from aatjax.inference.calibration import (
    Calibration,
    compute_probabilities,
    decide,
    read_calibration,
    select_names,
)
from aatjax.inference.prediction import Prediction, WindowLogits, WindowPrediction
from aatjax.models.ast import AST, check_model
from aatjax.train.adapter_file import ARTEFACT, TrainedAdapter, load_adapter, read_info
from aatjax.train.forward import bind_forward, read_logits, read_vectors

BATCH = 8
NO_AUDIO = np.zeros(0, np.int16)


def choose_batch_size(windows: int, largest: int) -> int:
    """Return 1 for one window, else `BATCH` doubled until they fit, at most `largest`."""
    return 1 if windows == 1 else min(largest, BATCH << ((windows - 1) // BATCH).bit_length())


class Classifier:
    """A model with its class names and front end, ready for sound files.

    Args:
        model: an AST.
        classes: class names in the order of the logits.
        frontend: the front end that the model was trained with.
        multi_label: sigmoid instead of softmax.
        calibration: fitted on validation clips; None for plain probabilities, without `possible`
            classes.
        scoring: how the score of a file is made of its windows, by default their mean.
    """

    def __init__(
        self,
        model: AST,
        classes: Sequence[str],
        frontend: FrontEnd | None = None,
        *,
        multi_label: bool = False,
        calibration: Calibration | None = None,
        scoring: Scoring | None = None,
    ) -> None:
        check_model(model, "Classifier")
        check_names("Classifier: classes", classes)
        self.model = model
        self.classes: tuple[str, ...] = tuple(classes)
        self.frontend: FrontEnd = frontend or make_front_end(model)
        self.multi_label = multi_label
        self.calibration = calibration
        self.scoring: Scoring = scoring or Scoring()
        config = model.config
        if len(self.classes) != config.num_classes:
            raise UsageError(
                f"{len(self.classes)} class names for a head of {config.num_classes} outputs: "
                "give one per output, in their order"
            )
        if (self.frontend.frames, self.frontend.mels) != (config.frames, config.mels):
            raise UsageError(
                f"the front end makes {self.frontend.frames} frames of {self.frontend.mels} mel "
                f"bins, the model takes {config.frames} of {config.mels}: give a matching one"
            )
        self._logits = bind_forward(model, self.frontend, read_logits)
        self._logits_and_vectors = bind_forward(model, self.frontend, read_vectors)

    @classmethod
    def load(
        cls, source: str | os.PathLike[str], *, base: str | os.PathLike[str] | None = None
    ) -> "Classifier":
        """Load an adapter file, the run folder of one, or weights with a head.

        Classes without names are numbered.

        Raises:
            DataError: a file that cannot be read (see `aatjax.load` and `load_adapter`).
        """
        if (Path(source) / ARTEFACT).is_file():
            source = Path(source) / ARTEFACT
        if Path(source).is_file() and read_info(source) is not None:
            adapter = load_adapter(source, base=base)
            try:
                return cls.from_adapter(adapter)
            except DataError as error:
                raise DataError(f"{source}: {error}") from error
        model = load(source)
        labels = model.labels or tuple(str(i) for i in range(model.config.num_classes))
        return cls(model, labels)

    @classmethod
    def from_adapter(cls, adapter: TrainedAdapter) -> "Classifier":
        """Return the classifier of a loaded adapter.

        Raises:
            DataError: its calibration is damaged.
        """
        return cls(
            adapter.model,
            adapter.classes,
            adapter.frontend,
            multi_label=adapter.multi_label,
            calibration=read_calibration(adapter.info, len(adapter.classes)),
            scoring=adapter.scoring,
        )

    def find_hop(self, hop: float | None) -> float | None:
        """Return the seconds between window starts: those given, else those of the scoring."""
        return self.scoring.hop if hop is None else hop

    def run(
        self, windows: Sequence[Window], batch: int = BATCH, *, vectors: bool = False
    ) -> tuple[jax.Array, ...]:
        """Run the model on up to `batch` windows, padded to one of few batch sizes.

        Each size is compiled: 1, which the golden sample of an adapter has too, and `BATCH` doubled
        until the windows fit, at most `batch`.

        Returns:
            Logits `[b, c]`; with `vectors` also the mean patch token after the last LayerNorm
            `[b, d]`. Rows after those of the windows are padding.
        """
        size = choose_batch_size(len(windows), batch)
        full = [*windows, *[windows[-1]] * (size - len(windows))]
        audio = np.stack([window.audio for window in full])
        length = np.array([window.length for window in full], np.int32)
        if vectors:
            return self._logits_and_vectors(audio, length)
        return (self._logits(audio, length),)

    def calibrate(
        self, logits: Float[np.ndarray, "w c"]
    ) -> tuple[Float[np.ndarray, "w c"], Float[np.ndarray, "w c"]]:
        """Return calibrated probabilities and those at temperature 1."""
        scores = np.asarray(logits, np.float64)
        uncalibrated = compute_probabilities(scores, 1.0, self.multi_label)
        if self.calibration is None:
            return uncalibrated, uncalibrated
        temperature = self.calibration.temperature
        return compute_probabilities(scores, temperature, self.multi_label), uncalibrated

    def compute_window_logits(
        self, blocks: Iterable[Int16[np.ndarray, " n"]], *, hop: float | None = None
    ) -> WindowLogits:
        """Return the logits of every window.

        Args:
            blocks: consecutive parts of a mono int16 waveform at 16 kHz.
            hop: seconds between window starts; by default those of the scoring.

        Raises:
            DataError: no samples.
        """
        rows: list[np.ndarray] = []
        kept: list[Window] = []
        step = compute_step(self.frontend.samples, self.find_hop(hop))
        windows = cut_windows(blocks, self.frontend, step)
        while group := list(islice(windows, BATCH)):
            rows.append(np.asarray(self.run(group)[0])[: len(group)])
            kept += [dataclasses.replace(window, audio=NO_AUDIO) for window in group]
        if not rows:
            raise DataError("the waveform has no samples")
        return WindowLogits.from_windows(np.concatenate(rows), kept)

    def summarize(self, path: str, windows: WindowLogits, notes: Sequence[str] = ()) -> Prediction:
        """Return the prediction for a file from its windows.

        Args:
            path: the file.
            windows: logits and spans of its windows.
            notes: what is odd with it.
        """
        logits, sounding = windows.logits, ~windows.silent
        probabilities, _ = self.calibrate(logits)
        shown = tuple(
            WindowPrediction(start / RATE, end / RATE, tuple(map(float, row)))
            for (start, end), row in zip(windows.spans, probabilities, strict=True)
        )
        reason = explain_unscored(windows.spans[-1][1], bool(sounding.any()))
        if reason is not None:
            nothing = (math.nan,) * len(self.classes)
            prediction = Prediction(path, None, math.nan, nothing, self.classes, shown)
            prediction = dataclasses.replace(prediction, notes=tuple(notes), reason=reason)
            if self.calibration is None:
                return prediction
            coverage = self.calibration.coverage
            return dataclasses.replace(
                prediction, given=(), possible=self.classes, coverage=coverage
            )
        lengths = np.array([end - start for start, end in windows.spans])
        pooled = self.scoring.pool(logits[sounding], lengths[sounding], self.multi_label)
        (clip,), (uncalibrated,) = self.calibrate(pooled[None])
        best = int(clip.argmax())
        prediction = Prediction(
            path,
            self.classes[best],
            float(clip[best]),
            tuple(map(float, clip)),
            self.classes,
            shown,
            notes=tuple(notes),
        )
        if self.calibration is None:
            return prediction
        sets = decide(clip[None], uncalibrated[None], self.calibration)
        order = np.argsort(-clip, kind="stable")
        ranked = [self.classes[i] for i in order]
        return dataclasses.replace(
            prediction,
            given=select_names(sets.given[0][order], ranked),
            possible=select_names(sets.possible[0][order], ranked),
            coverage=self.calibration.coverage,
        )

    def predict_waveform(
        self, waveform: Int16[np.ndarray, " s"], *, path: str = "", hop: float | None = None
    ) -> Prediction:
        """Return the prediction for mono int16 samples at 16 kHz."""
        return self.summarize(path, self.compute_window_logits([waveform], hop=hop))

    def predict(self, path: str | os.PathLike[str], *, hop: float | None = None) -> Prediction:
        """Return the prediction for a sound file.

        Raises:
            AudioError: the file cannot be decoded; the message names it and the reason.
        """
        notes: list[str] = []
        blocks = decode_blocks(path, channels=self.frontend.channels, notes=notes)
        windows = self.compute_window_logits(blocks, hop=hop)
        return self.summarize(os.fspath(path), windows, notes)


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
    """Predict the classes of sound files of any length.

    Args:
        source: an adapter file, weights with a head, or a Classifier.
        files: one path, or several.
        base: the backbone's weights if they moved since training.
        hop: seconds between window starts; by default windows do not overlap.

    Returns:
        One Prediction for one path, a list for several.
    """
    advice = "give an adapter file, weights with a head, or aatjax.Classifier(model, classes)"
    check_kind("predict: source", source, str | os.PathLike | Classifier, advice)
    classifier = source if isinstance(source, Classifier) else Classifier.load(source, base=base)
    if isinstance(files, str | os.PathLike):
        return classifier.predict(files, hop=hop)
    return [classifier.predict(path, hop=hop) for path in files]
