"""The base of all adaptation methods, and what places a method on a model."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import jax
import numpy as np
from flax import nnx

from aatjax import surgery
from aatjax.errors import UsageError, check_fields, suggest
from aatjax.io.json_fields import check_json_fields, shorten
from aatjax.models.ast import AST, check_model
from aatjax.models.tokens import (
    FirstTokens,
    Mask,
    Tokens,
    call_first,
    call_masked,
    cut_mask,
    is_per_token,
)
from aatjax.petl.sizes import BASE_WIDTH, SIZES, find_sizes

Monitor = Callable[[Any, Any, Any, jax.Array, jax.Array], dict[str, jax.Array]]
"""(trainable, stats, frozen, normalised log-mel, valid frames) -> numbers by name."""

METHODS: dict[str, type["Method"]] = {}
"""Every method class by its `name`."""
AnyMethod = TypeVar("AnyMethod", bound="Method")

MOST_LETTERS = 1000  # of the names of a method and its class
MOST = 2**16
MOST_OF: dict[str, float] = {"budget": 1e9, "methods": 64}
"""The largest number, and the longest list or text, in a field that is read from JSON."""


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to adapt a frozen AST.

    A subclass is a frozen dataclass. It sets `name`, under which it is registered, has its
    hyper-parameters as fields (plain values or tuples of them, so that a method can be compared,
    hashed and written as JSON; see `aatjax.errors.check_fields` for their ranges), and implements
    `inject` by two operations: `surgery.wrap` puts a module around a submodule, `surgery.unfreeze`
    trains parameters of the backbone. Whatever `nnx.Param` it adds is trained. So is the head, and
    the last LayerNorm before the classifier: the head's own if it has one, else the final LayerNorm
    of the body.

    Where published code differs from its paper, the default is the paper's form, and
    `as_published=True` is what the code computes and where it starts, the head included
    (`aatjax.petl.published_start`); the docstring of the method says how they differ.
    """

    tag: str = dataclasses.field(default="", kw_only=True)
    """Tells several adapters of one kind on one model apart; part of their parameters' paths."""

    name: ClassVar[str] = ""
    trains_last_norm: ClassVar[bool] = True
    closed_form: ClassVar[bool] = False
    """Whether the head is all that is fitted, without gradients (`aatjax.train.head_start`)."""
    default_size: ClassVar[tuple[str, float]] = ("reduction", 64)
    """Of methods with a bottleneck: the size where none is given; see `petl.sizes.find_widths`."""
    rates: ClassVar[tuple[float, float]] = (5e-3, 5e-3)
    """Learning rates where none is given: on AST-base (arXiv 2312.03694), on narrower models."""

    def choose_rate(self, dim: int) -> float:
        """Return the learning rate for a model of token width `dim` where none is given."""
        return self.rates[dim < BASE_WIDTH]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            return
        owner = METHODS.setdefault(cls.name, cls)
        if (owner.__module__, owner.__qualname__) != (cls.__module__, cls.__qualname__):
            raise UsageError(
                f"the method name {cls.name!r} belongs to {owner.__module__}.{owner.__qualname__}: "
                f"give {cls.__module__}.{cls.__qualname__} another name"
            )
        METHODS[cls.name] = cls

    def __post_init__(self) -> None:
        check_fields(self)
        find_sizes(self)

    def label(self, name: str) -> str:
        """Return the name under which an adapter is held, with the method's tag."""
        return f"{name}_{self.tag}" if self.tag else name

    def inject(self, model: AST, *, rngs: nnx.Rngs) -> None:
        """Add this method's modules and mark its parameters, in place."""
        raise NotImplementedError(f"{type(self).__name__} does not implement inject")

    def monitor(self, model: AST) -> Monitor | None:
        """Return a function of numbers that training records after each epoch, if any."""
        return None

    def to_json(self) -> dict[str, Any]:
        """Return the method's name, its class and its fields as a plain dictionary.

        A class of aatjax is found by its name alone, so that it may move to another module.
        """
        cls = type(self)
        home = {} if cls.__module__.startswith("aatjax.") else {"class": _name_class(cls)}
        fields = {f.name: _write_field(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {"name": self.name, **home, **fields}

    @staticmethod
    def from_json(fields: dict[str, Any]) -> "Method":
        """Rebuild a method from `to_json`, also that of an older version.

        Raises:
            UsageError: unknown method or field, or a value of the wrong type or size.
        """
        name, home = fields.get("name", ""), fields.get("class")
        for part in (name, home or ""):
            if not isinstance(part, str) or len(part) > MOST_LETTERS:
                raise UsageError(f"method {shorten(name)} of class {shorten(home)} is no name")
        cls = find_method(name, home)
        upgraded = upgrade_fields(fields)
        values = {key: value for key, value in upgraded.items() if key not in ("name", "class")}
        check_json_fields("petl", values, cls, most=dict.fromkeys(values, MOST) | MOST_OF)
        return cls(**{key: _read_field(value) for key, value in values.items()})

    def replace(self: AnyMethod, **changes: Any) -> AnyMethod:
        """Return a copy with some fields changed; a new size replaces the one that was given."""
        if any(name in changes for name in SIZES):
            changes = {**dict.fromkeys(find_sizes(self)), **changes}
        return dataclasses.replace(self, **changes)


def _name_class(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _write_field(value: Any) -> Any:
    if isinstance(value, Method):
        return value.to_json()
    return [_write_field(item) for item in value] if isinstance(value, tuple | list) else value


def _read_field(value: Any) -> Any:
    """Return a field's value from its JSON, in which tuples are lists and methods are objects."""
    if isinstance(value, dict):
        return Method.from_json(value)
    return tuple(map(_read_field, value)) if isinstance(value, list) else value


def find_method(name: str, home: str | None = None) -> type[Method]:
    """Return the method class of a name such as `soft_moa`.

    Args:
        name: the registered name.
        home: module and name of the class with which a file was written, if it is not of aatjax.

    Raises:
        UsageError: no such method; the message suggests the nearest name, or what to import.
    """
    if name in METHODS:
        return METHODS[name]
    if home is not None:
        module, _, cls = home.rpartition(".")
        where = f"import {module}"
        if module == "__main__":
            where = "run the script or notebook cell that defines it"
        raise UsageError(
            f"method {name!r} is the class {cls} of {module}: {where} first (on the command line: "
            "aatjax --import FILE COMMAND)"
        )
    known = ", ".join(sorted(METHODS))
    raise UsageError(
        f"unknown method {name!r}{suggest(name, METHODS)} (there are {known}; import the module of "
        "a method of your own first, on the command line by aatjax --import FILE COMMAND)"
    )


def check_method(method: object) -> None:
    """Refuse what is no method, and a method that a saved adapter would not bring back.

    Raises:
        UsageError: it is no method; its class has no name of its own; or a field is not written
            as JSON.
    """
    if not isinstance(method, Method):
        cls = METHODS.get(method) if isinstance(method, str) else method
        name = cls.__name__ if isinstance(cls, type) and issubclass(cls, Method) else "SoftMoA"
        raise UsageError(
            f"adapt takes a method, not {method!r}: pass petl.{name}(), or petl.make_method(NAME) "
            "for a name on the command line"
        )
    cls, owner = type(method), METHODS.get(method.name)
    if owner is None or _name_class(owner) != _name_class(cls):
        what = "has no name" if owner is None else f"has the name of {_name_class(owner)}"
        raise UsageError(
            f"the method {cls.__name__} {what}, so a saved adapter would come back as another "
            f'method: give it one of its own, name: ClassVar[str] = "{cls.__name__.lower()}"'
        )
    try:
        hash(method)
        again = Method.from_json(json.loads(json.dumps(method.to_json())))
    except TypeError as error:
        raise UsageError(
            f"a field of {method!r} cannot be saved: {error}. Write a frozen dataclass "
            "whose fields are numbers, strings, methods, or tuples of them"
        ) from None
    if again != method:
        raise UsageError(
            f"{method!r} would come back from a saved adapter as {again!r}: its fields must be "
            "numbers, strings, methods, or tuples of them"
        )


def _list_fields(fields: dict[str, Any]) -> set[str]:
    cls = find_method(str(fields.get("name")), fields.get("class"))
    return {field.name for field in dataclasses.fields(cls)}


def upgrade_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a method's JSON in today's form.

    Older versions wrote `last_blocks`, a number of blocks of Partial, LoRA's targets as one word,
    and a reduction or ratio always, next to a budget (which had priority) and as the default.
    """
    upgraded = dict(fields)
    if "last_blocks" in upgraded and "last_blocks" not in _list_fields(fields):
        last = upgraded.pop("last_blocks")
        upgraded.setdefault("blocks", None if last is None else f"last{last}")
    if isinstance(upgraded.get("blocks"), int):  # of Partial
        upgraded["blocks"] = f"last{upgraded['blocks']}"
    if isinstance(upgraded.get("targets"), str):
        upgraded["targets"] = list(upgraded["targets"])
    cls = find_method(str(fields.get("name")), fields.get("class"))
    size, default = cls.default_size
    is_old = not {"width", "rank"} & fields.keys()
    if is_old and size in fields and (fields[size] == default or fields.get("budget") is not None):
        upgraded[size] = None
    return upgraded


def pin_sizes(fields: dict[str, Any], dim: int) -> dict[str, Any]:
    """Return a method's JSON with the width that its default had before adapter files of format 2.

    Args:
        fields: the JSON.
        dim: token width of its model. On narrow models the default was a width of 1 and more.
    """
    pinned = dict(fields)
    if isinstance(parts := pinned.get("methods"), list):
        pinned["methods"] = [pin_sizes(p, dim) if isinstance(p, dict) else p for p in parts]
    cls = find_method(str(fields.get("name")), fields.get("class"))
    size, default = cls.default_size
    names = [field.name for field in dataclasses.fields(cls) if field.name in SIZES]
    given = {name: fields[name] for name in names if fields.get(name) is not None}
    if names and size == "reduction" and given in ({}, {size: default}):
        name = "rank" if "rank" in names else "width"
        pinned |= {size: None, name: max(1, round(dim / default))}
    return pinned


def adapt(model: AST, method: Method, *, seed: int = 0) -> AST:
    """Return a copy of a model with a method's modules added and its parameters trainable.

    Args:
        model: an AST; not changed. If it is adapted already, its adapters and its head are kept,
            frozen, and the method comes on top (`petl.Stacked`).
        method: what to add and train, such as `petl.SoftMoA()`.
        seed: seed of the new modules' initial weights.

    Returns:
        A new AST that shares the frozen arrays with `model`, in evaluation mode.

    Raises:
        UsageError: `method` is no method, or could not be saved (see `check_method`); or it adds
            parameters under the names of those of an earlier adapter.
    """
    check_model(model, "adapt")
    check_method(method)
    adapted = surgery.clone(model)
    surgery.freeze(adapted)
    before = surgery.arrays(adapted)
    method.inject(adapted, rngs=nnx.Rngs(seed))
    surgery.cast_doubles(adapted)
    if adapted.loaded is not None:
        # What the method itself changes, such as positions that it sets to zero, comes back.
        arrays = surgery.arrays(adapted, surgery.Frozen)
        changed = [path for path in before.keys() & arrays if arrays[path] is not before[path]]
        fetched = {path: np.asarray(arrays[path]) for path in changed}
        adapted.loaded = adapted.loaded.replace(fetched)
    surgery.unfreeze(adapted, "head/**")
    if surgery.variables(adapted.pool):
        surgery.unfreeze(adapted, "pool/**")
    if not adapted.config.head_norm and method.trains_last_norm:
        surgery.unfreeze(adapted, "norm/*")
    adapted.method = method if model.method is None else stack_methods(model.method, method)
    adapted.first_trained = find_first_trained(adapted)
    adapted.eval()
    return adapted


def stack_methods(earlier: Any, method: Method) -> Method:
    """Return what a model with a method has once another is put on top of it."""
    from aatjax.petl.combined import Stacked

    below = earlier.methods if isinstance(earlier, Stacked) else (earlier,)
    above = method.methods if isinstance(method, Stacked) else (method,)
    return Stacked((*below, *above))


def find_first_trained(model: AST) -> int | None:
    """Return the index of the first block with a trained parameter; the depth if none has one.

    None if something before the blocks is trained or was added.
    """
    trained = [
        path.split("/")
        for path, variable in surgery.variables(model).items()
        if isinstance(variable, nnx.Param)
    ]
    if any(top not in ("blocks", "norm", "head", "pool") for top, *_ in trained):
        return None
    numbers = (int(rest[0]) for top, *rest in trained if top == "blocks")
    return min(numbers, default=model.config.depth)


def zero_positions(model: AST) -> None:
    """Set the position embeddings to zero, in place.

    The published parameter-efficient code (arXiv 2312.03694, 2402.00828) loads AST so that the
    positions are zero, and frozen, for every input length but 1024 frames.
    """
    shape = surgery.variables(model)["embed/pos"].shape
    surgery.assign(model, {"embed/pos": np.zeros(shape)}, what="zero positions")


class Wrapper(nnx.Module):
    """A wrapped submodule `base` and an adapter, held as attribute `name`.

    The adapter's parameters have paths below that of the submodule.
    """

    def __init__(self, base: nnx.Module, name: str, adapter: nnx.Module):
        self.base = base
        self.name = name
        setattr(self, name, adapter)

    def is_each_per_token(self) -> bool:
        """Return whether both parts are (`aatjax.models.tokens.is_per_token`)."""
        return is_per_token(self.base) and is_per_token(getattr(self, self.name))

    def apply_adapter(self, x: Tokens, mask: Mask | None, count: int | None = None) -> FirstTokens:
        """Apply the adapter, for the first `count` tokens of the output only."""
        with jax.named_scope("adapter"):
            return call_first(getattr(self, self.name), x, mask, count)


class Parallel(Wrapper):
    """base(x) + adapter(x)."""

    takes_count = True

    @property
    def per_token(self) -> bool:
        """Whether both parts are."""
        return self.is_each_per_token()

    def __call__(
        self, x: Tokens, mask: Mask | None = None, count: int | None = None
    ) -> FirstTokens:
        return call_first(self.base, x, mask, count) + self.apply_adapter(x, mask, count)


class After(Wrapper):
    """z + adapter(z) with z = base(x)."""

    takes_count = True

    @property
    def per_token(self) -> bool:
        """Whether both parts are."""
        return self.is_each_per_token()

    def __call__(
        self, x: Tokens, mask: Mask | None = None, count: int | None = None
    ) -> FirstTokens:
        if count is not None and is_per_token(getattr(self, self.name)):
            z = call_first(self.base, x, mask, count)
            return z + self.apply_adapter(z, cut_mask(mask, count))
        z: jax.Array = call_masked(self.base, x, mask)
        return z[:, :count] + self.apply_adapter(z, mask, count)
