"""aatjax as a guest in other people's programs, each tried in a process of its own."""

import subprocess
import sys

import pytest


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


TRAIN = """
import aatjax
from aatjax import data, petl
sounds = data.Synthetic(("frog", "rain"), clips=2, seconds=0.5)
model = aatjax.adapt(aatjax.load("embedded", num_classes=2, frames=48), petl.Linear())
run = aatjax.fit(model, sounds, sounds, epochs=1, show=False)
"""

GUEST = (
    """
import logging, os, signal, sys, warnings
import jax
before = dict(os.environ), {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
config = {name: value for name, value in jax.config.values.items()}
import aatjax
aatjax.fit, aatjax.load, aatjax.predict, aatjax.petl, aatjax.data, aatjax.Classifier
for module in ("torch", "tensorflow", "librosa", "transformers", "matplotlib", "fastapi"):
    assert module not in sys.modules, module
assert not logging.getLogger().handlers
"""
    + TRAIN
    + """
assert not logging.getLogger().handlers, logging.getLogger().handlers
assert logging.getLogger().level == logging.WARNING
logging.basicConfig(level=logging.INFO, stream=sys.stdout, force=False)
logging.getLogger("mine").info("heard")
assert "torch" not in sys.modules and "tensorflow" not in sys.modules
after = dict(os.environ), {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
assert before == after
changed = {n for n, v in jax.config.values.items() if v != config.get(n)}
assert not changed, changed
import pathlib, tempfile
from aatjax.train.logging import MetricsWriter
with tempfile.TemporaryDirectory() as folder:
    writer = MetricsWriter(pathlib.Path(folder))
    writer.add({"step": 1, "loss": 0.5})
    writer.close()
    assert list(pathlib.Path(folder).glob("tensorboard/*")) and "torch" not in sys.modules
"""
)


def test_the_root_logger_signals_environment_and_configuration_are_left_alone():
    assert run(GUEST).splitlines() == ["INFO:mine:heard"]


DOUBLE = (
    """
import aatjax
import jax
jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp
"""
    + TRAIN
    + """
from aatjax import surgery
from aatjax.models.config import SIZES
SIZES["tiny"]["depth"] = 2
for method in (petl.SoftMoA(), petl.AAT(), petl.Adapter(block="conformer"), petl.Prompt(tokens=2),
               petl.TopKMoA(), petl.LoRA(), petl.Prefix(tokens=2)):
    for source in ("embedded", "random:tiny"):
        adapted = aatjax.adapt(aatjax.load(source, num_classes=2, frames=48), method)
        for path, value in surgery.arrays(adapted).items():
            assert value.dtype == jnp.float32, (path, value.dtype)
    logits = adapted(jnp.ones((1, 48, 128), jnp.float32))
    assert logits.dtype == jnp.float32, logits.dtype
for path, value in surgery.arrays(run.model).items():
    assert value.dtype == jnp.float32, (path, value.dtype)
"""
)


@pytest.mark.slow
def test_weights_and_logits_keep_their_type_under_x64():
    assert run(DOUBLE) == ""


def test_what_one_needs_for_a_loop_of_ones_own_is_exported():
    code = """
import aatjax
missing = [name for name in aatjax.__all__ if not hasattr(aatjax, name)]
assert not missing, missing
aatjax.surgery.split, aatjax.save_adapter, aatjax.FrontEnd
"""
    assert run(code) == ""
