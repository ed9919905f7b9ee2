"""Paths, wrapping, freezing, splitting, assigning; in NNX's graph mode and in its tree mode."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aatjax import surgery
from aatjax.errors import UsageError
from aatjax.models.ast import AST, ASTConfig
from aatjax.models.summary import summary
from aatjax.petl.base import After, Parallel

CONFIG = ASTConfig(dim=8, depth=2, heads=2, mlp_dim=12, mels=26, frames=36, num_classes=3)
BLOCK = [
    *("ln1/scale", "ln1/bias"),
    *(f"attn/{name}/{part}" for name in ("q", "k", "v", "out") for part in ("kernel", "bias")),
    *("ln2/scale", "ln2/bias"),
    *(f"mlp/{name}/{part}" for name in ("up", "down") for part in ("kernel", "bias")),
]
PATHS = [
    *("embed/proj/kernel", "embed/proj/bias", "embed/cls", "embed/dist", "embed/pos"),
    *(f"blocks/{index}/{path}" for index in range(2) for path in BLOCK),
    *("norm/scale", "norm/bias"),
    *("head/norm/scale", "head/norm/bias", "head/linear/kernel", "head/linear/bias"),
]


class Gain(nnx.Module):
    """An adapter of one number that also counts its calls, as batch statistics are kept."""

    def __init__(self, value: float = 0.5):
        self.gain = nnx.Param(jnp.full((1, 1, 1), value))
        self.calls = nnx.BatchStat(jnp.zeros(()))

    def __call__(self, x):
        self.calls[...] = self.calls[...] + 1
        return x * self.gain[...]


def ast(seed: int = 0) -> AST:
    model = AST(CONFIG, rngs=nnx.Rngs(seed))
    surgery.freeze(model)
    return model


def parallel(name: str = "gain", value: float = 0.5):
    return lambda _, base: Parallel(base, name, Gain(value))


def clip() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, 36, 26)), jnp.float32)


def kinds(model) -> dict[str, type]:
    return {path: type(variable) for path, variable in surgery.variables(model).items()}


def test_every_parameter_has_its_path():
    assert sorted(surgery.variables(ast())) == sorted(PATHS)


def test_bytes_are_four_a_parameter():
    model = AST(CONFIG, rngs=nnx.Rngs(0))
    assert surgery.count_bytes(model) == 4 * summary(model).total


def test_modules_are_found_by_path_and_lists_by_number():
    model = ast()
    found = surgery.modules(model)
    assert found[""] is model
    assert found["blocks/1/attn/q"] is model.blocks[1].attn.q
    assert "blocks/2" not in found


def test_wrap_replaces_what_matches_and_nothing_else():
    model = ast()
    before = surgery.modules(model)
    paths = surgery.wrap(model, "blocks/*/mlp", parallel())
    assert paths == ["blocks/0/mlp", "blocks/1/mlp"]
    after = surgery.modules(model)
    for path, module in before.items():
        if path in paths:
            assert isinstance(after[path], Parallel)
            assert after[path].base is module
        else:
            assert after[path] is module, path
    added = set(surgery.variables(model)) - set(PATHS)
    assert added == {f"{path}/gain/{name}" for path in paths for name in ("gain", "calls")}
    assert set(PATHS) <= set(surgery.variables(model)), "the wrapped keep their names"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("blocks/1/mlp", ["blocks/1/mlp"]),
        ("blocks/[01]/attn/[qv]", [f"blocks/{i}/attn/{n}" for i in (0, 1) for n in "qv"]),
        ("blocks/?", ["blocks/0", "blocks/1"]),
        ("norm", ["norm"]),
        ("blocks/1/**", [f"blocks/1/{n}" for n in ("ln1", "attn", "ln2", "mlp")]),
    ],
)
def test_wrap_globs_over_whole_segments(pattern, expected):
    model = ast()
    paths = surgery.wrap(model, pattern, parallel())
    if pattern.endswith("**"):
        assert set(expected) < set(paths)
        assert all(path.startswith("blocks/1/") for path in paths)
    else:
        assert paths == expected
    added = {p for p in surgery.variables(model) if p.endswith("gain/gain")}
    assert added == {f"{path}/gain/gain" for path in paths}


@pytest.mark.parametrize("pattern", ["blocks/*", "norm", "blocks/*/attn/out"])
def test_a_wrapped_module_computes_what_its_wrapper_computes(pattern):
    """A zero gain changes nothing; wrapping twice, inside or outside, still reaches the base."""
    model, x = ast(), clip()
    if pattern == "norm":
        surgery.wrap(model, pattern, lambda _, base: After(base, "gain", Gain(0.0)))
    else:
        surgery.wrap(model, pattern, parallel(value=0.0))
        if pattern == "blocks/*":
            surgery.wrap(model, "blocks/*/mlp", parallel(value=0.0))
            surgery.wrap(model, "blocks/*/attn/q", lambda _, base: After(base, "g", Gain(0.0)))
    np.testing.assert_allclose(model(x), ast()(x), rtol=1e-6)  # a zero added may be fused in


def test_wrap_without_a_match_names_the_modules_folded():
    model = ast()
    with pytest.raises(UsageError, match="'blocks/\\*/ffn' matches no module") as info:
        surgery.wrap(model, "blocks/*/ffn", parallel())
    message = str(info.value)
    assert "blocks/*/mlp/up" in message
    assert "blocks/0" not in message
    assert "\n" not in message
    with pytest.raises(UsageError, match="matches no module"):
        surgery.wrap(model, "blocks/*/mlp/up/kernel", parallel())
    assert sorted(surgery.variables(model)) == sorted(PATHS)


def test_two_wraps_with_two_names_keep_every_path_unique():
    model = ast()
    surgery.wrap(model, "blocks/*/mlp", parallel("first", 2.0))
    surgery.wrap(model, "blocks/*/mlp", parallel("second", 3.0))
    found = surgery.variables(model)
    assert len(found) == len(PATHS) + 8
    assert found["blocks/0/mlp/first/gain"][...].item() == 2.0
    assert found["blocks/0/mlp/second/gain"][...].item() == 3.0
    x = jnp.ones((1, 2, 8))
    plain = ast().blocks[0].mlp(x)
    np.testing.assert_allclose(model.blocks[0].mlp(x), plain + 2 * x + 3 * x, rtol=1e-6)
    surgery.wrap(model, "blocks/*/mlp/up", parallel("third"))
    assert "blocks/1/mlp/up/third/gain" in surgery.variables(model)
    assert "blocks/1/mlp/up/kernel" in surgery.variables(model)


def test_two_wraps_with_one_name_are_refused():
    model = ast()
    surgery.wrap(model, "blocks/*/mlp", parallel("gain"))
    surgery.wrap(model, "blocks/1/mlp", parallel("gain"))
    with pytest.raises(UsageError, match=r"blocks/1/mlp/gain/gain: a wrapper's .* another name"):
        surgery.variables(model)
    with pytest.raises(UsageError, match="two parameters"):
        summary(model)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("norm/*", ["norm/bias", "norm/scale"]),
        ("head/**", [p for p in PATHS if p.startswith("head/")]),
        ("blocks/*/ln?/*", [p for p in PATHS if "/ln" in p]),
        ("blocks/1/**", [p for p in PATHS if p.startswith("blocks/1/")]),
        ("embed/pos", ["embed/pos"]),
        ("**", PATHS),
    ],
)
def test_unfreeze_changes_the_type_of_what_matches_and_no_value(pattern, expected):
    model = ast()
    before = surgery.arrays(model)
    matched = surgery.unfreeze(model, pattern)
    assert sorted(matched) == sorted(expected)
    assert {p for p, kind in kinds(model).items() if kind is nnx.Param} == set(expected)
    after = surgery.arrays(model)
    assert set(after) == set(before)
    for path, value in before.items():
        np.testing.assert_array_equal(after[path], value, err_msg=path)


def test_unfreeze_reaches_through_wrappers_and_can_freeze_again():
    model = ast()
    surgery.wrap(model, "blocks/*/attn", parallel())
    matched = surgery.unfreeze(model, "blocks/*/attn/q/*")
    assert sorted(matched) == [f"blocks/{i}/attn/q/{p}" for i in (0, 1) for p in ("bias", "kernel")]
    surgery.freeze(model)
    assert nnx.Param not in kinds(model).values()
    assert kinds(model)["blocks/0/attn/gain/calls"] is surgery.FrozenStat
    surgery.unfreeze(model, "blocks/0/attn/gain/*")
    assert kinds(model)["blocks/0/attn/gain/calls"] is nnx.BatchStat, "statistics are no parameters"


def test_unfreeze_without_a_match_names_the_parameters_folded():
    model = ast()
    with pytest.raises(UsageError, match="'blocks/\\*/norm/scale' matches no parameter") as info:
        surgery.unfreeze(model, "blocks/*/norm/scale")
    assert "blocks/*/ln1/scale" in str(info.value)
    assert "\n" not in str(info.value)
    with pytest.raises(UsageError, match="matches no parameter"):
        surgery.unfreeze(model, "head")
    assert nnx.Param not in kinds(model).values()


def adapted() -> AST:
    model = ast()
    surgery.wrap(model, "blocks/*/mlp", parallel())
    surgery.unfreeze(model, "head/**")
    return model


def groups(model) -> dict[str, set[str]]:
    """Paths of each group, by the type of the variable."""
    found = {"trainable": set(), "stats": set(), "frozen": set()}
    for path, kind in kinds(model).items():
        group = {nnx.Param: "trainable", nnx.BatchStat: "stats"}.get(kind, "frozen")
        found[group].add(path)
    return found


def canonical(state) -> set[str]:
    """Paths of a group of `split`, with `base` left out."""
    flat = nnx.to_flat_state(state)
    return {"/".join(str(part) for part in path if part != "base") for path, _ in flat}


def test_split_makes_three_groups_that_share_nothing_and_miss_nothing():
    model = adapted()
    expected = groups(model)
    assert {len(paths) for paths in expected.values()} == {4 + 2, 2, len(PATHS) - 4}
    parts = surgery.split(model)
    assert canonical(parts.trainable) == expected["trainable"]
    assert canonical(parts.stats) == expected["stats"]
    assert canonical(parts.frozen) == expected["frozen"]


def test_join_rebuilds_the_model_and_does_not_change_the_states():
    model, x = adapted(), clip()
    parts = surgery.split(model)
    again = surgery.join(parts.graphdef, parts.trainable, parts.stats, parts.frozen)
    np.testing.assert_array_equal(again(x), adapted()(x))
    assert again.blocks[0].mlp.gain.calls[...].item() == 1
    assert model.blocks[0].mlp.gain.calls[...].item() == 0
    assert [leaf.item() for leaf in jax.tree.leaves(parts.stats)] == [0, 0]


def test_a_gradient_has_the_trainable_leaves_and_statistics_come_back():
    model, x = adapted(), clip()
    parts = surgery.split(model)

    @jax.jit
    def slope(trainable, stats, frozen):
        def loss(trainable, stats):
            again = surgery.join(parts.graphdef, trainable, stats, frozen)
            return again(x).sum(), surgery.split(again).stats

        return jax.grad(loss, has_aux=True)(trainable, stats)

    gradient, stats = slope(parts.trainable, parts.stats, parts.frozen)
    assert jax.tree.structure(gradient) == jax.tree.structure(parts.trainable)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient))
    assert [leaf.item() for leaf in jax.tree.leaves(stats)] == [1, 1]


def test_a_clone_is_independent_and_shares_the_arrays():
    model = adapted()
    copy = surgery.clone(model)
    assert surgery.variables(copy)["norm/scale"] is not surgery.variables(model)["norm/scale"]
    for path, value in surgery.arrays(model).items():
        pointers = (v.unsafe_buffer_pointer() for v in (value, surgery.arrays(copy)[path]))
        assert len(set(pointers)) == 1, path
    surgery.unfreeze(copy, "**")
    surgery.wrap(copy, "norm", parallel())
    surgery.assign(copy, {"embed/pos": np.ones((1, 8, 8))}, what="the test")
    assert kinds(model) == kinds(adapted())
    for path, value in surgery.arrays(adapted()).items():
        np.testing.assert_array_equal(surgery.arrays(model)[path], value, err_msg=path)


def test_assign_sets_what_is_given_in_the_type_of_the_model():
    model = ast()
    before = surgery.arrays(model)
    value = np.arange(64, dtype=np.float64).reshape(8, 8)
    surgery.assign(model, {"blocks/1/attn/q/kernel": value}, what="the test")
    after = surgery.arrays(model)
    assert after["blocks/1/attn/q/kernel"].dtype == jnp.float32
    np.testing.assert_array_equal(after.pop("blocks/1/attn/q/kernel"), value)
    for path, kept in after.items():
        np.testing.assert_array_equal(kept, before[path], err_msg=path)


def test_assign_reaches_wrapped_modules_and_keeps_the_type():
    model = adapted()
    paths = ["blocks/0/mlp/up/bias", "blocks/0/mlp/gain/gain"]
    old = kinds(model)
    surgery.assign(model, {paths[0]: np.ones(12), paths[1]: np.ones((1, 1, 1))}, what="the test")
    assert kinds(model) == old
    assert all((surgery.arrays(model)[path] == 1).all() for path in paths)


def test_assign_fills_an_abstract_model():
    values = surgery.arrays(ast(seed=5))
    model = nnx.eval_shape(ast)
    surgery.assign(model, values, what="the test", complete=True)
    np.testing.assert_array_equal(model(clip()), ast(seed=5)(clip()))


def test_assign_names_every_problem_at_once_and_changes_nothing():
    model = ast()
    before = surgery.arrays(model)
    values = {path: np.zeros(value.shape) for path, value in before.items()}
    del values["norm/bias"], values["embed/cls"]
    values |= {
        "norm/scale": np.zeros(9),
        "blocks/9/ln1/bias": np.zeros(8),
        "embed/pos": np.ones(()),
    }
    with pytest.raises(UsageError, match=r"^file\.pth does not fit the model") as info:
        surgery.assign(model, values, what="file.pth", complete=True)
    message = str(info.value)
    for problem in (
        "blocks/9/ln1/bias is not in the model",
        "embed/cls is missing",
        "norm/bias is missing",
        "norm/scale has shape [9], the model [8]",
        "embed/pos has shape [], the model [1, 8, 8]",
    ):
        assert problem in message
    assert "\n" not in message
    for path, value in before.items():
        np.testing.assert_array_equal(surgery.arrays(model)[path], value, err_msg=path)


def test_assign_shows_some_problems_and_counts_the_others():
    with pytest.raises(UsageError, match=r"; and 5 more$") as info:
        surgery.assign(ast(), {f"x{index:02d}": 0 for index in range(13)}, what="the test")
    assert str(info.value).count("is not in the model") == 8


def test_the_summary_counts_by_type_and_folds_the_blocks():
    counted = summary(adapted())
    sizes = {path: value.size for path, value in surgery.arrays(ast()).items()}
    head = sum(size for path, size in sizes.items() if path.startswith("head/"))
    assert counted.trainable == head + 2
    assert counted.total == sum(sizes.values()) + 2, "statistics are no parameters"
    rows = {row.path: row for row in counted.rows}
    assert rows["blocks/*/mlp/gain"].trainable == 2
    mlp = sum(size for path, size in sizes.items() if "/mlp/" in path)
    assert (rows["blocks/*/mlp"].trainable, rows["blocks/*/mlp"].frozen) == (0, mlp)
    assert sum(row.trainable for row in counted.rows) == counted.trainable
    assert sum(row.frozen for row in counted.rows) == counted.frozen
    lines = str(counted).splitlines()
    assert lines[-2].split() == ["total", f"{counted.trainable:,}", f"{counted.frozen:,}"]
    assert lines[-1] == f"trainable share: {100 * counted.trainable / counted.total:.2f}%"


def test_the_summary_takes_a_parameter_that_lies_on_a_block():
    class Prefixed(nnx.Module):
        def __init__(self, base: nnx.Module):
            self.base = base
            self.prefix = nnx.Param(jnp.zeros((1, 3, 8)))

    model = ast()
    surgery.wrap(model, "blocks/*", lambda _, base: Prefixed(base))
    rows = {row.path: row.trainable for row in summary(model).rows}
    assert rows["blocks/*"] == 2 * 3 * 8


@pytest.mark.slow
@pytest.mark.skipif("NNX_GRAPH_MODE" in os.environ, reason="this is the run in tree mode")
def test_all_of_this_holds_in_tree_mode():
    """NNX is to drop graph semantics by default; nothing here may depend on them."""
    chosen = ["-k", "split or join or gradient or clone or wrap or freeze or assign"]
    environment = {**os.environ, "NNX_GRAPH_MODE": "false", "NNX_GRAPH_UPDATES": "false"}
    here = Path(__file__)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", str(here), *chosen],
        env=environment,
        cwd=here.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


def test_the_mode_is_the_one_that_was_asked_for():
    """The variables that select tree mode must have an effect."""
    from flax.configurations import config

    asked = os.environ.get("NNX_GRAPH_MODE", "true") == "true"
    assert config.nnx_graph_mode is asked
    assert config.nnx_graph_updates is asked
