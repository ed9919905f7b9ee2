"""Several methods on one model."""

import dataclasses
from typing import ClassVar

from flax import nnx

from aatjax import surgery
from aatjax.errors import UsageError, check_kind
from aatjax.models.ast import AST
from aatjax.petl.base import Method, Monitor


@dataclasses.dataclass(frozen=True)
class Combined(Method):
    """Several methods, injected in order; what any of them trains is trained.

    `petl.Combined((petl.AAT(), petl.LoRA()))`, on the command line `--method aat+lora`. A method
    that wraps a sub-layer wraps the modules that earlier methods put around it: an adapter after
    the attention reads the attention with the output of the earlier adapters.

    Attributes:
        methods: two or more; those of one kind on the same blocks need different tags.
    """

    name: ClassVar[str] = "combined"

    methods: tuple[Method, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        advice = "give two methods or more: methods=(petl.AAT(), petl.LoRA())"
        check_kind("Combined: methods", self.methods, tuple, advice)
        if len(self.methods) < 2:
            raise UsageError(
                "Combined needs two methods or more: methods=(petl.AAT(), petl.LoRA())"
            )
        names = [method.name for method in self.methods]
        if self.name in names:
            raise UsageError("Combined contains a Combined: list all its methods in one")

    @property
    def trains_last_norm(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether any of the methods trains the last LayerNorm."""
        return any(method.trains_last_norm for method in self.methods)

    def choose_rate(self, dim: int) -> float:
        """Return the lowest rate of the methods."""
        return min(method.choose_rate(dim) for method in self.methods)

    def inject(self, model: AST, *, rngs: nnx.Rngs) -> None:
        """Inject the methods in order."""
        for method in self.methods:
            method.inject(model, rngs=rngs)

    def monitor(self, model: AST) -> Monitor | None:
        """Return the first method's monitor; it covers all mixtures of the model."""
        found = (method.monitor(model) for method in self.methods)
        return next((one for one in found if one is not None), None)


@dataclasses.dataclass(frozen=True)
class Stacked(Method):
    """Methods that were applied one after the other: all but the last are frozen.

    `aatjax.adapt(adapted, method)` makes one. The head that was trained with an earlier method is
    where that of the last one starts.

    Attributes:
        methods: two or more, in the order in which they were applied.
    """

    name: ClassVar[str] = "stacked"

    methods: tuple[Method, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.methods) < 2:
            raise UsageError("Stacked needs two methods or more: adapt an adapted model")

    @property
    def trains_last_norm(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the last method trains the last LayerNorm."""
        return self.methods[-1].trains_last_norm

    def choose_rate(self, dim: int) -> float:
        """Return the rate of the last method."""
        return self.methods[-1].choose_rate(dim)

    def inject(self, model: AST, *, rngs: nnx.Rngs) -> None:
        """Inject the methods in order, each on a frozen model."""
        for method in self.methods:
            surgery.freeze(model)
            method.inject(model, rngs=rngs)

    def monitor(self, model: AST) -> Monitor | None:
        """Return the last method's monitor."""
        return self.methods[-1].monitor(model)
