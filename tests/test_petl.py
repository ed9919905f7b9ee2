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
from test_soft_moe import finite_differences, gelu, soft_moe_numpy, softmax

import aatjax
from aatjax import petl, surgery
from aatjax.errors import UsageError
from aatjax.models.ast import AST, ASTConfig, Block
from aatjax.petl.base import Method, Parallel
from aatjax.petl.bottleneck import Bottleneck
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


# A method's instance, and globs of all that it trains besides the head.
CASES: dict[str, tuple[Method, tuple[str, ...]]] = {
    "linear": (petl.Linear(), ()),
    "full": (petl.Full(), ("embed/*", "embed/proj/*", "blocks/*", "norm/*")),
    "aat_m": (petl.AAT(spatial=False), MLP),
    "aat_s": (petl.AAT(mlp=False), SPATIAL),
    "aat": (petl.AAT(), MLP + SPATIAL),
    "soft_moa": (petl.SoftMoA(), ATTN_MIXTURE + LN1),
    "soft_moa_mhsa": (soft(), ATTN_MIXTURE + LN1),
    "soft_moa_ffn": (soft(location="ffn"), MLP_MIXTURE + LN2),
    "soft_moa_both": (soft(location="both"), ATTN_MIXTURE + MLP_MIXTURE + LN1 + LN2),
    "soft_moa_no_norm": (soft(location="both", train_norm=False), ATTN_MIXTURE + MLP_MIXTURE),
}
every_case = pytest.mark.parametrize("name", CASES)


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


@every_case
def test_the_logits_are_those_of_the_model_before_adaptation(name):
    method, _ = CASES[name]
    plain = shaken(model())
    adapted = aatjax.adapt(plain, method, seed=3)
    np.testing.assert_allclose(adapted(clip()), plain(clip()), atol=1e-6, rtol=1e-6)


@every_case
@pytest.mark.parametrize("head_norm", [True, False])
def test_only_the_declared_paths_are_trained(name, head_norm):
    method, declared = CASES[name]
    adapted = aatjax.adapt(model(head_norm=head_norm), method)
    declared += HEAD if head_norm else BARE_HEAD
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


@every_case
def test_a_gradient_reaches_every_trained_leaf(name):
    method, _ = CASES[name]
    adapted = shaken(aatjax.adapt(shaken(model()), method), kind=Trainable)
    parts = surgery.split(adapted)
    weights = jnp.asarray(np.random.default_rng(4).normal(size=(2, 5)), jnp.float32)

    @jax.jit
    @jax.grad
    def slope(trainable):
        again = surgery.merge(parts.graphdef, trainable, parts.stats, parts.frozen)
        return (again(clip()) * weights).sum()

    slopes = surgery.arrays(
        surgery.merge(parts.graphdef, slope(parts.trainable), parts.stats, parts.frozen), Trainable
    )
    assert set(slopes) == trained(adapted)
    for path, value in slopes.items():
        if path.endswith("attn/k/bias"):  # softmax does not see what all keys share
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


@every_case
def test_a_method_survives_json(name):
    method, _ = CASES[name]
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
    sizes = {path: value.size for path, value in surgery.arrays(adapted).items()}
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
        petl.find("soft_mao")
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
    with pytest.raises(UsageError, match=r"linear has no field rank.*are none"):
        Method.from_json({"name": "linear", "rank": 4})


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
        assert petl.find("steering_of_a_test") is Steering
        assert petl.Steering is Steering
        method = Steering(("mlp", "attn"))
        read = Method.from_json(json.loads(json.dumps(method.to_json())))
        assert read == method
        adapted = aatjax.adapt(model(scan=True), read)
        assert aatjax.summary(adapted).trainable == 4 * 16 + 2 * 16 + 17 * 5
        np.testing.assert_array_equal(adapted(clip()), model(scan=True)(clip()))
        steer = np.linspace(-1, 1, 16).reshape(1, 1, 16)
        surgery.assign(adapted, {"blocks/1/mlp/steering/by": steer}, what="the test")
        assert float(jnp.abs(adapted(clip()) - model()(clip())).max()) > 1e-3
    finally:
        petl.METHODS.pop("steering_of_a_test")


def test_a_refined_method_without_a_name_does_not_take_its_parents_place():
    class Refined(petl.SoftMoA):
        pass

    assert petl.find("soft_moa") is petl.SoftMoA
    assert Refined is not petl.SoftMoA


# --------------------------------------------------------- what a block computes, in float64


def numpy_block(parameters: dict[str, np.ndarray], x: np.ndarray, heads: int) -> np.ndarray:
    """A block with any of the adapters that its parameters hold, from the papers' equations."""
    w = {path: np.asarray(value, np.float64) for path, value in parameters.items()}

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        variance = (centred**2).mean(-1, keepdims=True)
        return centred / np.sqrt(variance + 1e-6) * w[f"{name}/scale"] + w[f"{name}/bias"]

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ w[f"{name}/kernel"] + w[f"{name}/bias"]

    def adapter(name: str, z: np.ndarray) -> np.ndarray:
        if f"{name}/w_down" not in w:
            return np.zeros_like(z)
        hidden = gelu(z @ w[f"{name}/w_down"] + w[f"{name}/b_down"])
        return hidden @ w[f"{name}/w_up"] + w[f"{name}/b_up"]

    def mixture(name: str, z: np.ndarray) -> np.ndarray:
        if f"{name}/phi" not in w:
            return np.zeros_like(z)
        return soft_moe_numpy(z, *(w[f"{name}/{part}"] for part in MIXTURE))

    def attention(x: np.ndarray) -> np.ndarray:
        out = np.zeros_like(x)
        size = x.shape[-1] // heads
        q, k, v = (linear(f"attn/{name}", x) for name in "qkv")
        for clip in range(x.shape[0]):
            for head in range(heads):
                part = slice(head * size, (head + 1) * size)
                for token in range(x.shape[1]):
                    scores = k[clip, :, part] @ q[clip, token, part] / math.sqrt(size)
                    out[clip, token, part] = softmax(scores) @ v[clip, :, part]
        return linear("attn/out", out)

    u = norm("ln1", x)
    z = attention(u)
    x = x + z + adapter("attn/spatial_adapter", z) + mixture("attn/soft_moa", u)
    u = norm("ln2", x)
    mlp = linear("mlp/down", gelu(linear("mlp/up", u)))
    return x + mlp + adapter("mlp/mlp_adapter", u) + mixture("mlp/soft_moa", u)


@every_case
def test_an_adapted_block_is_the_equations(name):
    method, _ = CASES[name]
    adapted = shaken(aatjax.adapt(model(), method), scale=0.4)
    block: Block = adapted.blocks[1]
    x = np.random.default_rng(2).normal(size=(2, 9, 16)).astype(np.float32)
    found = block(jnp.asarray(x))
    parameters = {p: np.asarray(v) for p, v in surgery.arrays(block).items()}
    expected = numpy_block(parameters, x.astype(np.float64), heads=2)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected - x)
    assert error < 1e-5
    added = [p for p in parameters if p.endswith(("w_up", "b_up"))]
    without = parameters | {p: parameters[p] * 0 for p in added}
    plain = numpy_block(without, x.astype(np.float64), heads=2)
    change = np.linalg.norm(plain - expected) / np.linalg.norm(expected - x)
    assert change > 0.05 if added else change == 0, "the adapter must be seen at all"


def numpy_bottleneck(v: dict[str, np.ndarray]) -> np.ndarray:
    return gelu(v["x"] @ v["w_down"] + v["b_down"]) @ v["w_up"] + v["b_up"]


def numpy_mixture(v: dict[str, np.ndarray]) -> np.ndarray:
    return soft_moe_numpy(*(v[name] for name in ("x", *MIXTURE)))


@pytest.mark.parametrize(
    ("module", "oracle"),
    [
        (lambda: Bottleneck(6, 3, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0)), numpy_bottleneck),
        (lambda: SoftMixture(5, 3, 2, 2, rngs=nnx.Rngs(0)), numpy_mixture),
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
            surgery.merge(parts.graphdef, trainable, parts.stats, parts.frozen)(x) * weights
        ).sum()

    slopes, of_x = jax.grad(scalar, argnums=(0, 1))(parts.trainable, jnp.asarray(x))
    found = surgery.arrays(surgery.merge(parts.graphdef, slopes, parts.stats, parts.frozen))
    found["x"] = of_x
    values = {"x": x, **{p: np.asarray(v) for p, v in surgery.arrays(built).items()}}
    expected = finite_differences(lambda v: (oracle(v) * weights).sum(), values)
    assert set(found) == set(expected)
    for name, slope in expected.items():
        scale = np.abs(slope).max()
        assert scale > 1e-3, name
        np.testing.assert_allclose(found[name], slope, atol=2e-5 * scale, err_msg=name)


def test_initial_weights_have_the_published_spread():
    mixture = surgery.arrays(SoftMixture(768, 7, 1, 6, rngs=nnx.Rngs(0)))
    assert float(mixture["phi"].std()) == pytest.approx(0.0508, rel=0.03)
    assert float(mixture["w_down"].std()) == pytest.approx(0.02, rel=0.03)
    adapter = surgery.arrays(Bottleneck(768, 192, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0)))
    assert float(adapter["w_down"].std()) == pytest.approx(0.02, rel=0.03)
    for values in (mixture, adapter):
        assert all(not values[name].any() for name in ("b_down", "w_up", "b_up"))
