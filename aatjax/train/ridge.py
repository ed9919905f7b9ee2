"""Ridge regression on frozen features: a linear classifier in closed form."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Float, Float64, Int
from scipy.optimize import minimize

from aatjax.errors import DataError, UsageError

STRENGTHS = 10.0 ** np.arange(-5.0, 3.01, 0.25)
"""Penalties that are tried, per unit of the features' variance and of the clips' weight."""

SOFTEST, HARDEST = 1e-1, 1e3  # factors that make logits of outputs

BLOCK = 2**22  # numbers in memory at once where rows are read in blocks


class Features(Protocol):
    """Rows of features `[n, p]`: an array, or a memory-mapped one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns."""
        ...

    def __getitem__(self, rows: Int[np.ndarray, " k"], /) -> np.ndarray:
        """Return some rows."""
        ...


@dataclasses.dataclass(frozen=True)
class RidgeFit:
    """A linear classifier, `features @ kernel + bias`, and how it was chosen.

    Attributes:
        kernel: weights `[p, c]`.
        bias: `[c]`.
        strength: the penalty that was chosen, of each task.
        errors: mean squared error of the clips left out, by task and penalty `[t, s]`, where their
            outputs (without the intercept) are times the factor that makes it least.
        left_out: outputs for each clip by the fit without it, or without its group `[n, c]`.
    """

    kernel: Float64[np.ndarray, "p c"]
    bias: Float64[np.ndarray, " c"]
    strength: Float64[np.ndarray, " t"]
    errors: Float64[np.ndarray, "t s"]
    left_out: Float64[np.ndarray, "n c"]


def fit_ridge(
    features: Features,
    targets: Float[np.ndarray, "n c"],
    *,
    weights: Float[np.ndarray, " n"] | None = None,
    groups: Int[np.ndarray, " n"] | None = None,
    tasks: Sequence[int] = (),
    strengths: Float64[np.ndarray, " s"] = STRENGTHS,
) -> RidgeFit:
    """Fit a ridge regression with an intercept; its penalty by leaving out each clip in turn.

    A penalty counts by the error at the best common factor of the outputs, as logits are made of
    them by one (`find_logit_scale`): with a speaker left out, plain errors are least where the
    outputs are all too small.

    What is least is the weighted sum of squared errors, plus the penalty times the squared weights
    of the standardised features. The errors of the clips left out follow for all penalties from one
    decomposition: with the hat matrix H, those of a group g are (I - H_gg)^-1 times its errors in
    the fit of all clips (Allen 1974; Golub, Heath and Wahba 1979). The standardisation is that of
    all clips.

    Args:
        features: `[n, p]`, read in blocks of rows, so that they may lie in a file.
        targets: `[n, c]`, such as 1 for the class of a clip and 0 for the others.
        weights: of each clip, above 0; 1 by default.
        groups: recording or speaker of each clip, whose clips are left out together.
        tasks: numbers of columns of `targets`, one after the other, that share a penalty; by
            default all do.
        strengths: penalties to choose from, per unit of variance and of weight.

    Raises:
        DataError: fewer than two clips or groups, or values that are not finite.
        UsageError: shapes that do not fit together.
    """
    count, width = features.shape
    tasks = tasks or (targets.shape[1],)
    given = np.ones(count) if weights is None else np.asarray(weights, np.float64)
    if targets.shape[0] != count or given.shape != (count,) or sum(tasks) != targets.shape[1]:
        raise UsageError(
            f"ridge: features {[count, width]}, targets {list(targets.shape)}, weights "
            f"{list(given.shape)} and tasks {list(tasks)} do not fit together"
        )
    numbers = np.arange(count) if groups is None else np.unique(groups, return_inverse=True)[1]
    if count < 2 or numbers.max() < 1:
        raise DataError("ridge: at least two training clips are needed, of two groups if they have")
    if not np.isfinite(targets).all() or not (np.isfinite(given) & (given > 0)).all():
        raise DataError("ridge: a target is not finite, or a weight is not above 0")
    rows = _standardize(features, np.asarray(targets, np.float64), given)
    parts = _decompose(rows)
    ends = np.cumsum(tasks)
    spans = [slice(end - size, end) for end, size in zip(ends, tasks, strict=True)]
    penalties = strengths * given.sum()
    squares, agreement = np.zeros((2, len(tasks), len(penalties)))
    for left, errors in _leave_out(rows, parts, numbers, penalties):
        wanted = rows.roots[left, None] * (rows.targets[left] - rows.center)
        outputs = wanted - errors
        for task, span in enumerate(spans):
            squares[task] += np.square(outputs[..., span]).sum(axis=(1, 2))
            agreement[task] += np.einsum("skc,kc->s", outputs[..., span], wanted[:, span])
    spread = given @ np.square(rows.targets - rows.center)
    spread = np.array([spread[span].sum() for span in spans])[:, None]
    gains = np.square(np.maximum(agreement, 0.0)) / np.maximum(squares, 1e-300)
    errors = (spread - gains) / given.sum() / np.array(tasks)[:, None]
    best = len(penalties) - 1 - errors[:, ::-1].argmin(axis=1)  # of equals the largest
    left_out = np.empty_like(rows.targets)
    for left, wrongs in _leave_out(rows, parts, numbers, penalties[best]):
        for task, span in enumerate(spans):
            wrong = wrongs[task][:, span] / rows.roots[left, None]
            left_out[left, span] = targets[left, span] - wrong
    penalty = np.repeat(penalties[best], tasks)
    solved = parts.products / (parts.squares[:, None] + penalty)
    kernel = (parts.vectors @ solved) / rows.scale[:, None]
    return RidgeFit(
        kernel=kernel,
        bias=rows.center - rows.mean @ kernel,
        strength=strengths[best],
        errors=errors,
        left_out=left_out,
    )


def find_logit_scale(
    outputs: np.ndarray, targets: np.ndarray, weights: np.ndarray, multi_label: bool
) -> tuple[float, float]:
    """Return the factor and the offset that make logits of outputs, with the least log loss.

    A squared loss on 0 and 1 estimates probabilities, so the outputs order the classes as logits
    do; their scale is free.

    Args:
        outputs: of a ridge regression, for clips left out.
        targets: 0 to 1; NaN where unknown.
        weights: of each clip.
        multi_label: sigmoids of factor * (output - offset), instead of a softmax without offset.
    """
    known, given = ~np.isnan(targets), np.nan_to_num(targets)
    finite = np.nan_to_num(outputs)

    def loss(parameters: np.ndarray) -> float:
        logits = np.exp(parameters[0]) * (finite - parameters[1] * multi_label)
        if multi_label:
            each = (np.logaddexp(0, logits) - given * logits) * known
        else:
            top = logits.max(axis=1, keepdims=True)
            total = top + np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
            each = (total - logits) * given
        return float(weights @ each.sum(axis=1) / weights.sum())

    bounds = [(np.log(SOFTEST), np.log(HARDEST)), (-1.0, 1.0)]
    best = minimize(loss, [np.log(5.0), 0.5 * multi_label], bounds=bounds, method="L-BFGS-B").x
    return float(np.exp(best[0])), float(best[1] * multi_label)


class _Rows(NamedTuple):
    """Clips, and what standardises them."""

    features: Features
    targets: Float64[np.ndarray, "n c"]
    mean: Float64[np.ndarray, " p"]
    scale: Float64[np.ndarray, " p"]
    center: Float64[np.ndarray, " c"]
    roots: Float64[np.ndarray, " n"]

    def read(self, rows: Int[np.ndarray, " k"]) -> tuple[np.ndarray, np.ndarray]:
        """Return standardised features and targets of mean 0, times the roots of the weights."""
        roots = self.roots[rows, None]
        features = np.asarray(self.features[rows], np.float64)
        return roots * (features - self.mean) / self.scale, roots * (
            self.targets[rows] - self.center
        )

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield all rows in blocks that fit into memory."""
        for rows in _split(len(self.targets), self.features.shape[1]):
            yield self.read(rows)


class _Parts(NamedTuple):
    """Eigenvectors `[p, k]` and values `[k]` of the Gram matrix; the targets along them."""

    vectors: Float64[np.ndarray, "p k"]
    squares: Float64[np.ndarray, " k"]
    products: Float64[np.ndarray, "k c"]


def _split(count: int, width: int) -> Iterator[Int[np.ndarray, " k"]]:
    """Yield the numbers of rows, in blocks."""
    size = max(1, BLOCK // width)
    for start in range(0, count, size):
        yield np.arange(start, min(start + size, count))


def _standardize(features: Features, targets: np.ndarray, weights: np.ndarray) -> _Rows:
    count, width = features.shape
    total, mean, square = weights.sum(), np.zeros(width), np.zeros(width)
    for rows in _split(count, width):
        mean += weights[rows] @ np.asarray(features[rows], np.float64) / total
    if not np.isfinite(mean).all():
        raise DataError("ridge: a feature is not finite")
    for rows in _split(count, width):
        change = np.asarray(features[rows], np.float64) - mean
        square += weights[rows] @ np.square(change) / total
    scale = np.sqrt(square)
    scale[scale <= 1e-7 * (np.abs(mean) + 1e-30)] = 1.0  # constant
    return _Rows(features, targets, mean, scale, weights @ targets / total, np.sqrt(weights))


def _decompose(rows: _Rows) -> _Parts:
    count, width = rows.features.shape
    if count <= width:
        features, targets = rows.read(np.arange(count))
        left, values, right = np.linalg.svd(features, full_matrices=False)
        return _Parts(right.T, np.square(values), values[:, None] * (left.T @ targets))
    gram, products = np.zeros((width, width)), np.zeros((width, rows.targets.shape[1]))
    for features, targets in rows.blocks():
        gram += features.T @ features
        products += features.T @ targets
    squares, vectors = np.linalg.eigh(gram)
    return _Parts(vectors, np.maximum(squares, 0.0), vectors.T @ products)


def _leave_out(
    rows: _Rows, parts: _Parts, groups: np.ndarray, penalties: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield numbers of rows `[k]`, and their errors when left out `[s, k, c]`, for all penalties.

    The errors are times the roots of the weights.
    """
    order, sizes = np.argsort(groups, kind="stable"), np.bincount(groups)
    single = np.flatnonzero(sizes[groups] == 1)
    shrunk = 1.0 / (parts.squares + penalties[:, None])  # [s, k]
    along = shrunk[:, :, None] * parts.products
    total = np.square(rows.roots).sum()
    for some in _split(len(single), rows.features.shape[1] + along[:, 0].size):
        features, targets = rows.read(single[some])
        rotated, roots = features @ parts.vectors, rows.roots[single[some]]
        hat = shrunk @ np.square(rotated).T + np.square(roots) / total
        errors = targets - rotated @ along
        yield single[some], errors / np.maximum(1.0 - hat, 1e-12)[..., None]
    for end, size in zip(np.cumsum(sizes), sizes, strict=True):
        if size == 1:
            continue
        chosen = order[end - size : end]
        features, targets = rows.read(chosen)
        rotated, roots = features @ parts.vectors, rows.roots[chosen]
        if 2 * size > len(parts.squares):
            yield chosen, _refit_without(parts, rotated, targets, roots, total, penalties)
            continue
        errors = targets - rotated @ along
        for index, weights in enumerate(shrunk):
            hat = (rotated * weights) @ rotated.T + np.outer(roots, roots) / total
            errors[index] = np.linalg.solve(np.eye(size) - hat, errors[index])
        yield chosen, errors


def _refit_without(
    parts: _Parts,
    rotated: np.ndarray,
    targets: np.ndarray,
    roots: np.ndarray,
    total: float,
    penalties: np.ndarray,
) -> np.ndarray:
    """Return the errors of a large group by the fit of the others: one decomposition for all."""
    left = total - np.square(roots).sum()
    mean, center = -(roots @ rotated) / left, -(roots @ targets) / left  # of the others
    gram = np.diag(parts.squares) - rotated.T @ rotated - left * np.outer(mean, mean)
    products = parts.products - rotated.T @ targets - left * np.outer(mean, center)
    squares, vectors = np.linalg.eigh(gram)
    shrunk = 1.0 / (np.maximum(squares, 0.0) + penalties[:, None])
    features = (rotated - np.outer(roots, mean)) @ vectors
    along = shrunk[:, :, None] * (vectors.T @ products)
    return targets - np.outer(roots, center) - features @ along
