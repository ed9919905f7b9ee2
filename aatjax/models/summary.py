"""Parameter counts of a model by module: trained and frozen."""

import dataclasses
import math

from flax import nnx

from aatjax import surgery
from aatjax.errors import check_kind


@dataclasses.dataclass(frozen=True)
class SummaryRow:
    """Parameters of the modules at one path."""

    path: str
    trainable: int
    frozen: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """Parameter counts of a model; prints as a table.

    Attributes:
        trainable: parameters that the optimiser updates.
        frozen: all other parameters (batch statistics are not counted).
        rows: the same by module, with all blocks folded into one (`blocks/*/attn`).
    """

    trainable: int
    frozen: int
    rows: tuple[SummaryRow, ...]

    @property
    def total(self) -> int:
        """All parameters."""
        return self.trainable + self.frozen

    def __str__(self) -> str:
        width = max(len("module"), *(len(row.path) for row in self.rows))
        lines = [f"{'module':<{width}}  {'trainable':>12}  {'frozen':>12}"]
        lines += [
            f"{row.path:<{width}}  {row.trainable:>12,}  {row.frozen:>12,}"
            for row in (*self.rows, SummaryRow("total", self.trainable, self.frozen))
        ]
        lines.append(f"trainable share: {100 * self.trainable / max(1, self.total):.2f}%")
        return "\n".join(lines)


def summary(model: nnx.Module) -> Summary:
    """Count the parameters of a model, adapted or not; `print` shows them by module."""
    check_kind("summary: model", model, nnx.Module, "give an AST, from aatjax.load(...)")
    counts: dict[str, list[int]] = {}
    for path, variable in surgery.variables(model).items():
        if isinstance(variable, nnx.Param | surgery.Frozen):
            row = counts.setdefault(_fold(path), [0, 0])
            row[isinstance(variable, surgery.Frozen)] += math.prod(variable.shape)
    rows = tuple(SummaryRow(path, *pair) for path, pair in counts.items())
    return Summary(sum(row.trainable for row in rows), sum(row.frozen for row in rows), rows)


def _fold(path: str) -> str:
    """`blocks/3/attn/q/kernel` -> `blocks/*/attn`; `blocks/3/attn/soft_moa/phi` keeps soft_moa."""
    parts = path.split("/")
    if parts[0] != "blocks":
        return parts[0]
    parts[1] = "*"
    inner = {"q", "k", "v", "out", "up", "down"}
    return "/".join(parts[:3] if inner.intersection(parts[3:4]) else parts[:-1])
