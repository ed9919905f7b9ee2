"""The model of an export: an adapter merged into plain weights as far as its method allows."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int16, Int32

from aatjax import surgery
from aatjax.audio.frontend import FrontEnd
from aatjax.audio.windows import Window
from aatjax.inference.calibration import Calibration, read_calibration
from aatjax.models.ast import AST, make_abstract
from aatjax.petl import Method, adapt, merge
from aatjax.train.adapter_file import TrainedAdapter
from aatjax.train.forward import bind_forward


@dataclasses.dataclass(frozen=True)
class ParityClips:
    """Clips on which a model and its export are compared.

    Attributes:
        names: of the clips.
        audio: clips at the front end's length `[n, s]`.
        length: their valid samples.
        features: their normalised log-mel `[n, t, f]`.
        valid: their valid frames.
    """

    names: tuple[str, ...]
    audio: Int16[np.ndarray, "n s"]
    length: Int32[np.ndarray, " n"]
    features: Float[np.ndarray, "n t f"]
    valid: Int32[np.ndarray, " n"]

    @classmethod
    def from_waveforms(
        cls, frontend: FrontEnd, names: Sequence[str], waveforms: Sequence[Int16[np.ndarray, " _"]]
    ) -> "ParityClips":
        """Pad or cut waveforms to the front end's length."""
        audio, length = zip(*(frontend.fit(waveform) for waveform in waveforms), strict=True)
        return cls._compute(frontend, names, np.stack(audio), np.array(length, np.int32))

    @classmethod
    def _compute(
        cls, frontend: FrontEnd, names: Sequence[str], audio: np.ndarray, length: np.ndarray
    ) -> "ParityClips":
        with jax.default_matmul_precision("highest"):
            features = np.asarray(_compute_features(frontend, audio, length))
        valid = np.asarray(frontend.count_frames(jax.numpy.asarray(length)), np.int32)
        return cls(tuple(names), audio, length, features, valid)

    @classmethod
    def from_windows(
        cls, frontend: FrontEnd, sounds: Sequence[tuple[str, Sequence[Window]]]
    ) -> "ParityClips":
        """Take the windows of files, in order."""
        names = [name for name, windows in sounds for _ in windows]
        windows = [window for _, windows in sounds for window in windows]
        return cls._compute(
            frontend,
            names,
            np.stack([window.audio for window in windows]),
            np.array([window.length for window in windows], np.int32),
        )

    @property
    def waveform(self) -> Float[np.ndarray, "n s"]:
        """The clips in [-1, 1)."""
        return self.audio.astype(np.float32) / 32768

    def __getitem__(self, rows: Any) -> "ParityClips":
        names = tuple(np.asarray(self.names, object)[rows])
        fields = (self.audio, self.length, self.features, self.valid)
        return ParityClips(names, *(field[rows] for field in fields))


@dataclasses.dataclass(frozen=True)
class MergedModel:
    """A trained adapter on its way into another format.

    Attributes:
        adapter: as it was loaded.
        adapted: the adapted model in float32, the reference of every parity check; the temperature
            of its calibration is in its head, so its logits are calibrated.
        merged: the same function with the adapter merged as far as its method allows.
        is_plain: whether `merged` is an AST and nothing more.
        calibration: of the adapter, if it has one.
    """

    adapter: TrainedAdapter
    adapted: AST
    merged: AST
    is_plain: bool
    calibration: Calibration | None = None

    @classmethod
    def from_adapter(cls, adapter: TrainedAdapter) -> "MergedModel":
        """Merge an adapter as far as its method allows."""
        # Names of folders may hold bytes that are no text and that no file of names can hold.
        classes = (name.encode("utf-8", "backslashreplace").decode() for name in adapter.classes)
        adapter = dataclasses.replace(adapter, classes=tuple(classes))
        model = _cast_to_float32(adapter.model)
        calibration = read_calibration(adapter.info, len(adapter.classes))
        if calibration is not None:
            _fold_temperature(model, calibration.temperature)
        modules = surgery.modules(model).values()
        can_merge = any(hasattr(module, "merge_into_base") for module in modules)
        merged = merge(model) if can_merge else surgery.clone(model)
        return cls(adapter, model, merged, _is_plain(merged), calibration)

    @property
    def temperature(self) -> float:
        """The temperature in the head; 1 without calibration."""
        return 1.0 if self.calibration is None else self.calibration.temperature

    @property
    def frontend(self) -> FrontEnd:
        """The front end of training."""
        return self.adapter.frontend

    @property
    def method(self) -> Method:
        """The adaptation method."""
        return cast(Method, self.adapter.model.method)

    @property
    def masks_padding(self) -> bool:
        """Whether the logits depend on the number of valid frames."""
        return self.merged.config.mask_padding

    def split_weights(self) -> tuple[Callable[..., Array], dict[str, Array]]:
        """Return a pure function and its weights by path.

        The function maps (weights, log-mel `[1, t, f]`, valid frames `[1]`) to logits `[1, c]`.
        """
        shape = surgery.clone(self.merged)
        weights: dict[str, Array] = {}
        for kind in (nnx.Param, surgery.Frozen, nnx.BatchStat):
            weights |= surgery.arrays(self.merged, kind)

        def forward(weights: Mapping[str, Array], x: Array, valid: Array) -> Array:
            whole = surgery.clone(shape)
            variables = surgery.variables(whole)
            for path, value in weights.items():
                variables[path].set_raw_value(value)
            return whole(x, valid)

        return forward, weights


def compute_logits(model: AST, clips: ParityClips) -> Float[np.ndarray, "n c"]:
    """Return the logits `[n, c]`, one clip at a time, matrix products in full precision."""
    with jax.default_matmul_precision("highest"):
        forward = bind_forward(model, None)
        rows = [forward(clips.features[[i]], clips.valid[[i]]) for i in range(len(clips.names))]
        return np.concatenate([np.asarray(row) for row in rows])


@functools.partial(jax.jit, static_argnums=0)
def _compute_features(frontend: FrontEnd, audio: Array, length: Array) -> Array:
    return frontend(audio, length)


def _cast_to_float32(model: AST) -> AST:
    config = dataclasses.replace(model.config.without_execution(), dtype="float32")
    if config == model.config:
        return surgery.clone(model)
    method = cast(Method, model.method)
    whole: AST = nnx.eval_shape(lambda model: adapt(model, method), make_abstract(config))
    surgery.assign(whole, surgery.arrays(model), what="the model", complete=True)
    whole.origin, whole.method = model.origin, model.method
    return whole


def _fold_temperature(model: AST, temperature: float) -> None:
    """Divide the logits of a model by the temperature, in place."""
    for path, variable in surgery.variables(model).items():
        if path in ("head/linear/kernel", "head/linear/bias"):
            variable.set_raw_value(variable[...] / temperature)


def _is_plain(model: AST) -> bool:
    if any(hasattr(module, surgery.BASE) for module in surgery.modules(model).values()):
        return False
    bare = make_abstract(model.config)
    return (
        set(surgery.variables(model)) == set(surgery.variables(bare))
        and type(model.pool) is type(bare.pool)
        and model.pool.kind == bare.pool.kind
    )
