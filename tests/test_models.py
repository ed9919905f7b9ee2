"""The backbone: sizes, refusals, and the same results however the blocks are run."""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import erf
from slow_cases import mark_slow

import aatjax
from aatjax import petl, surgery
from aatjax.analysis.flops import count_flops
from aatjax.errors import UsageError
from aatjax.models.ast import AST, ASTConfig, Mlp

SMALL = dict(dim=16, depth=3, heads=2, mlp_dim=24, mels=36, frames=56, num_classes=5)


def small(seed: int = 0, **changes) -> AST:
    return AST(ASTConfig(**{**SMALL, **changes}), rngs=nnx.Rngs(seed))  # pyright: ignore


def clip(batch: int = 2) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(batch, 56, 36)), jnp.float32)


def shapes(config: ASTConfig) -> dict[str, tuple[int, ...]]:
    model = nnx.eval_shape(lambda: AST(config, rngs=nnx.Rngs(0)))
    return {path: variable.shape for path, variable in surgery.variables(model).items()}


def count(found: dict[str, tuple[int, ...]], prefix: str = "") -> int:
    return sum(math.prod(shape) for path, shape in found.items() if path.startswith(prefix))


# ---------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("frames", "columns", "tokens", "body"),
    [
        (1024, 101, 1214, 86_187_264),
        (800, 79, 950, 85_984_512),
        (512, 50, 602, 85_717_248),
        (500, 49, 590, 85_708_032),
        (400, 39, 470, 85_615_872),
        (128, 12, 146, 85_367_040),
        (100, 9, 110, 85_339_392),
        (3000, 299, 3590, 88_012_032),
    ],
)
def test_base_has_the_published_tokens_and_parameters(frames, columns, tokens, body):
    config = ASTConfig.size("base", frames=frames)
    assert config.grid == (12, columns)
    assert config.num_tokens == tokens
    if frames not in (1024, 500, 3000):
        assert body == 86_187_264 + (tokens - 1214) * 768
        return
    found = shapes(config)
    assert found["embed/pos"] == (1, tokens, 768)
    assert count(found) - count(found, "head/") == body
    assert count(found, "blocks/0/") == 7_087_872
    assert count(found, "blocks/") == 85_054_464
    assert count(found, "embed/proj/") == 197_376
    assert found["embed/proj/kernel"] == (16, 16, 1, 768)


@pytest.mark.parametrize(
    ("classes", "bare", "normed"),
    [
        (10, 7_690, 9_226),
        (20, 15_380, 16_916),
        (30, 23_070, 24_606),
        (35, 26_915, 28_451),
        (50, 38_450, 39_986),
        (527, 405_263, 406_799),
    ],
)
def test_heads_have_the_published_sizes(classes, bare, normed):
    for head_norm, expected in ((False, bare), (True, normed)):
        config = ASTConfig.size("base", num_classes=classes, depth=1, head_norm=head_norm)
        assert count(shapes(config), "head/") == expected


def test_the_audioset_classifier_has_the_size_of_the_published_file():
    assert count(shapes(ASTConfig())) == 86_594_063


@pytest.mark.parametrize(("name", "dim", "heads"), [("tiny", 192, 3), ("small", 384, 6)])
def test_the_smaller_sizes_follow_the_closed_form(name, dim, heads):
    config = ASTConfig.size(name, num_classes=50, frames=512)
    assert (config.dim, config.depth, config.heads) == (dim, 12, heads)
    block = 4 * dim + 4 * (dim * dim + dim) + 4 * dim * dim + 4 * dim + 4 * dim * dim + dim
    embed = 256 * dim + dim + 2 * dim + 602 * dim
    assert count(shapes(config)) == 12 * block + embed + 2 * dim + 2 * dim + 50 * (dim + 1)


def test_a_plain_vit_has_one_prefix_token_and_no_dist():
    config = ASTConfig(**{**SMALL, "distilled": False, "depth": 1})
    assert config.num_tokens == 1 + 3 * 5
    assert "embed/dist" not in shapes(config)
    model = AST(config, rngs=nnx.Rngs(0))
    tokens = model.tokens(clip())
    assert tokens.shape == (2, 16, 16)
    np.testing.assert_array_equal(model.pool(tokens), tokens[:, 0])


def test_without_qkv_bias_only_the_three_projections_lose_it():
    lost = set(shapes(ASTConfig(**SMALL))) - set(shapes(ASTConfig(**{**SMALL, "qkv_bias": False})))
    assert lost == {f"blocks/{i}/attn/{name}/bias" for i in range(3) for name in "qkv"}


# ------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(dim=17), "dim=17 is not a multiple of heads=2"),
        (dict(heads=0), "heads=0 must be at least 1"),
        (dict(dim=0), "dim=0 must be at least 1"),
        (dict(dim=-16), "dim=-16 must be at least 1"),
        (dict(depth=0), "depth=0 must be at least 1"),
        (dict(mlp_dim=0), "mlp_dim=0 must be at least 1"),
        (dict(num_classes=0), "num_classes=0 must be at least 1"),
        (dict(patch=(0, 16)), "patch=\\(0, 16\\) must be at least 1"),
        (dict(stride=(10, 0)), "stride=\\(10, 0\\) must be at least 1"),
        (dict(frames=15), "36 mel bins x 15 frames is smaller than one patch of 16 x 16"),
        (dict(mels=15), "15 mel bins x 56 frames is smaller than one patch"),
        (dict(pool="max"), "pool='max' is not one of cls_dist, mean_all, mean_patches, cls"),
        (dict(dtype="float16"), "dtype='float16' is not one of float32, bfloat16"),
    ],
)
def test_an_impossible_config_is_refused_in_one_line(changes, message):
    config = object.__new__(ASTConfig)  # past the type checker
    for name, value in {**SMALL, **changes}.items():
        object.__setattr__(config, name, value)
    with pytest.raises(UsageError, match=message) as info:
        config.__post_init__()
    assert "\n" not in str(info.value)


def test_an_unknown_size_names_the_known_ones():
    with pytest.raises(UsageError, match="unknown model size 'large': one of tiny, small, base"):
        ASTConfig.size("large")


def test_a_config_survives_json():
    import json

    config = ASTConfig(**{**SMALL, "stride": (12, 11), "pool": "mean_all", "head_norm": False})
    assert ASTConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert hash(ASTConfig.from_json(json.loads(json.dumps(config.to_json())))) == hash(config)
    with pytest.raises(UsageError, match="model has no field 'deep', did you mean 'depth'"):
        ASTConfig.from_json({**config.to_json(), "deep": 1, "colour": 2})


@pytest.mark.parametrize(
    ("shape", "advice"),
    [
        ((2, 57, 36), "load it with frames=57"),
        ((2, 20, 36), "load it with frames=20"),
        ((2, 56, 35), "mels=35"),
        ((1, 36, 56), "transpose"),
    ],
)
def test_a_wrong_input_length_is_refused_with_what_to_do(shape, advice):
    with pytest.raises(UsageError, match=r"takes .*56 frames, 36 mel bins") as info:
        small()(jnp.zeros(shape))
    assert str(list(shape)) in str(info.value)
    assert advice in str(info.value)


@pytest.mark.wrong_types
@pytest.mark.parametrize("shape", [(56,), (56, 36), (2, 1, 56, 36)])
def test_a_wrong_rank_is_refused_where_no_types_are_checked(shape):
    with pytest.raises(UsageError, match=r"takes .*56 frames, 36 mel bins"):
        small().tokens(jnp.zeros(shape))


# ------------------------------------------------------------------------- the forward pass


def test_the_gelu_is_the_exact_one():
    mlp = Mlp(ASTConfig(**SMALL), rngs=nnx.Rngs(1))
    up, down = mlp.up, mlp.down
    x = np.random.default_rng(1).normal(size=(1, 7, 16)) * 30
    hidden = x @ np.asarray(up.kernel[...], np.float64) + np.asarray(up.bias[...], np.float64)
    assert 1 < np.abs(hidden).max() < 10, "where the two forms of GELU differ"
    exact = 0.5 * hidden * (1 + erf(hidden / math.sqrt(2)))
    tanh = np.asarray(jax.nn.gelu(jnp.asarray(hidden, jnp.float32), approximate=True))
    found = mlp(jnp.asarray(x, jnp.float32))
    kernel = np.asarray(down.kernel[...], np.float64)
    np.testing.assert_allclose(found, exact @ kernel, atol=3e-6)
    assert np.abs(tanh @ kernel - exact @ kernel).max() > 2e-5


def test_patches_are_counted_frequency_first_from_the_lowest_bin():
    model = small()
    surgery.assign(
        model,
        {
            "embed/proj/bias": np.zeros(16),
            "embed/pos": np.zeros((1, 17, 16)),
            "embed/proj/kernel": np.ones((16, 16, 1, 16)),
        },
        what="the test",
    )
    x = np.zeros((1, 56, 36), np.float32)
    x[0, 40, 35] = 1.0  # only patches of the last row, at columns 3 and 4, hold bin 35, frame 40
    patches = np.asarray(model.embed(jnp.asarray(x)))[0, 2:, 0]
    assert set(np.flatnonzero(patches)) == {2 * 5 + 3, 2 * 5 + 4}


def loss_of(model: AST):
    """A scalar of the trainable parameters with the logits beside it, and these parameters."""
    parts = surgery.split(model)
    weights = jnp.asarray(np.random.default_rng(4).normal(size=(2, 5)), jnp.float32)

    def loss(trainable):
        again = surgery.join(parts.graphdef, trainable, parts.stats, parts.frozen)
        logits = again(clip())
        return (logits * weights).sum(), logits

    return loss, parts.trainable


def logits_and_gradient(model: AST) -> tuple[jax.Array, Any]:
    loss, trainable = loss_of(model)
    gradient, logits = jax.jit(jax.grad(loss, has_aux=True))(trainable)
    return logits, gradient


def shaken(model: AST, scale: float = 0.1) -> AST:
    """The model with every parameter moved by noise."""
    rng = np.random.default_rng(7)
    values = surgery.arrays(model)
    moved = {p: v + scale * rng.normal(size=v.shape).astype(v.dtype) for p, v in values.items()}
    surgery.assign(model, moved, what="the test")
    return model


METHODS = {
    "full": petl.Full(),
    "aat": petl.AAT(),
    "soft_moa": petl.SoftMoA(num_experts=3, slots=2, reduction=4.0, location="both"),
}


@functools.cache
def run_unrolled(name: str) -> tuple:
    """Logits and gradient of the plain loop."""
    return logits_and_gradient(shaken(aatjax.adapt(small(depth=2), METHODS[name])))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("full", dict(scan=True)),
        ("aat", dict(remat=True)),
        ("aat", dict(scan=True)),
        ("soft_moa", dict(scan=True, remat=True)),
    ],
)
def test_scanned_and_rematerialised_blocks_give_the_same(name, changes):
    logits, gradient = run_unrolled(name)
    model = shaken(aatjax.adapt(small(depth=2, **changes), METHODS[name]))
    found_logits, found = logits_and_gradient(model)
    np.testing.assert_allclose(found_logits, logits, rtol=1e-5, atol=1e-6)
    assert jax.tree.structure(found) == jax.tree.structure(gradient)
    for mine, plain in zip(jax.tree.leaves(found), jax.tree.leaves(gradient), strict=True):
        scale = float(jnp.abs(plain).max())
        np.testing.assert_allclose(mine, plain, rtol=1e-4, atol=1e-5 * max(scale, 1e-2))


def test_a_scanned_model_is_one_loop_and_a_rematerialised_one_recomputes():
    def program(**changes) -> str:
        loss, trainable = loss_of(aatjax.adapt(small(depth=4, **changes), petl.AAT()))
        return str(jax.make_jaxpr(jax.grad(loss, has_aux=True))(trainable))

    plain, scanned, remat = program(), program(scan=True), program(remat=True)
    assert "scan[" not in plain and "remat" not in plain
    assert "scan[" in scanned and len(scanned) < len(plain)
    assert "remat" in remat or "checkpoint" in remat


@pytest.mark.parametrize("first", [0, 1, 3], ids=lambda first: f"first trained: {first}")
def test_a_scanned_gradient_ends_in_the_first_trained_block(first):
    """As many products of a gradient as the plain loop has, block for block."""
    depth, method = 5, petl.AAT(blocks=f"last{5 - first}")

    def spent(**changes) -> float:
        loss, trainable = loss_of(aatjax.adapt(small(depth=depth, **changes), method))
        return count_flops(jax.grad(loss, has_aux=True), trainable)

    assert spent(scan=True) == spent()
    # From trained tokens on there is no first block: one body for all.
    whole = aatjax.adapt(small(depth=depth, scan=True), petl.Full())
    loss, trainable = loss_of(whole)
    assert str(jax.make_jaxpr(loss)(trainable)).count("scan[") == 1


# ------------------------------------------------------------- tokens that the head reads


@pytest.mark.parametrize(
    ("pool", "scan"),
    mark_slow(itertools.product(("cls_dist", "cls"), (False, True)), {("cls_dist", True)}),
)
def test_the_last_block_computes_only_what_the_pool_reads(pool, scan):
    """The same logits and gradients as by way of all tokens, with less work."""
    adapted = aatjax.adapt(small(depth=3, pool=pool, scan=scan), petl.AAT())
    parts = surgery.split(adapted)
    rng = np.random.default_rng(1)
    trainable = jax.tree.map(
        lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32), parts.trainable
    )

    def make(read):
        def run(trainable):
            model = surgery.join(parts.graphdef, trainable, parts.stats, parts.frozen)
            logits = read(model, clip())
            return jnp.square(logits).sum(), logits

        return jax.value_and_grad(run, has_aux=True)

    short = make(lambda model, x: model(x))
    long = make(lambda model, x: model.head(model.pool(model.tokens(x))))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5),
        short(trainable),
        long(trainable),
    )
    assert count_flops(short, trainable) < 0.85 * count_flops(long, trainable)


def test_a_block_whose_tokens_depend_on_each_other_computes_them_all():
    """A subclass with another call does not inherit that its tokens are independent."""

    class Average(petl.bottleneck.Bottleneck):
        def __call__(self, x, mask=None):
            return super().__call__(x) + x.mean(axis=1, keepdims=True)

    def add(_, base):
        extra = Average(16, 2, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
        return petl.base.Parallel(base, "extra", extra)

    for site in ("mlp", "attn"):
        model = small(depth=2)
        surgery.wrap(model, f"blocks/1/{site}", add)
        want = model.head(model.pool(model.tokens(clip())))
        np.testing.assert_allclose(model(clip()), want, rtol=1e-5, atol=1e-5)


def test_scan_refuses_blocks_that_differ():
    adapted = small(scan=True)
    surgery.wrap(
        adapted,
        "blocks/1/mlp",
        lambda _, base: petl.base.Parallel(
            base,
            "extra",
            petl.bottleneck.Bottleneck(16, 2, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0)),
        ),
    )
    with pytest.raises(UsageError, match=r"block 1 differs from block 0 .*use scan=False") as info:
        adapted(clip())
    assert "\n" not in str(info.value)
    trained = small(scan=True, depth=4)
    surgery.freeze(trained)
    surgery.unfreeze(trained, "blocks/2/ln1/*")
    with pytest.raises(UsageError, match="block 2 differs from block 0"):
        trained(clip())
    another = small(scan=True)
    another.blocks[1].attn.heads = 4  # the same weights, another function
    with pytest.raises(UsageError, match="block 1 differs from block 0"):
        another(clip())
    widened = small(scan=True, depth=4)
    widened.blocks[2].mlp = Mlp(ASTConfig(**{**SMALL, "mlp_dim": 32}), rngs=nnx.Rngs(0))
    with pytest.raises(UsageError, match="block 2 differs from block 0"):
        widened(clip())


class Counting(nnx.Module):
    """Passes tokens through and keeps a running sum of them as a batch statistic."""

    def __init__(self, base: nnx.Module):
        self.base = base
        self.total = nnx.BatchStat(jnp.zeros(()))

    def __call__(self, x):
        self.total[...] = self.total[...] + jnp.abs(x[..., 0]).mean()
        return self.base(x)  # pyright: ignore[reportCallIssue]


def test_statistics_that_blocks_update_come_back_however_the_blocks_run():
    def sum_statistics(**changes) -> list[float]:
        model = small(**changes)
        surgery.wrap(model, "blocks/*/mlp", lambda _, base: Counting(base))
        model(clip())
        model(clip())
        return [v.item() for v in surgery.arrays(model, nnx.BatchStat).values()]

    plain = sum_statistics()
    assert min(plain) > 0.1 and np.ptp(plain) > 0.01
    for changes in (dict(scan=True), dict(remat=True), dict(scan=True, remat=True)):
        np.testing.assert_allclose(sum_statistics(**changes), plain, rtol=1e-5, err_msg=changes)


def test_bfloat16_blocks_run_scanned_and_logits_are_float32():
    method = petl.SoftMoA(num_experts=2, reduction=4.0, location="both")
    exact = shaken(aatjax.adapt(small(), method))(clip())
    model = shaken(aatjax.adapt(small(dtype="bfloat16", scan=True, remat=True), method))
    logits, gradient = logits_and_gradient(model)
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
    assert {v.dtype for v in surgery.arrays(model).values()} == {jnp.dtype("float32")}
    relative = float(jnp.linalg.norm(logits - exact) / jnp.linalg.norm(exact))
    assert 1e-5 < relative < 0.05


def test_the_input_may_have_any_float_type():
    x = clip()
    np.testing.assert_allclose(
        small()(x.astype(jnp.float16)), small()(x.astype(jnp.float16).astype(jnp.float32))
    )
