"""Stored tokens: the same training as without them, refused where they would change."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aatjax import petl, surgery
from aatjax.audio.augment import Augment
from aatjax.audio.frontend import FrontEnd
from aatjax.data.pipeline import keep_in_memory
from aatjax.data.synthetic.dataset import Synthetic
from aatjax.data.synthetic.synthesize import TARGET_SOUNDS
from aatjax.errors import UsageError
from aatjax.models.ast import AST
from aatjax.models.config import ASTConfig
from aatjax.petl.base import find_first_trained
from aatjax.petl.sites import list_blocks
from aatjax.train import fit as fit_module
from aatjax.train import input_cache
from aatjax.train.fit import FitContext, fit
from aatjax.train.log_mel_cache import LogMelCache
from aatjax.train.prefix_cache import PrefixCache
from aatjax.train.training import Training

CONFIG = ASTConfig(dim=48, depth=3, heads=2, mlp_dim=64, frames=48, num_classes=3)
MADE = keep_in_memory(Synthetic(TARGET_SOUNDS[:3], 5, seconds=0.5))
TRAIN, TEST = MADE.split(0.4)
METHODS = {
    "linear": petl.find_method("linear")(),
    "adapter": petl.Adapter(reduction=24, blocks="last1"),
    "conformer": petl.Adapter(block="conformer", reduction=24, blocks="last1"),
    "soft_moa": petl.SoftMoA(num_experts=2, reduction=24, blocks="last1"),
    "lora": petl.LoRA(reduction=24, blocks="last1"),
    "aat": petl.AAT(blocks="last2"),
    "partial": petl.Partial(blocks="last1"),
}


def trained(method, *, config=CONFIG, folder=None, augment=None, **changes):
    model = petl.adapt(AST(config, rngs=nnx.Rngs(0)), method)
    training = Training(epochs=2, batch_size=4, threads=0, **changes)
    return fit(
        model,
        TRAIN,
        TEST,
        valid=TEST,
        training=training,
        lr=1e-2,
        show=None,
        frontend=FrontEnd(frames=48),
        augment=augment,
        context=FitContext(prefix_folder=folder),
    )


SLOW = set(METHODS) - {"conformer"}
# Softmax and BatchNorm take out what is added to all keys or clips: such a bias has rounding noise
# for a gradient, and the mean in BatchNorm follows it.
NOISE = ("attn/k/bias", "/b_conv", "/batch_norm/mean")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in METHODS]
)
def test_stored_tokens_train_the_same_weights(name, monkeypatch: pytest.MonkeyPatch) -> None:
    reused = trained(METHODS[name], cache_prefix=True)
    monkeypatch.setattr(input_cache, "LIMIT", 0)
    plain = trained(METHODS[name])
    one, two = surgery.arrays(plain.model), surgery.arrays(reused.model)
    for path in one:
        if path.endswith(NOISE):
            continue
        np.testing.assert_allclose(one[path], two[path], rtol=2e-5, atol=5e-6, err_msg=path)
    for a, b in zip(plain.history, reused.history, strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-5)
    assert plain.test is not None and reused.test is not None
    assert plain.test.headline == reused.test.headline


def test_tokens_in_memory_are_computed_once_per_source(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    real = PrefixCache._compute

    def counted(self, source, allocate):
        computed.append(len(source))
        return real(self, source, allocate)

    monkeypatch.setattr(PrefixCache, "_compute", counted)
    trained(METHODS["linear"], cache_prefix=True)
    assert sorted(computed) == sorted([len(TRAIN), len(TEST)])


def test_tokens_that_fit_in_memory_are_kept_without_being_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The same training; behind the last block only the two pooled tokens of a clip are kept."""
    caches = _Recorded(fit_module.make_input_cache)
    monkeypatch.setattr(fit_module, "make_input_cache", caches)
    kept = trained(METHODS["linear"], folder=tmp_path)
    assert not list(tmp_path.iterdir())
    (prefix,) = caches.results
    shapes = {stored.tokens.shape for stored in prefix.known.values()}
    assert prefix.folder is None and {shape[1:] for shape in shapes} == {(2, CONFIG.dim)}
    monkeypatch.setattr(input_cache, "LIMIT", 0)
    plain = trained(METHODS["linear"])
    assert caches.results[-1] is None
    for a, b in zip(plain.history, kept.history, strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-5)
    monkeypatch.undo()
    monkeypatch.setattr(fit_module, "make_input_cache", caches)
    trained(petl.LoRA())  # begins at the first block
    assert isinstance(caches.results[-1], LogMelCache)
    trained(METHODS["linear"], augment=Augment(freq_mask=8))
    assert isinstance(caches.results[-1], LogMelCache)


@pytest.mark.slow
def test_c9_a_folder_that_cannot_be_written_costs_only_time(monkeypatch, tmp_path) -> None:
    caches = _Recorded(fit_module.make_input_cache)
    monkeypatch.setattr(fit_module, "make_input_cache", caches)
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot be written: .* tokens are kept in memory"):
        kept = trained(METHODS["linear"], folder=tmp_path / "file", cache_prefix=True)
    assert caches.results[-1].folder is None
    monkeypatch.setattr(input_cache, "LIMIT", 0)
    with pytest.warns(UserWarning, match="tokens are computed at every step"):
        plain = trained(METHODS["linear"], folder=tmp_path / "file", cache_prefix=True)
    assert caches.results[-1] is None
    for a, b in zip(plain.history, kept.history, strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-5)


class _Recorded:
    """A function that keeps its results."""

    def __init__(self, function: Any) -> None:
        self.function, self.results = function, []

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.results.append(self.function(*args, **options))
        return self.results[-1]


def test_where_training_begins() -> None:
    def start(method) -> int | None:
        model = nnx.eval_shape(lambda: petl.adapt(AST(CONFIG, rngs=nnx.Rngs(0)), method))
        return find_first_trained(model)

    assert [start(METHODS[n]) for n in METHODS] == [3, 2, 2, 2, 2, 1, 2]
    assert start(petl.LoRA()) == 0
    assert start(petl.Full()) is None


@pytest.mark.filterwarnings("ignore:.*damaged")
@pytest.mark.parametrize("harm", ["cut", "changed", "gone"])
def test_damaged_tokens_are_computed_again(tmp_path: Path, harm: str) -> None:
    first = trained(METHODS["linear"], folder=tmp_path, cache_prefix=True)
    for file in sorted(tmp_path.rglob("tokens.npy")):
        content = bytearray(file.read_bytes())
        content[-1] ^= 64
        if harm == "gone":
            file.unlink()
        else:
            file.write_bytes(content[: len(content) // 2] if harm == "cut" else content)
    again = trained(METHODS["linear"], folder=tmp_path, cache_prefix=True)
    assert again.history[-1]["train/loss"] == first.history[-1]["train/loss"]
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("tokens.npy")}
    trained(METHODS["linear"], folder=tmp_path, cache_prefix=True)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("tokens.npy")} == files, "stored again"


def test_two_runs_that_store_the_same_tokens_meet(tmp_path, monkeypatch) -> None:
    real = PrefixCache._compute

    def beaten(self, source, place):  # another run stores them while these are computed
        real(self, source, place)
        return real(self, source, place)

    monkeypatch.setattr(PrefixCache, "_compute", beaten)
    trained(METHODS["linear"], folder=tmp_path, cache_prefix=True)
    assert len(list(tmp_path.iterdir())) == 2, "nothing temporary is left"


def test_before_and_after_are_the_whole_model() -> None:
    model = AST(dataclasses.replace(CONFIG, mask_padding=True), rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 48, 128)), jnp.float32)
    valid = jnp.array([48, 20])
    graphdef, state = nnx.split(model)

    @functools.partial(jax.jit, static_argnums=1)
    def run(state: Any, start: int | None) -> jax.Array:
        model = nnx.merge(graphdef, state)
        if start is None:
            return model(x, valid)
        return model.run_from(model.run_until(x, valid, start), valid, start)

    whole = run(state, None)
    for start in (0, 2, 3):
        parts = run(state, start)
        np.testing.assert_allclose(parts, whole, rtol=1e-6, atol=1e-6)


def test_tokens_are_stored_once_and_keyed_by_weights_and_sounds(tmp_path: Path) -> None:
    first = trained(METHODS["adapter"], folder=tmp_path, cache_prefix=True)
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("tokens.npy")}
    assert len(files) == 2  # the training clips, and the clips that validate and test
    again = trained(METHODS["adapter"], folder=tmp_path, cache_prefix=True)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("tokens.npy")} == files
    for path, value in surgery.arrays(first.model).items():
        np.testing.assert_array_equal(value, surgery.arrays(again.model)[path])
    trained(METHODS["linear"], folder=tmp_path, cache_prefix=True)  # begins elsewhere
    assert len(list(tmp_path.rglob("tokens.npy"))) == 4
    half = dataclasses.replace(CONFIG, dtype="bfloat16")
    trained(METHODS["linear"], config=half, folder=tmp_path, cache_prefix=True)
    kinds = [json.loads(p.read_text())["dtype"] for p in tmp_path.rglob("about.json")]
    assert sorted(kinds) == ["bfloat16"] * 2 + ["float32"] * 4
    assert not list(tmp_path.glob("*.tmp"))


def test_what_changes_every_epoch_is_refused_with_the_reason() -> None:
    model = petl.adapt(AST(CONFIG, rngs=nnx.Rngs(0)), METHODS["adapter"])
    training = Training(epochs=1, batch_size=4, cache_prefix=True, threads=0)
    front = FrontEnd(frames=48)

    def refused(match: str, **more) -> None:
        with pytest.raises(UsageError, match=match):
            fit(
                **{
                    "model": model,
                    "train": TRAIN,
                    "training": training,
                    "show": None,
                    "frontend": front,
                    **more,
                }
            )

    refused(r"augmentation changes the sounds every epoch \(mixup\)", augment=Augment(mixup=0.5))
    refused("freq_mask", augment=Augment(freq_mask=8))
    refused("cuts long clips at another place", windows="random")
    early = petl.adapt(AST(CONFIG, rngs=nnx.Rngs(0)), petl.LoRA(reduction=24))
    refused(r"block 0 is trained or adapted.*blocks=last3", model=early)


def test_only_the_last_blocks_are_adapted() -> None:
    for name in ("adapter", "conformer", "soft_moa", "lora", "aat"):
        model = petl.adapt(AST(CONFIG, rngs=nnx.Rngs(0)), METHODS[name])
        trained_at = {
            path.split("/")[1]
            for path, v in surgery.variables(model).items()
            if isinstance(v, nnx.Param) and path.startswith("blocks/")
        }
        last = len(list_blocks(METHODS[name], 3))
        assert trained_at == {str(k) for k in range(3 - last, 3)}
    with pytest.raises(UsageError, match="blocks='last4': the model has 3 blocks"):
        petl.adapt(AST(CONFIG, rngs=nnx.Rngs(0)), petl.LoRA(blocks="last4"))
