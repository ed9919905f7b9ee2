"""Meshes as JAX makes them: Explicit and Auto axes of any name, `jax.set_mesh` or not."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import export
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from petl_cases import make_clips, make_model, randomize
from slow_cases import mark_slow
from tiny_model import tiny_config

import aatjax
from aatjax import data, petl, surgery
from aatjax.data.synthetic.dataset import TARGET_SOUNDS
from aatjax.models.ast import AST
from aatjax.train.sharding import adopt_mesh
from aatjax_kernels.attention import attention
from aatjax_kernels.soft_moe import soft_moe

CLIPS = jnp.concatenate([make_clips(seed=seed) for seed in range(4)])
MESHES = [
    (kind, names, is_set)
    for kind in (AxisType.Explicit, AxisType.Auto)
    for names in (("data",), ("batch",), ("x", "y"))
    for is_set in (False, True)
]
# The name of the axis of the heads in our own meshes, here one of the batch.
MESHES += [(AxisType.Explicit, ("model",), False), (AxisType.Explicit, ("data", "model"), True)]
FAST = {
    (AxisType.Explicit, ("data",), False),
    (AxisType.Explicit, ("batch",), True),
    (AxisType.Explicit, ("x", "y"), False),
    (AxisType.Auto, ("data",), True),
    (AxisType.Auto, ("batch",), False),
    (AxisType.Explicit, ("data", "model"), True),
}


def make_mesh(kind: AxisType, names: tuple[str, ...]):
    shape = (4,) if len(names) == 1 else (2, 2)
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


def place(tree, mesh, *axes):
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*axes)))


def place_pieces(tree, mesh, names):
    """Split the rows of every matrix that can be, as fsdp does."""

    def one(leaf):
        split = leaf.ndim == 2 and leaf.shape[0] % 4 == 0
        return place(leaf, mesh, names) if split else place(leaf, mesh)

    return jax.tree.map(one, tree)


@functools.cache
def parts():
    method = petl.Combined((petl.SoftMoA(width=3), petl.AAT(spatial=False)))
    return surgery.split(randomize(aatjax.adapt(make_model(), method)))


def compute_loss(trainable, frozen, x):
    model = surgery.join(parts().graphdef, trainable, parts().stats, frozen)
    return jnp.square(model(x)).mean()


def count_flops(function, *args) -> float:
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


@functools.cache
def on_one_device():
    """The gradient and its FLOPs without a mesh."""
    args = parts().trainable, parts().frozen, CLIPS
    return jax.jit(jax.grad(compute_loss))(*args), count_flops(jax.grad(compute_loss), *args)


def assert_close(found, expected, atol=1e-6):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=atol, rtol=1e-5)


@pytest.mark.parametrize(("kind", "names", "is_set"), mark_slow(MESHES, FAST))
def test_a_gradient_is_that_of_one_device_and_each_does_a_quarter(kind, names, is_set):
    mesh = make_mesh(kind, names)
    x, trainable = place(CLIPS, mesh, names), place(parts().trainable, mesh)
    expected, flops = on_one_device()
    with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
        for frozen in (place(parts().frozen, mesh), place_pieces(parts().frozen, mesh, names)):
            args = trainable, frozen, x
            assert_close(jax.jit(jax.grad(compute_loss))(*args), expected)
            share = count_flops(jax.grad(compute_loss), *args) / flops
            assert 0.2375 < share < 0.2625, share


@pytest.mark.parametrize("names", [("batch",), pytest.param(("data",), marks=pytest.mark.slow)])
def test_shard_map_at_its_defaults_gives_the_gradient_of_one_device(names):
    mesh = make_mesh(AxisType.Explicit, names)
    split, whole = PartitionSpec(names), PartitionSpec()

    def find(trainable, x):
        return jax.grad(lambda trainable: compute_loss(trainable, parts().frozen, x) / 4)(trainable)

    # JAX sums the gradient of what is the same on all devices over them.
    mapped = jax.shard_map(find, mesh=mesh, in_specs=(whole, split), out_specs=whole)
    assert_close(jax.jit(mapped)(parts().trainable, place(CLIPS, mesh, names)), on_one_device()[0])


LOOPS = [
    (method, is_set)
    for method in (petl.Adapter(block="conformer"), petl.TopKMoA(width=3), petl.Prompt(tokens=3))
    for is_set in (False, True)
]


@pytest.mark.parametrize(
    ("method", "is_set"),
    mark_slow(LOOPS, lambda method, is_set: is_set == (method.name == "top_k_moa")),
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_flax_own_loop_runs_on_the_default_mesh_with_statistics_and_penalties(method, is_set):
    mesh = jax.make_mesh((4,), ("batch",))

    def train(x):
        model = aatjax.adapt(make_model(), method)
        optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer, x):
            def loss(model):
                return jnp.square(model(x)).mean() + surgery.sum_penalties(model)

            model.train()
            optimizer.update(model, nnx.grad(loss)(model))

        for _ in range(2):
            step(model, optimizer, x)
        return surgery.arrays(model)

    expected = train(CLIPS)
    with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
        found = train(place(CLIPS, mesh, "batch"))
    assert_close(found, expected, 2e-6)
    statistics = [path for path in found if path.endswith(("/mean", "penalty"))]
    assert all(np.abs(found[path]).max() > 0 for path in statistics)


def test_a_model_that_a_jitted_function_closes_over_is_not_changed_by_it():
    mesh = jax.make_mesh((4,), ("batch",))
    model = surgery.join(parts().graphdef, parts().trainable, parts().stats, parts().frozen)
    expected = model(CLIPS)
    x = place(CLIPS, mesh, "batch")
    found = jax.jit(lambda x: model(x))(x)
    assert_close(found, expected)
    assert found.sharding.spec[0] == "batch"
    assert_close(model(x), expected)
    tokens = jax.jit(lambda x: model.tokens(x))(x)
    assert tokens.sharding.spec == PartitionSpec("batch", None, None)
    assert_close(model(CLIPS), expected)


@pytest.mark.parametrize("kernel", [None, "reference", "tpu"])
def test_the_ops_take_arrays_on_the_default_mesh(kernel):
    mesh = jax.make_mesh((4,), ("batch",))
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(0.2 * rng.normal(size=shape), jnp.float32)

    options = {"implementation": kernel, "interpret": kernel == "tpu"}
    weights = (draw(16, 3, 2), draw(3, 16, 4), draw(3, 4), draw(3, 4, 16), draw(3, 16))
    queries = draw(8, 12, 2, 8)
    for op, batched, shared in (
        (soft_moe, (draw(8, 20, 16),), weights),
        (attention, (queries, queries + 1, queries - 1), ()),
    ):

        def loss(batched, shared, op=op):
            return jnp.square(op(*batched, *shared, **options)).sum()

        find = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        placed = place(batched, mesh, "batch"), place(shared, mesh)
        assert op(*placed[0], *placed[1], **options).sharding.spec[0] == "batch"
        assert_close(find(*placed), find(batched, shared), 1e-5)


METHODS = [petl.SoftMoA(width=3), petl.Adapter(block="conformer"), petl.TopKMoA(width=3)]


@pytest.mark.parametrize(
    "method",
    mark_slow([(m,) for m in METHODS], lambda method: method.name != "adapter"),
    ids=lambda method: method.name,
)
def test_one_export_for_all_platforms_takes_any_batch(method):
    model = randomize(aatjax.adapt(make_model(), method))
    (batch,) = export.symbolic_shape("b")
    shape = jax.ShapeDtypeStruct((batch, *CLIPS.shape[1:]), jnp.float32)
    whole = export.export(jax.jit(lambda x: model(x)), platforms=["cpu", "cuda", "tpu"])(shape)
    found = export.deserialize(whole.serialize())
    assert found.platforms == ("cpu", "cuda", "tpu")
    for count in (1, 3, 8):
        assert_close(found.call(CLIPS[:count]), model(CLIPS[:count]))


def test_a_named_kernel_refuses_a_symbolic_batch():
    (batch,) = export.symbolic_shape("b")
    shape = jax.ShapeDtypeStruct((batch, 12, 2, 8), jnp.float32)
    with pytest.raises(ValueError, match="'tpu': does not take a symbolic shape"):
        export.export(jax.jit(lambda x: attention(x, x, x, implementation="tpu")))(shape)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_kernels_run_on_a_pod_whose_batch_axis_is_known(kind):
    """For a TPU, by its compiler; with a name that says nothing, plain JAX is partitioned."""
    pytest.importorskip("libtpu", reason="the TPU's compiler comes with aatjax[tpu]")
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    mesh = Mesh(np.array(topology.devices), ("batch",), axis_types=(kind,))
    sharding = NamedSharding(mesh, PartitionSpec("batch"))
    x = jax.ShapeDtypeStruct((8, 146, 12, 64), jnp.bfloat16, sharding=sharding)
    jitted = jax.jit(lambda x: attention(x, x, x))
    if kind is AxisType.Explicit:
        text = jitted.lower(x).compile().as_text()
    else:
        with pytest.warns(UserWarning, match="axes of the batch are not known"):
            text = jitted.lower(x).compile().as_text()
    assert text.count("tpu_custom_call") == (kind is AxisType.Explicit)
    assert "all-gather" not in text


def test_fit_takes_the_default_mesh_and_runs_within_one():
    source = data.Synthetic(TARGET_SOUNDS[:3], clips=8, seconds=1.0)
    model = aatjax.adapt(AST(tiny_config(), rngs=nnx.Rngs(0)), petl.SoftMoA(width=3))
    settings = dict(training=aatjax.Training(epochs=1, batch_size=8), show=False)
    expected = surgery.arrays(aatjax.fit(model, source, **settings).model)
    mesh = jax.make_mesh((4,), ("batch",))
    assert adopt_mesh(jax.make_mesh((2, 2), ("model", "x"))).shape == {
        "data": 2,
        "fsdp": 1,
        "model": 2,
    }
    found = aatjax.fit(model, source, mesh=mesh, **settings)
    assert_close(surgery.arrays(found.model), expected, 2e-5)
    with jax.set_mesh(mesh):
        found = aatjax.fit(model, source, mesh=mesh, **settings)
        scores = aatjax.evaluate(found.model, source)
    assert_close(surgery.arrays(found.model), expected, 2e-5)
    assert scores.accuracy == aatjax.evaluate(found.model, source).accuracy
