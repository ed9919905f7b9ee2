"""`aatjax.load`: which weights, which head, which input length, and what is refused."""

import dataclasses
import inspect
import json

import ast_oracle
import jax.numpy as jnp
import numpy as np
import pytest

import aatjax
from aatjax import surgery
from aatjax.config import Model
from aatjax.convert.load import select_load_options
from aatjax.errors import DataError, UnavailableError, UsageError
from aatjax.models.config import SIZES, ASTConfig
from aatjax.models.provenance import fingerprint_backbone

TINY = dict(frames=36, mels=26, num_classes=3)


@pytest.fixture(scope="module")
def oracle():
    return ast_oracle.random_hf_ast(num_labels=5)


@pytest.fixture(scope="module")
def published(oracle, tmp_path_factory):
    """A Hugging Face folder: width 128, two blocks, 128 frames, five labels, head with norm."""
    return ast_oracle.write_layout(oracle, "hf", tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def headless(oracle, tmp_path_factory):
    return ast_oracle.write_layout(oracle, "hf_bare", tmp_path_factory.mktemp("bare"))


@pytest.fixture(scope="module", autouse=True)
def published_tiny():
    """`random:tiny` has two blocks here; returns its published sizes."""
    sizes = dict(SIZES["tiny"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES["tiny"], "depth", 2)
        yield sizes


@pytest.fixture(scope="module")
def random_tiny(published_tiny):
    return aatjax.load("random:tiny", seed=0, **TINY)


def values(model: aatjax.AST, *, head: bool) -> dict[str, np.ndarray]:
    return {
        path: np.asarray(value)
        for path, value in surgery.arrays(model).items()
        if path.startswith("head/") is head
    }


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    assert set(one) == set(other)
    return all(np.array_equal(one[path], other[path]) for path in one)


def test_a_random_model_of_another_shape():
    model = aatjax.load("random:tiny,depth=1,dim=32,heads=2,mlp_dim=64,stride=16,frames=64")
    config = model.config
    assert (config.depth, config.dim, config.heads, config.mlp_dim) == (1, 32, 2, 64)
    assert (config.patch, config.stride, config.frames) == ((16, 16), (16, 16), 64)
    named = ASTConfig.from_text("d192x6,patch=128x4,stride=64x2")
    assert (named.dim, named.depth, named.heads, named.mlp_dim) == (192, 6, 6, 768)
    assert (named.patch, named.stride) == ((128, 4), (64, 2))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tinny", "unknown model size 'tinny', did you mean 'tiny'"),
        ("tiny,dept=4", "no size 'dept', did you mean 'depth'"),
        ("tiny,depth", "depth='' is not a whole number"),
        ("tiny,depth=-1", "depth='-1' is not a whole number"),
        ("tiny,depth=0", "depth=0 must be"),
        ("tiny,depth=10000000", "depth is at most 64"),
        ("tiny,heads=7", "heads=7"),
        ("d33x2", "width 33 must be a multiple of 32"),
        ("d32x65", "the depth 65 at most 64"),
        ("d032x2", "unknown model size"),
        ("tiny,depth=4x4", "depth='4x4' is not a whole number"),
        ("tiny,patch=16x16x2", "is not a whole number, or two such as 128x4"),
        ("tiny,patch=128x5000", "patch is at most 4096"),
        ("tiny,patch=1,stride=1,frames=100000", "at most"),
    ],
)
def test_a_random_model_of_no_shape(text, message):
    with pytest.raises(UsageError, match=message):
        aatjax.load(f"random:{text}")


# ------------------------------------------------------------------------------- the head


def test_without_num_classes_the_head_and_its_labels_are_kept(published, oracle):
    model = aatjax.load(published)
    assert model.config.num_classes == 5
    assert model.labels is None, "LABEL_0 ... are no names"
    head = values(model, head=True)
    np.testing.assert_array_equal(
        head["head/linear/kernel"], oracle.classifier.dense.weight.detach().numpy().T
    )
    np.testing.assert_array_equal(
        head["head/norm/scale"], oracle.classifier.layernorm.weight.detach().numpy()
    )


def test_labels_of_the_file_come_with_its_head_only(oracle, tmp_path):
    folder = ast_oracle.write_layout(oracle, "hf", tmp_path)
    described = json.loads((folder / "config.json").read_text())
    names = ("dog", "cat", "rain", "bell", "saw")
    described["id2label"] = {str(index): name for index, name in enumerate(names)}
    described["label2id"] = {name: index for index, name in enumerate(names)}
    (folder / "config.json").write_text(json.dumps(described))
    assert aatjax.load(folder).labels == names
    assert aatjax.load(folder, num_classes=5).labels is None


def test_num_classes_gives_a_new_head_by_seed_and_leaves_the_body(published):
    kept = aatjax.load(published)
    one, again, other = (aatjax.load(published, num_classes=5, seed=s) for s in (1, 1, 2))
    assert one.labels is None
    assert not same(values(one, head=True), values(kept, head=True))
    assert same(values(one, head=True), values(again, head=True))
    assert not same(values(one, head=True), values(other, head=True))
    for model in (one, other):
        assert same(values(model, head=False), values(kept, head=False))
    head = values(one, head=True)
    assert not head["head/linear/bias"].any()
    assert (head["head/norm/scale"] == 1).all()
    assert 0 < np.abs(head["head/linear/kernel"]).max() < 0.05
    assert aatjax.load(published, num_classes=9).config.num_classes == 9


def test_a_file_without_a_head_needs_num_classes(headless):
    with pytest.raises(UsageError, match="has no classification head: give num_classes="):
        aatjax.load(headless)
    model = aatjax.load(headless, num_classes=4)
    assert model(jnp.zeros((1, 128, 128))).shape == (1, 4)


def test_head_norm_belongs_to_a_new_head(published):
    with pytest.raises(UsageError, match=r"head_norm= changes the head.*give num_classes="):
        aatjax.load(published, head_norm=False)
    assert aatjax.load(published, head_norm=True).config.head_norm
    bare = aatjax.load(published, head_norm=False, num_classes=4)
    assert set(values(bare, head=True)) == {"head/linear/kernel", "head/linear/bias"}
    normed = aatjax.load(published, num_classes=4)
    assert "head/norm/scale" in values(normed, head=True)
    assert same(values(bare, head=False), values(normed, head=False))


# ------------------------------------------------------------------- length, pooling, running


def test_frames_cut_the_centre_of_the_positions(published, oracle):
    model = aatjax.load(published, frames=76)
    assert (model.config.frames, model.config.grid) == (76, (12, 7))
    stored = oracle.audio_spectrogram_transformer.embeddings.position_embeddings.detach().numpy()
    grid = stored[:, 2:].reshape(1, 12, 12, 128)[:, :, 3:10].reshape(1, 84, 128)
    found = values(model, head=False)["embed/pos"]
    np.testing.assert_array_equal(found, np.concatenate([stored[:, :2], grid], axis=1))
    assert model(jnp.zeros((1, 76, 128))).shape == (1, 5)
    with pytest.raises(UsageError, match="load it with frames=128"):
        model(jnp.zeros((1, 128, 128)))
    longer = aatjax.load(published, frames=256)
    assert longer.config.grid == (12, 25)
    assert longer(jnp.zeros((1, 256, 128))).shape == (1, 5)


@pytest.mark.parametrize("frames", [10, 0, -5])
def test_too_few_frames_are_refused(published, frames):
    for source in (published, "random:tiny"):
        with pytest.raises(UsageError, match=f"{frames} frames is sm|frames={frames} "):
            aatjax.load(source, frames=frames)


def test_no_classes_are_refused(published):
    for source in (published, "random:tiny"):
        with pytest.raises(UsageError, match="num_classes=0 must be at least 1"):
            aatjax.load(source, num_classes=0)


def test_fewer_mel_bins_cut_the_rows(published, oracle):
    model = aatjax.load(published, mels=96)
    assert model.config.grid == (9, 12)
    stored = oracle.audio_spectrogram_transformer.embeddings.position_embeddings.detach().numpy()
    grid = stored[:, 2:].reshape(1, 12, 12, 128)
    start = 6 - 9 // 2
    found = values(model, head=False)["embed/pos"][:, 2:].reshape(1, 9, 12, 128)
    np.testing.assert_array_equal(found, grid[:, start : start + 9])


def test_pooling_and_ways_of_running_are_taken_over(published):
    plain = aatjax.load(published)
    assert plain.config.pool == "cls_dist"
    changes = dict(pool="mean_all", dtype="bfloat16", scan=True, remat=True)
    model = aatjax.load(published, **changes)
    assert model.config == dataclasses.replace(plain.config, **changes)
    assert same(values(model, head=False), values(plain, head=False))


def test_everything_that_was_loaded_is_frozen(published, random_tiny):
    for model in (aatjax.load(published, num_classes=3), random_tiny):
        assert aatjax.summary(model).trainable == 0
        assert all(isinstance(v, surgery.Frozen) for v in surgery.variables(model).values())
        assert {v.dtype for v in surgery.arrays(model).values()} == {jnp.dtype("float32")}
        assert model.method is None


# ------------------------------------------------------------------------------ random weights


def test_random_tiny_has_the_published_shape(random_tiny, published_tiny):
    assert published_tiny == dict(dim=192, depth=12, heads=3, mlp_dim=768)
    config = random_tiny.config
    assert (config.dim, config.depth, config.heads) == (192, 2, 3)
    assert (config.frames, config.mels, config.num_classes) == (36, 26, 3)
    assert random_tiny.labels is None
    logits = random_tiny(
        jnp.asarray(np.random.default_rng(0).normal(size=(2, 36, 26)), jnp.float32)
    )
    assert logits.shape == (2, 3)
    assert bool(jnp.isfinite(logits).all()) and float(jnp.abs(logits).max()) > 1e-4


def test_random_weights_are_decided_by_the_seed(random_tiny):
    again = aatjax.load("random:tiny", seed=0, **TINY)
    other = aatjax.load("random:tiny", seed=1, **TINY)
    assert same(values(again, head=False), values(random_tiny, head=False))
    assert again.origin == random_tiny.origin
    assert not same(values(other, head=False), values(random_tiny, head=False))
    assert other.origin.fingerprint != random_tiny.origin.fingerprint
    assert (other.origin.source, other.origin.seed) == ("random:tiny", 1)


def test_a_random_model_takes_head_norm_and_pool():
    model = aatjax.load("random:tiny", head_norm=False, pool="mean_patches", **TINY)
    assert not model.config.head_norm and model.config.pool == "mean_patches"
    assert "head/norm/scale" not in values(model, head=True)


@pytest.mark.parametrize("name", ["random:large", "random:", "random:Tiny"])
def test_an_unknown_random_size_names_the_known_ones(name):
    with pytest.raises(UsageError, match=r"unknown model size .*(one of tiny, small, base|'tiny')"):
        aatjax.load(name)


# ------------------------------------------------------------------------------- fingerprints


def test_a_source_has_one_fingerprint_whatever_is_built_from_it(published, oracle, tmp_path):
    model = aatjax.load(published)
    assert model.origin.source == str(published)
    variants = [
        aatjax.load(published),
        aatjax.load(published, num_classes=9, seed=4),
        aatjax.load(published, frames=76, pool="cls", scan=True),
        aatjax.load(ast_oracle.write_layout(oracle, "original", tmp_path / "o")),
    ]
    assert {v.origin.fingerprint for v in variants} == {model.origin.fingerprint}
    other = ast_oracle.write_layout(ast_oracle.random_hf_ast(1), "hf", tmp_path / "other")
    assert aatjax.load(other).origin.fingerprint != model.origin.fingerprint


def test_a_fingerprint_sees_every_bit_name_and_shape_outside_the_head():
    rng = np.random.default_rng(0)
    base = {name: rng.normal(size=(4, 6)).astype(np.float32) for name in ("a", "b", "head/x")}
    plain = fingerprint_backbone(base)
    assert fingerprint_backbone(dict(reversed(base.items()))) == plain, "the order is none"
    assert fingerprint_backbone(base | {"head/x": base["a"]}) == plain
    assert fingerprint_backbone({**base, "a": np.asfortranarray(base["a"])}) == plain
    moved = base["a"].copy()
    moved[3, 5] = np.nextafter(moved[3, 5], np.float32(9))
    changed = [
        base | {"a": moved},
        base | {"a": base["b"], "b": base["a"]},
        base | {"a": base["a"].reshape(6, 4)},
        {"c" if name == "a" else name: value for name, value in base.items()},
        base | {"c": np.zeros((0,), np.float32)},
    ]
    assert len({plain, *map(fingerprint_backbone, changed)}) == 1 + len(changed)


# ------------------------------------------------------------------------------ bad sources


def test_a_missing_file_says_what_a_source_may_be(tmp_path):
    with pytest.raises(
        DataError, match=r"no such file or folder.*owner/name.*'random:base'"
    ) as info:
        aatjax.load(tmp_path / "nothing.pth")
    assert str(tmp_path / "nothing.pth") in str(info.value)
    assert "\n" not in str(info.value)
    with pytest.raises(DataError, match=r"weights/nothing\.pth: no such file"):
        aatjax.load("weights/nothing.pth")


def test_what_looks_like_a_repository_is_looked_up():
    with pytest.raises(UnavailableError, match="nobody/nothing"):
        aatjax.load("nobody/nothing")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("sound.wav", b"RIFF\x24\x00\x00\x00WAVEfmt "),
        ("empty.pth", b""),
        ("text.safetensors", b"this is no tensor file at all, only a text"),
        ("adapter.pth", b"PK\x03\x04" + bytes(60)),
    ],
)
def test_a_file_of_another_kind_is_refused_in_one_line(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as info:
        aatjax.load(path)
    assert str(path) in str(info.value)
    assert "\n" not in str(info.value)


def test_weights_of_another_model_are_refused(tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "other.safetensors"
    save_file({"wav2vec2.encoder.layers.0.weight": np.zeros((2, 2), np.float32)}, path)
    with pytest.raises(DataError, match="not AST weights"):
        aatjax.load(path)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(DataError) as info:
        aatjax.load(tmp_path)
    assert str(tmp_path) in str(info.value)


def test_an_unknown_option_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match="load has no option 'frame', did you mean 'frames'"):
        aatjax.load("embedded", num_classes=3, frame=100)  # pyright: ignore[reportCallIssue]


def test_the_options_are_one_definition():
    """A config and a stored model give their options by the same names."""
    model = aatjax.load("embedded", num_classes=3, mask_padding=True, remat=None)
    assert model.config.mask_padding and not model.config.remat
    names = set(aatjax.LoadOptions.__annotations__)
    assert set(select_load_options(model.config)) == names - {"rgb"}
    assert set(select_load_options(Model())) == names - {"rgb", "mels", "implementation"}
    assert len(inspect.signature(aatjax.load).parameters) <= 8
