"""Blocks and widths by layer, several adapters of a kind, stacks of adapters by vmap."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from petl_cases import make_clips, make_model, randomize

import aatjax
from aatjax import petl, surgery
from aatjax.errors import UsageError
from aatjax.petl.base import Method

DEPTH = 4


def make(method, **options):
    return aatjax.adapt(make_model(depth=DEPTH), method, **options)


def find_blocks(model) -> set[int]:
    return {int(p.split("/")[1]) for p in surgery.arrays(model, nnx.Param) if "blocks/" in p}


METHODS = [
    petl.AAT,
    petl.Adapter,
    petl.LoRA,
    petl.SoftMoA,
    petl.DenseMoA,
    petl.TopKMoA,
    petl.Prefix,
    petl.BitFit,
    petl.LayerNormTuning,
    petl.Partial,
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_method_of_the_blocks_takes_some_of_them(method):
    for blocks, expected in [
        (None, {2, 3} if method is petl.Partial else {0, 1, 2, 3}),
        ("last3", {1, 2, 3}),
        ("first1", {0}),
        ((2, 0), {0, 2}),
        ((-1,), {3}),
    ]:
        assert find_blocks(make(method(blocks=blocks))) == expected
    for wrong in ("last5", "last0", "some", "3", (4,), (0, 0), (0, -4), ()):
        with pytest.raises(UsageError, match=f"{method.__name__} blocks="):
            make(method(blocks=wrong))


@pytest.mark.parametrize(
    ("blocks", "entering"), [(None, 0), ("first2", 0), ("last2", 1), ((0, 2), 0), ((-1,), 1)]
)
def test_prompts_of_some_blocks_are_replaced_there_and_flow_on(blocks, entering):
    """Against the definition: the rows behind the prefix are set before each chosen block."""
    method = petl.Prompt(tokens=3, blocks=blocks, keep_dist=True, pool=None)
    model = randomize(make(method))
    chosen = find_blocks(model)
    expected = {None: {0, 1, 2, 3}, "first2": {0, 1}, "last2": {2, 3}, (0, 2): {0, 2}, (-1,): {3}}
    assert chosen == expected[blocks]
    values = surgery.arrays(model)
    rows = {p: v for p, v in values.items() if p.endswith("prompts")}
    assert len(rows) == len(chosen) + entering
    prefix, plain = model.config.num_prefix, petl.Prompt(tokens=3, deep=False, keep_dist=True)
    entry = rows.get("embed/prompts", jnp.zeros((1, 3, model.config.dim)))
    shallow = make(dataclasses.replace(plain, pool=None))
    shared = surgery.variables(shallow).keys() & values.keys()
    surgery.assign(shallow, {p: values[p] for p in shared} | {"embed/prompts": entry}, what="test")
    x = shallow.embed(make_clips())
    for number, block in enumerate(shallow.blocks):
        if number in chosen:
            own = jnp.broadcast_to(rows[f"blocks/{number}/prompts"], (len(x), 3, x.shape[-1]))
            x = x.at[:, prefix : prefix + 3].set(own)
        x = block(x)
    logits = shallow.head(shallow.pool(shallow.norm(x)))
    np.testing.assert_allclose(model(make_clips()), logits, atol=1e-4)


def list_widths(model, end: str) -> list[int]:
    return [v.shape[-1] for p, v in surgery.arrays(model).items() if p.endswith(end)]


def test_widths_by_block_in_every_form():
    assert list_widths(make(petl.Adapter(width=(1, 2, 3, 4))), "w_down") == [1, 2, 3, 4]
    model = make(petl.SoftMoA(reduction=(16, 8, 4, 2)))
    assert list_widths(model, "w_down") == [1, 2, 4, 8]
    model = make(petl.AAT(ratio=(0.5, 0.25), blocks="last2", spatial=False))
    assert list_widths(model, "w_down") == [8, 4]
    ranks = make(petl.LoRA(rank=(1, 2), blocks=(0, 3), targets=("q",)))
    assert list_widths(ranks, "lora_a") == [1, 2]
    scales = [m.scale for m in surgery.modules(ranks).values() if hasattr(m, "factors")]
    assert scales == [16.0, 8.0]
    randomize(model)
    assert np.isfinite(model(make_clips())).all()
    with pytest.raises(UsageError, match=r"width=\(1, 2\): 2 sizes for 4 adapted blocks"):
        make(petl.Adapter(width=(1, 2)))
    with pytest.raises(UsageError, match=r"width=\(1, 0\) must be"):
        petl.Adapter(width=(1, 0))


def test_what_is_given_by_block_survives_json():
    for method in (
        petl.SoftMoA(reduction=(16, 8.5), blocks=(0, 1)),
        petl.LoRA(rank=(1, 2, 3, 4), tag="b"),
        petl.Combined((petl.Adapter(), petl.Adapter(tag="x", blocks="last2"))),
    ):
        assert Method.from_json(method.to_json()) == method
    old = {"name": "lora", "rank": 2, "last_blocks": 3}
    assert Method.from_json(old) == petl.LoRA(rank=2, blocks="last3")
    assert Method.from_json({**old, "last_blocks": None}) == petl.LoRA(rank=2)
    assert Method.from_json({"name": "partial", "blocks": 2}) == petl.Partial(blocks="last2")


@pytest.mark.parametrize(
    "pair",
    [
        (petl.Adapter(width=2), petl.Adapter(width=3, tag="wide")),
        (petl.LoRA(rank=1), petl.LoRA(rank=2, tag="more", targets=("v", "k"))),
        (petl.AAT(width=2), petl.AAT(width=3, tag="b")),
        (petl.SoftMoA(width=2), petl.SoftMoA(width=2, tag="b")),
        (petl.Prefix(tokens=2), petl.Prefix(tokens=4, tag="b")),
    ],
    ids=lambda pair: pair[0].name,
)
def test_two_adapters_of_a_kind_have_two_tags(pair):
    """Together they add what each adds, and by turns they can be stacked."""
    both = make(petl.Combined(pair))
    one, other = (make(method) for method in pair)
    count = aatjax.summary(both).trainable + aatjax.summary(make(petl.Linear())).trainable
    shared = {p for p in surgery.arrays(one, nnx.Param) if "/ln" in p}
    extra = sum(surgery.arrays(one)[path].size for path in shared)
    assert count + extra == sum(aatjax.summary(model).trainable for model in (one, other))
    stacked = aatjax.adapt(randomize(one), pair[1])
    assert any(pair[1].tag in path for path in surgery.arrays(stacked, nnx.Param))
    x = make_clips()
    if not isinstance(pair[0], petl.Prefix):
        np.testing.assert_allclose(stacked(x), one(x), atol=1e-4)
    if isinstance(pair[0], petl.LoRA):
        randomize(stacked)
        np.testing.assert_allclose(aatjax.merge(stacked)(x), stacked(x), atol=1e-3)


@pytest.mark.parametrize(
    "earlier",
    [petl.Adapter(block="conformer", kernel=3, reduction=None, width=4), petl.TopKMoA(width=2)],
    ids=["conformer", "top_k_moa"],
)
def test_an_earlier_adapter_rests_while_a_later_one_is_trained(earlier):
    """Neither its batch statistics nor its balance loss take part in training."""
    model = aatjax.adapt(randomize(make(earlier)), petl.LoRA())
    before, expected = surgery.fetch_arrays(model), model(make_clips())
    model.train()
    np.testing.assert_array_equal(model(make_clips()), expected)
    assert surgery.sum_penalties(model) == 0
    after = surgery.fetch_arrays(model)
    for path, value in before.items():
        np.testing.assert_array_equal(after[path], value, err_msg=path)


def test_statistics_that_are_made_trainable_again_are_statistics():
    conformer = make(petl.Adapter(block="conformer", kernel=3, reduction=None, width=4))
    whole = aatjax.adapt(conformer, petl.Full())
    expected = set(surgery.arrays(conformer, nnx.BatchStat))
    assert set(surgery.arrays(whole, nnx.BatchStat)) == expected != set()


def test_without_tags_two_of_a_kind_are_refused_where_they_meet_only():
    with pytest.raises(UsageError, match="blocks/0/mlp/adapter/w_down"):
        make(petl.Combined((petl.Adapter(), petl.Adapter(width=3))))
    apart = petl.Combined(
        (petl.Adapter(width=2, blocks="first2"), petl.Adapter(width=3, blocks="last2"))
    )
    assert list_widths(make(apart), "w_down") == [2, 2, 3, 3]


def test_a_sweep_of_rates_by_vmap_is_the_runs_one_by_one():
    base, x, labels = make_model(), make_clips(), jnp.array([0, 2])
    parts = [
        surgery.split(aatjax.adapt(base, petl.SoftMoA(width=2), seed=seed)) for seed in range(3)
    ]
    rates = jnp.array([1e-3, 1e-2, 1e-1])

    def train(trainable, rate):
        def loss(trainable):
            model = surgery.join(parts[0].graphdef, trainable, parts[0].stats, parts[0].frozen)
            logits = model(x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        for _ in range(2):
            grads = jax.grad(loss)(trainable)
            trainable = jax.tree.map(lambda p, g: p - rate * g, trainable, grads)
        return trainable, loss(trainable)

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[p.trainable for p in parts])
    found, losses = jax.jit(jax.vmap(train))(stacked, rates)
    for index, part in enumerate(parts):
        expected, loss = jax.jit(train)(part.trainable, rates[index])
        np.testing.assert_allclose(losses[index], loss, rtol=1e-4)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one[index], other, atol=1e-5)
