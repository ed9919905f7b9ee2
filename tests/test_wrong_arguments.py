"""What is passed by mistake is answered in one sentence with what to pass."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from petl_cases import make_model

import aatjax
from aatjax import data, petl
from aatjax.errors import UsageError

pytestmark = pytest.mark.wrong_types
X = 0.1 * np.random.default_rng(0).normal(size=(6, 4000)).astype(np.float32)
Y = np.arange(6) % 5
SOUNDS = data.Arrays(X, Y, tuple("abcde"))
LOG_MEL = jnp.zeros((2, 40, 32))
MODEL = r"model is an? \w+: give an AST, from aatjax\.load\(\.\.\.\)"
SOURCE = r"is an? \w+: give a source, data\.Arrays\(X, y, classes\)"


def adapt() -> aatjax.AST:
    return aatjax.adapt(make_model(), petl.LoRA(rank=2))


def save(model: Any) -> None:
    front_end = aatjax.FrontEnd()
    options = {"classes": SOUNDS.classes, "multi_label": False, "frontend": front_end}
    aatjax.save_adapter("never_written.safetensors", model, **options)


@pytest.mark.parametrize("given", ["embedded", 3, {"head/linear/bias": np.zeros(5)}])
@pytest.mark.parametrize(
    "call",
    [
        lambda model: aatjax.adapt(model, petl.LoRA()),
        lambda model: aatjax.fit(model, SOUNDS),
        lambda model: aatjax.evaluate(model, SOUNDS),
        lambda model: aatjax.embed(model, SOUNDS),
        lambda model: aatjax.capture(model, LOG_MEL, "blocks/*"),
        lambda model: petl.routing(model, LOG_MEL),
        lambda model: petl.diagnose_routing(model, LOG_MEL),
        lambda model: aatjax.Classifier(model, SOUNDS.classes),
        aatjax.merge,
        aatjax.summary,
        save,
    ],
)
def test_what_is_no_model(call, given: Any):
    with pytest.raises(UsageError, match=MODEL):
        call(given)


@pytest.mark.parametrize("given", ["my_sounds/", (X, Y), X], ids=["path", "pair", "array"])
@pytest.mark.parametrize("call", [aatjax.evaluate, aatjax.embed, aatjax.fit])
def test_what_is_no_source(call, given: Any):
    with pytest.raises(UsageError, match=SOURCE):
        call(adapt(), given)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mesh": 4}, r"fit: mesh is an int: give a mesh of JAX"),
        ({"on_step": 3}, r"fit: on_step is an int: give a function of a Moment"),
        ({"on_epoch": "x"}, r"fit: on_epoch is a str: give a function"),
        ({"frontend": 3}, r"fit: frontend is an int: give aatjax\.FrontEnd"),
        ({"augment": "mixup"}, r"fit: augment is a str: give .*Augment"),
        ({"training": {"epochs": 3}}, r"fit: training is a dict: give aatjax\.Training"),
        ({"optim": "adam"}, r"fit: optim is a str: .*optax\.adam\(1e-3\)"),
        ({"loss": "mse"}, r"fit: loss='mse' is not one of ce, bce"),
        ({"loss": 3}, r"fit: loss is an int: give 'ce', 'bce', or a function"),
        ({"batch_size": 8}, r"'batch_size': it is one of training=aatjax\.Training\(batch_size="),
        ({"weight_decay": 0.1}, r"it is one of optim=aatjax\.Optim\(weight_decay="),
        ({"allow_change": "optim.lr"}, r"fit: allow_change is a str: give a list of names"),
    ],
)
def test_settings_of_another_kind(settings: Any, message: str):
    with pytest.raises(UsageError, match=message):
        aatjax.fit(adapt(), SOUNDS, **settings)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: data.Arrays(X, Y, "abcde"), "classes is a str: give a list of names"),
        (lambda: data.Arrays(X, Y, 5), "classes is an int: give a list of names"),
        (lambda: data.Batches([(X, Y)], "abcde"), "classes is a str"),
        (lambda: aatjax.Classifier(adapt(), "abcde"), "Classifier: classes is a str"),
        (lambda: aatjax.predict(adapt(), "x.wav"), r"source is an AST: .*Classifier\(model"),
        (lambda: aatjax.average("ab"), "adapter is a str: give results of load_adapter"),
        (lambda: aatjax.capture(adapt(), LOG_MEL), r"capture: give patterns .* blocks/\*"),
        (lambda: petl.Combined(petl.LoRA()), "methods is a LoRA: give two methods or more"),
        (lambda: SOUNDS.split("a"), "fraction is a str: give a number between 0 and 1"),
    ],
)
def test_other_arguments(call: Any, message: str):
    with pytest.raises(UsageError, match=message):
        call()
