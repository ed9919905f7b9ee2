"""What is trained, and where a method attaches: the only file that knows NNX's insides.

A path names a module or parameter from the model's root: `blocks/3/attn/q/kernel`. A wrapper
that a method puts around a submodule keeps that submodule's path: its attribute `base` does not
count, so the parameters of the backbone have the same names in every adapted model.
"""

import dataclasses
import fnmatch
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from aatjax.errors import UsageError

BASE = "base"


class Trainable(nnx.Param):
    """A parameter that the optimiser updates; every other parameter is frozen."""


class Penalty(nnx.Variable):
    """A number that a forward pass leaves behind, to be added to the training loss."""


class Recorded(nnx.Variable):
    """An array that a forward pass leaves behind, to be looked at."""


def sum_penalties(model: nnx.Module) -> jax.Array | float:
    """The sum of all penalties that the last forward pass left in the model; 0 without any."""
    return sum((value.sum() for value in arrays(model, Penalty).values()), 0.0)


@dataclasses.dataclass(frozen=True)
class SplitModel:
    """A model taken apart: what gradients see, what the forward pass updates, and the rest."""

    graphdef: Any
    trainable: Any
    stats: Any
    frozen: Any


def split(model: nnx.Module) -> SplitModel:
    """Splits a model into its trainable parameters, its statistics, and its frozen parameters."""
    return SplitModel(*nnx.split(model, Trainable, nnx.BatchStat, ...))


def join(graphdef: Any, trainable: Any, stats: Any, frozen: Any) -> Any:
    """The model again, with fresh variables, so that it may be called inside a gradient."""
    return nnx.merge(graphdef, trainable, stats, frozen, copy=True)


def clone(model: nnx.Module) -> Any:
    """A second model with its own structure; the (immutable) arrays are shared."""
    parts = split(model)
    return join(parts.graphdef, parts.trainable, parts.stats, parts.frozen)


def _children(module: nnx.Module) -> Iterator[tuple[str, Any]]:
    if isinstance(module, nnx.List):
        yield from ((str(index), child) for index, child in enumerate(module))
        return
    for name, child in vars(module).items():
        if isinstance(child, nnx.Module | nnx.Variable):
            yield name, child


def _join(path: str, name: str) -> str:
    if name == BASE:
        return path
    return f"{path}/{name}" if path else name


def modules(model: nnx.Module) -> dict[str, nnx.Module]:
    """Every submodule by path, the root under ''; of a wrapped one, the wrapper."""
    found: dict[str, nnx.Module] = {}

    def walk(path: str, module: nnx.Module) -> None:
        found.setdefault(path, module)
        for name, child in _children(module):
            if isinstance(child, nnx.Module):
                walk(_join(path, name), child)

    walk("", model)
    return found


def variables(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Every parameter and statistic by path.

    Raises:
        UsageError: two of them would have the same path (a method wrapped a module twice under
            one name).
    """
    found: dict[str, nnx.Variable] = {}

    def walk(path: str, module: nnx.Module) -> None:
        for name, child in _children(module):
            here = _join(path, name)
            if isinstance(child, nnx.Module):
                walk(here, child)
            elif here in found:
                raise UsageError(f"two parameters are named {here}: give one adapter another name")
            else:
                found[here] = child

    walk("", model)
    return found


def arrays(model: nnx.Module, kind: type[nnx.Variable] = nnx.Variable) -> dict[str, jax.Array]:
    """The values of `variables` of one kind by path."""
    return {path: var[...] for path, var in variables(model).items() if isinstance(var, kind)}


def _matches(path: str, pattern: str) -> bool:
    parts, patterns = path.split("/"), pattern.split("/")
    if patterns[-1] == "**":
        patterns = patterns[:-1]
        parts, long = parts[: len(patterns)], len(parts) > len(patterns)
        if not long:
            return False
    return len(parts) == len(patterns) and all(
        fnmatch.fnmatchcase(part, glob) for part, glob in zip(parts, patterns, strict=True)
    )


def wrap(
    model: nnx.Module,
    pattern: str,
    build: Callable[[str, nnx.Module], nnx.Module],
    *,
    innermost: bool = False,
) -> list[str]:
    """Replaces every submodule whose path matches by `build(path, submodule)`.

    Args:
        model: changed in place.
        pattern: a glob over path segments, such as `blocks/*/mlp`.
        build: makes the wrapper; it must hold the submodule as its attribute `base`.
        innermost: where another method has wrapped the submodule, wrap the submodule itself
            instead of that wrapper.

    Returns:
        The paths that were wrapped.

    Raises:
        UsageError: nothing matches.
    """
    known = modules(model)
    paths = [path for path in known if path and _matches(path, pattern)]
    if not paths:
        raise UsageError(f"{pattern!r} matches no module; there are: {_overview(known)}")
    for path in paths:
        parent_path, _, name = path.rpartition("/")
        parent: Any = known[parent_path]
        while not isinstance(parent, nnx.List) and not hasattr(parent, name):
            parent = parent.base
        old = parent[int(name)] if isinstance(parent, nnx.List) else getattr(parent, name)
        while innermost and hasattr(old, BASE):
            parent, name, old = old, BASE, getattr(old, BASE)
        new = build(path, old)
        if isinstance(parent, nnx.List):
            parent[int(name)] = new
        else:
            setattr(parent, name, new)
    return paths


def replace(model: nnx.Module, build: Callable[[str, nnx.Module], nnx.Module | None]) -> list[str]:
    """Replaces every submodule for which `build(path, submodule)` returns another, in place.

    Wrappers and what they wrap are both visited, the inner one first.

    Returns:
        The paths at which something was replaced.
    """
    changed: list[str] = []

    def walk(path: str, module: Any) -> None:
        for name, child in list(_children(module)):
            if not isinstance(child, nnx.Module):
                continue
            here = _join(path, name)
            walk(here, child)
            new = build(here, child)
            if new is None:
                continue
            changed.append(here)
            if isinstance(module, nnx.List):
                module[int(name)] = new
            else:
                setattr(module, name, new)

    walk("", model)
    return changed


def retag(model: nnx.Module, pattern: str, kind: type[nnx.Param] = Trainable) -> list[str]:
    """Makes every parameter whose path matches one of type `kind` (Trainable by default).

    Args:
        model: changed in place.
        pattern: a glob over path segments; a last segment `**` matches everything below.
        kind: the new parameter type.

    Returns:
        The paths that match.

    Raises:
        UsageError: nothing matches.
    """
    matched: list[str] = []

    def walk(path: str, module: nnx.Module) -> None:
        for name, child in list(_children(module)):
            here = _join(path, name)
            if isinstance(child, nnx.Module):
                walk(here, child)
            elif isinstance(child, nnx.Param) and (pattern == "**" or _matches(here, pattern)):
                matched.append(here)
                setattr(module, name, kind(child[...]))

    walk("", model)
    if not matched:
        raise UsageError(
            f"{pattern!r} matches no parameter; there are: {_overview(variables(model))}"
        )
    return matched


def assign(
    model: nnx.Module, values: Mapping[str, Any], *, what: str, complete: bool = False
) -> None:
    """Sets parameters by path, in place; all problems are named at once.

    Args:
        model: changed in place only if every value fits; it may be abstract.
        values: arrays by path.
        what: where the values come from, for the message.
        complete: whether every parameter of the model must be given.

    Raises:
        UsageError: an unknown path, a wrong shape, or (if `complete`) a missing parameter.
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
        shown = "; ".join(problems[:8]) + (
            f"; and {len(problems) - 8} more" if problems[8:] else ""
        )
        raise UsageError(f"{what} does not fit the model: {shown}")
    for path, value in values.items():
        known[path].set_raw_value(jax.numpy.asarray(value, known[path].dtype))


def _overview(paths: Any) -> str:
    """The paths with block and list numbers folded into `*`, once each."""
    folded = (
        "/".join("*" if part.isdigit() else part for part in p.split("/")) for p in paths if p
    )
    return ", ".join(dict.fromkeys(folded))
