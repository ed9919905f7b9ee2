"""Stated types under 64-bit JAX and strict promotion: nothing is widened, nothing fails."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from aatjax.audio.augment import Augment
from aatjax.audio.frontend import FrontEnd
from aatjax.petl.routing_weights import measure_entropy
from aatjax.train.optim import Optim, compute_updates, make_optimizer
from aatjax.train.step import count_labels
from aatjax_kernels.elementwise import plain_gelu

F32 = jnp.float32


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        yield


def test_augmentation_and_front_end_keep_float32() -> None:
    front = FrontEnd(frames=98)
    augment = Augment(
        mixup=0.5, freq_mask=4, time_mask=4, noise=True, roll=True, gain=3.0, spec_after_norm=True
    )
    audio = jax.ShapeDtypeStruct((4, front.samples), jnp.int16)
    length = jax.ShapeDtypeStruct((4,), jnp.int32)
    target, weight = jax.ShapeDtypeStruct((4, 3), F32), jax.ShapeDtypeStruct((4,), F32)
    found = jax.eval_shape(
        lambda key, *rest: augment(key, front, *rest),
        jax.random.key(0),
        audio,
        length,
        target,
        weight,
    )
    assert [one.dtype for one in found] == [F32, F32]
    assert jax.eval_shape(front.count_frames, length).dtype == jnp.int32


def test_steps_keep_the_types_of_their_arrays() -> None:
    logits, weight = jax.ShapeDtypeStruct((2, 3), F32), jax.ShapeDtypeStruct((2,), F32)
    counts = jax.eval_shape(lambda x, w: count_labels(x, x, None, w), logits, weight)
    assert {one.dtype for one in counts.values()} == {jnp.dtype(F32)}
    tx = make_optimizer(Optim(warmup_steps=2, clip=1.0), steps_per_epoch=3, epochs=2)
    found = jax.eval_shape(lambda x: compute_updates(tx, x, tx.init(x), x)[0], logits)
    assert found.dtype == F32
    narrow = jax.ShapeDtypeStruct((2,), jnp.bfloat16)
    assert jax.eval_shape(plain_gelu, narrow).dtype == jnp.bfloat16
    assert jax.eval_shape(lambda x: measure_entropy(x, (1,)), logits).dtype == F32


@pytest.mark.slow
def test_a_run_writes_float32_and_predicts(tmp_path: Path) -> None:
    settings = {"JAX_ENABLE_X64": "1", "JAX_NUMPY_DTYPE_PROMOTION": "strict"}
    config = Path(__file__).parent / "small_config.py"
    augment = ["--augment.mixup", "0.5", "--augment.freq-mask", "8", "--training.average", "0.9"]
    train = ["train", config, "--out", tmp_path, "--training.epochs", "1", *augment]
    for arguments in (train, ["eval", tmp_path / "adapter.safetensors"]):
        command = [sys.executable, "-m", "aatjax", *map(str, arguments)]
        done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    tensors = load_file(tmp_path / "adapter.safetensors")
    assert {value.dtype for value in tensors.values()} == {np.dtype(np.float32)}
