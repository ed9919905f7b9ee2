"""Partly annotated sets: classes without an annotation are neither trained nor counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sklearn.metrics import average_precision_score, roc_auc_score

from aatjax import petl, surgery
from aatjax.audio.augment import Augment
from aatjax.audio.frontend import FrontEnd
from aatjax.data.source import Clip, Reader, Source
from aatjax.errors import DataError, UsageError
from aatjax.models.ast import AST
from aatjax.models.config import ASTConfig
from aatjax.train.fit import fit
from aatjax.train.metrics.evaluate import compute_metrics
from aatjax.train.step import compute_losses

NAN = np.nan


def bce(z, y):
    return np.log1p(np.exp(-np.abs(z))) + np.maximum(z, 0) - z * y


def test_the_loss_is_the_mean_over_what_is_known() -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(0, 3, (6, 5))
    y = rng.integers(0, 2, (6, 5)).astype(float)
    known = rng.random((6, 5)) < 0.6
    known[5] = False
    wanted = np.array(
        [bce(z[i], y[i])[known[i]].mean() if known[i].any() else 0.0 for i in range(6)]
    )
    y = np.where(known, y, 0)
    logits, target, seen = (jnp.asarray(a, jnp.float32) for a in (z, y, known))
    found = compute_losses(logits, target, "bce", seen)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    whole = compute_losses(logits, target, "bce")
    np.testing.assert_allclose(whole, bce(z, y).mean(1), rtol=1e-5)


def test_what_is_unknown_carries_no_gradient() -> None:
    rng = np.random.default_rng(1)
    z = jnp.asarray(rng.normal(0, 3, (4, 5)), jnp.float32)
    known = jnp.asarray(rng.random((4, 5)) < 0.5, jnp.float32)
    y = jnp.asarray(rng.integers(0, 2, (4, 5)), jnp.float32) * known
    grad = np.asarray(jax.grad(lambda z: compute_losses(z, y, "bce", known).sum())(z))
    assert (grad[np.asarray(known) == 0] == 0).all() and (grad[np.asarray(known) == 1] != 0).all()


class Tones(Reader):
    def read(self, clip: Clip) -> np.ndarray:
        k = int(clip.id)
        t = np.arange(8000) / 16000
        return (8000 * np.sin(2 * np.pi * 200 * (k + 1) * t)).astype(np.int16)

    def key(self, clip: Clip) -> str:
        return f"tone {clip.id}"


def tones(observed: list[tuple[int, ...] | None], labels: list[tuple[int, ...]]) -> Source:
    clips = [
        Clip(str(k), label, None, observed=seen)
        for k, (label, seen) in enumerate(zip(labels, observed, strict=True))
    ]
    return Source(clips, "abcd", name="tones", multi_label=True, reader=Tones())


@pytest.mark.parametrize("mixup", [0.0, 1.0])
def test_a_class_without_annotations_is_never_trained(mixup: float) -> None:
    """The head's bias of class d must not change; all others must."""
    config = ASTConfig(dim=16, depth=1, heads=2, mlp_dim=24, frames=48, num_classes=4)
    backbone = AST(config, rngs=nnx.Rngs(0))
    model = petl.adapt(backbone, petl.find_method("linear")())
    source = tones([(0, 1, 2)] * 8, [(0,), (1,), (2,), ()] * 2)
    frontend = FrontEnd(frames=48)
    before = {path: np.asarray(v) for path, v in surgery.arrays(model).items()}
    run = fit(
        model, source, frontend=frontend, epochs=2, lr=1e-2, show=None, augment=Augment(mixup=mixup)
    )
    after = surgery.arrays(run.model)
    path = next(p for p in before if "head" in p and before[p].shape == (4,))  # zero at first
    moved = np.abs(np.asarray(after[path]) - before[path])
    assert moved[3] == 0 and (moved[:3] > 0).all()
    assert np.isfinite(run.history[-1]["train/loss"])


def test_a_mixture_counts_what_is_known_of_its_halves() -> None:
    """A clip known for a mixed with one known for b: each half counts for what is known of it."""
    from aatjax.audio.augment import mixup

    target = jnp.asarray([[1.0, 0.0], [0.0, 1.0]])
    known = jnp.asarray([[1.0, 0.0], [0.0, 1.0]])
    audio = jnp.asarray(np.random.default_rng(0).normal(0, 0.1, (2, 400)), jnp.float32)
    _, both = mixup(
        jax.random.key(0),
        audio,
        jnp.array([400, 400]),
        jnp.concatenate([target, known], 1),
        jnp.ones(2),
        prob=1.0,
    )
    share, seen = np.split(np.asarray(both), 2, axis=1)
    np.testing.assert_allclose(seen.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(share, seen, rtol=1e-6)  # whatever is known is present here
    assert ((seen > 0) & (seen < 1)).all()


def test_masked_ap_and_auc_are_scikit_learns_on_what_is_known() -> None:
    rng = np.random.default_rng(2)
    scores = rng.normal(size=(300, 7))
    targets = (rng.random((300, 7)) < 0.3).astype(np.float32)
    targets[rng.random((300, 7)) < 0.7] = NAN
    found = compute_metrics(scores.astype(np.float32), targets, classes="abcdefg", multi_label=True)
    ap, auc = [], []
    for c in range(7):
        rows = ~np.isnan(targets[:, c])
        ap.append(average_precision_score(targets[rows, c], scores[rows, c].astype(np.float32)))
        auc.append(roc_auc_score(targets[rows, c], scores[rows, c].astype(np.float32)))
        guess = scores[rows, c] > 0
        right = (guess & (targets[rows, c] == 1)).sum()
        assert found.per_class[c].recall == pytest.approx(right / (targets[rows, c] == 1).sum())
        assert found.per_class[c].precision == pytest.approx(right / guess.sum())
    assert found.mean_ap == pytest.approx(np.mean(ap), abs=1e-12)
    assert found.macro_auc == pytest.approx(np.mean(auc), abs=1e-12)
    bounds = found.intervals["mean_ap"]
    assert bounds is not None and found.mean_ap is not None
    low, high = bounds
    assert low < found.mean_ap < high
    assert found.accuracy is None
    assert any("annotated in part" in note for note in found.notes)
    naive = average_precision_score(np.nan_to_num(targets), scores, average="macro")
    assert abs(naive - found.mean_ap) > 0.05  # taking the unknown for absent is another number


def test_unknown_labels_go_with_several_labels_only() -> None:
    with pytest.raises(UsageError, match="must be 0 or 1"):
        compute_metrics(
            np.zeros((2, 2), np.float32),
            np.array([[1, NAN], [0, 1]], np.float32),
            classes="ab",
            multi_label=False,
        )
    with pytest.raises(DataError, match="only a multi-label set can be"):
        Source([Clip("x", (0,), "x", observed=(0,))], "ab", name="one")
    with pytest.raises(DataError, match="has a class that it was not annotated for"):
        Source([Clip("x", (1,), "x", observed=(0,))], "ab", name="two", multi_label=True)


def test_what_is_known_is_part_of_the_fingerprint() -> None:
    labels = [(0,)] * 2
    every = tones([None, None], labels).fingerprint()
    part = tones([(0, 1), (0, 1)], labels).fingerprint()
    assert len({every, part, tones([(0, 1), (0,)], labels).fingerprint()}) == 3
