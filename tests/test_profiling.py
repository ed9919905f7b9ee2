"""Traces of training steps, and training with the same numbers in every run."""

import dataclasses
import io

import jax
import pytest
from tiny_run import make_config

import aatjax
from aatjax import petl
from aatjax.data.synthetic.dataset import Synthetic
from aatjax.errors import UsageError
from aatjax.experiments import run as experiment
from aatjax.train import step
from aatjax.train.profiling import StepTrace
from aatjax.train.training import Training


def test_the_steps_asked_for_are_traced(tmp_path):
    config = make_config(tmp_path, training={"epochs": 2, "profile": "2:3"})
    screen = io.StringIO()
    experiment.train(config, run_dir=tmp_path / "run", show=screen)
    assert f"trace of 2:3: {tmp_path / 'run' / 'profile'}" in screen.getvalue()
    assert list((tmp_path / "run/profile").rglob("*.xplane.pb"))


def test_a_trace_ends_with_its_last_step_or_with_the_run(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    trace = StepTrace(tmp_path, 2, 3)
    for number in (1, 2, 3, 4):
        trace.begin(number)
        assert trace.end(number, jax.numpy.zeros(1)) == (number == 3)
    assert calls == ["start", "stop"]
    trace = StepTrace(tmp_path, 2, 9)
    trace.begin(5)  # a run that goes on
    trace.close()
    trace.close()
    assert calls == ["start", "stop"] * 2


@pytest.mark.parametrize("text", ["", "3", "3:", ":3", "0:2", "4:3", "a:b", "1:2:3", "-1:2"])
def test_steps_that_are_none_are_refused(text):
    with pytest.raises(UsageError, match=r"give the first and last step, such as 10:15"):
        Training(profile=text)


def test_a_trace_needs_a_run_folder(tmp_path):
    model = aatjax.adapt(aatjax.load("random:tiny,depth=1", num_classes=10), petl.Linear())
    with pytest.raises(UsageError, match="give a run folder, run_dir="):
        aatjax.fit(model, Synthetic(clips=1), training=Training(profile="1:2"))


def test_deterministic_runs_ask_xla_for_a_fixed_order(monkeypatch, tmp_path):
    asked = []
    real = jax.jit

    def note(function, **options):
        if getattr(function, "__name__", "") == "train_step":
            asked.append(options.get("compiler_options"))
        return real(function, **options)

    monkeypatch.setattr(step.jax, "jit", note)
    step._compile_step.cache_clear()
    config = make_config(tmp_path, training={"deterministic": True, "epochs": 1})
    experiment.train(config, run_dir=tmp_path / "a", show=None)
    training = dataclasses.replace(config.training, deterministic=False)
    experiment.train(
        dataclasses.replace(config, training=training), run_dir=tmp_path / "b", show=None
    )
    assert asked == [{"xla_gpu_deterministic_ops": True}, None]
