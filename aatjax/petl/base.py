"""What every adaptation method is: a frozen dataclass that injects modules, marks what trains."""

import dataclasses
import difflib
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from aatjax import surgery
from aatjax.errors import UsageError
from aatjax.models.ast import AST
from aatjax.models.tokens import call_masked

Monitor = Callable[[Any, Any, Any, jax.Array, jax.Array], dict[str, jax.Array]]
"""(trainable, stats, frozen, normalised log-mel, sounding frames) -> numbers by name."""

METHODS: dict[str, type["Method"]] = {}


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to adapt a frozen AST.

    A subclass sets `name`, has its hyper-parameters as fields, and implements `inject` with two
    moves: `surgery.wrap` puts a module around a submodule, `surgery.retag` marks parameters as
    Trainable. The head is trained by every method; so is the last LayerNorm before the
    classifier: the head's own where it has one, else the final LayerNorm of the body.
    Defining a subclass with a name of its own registers it under that name. Fields are plain
    values or tuples of such, so that a method can be compared, hashed and written as JSON.

    Where a published repository's code ran something else than its paper says, the method's
    default is the paper's form and `as_published=True` what the code ran; the docstring tells the
    difference.
    """

    name: ClassVar[str] = ""
    trains_last_norm: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if vars(cls).get("name"):
            METHODS[cls.name] = cls

    def inject(self, model: AST, *, rngs: nnx.Rngs) -> None:
        """Adds this method's modules and marks its parameters, in place."""
        raise NotImplementedError(f"{type(self).__name__} does not implement inject")

    def monitor(self, model: AST) -> Monitor | None:
        """Numbers about the adapted model that training writes down after each epoch, if any."""
        return None

    def to_json(self) -> dict[str, Any]:
        """The method's name and fields as a plain dictionary."""
        return {"name": self.name, **dataclasses.asdict(self)}

    @staticmethod
    def from_json(fields: dict[str, Any]) -> "Method":
        """Rebuilds a method from `to_json`; lists, which JSON makes of tuples, become tuples.

        Raises:
            UsageError: unknown method or field.
        """
        cls = find_method(str(fields.get("name")))
        values = {key: cls.read(value) for key, value in fields.items() if key != "name"}
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise UsageError(
                f"method {cls.name} has no field {', '.join(unknown)}: it was made by another "
                f"version; the fields are {', '.join(sorted(known)) or 'none'}"
            )
        return cls(**values)

    @classmethod
    def read(cls, value: Any) -> Any:
        """A field's value from its JSON."""
        return tuple(value) if isinstance(value, list) else value

    def replace(self, **changes: Any) -> "Method":
        """A copy with fields changed."""
        return dataclasses.replace(self, **changes)


def find_method(name: str) -> type[Method]:
    """The method class of a name such as `soft_moa`.

    Raises:
        UsageError: no such method; the message suggests the nearest name.
    """
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name, METHODS, n=1)
    hint = f", did you mean {near[0]!r}?" if near else ""
    raise UsageError(f"unknown method {name!r}{hint} (there are {', '.join(sorted(METHODS))})")


def adapt(model: AST, method: Method, *, seed: int = 0) -> AST:
    """A copy of the model with the method's modules in place and its parameters trainable.

    Args:
        model: an AST whose parameters are all frozen; it is left as it is.
        method: what to add and train.
        seed: seed of the new modules' initial weights.

    Returns:
        A new AST that shares the frozen arrays with `model`.

    Raises:
        UsageError: the model is adapted already.
    """
    if any(isinstance(v, surgery.Trainable) for v in surgery.variables(model).values()):
        raise UsageError("the model is adapted already: adapt the model that aatjax.load returned")
    adapted = surgery.clone(model)
    method.inject(adapted, rngs=nnx.Rngs(seed))
    surgery.retag(adapted, "head/**")
    if not adapted.config.head_norm and method.trains_last_norm:
        surgery.retag(adapted, "norm/*")
    adapted.method = method
    adapted.first_trained = find_first_trained(adapted)
    return adapted


def find_first_trained(model: AST) -> int | None:
    """The number of the first block that has a trained parameter, or the depth if none has one.

    None if something in front of the blocks is trained or was added.
    """
    trained = [
        path.split("/")
        for path, variable in surgery.variables(model).items()
        if isinstance(variable, surgery.Trainable)
    ]
    if any(room not in ("blocks", "norm", "head", "pool") for room, *_ in trained):
        return None
    numbers = (int(rest[0]) for room, *rest in trained if room == "blocks")
    return min(numbers, default=model.config.depth)


def zero_positions(model: AST) -> None:
    """Sets the position embeddings to zero, in place.

    The published parameter-efficient code (arXiv 2312.03694, 2402.00828) loads its AST so that
    every input length but 1024 frames starts with zero positions, which stay frozen.
    """
    shape = surgery.variables(model)["embed/pos"].shape
    surgery.assign(model, {"embed/pos": np.zeros(shape)}, what="zero positions")


class Wrapper(nnx.Module):
    """A wrapped submodule, `base`, with an adapter beside it under the attribute `name`.

    The adapter's parameters are found under the submodule's own path.
    """

    def __init__(self, base: nnx.Module, name: str, adapter: nnx.Module):
        self.base = base
        self.name = name
        setattr(self, name, adapter)

    def adapted(
        self, x: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None
    ) -> Float[Array, "b n d"]:
        """The adapter's output."""
        with jax.named_scope("adapter"):
            return call_masked(getattr(self, self.name), x, mask)


class Parallel(Wrapper):
    """base(x) + adapter(x): the adapter reads what the wrapped submodule reads."""

    def __call__(
        self, x: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None = None
    ) -> Float[Array, "b n d"]:
        return call_masked(self.base, x, mask) + self.adapted(x, mask)


class After(Wrapper):
    """z + adapter(z) with z = base(x): the adapter reads what the wrapped submodule wrote."""

    def __call__(
        self, x: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None = None
    ) -> Float[Array, "b n d"]:
        z: jax.Array = call_masked(self.base, x, mask)
        return z + self.adapted(z, mask)
