"""The optimiser of the two papers: AdamW on the trainable tree, with their schedules."""

import dataclasses
import functools
from typing import Annotated, Any, Literal

import jax
import optax

from aatjax.errors import Range, UsageError, check_fields
from aatjax.train.sharding import join_path

Positive = Annotated[float, Range(above=0)]
DEFAULT_RATE = 1e-3  # where there is no method to take it from
Decay = Annotated[float, Range(0, below=1)]


@dataclasses.dataclass(frozen=True)
class Optim:
    """AdamW and its schedule.

    `cosine` is Soft-MoA's and its sibling's (arXiv 2402.00828, 2312.03694): cosine to zero over
    all steps, updated every batch. `steps` is AAT's (arXiv 2401.10544): constant for
    `decay_start` epochs, then times `decay_rate` every `decay_every` epochs. `constant` stays.

    Attributes:
        lr: peak learning rate; None takes the method's (`petl.Method.rates`).
        schedule: `cosine`, `steps` or `constant`.
        warmup_steps: linear warm-up from 0 before the schedule.
        weight_decay: decoupled weight decay on the trainable tree; frozen weights have none.
        decay_mask: `all_trainable` (as both papers) or `no_bias_ln`: matrices only.
        b1, b2, eps: AdamW moments (AAT 0.9, 0.999, 1e-8; Soft-MoA 0.9, 0.98, 1e-6).
        clip: clip the global gradient norm at this value; None does not clip.
        decay_start, decay_rate, decay_every: the epochs of `steps`.
    """

    lr: Positive | None = None
    schedule: Literal["cosine", "steps", "constant"] = "cosine"
    warmup_steps: Annotated[int, Range(0)] = 0
    weight_decay: Annotated[float, Range(0)] = 0.1
    decay_mask: Literal["all_trainable", "no_bias_ln"] = "all_trainable"
    b1: Decay = 0.9
    b2: Decay = 0.98
    eps: Positive = 1e-6
    clip: Positive | None = None
    decay_start: Annotated[int, Range(1)] = 5
    decay_rate: Positive = 0.85
    decay_every: Annotated[int, Range(1)] = 1

    def __post_init__(self) -> None:
        check_fields(self, "optim.")

    @classmethod
    def aat(cls, lr: float = 1e-4) -> "Optim":
        """AAT's recipe for ESC-50: AdamW, weight decay 0.05, x0.85 per epoch from epoch 5."""
        return cls(lr=lr, schedule="steps", weight_decay=0.05, b2=0.999, eps=1e-8)

    @classmethod
    def soft_moa(cls, lr: float = 5e-3) -> "Optim":
        """Soft-MoA's recipe: AdamW (0.9, 0.98, 1e-6), weight decay 0.1, cosine to zero."""
        return cls(lr=lr)


def make_schedule(optim: Optim, *, steps_per_epoch: int, epochs: int) -> optax.Schedule:
    """Return the learning rate of a run by step; step 0 is the first update."""
    total = max(1, steps_per_epoch * epochs)
    lr = DEFAULT_RATE if optim.lr is None else optim.lr
    main = optax.constant_schedule(lr)
    if optim.schedule == "cosine":
        main = optax.cosine_decay_schedule(lr, max(1, total - optim.warmup_steps))
    if optim.schedule == "steps":
        every = range(optim.decay_start, max(epochs, optim.decay_start) + 1, optim.decay_every)
        # join_schedules counts from the end of the warm-up; the epochs are the run's.
        bounds: dict[int, float] = {}
        for epoch in every:
            step = max(0, epoch * steps_per_epoch - optim.warmup_steps)
            bounds[step] = bounds.get(step, 1.0) * optim.decay_rate
        main = optax.piecewise_constant_schedule(lr, bounds)
    if not optim.warmup_steps:
        return main
    warmup = optax.linear_schedule(0.0, lr, optim.warmup_steps)
    return optax.join_schedules([warmup, main], [optim.warmup_steps])


@functools.lru_cache(64)
def make_optimizer(
    optim: Optim, *, steps_per_epoch: int, epochs: int
) -> optax.GradientTransformation:
    """Return the optax chain for a trainable tree; its state has exactly that tree's leaves.

    Equal arguments give the same object, so that compiled steps are found again (`make_steps`).
    """
    clip = [] if optim.clip is None else [optax.clip_by_global_norm(optim.clip)]
    adamw = optax.adamw(
        make_schedule(optim, steps_per_epoch=steps_per_epoch, epochs=epochs),
        b1=optim.b1,
        b2=optim.b2,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        mask=None if optim.decay_mask == "all_trainable" else _mask_matrices,
    )
    return optax.chain(*clip, adamw)


def compute_updates(
    tx: optax.GradientTransformation, grads: Any, state: Any, trainable: Any
) -> tuple[Any, Any]:
    """Return the updates of a step and the next state of the optimizer.

    Raises:
        UsageError: it takes more than gradients and parameters, as line searches do.
    """
    try:
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies its step numbers
            return tx.update(grads, state, trainable)
    except TypeError as error:
        raise UsageError(
            f"fit: optim needs more than gradients and parameters ({error}): take another one"
        ) from error


def _mask_matrices(params: Any) -> Any:
    """Return True for every leaf that is neither a bias nor a LayerNorm scale."""

    def decays(path: Any, leaf: jax.Array) -> bool:
        name = join_path(path).rpartition("/")[2]
        return leaf.ndim > 1 and name not in ("bias", "scale") and not name.startswith("b_")

    return jax.tree_util.tree_map_with_path(decays, params)
