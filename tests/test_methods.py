"""The papers' method tables to the integer, combinations, merging, routing, several adapters."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapter_files import FRONTEND, inputs, save, trained, write_base
from flax import nnx
from petl_cases import CASES, find_form, make_clips, make_model, randomize

import aatjax
from aatjax import petl, surgery
from aatjax.analysis.flops import count_flops
from aatjax.analysis.method_costs import compare_costs
from aatjax.audio.augment import Augment
from aatjax.cli import main
from aatjax.errors import DataError, UsageError
from aatjax.models.ast import AST, ASTConfig
from aatjax.train.optim import Optim, make_optimizer
from aatjax.train.state import init_state
from aatjax.train.step import make_steps

# ------------------------------------------------------------------ integers of AST-base


@functools.cache
def abstract(config: ASTConfig) -> AST:
    return nnx.eval_shape(lambda: AST(config, rngs=nnx.Rngs(0)))


def count(method: petl.Method, size: str = "base", **config: Any) -> aatjax.Summary:
    """The summary of an adapted model; no weight is allocated."""
    plain = abstract(ASTConfig.size(size, **config))
    return aatjax.summary(nnx.eval_shape(lambda model: aatjax.adapt(model, method), plain))


def conformer(kernel: int, **fields: Any) -> petl.Method:
    return petl.Adapter(block="conformer", reduction=96, kernel=kernel, **fields)


ESC50 = dict(frames=500, num_classes=50, pool="mean_all", head_norm=False)
# arXiv 2312.03694 and 2402.00828: ESC-50, 500 frames, mean of all tokens, head without LayerNorm.
COUNTS = [
    (petl.Full(), 85_746_482),
    (petl.Linear(), 39_986),
    (petl.BitFit(), 140_594),
    (petl.Adapter(reduction=64), 288_962),
    (petl.Adapter(width=12), 288_962),
    (petl.Adapter(reduction=64, location="both"), 537_938),
    (petl.Adapter(reduction=96), 215_186),
    (petl.Adapter(reduction=96, location="both"), 390_386),
    (petl.Adapter(reduction=128), 178_298),
    (petl.Adapter(reduction=128, location="both"), 316_610),
    (conformer(8), 308_498),
    (conformer(8, location="both"), 577_010),
    (conformer(31), 310_706),
    (conformer(31, location="both"), 581_426),
    (petl.LoRA(), 261_170),
    (petl.LoRA(rank=6), 261_170),
    (petl.LoRA(reduction=64), 482_354),
    (petl.Prefix(tokens=24), 261_170),
    (petl.Prompt(tokens=300, deep=False), 270_386),
    (petl.Prompt(tokens=25), 270_386),
    (petl.DenseMoA(), 962_174),
    (petl.DenseMoA(location="both"), 1_884_362),
    (petl.SoftMoA(), 962_090),
    (petl.SoftMoA(width=6), 962_090),
    (petl.SoftMoA(location="ffn"), 962_090),
    (petl.SoftMoA(location="both"), 1_884_194),
    (petl.SoftMoA(num_experts=15), 1_994_858),
    (petl.SoftMoA(num_experts=2), 316_610),
    (petl.SoftMoA(slots=2), 986_616 + 39_986),
    (petl.SoftMoA(num_experts=1, reduction=768 / 46), 885_288 + 39_986),
    (petl.SoftMoA(num_experts=24, reduction=768), 903_456 + 39_986),
    (petl.SoftMoA(train_norm=False), 903_672 + 39_986),
]


@pytest.mark.parametrize(("method", "published"), COUNTS, ids=lambda v: str(v)[:60])
def test_the_trainable_integers_of_esc50(method, published):
    assert count(method, **ESC50).trainable == published


@pytest.mark.parametrize("method", [petl.Linear(), petl.SoftMoA()], ids=str)
def test_either_the_norm_of_the_head_or_that_of_the_body_is_trained(method):
    """The same integer, with 1,536 more parameters in the model."""
    counted = count(method, **{**ESC50, "head_norm": True})
    body = count(method, **ESC50)
    published = dict(COUNTS)[method]
    assert counted.trainable == body.trainable == published
    norms = 12 * 1_536 if isinstance(method, petl.SoftMoA) else 0  # trained, not added
    assert body.total == 85_708_032 + 769 * 50 + published - 39_986 - norms
    assert counted.total == body.total + 1_536


@pytest.mark.parametrize("method", [petl.SoftMoA(), petl.Prompt(), conformer(8)], ids=str)
def test_the_published_form_trains_as_many(method):
    assert count(method.replace(as_published=True), **ESC50).trainable == dict(COUNTS)[method]


def test_the_classes_change_the_head_and_the_length_full_fine_tuning_alone():
    shape = dict(num_classes=35, pool="mean_all", head_norm=False)
    assert count(petl.Full(), frames=100, **shape).trainable == 85_339_392 + 26_915
    for method, published in COUNTS[1::6]:
        assert count(method, frames=100, **shape).trainable == published - 769 * 15


# The published totals of full fine-tuning count two 1000-way ImageNet heads that nothing uses.
IMAGENET_HEADS = 2 * (768 * 1000 + 1000)


@pytest.mark.parametrize(("classes", "frames"), [(50, 512), (20, 1024)])
@pytest.mark.parametrize(
    ("method", "core"),
    [
        (petl.Linear(), 0),
        (petl.Partial(), 42_527_232),
        (petl.Prompt(tokens=12, keep_dist=True, pool=None), 110_592),
        (petl.AAT(spatial=False), 3_550_464),
        (petl.AAT(mlp=False), 3_550_464),
        (petl.AAT(), 7_100_928),
        (petl.Full(), None),
    ],
    ids=["head", "partial", "prompt", "M", "S", "MS", "full"],
)
def test_the_integers_of_the_aat_paper(method, core, classes, frames):
    counted = count(method, num_classes=classes, frames=frames)
    head = {50: 39_986, 20: 16_916}[classes]
    if core is None:
        published = {50: 87_295_234, 20: 87_742_180}[classes]
        assert counted.trainable == counted.total == published - IMAGENET_HEADS
        return
    assert counted.trainable == core + head
    body = {512: 85_717_248, 1024: 86_187_264}[frames]
    assert counted.total == body + head + (0 if isinstance(method, petl.Partial) else core)


@pytest.mark.parametrize(
    ("experts", "location", "core"),
    [
        (2, "mhsa", 885_288),
        (4, "mhsa", 885_264),
        (7, "mhsa", 903_672),
        (15, "mhsa", 829_800),
        (24, "mhsa", 885_024),
        (2, "both", 885_264),
        (12, "both", 885_024),
    ],
)
def test_a_budget_finds_the_papers_widths(experts, location, core):
    method = petl.SoftMoA(num_experts=experts, location=location, budget=900_000, train_norm=False)
    assert count(method, **ESC50).trainable - 39_986 == core


@pytest.mark.slow
def test_another_size_and_the_frame_patches_of_ssast_follow_the_closed_forms():
    shape = dict(
        size="small",
        frames=512,
        num_classes=10,
        patch=(128, 2),
        stride=(128, 1),
        pool="mean_patches",
    )
    dim = 384
    head, r = 2 * dim + 11 * dim - dim + 10, round(dim / 64)
    block = 2 * dim * r + r + dim
    conv = 2 * dim + dim * 2 * r + 2 * r + 8 * r + r + 2 * r + r * dim + dim
    convpass = 2 * dim * r + r + dim + 3 * r * r + r
    wide, slots = 2 * dim * (dim // 4) + dim // 4 + dim, 5 * (block + 2 * dim) + 2 * dim
    for method, added in {
        petl.Adapter(reduction=64): block + 2 * dim,
        petl.Adapter(block="conformer", reduction=64): conv + 2 * dim,
        petl.LoRA(targets=("q", "k", "v", "o"), reduction=64): 8 * dim * r,
        petl.DenseMoA(expert="convpass", reduction=64): 7 * convpass + 7 * (dim + 1) + 2 * dim,
        petl.AAT(): 2 * wide,
        petl.AAT(spatial=False): wide,
        petl.SoftMoA(num_experts=5, slots=2, reduction=64, location="both"): 2 * slots,
    }.items():
        assert count(method, **shape).trainable == 12 * added + head, method


def test_the_table_command_prints_every_row(capsys, monkeypatch):
    for name in petl.TABLE.keys() - {"dense_moa", "soft_moa_houlsby", "full"}:
        monkeypatch.delitem(petl.TABLE, name)  # the others are counted above
    assert main.run(["methods", "--body-norm"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(petl.TABLE)
    rows = {line.split()[0]: line for line in lines[1:]}
    assert "962,174" in rows["dense_moa"] and "+1.066" in rows["dense_moa"]
    assert "location=both" in rows["soft_moa_houlsby"] and "1,884,194" in rows["soft_moa_houlsby"]
    assert main.run(["methods", "--size", "tiny", "--frames", "100", "--json"]) == 0
    read = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in read] == list(petl.TABLE)
    assert petl.Method.from_json(read[-2]["method"]) == petl.SoftMoA(location="both")


# ------------------------------------------------------------- positions and permutations


def permuted(x: jax.Array, rng: np.random.Generator) -> jax.Array:
    """Clips whose non-overlapping patches are shuffled: tokens permuted, nothing else."""
    b, t, f = x.shape
    patches = np.asarray(x).reshape(b, t // 6, 6, f // 6, 6).transpose(0, 1, 3, 2, 4)
    flat = patches.reshape(b, -1, 6, 6)[:, rng.permutation(t // 6 * (f // 6))]
    back = flat.reshape(b, t // 6, f // 6, 6, 6).transpose(0, 1, 3, 2, 4)
    return jnp.asarray(back.reshape(b, t, f))


@pytest.mark.parametrize(
    ("name", "positions"),
    [
        ("linear", "learned"),
        ("adapter", "zeros"),
        ("soft_moa_mhsa", "zeros"),
        ("conformer", "zeros"),
    ],
)
def test_without_positions_only_the_conformer_depends_on_the_order_of_patches(name, positions):
    method, _ = CASES[name]
    shape = dict(patch=(6, 6), stride=(6, 6), frames=36, mels=24, pool="mean_all")
    adapted = randomize(aatjax.adapt(make_model(**shape), method))
    if positions == "zeros":
        petl.base.zero_positions(adapted)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 36, 24)), jnp.float32)
    change = np.abs(adapted(permuted(x, np.random.default_rng(1))) - adapted(x)).max()
    assert bool(change < 1e-5) is (positions == "zeros" and name != "conformer")
    assert change < 1e-5 or change > 1e-3


def test_loading_with_zero_positions_is_remembered_by_the_adapter(tmp_path: Path):
    base = write_base(tmp_path / "base.safetensors")
    adapted = trained(base, petl.Adapter(reduction=8), positions="zeros")
    assert not surgery.arrays(adapted)["embed/pos"].any()
    assert aatjax.load(base).embed.pos[...].any()
    found = aatjax.load_adapter(save(tmp_path / "a.safetensors", adapted))
    assert found.model.config.positions == "zeros"
    np.testing.assert_array_equal(found.model(inputs()), adapted(inputs()))


@pytest.mark.slow
def test_random_weights_can_have_zero_positions():
    random = aatjax.load("random:tiny", num_classes=2, frames=26, positions="zeros")
    assert not surgery.arrays(random)["embed/pos"].any()


@pytest.mark.parametrize("name", ["adapter", "lora", "soft_moa", "dense_moa", "prefix", "prompt"])
def test_as_published_zeroes_the_positions_and_starts_all_projections_at_random(name):
    method, _ = find_form(name, True)
    held = surgery.arrays(aatjax.adapt(make_model(), method))
    assert not held["embed/pos"].any()
    ups = [value for path, value in held.items() if path.endswith(("w_up", "lora_b"))]
    assert all(0.01 < float(value.std()) < 0.03 for value in ups)
    assert ups or name in ("prefix", "prompt")


@pytest.mark.parametrize("name", ["linear", "full", "bitfit", "adapter", "lora", "soft_moa"])
def test_as_published_starts_the_head_like_a_linear_layer_of_pytorch(name):
    method = find_form(name, True)[0]
    model = make_model(num_classes=400)
    held = surgery.arrays(aatjax.adapt(model, method, seed=3))
    bound = model.config.dim**-0.5
    for path in ("head/linear/kernel", "head/linear/bias"):
        assert 0.97 * bound < float(np.abs(held[path]).max()) <= bound
        assert float(held[path].std()) == pytest.approx(bound / 3**0.5, rel=0.1)
    other = surgery.arrays(aatjax.adapt(model, method, seed=4))
    assert np.abs(other["head/linear/bias"] - held["head/linear/bias"]).max() > 0.1 * bound
    kept = surgery.arrays(aatjax.adapt(model, method.replace(as_published=False)))
    np.testing.assert_array_equal(kept["head/linear/kernel"], model.head.linear.kernel[...])


@pytest.mark.parametrize(
    "method",
    [
        petl.AAT(as_published=True),
        petl.Partial(as_published=True),
        petl.Prompt(tokens=2, keep_dist=True, pool=None, as_published=True),
    ],
    ids=lambda method: method.name,
)
def test_as_published_starts_the_head_of_aat_with_a_small_weight_and_a_uniform_bias(method):
    model = make_model(num_classes=400)
    held = surgery.arrays(aatjax.adapt(model, method))
    bound = model.config.dim**-0.5
    weight, bias = held["head/linear/kernel"], held["head/linear/bias"]
    assert float(weight.std()) == pytest.approx(0.01, rel=0.05)
    assert float(np.abs(weight).max()) > 0.025, "not truncated at two deviations"
    assert 0.97 * bound < float(np.abs(bias).max()) <= bound
    np.testing.assert_array_equal(held["embed/pos"], model.embed.pos[...])


def test_published_mixtures_are_added_twice_at_the_attention_alone():
    found = {}
    for location in ("mhsa", "ffn", "both"):
        method = petl.SoftMoA(reduction=4.0, location=location, as_published=True)
        found[location] = set(surgery.modules(aatjax.adapt(make_model(), method)))
    assert "blocks/0/soft_moa" in found["mhsa"] and "blocks/0/attn/soft_moa" not in found["mhsa"]
    assert "blocks/0/mlp/soft_moa" in found["ffn"] and "blocks/0/attn/soft_moa" in found["both"]


# ------------------------------------------------------------------- training, saving


def batch(frontend: Any, classes: int, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    audio = (3000 * rng.normal(size=(4, frontend.samples))).astype(np.int16)
    target = np.eye(classes, dtype=np.float32)[rng.integers(0, classes, 4)]
    length = np.full(4, frontend.samples, np.int32)
    return dict(audio=audio, length=length, target=target, weight=np.ones(4, np.float32))


# The first case of each class and block: the gradients of all cases are held against an oracle.
KINDS = {
    (type(method), getattr(method, "block", None), getattr(method, "expert", None)): name
    for name, (method, _) in reversed(CASES.items())
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS.values())
def test_fifty_steps_move_all_that_is_trained_and_nothing_else(name, tmp_path):
    """And what was trained comes back from its file, BatchNorm statistics included."""
    method, _ = CASES[name]
    base = write_base(tmp_path / "base.safetensors")
    adapted = aatjax.adapt(aatjax.load(base, num_classes=3), method)
    parts = surgery.split(adapted)
    tx = make_optimizer(Optim(lr=1e-2), steps_per_epoch=10, epochs=5)
    steps = make_steps(parts.graphdef, tx, frontend=FRONTEND, augment=Augment(), loss="ce")
    state = init_state(parts.trainable, parts.stats, tx, average=False)
    frozen = jax.tree.map(np.asarray, parts.frozen)
    for step in range(50):
        state, sums = steps.train(
            state, parts.frozen, batch(FRONTEND, 3, step % 3), jax.random.key(0)
        )
        assert np.isfinite(float(sums["loss"]))
    after = surgery.join(parts.graphdef, state.trainable, state.stats, parts.frozen)
    for kind, moves in ((nnx.Param, True), (nnx.BatchStat, True)):
        old, new = surgery.arrays(adapted, kind), surgery.arrays(after, kind)
        assert all(bool((old[p] != new[p]).any()) is moves for p in old), [
            p for p in old if not (old[p] != new[p]).any()
        ]
    jax.tree.map(np.testing.assert_array_equal, parts.frozen, frozen)
    moments = jax.tree.leaves(state.opt_state[0][0].mu)
    assert len(moments) == len(jax.tree.leaves(state.trainable))
    after.method, after.origin = adapted.method, adapted.origin
    found = aatjax.load_adapter(save(tmp_path / "adapter.safetensors", after))
    np.testing.assert_array_equal(found.model(inputs()), after(inputs()))


def test_the_training_step_adds_the_balance_loss_to_the_gradient(tmp_path):
    """One step of gradient descent follows the sum of the two gradients."""
    method = petl.TopKMoA(num_experts=4, top=2, width=4, balance=2.0)
    base = write_base(tmp_path / "b.safetensors")
    parts = surgery.split(aatjax.adapt(aatjax.load(base, num_classes=3), method))
    tx = optax.sgd(1.0)
    steps = make_steps(parts.graphdef, tx, frontend=FRONTEND, augment=Augment(), loss="ce")
    state = init_state(parts.trainable, parts.stats, tx, average=False)
    one = batch(FRONTEND, 3, 0)
    after, _ = steps.train(state, parts.frozen, one, jax.random.key(0))
    x = FRONTEND(jnp.asarray(one["audio"]), jnp.asarray(one["length"]))

    @jax.jit
    @jax.jacobian
    def find_slopes(trainable: Any) -> Any:
        model = surgery.join(parts.graphdef, trainable, parts.stats, parts.frozen)
        model.train()
        loss = optax.softmax_cross_entropy(model(x), one["target"]).mean()
        return jnp.stack([loss, surgery.sum_penalties(model)])

    slopes = find_slopes(parts.trainable)
    largest = max(float(jnp.abs(leaf[1]).max()) for leaf in jax.tree.leaves(slopes))
    assert largest > 1e-2
    moved = jax.tree.map(lambda a, b: b - a, after.trainable, parts.trainable)
    for found, both in zip(jax.tree.leaves(moved), jax.tree.leaves(slopes), strict=True):
        np.testing.assert_allclose(found, both.sum(axis=0), atol=1e-4 * largest)


# ------------------------------------------------------------------------ merging


@pytest.mark.parametrize(
    "method",
    [
        petl.LoRA(targets=("q", "k", "v", "o"), reduction=4),
        petl.LoRA(reduction=8, scale="alpha/reduction"),
        petl.LoRA(reduction=8, as_published=True),
    ],
)
def test_lora_merges_into_a_plain_model_that_computes_the_same(method):
    adapted = randomize(aatjax.adapt(make_model(), method))
    merged = aatjax.merge(adapted)
    np.testing.assert_allclose(merged(make_clips()), adapted(make_clips()), rtol=1e-5, atol=1e-5)
    plain = make_model()
    assert set(surgery.variables(merged)) == set(surgery.variables(plain))
    assert not surgery.arrays(merged, nnx.Param) and merged.method is None
    moved = surgery.arrays(merged)["blocks/0/attn/q/kernel"]
    assert np.abs(moved - surgery.arrays(adapted)["blocks/0/attn/q/kernel"]).max() > 1e-3
    assert surgery.arrays(adapted)["blocks/0/attn/q/lora_a"].any(), "the original is not changed"


def test_merging_keeps_other_adapters():
    method = petl.Combined(
        (petl.AAT(), petl.Prefix(tokens=4), petl.LoRA(rank=1, targets=("k", "v")))
    )
    adapted = randomize(aatjax.adapt(make_model(), method))
    merged = aatjax.merge(adapted)
    np.testing.assert_allclose(merged(make_clips()), adapted(make_clips()), rtol=1e-5, atol=1e-5)
    names = set(surgery.variables(merged))
    assert not any("lora" in name for name in names)
    assert "blocks/0/mlp/mlp_adapter/w_up" in names and "blocks/0/attn/k/prefix" in names


@pytest.mark.parametrize("name", ["soft_moa", "aat", "linear"])
def test_what_cannot_be_merged_is_refused(name):
    with pytest.raises(UsageError, match="has nothing that can be merged into the backbone"):
        aatjax.merge(aatjax.adapt(make_model(), CASES[name][0]))


# ------------------------------------------------------------------------ routing


@pytest.mark.parametrize(
    ("name", "scan"), [("soft_moa_both", True), ("soft_moa_normalized", False), ("top_k_moa", True)]
)
def test_routing_returns_the_weights_that_the_model_uses(name, scan):
    method, _ = CASES[name]
    adapted = randomize(aatjax.adapt(make_model(scan=scan), method))
    before = adapted(make_clips())
    found = petl.routing(adapted, make_clips())
    sites = 4 if name.endswith("both") else 2
    assert len(found) == sites and all(path.startswith("blocks/") for path in found)
    for path, one in found.items():
        mixture: Any = surgery.modules(adapted)[path]
        experts = mixture.w_down.shape[0]
        axes = tuple(range(2, one.combine.ndim))
        np.testing.assert_allclose(one.combine.sum(axis=axes), 1, atol=1e-5)
        assert one.use.shape == (experts,) and abs(one.use.sum() - 1) < 1e-5
        if "soft" in name:
            assert one.dispatch is not None and one.slots is not None
            np.testing.assert_allclose(one.dispatch.sum(axis=1), 1, atol=1e-5)
            assert one.slots.shape == (2, experts, 2, 16)
        if name == "top_k_moa":
            assert ((one.combine > 0).sum(axis=-1) == 2).all()
    np.testing.assert_array_equal(adapted(make_clips()), before)
    assert not surgery.arrays(adapted, nnx.Intermediate)


def test_the_weights_of_the_first_site_are_those_of_its_input():
    """The mixture at the first attention reads LN1 of the embedding."""
    adapted = randomize(aatjax.adapt(make_model(), CASES["soft_moa_mhsa"][0]))
    block: Any = adapted.blocks[0]
    u = np.asarray(block.ln1(adapted.embed(make_clips())), np.float64)
    phi = np.asarray(surgery.arrays(adapted)["blocks/0/attn/soft_moa/phi"], np.float64)
    scores = np.exp(np.einsum("bnd,dep->bnep", u, phi))
    one = petl.routing(adapted, make_clips())["blocks/0/attn/soft_moa"]
    dispatch = scores / scores.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(one.dispatch, dispatch, rtol=1e-4)
    np.testing.assert_allclose(
        one.combine, scores / scores.sum(axis=(2, 3), keepdims=True), rtol=1e-4
    )
    np.testing.assert_allclose(
        one.slots, np.einsum("bnep,bnd->bepd", dispatch, u), rtol=1e-3, atol=1e-4
    )


def test_the_summary_of_an_even_and_of_a_collapsed_mixture():
    method = petl.SoftMoA(num_experts=4, slots=2, reduction=4.0)
    adapted = aatjax.adapt(make_model(), method)
    flat = {p: v * 0 for p, v in surgery.arrays(adapted).items() if p.endswith("phi")}
    surgery.assign(adapted, flat, what="the test")
    even = petl.diagnose_routing(adapted, make_clips())
    for name in ("combine_entropy", "dispatch_entropy", "balance", "slot_similarity"):
        assert even[name] == pytest.approx(1, abs=1e-5), name
    assert even["least_used"] == pytest.approx(1) == pytest.approx(even["most_used"])

    router = aatjax.adapt(make_model(), petl.DenseMoA(num_experts=4, reduction=4.0))
    bias = {p: np.array([30.0, 0, 0, 0]) for p in surgery.arrays(router) if "b_router" in p}
    surgery.assign(router, bias, what="the test")
    collapsed = petl.diagnose_routing(router, make_clips())
    assert collapsed["balance"] < 1e-3 and collapsed["least_used"] < 1e-6
    assert collapsed["most_used"] == pytest.approx(4) and collapsed["combine_entropy"] < 1e-3
    assert "slot_similarity" not in collapsed


def test_a_model_without_a_mixture_has_no_routing():
    with pytest.raises(UsageError, match="aat has no mixture of adapters"):
        petl.routing(aatjax.adapt(make_model(), petl.AAT()), make_clips())


# --------------------------------------------------------------- several adapters at once


def files(folder: Path) -> tuple[Path, dict[str, Path], dict[str, AST]]:
    base = write_base(folder / "base.safetensors")
    models = {
        "a": trained(base, petl.AAT()),
        "b": trained(base, petl.AAT()),
        "moa": trained(base, petl.SoftMoA(reduction=8.0)),
    }
    for value in surgery.variables(models["b"]).values():
        if isinstance(value, nnx.Param):
            value[...] = value[...] * 0.5 - 0.1
    return base, {n: save(folder / f"{n}.safetensors", m) for n, m in models.items()}, models


def test_adapters_are_held_by_name_and_share_their_backbone(tmp_path):
    base, paths, models = files(tmp_path)
    held = aatjax.Adapters(base)
    for name, path in paths.items():
        held.add(name, path)
    assert (list(held), len(held), held.active) == (["a", "b", "moa"], 3, "a")
    for name, one in models.items():
        np.testing.assert_array_equal(held.use(name)(inputs()), one(inputs()))
        np.testing.assert_array_equal(held(inputs()), one(inputs()))
    first, last = (surgery.arrays(held[name].model) for name in ("a", "moa"))
    for path in ("embed/pos", "blocks/1/mlp/up/kernel"):
        assert first[path].unsafe_buffer_pointer() == last[path].unsafe_buffer_pointer()
    held.remove("moa")
    assert held.active is None and list(held) == ["a", "b"]
    with pytest.raises(UsageError, match="no adapter is active"):
        held(inputs())
    with pytest.raises(UsageError, match=r"no adapter 'moa' \(there are a, b\)"):
        held.use("moa")
    with pytest.raises(UsageError, match="there is an adapter 'a' already"):
        held.add("a", paths["a"])


def test_adapters_of_another_backbone_are_refused(tmp_path):
    _, paths, _ = files(tmp_path)
    other = trained(write_base(tmp_path / "other.safetensors", seed=5), petl.AAT())
    held = aatjax.Adapters()
    held.add("a", paths["a"])
    with pytest.raises(UsageError, match="'a' and 'x' were trained on different backbones"):
        held.add("x", save(tmp_path / "x.safetensors", other))
    with pytest.raises(DataError, match="was trained on base"):
        aatjax.Adapters(tmp_path / "other.safetensors").add("a", paths["a"])


def test_the_average_is_the_weighted_mean_of_what_was_trained(tmp_path):
    _, paths, models = files(tmp_path)
    held = aatjax.Adapters()
    for name in ("a", "b", "moa"):
        held.add(name, paths[name])
    mean = held.average("mean", {"a": 3.0, "b": 1.0})
    one, other = (surgery.arrays(models[name], nnx.Param) for name in ("a", "b"))
    found = surgery.arrays(mean.model, nnx.Param)
    assert set(found) == set(one)
    for path, value in found.items():
        np.testing.assert_allclose(value, 0.75 * one[path] + 0.25 * other[path], atol=1e-6)
    again = aatjax.load_adapter(save(tmp_path / "mean.safetensors", mean.model))
    np.testing.assert_array_equal(again.model(inputs()), held.use("mean")(inputs()))
    with pytest.raises(UsageError, match="adapters 1 and 2 are of different methods"):
        held.average("no", {"a": 1.0, "moa": 1.0})
    with pytest.raises(UsageError, match="for each a weight above 0"):
        held.average("no", {"a": 1.0, "b": 0.0})


# ------------------------------------------------------------------------- FLOPs


def test_flops_of_products_convolutions_and_scans():
    a, b = jnp.ones((3, 4, 5)), jnp.ones((3, 5, 6))
    assert count_flops(lambda a, b: a @ b, a, b) == 2 * 3 * 4 * 5 * 6
    assert count_flops(jax.jit(jax.checkpoint(lambda a, b: a @ b)), a, b) == 720

    def loop(a):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ c), None), a, None, length=7)[0]

    assert count_flops(loop, jnp.ones((4, 4))) == 7 * 2 * 64
    conv = nnx.Conv(2, 3, (4, 5), strides=(2, 2), padding="VALID", rngs=nnx.Rngs(0))
    assert count_flops(conv, jnp.ones((1, 8, 9, 2))) == 2 * (3 * 3 * 3) * 4 * 5 * 2
    with pytest.raises(UsageError, match=r"use lax\.scan"):
        count_flops(
            lambda a: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ c, a),
            jnp.ones((4, 4)),
        )


def test_flops_of_a_model_are_those_of_xla_and_of_the_papers_formulas():
    """XLA counts everything, so a little more; scanned and unrolled are the same."""
    config = ASTConfig.size("tiny", frames=100, num_classes=10, depth=2)
    costs = {cost.name: cost.added_flops for cost in compare_costs(config)}
    n, d, r = config.num_tokens, 192, 8  # by default at least 8 on a narrow model
    assert costs["linear"] == costs["full"] == costs["bitfit"] == 0
    assert costs["soft_moa"] == 2 * 2 * (3 * 7 * n * d + 2 * 7 * d * r)
    assert costs["dense_moa"] == 2 * 2 * (2 * 7 * n * d * r + n * d * 7 + 7 * n * d)
    assert costs["aat_m"] == 2 * 2 * (2 * n * d * 48)
    one, scanned = (
        AST(dataclasses.replace(config, scan=scan), rngs=nnx.Rngs(0)) for scan in (False, True)
    )
    x = jnp.ones((1, 100, 128))
    counted = count_flops(one, x)
    assert count_flops(scanned, x) == counted
    compiled: Any = jax.jit(lambda x: one(x)).lower(x).compile().cost_analysis()
    assert counted < compiled["flops"] < 1.1 * counted
