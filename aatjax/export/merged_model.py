"""What is exported: the adapted model, folded into plain weights as far as its method allows."""

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
from aatjax.errors import UsageError
from aatjax.models.ast import AST, Pool
from aatjax.petl import Method, adapt, merge
from aatjax.train.adapter_file import TrainedAdapter
from aatjax.train.forward import bind_forward

Weights = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class Clips:
    """Sounds that a model and its export are both given.

    Attributes:
        names: what each is.
        audio: fitted clips `[n, s]`.
        length: their valid samples.
        features: their normalised log-mel `[n, t, f]`.
        valid: their sounding frames.
    """

    names: tuple[str, ...]
    audio: Int16[np.ndarray, "n s"]
    length: Int32[np.ndarray, " n"]
    features: Float[np.ndarray, "n t f"]
    valid: Int32[np.ndarray, " n"]

    @classmethod
    def of(
        cls, frontend: FrontEnd, names: Sequence[str], waveforms: Sequence[Int16[np.ndarray, " _"]]
    ) -> "Clips":
        """Brings sounds to the front end's length; of longer ones the beginning is taken."""
        fitted = [frontend.fit(waveform) for waveform in waveforms]
        audio = np.stack([clip for clip, _ in fitted])
        length = np.array([size for _, size in fitted], np.int32)
        with jax.default_matmul_precision("highest"):
            features = np.asarray(_features(frontend, audio, length))
        valid = np.asarray(frontend.count_frames(jax.numpy.asarray(length)), np.int32)
        return cls(tuple(names), audio, length, features, valid)

    @property
    def waveform(self) -> Float[np.ndarray, "n s"]:
        """The clips in [-1, 1)."""
        return self.audio.astype(np.float32) / 32768

    def __getitem__(self, rows: Any) -> "Clips":
        names = tuple(np.asarray(self.names, object)[rows])
        fields = (self.audio, self.length, self.features, self.valid)
        return Clips(names, *(field[rows] for field in fields))


@dataclasses.dataclass(frozen=True)
class Subject:
    """A trained adapter on its way into another format.

    Attributes:
        adapter: as it was loaded.
        adapted: the adapted model, computing in float32: what every export is measured by.
        served: the same function with what can be merged merged.
        plain: whether `served` is an AST and nothing more.
    """

    adapter: TrainedAdapter
    adapted: AST
    served: AST
    plain: bool

    @classmethod
    def of(cls, adapter: TrainedAdapter) -> "Subject":
        """Merges an adapter as far as its method allows."""
        # Names of folders may hold bytes that are no text and that no file of names can hold.
        classes = (name.encode("utf-8", "backslashreplace").decode() for name in adapter.classes)
        adapter = dataclasses.replace(adapter, classes=tuple(classes))
        model = _in_float32(adapter.model)
        merges = any(
            hasattr(module, "merge_into_base") for module in surgery.modules(model).values()
        )
        served = merge(model) if merges else surgery.clone(model)
        return cls(adapter, model, served, _is_plain(served))

    @property
    def frontend(self) -> FrontEnd:
        """The front end it was trained with."""
        return self.adapter.frontend

    @property
    def method(self) -> Method:
        """The adaptation method."""
        return cast(Method, self.adapter.model.method)

    @property
    def masks(self) -> bool:
        """Whether the model must be told how many frames are sound."""
        return self.served.config.mask_padding

    def logits(self, clips: Clips) -> Float[np.ndarray, "n c"]:
        """What the adapted model gives, one clip at a time, products in full precision."""
        return logits_of(self.adapted, clips)

    def forward(self) -> tuple[Callable[..., Array], dict[str, Array]]:
        """(weights, log-mel `[1, t, f]`, sounding frames `[1]`) -> logits `[1, c]`; the weights."""
        return forward_of(self.served)


def forward_of(model: AST) -> tuple[Callable[..., Array], dict[str, Array]]:
    """A model as a pure function of its parameters and statistics by path, and those."""
    shape = surgery.clone(model)
    arrays = surgery.arrays(model, nnx.Param) | surgery.arrays(model, nnx.BatchStat)

    def run(weights: Weights, x: Array, valid: Array) -> Array:
        whole = surgery.clone(shape)
        variables = surgery.variables(whole)
        for path, value in weights.items():
            variables[path].set_raw_value(value)
        return whole(x, valid)

    return run, arrays


def logits_of(model: AST, clips: Clips) -> Float[np.ndarray, "n c"]:
    """Logits `[n, c]` of a model, one clip at a time, products in full precision."""
    with jax.default_matmul_precision("highest"):
        forward = bind_forward(model, None)
        rows = [
            np.asarray(forward(clips.features[i][None], clips.valid[[i]]))
            for i in range(len(clips.names))
        ]
    return np.concatenate(rows)


@functools.partial(jax.jit, static_argnums=0)
def _features(frontend: FrontEnd, audio: Array, length: Array) -> Array:
    return frontend(audio, length)


def refuse(subject: Subject, what: str, reasons: list[str], instead: str) -> None:
    """Raises a UsageError where there are reasons."""
    if reasons:
        raise UsageError(
            f"{what} cannot hold this {subject.method.name} model: {'; '.join(reasons)}: {instead}"
        )


def not_plain(subject: Subject, instead: str) -> list[str]:
    """Why the model is not an AST and nothing more; empty if it is."""
    if subject.plain:
        return []
    return [
        f"what {subject.method.name} adds stays beside the frozen layers and cannot be merged "
        f"into them, and {instead} has no place for it"
    ]


def _in_float32(model: AST) -> AST:
    config = dataclasses.replace(model.config, dtype="float32", scan=False, remat=False)
    if config == model.config:
        return surgery.clone(model)
    method = cast(Method, model.method)
    whole: AST = nnx.eval_shape(lambda: adapt(AST(config, rngs=nnx.Rngs(0)), method))
    surgery.assign(whole, surgery.arrays(model), what="the model", complete=True)
    whole.origin, whole.method = model.origin, model.method
    return whole


def _is_plain(model: AST) -> bool:
    config = model.config
    if any(hasattr(module, surgery.BASE) for module in surgery.modules(model).values()):
        return False
    bare: AST = nnx.eval_shape(lambda: AST(config, rngs=nnx.Rngs(0)))
    return (
        set(surgery.variables(model)) == set(surgery.variables(bare))
        and type(model.pool) is Pool
        and model.pool.kind == bare.pool.kind
    )
