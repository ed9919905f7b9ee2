"""Pretraining: words of no language, joined sets, masked patches, the command."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import log_softmax

import aatjax
from aatjax.cli import main
from aatjax.data.joined import join_sources
from aatjax.data.source import Clip, Reader, Source
from aatjax.data.synthetic import speech
from aatjax.data.synthetic.primitives import Take
from aatjax.data.synthetic.synthesize import synthesize
from aatjax.errors import UsageError
from aatjax.models.ast import AST
from aatjax.models.config import ASTConfig
from aatjax.train.masked_patches import mask_patches, read_loss

# Words.


def test_words_are_spelt_in_sounds_and_differ_whatever_the_case() -> None:
    assert len({word.lower() for word in speech.WORDS}) == len(speech.WORDS) == 80
    sounds = speech.VOWELS.keys() | speech.CONSONANTS.keys()
    assert all(set(word) <= sounds and len(word) > 1 for word in speech.WORDS)
    assert set("".join(speech.WORDS)) == sounds


def test_a_word_fits_into_its_clip_and_no_voice_is_heard_twice() -> None:
    for word in speech.WORDS[:6]:
        clips = [synthesize(word, seed, seconds=1.0) for seed in range(3)]
        assert {clip.shape for clip in clips} == {(16000,)}
        assert len({clip.tobytes() for clip in clips}) == 3
        assert np.array_equal(synthesize(word, 2, seconds=1.0), clips[2])
    short = speech.say(Take(np.random.default_rng(0), 8000, 800), "bybir")
    assert short.shape == (800,) and np.isfinite(short).all() and short.std() > 0


@pytest.mark.parametrize(("vowel", "first", "second"), [("i", 280, 2250), ("a", 780, 1250)])
def test_a_vowel_has_its_resonances(vowel: str, first: float, second: float) -> None:
    """The whispered spectrum has its two highest peaks at the formants of the voice's tract."""
    tracks = [np.full(1, float(f)) for f in speech.VOWELS[vowel].formants]
    grid = np.arange(0.0, 4000.0, 5.0)
    gain = speech._resonate(grid, tracks)[0]
    peaks = grid[1:-1][(gain[1:-1] > gain[:-2]) & (gain[1:-1] > gain[2:])]
    assert np.abs(peaks[:2] - [first, second]).max() < 25
    expected = np.ones(grid.size, complex)
    for f in speech.VOWELS[vowel].formants:  # f^2 / (f^2 - x^2 + i B x)
        expected *= f**2 / (f**2 - grid**2 + 1j * (50 + 0.05 * f) * grid)
    np.testing.assert_allclose(gain, np.abs(expected) / np.abs(expected).max(), rtol=1e-12)


def test_a_filter_that_does_not_change_the_source() -> None:
    noise = np.random.default_rng(0).normal(size=4000)
    same = speech._shape(noise, np.ones((4000 // 64 + 1, 257)), 64)
    np.testing.assert_allclose(same[256:-256], noise[256:-256], atol=1e-12)


# Joined sets.


class Constant(Reader):
    def __init__(self, value: int) -> None:
        self.value = value

    def read(self, clip: Clip) -> Any:
        return np.full(4, self.value + len(clip.id), np.int16)

    def key(self, clip: Clip) -> str:
        return f"{self.value}/{clip.id}"


def make_set(name: str, value: int, labels: list[tuple[int, ...]], many: bool = False) -> Source:
    clips = [Clip(f"c{i}", label, None, group="g") for i, label in enumerate(labels)]
    return Source(clips, ["x", "y"], name=name, multi_label=many, reader=Constant(value))


def test_sets_are_joined_and_their_classes_kept_apart() -> None:
    sets = [make_set("a", 0, [(0,), (1,)]), make_set("b", 100, [(1,)]), make_set("b", 200, [(0,)])]
    joined = join_sources(sets)
    assert list(joined.classes) == ["a/x", "a/y", "b-2/x", "b-2/y", "b-3/x", "b-3/y"]
    assert [clip.label for clip in joined.clips] == [(0,), (1,), (3,), (4,)]
    assert [joined.reader.read(clip)[0] for clip in joined.clips] == [2, 2, 102, 202]
    assert len({clip.id for clip in joined.clips}) == 4
    assert len({clip.group for clip in joined.clips}) == 3
    assert [joined.reader.key(clip) for clip in joined.clips][2] == "100/c0"
    assert join_sources(sets[:1]) is sets[0]


def test_labels_of_another_set_are_not_known_where_one_has_several() -> None:
    joined = join_sources([make_set("a", 0, [(0, 1)], many=True), make_set("b", 0, [(1,)])])
    assert joined.multi_label
    np.testing.assert_array_equal(
        joined.targets(), [[1, 1, np.nan, np.nan], [np.nan, np.nan, 0, 1]]
    )


# Masked patches.

SMALL = ASTConfig.from_text("d32x1,patch=32x8,stride=32x8,frames=48")


@pytest.fixture(scope="module")
def masked() -> AST:
    return mask_patches(AST(SMALL, rngs=nnx.Rngs(0)), share=0.5)


def test_the_loss_is_that_of_the_paper(masked: AST) -> None:
    """Contrast and reconstruction in float64, from the tokens that the heads read."""
    x = np.random.default_rng(0).normal(size=(2, 48, 128)).astype(np.float32)
    tokens = np.float64(masked.tokens(jnp.asarray(x)))
    places = np.asarray(masked.embed.places[...])
    assert places.shape == (2, 12) and all(len(set(row)) == 12 for row in places.tolist())
    loss = []
    for clip, row in enumerate(places):
        patches = [
            x[clip, 8 * (p % 6) : 8 * (p % 6) + 8, 32 * (p // 6) : 32 * (p // 6) + 32].T.ravel()
            for p in row
        ]
        target = np.float64(patches)
        target = (target - target.mean(1, keepdims=True)) / target.std(1, keepdims=True)
        hidden = tokens[clip, 2:][row]
        heads = [
            hidden @ np.float64(layer.kernel[...]) + np.float64(layer.bias[...])
            for layer in (masked.pool.reconstruct, masked.pool.contrast)
        ]
        right = np.diag(log_softmax(heads[1] @ target.T, axis=1)).mean()
        loss.append(10 * ((heads[0] - target) ** 2).mean() - right)
    np.testing.assert_allclose(masked(jnp.asarray(x))[:, 0], loss, rtol=1e-5)
    np.testing.assert_array_equal(
        read_loss(masked(jnp.asarray(x)), jnp.zeros((2, 527))), masked(jnp.asarray(x))[:, 0]
    )


def test_what_is_masked_does_not_reach_the_model(masked: AST) -> None:
    x = jax.random.normal(jax.random.key(0), (1, 48, 128))
    before = masked.tokens(x)
    hidden = int(masked.embed.places[...][0, 0])
    row, column = divmod(hidden, 6)
    area = (0, slice(8 * column, 8 * column + 8), slice(32 * row, 32 * row + 32))
    np.testing.assert_array_equal(masked.tokens(x.at[area].add(9.0)), before)
    seen = next(p for p in range(24) if p not in np.asarray(masked.embed.places[...])[0])
    row, column = divmod(seen, 6)
    area = (0, slice(8 * column, 8 * column + 8), slice(32 * row, 32 * row + 32))
    assert np.abs(masked.tokens(x.at[area].add(9.0)) - before).max() > 1e-3


def test_other_places_are_masked_in_each_training_step(masked: AST) -> None:
    x = jnp.zeros((1, 48, 128))
    found = []
    for training in (False, False, True, True):
        masked.train() if training else masked.eval()
        masked.tokens(x)
        found.append(tuple(np.asarray(masked.embed.places[...])[0]))
    masked.eval()
    assert found[0] == found[1] and len(set(found[1:])) == 3


def test_patches_that_overlap_are_refused() -> None:
    overlapping = ASTConfig.from_text("d32x1,patch=16,stride=10,frames=48")
    with pytest.raises(UsageError, match="overlap, so that a masked one shows"):
        mask_patches(AST(overlapping, rngs=nnx.Rngs(0)))


# The command.

FLAGS = (
    *("--base", "random:d32x1,patch=64x16,stride=64x16", "--model.frames", "98"),
    *("--data.train-clips", "1", "--data.test-clips", "1", "--training.epochs", "2"),
    *("--training.batch-size", "8", "--training.threads", "0", "--optim.warmup-steps", "0"),
)


@pytest.mark.parametrize("objective", ["supervised", "masked"])
def test_a_backbone_is_pretrained_and_goes_on(objective: str, tmp_path: Path, capsys: Any) -> None:
    out, run = tmp_path / "own.safetensors", tmp_path / "run"
    call = ["pretrain", "synthetic", *FLAGS, "--objective", objective, "--out", str(out), "--quiet"]
    assert main.run([*call, "--run", str(run)]) == 0
    shown = capsys.readouterr().out
    assert f"--base {out}" in shown and ("accuracy" in shown) == (objective == "supervised")
    kept = aatjax.load(str(out), **({} if objective == "supervised" else {"num_classes": 4}))
    assert kept.config.patch == (64, 16) and kept.config.frames == 98
    assert kept.config.num_classes == (40 if objective == "supervised" else 4)
    fresh = aatjax.load("random:d32x1,patch=64x16,stride=64x16", frames=98, seed=0)
    moved = kept.blocks[0].mlp.up.kernel[...] - fresh.blocks[0].mlp.up.kernel[...]
    assert np.abs(moved).max() > 1e-4
    assert main.run(call) == 2
    assert "exists" in capsys.readouterr().err
    written = out.read_bytes()
    assert main.run([*call, "--run", str(run), "--force"]) == 0  # goes on from its end
    assert out.read_bytes() == written


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (("--base", "random:d33x1"), 2, "width 33 must be a multiple of 32"),
        (("--base", "random:d32x1,patch=16x"), 2, "or two such as 128x4"),
        (("--out", "weights.bin"), 2, "are a .safetensors file"),
        (("--objective", "mask"), 2, "objective"),
    ],
)
def test_wrong_calls(change: tuple[str, str], code: int, words: str, tmp_path, capsys) -> None:
    call = ["pretrain", "synthetic", *FLAGS, "--out", str(tmp_path / "a.safetensors"), *change]
    assert main.run(call) == code
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: Any) -> None:
    call = ["pretrain", "words", *FLAGS, "--out", str(tmp_path / "a.safetensors"), "--dry-run"]
    assert main.run(call) == 0
    assert "nothing was trained" in "".join(capsys.readouterr())
    assert not list(tmp_path.iterdir())
