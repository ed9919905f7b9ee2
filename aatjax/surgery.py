"""Trainable parameters, and replacement of submodules by path: all that depends on NNX's internals.

A path names a module or parameter from the root of the model: `blocks/3/attn/q/kernel`. A wrapper
that a method puts around a submodule keeps the path of that submodule: the attribute `base` does
not count, so the parameters of the backbone have the same paths in every adapted model.
"""

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeAlias, TypeVar

import jax
import numpy as np
from flax import nnx

from aatjax.errors import UsageError

BASE = "base"

Model = TypeVar("Model", bound=nnx.Module)
State: TypeAlias = nnx.State[Any, Any]


class Frozen(nnx.Variable[Any]):
    """A parameter that nothing updates: it is no `nnx.Param`, so that Flax's own idioms pass it by.

    Of an adapted model, every `nnx.Param` is trained, and nothing else.
    """


class FrozenStat(Frozen):
    """A batch statistic that nothing updates; made trainable, it is an `nnx.BatchStat` again."""


class Penalty(nnx.Variable[Any]):
    """A number that a forward pass leaves in the model, to be added to the training loss."""


@dataclasses.dataclass(frozen=True)
class SplitModel(Generic[Model]):
    """A model in parts: structure, trainable parameters, statistics, everything else."""

    graphdef: nnx.GraphDef[Model]
    trainable: State
    stats: State
    frozen: State


def split(model: Model) -> SplitModel[Model]:
    """Split a model into its trainable parameters, batch statistics and frozen parameters."""
    return SplitModel(*nnx.split(model, nnx.Param, nnx.BatchStat, ...))


def join(graphdef: nnx.GraphDef[Model], trainable: State, stats: State, frozen: State) -> Model:
    """Rebuild a model from `split`, with new variables, so that it can be run in a gradient."""
    return nnx.merge(graphdef, trainable, stats, frozen, copy=True)


def clone(model: Model) -> Model:
    """Return a second model with a structure of its own that shares the (immutable) arrays."""
    parts = split(model)
    return join(parts.graphdef, parts.trainable, parts.stats, parts.frozen)


def reseed(model: nnx.Module, key: jax.Array) -> None:
    """Change every random stream of a model, such as those of `nnx.Dropout`, by a key, in place."""
    number = jax.random.bits(key)

    def fold(own: jax.Array) -> jax.Array:
        if own.ndim:  # of modules that `nnx.vmap` made
            return jax.vmap(fold)(own)
        return jax.random.fold_in(own, number)

    nnx.update(model, jax.tree.map(fold, nnx.state(model, nnx.RngKey)))


def sum_penalties(model: nnx.Module) -> jax.Array | float:
    """Return the sum of the penalties that the last forward pass left in the model."""
    return sum((value.sum() for value in arrays(model, Penalty).values()), 0.0)


def _walk(module: nnx.Module, path: str = "") -> Iterator[tuple[str, Any, str, Any]]:
    """Yield (path, parent, name, child) of every submodule and variable, parents first."""
    named = enumerate(module) if isinstance(module, nnx.List) else list(vars(module).items())
    for key, child in list(named):
        if isinstance(child, nnx.Module | nnx.Variable):
            name = str(key)
            here = path if name == BASE else f"{path}/{name}" if path else name
            yield here, module, name, child
            if isinstance(child, nnx.Module):
                yield from _walk(child, here)


def _set(parent: Any, name: str, child: Any) -> None:
    if isinstance(parent, nnx.List):
        parent[int(name)] = child
    else:
        setattr(parent, name, child)


def modules(model: nnx.Module) -> dict[str, nnx.Module]:
    """Return every submodule by path, the root under ''; the outermost wrapper of a wrapped one."""
    found = {"": model}
    for path, _, _, child in _walk(model):
        if isinstance(child, nnx.Module):
            found.setdefault(path, child)
    return found


def variables(model: nnx.Module) -> dict[str, nnx.Variable[Any]]:
    """Return every parameter and statistic by path; one that modules share by its first path.

    Raises:
        UsageError: two have the same path, because a method wrapped one module twice.
    """
    found: dict[str, nnx.Variable] = {}
    seen: set[int] = set()
    for path, _, _, child in _walk(model):
        if isinstance(child, nnx.Variable) and id(child) not in seen:
            if path in found:
                raise UsageError(
                    f"two parameters have the path {path}: a wrapper's parameters lie among those "
                    "of the module that it wraps, so give its attribute (or the adapter, by tag=) "
                    "another name"
                )
            found[path] = child
            seen.add(id(child))
    return found


def arrays(model: nnx.Module, kind: type[nnx.Variable[Any]] = nnx.Variable) -> dict[str, jax.Array]:
    """Return the values of the variables of one kind by path."""
    return {path: var[...] for path, var in variables(model).items() if isinstance(var, kind)}


def fetch_arrays(
    model: nnx.Module, kind: type[nnx.Variable[Any]] = nnx.Variable
) -> dict[str, np.ndarray]:
    """Return `arrays` in the host's memory."""
    return {path: np.asarray(value) for path, value in arrays(model, kind).items()}


def cast_doubles(model: nnx.Module) -> None:
    """Cast float64 arrays to float32, in place: what JAX draws with `jax_enable_x64` is float64."""
    for variable in variables(model).values():
        value = variable.get_raw_value()
        if getattr(value, "dtype", None) == np.float64:
            variable.set_raw_value(value.astype(np.float32))


def count_bytes(model: nnx.Module) -> int:
    """Return the bytes of all arrays."""
    return sum(array.nbytes for array in arrays(model).values())


def wrap(
    model: nnx.Module,
    pattern: str,
    build: Callable[[str, nnx.Module], nnx.Module],
    *,
    innermost: bool = False,
) -> list[str]:
    """Replace every submodule whose path matches by `build(path, submodule)`, in place.

    Args:
        model: an NNX model.
        pattern: a glob over path segments, such as `blocks/*/mlp`.
        build: returns the wrapper; it must hold the submodule as its attribute `base`.
        innermost: wrap the submodule itself if it is wrapped already, instead of its wrapper.

    Returns:
        The paths that were wrapped.

    Raises:
        UsageError: nothing matches.
    """
    found: dict[str, tuple[Any, str, Any]] = {}
    for path, parent, name, child in _walk(model):
        is_new = innermost or path not in found  # the outermost comes first
        if is_new and isinstance(child, nnx.Module) and matches(path, pattern):
            found[path] = parent, name, child
    if not found:
        raise UsageError(f"{pattern!r} matches no module; there are: {list_paths(modules(model))}")
    for path, (parent, name, child) in found.items():
        _set(parent, name, build(path, child))
    return list(found)


def replace(model: nnx.Module, build: Callable[[str, nnx.Module], nnx.Module | None]) -> list[str]:
    """Replace every submodule for which `build(path, submodule)` returns another, in place.

    Wrappers and the modules inside them are both visited, the inner one first.

    Returns:
        The paths of the replaced modules.
    """
    changed: list[str] = []
    for path, parent, name, child in reversed(list(_walk(model))):
        if isinstance(child, nnx.Module) and (new := build(path, child)) is not None:
            changed.append(path)
            _set(parent, name, new)
    return changed[::-1]


def freeze(model: nnx.Module) -> None:
    """Freeze every parameter and batch statistic, and drop penalties, in place.

    The arrays are shared.
    """

    def make(old: nnx.Variable) -> nnx.Variable:
        value = old.get_raw_value()
        if isinstance(old, Penalty):
            return Penalty(jax.numpy.zeros_like(value))
        return (FrozenStat if isinstance(old, nnx.BatchStat) else Frozen)(value)

    _change_kind(model, "**", (nnx.Param, nnx.BatchStat, Penalty), make)


def rest_frozen(model: nnx.Module) -> None:
    """Put every module whose parameters are all frozen into evaluation mode, in place."""
    for _, module in nnx.iter_modules(model):
        kinds = [type(variable) for variable in variables(module).values()]
        if any(issubclass(kind, Frozen) for kind in kinds) and not any(
            issubclass(kind, nnx.Param | nnx.BatchStat) for kind in kinds
        ):
            module.eval()


def unfreeze(model: nnx.Module, pattern: str) -> list[str]:
    """Make every parameter whose path matches trainable (`nnx.Param`), in place.

    The arrays are copied: a training step may donate their memory.

    Args:
        model: an NNX model.
        pattern: a glob over path segments; a last segment `**` matches everything below.

    Returns:
        The paths that match, also of parameters that were trainable before.

    Raises:
        UsageError: nothing matches.
    """
    parameters = (nnx.Param, Frozen)

    def make(old: nnx.Variable) -> nnx.Variable:
        return (nnx.BatchStat if isinstance(old, FrozenStat) else nnx.Param)(_copy(old))

    matched = _change_kind(model, pattern, parameters, make)
    if not matched:
        raise UsageError(
            f"{pattern!r} matches no parameter; there are: {list_paths(variables(model))}"
        )
    return matched


def _change_kind(
    model: nnx.Module, pattern: str, kinds: Any, make: Callable[[nnx.Variable], nnx.Variable]
) -> list[str]:
    """Replace the variables of some kinds by path; a shared one by one that is shared again."""
    made: dict[int, nnx.Variable] = {}
    matched: list[str] = []
    for path, parent, name, child in list(_walk(model)):
        if isinstance(child, kinds) and (pattern == "**" or matches(path, pattern)):
            matched.append(path)
            setattr(parent, name, made.setdefault(id(child), make(child)))
    return matched


def _copy(variable: nnx.Variable) -> Any:
    value = variable.get_raw_value()
    return jax.numpy.array(value, copy=True) if isinstance(value, jax.Array) else value


def assign(
    model: nnx.Module, values: Mapping[str, Any], *, what: str, complete: bool = False
) -> None:
    """Set parameters by path, in place; nothing is changed unless every value fits.

    Args:
        model: an NNX model; it may be abstract.
        values: arrays by path.
        what: the origin of the values, for the message.
        complete: whether every parameter of the model must be given.

    Raises:
        UsageError: unknown paths, wrong shapes, or (if `complete`) missing parameters; the message
            lists them.
    """
    known = variables(model)
    problems = [f"{path} is not in the model" for path in sorted(set(values) - set(known))]
    if complete:
        problems += [f"{path} is missing" for path in sorted(set(known) - set(values))]
    problems += [
        f"{path} has shape {list(np.shape(value))}, the model {list(known[path].shape)}"
        for path, value in values.items()
        if path in known and tuple(np.shape(value)) != tuple(known[path].shape)
    ]
    if problems:
        more = f"; and {len(problems) - 8} more" if problems[8:] else ""
        raise UsageError(f"{what} does not fit the model: {'; '.join(problems[:8])}{more}")
    for path, value in values.items():
        known[path].set_raw_value(jax.numpy.asarray(value, known[path].dtype))


def matches(path: str, pattern: str) -> bool:
    """Return whether a path matches a glob over its segments; a last `**` matches all below."""
    parts, patterns = path.split("/"), pattern.split("/")
    if patterns[-1] == "**" and len(parts) >= len(patterns):
        patterns = patterns[:-1]
        parts = parts[: len(patterns)]
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))


def list_paths(paths: Iterable[str]) -> str:
    """Return paths as one line, with block and list numbers folded into `*`, once each."""
    folded = (
        "/".join("*" if part.isdigit() else part for part in p.split("/")) for p in paths if p
    )
    return ", ".join(dict.fromkeys(folded))
