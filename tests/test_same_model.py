"""A saved adapter is exactly the model that was saved: merged, edited, stacked, of one's own."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import pytest
from adapter_files import CLASSES, FRONTEND, inputs, save, trained, write_base
from flax import nnx
from safetensors import safe_open

import aatjax
from aatjax import petl, surgery
from aatjax.cli import main
from aatjax.errors import DataError, UsageError
from aatjax.models.ast import Mlp
from aatjax.models.tokens import call_masked
from aatjax.train.adapter_file import save_adapter


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "base.safetensors")


def disturb(model, seed: int = 1):
    """Move what is trained away from where it started."""
    rng = np.random.default_rng(seed)
    for variable in surgery.variables(model).values():
        if isinstance(variable, nnx.Param):
            variable[...] = variable[...] + 0.3 * rng.normal(size=variable.shape)
    return model


def read_names(path: Path) -> set[str]:
    with safe_open(path, "np") as file:
        return set(file.keys())


def assert_comes_back(model, path: Path) -> set[str]:
    """Save and load; return the names of the stored tensors."""
    found = aatjax.load_adapter(save(path, model))
    np.testing.assert_array_equal(found.model(inputs()), model(inputs()))
    assert found.model.method == model.method
    again = aatjax.load_adapter(save(path, found.model))
    np.testing.assert_array_equal(again.model(inputs()), model(inputs()))
    return read_names(path)


def test_an_adapter_on_a_merged_backbone_brings_the_merged_matrices(base, tmp_path):
    merged = aatjax.merge(trained(base, petl.LoRA(rank=2)))
    model = disturb(aatjax.adapt(merged, petl.SoftMoA(width=2)))
    assert np.abs(model(inputs()) - trained(base, petl.SoftMoA(width=2))(inputs())).max() > 0.01
    names = assert_comes_back(model, tmp_path / "a.safetensors")
    kernels = {name for name in names if name.endswith(("attn/q/kernel", "attn/v/kernel"))}
    assert len(kernels) == 4
    assert not any("attn/k/" in name or "mlp/up" in name for name in names)


@pytest.mark.parametrize("path", ["blocks/0/mlp/up/kernel", "embed/pos", "norm/bias"])
def test_an_edited_backbone_comes_back(path, base, tmp_path):
    plain = aatjax.load(base, num_classes=3)
    value = surgery.arrays(plain)[path]
    surgery.assign(plain, {path: np.asarray(value) + 1}, what="the test")
    model = disturb(aatjax.adapt(plain, petl.AAT()))
    assert path in assert_comes_back(model, tmp_path / "a.safetensors")
    after = trained(base, petl.AAT())
    surgery.assign(after, {path: np.asarray(value) + 1}, what="the test")
    assert path in assert_comes_back(after, tmp_path / "b.safetensors")


def test_a_file_of_an_untouched_backbone_holds_what_is_trained_alone(base, tmp_path):
    for method in (petl.AAT(), petl.Adapter(as_published=True), petl.SoftMoA(as_published=True)):
        model = trained(base, method)
        names = assert_comes_back(model, tmp_path / "a.safetensors")
        assert names == set(surgery.arrays(model, nnx.Param))


def test_an_adapter_on_an_adapted_model_comes_back_with_the_first(base, tmp_path):
    first = trained(base, petl.AAT())
    model = aatjax.adapt(first, petl.SoftMoA(width=2))
    np.testing.assert_allclose(model(inputs()), first(inputs()), atol=1e-5)
    assert model.method == petl.Stacked((petl.AAT(), petl.SoftMoA(width=2)))
    kinds = surgery.variables(model)
    assert isinstance(kinds["blocks/0/mlp/mlp_adapter/w_up"], surgery.Frozen)
    assert isinstance(kinds["blocks/0/attn/soft_moa/w_up"], nnx.Param)
    disturb(model)
    names = assert_comes_back(model, tmp_path / "a.safetensors")
    assert {"blocks/0/mlp/mlp_adapter/w_up", "blocks/0/attn/soft_moa/w_up"} <= names
    third = disturb(aatjax.adapt(model, petl.LoRA(rank=2)))
    assert third.method.methods == (*model.method.methods, petl.LoRA(rank=2))
    assert_comes_back(third, tmp_path / "b.safetensors")


def test_two_adapters_of_one_kind_need_two_tags(base, tmp_path):
    with pytest.raises(UsageError, match=r"blocks/0/mlp/adapter/w_down.*by tag="):
        aatjax.adapt(trained(base, petl.Adapter()), petl.Adapter())


class Shrunk(nnx.Module):
    def __init__(self, base):
        self.base = base

    def __call__(self, x, mask=None):
        return 0.5 * call_masked(self.base, x, mask)


def replace_mlp(model):
    model.blocks[1].mlp = Shrunk(model.blocks[1].mlp)


def add_parameter(model):
    model.blocks[0].extra = nnx.Param(jnp.ones(3))


def set_attribute(model):
    model.blocks[0].attn.base.heads = 4


def unfreeze(model):
    surgery.unfreeze(model, "embed/pos")


class Relu(Mlp):
    def __call__(self, x, mask=None):
        return self.down(jnp.maximum(self.up(x), 0))


def replace_activation(model):
    model.blocks[0].mlp.__class__ = Relu


CHANGES = [
    (replace_mlp, "blocks/1/mlp is a Shrunk, not Mlp"),
    (add_parameter, "blocks/0/extra was added"),
    (set_attribute, "blocks/0/attn/base.heads is 4, not 2"),
    (unfreeze, "embed/pos is trained, not frozen"),
    (replace_activation, "blocks/0/mlp is a Relu, not Mlp"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=lambda x: getattr(x, "__name__", ""))
def test_a_model_that_was_changed_by_hand_is_refused_when_it_is_saved(
    change, message, base, tmp_path
):
    model = trained(base, petl.SoftMoA(width=2, location="mhsa"))
    change(model)
    with pytest.raises(UsageError, match=message):
        save(tmp_path / "a.safetensors", model)
    assert not list(tmp_path.iterdir())


def test_classes_and_a_front_end_that_do_not_fit_are_refused(base, tmp_path):
    model, path = trained(base, petl.AAT()), tmp_path / "a.safetensors"
    given = {"classes": CLASSES, "multi_label": True, "frontend": FRONTEND}
    with pytest.raises(UsageError, match="2 classes, the model's head 3"):
        save_adapter(path, model, **{**given, "classes": CLASSES[:2]})
    other = dataclasses.replace(FRONTEND, frames=50)
    with pytest.raises(UsageError, match=r"makes 50 frames .* takes 39"):
        save_adapter(path, model, **{**given, "frontend": other})
    assert not path.exists()


def test_a_base_that_was_changed_is_no_base(base, tmp_path):
    path = save(tmp_path / "a.safetensors", trained(base, petl.AAT()))
    given = aatjax.load(base, num_classes=3)
    assert aatjax.load_adapter(path, base=given).classes == CLASSES
    with pytest.raises(DataError, match="the given base is adapted"):
        aatjax.load_adapter(path, base=trained(base, petl.LoRA()))
    merged = aatjax.merge(trained(base, petl.LoRA()))
    with pytest.raises(DataError, match="was changed, first in blocks/0/attn/q/kernel"):
        aatjax.load_adapter(path, base=merged)


def test_adapters_on_different_arrays_are_not_averaged(base, tmp_path):
    plain = trained(base, petl.AAT())
    edited = trained(base, petl.AAT())
    value = surgery.arrays(plain)["embed/pos"]
    surgery.assign(edited, {"embed/pos": np.asarray(value) + 1}, what="the test")
    one, other = (
        aatjax.load_adapter(save(tmp_path / f"{name}.safetensors", model))
        for name, model in (("one", plain), ("other", edited))
    )
    with pytest.raises(UsageError, match="different weights, first in embed/pos"):
        aatjax.average([one, other])


# ------------------------------------------------------------------ methods of one's own


@dataclasses.dataclass(frozen=True)
class Scaled(petl.Method):
    """A method whose code can change behind the back of a file."""

    name: ClassVar[str] = "scaled_of_the_test"
    FACTOR: ClassVar[float] = 1.0

    inner: petl.Method = petl.LoRA(rank=2)
    many: tuple[petl.Method, ...] = ()

    def inject(self, model, *, rngs):
        self.inner.inject(model, rngs=rngs)
        model.embed.cls[...] = model.embed.cls[...] * self.FACTOR


def test_a_method_may_hold_methods(base, tmp_path):
    method = Scaled(petl.LoRA(rank=3), many=(petl.AAT(), petl.SoftMoA()))
    assert_comes_back(trained(base, method), tmp_path / "a.safetensors")


def test_the_golden_sample_finds_that_the_code_of_a_method_changed(base, tmp_path, monkeypatch):
    path = save(tmp_path / "a.safetensors", trained(base, Scaled()))
    monkeypatch.setattr(Scaled, "FACTOR", -60.0)
    with pytest.raises(DataError, match="does not compute what it did when it was saved"):
        aatjax.load_adapter(path)
    assert aatjax.load_adapter(path, check=False).classes == CLASSES


def test_a_subclass_without_a_name_of_its_own_is_refused_before_training(base):
    @dataclasses.dataclass(frozen=True)
    class Loud(petl.SoftMoA):
        pass

    with pytest.raises(UsageError, match=r'Loud has the name of .*SoftMoA.*ClassVar.* = "loud"'):
        aatjax.adapt(aatjax.load(base, num_classes=3), Loud())

    @dataclasses.dataclass(frozen=True)
    class Nameless(petl.Method):
        pass

    with pytest.raises(UsageError, match="Nameless has no name"):
        aatjax.adapt(aatjax.load(base, num_classes=3), Nameless())


def test_a_field_that_cannot_be_saved_is_refused_before_training(base):
    for value in (np.float32(0.5), {"a": 1}, [1, 2]):
        with pytest.raises(UsageError, match=r"cannot be saved|would come back"):
            aatjax.adapt(aatjax.load(base, num_classes=3), Scaled(many=value))


def test_the_cell_of_a_notebook_may_run_again():
    def define():
        @dataclasses.dataclass(frozen=True)
        class Again(petl.Method):
            name: ClassVar[str] = "again_of_the_test"

        return Again

    first, second = define(), define()
    assert first is not second and petl.find_method("again_of_the_test") is second


MODULE = """
import dataclasses
from typing import ClassVar
from aatjax import petl

@dataclasses.dataclass(frozen=True)
class Quiet(petl.Linear):
    name: ClassVar[str] = "quiet"
"""


def test_whoever_lacks_a_method_is_told_what_to_import(base, tmp_path, monkeypatch):
    (tmp_path / "quiet_methods.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    import quiet_methods  # pyright: ignore[reportMissingImports]

    path = save(tmp_path / "a.safetensors", trained(base, quiet_methods.Quiet()))
    code = f"import aatjax; aatjax.load_adapter({str(path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    expected = "method 'quiet' is the class Quiet of quiet_methods: import quiet_methods first"
    assert expected in done.stderr


def test_the_command_line_imports_a_method_of_ones_own(base, tmp_path, monkeypatch, capsys):
    (tmp_path / "own_methods.py").write_text(MODULE.replace("uiet", "uick"))
    main.run(["--import", str(tmp_path / "own_methods.py"), "summary", "--method", "quick"])
    assert "trainable share" in capsys.readouterr().out
    assert main.run(["--import", str(tmp_path / "absent.py"), "summary"]) == 2
    assert "--import" in capsys.readouterr().err
