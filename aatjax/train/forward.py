"""The forward pass: one function, and one compiled program for all models that are alike.

Validation, `aatjax.evaluate`, the classifier, the server, parity checks of exports, the doctor and
the reports call it. To compute something of a model other than its logits, pass a `read` function
defined at module level (or a frozen dataclass with `__call__`): equal ones share a program.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Integer, Num

from aatjax import ops, surgery
from aatjax.audio.fbank import count_frames
from aatjax.audio.frontend import FrontEnd
from aatjax.errors import UsageError
from aatjax.models.ast import AST
from aatjax.models.config import ASTConfig
from aatjax.models.tokens import average_tokens

ModelState = tuple[Any, Any, Any]
"""Trainable parameters, batch statistics and frozen parameters of a model."""

Reader = Callable[[AST, Any, Any], Any]
"""(model, log-mel `[b, t, f]`, valid frames `[b]`) -> arrays."""

DESCRIPTION = ("origin", "loaded", "labels", "statistics", "method")
"""Attributes of a model that no number depends on."""

PROGRAMS = 64  # compiled forward passes that are kept


@dataclasses.dataclass(frozen=True)
class BatchFrontEnd(FrontEnd):
    """The same front end, each device on its own clips: XLA would gather them for the FFT.

    In place of sounds it takes stored log-mel `[b, t, f]` too.
    """

    def features(
        self, audio: Num[Array, "b *s"], length: Integer[Array, " b"] | None = None
    ) -> jax.Array:
        if audio.ndim == 3:
            return audio
        return ops.over_batch(lambda clips, _: FrontEnd.features(self, *clips), (audio, length), ())

    @classmethod
    def for_batch(cls, frontend: FrontEnd, audio: Num[Array, "b *s"]) -> "BatchFrontEnd":
        """The front end at the length of a batch, which may be shorter (`data.buckets`)."""
        fields = dataclasses.asdict(frontend)
        frames = audio.shape[1] if audio.ndim == 3 else count_frames(audio.shape[1])
        return cls(**{**fields, "frames": frames})


def check_fit(
    config: ASTConfig, classes: int, frontend: FrontEnd, name: str = "the list of classes"
) -> None:
    """Refuse classes and a front end that do not fit a model's head and input.

    Raises:
        UsageError: the message says what to load the model with.
    """
    if classes != config.num_classes:
        raise UsageError(
            f"{name} has {classes} classes, the model's head {config.num_classes}: load it with "
            f"num_classes={classes}"
        )
    if (frontend.frames, frontend.mels) != (config.frames, config.mels):
        raise UsageError(
            f"the front end makes {frontend.frames} frames of {frontend.mels} mel bins, the model "
            f"takes {config.frames} of {config.mels}: load it with frames={frontend.frames}"
        )


def read_logits(model: AST, x: Float[Array, "b t f"], valid: Integer[Array, " b"]) -> jax.Array:
    """Return the logits `[b, c]`."""
    return model(x, valid)


def read_vectors(
    model: AST, x: Float[Array, "b t f"], valid: Integer[Array, " b"]
) -> tuple[Float[Array, "b c"], Float[Array, "b d"]]:
    """Return the logits and the mean patch token after the last LayerNorm."""
    config = model.config
    mask = model.embed.mask(valid) if config.mask_padding else None
    tokens = model.tokens(x, mask)
    patches = config.num_tokens - config.num_prefix  # behind any prompts
    logits = model.head(model.pool(tokens, mask))
    return logits, average_tokens(tokens, mask, tokens.shape[1] - patches)


def read_embedding(
    model: AST, x: Float[Array, "b t f"], valid: Integer[Array, " b"]
) -> Float[Array, "b d"]:
    """Return the mean patch token after the last LayerNorm."""
    return read_vectors(model, x, valid)[1]


@functools.lru_cache(16)
def make_inputs(frontend: FrontEnd) -> Any:
    """Return the jitted front end `(audio, length) -> normalised log-mel, valid frames`."""

    def run(audio: jax.Array, length: jax.Array) -> tuple[jax.Array, jax.Array]:
        front = BatchFrontEnd.for_batch(frontend, audio)
        return front(audio, length), front.count_frames(length)

    return jax.jit(run)


def split_model(model: AST) -> surgery.SplitModel[AST]:
    """Split a model so that models which compute the same have the same structure."""
    model = surgery.clone(model)
    for name in DESCRIPTION:
        setattr(model, name, None)
    model.eval()
    return surgery.split(model)


def make_forward(
    graphdef: Any, frontend: FrontEnd | None, read: Reader = read_logits, start: int | None = None
) -> Any:
    """Return the jitted forward pass `(state, audio, length) -> read(model, x, valid)`.

    Its arguments are a `ModelState`, clips `[b, s]` (or their log-mel before normalisation,
    `[b, t, f]`) and their valid samples `[b]`. Under
    `jax.set_mesh` the clips are split over the devices and the result is copied to all of them.

    Args:
        graphdef: the model's structure, from `split_model`.
        frontend: the log-mel front end; None where the clips are log-mel `[b, t, f]` already and
            their length is in frames.
        read: what to compute from the model in eval mode, log-mel and valid frames.
        start: block that the batch enters: its `audio` holds tokens `[b, n, d]`, and the result
            is the logits.
    """
    return _compile_forward(graphdef, frontend, read, start, ops.find_choice())


@functools.lru_cache(PROGRAMS)
def _compile_forward(
    graphdef: Any, frontend: FrontEnd | None, read: Reader, start: int | None, choice: Any
) -> Any:
    def forward(state: ModelState, audio: jax.Array, length: jax.Array) -> Any:
        model: AST = surgery.join(graphdef, *state)
        model.eval()
        x, valid = audio, length
        if start is not None and frontend is not None:
            valid = frontend.count_frames(length)
        elif frontend is not None:
            front = BatchFrontEnd.for_batch(frontend, audio)
            x, valid = front(audio, length), front.count_frames(length)
        found = read(model, x, valid) if start is None else model.run_from(x, valid, start)
        if jax.sharding.get_abstract_mesh().empty:
            return found
        return jax.lax.with_sharding_constraint(found, PartitionSpec())

    return jax.jit(forward)


def bind_forward(
    model: AST, frontend: FrontEnd | None, read: Reader = read_logits
) -> Callable[[Any, Any], Any]:
    """Return the forward pass of one model: `(audio, length) -> read(model, x, valid)`."""
    parts = split_model(model)
    forward = make_forward(parts.graphdef, frontend, read)
    state = (parts.trainable, parts.stats, parts.frozen)
    return lambda audio, length: forward(state, audio, length)
