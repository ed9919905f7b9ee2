"""Every adaptation method: what it trains, how many parameters, what it computes."""

import dataclasses
import fnmatch
import json
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from petl_oracle import Oracle
from test_soft_moe import finite_differences, gelu, soft_moe_numpy

import aatjax
from aatjax import petl, surgery
from aatjax.errors import UsageError
from aatjax.models.ast import AST, ASTConfig
from aatjax.petl.base import Method, Parallel
from aatjax.petl.bottleneck import Bottleneck
from aatjax.petl.moa import MixtureShape
from aatjax.petl.soft_moa import SoftMixture
from aatjax.surgery import Trainable

CONFIG = ASTConfig(dim=16, depth=2, heads=2, mlp_dim=24, mels=36, frames=46, num_classes=5)
HEAD = ("head/norm/*", "head/linear/*")
BARE_HEAD = ("norm/*", "head/linear/*")
ADAPTER = ("w_down", "b_down", "w_up", "b_up")
MIXTURE = ("phi", *ADAPTER)


def at(site: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"blocks/*/{site}/{name}" for name in names)


MLP = at("mlp/mlp_adapter", ADAPTER)
SPATIAL = at("attn/spatial_adapter", ADAPTER)
ATTN_MIXTURE, MLP_MIXTURE = at("attn/soft_moa", MIXTURE), at("mlp/soft_moa", MIXTURE)
LN1, LN2 = ("blocks/*/ln1/*",), ("blocks/*/ln2/*",)


def soft(**fields: Any) -> Method:
    return petl.SoftMoA(**{**dict(num_experts=3, slots=2, reduction=4.0), **fields})


def dense(**fields: Any) -> Method:
    return petl.DenseMoA(**{**dict(num_experts=3, reduction=4.0), **fields})


def adapter(**fields: Any) -> Method:
    return petl.Adapter(**{**dict(reduction=4.0, kernel=3), **fields})


CONFORMER = ("norm/scale", "norm/bias", "w_in", "b_in", "w_conv", "b_conv", "w_out", "b_out")
CONFORMER += ("batch_norm/scale", "batch_norm/bias")
CONVPASS = (*ADAPTER, "w_conv", "b_conv")
ROUTER = ("w_router", "b_router")


def lora(letters: str) -> tuple[str, ...]:
    names = [{"o": "out"}.get(letter, letter) for letter in letters]
    return tuple(f"blocks/*/attn/{name}/lora_{part}" for name in names for part in "ab")


PREFIX = ("blocks/*/attn/k/prefix", "blocks/*/attn/v/prefix")
DEEP = ("blocks/*/prompts",)

# A method's instance, and globs of all that it trains besides the head.
CASES: dict[str, tuple[Method, tuple[str, ...]]] = {
    "linear": (petl.Linear(), ()),
    "full": (petl.Full(), ("embed/*", "embed/proj/*", "blocks/*", "norm/*")),
    "partial": (petl.Partial(), ("blocks/1/*",)),
    "bitfit": (petl.BitFit(), ("blocks/*/bias", "norm/bias")),
    "layer_norm": (petl.LayerNormTuning(), (*LN1, *LN2, "norm/*")),
    "aat_m": (petl.AAT(spatial=False), MLP),
    "aat_s": (petl.AAT(mlp=False), SPATIAL),
    "aat": (petl.AAT(), MLP + SPATIAL),
    "adapter": (adapter(), at("mlp/adapter", ADAPTER) + LN2),
    "adapter_mhsa": (adapter(location="mhsa"), at("attn/adapter", ADAPTER) + LN1),
    "adapter_both": (
        adapter(location="both"),
        at("attn/adapter", ADAPTER) + at("mlp/adapter", ADAPTER) + LN1 + LN2,
    ),
    "adapter_after": (adapter(position="after"), at("mlp/adapter", ADAPTER) + LN2),
    "adapter_sequential": (
        adapter(order="sequential", location="both", train_norm=False),
        at("attn/adapter", ADAPTER) + at("mlp/adapter", ADAPTER),
    ),
    "adapter_sequential_before": (
        adapter(order="sequential", position="before"),
        at("mlp/adapter", ADAPTER) + LN2,
    ),
    "conformer": (adapter(block="conformer"), at("mlp/adapter", CONFORMER) + LN2),
    "conformer_even": (
        adapter(block="conformer", kernel=4, inner_norm=False, location="both"),
        at("attn/adapter", CONFORMER[2:]) + at("mlp/adapter", CONFORMER[2:]) + LN1 + LN2,
    ),
    "convpass": (adapter(block="convpass"), at("mlp/adapter", CONVPASS) + LN2),
    "lora": (petl.LoRA(reduction=4), lora("qv")),
    "lora_all": (petl.LoRA(targets="qkvo", reduction=8, scale="alpha/reduction"), lora("qkvo")),
    "prefix": (petl.Prefix(tokens=4), PREFIX),
    "prompt": (petl.Prompt(tokens=3), DEEP),
    "prompt_shallow": (petl.Prompt(tokens=3, deep=False, pool="prompts"), ("embed/prompts",)),
    "prompt_patches": (petl.Prompt(tokens=3, pool="patches"), DEEP),
    "prompt_but_cls": (petl.Prompt(tokens=3, pool="prompts_patches"), DEEP),
    "prompt_cls": (petl.Prompt(tokens=3, pool="cls"), DEEP),
    "prompt_aat": (petl.Prompt(tokens=3, keep_dist=True, pool=None), DEEP),
    "prompt_own_pool": (petl.Prompt(tokens=2, deep=False, pool=None), ("embed/prompts",)),
    "soft_moa": (petl.SoftMoA(), ATTN_MIXTURE + LN1),
    "soft_moa_mhsa": (soft(), ATTN_MIXTURE + LN1),
    "soft_moa_ffn": (soft(location="ffn"), MLP_MIXTURE + LN2),
    "soft_moa_both": (soft(location="both"), ATTN_MIXTURE + MLP_MIXTURE + LN1 + LN2),
    "soft_moa_no_norm": (soft(location="both", train_norm=False), ATTN_MIXTURE + MLP_MIXTURE),
    "soft_moa_normalized": (
        soft(normalize=True),
        (*ATTN_MIXTURE, "blocks/*/attn/soft_moa/scale", *LN1),
    ),
    "soft_moa_convpass": (
        soft(expert="convpass"),
        at("attn/soft_moa/blocks/*", CONVPASS) + at("attn/soft_moa", ("phi",)) + LN1,
    ),
    "dense_moa": (dense(), at("attn/dense_moa", (*ROUTER, *ADAPTER)) + LN1),
    "dense_moa_both": (
        dense(location="both"),
        at("attn/dense_moa", (*ROUTER, *ADAPTER))
        + at("mlp/dense_moa", (*ROUTER, *ADAPTER))
        + LN1
        + LN2,
    ),
    "dense_moa_conformer": (
        dense(expert="conformer", kernel=3, location="ffn"),
        at("mlp/dense_moa/blocks/*", CONFORMER) + at("mlp/dense_moa", ROUTER) + LN2,
    ),
    "top_k_moa": (
        petl.TopKMoA(num_experts=4, top=2, reduction=4.0, balance=0.3),
        at("attn/top_k_moa", (*ROUTER, *ADAPTER)) + LN1,
    ),
    "combined": (
        petl.Combined((petl.AAT(), petl.LoRA(targets="qk", reduction=4), soft())),
        MLP + SPATIAL + lora("qk") + ATTN_MIXTURE + LN1,
    ),
    "combined_rows": (
        petl.Combined((petl.Prefix(tokens=4), petl.Prompt(tokens=3), petl.LoRA(targets="kv"))),
        PREFIX + DEEP + lora("kv"),
    ),
}
PUBLISHED: dict[str, tuple[Method, tuple[str, ...]]] = {
    "linear": (petl.Linear(as_published=True), ()),
    "full": (petl.Full(as_published=True), CASES["full"][1]),
    "bitfit": (petl.BitFit(as_published=True), CASES["bitfit"][1]),
    "adapter": (adapter(as_published=True), CASES["adapter"][1]),
    "adapter_sequential_before": (
        adapter(order="sequential", position="before", as_published=True),
        CASES["adapter_sequential_before"][1],
    ),
    "conformer": (adapter(block="conformer", as_published=True), CASES["conformer"][1]),
    "convpass": (adapter(block="convpass", as_published=True), CASES["convpass"][1]),
    "lora": (petl.LoRA(reduction=8, as_published=True), CASES["lora"][1]),
    "prefix": (petl.Prefix(tokens=4, as_published=True), CASES["prefix"][1]),
    "prompt": (petl.Prompt(tokens=3, as_published=True), CASES["prompt"][1]),
    "prompt_aat": (
        petl.Prompt(tokens=3, keep_dist=True, pool=None, as_published=True),
        ("embed/prompts", "blocks/1/prompts"),
    ),
    "soft_moa": (soft(as_published=True), at("soft_moa", MIXTURE) + LN1),
    "soft_moa_both": (soft(location="both", as_published=True), CASES["soft_moa_both"][1]),
    "dense_moa": (dense(as_published=True), at("dense_moa", (*ROUTER, *ADAPTER)) + LN1),
}
# What learned rows and random projections change from the first step on.
CHANGES_AT_INIT = {name for name in CASES if name.startswith(("prompt", "prefix", "combined_rows"))}
UNUSED_AS_PUBLISHED = {
    "conformer": ("adapter/norm/scale", "adapter/norm/bias"),
    "convpass": ("w_conv", "b_conv"),
    "prompt_aat": ("embed/prompts",),
}
every_case = pytest.mark.parametrize("name", CASES)
every_form = pytest.mark.parametrize(
    ("name", "published"), [(n, False) for n in CASES] + [(n, True) for n in PUBLISHED]
)


def form(name: str, published: bool) -> tuple[Method, tuple[str, ...]]:
    return (PUBLISHED if published else CASES)[name]


def parts_of(method: Method) -> tuple[Method, ...]:
    return method.methods if isinstance(method, petl.Combined) else (method,)


def model(seed: int = 0, **changes: Any) -> AST:
    return AST(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(seed))


def clip() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, 46, 36)), jnp.float32)


def trained(adapted: AST) -> set[str]:
    return {p for p, v in surgery.variables(adapted).items() if isinstance(v, Trainable)}


def shaken(module: Any, scale: float = 0.1, kind: type[nnx.Variable] = nnx.Variable) -> Any:
    """The module with every variable of a kind moved by noise, in place."""
    rng = np.random.default_rng(7)
    values = surgery.arrays(module, kind)
    moved = {p: v + scale * rng.normal(size=v.shape).astype(v.dtype) for p, v in values.items()}
    surgery.assign(module, moved, what="the test")
    return module


# ------------------------------------------------------------------------- every method


def test_every_method_has_its_case_here():
    """A new method belongs into CASES: an instance, and globs of all that it trains."""
    assert {method.name for method, _ in CASES.values()} == set(petl.METHODS)


@pytest.mark.parametrize("name", [name for name in CASES if name not in CHANGES_AT_INIT])
def test_the_logits_are_those_of_the_model_before_adaptation(name):
    method, _ = CASES[name]
    plain = shaken(model())
    adapted = aatjax.adapt(plain, method, seed=3)
    np.testing.assert_allclose(adapted(clip()), plain(clip()), atol=1e-6, rtol=1e-6)


@every_form
@pytest.mark.parametrize("head_norm", [True, False])
def test_only_the_declared_paths_are_trained(name, published, head_norm):
    method, declared = form(name, published)
    adapted = aatjax.adapt(model(head_norm=head_norm), method)
    declared += HEAD if head_norm else BARE_HEAD[not method.trains_last_norm :]
    paths = set(surgery.variables(adapted))
    hits = {glob: set(fnmatch.filter(paths, glob)) for glob in declared}
    assert all(hits.values()), hits
    assert trained(adapted) == set().union(*hits.values())


@every_case
def test_adapting_renames_and_changes_nothing_and_leaves_the_original_alone(name):
    method, _ = CASES[name]
    plain = model()
    before = surgery.arrays(plain)
    adapted = aatjax.adapt(plain, method, seed=3)
    after = surgery.arrays(adapted)
    for path, value in before.items():
        np.testing.assert_array_equal(after[path], value, err_msg=path)
    assert adapted.method == method
    assert plain.method is None
    assert not trained(plain)
    assert list(surgery.arrays(plain)) == list(before)
    surgery.assign(adapted, {p: np.zeros(v.shape) for p, v in after.items()}, what="the test")
    for path, value in surgery.arrays(plain).items():
        np.testing.assert_array_equal(value, before[path], err_msg=path)


@every_form
def test_a_gradient_reaches_every_trained_leaf(name, published):
    method, _ = form(name, published)
    adapted = shaken(aatjax.adapt(shaken(model(pool="mean_all")), method), kind=Trainable)
    parts = surgery.split(adapted)
    unused = UNUSED_AS_PUBLISHED.get(name, ()) if published else ()
    weights = jnp.asarray(np.random.default_rng(4).normal(size=(2, 5)), jnp.float32)

    @jax.jit
    @jax.grad
    def slope(trainable):
        again = surgery.join(parts.graphdef, trainable, parts.stats, parts.frozen)
        return (again(clip()) * weights).sum() + surgery.sum_penalties(again)

    slopes = surgery.arrays(
        surgery.join(parts.graphdef, slope(parts.trainable), parts.stats, parts.frozen), Trainable
    )
    assert set(slopes) == trained(adapted)
    for path, value in slopes.items():
        if path.endswith(unused) and unused:
            assert not value.any(), path
        elif path.endswith("attn/k/bias"):  # softmax does not see what all keys share
            assert float(jnp.abs(value).max()) < 1e-4
        else:
            assert float(jnp.abs(value).max()) > 1e-4, path
            assert bool(jnp.isfinite(value).all()), path


@every_case
def test_adapting_twice_is_refused(name):
    method, _ = CASES[name]
    adapted = aatjax.adapt(model(), method)
    with pytest.raises(UsageError, match=r"adapted already: adapt the model that aatjax.load"):
        aatjax.adapt(adapted, petl.Linear())


@every_form
def test_a_method_survives_json(name, published):
    method, _ = form(name, published)
    written = json.loads(json.dumps(method.to_json()))
    assert written["name"] == method.name
    assert Method.from_json(written) == method
    assert type(Method.from_json(written)) is type(method)


def test_a_whole_number_will_do_where_a_ratio_is_asked():
    assert petl.SoftMoA(reduction=16) == petl.SoftMoA(reduction=16.0)
    assert Method.from_json({"name": "soft_moa", "reduction": 16}) == petl.SoftMoA(reduction=16)
    adapted = aatjax.adapt(model(), petl.AAT(ratio=1))
    assert surgery.arrays(adapted)["blocks/0/mlp/mlp_adapter/w_down"].shape == (16, 16)


@every_case
def test_the_summary_counts_what_is_trained(name):
    method, _ = CASES[name]
    adapted = aatjax.adapt(model(), method)
    sizes = {path: value.size for path, value in surgery.arrays(adapted, nnx.Param).items()}
    counted = aatjax.summary(adapted)
    assert counted.trainable == sum(sizes[path] for path in trained(adapted))
    assert counted.trainable + counted.frozen == counted.total == sum(sizes.values())


@pytest.mark.parametrize("name", ["aat", "soft_moa_both"])
def test_the_seed_decides_the_new_weights(name):
    method, _ = CASES[name]
    one, again, other = (surgery.arrays(aatjax.adapt(model(), method, seed=s)) for s in (1, 1, 2))
    for path, value in one.items():
        np.testing.assert_array_equal(again[path], value, err_msg=path)
        random = path.endswith(("w_down", "phi"))
        assert bool((other[path] == value).all()) is not random, path
    drawn = [value for path, value in one.items() if path.endswith("w_down")]
    assert len({value.tobytes() for value in map(np.asarray, drawn)}) == len(drawn)


# ------------------------------------------------------------------------------ refusals


def test_an_unknown_method_is_suggested():
    with pytest.raises(UsageError, match="unknown method 'soft_mao', did you mean 'soft_moa'"):
        petl.find_method("soft_mao")
    with pytest.raises(UsageError, match=r"unknown method 'zzz' \(there are aat, "):
        Method.from_json({"name": "zzz"})
    with pytest.raises(AttributeError, match="no method 'SoftMao'; there are AAT, "):
        petl.SoftMao  # noqa: B018
    assert {"AAT", "SoftMoA", "adapt"} <= set(dir(petl))


def test_an_unknown_field_names_the_known_ones():
    fields = {**petl.SoftMoA().to_json(), "experts": 7}
    with pytest.raises(UsageError, match=r"soft_moa has no field experts.*num_experts") as info:
        Method.from_json(fields)
    assert "\n" not in str(info.value)
    with pytest.raises(UsageError, match=r"layer_norm has no field rank.*are none"):
        Method.from_json({"name": "layer_norm", "rank": 4})


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        ("AAT", dict(mlp=False, spatial=False), "adds nothing: use petl.Linear"),
        ("AAT", dict(ratio=0.0), "ratio=0.0 must be above 0"),
        ("AAT", dict(ratio=math.nan), "ratio=nan must be above 0"),
        ("SoftMoA", dict(num_experts=0), "num_experts=0 must be at least 1"),
        ("SoftMoA", dict(slots=-1), "slots=-1 must be at least 1"),
        ("SoftMoA", dict(reduction=0.0), "reduction=0.0 must be above 0"),
        ("SoftMoA", dict(location="attn"), "location='attn' is not one of mhsa, ffn, both"),
    ],
)
def test_fields_that_make_no_method_are_refused(cls, fields, message):
    method = object.__new__(getattr(petl, cls))  # past the type checker
    for name, value in fields.items():
        object.__setattr__(method, name, value)
    with pytest.raises(UsageError, match=message):
        method.__post_init__()


def test_a_method_without_inject_says_so():
    class Empty(Method):
        pass

    with pytest.raises(NotImplementedError, match="Empty does not implement inject"):
        aatjax.adapt(model(), Empty())


# -------------------------------------------------------------------------------- counts


def counts(method: Method, **config: Any) -> Any:
    """The summary of an adapted published size; no weight is allocated."""
    size = config.pop("size", "base")
    wanted = ASTConfig.size(size, **config)
    return aatjax.summary(
        nnx.eval_shape(lambda: aatjax.adapt(AST(wanted, rngs=nnx.Rngs(0)), method))
    )


# The published totals of full fine-tuning count two 1000-way ImageNet heads that nothing uses.
IMAGENET_HEADS = 2 * (768 * 1000 + 1000)


@pytest.mark.parametrize(("classes", "frames"), [(50, 512), (20, 1024)])
@pytest.mark.parametrize(
    ("method", "published"),
    [
        (petl.Linear(), {50: 39_986, 20: 16_916}),
        (petl.AAT(spatial=False), {50: 3_590_450, 20: 3_567_380}),
        (petl.AAT(mlp=False), {50: 3_590_450, 20: 3_567_380}),
        (petl.AAT(), {50: 7_140_914, 20: 7_117_844}),
        (petl.Full(), {50: 87_295_234 - IMAGENET_HEADS, 20: 87_742_180 - IMAGENET_HEADS}),
    ],
    ids=["head", "M", "S", "MS", "full"],
)
def test_the_counts_of_the_aat_paper(method, published, classes, frames):
    counted = counts(method, num_classes=classes, frames=frames)
    assert counted.trainable == published[classes]
    body = {512: 85_717_248, 1024: 86_187_264}[frames]
    added = 0 if isinstance(method, petl.Full) else published[classes] - (1_536 + 769 * classes)
    assert counted.total == body + 1_536 + 769 * classes + added


@pytest.mark.parametrize("head_norm", [False, True], ids=["body_norm", "head_norm"])
@pytest.mark.parametrize(
    ("method", "published"),
    [
        (petl.Linear(), 39_986),
        (petl.SoftMoA(), 962_090),
        (petl.SoftMoA(location="ffn"), 962_090),
        (petl.SoftMoA(location="both"), 1_884_194),
        (petl.SoftMoA(num_experts=15), 1_994_858),
        (petl.SoftMoA(num_experts=2), 316_610),
        (petl.SoftMoA(slots=2), 986_616 + 39_986),
        (petl.SoftMoA(num_experts=1, reduction=768 / 46), 885_288 + 39_986),
        (petl.SoftMoA(num_experts=24, reduction=768.0), 903_456 + 39_986),
        (petl.SoftMoA(num_experts=7, train_norm=False), 903_672 + 39_986),
    ],
    ids=str,
)
def test_the_counts_of_the_soft_moa_paper(method, published, head_norm):
    """Either the head's LayerNorm is trained or the body's final one: the same integer."""
    counted = counts(method, num_classes=50, frames=500, pool="mean_all", head_norm=head_norm)
    assert counted.trainable == published
    norm_of_the_head = 1_536 if head_norm else 0
    added = published - 39_986 - (0 if isinstance(method, petl.Linear) else norms(method))
    assert counted.total == 85_708_032 + 769 * 50 + norm_of_the_head + added


def norms(method: Any) -> int:
    """Parameters of the block LayerNorms that Soft-MoA trains in the base size."""
    sites = 2 if method.location == "both" else 1
    return 12 * 1_536 * sites if method.train_norm else 0


def test_full_fine_tuning_of_the_soft_moa_paper():
    counted = counts(petl.Full(), num_classes=50, frames=500, pool="mean_all", head_norm=False)
    assert (counted.trainable, counted.frozen) == (85_746_482, 0)


@pytest.mark.parametrize(
    ("size", "dim", "classes", "frames"), [("tiny", 192, 10, 400), ("small", 384, 35, 128)]
)
def test_the_counts_of_smaller_sizes_follow_the_closed_forms(size, dim, classes, frames):
    shape = dict(size=size, num_classes=classes, frames=frames)
    head = 2 * dim + (dim + 1) * classes
    assert counts(petl.Linear(), **shape).trainable == head
    width = {192: 48, 384: 96}[dim]
    adapter = 2 * dim * width + width + dim
    assert counts(petl.AAT(), **shape).trainable == 24 * adapter + head
    assert counts(petl.AAT(spatial=False), **shape).trainable == 12 * adapter + head
    method = petl.SoftMoA(num_experts=5, slots=2, reduction=96.0, location="both")
    r = dim // 96
    site = 5 * (2 * dim * r + r + dim) + dim * 5 * 2 + 2 * dim
    assert counts(method, **shape).trainable == 24 * site + head


# ---------------------------------------------------------------------- a method from outside


def test_a_method_defined_elsewhere_needs_no_other_edit():
    class Shift(nnx.Module):
        def __init__(self, dim: int):
            self.by = Trainable(jnp.zeros((1, 1, dim)))

        def __call__(self, x):
            return x * 0 + self.by[...]

    @dataclasses.dataclass(frozen=True)
    class Steering(Method):
        """Adds a learned vector to the output of chosen sub-layers."""

        name: ClassVar[str] = "steering_of_a_test"
        sites: tuple[str, ...] = ("mlp",)

        def inject(self, model: AST, *, rngs: nnx.Rngs) -> None:
            for site in self.sites:
                surgery.wrap(
                    model,
                    f"blocks/*/{site}",
                    lambda _, base: Parallel(base, "steering", Shift(model.config.dim)),
                )

    try:
        assert petl.find_method("steering_of_a_test") is Steering
        assert petl.Steering is Steering
        method = Steering(("mlp", "attn"))
        read = Method.from_json(json.loads(json.dumps(method.to_json())))
        assert read == method
        adapted = aatjax.adapt(model(scan=True), read)
        assert aatjax.summary(adapted).trainable == 4 * 16 + 2 * 16 + 17 * 5
        # The first block is outside the scanned body now, and rounds otherwise.
        found, expected = adapted(clip()), model(scan=True)(clip())
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
        steer = np.linspace(-1, 1, 16).reshape(1, 1, 16)
        surgery.assign(adapted, {"blocks/1/mlp/steering/by": steer}, what="the test")
        assert float(jnp.abs(adapted(clip()) - model()(clip())).max()) > 1e-3
    finally:
        petl.METHODS.pop("steering_of_a_test")


def test_a_refined_method_without_a_name_does_not_take_its_parents_place():
    class Refined(petl.SoftMoA):
        pass

    assert petl.find_method("soft_moa") is petl.SoftMoA
    assert Refined is not petl.SoftMoA


# ----------------------------------------------- what a whole model computes, in float64


def oracle(adapted: AST, method: Method, values: Any = None, **how: Any) -> Oracle:
    held = {**surgery.arrays(adapted), **(values or {})}
    return Oracle(held, adapted.config, parts_of(method), **how)


def settled(adapted: AST) -> AST:
    """Moves every weight, and gives BatchNorm statistics that can be (a positive variance)."""
    shaken(adapted, scale=0.25)
    variances = {p: jnp.abs(v) + 0.5 for p, v in surgery.arrays(adapted, nnx.BatchStat).items()}
    surgery.assign(
        adapted, {p: v for p, v in variances.items() if p.endswith("var")}, what="the test"
    )
    return adapted


def norm_of(x: Any) -> float:
    return float(np.linalg.norm(np.asarray(x, np.float64)))


@every_form
@pytest.mark.parametrize("pool", ["mean_all", "cls_dist"])
def test_an_adapted_model_is_the_equations(name, published, pool):
    method, _ = form(name, published)
    adapted = settled(aatjax.adapt(model(pool=pool, head_norm=pool == "cls_dist"), method))
    expected = oracle(adapted, method).logits(np.asarray(clip()))
    assert norm_of(adapted(clip()) - expected) / norm_of(expected) < 1e-5
    added = [p for p in surgery.arrays(adapted) if p.endswith(OUTPUTS)]
    silent = {p: np.zeros(surgery.arrays(adapted)[p].shape) for p in added}
    without = oracle(adapted, method, silent).logits(np.asarray(clip()))
    change = norm_of(without - expected) / norm_of(expected)
    assert change > 0.01 if added else change == 0, "the adapter must be seen at all"


OUTPUTS = ("w_up", "b_up", "w_out", "b_out", "lora_b", "prefix", "/prompts")


@pytest.mark.parametrize("name", ["conformer", "conformer_even", "dense_moa_conformer"])
def test_batch_normalisation_is_by_the_batch_in_training_and_leaves_its_statistics(name):
    method, _ = CASES[name]
    adapted = settled(aatjax.adapt(model(), method))
    before = surgery.arrays(adapted, nnx.BatchStat)
    training = surgery.clone(adapted)
    training.train()
    found = training(clip())
    expected = oracle(adapted, method, training=True).logits(np.asarray(clip()))
    assert norm_of(found - expected) / norm_of(expected) < 1e-5
    assert norm_of(found - adapted(clip())) > 0.01 * norm_of(found)
    for path, value in surgery.arrays(training, nnx.BatchStat).items():
        moved = np.asarray(value) - 0.9 * np.asarray(before[path])
        assert np.abs(moved).max() > 1e-3, path


@every_form
def test_gradients_are_the_slopes_of_the_equations(name, published):
    """Along one random direction in every trained leaf, against central differences in float64."""
    method, _ = form(name, published)
    small = dict(dim=8, mlp_dim=8, mels=26, frames=36, num_classes=3, pool="mean_all")
    adapted = settled(aatjax.adapt(model(**small), method))
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.normal(size=(2, 36, 26)), jnp.float32)
    weights = rng.normal(size=(2, 3)).astype(np.float32)
    parts = surgery.split(adapted)

    @jax.jit
    @jax.grad
    def slope(trainable):
        again = surgery.join(parts.graphdef, trainable, parts.stats, parts.frozen)
        return (again(x) * weights).sum() + surgery.sum_penalties(again)

    found = surgery.arrays(
        surgery.join(parts.graphdef, slope(parts.trainable), parts.stats, parts.frozen), Trainable
    )

    def value(path: str, step: np.ndarray) -> float:
        moved = {path: np.asarray(surgery.arrays(adapted)[path], np.float64) + step}
        whole = oracle(adapted, method, moved)
        return float((whole.logits(np.asarray(x)) * weights).sum() + whole.penalty)

    checked = [p for p in found if not p.startswith("head/")]
    for path in checked if name != "full" else checked[::5]:
        direction = rng.normal(size=found[path].shape)
        expected = (value(path, 1e-5 * direction) - value(path, -1e-5 * direction)) / 2e-5
        slack = 1e-4 * norm_of(found[path]) * norm_of(direction) + 1e-4
        assert abs(float((found[path] * direction).sum()) - expected) < slack, path


@every_form
def test_scanned_is_unrolled(name, published):
    method, _ = form(name, published)
    alone = settled(aatjax.adapt(model(), method))
    scanned = surgery.clone(alone)
    scanned.config = dataclasses.replace(alone.config, scan=True, remat=True)
    if name == "prompt_aat" and published:
        with pytest.raises(UsageError, match="differs from block 0"):
            jax.jit(lambda x: scanned(x))(clip())
        return
    np.testing.assert_allclose(scanned(clip()), alone(clip()), rtol=1e-4, atol=1e-5)


@every_form
def test_bfloat16_stays_close(name, published):
    method, _ = form(name, published)
    plain = settled(aatjax.adapt(model(), method))
    rough = aatjax.adapt(model(dtype="bfloat16"), method)
    surgery.assign(rough, surgery.arrays(plain), what="the test")
    expected = plain(clip())
    found = rough(clip())
    assert found.dtype == jnp.float32
    assert norm_of(found - expected) < 0.06 * norm_of(expected)


# A convolution over the tokens reads across the border of the padding, so it is not among them.
BLIND = [name for name in CASES if "conformer" not in name and "convpass" not in name]


@pytest.mark.parametrize("name", BLIND)
def test_padding_that_is_masked_changes_nothing(name):
    method, _ = CASES[name]
    adapted = settled(aatjax.adapt(model(mask_padding=True, frames=66, pool="mean_all"), method))
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 66, 36)).astype(np.float32)
    valid = jnp.array([25, 66])
    other = x.copy()
    other[0, 46:] = 9 * rng.normal(size=(20, 36))  # the patches that start at frame 20 end at 36
    found = adapted(jnp.asarray(x), valid)
    np.testing.assert_allclose(adapted(jnp.asarray(other), valid), found, rtol=1e-5, atol=1e-5)
    expected = oracle(adapted, method, valid=np.array([25, 66])).logits(x)
    assert norm_of(found - expected) / norm_of(expected) < 1e-5
    assert norm_of(adapted(jnp.asarray(x)) - found) > 1e-3


def numpy_bottleneck(v: dict[str, np.ndarray]) -> np.ndarray:
    return gelu(v["x"] @ v["w_down"] + v["b_down"]) @ v["w_up"] + v["b_up"]


def mixture_shape(dim: int, experts: int, width: int) -> MixtureShape:
    return MixtureShape(
        dim, experts, width, "bottleneck", 8, jnp.dtype("float32"), "identity", as_published=False
    )


def numpy_mixture(v: dict[str, np.ndarray]) -> np.ndarray:
    return soft_moe_numpy(*(v[name] for name in ("x", *MIXTURE)))


@pytest.mark.parametrize(
    ("module", "oracle"),
    [
        (lambda: Bottleneck(6, 3, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0)), numpy_bottleneck),
        (lambda: SoftMixture(mixture_shape(5, 3, 2), 2, rngs=nnx.Rngs(0)), numpy_mixture),
    ],
    ids=["bottleneck", "soft_mixture"],
)
def test_gradients_are_those_of_finite_differences(module, oracle):
    built = shaken(module(), scale=0.5)
    dim = surgery.arrays(built)["b_up"].shape[-1]
    rng = np.random.default_rng(3)
    x, weights = (rng.normal(size=(2, 4, dim)).astype(np.float32) for _ in range(2))
    parts = surgery.split(built)

    def scalar(trainable, x):
        return (
            surgery.join(parts.graphdef, trainable, parts.stats, parts.frozen)(x) * weights
        ).sum()

    slopes, of_x = jax.grad(scalar, argnums=(0, 1))(parts.trainable, jnp.asarray(x))
    found = surgery.arrays(surgery.join(parts.graphdef, slopes, parts.stats, parts.frozen))
    found["x"] = of_x
    values = {"x": x, **{p: np.asarray(v) for p, v in surgery.arrays(built).items()}}
    expected = finite_differences(lambda v: (oracle(v) * weights).sum(), values)
    assert set(found) == set(expected)
    for name, slope in expected.items():
        scale = np.abs(slope).max()
        assert scale > 1e-3, name
        np.testing.assert_allclose(found[name], slope, atol=2e-5 * scale, err_msg=name)


def test_initial_weights_have_the_published_spread():
    mixture = surgery.arrays(SoftMixture(mixture_shape(768, 7, 6), 1, rngs=nnx.Rngs(0)))
    assert float(mixture["phi"].std()) == pytest.approx(0.0508, rel=0.03)
    assert float(mixture["w_down"].std()) == pytest.approx(0.02, rel=0.03)
    adapter = surgery.arrays(Bottleneck(768, 192, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0)))
    assert float(adapter["w_down"].std()) == pytest.approx(0.02, rel=0.03)
    for values in (mixture, adapter):
        assert all(not values[name].any() for name in ("b_down", "w_up", "b_up"))
