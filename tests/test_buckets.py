"""Length buckets: the same function of every clip, one program per length, every clip once."""

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from slow_cases import mark_slow

from aatjax import petl, surgery
from aatjax.audio.augment import Augment
from aatjax.audio.frontend import FrontEnd
from aatjax.data.buckets import sort_into_buckets
from aatjax.data.pipeline import count_batches, make_train_batches
from aatjax.data.source import Clip, Reader, Source
from aatjax.errors import UsageError
from aatjax.io.signals import InterruptedRunError
from aatjax.models.ast import AST
from aatjax.models.config import ASTConfig
from aatjax.train.evaluation import evaluate
from aatjax.train.fit import FitContext, fit
from aatjax.train.optim import Optim
from aatjax.train.step import make_steps
from aatjax.train.training import Training

FRAMES, SHORT = 96, (32, 56)
CONFIG = dataclasses.replace(
    ASTConfig.size("tiny", frames=FRAMES, num_classes=3), depth=2, mask_padding=True
)
FRONTEND = FrontEnd(frames=FRAMES)
FEATURES = jax.jit(lambda frontend, audio, length: frontend(audio, length), static_argnums=0)
SIZES = [400, 3000, 4720, 5200, 5201, 8000, 9160, 9161, 12000, 15600, 16000, 40000]


@dataclasses.dataclass(frozen=True)
class Noise(Reader):
    """Clip k is noise of a length and loudness of its own."""

    def read(self, clip: Clip) -> np.ndarray:
        rng = np.random.default_rng(int(clip.id))
        size = SIZES[int(clip.id) % len(SIZES)]
        return (3000 * rng.normal(size=size)).astype(np.int16)

    def key(self, clip: Clip) -> str:
        return clip.id


def noises(count: int, first: int = 0) -> Source:
    clips = (Clip(str(i), (i % 3,), None) for i in range(first, first + count))
    return Source(clips, ("a", "b", "c"), name="noise", reader=Noise())


def sort_clips(source: Source):
    return sort_into_buckets(source, FRONTEND, (*SHORT, FRAMES), patch=16, stride=10)


def make_model(method: petl.Method, **changes: Any) -> AST:
    config = dataclasses.replace(CONFIG, **changes)
    model = petl.adapt(AST(config, rngs=nnx.Rngs(0)), method)
    rng = np.random.default_rng(1)
    for variable in surgery.variables(model).values():
        if isinstance(variable, nnx.Param):  # not the identity that they start as
            noise = 0.1 * rng.normal(size=variable[...].shape)
            variable[...] = variable[...] + noise.astype(variable[...].dtype)
    return model


def train(method: petl.Method, *, folder: Path | None = None, beat: Any = None, **changes: Any):
    config = dataclasses.replace(CONFIG, depth=1)
    training = Training(epochs=2, batch_size=4, threads=0, **changes)
    return fit(
        petl.adapt(AST(config, rngs=nnx.Rngs(0)), method),
        noises(24),
        noises(9, 100),
        valid=noises(7, 200),
        training=training,
        optim=Optim(lr=1e-3),
        augment=Augment(noise=True),
        frontend=FRONTEND,
        show=None,
        run_dir=folder,
        context=FitContext(beat=beat or FitContext.beat),
    )


def test_a_clip_is_in_the_shortest_bucket_of_its_last_sounding_patch() -> None:
    source = noises(len(SIZES))
    where = {int(i): b.frontend.frames for b in sort_clips(source) for i in b.rows}
    for i, size in enumerate(SIZES):
        frames = min(FRAMES, max(1, 1 + (size - 400) // 160))
        starts = [s for s in range(0, FRAMES - 15, 10) if s < frames]
        assert where[i] == min(f for f in (*SHORT, FRAMES) if f >= starts[-1] + 16), size
    assert set(where.values()) == {32, 56, 96}


METHODS = (
    petl.Linear(),
    petl.SoftMoA(num_experts=2),
    petl.DenseMoA(num_experts=2),
    petl.LoRA(),
    petl.AAT(),
    petl.Adapter(),
    petl.Prompt(),
    petl.Prefix(),
)


@pytest.mark.parametrize(
    ("method", "pool"),
    mark_slow(
        [*((method, "cls_dist") for method in METHODS), (METHODS[1], "mean_patches")],
        lambda method, pool: method.name in ("linear", "soft_moa", "prompt"),
    ),
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_logits_are_the_same_in_any_bucket(method: petl.Method, pool: str) -> None:
    source = noises(len(SIZES))
    model = make_model(method, pool=pool)
    forward = jax.jit(lambda x, valid: model(x, valid))
    lengths = (*SHORT, FRAMES) if method.name == "linear" else (SHORT[1], FRAMES)
    buckets = sort_into_buckets(source, FRONTEND, lengths, patch=16, stride=10)
    assert sum(len(bucket.rows) for bucket in buckets) == len(SIZES)
    for bucket in buckets:
        logits = []
        for frontend in (bucket.frontend, FRONTEND):
            rows = np.resize(bucket.rows, len(SIZES))  # one batch size: one program per length
            fitted = [frontend.fit(source.waveform(int(i))) for i in rows]
            audio = jnp.asarray(np.stack([clip for clip, _ in fitted]))
            length = jnp.asarray([size for _, size in fitted])
            logits.append(forward(FEATURES(frontend, audio, length), frontend.count_frames(length)))
        np.testing.assert_allclose(logits[0], logits[1], rtol=1e-5, atol=1e-5)


def test_every_clip_once_an_epoch_in_batches_of_one_length() -> None:
    source = noises(29)
    buckets = sort_clips(source)
    options: dict[str, Any] = {"batch_size": 4, "epochs": 2, "seed": 3, "threads": 0}
    batches = list(make_train_batches(source, FRONTEND, **options, buckets=buckets))
    each = count_batches(source, 4, buckets)
    assert len(batches) == 2 * each
    orders = []
    for epoch in (batches[:each], batches[each:]):
        seen = [int(i) for b in epoch for i, w in zip(b["index"], b["weight"], strict=True) if w]
        assert sorted(seen) == list(range(29))
        orders.append((seen, [b["audio"].shape[1] for b in epoch]))
    assert orders[0][0] != orders[1][0] and orders[0][1] != orders[1][1]
    room = {int(i): bucket.frontend.samples for bucket in buckets for i in bucket.rows}
    for batch in batches:
        assert {room[int(i)] for i in batch["index"]} == {batch["audio"].shape[1]}
    iterator = iter(make_train_batches(source, FRONTEND, **options, buckets=buckets))
    for _ in range(5):
        next(iterator)
    again = iter(make_train_batches(source, FRONTEND, **options, buckets=buckets))
    again.set_state(iterator.get_state())
    for one, two in zip(iterator, again, strict=True):
        np.testing.assert_array_equal(one["index"], two["index"])
        np.testing.assert_array_equal(one["audio"], two["audio"])


@pytest.fixture(scope="module")
def straight() -> Any:
    """A run with buckets, and the steps that it compiled."""
    made: list[Any] = []

    def record(*args: Any, **kwargs: Any) -> Any:
        made.append(make_steps(*args, **kwargs))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aatjax.train.fit.make_steps", record)
        return train(petl.LoRA(), buckets=SHORT), made


def test_one_program_per_length(straight: Any) -> None:
    (steps,) = straight[1]
    assert steps.train._cache_size() == 3
    assert steps.forward._cache_size() == 3


def test_metrics_are_those_at_the_whole_length(straight: Any) -> None:
    run, _ = straight
    again = evaluate(run.model, noises(9, 100), FRONTEND)
    assert run.test is not None and run.test.clips == 8  # one is a frame long
    np.testing.assert_array_equal(again.confusion, run.test.confusion)
    assert (again.mean_ap, again.macro_auc) == (run.test.mean_ap, run.test.macro_auc)


def test_stopped_and_resumed_equals_a_straight_run(straight: Any, tmp_path: Path) -> None:
    run, _ = straight
    middle = run.history[-1]["step"] // 4  # inside the first epoch

    def stop(phase: str, step: int) -> None:
        if phase == "step" and step == middle:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(InterruptedRunError):
        train(petl.LoRA(), buckets=SHORT, folder=tmp_path, beat=stop)
    resumed = train(petl.LoRA(), buckets=SHORT, folder=tmp_path)
    one, two = surgery.arrays(run.model), surgery.arrays(resumed.model)
    for path in one:
        np.testing.assert_array_equal(one[path], two[path], err_msg=path)


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        (petl.LoRA(), {"buckets": (8,)}, "8 frames is not between a patch's 16"),
        (petl.LoRA(), {"buckets": (200,)}, "200 frames is not between"),
        (petl.Adapter(block="convpass"), {"buckets": SHORT}, "convolves along the tokens"),
        (petl.Adapter(block="conformer"), {"buckets": SHORT}, "convolves along the tokens"),
        (petl.Linear(), {"buckets": SHORT, "cache_prefix": True}, "cache_prefix"),
    ],
)
def test_what_would_change_the_result_is_refused(
    method: petl.Method, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        train(method, **changes)


def test_unmasked_padding_is_refused() -> None:
    plain = dataclasses.replace(CONFIG, mask_padding=False)
    training = Training(buckets=SHORT)
    with pytest.raises(UsageError, match="mask_padding"):
        fit(
            petl.adapt(AST(plain, rngs=nnx.Rngs(0)), petl.Linear()),
            noises(6),
            training=training,
            frontend=FRONTEND,
            show=None,
        )
    repeat = dataclasses.replace(FRONTEND, pad="repeat")
    with pytest.raises(UsageError, match=r"data\.pad='repeat'"):
        fit(
            petl.adapt(AST(CONFIG, rngs=nnx.Rngs(0)), petl.Linear()),
            noises(6),
            training=training,
            frontend=repeat,
            show=None,
        )
