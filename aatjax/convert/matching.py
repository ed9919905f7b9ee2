"""Which layout a file follows, and which tensors a file of a layout holds."""

import re
from collections.abc import Mapping

from aatjax.convert.rules import LAYOUTS, Layout, Rule


def template(name: str) -> tuple[str, int | None]:
    """A name with the number of its block replaced by `{i}`, and that number."""
    found = re.search(r"(?:^|[./])(?:blocks|layer|layers)[./](\d{1,4})[./]", name)
    if found is None:
        return name, None
    return f"{name[: found.start(1)]}{{i}}{name[found.end(1) :]}", int(found.group(1))


def choose_layout(shapes: Mapping[str, tuple[int, ...]]) -> Layout | None:
    """The layout whose names cover most of the file.

    None if no layout covers half of the file and none finds most of its own names there.

    Names that several layouts share (bare Hugging Face bodies) are decided by the patch kernel:
    one input channel is AST, three are ImageNet's.
    """
    names = [template(name)[0] for name in shapes]
    best: tuple[float, Layout] | None = None
    for layout in LAYOUTS:
        known = {source for source, _ in layout.rules}
        covered = sum(name in known for name in names)
        whole = len(known.intersection(names)) >= 0.8 * len(layout.body)
        rank = covered + 0.5 * sum(layout.is_ignored(n) or n in layout.numbers for n in names)
        kernel = next(n for n, rule in layout.rules if rule.targets == ("embed/proj/kernel",))
        channels = shapes.get(kernel, ())[1:2]
        if channels == (3,) and layout.rule == "imagenet":
            rank += 1
        if (whole or 2 * covered >= len(names) > 0) and (best is None or rank > best[0]):
            best = (rank, layout)
    return None if best is None else best[1]


def expand(
    layout: Layout, shapes: Mapping[str, tuple[int, ...]], depth: int
) -> dict[str, tuple[Rule, tuple[str, ...], tuple[int, ...]]]:
    """What a file of this layout holds, given the canonical shapes.

    Args:
        layout: one of `LAYOUTS`.
        shapes: canonical names and shapes, every one expected.
        depth: number of blocks.

    Returns:
        For each name in the file: its rule, canonical names and shape in the file.
    """
    found = {}
    for source, rule in layout.rules:
        for i in range(depth) if "{i}" in source else (0,):
            targets = tuple(target.replace("{i}", str(i)) for target in rule.targets)
            if all(target in shapes for target in targets):
                shape = rule.source_shape([shapes[target] for target in targets])
                found[source.replace("{i}", str(i))] = (rule, targets, shape)
    return found
