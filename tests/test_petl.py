"""Every adaptation method: what it trains, what it computes, how it is written and refused."""

import dataclasses
import fnmatch
import json
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from petl_cases import (
    BARE_HEAD,
    CASES,
    CHANGES_AT_INIT,
    FORMS,
    HEAD,
    KINDS,
    PUBLISHED_KINDS,
    UNUSED_AS_PUBLISHED,
    WITH_ORACLE,
    WITHOUT_ORACLE,
    add_noise,
    find_form,
    list_parts,
    list_trained,
    make_clips,
    make_model,
    randomize,
)
from petl_oracle import Oracle

import aatjax
from aatjax import petl, surgery
from aatjax.errors import UsageError
from aatjax.models.ast import AST
from aatjax.petl.base import Method, Parallel
from aatjax.petl.bottleneck import Bottleneck
from aatjax.petl.moa import MixtureShape
from aatjax.petl.sites import BlockShape
from aatjax.petl.soft_moa import SoftMixture

# ------------------------------------------------------------------------- every method


@pytest.mark.parametrize("name", [name for name in CASES if name not in CHANGES_AT_INIT])
def test_the_logits_are_those_of_the_model_before_adaptation(name):
    method, _ = CASES[name]
    plain = add_noise(make_model())
    adapted = aatjax.adapt(plain, method, seed=3)
    np.testing.assert_allclose(adapted(make_clips()), plain(make_clips()), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("name", "published"), FORMS)
def test_only_the_declared_paths_are_trained_and_counted(name, published):
    method, globs = find_form(name, published)
    for head_norm in (True, False):
        adapted = aatjax.adapt(make_model(head_norm=head_norm), method)
        sizes = {
            path: value.size
            for path, value in (
                surgery.arrays(adapted, nnx.Param) | surgery.arrays(adapted, surgery.Frozen)
            ).items()
        }
        trained = list_trained(adapted)
        if globs is not None:
            bare = BARE_HEAD[not method.trains_last_norm :]
            declared = globs + (HEAD if adapted.config.head_norm else bare)
            hits = {glob: set(fnmatch.filter(sizes, glob)) for glob in declared}
            assert all(hits.values()), hits
            assert trained == set().union(*hits.values())
        counted = aatjax.summary(adapted)
        assert counted.trainable == sum(sizes[path] for path in trained)
        assert counted.trainable + counted.frozen == counted.total == sum(sizes.values())


@pytest.mark.parametrize(("name", "published"), FORMS)
def test_adapting_renames_and_changes_nothing_of_the_original(name, published):
    method, _ = find_form(name, published)
    plain = make_model()
    before = surgery.arrays(plain)
    adapted = aatjax.adapt(plain, method, seed=3)
    after = surgery.arrays(adapted)
    started = ("embed/pos", "head/linear/kernel", "head/linear/bias") if published else ()
    for path, value in before.items():
        if path not in started and not (method.closed_form and path.startswith("head/")):
            np.testing.assert_array_equal(after[path], value, err_msg=path)
    assert adapted.method == method
    assert plain.method is None
    surgery.assign(adapted, {p: np.zeros(v.shape) for p, v in after.items()}, what="the test")
    assert list(surgery.arrays(plain)) == list(before)
    for path, value in surgery.arrays(plain).items():
        np.testing.assert_array_equal(value, before[path], err_msg=path)


def test_a_method_survives_json():
    for form in FORMS:
        method, _ = find_form(*form)
        written = json.loads(json.dumps(method.to_json()))
        assert written["name"] == method.name
        assert Method.from_json(written) == method
        assert type(Method.from_json(written)) is type(method)


def test_the_seed_decides_the_new_weights():
    method = petl.Combined((petl.AAT(), petl.SoftMoA(width=2, location="both")))
    one, again, other = (
        surgery.arrays(aatjax.adapt(make_model(), method, seed=s)) for s in (1, 1, 2)
    )
    for path, value in one.items():
        np.testing.assert_array_equal(again[path], value, err_msg=path)
        random = path.endswith(("w_down", "phi"))
        assert bool((other[path] == value).all()) is not random, path
    drawn = [np.asarray(value).tobytes() for path, value in one.items() if "w_down" in path]
    assert len(set(drawn)) == len(drawn)


def test_initial_weights_have_the_published_spread():
    shape = MixtureShape(BlockShape("bottleneck", 768, 6, jnp.dtype("float32")), 7)
    mixture = surgery.arrays(SoftMixture(shape, 1, rngs=nnx.Rngs(0)))
    assert float(mixture["phi"].std()) == pytest.approx(0.0508, rel=0.03)
    adapter = surgery.arrays(Bottleneck(768, 192, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0)))
    for values in (mixture, adapter):
        assert float(values["w_down"].std()) == pytest.approx(0.02, rel=0.03)
        assert all(not values[name].any() for name in ("b_down", "w_up", "b_up"))


# --------------------------------------------------------------------------------- sizes


def find_widths(method: Method, leaf: str) -> set[int]:
    """The bottleneck widths on a model of width 16."""
    axis = 0 if leaf in ("w_up", "lora_b") else -1
    held = surgery.arrays(aatjax.adapt(make_model(), method))
    return {
        value.shape[-2] if axis == 0 else value.shape[-1] for p, value in held.items() if leaf in p
    }


@pytest.mark.parametrize(
    ("method", "leaf", "width"),
    [
        (petl.AAT(), "w_down", 4),
        (petl.AAT(ratio=1), "w_down", 16),
        (petl.AAT(ratio=0.49), "w_down", 7),
        (petl.AAT(width=5), "w_down", 5),
        (petl.Adapter(), "w_down", 8),  # the default, 16 / 64, is at least 8 below AST-base
        (petl.Adapter(reduction=3), "w_down", 5),
        (petl.Adapter(width=24), "w_down", 24),
        (petl.LoRA(), "lora_a", 8),
        (petl.LoRA(reduction=2), "lora_a", 8),
        (petl.LoRA(rank=3), "lora_a", 3),
        (petl.SoftMoA(), "w_down", 8),
        (petl.SoftMoA(reduction=16), "w_down", 1),
        (petl.SoftMoA(width=2), "w_down", 2),
        (petl.DenseMoA(width=2, expert="convpass"), "w_down", 2),
        (petl.DenseMoA(budget=6_000, expert="convpass"), "w_down", 7),
    ],
    ids=str,
)
def test_a_size_is_given_in_one_of_several_ways(method, leaf, width):
    assert find_widths(method, leaf) == {width}


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (petl.Adapter(reduction=17), r"Adapter reduction=17 gives a width of 0\.94 .* width 16"),
        (petl.SoftMoA(reduction=1000), r"give reduction at most 16, or a width"),
        (petl.AAT(ratio=0.05), r"AAT ratio=0\.05 gives a width of 0\.8 .* at least 0\.0625"),
        (petl.LoRA(reduction=128), r"LoRA reduction=128 gives a width of 0\.12"),
        (petl.SoftMoA(budget=500), r"SoftMoA budget=500 is not enough: .* have 910 parameters"),
    ],
)
def test_a_width_below_one_is_refused_with_the_numbers(method, message):
    with pytest.raises(UsageError, match=message):
        aatjax.adapt(make_model(), method)


def test_a_new_size_replaces_the_one_that_was_given():
    changed = petl.SoftMoA(reduction=16).replace(budget=900_000, slots=2)
    assert changed == petl.SoftMoA(budget=900_000, slots=2)
    assert petl.AAT(width=4).replace(mlp=False) == petl.AAT(width=4, mlp=False)


@pytest.mark.parametrize(
    ("old", "method"),
    [
        (
            dict(name="lora", targets="qv", reduction=128, alpha=16, scale="alpha/rank"),
            petl.LoRA(),
        ),
        (
            dict(name="lora", targets="qkvo", reduction=4),
            petl.LoRA(targets=tuple("qkvo"), reduction=4),
        ),
        (dict(name="soft_moa", reduction=128.0, budget=None), petl.SoftMoA()),
        (dict(name="soft_moa", reduction=16, budget=9000), petl.SoftMoA(budget=9000)),
        (dict(name="aat", ratio=0.25, mlp=False), petl.AAT(mlp=False)),
        (
            dict(name="adapter", reduction=96, block="conformer"),
            petl.Adapter("conformer", reduction=96),
        ),
        (
            dict(name="combined", methods=[dict(name="aat", ratio=0.25), dict(name="linear")]),
            petl.Combined((petl.AAT(), petl.Linear())),
        ),
    ],
)
def test_the_json_of_older_versions_is_read(old, method):
    assert Method.from_json(old) == method


# ------------------------------------------------------------------------------ refusals


def test_an_unknown_method_is_suggested():
    with pytest.raises(UsageError, match="unknown method 'soft_mao', did you mean 'soft_moa'"):
        petl.find_method("soft_mao")
    with pytest.raises(UsageError, match=r"unknown method 'zzz' \(there are aat, "):
        Method.from_json({"name": "zzz"})
    with pytest.raises(UsageError, match="unknown method 'lroa', did you mean 'lora'"):
        petl.make_method("aat+lroa")
    with pytest.raises(
        AttributeError, match=r"no 'SoftMao', did you mean 'SoftMoA'\? \(methods: A"
    ):
        petl.SoftMao  # noqa: B018
    assert {"AAT", "SoftMoA", "adapt"} <= set(dir(petl))


def test_every_method_is_exported_by_name():
    for method in petl.METHODS.values():
        if not method.__module__.startswith("aatjax.petl."):
            continue  # of a benchmark or another test
        name = method.__name__
        assert name in petl.__all__, f"import {name} in aatjax/petl/__init__.py, add it to __all__"
        assert getattr(petl, name) is method


def test_an_unknown_field_names_the_known_ones():
    fields = {**petl.SoftMoA().to_json(), "experts": 7}
    with pytest.raises(
        UsageError, match=r"petl has no field 'experts', did you mean 'expert'"
    ) as info:
        Method.from_json(fields)
    assert "\n" not in str(info.value)
    with pytest.raises(UsageError, match=r"petl has no field 'rank'.*tag, blocks"):
        Method.from_json({"name": "layer_norm", "rank": 4})


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        ("AAT", dict(mlp=False, spatial=False), "adds nothing: use petl.Linear"),
        ("AAT", dict(ratio=0.0), "AAT ratio=0.0 must be above 0"),
        ("AAT", dict(ratio=float("nan")), "ratio=nan must be a finite number, above 0"),
        ("Adapter", dict(residual=True), "parallel' with residual=True would add the LayerN"),
        ("Adapter", dict(order="sequential", residual=False), "would lose the output of the froz"),
        ("Adapter", dict(reduction=0.0), "reduction=0.0 must be above 0"),
        ("Adapter", dict(width=8, reduction=4.0), "width=8 and reduction=4.0: each sets the width"),
        ("Adapter", dict(position="beside"), "position='beside' is not one of before, after"),
        ("Combined", dict(methods=(petl.AAT(),)), "needs two methods or more"),
        ("DenseMoA", dict(expert="moe"), "expert='moe' is not one of bottleneck, conformer"),
        ("LoRA", dict(alpha=0), "alpha=0 must be above 0"),
        ("LoRA", dict(rank=8, reduction=96.0), "rank=8 and reduction=96.0: each sets the width"),
        ("LoRA", dict(rank=0), "rank=0 must be at least 1"),
        ("LoRA", dict(scale="rank"), "scale='rank' is not one of alpha/rank, alpha/reduction"),
        (
            "LoRA",
            dict(targets=("q", "q")),
            r"targets=\('q', 'q'\) is not a set of q, k, v, o, up and down",
        ),
        ("LoRA", dict(targets=("q", "x")), r"targets=\('q', 'x'\) is not a set"),
        ("Prefix", dict(tokens=5), "tokens=5 must be even"),
        ("Prompt", dict(tokens=0), "tokens=0 must be at least 1"),
        (
            "Prompt",
            dict(keep_dist=True, as_published=True, pool="prompts"),
            "never inserts the prompts, so there are none to pool",
        ),
        ("SoftMoA", dict(num_experts=0), "num_experts=0 must be at least 1"),
        ("SoftMoA", dict(slots=-1), "slots=-1 must be at least 1"),
        ("SoftMoA", dict(budget=9000, reduction=4), "reduction=4 and budget=9000: each sets"),
        ("SoftMoA", dict(location="attn"), "location='attn' is not one of mhsa, ffn, both"),
        ("SoftMoA", dict(normalize=True, as_published=True), "no published run normalised"),
        ("SoftMoA", dict(expert=("bottleneck", "conformer")), "experts of a mixture are of one k"),
        ("SoftMoA", dict(kernel=1.5), "kernel=1.5 must be a whole number, at least 1"),
        ("TopKMoA", dict(num_experts=2, top=3), "top=3 must be at most num_experts=2"),
        ("TopKMoA", dict(balance=-1.0), "balance=-1.0 must be at least 0"),
        ("TopKMoA", dict(as_published=True), "there is no published code to reproduce"),
    ],
)
def test_fields_that_make_no_method_are_refused(cls, fields, message):
    method = object.__new__(getattr(petl, cls))  # without the type checker of the constructor
    for name, value in fields.items():
        object.__setattr__(method, name, value)
    with pytest.raises(UsageError, match=message):
        method.__post_init__()


def test_a_residual_may_confirm_the_order():
    assert petl.Adapter(residual=False) and petl.Adapter(order="sequential", residual=True)


def test_more_blocks_than_the_model_has_are_refused():
    with pytest.raises(UsageError, match="Partial blocks='last3': the model has 2 blocks"):
        aatjax.adapt(make_model(), petl.Partial(blocks="last3"))
    with pytest.raises(UsageError, match="LoRA blocks='last3': the model has 2 blocks"):
        aatjax.adapt(make_model(), petl.LoRA(blocks="last3"))


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("soft_moa", r"adapt takes a method, not 'soft_moa': pass petl\.SoftMoA\(\)"),
        (petl.LoRA, r"adapt takes a method, not .*LoRA.*: pass petl\.LoRA\(\)"),
        (None, r"adapt takes a method, not None: .* petl\.make_method\(NAME\)"),
    ],
)
def test_adapt_says_what_to_pass(given: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        aatjax.adapt(make_model(), given)


def test_a_method_without_inject_raises():
    class Empty(Method):
        name = "empty_of_the_test"

    with pytest.raises(NotImplementedError, match="Empty does not implement inject"):
        aatjax.adapt(make_model(), Empty())


# ---------------------------------------------------------------------- a method from outside


def test_a_method_defined_elsewhere_needs_no_other_edit():
    class Shift(nnx.Module):
        def __init__(self, dim: int):
            self.by = nnx.Param(jnp.zeros((1, 1, dim)))

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
        assert petl.Steering is Steering  # pyright: ignore[reportAttributeAccessIssue]
        method = Steering(("mlp", "attn"))
        read = Method.from_json(json.loads(json.dumps(method.to_json())))
        assert read == method
        adapted = aatjax.adapt(make_model(scan=True), read)
        assert aatjax.summary(adapted).trainable == 4 * 16 + 2 * 16 + 17 * 5
        # The first block is outside the scanned body now, and rounds otherwise.
        found, expected = adapted(make_clips()), make_model(scan=True)(make_clips())
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
        steer = np.linspace(-1, 1, 16).reshape(1, 1, 16)
        surgery.assign(adapted, {"blocks/1/mlp/steering/by": steer}, what="the test")
        assert float(jnp.abs(adapted(make_clips()) - make_model()(make_clips())).max()) > 1e-3
    finally:
        petl.METHODS.pop("steering_of_a_test")


def test_a_method_name_belongs_to_one_class():
    def define(name: str, qualname: str) -> type[Method]:
        fields = {"name": name, "__module__": __name__, "__qualname__": qualname}
        return type("Made", (Method,), fields)

    with pytest.raises(
        UsageError, match=r"'soft_moa' belongs to aatjax\.petl\.soft_moa\.SoftMoA: g"
    ):
        define("soft_moa", "Made")
    assert petl.find_method("soft_moa") is petl.SoftMoA
    try:
        first = define("made_of_a_test", "Made")
        again = define("made_of_a_test", "Made")  # as a cell of a notebook that is run again
        assert petl.find_method("made_of_a_test") is again is not first
        with pytest.raises(UsageError, match=r"belongs to test_petl\.Made: give test_petl\.Other"):
            define("made_of_a_test", "Other")
    finally:
        petl.METHODS.pop("made_of_a_test")


def test_a_refined_method_without_a_name_does_not_replace_its_parent():
    class Refined(petl.SoftMoA):
        pass

    assert petl.find_method("soft_moa") is petl.SoftMoA
    assert Refined is not petl.SoftMoA


# ----------------------------------------------- what a whole model computes, in float64


def make_oracle(adapted: AST, method: Method, values: Any = None, **options: Any) -> Oracle:
    held = {**surgery.arrays(adapted), **(values or {})}
    return Oracle(held, adapted.config, list_parts(method), **options)


@pytest.mark.parametrize("pool", ["stats", "bands", "attention", "prototypes"])
@pytest.mark.parametrize("masked", [False, True])
def test_pooling_is_its_formula_with_any_method(pool, masked):
    for method in (petl.LoRA(rank=2), petl.Prompt(tokens=3), petl.Prompt(pool=None, deep=False)):
        model = make_model(pool=pool, prototypes=7, mask_padding=masked)
        adapted = randomize(aatjax.adapt(model, method))
        trained = [path for path in list_trained(adapted) if path.startswith("pool/")]
        assert trained == {"stats": [], "bands": [], "attention": ["pool/query"]}.get(
            pool, trained[:1]
        )
        x, valid = make_clips(), np.array([20, 46]) if masked else None
        kept = dataclasses.replace(method, pool=None) if hasattr(method, "pool") else method
        expected = make_oracle(adapted, kept, valid=valid).logits(np.asarray(x))
        with jax.default_matmul_precision("highest"):
            given = None if valid is None else jnp.asarray(valid)
            np.testing.assert_allclose(adapted(x, given), expected, atol=1e-4, rtol=1e-4)


def test_attention_pooling_starts_as_the_mean():
    model = make_model(pool="attention")
    mean = make_model(pool="mean_all")
    np.testing.assert_allclose(model(make_clips()), mean(make_clips()), atol=1e-5)


def norm(x: Any) -> float:
    return float(np.linalg.norm(np.asarray(x, np.float64)))


OUTPUTS = ("w_up", "b_up", "w_out", "b_out", "lora_b", "prefix", "/prompts")


@pytest.mark.parametrize(("name", "published"), WITH_ORACLE)
def test_an_adapted_model_is_the_equations(name, published):
    method, _ = find_form(name, published)
    for pool in ("mean_all", "cls_dist") if "prompt" in name else ("cls_dist",):
        plain = make_model(pool=pool, head_norm=pool == "cls_dist")
        adapted = randomize(aatjax.adapt(plain, method))
        expected = make_oracle(adapted, method).logits(np.asarray(make_clips()))
        assert norm(adapted(make_clips()) - expected) / norm(expected) < 1e-5
        added = {
            p: np.zeros(v.shape) for p, v in surgery.arrays(adapted).items() if p.endswith(OUTPUTS)
        }
        without = make_oracle(adapted, method, added).logits(np.asarray(make_clips()))
        change = norm(without - expected) / norm(expected)
        assert change > 0.01 if added else change == 0, "the adapter must have an effect"


@pytest.mark.parametrize("name", ["conformer", "dense_moa_conformer"])
def test_batch_normalisation_is_by_the_batch_in_training_and_updates_its_statistics(name):
    method, _ = CASES[name]
    adapted = randomize(aatjax.adapt(make_model(), method))
    before = surgery.arrays(adapted, nnx.BatchStat)
    training = surgery.clone(adapted)
    training.train()
    found = training(make_clips())
    expected = make_oracle(adapted, method, training=True).logits(np.asarray(make_clips()))
    assert norm(found - expected) / norm(expected) < 1e-5
    assert norm(found - adapted(make_clips())) > 0.01 * norm(found)
    for path, value in surgery.arrays(training, nnx.BatchStat).items():
        moved = np.asarray(value) - 0.9 * np.asarray(before[path])
        assert np.abs(moved).max() > 1e-3, path


@pytest.mark.parametrize(
    ("name", "published"), [(n, False) for n in KINDS] + [(n, True) for n in PUBLISHED_KINDS]
)
def test_a_gradient_reaches_every_trained_leaf_and_is_the_slope_of_the_equations(name, published):
    """Along one random direction in every trained leaf, against central differences in float64."""
    method, _ = find_form(name, published)
    depth = 2 if name.startswith(("prompt", "combined")) else 1
    adapted = randomize(aatjax.adapt(make_model(pool="mean_all", depth=depth), method))
    rng = np.random.default_rng(4)
    x, weights = make_clips(), rng.normal(size=(2, 5)).astype(np.float32)
    parts = surgery.split(adapted)

    @jax.jit
    @jax.grad
    def find_slopes(trainable):
        model = surgery.join(parts.graphdef, trainable, parts.stats, parts.frozen)
        model.set_attributes(deterministic=False, raise_if_not_found=False)
        return (model(x) * weights).sum() + surgery.sum_penalties(model)

    slopes = find_slopes(parts.trainable)
    joined = surgery.join(parts.graphdef, slopes, parts.stats, parts.frozen)
    found = {path: np.asarray(v) for path, v in surgery.arrays(joined, nnx.Param).items()}
    assert set(found) == list_trained(adapted)
    unused = UNUSED_AS_PUBLISHED.get(name, ()) if published else ()
    for path, slope in found.items():
        if path.endswith(unused) and unused:
            assert not slope.any(), path
        elif path.endswith("attn/k/bias"):  # the softmax cancels what all keys share
            assert np.abs(slope).max() < 1e-4
        else:
            assert np.abs(slope).max() > 1e-4 and np.isfinite(slope).all(), path

    held = {path: np.asarray(v, np.float64) for path, v in surgery.arrays(adapted).items()}

    def compute(path: str, step: np.ndarray) -> float:
        values = {**held, path: held[path] + step}
        oracle = Oracle(values, adapted.config, list_parts(method))
        return float((oracle.logits(np.asarray(x)) * weights).sum() + oracle.penalty)

    checked = [path for path in found if not path.startswith("head/")]
    for path in checked if name != "full" else checked[::5]:
        direction = rng.normal(size=found[path].shape)
        expected = (compute(path, 1e-5 * direction) - compute(path, -1e-5 * direction)) / 2e-5
        slack = 1e-4 * norm(found[path]) * norm(direction) + 1e-4
        assert abs(float((found[path] * direction).sum()) - expected) < slack, path


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * ("_" in n and n != "soft_moa")) for n in KINDS],
)
def test_scanned_blocks_compute_the_equations_and_masked_padding_changes_nothing(name):
    """Masked padding, unless a convolution over the tokens reads across its border."""
    method, _ = CASES[name]
    masked = "conformer" not in name and "convpass" not in name
    options = dict(frames=66, pool="mean_all", mask_padding=masked)
    adapted = randomize(aatjax.adapt(make_model(depth=3, scan=True, **options), method))
    parts = surgery.split(adapted)
    state = parts.trainable, parts.stats, parts.frozen
    jitted = jax.jit(lambda state, x, valid: surgery.join(parts.graphdef, *state)(x, valid))
    x = np.array(make_clips(66))
    valid = np.array([25, 66])
    found = jitted(state, x, valid)
    expected = make_oracle(adapted, method, valid=valid if masked else None).logits(x)
    assert norm(found - expected) / norm(expected) < 1e-5
    if masked:
        assert norm(jitted(state, x, np.array([66, 66])) - found) > 1e-3
        x[0, 46:] *= 9  # the patches that start at frame 20, the last inside, end at 36
        np.testing.assert_allclose(jitted(state, x, valid), found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*WITHOUT_ORACLE, "linear"])
def test_a_method_without_an_oracle_trains_and_scans(name):
    """What must hold for every method; `petl_oracle` gives the formulas of the others."""
    method, _ = CASES[name]
    x = make_clips()
    plain = randomize(aatjax.adapt(make_model(mask_padding=True), method))
    parts = surgery.split(plain)

    @jax.jit
    @jax.grad
    def find_slopes(trainable):
        return surgery.join(parts.graphdef, trainable, parts.stats, parts.frozen)(x).sum()

    slopes = find_slopes(parts.trainable)
    joined = surgery.join(parts.graphdef, slopes, parts.stats, parts.frozen)
    for path, slope in surgery.arrays(joined, nnx.Param).items():
        slope = np.asarray(slope)
        assert np.isfinite(slope).all() and slope.any(), f"{path} gets no gradient"
    run = nnx.jit(lambda model: model(x, jnp.array([30, 46])))
    expected = run(plain)
    variants: list[tuple[dict[str, Any], float]] = [
        ({"scan": True}, 1e-5),
        ({"dtype": "bfloat16"}, 0.06),
    ]
    for changes, tolerance in variants:
        other = aatjax.adapt(make_model(0, mask_padding=True, **changes), method)
        surgery.assign(other, surgery.arrays(plain), what="the test")
        assert norm(run(other) - expected) < tolerance * norm(expected)


def test_blocks_that_differ_cannot_be_scanned():
    method, _ = find_form("prompt_aat", True)
    adapted = aatjax.adapt(make_model(scan=True, depth=3), method)
    with pytest.raises(UsageError, match="differs from block 0"):
        adapted(make_clips())


ROUGH = ["adapter", "conformer", "convpass", "lora", "prefix", "prompt", "combined"]
ROUGH += ["soft_moa_normalized", "dense_moa", "dense_moa_conformer", "top_k_moa"]


@pytest.mark.parametrize("name", ROUGH)
def test_bfloat16_stays_close(name):
    method, _ = CASES[name]
    plain = randomize(aatjax.adapt(make_model(), method))
    rough = aatjax.adapt(make_model(dtype="bfloat16"), method)
    surgery.assign(rough, surgery.arrays(plain), what="the test")
    expected, found = plain(make_clips()), rough(make_clips())
    assert found.dtype == jnp.float32
    assert norm(found - expected) < 0.06 * norm(expected)
