"""The model that an adapter file brings back, compared with the one that is saved."""

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from flax import nnx

from aatjax import surgery
from aatjax.audio.frontend import FrontEnd
from aatjax.errors import UsageError
from aatjax.models.ast import AST, make_abstract
from aatjax.models.config import ASTConfig
from aatjax.petl import Method, adapt
from aatjax.train.forward import DESCRIPTION
from aatjax.train.golden import differs

PASSING = (surgery.Penalty, nnx.Intermediate, nnx.RngState)
"""Variables that no file holds: no result of an evaluation depends on them."""


def make_shape(config: ASTConfig, method: Method) -> AST:
    """Return an adapted model without numbers, which is shared: clone it to change it."""
    return _trace_adapt(config, method)[0]


@functools.lru_cache(8)
def _trace_adapt(config: ASTConfig, method: Method) -> tuple[AST, frozenset[str]]:
    """Return an adapted model without numbers, and the frozen arrays that the method makes.

    Tracing it takes longer than loading an adapter.
    """
    made: set[str] = set()

    def trace(model: AST) -> AST:
        before = surgery.arrays(model)
        adapted = adapt(model, method)
        frozen = surgery.arrays(adapted, surgery.Frozen).items()
        made.update(path for path, value in frozen if value is not before.get(path))
        return adapted

    model: AST = nnx.eval_shape(trace, make_abstract(config))
    return model, frozenset(made)


def adapt_stored(base: AST, method: Method, stored: Collection[str]) -> AST:
    """Return `adapt(base, method)`, where some arrays will be assigned and may have no numbers.

    Their initial values are not computed, unless the method makes frozen arrays that are not
    among them.

    Args:
        base: an AST that is not adapted.
        method: the method.
        stored: paths of the arrays that will be assigned.
    """
    shape, made = _trace_adapt(base.config, method)
    model, loaded = surgery.clone(shape), surgery.variables(base)
    for path, variable in surgery.variables(model).items():
        if path in stored:
            continue
        own = None if path in made else loaded.get(path)
        if own is None or (own.shape, own.dtype) != (variable.shape, variable.dtype):
            return adapt(base, method)
        variable.set_raw_value(own.get_raw_value())
    for name in ("origin", "loaded", "labels", "statistics"):
        setattr(model, name, getattr(base, name))
    model.method = method
    return model


def rebuild_model(
    model: AST, config: ASTConfig, method: Method, frontend: FrontEnd, golden: dict[str, Any]
) -> AST:
    """Return the model that `load_adapter` will build.

    Raises:
        UsageError: its parameters, or what it computes, are not those of the model.
    """
    rebuilt = surgery.clone(make_shape(config, method))
    here, there = surgery.variables(model), surgery.variables(rebuilt)
    problems = find_changes(model, config, method)
    for path, variable in there.items():
        if path in here:
            variable.set_raw_value(here[path].get_raw_value())
    if not problems:
        rebuilt.eval()
        if (difference := differs(rebuilt, frontend, golden)) is not None:
            problems.append(f"a logit of it is {difference:.2g} away")
    if problems:
        raise UsageError(explain_changes(problems, method))
    return rebuilt


def find_changes(model: AST, config: ASTConfig, method: Method) -> list[str]:
    """Return what differs in structure from what a method makes; no number is compared."""
    shape = make_shape(config, method)
    here, there = surgery.variables(model), surgery.variables(shape)
    return [*_compare_variables(here, there), *_compare_modules(model, shape)]


def explain_changes(problems: Sequence[str], method: Method) -> str:
    """Return the message on a model that a file would not bring back."""
    more = f"; and {len(problems) - 4} more" if problems[4:] else ""
    return (
        f"the model is not what {method!r} makes and would not come back from a file: "
        f"{'; '.join(problems[:4])}{more}. Write a method of your own that does this"
    )


def _compare_variables(
    here: Mapping[str, nnx.Variable], there: Mapping[str, nnx.Variable]
) -> Iterator[str]:
    """Say which parameters are missing, added, of another kind or of another shape."""
    names = {nnx.Param: "trained", surgery.Frozen: "frozen", surgery.FrozenStat: "frozen"}
    yield from (f"{path} is missing" for path in there if path not in here)
    for path, variable in here.items():
        if isinstance(variable, PASSING):
            continue
        other = there.get(path)
        if other is None:
            yield f"{path} was added"
        elif type(other) is not type(variable):
            kinds = (names.get(type(v), type(v).__name__) for v in (variable, other))
            yield "{} is {}, not {}".format(path, *kinds)
        elif other.shape != variable.shape:
            yield f"{path} has shape {list(variable.shape)}, not {list(other.shape)}"


def _compare_modules(model: AST, rebuilt: AST) -> Iterator[str]:
    """Say which modules are of another class, or have another number or name as an attribute."""
    plain = (bool, int, float, str, tuple, type(None))
    free = {*DESCRIPTION, "config", "first_trained", "deterministic", "use_running_average"}
    others = dict(nnx.iter_modules(rebuilt))
    for parts, module in nnx.iter_modules(model):
        path, other = "/".join(map(str, parts)) or "the model", others.get(parts)
        if type(module) is not type(other):
            yield f"{path} is a {type(module).__name__}, not {type(other).__name__}"
            continue
        for name, value in vars(module).items():
            counts = not name.startswith("_") and name not in free and isinstance(value, plain)
            if counts and value != (was := getattr(other, name, None)):
                yield f"{path}.{name} is {value!r}, not {was!r}"
