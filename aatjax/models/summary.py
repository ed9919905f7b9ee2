"""What of a model is trained and what is frozen, module by module."""

import dataclasses
import math

from flax import nnx

from aatjax import surgery


@dataclasses.dataclass(frozen=True)
class SummaryRow:
    """Parameters of one module: path, trained, frozen."""

    path: str
    trainable: int
    frozen: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """Parameter counts of a model; prints as a table.

    Attributes:
        trainable: number of parameters that the optimiser updates.
        frozen: number of all others (batch statistics not counted).
        rows: the same by module; the blocks are folded into one line where they are equal.
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
        lines += [f"{r.path:<{width}}  {r.trainable:>12,}  {r.frozen:>12,}" for r in self.rows]
        lines.append(f"{'total':<{width}}  {self.trainable:>12,}  {self.frozen:>12,}")
        lines.append(f"trainable share: {100 * self.trainable / max(1, self.total):.2f}%")
        return "\n".join(lines)


def summary(model: nnx.Module) -> Summary:
    """Counts the parameters of a model: which are trained, which are frozen.

    Args:
        model: an AST, adapted or not.

    Returns:
        A Summary with the integers `.trainable` and `.frozen`; `print` shows it by module.
    """
    counts: dict[str, list[int]] = {}
    total = [0, 0]
    for path, variable in surgery.variables(model).items():
        if not isinstance(variable, nnx.Param):
            continue
        column = 0 if isinstance(variable, surgery.Trainable) else 1
        size = math.prod(variable.shape)
        total[column] += size
        counts.setdefault(_module_of(path), [0, 0])[column] += size
    rows = tuple(SummaryRow(path, *pair) for path, pair in counts.items())
    return Summary(total[0], total[1], rows)


def _module_of(path: str) -> str:
    """`blocks/3/attn/q/kernel` -> `blocks/*/attn`; `blocks/3/attn/soft_moa/phi` keeps soft_moa."""
    parts = path.split("/")
    if parts[0] != "blocks":
        return parts[0]
    parts[1] = "*"
    inner = {"q", "k", "v", "out", "up", "down"}
    return "/".join(parts[:3] if inner.intersection(parts[3:4]) else parts[:-1])
