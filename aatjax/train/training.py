"""`Training`: the settings of a run's length, batches, loss and kept weights."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from aatjax import ops
from aatjax.data.sampling import Balance
from aatjax.errors import Range, Seed, UsageError, check_fields
from aatjax.train.step import Loss

Select = Literal["last", "best", "average"]
HeadInit = Literal["model", "zeros", "ridge"]


@dataclasses.dataclass(frozen=True)
class Training:
    """Length and batch of a run, and which weights are kept.

    Attributes:
        epochs: passes over the training clips; 0 leaves the model as it starts.
        batch_size: clips per step.
        eval_batch_size: clips per evaluation batch; None takes twice `batch_size`.
        loss: `ce` (one class per clip), `bce` (any number), or None to choose by the data.
        select: weights of the result: those of the `last` epoch, of the `best` epoch on the
            validation clips, or the `average` (exponential moving average).
        average: decay of the moving average per step, or None for none.
        head_init: where the head starts: as the `model` holds it (drawn, or that of the weights),
            at `zeros`, or as a `ridge` regression on the features that it reads
            (`aatjax.train.head_start`). The figures before the first step are those of epoch 0.
        ridge_suffices: with `head_init` ridge, its score on training clips left out (accuracy, or
            micro-F1) from which no step is made; None makes all.
        save_every: epochs between checkpoints.
        seed: seed of order, crops and augmentation.
        balance: whether rare classes count as much as frequent ones: not (`none`), since as many
            clips are drawn so that they come as often (`sampler`, as AST on AudioSet), or by
            weights of the clips in the `loss`.
        focal: exponent of the focal loss, which weighs down what is easy; 0 for none.
        label_smoothing: share of each target that is spread over the classes.
        accumulate: parts that a batch is computed in, to save memory; the update is the same.
        patience: epochs after which training ends: without a better score on the validation clips,
            or, where there are none, with every training clip right; None for all epochs.
        threads: reading threads; 0 reads in the main thread.
        max_skipped: steps of a run that may be skipped because their loss or gradient is not
            finite; the batch of each is written to the run folder. One more ends the run.
        cache_prefix: compute the blocks below the first trained one once, store their outputs in
            `data.cache` and train from there; refused where augmentation or an early adapter
            changes them.
        buckets: lengths in frames below the model's: each batch holds clips of one length, so that
            padding is not computed (`aatjax.data.buckets`); needs `model.mask_padding`.
        on_save_error: whether a checkpoint that cannot be written ends the run (`stop`).
        kernels: which implementations of attention and of the soft mixture run: the fastest of
            those that are timed once on this device (`measured`), those of a `fixed` rule, plain
            JAX (`none`), or names with commas (tpu, gpu, cudnn, tokamax); None takes the
            environment's AATJAX_KERNELS, or `measured`.
        deterministic: the same numbers in every run on a device of a kind: a GPU adds up in a
            fixed order, and without `kernels` nothing is timed and no library is called.
        profile: steps that are traced by `jax.profiler` into the run folder, such as `10:15`.
    """

    epochs: Annotated[int, Range(0)] = 20
    batch_size: Annotated[int, Range(1)] = 32
    eval_batch_size: Annotated[int, Range(1)] | None = None
    loss: Loss | None = None
    select: Select = "last"
    average: Annotated[float, Range(above=0, below=1)] | None = None
    head_init: HeadInit = "model"
    ridge_suffices: Annotated[float, Range(0, 1)] | None = None
    save_every: Annotated[int, Range(1)] = 1
    seed: Seed = 0
    balance: Balance = "none"
    focal: Annotated[float, Range(0, 10)] = 0.0
    label_smoothing: Annotated[float, Range(0, below=1)] = 0.0
    accumulate: Annotated[int, Range(1)] = 1
    patience: Annotated[int, Range(1)] | None = None
    threads: Annotated[int, Range(0)] = 2
    max_skipped: Annotated[int, Range(0)] = 0
    cache_prefix: bool = False
    buckets: tuple[int, ...] = ()
    on_save_error: Literal["stop", "continue"] = "stop"
    kernels: str | None = None
    deterministic: bool = False
    profile: str | None = None

    def __post_init__(self) -> None:
        if callable(self.loss):
            raise UsageError(
                "training.loss is 'ce' or 'bce': give a function to fit itself, fit(loss=function)"
            )
        check_fields(self, "training.")
        if self.batch_size % self.accumulate:
            raise UsageError(
                f"training.batch_size={self.batch_size} is not a multiple of "
                f"training.accumulate={self.accumulate}"
            )
        if self.kernels is not None:
            ops.check_kernels(self.kernels, "training.kernels")
        if self.profile is not None:
            parse_steps(self.profile)
        if self.select == "average" and self.average is None:
            raise UsageError("training.select='average' needs training.average, such as 0.999")


def parse_steps(text: str) -> tuple[int, int]:
    """Return the first and the last of the steps `FIRST:LAST`, counted from 1.

    Raises:
        UsageError: they are not two numbers, the second at least as large as the first.
    """
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise UsageError(f"training.profile={text!r}: give the first and last step, such as 10:15")
    return int(first), int(last)


def upgrade_training(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return stored fields of `Training` under their present names."""
    upgraded = dict(fields)
    if "sampling" in upgraded:
        value = upgraded.pop("sampling")
        names = {"uniform": "none", "balanced": "sampler"}
        upgraded.setdefault("balance", names.get(value, value) if isinstance(value, str) else value)
    return upgraded
