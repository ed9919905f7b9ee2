"""Intermediate values, routing under transformations, embeddings with their labels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from petl_cases import make_clips, make_model, randomize
from tiny_model import tiny_config

import aatjax
from aatjax import data, petl, surgery
from aatjax.data.synthetic.dataset import TARGET_SOUNDS
from aatjax.errors import UsageError
from aatjax.models.ast import AST
from aatjax.train.evaluation import score_clips

METHOD = petl.Combined((petl.SoftMoA(width=3, slots=2), petl.AAT(spatial=False)))


def make(method=METHOD, **config) -> AST:
    return randomize(aatjax.adapt(make_model(**config), method))


@pytest.mark.parametrize("scan", [False, True])
def test_outputs_are_those_of_the_modules_run_by_hand(scan):
    model, x = make(scan=scan), make_clips()
    found = aatjax.capture(model, x, "embed", "blocks/*", "blocks/*/attn", "norm", "pool", "head")
    np.testing.assert_allclose(found["head"], model(x), atol=1e-5)
    tokens = model.embed(x)
    np.testing.assert_allclose(found["embed"], tokens, atol=1e-6)
    for number, block in enumerate(model.blocks):
        attended = block.attn(block.ln1(tokens))
        np.testing.assert_allclose(found[f"blocks/{number}/attn"], attended, atol=1e-4)
        tokens = block(tokens)
        np.testing.assert_allclose(found[f"blocks/{number}"], tokens, atol=1e-4)
    np.testing.assert_allclose(found["norm"], model.norm(tokens), atol=1e-4)
    assert len(found) == 4 + 2 * model.config.depth


def test_attention_weights_are_the_softmax_written_out():
    model, x = make(mask_padding=True), make_clips()
    valid = jnp.array([46, 20])
    found = aatjax.capture(model, x, "blocks/0", "blocks/*/attn/weights", "embed", valid=valid)
    attn, norm = model.blocks[0].attn.base, model.blocks[0].ln1
    mask = np.asarray(model.embed.mask(valid))
    u = norm(found["embed"])
    heads = attn.heads
    q, k = (
        np.asarray(project(u), np.float64).reshape(*u.shape[:2], heads, -1)
        for project in (attn.q, attn.k)
    )
    scores = np.einsum("bnhk,bmhk->bhnm", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(mask[:, None, None], scores, -np.inf)
    expected = np.exp(scores - scores.max(axis=-1, keepdims=True))
    expected /= expected.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(found["blocks/0/attn/weights"], expected, atol=1e-5)
    assert set(found) == {"blocks/0", "embed", "blocks/0/attn/weights", "blocks/1/attn/weights"}


def test_mixtures_give_what_routing_gives_also_under_jit():
    model, x = make(), make_clips()
    names = [f"blocks/*/attn/soft_moa/{name}" for name in ("dispatch", "combine", "slots")]
    found = jax.jit(lambda x: aatjax.capture(model, x, *names))(x)
    expected = petl.routing(model, x)
    traced = jax.jit(lambda x: petl.routing(model, x))(x)
    assert isinstance(expected["blocks/0/attn/soft_moa"].combine, np.ndarray)
    for site, one in expected.items():
        for name in ("dispatch", "combine", "slots"):
            np.testing.assert_allclose(found[f"{site}/{name}"], getattr(one, name), atol=1e-5)
            np.testing.assert_allclose(getattr(traced[site], name), getattr(one, name), atol=1e-5)
        np.testing.assert_allclose(traced[site].use, one.use, atol=1e-5)
    dense = make(petl.DenseMoA(width=3))
    gates = aatjax.capture(dense, x, "blocks/*/attn/dense_moa/combine")
    assert all(value.shape[-1] == 7 for value in gates.values())
    with pytest.raises(UsageError, match=r"dispatch.* matches no value"):
        aatjax.capture(dense, x, "blocks/*/attn/dense_moa/dispatch")


def test_a_gradient_flows_through_what_is_captured():
    model, x = make(), make_clips()

    def loss(model):
        return jnp.square(aatjax.capture(model, x, "blocks/1")["blocks/1"]).mean()

    grads = nnx.grad(loss)(model)
    sizes = {path: float(jnp.abs(v).max()) for path, v in flatten(grads).items()}
    assert sizes["blocks/0/attn/soft_moa/w_up"] > 1e-6
    assert sizes["head/linear/kernel"] == 0
    per_clip = jax.vmap(lambda x: aatjax.capture(model, x[None], "pool")["pool"][0])(x)
    np.testing.assert_allclose(per_clip, aatjax.capture(model, x, "pool")["pool"], atol=1e-5)


def flatten(grads) -> dict[str, jax.Array]:
    pairs = nnx.to_flat_state(grads)
    return {"/".join(str(k) for k in path if k != "base"): v[...] for path, v in pairs}


def test_nothing_of_the_model_changes_and_a_wrong_glob_lists_what_there_is():
    model, x = make(), make_clips()
    before = nnx.split(model)
    aatjax.capture(model, x, "**", "blocks/*/attn/weights")
    after = nnx.split(model)
    assert before[0] == after[0]
    for one, other in zip(jax.tree.leaves(before[1]), jax.tree.leaves(after[1]), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(UsageError, match=r"'block/\*' matches no value.*blocks/\*/attn/weights"):
        aatjax.capture(model, x, "block/*")


def test_embeddings_come_with_labels_and_names():
    sounds = data.Synthetic(TARGET_SOUNDS[:3], clips=2, seconds=1.0)
    model = aatjax.adapt(AST(tiny_config(), rngs=nnx.Rngs(0)), petl.AAT())
    found = aatjax.embed(model, sounds, batch_size=4)
    matrix, labels, ids = found
    assert matrix.shape == (6, 32) and matrix.dtype == np.float32
    np.testing.assert_array_equal(labels, [clip.label[0] for clip in sounds.clips])
    assert ids == tuple(clip.id for clip in sounds.clips)
    # The model pools the mean of the patches: its logits are its head on these vectors.
    np.testing.assert_allclose(model.head(matrix), score_clips(model, sounds).logits, atol=1e-4)
    two = data.Arrays([sounds.waveform(0), sounds.waveform(1)], [[1, 0], [1, 1]], ("a", "b"))
    np.testing.assert_array_equal(aatjax.embed(model, two).labels, [[1, 0], [1, 1]])


def test_a_part_of_a_model_is_a_module():
    model, x = make(), make_clips()
    found = surgery.modules(model)["blocks/1/attn/soft_moa"]
    tokens = aatjax.capture(model, x, "blocks/1/ln1")["blocks/1/ln1"]
    expected = aatjax.capture(model, x, "blocks/1/attn/soft_moa")["blocks/1/attn/soft_moa"]
    np.testing.assert_allclose(found(tokens), expected, atol=1e-5)
