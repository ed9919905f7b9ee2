"""The sizes of a model, told from the shapes of its tensors."""

import collections
import dataclasses
import math
from collections.abc import Mapping

from aatjax.convert.matching import template
from aatjax.convert.rules import Layout
from aatjax.models.config import ASTConfig

BASE = (768, 3072)
FRAME_PATCH = (128, 2)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a model; `kernel` is (f, t, input channels), `classes` None without a head."""

    dim: int
    depth: int
    mlp_dim: int
    kernel: tuple[int, int, int]
    tokens: int
    distilled: bool
    classes: int | None
    qkv_bias: bool = True
    head_norm: bool = True

    @classmethod
    def of(cls, config: ASTConfig, grid: tuple[int, int], *, has_head: bool) -> "Sizes":
        """Sizes of a configured model whose positions lie on `grid`."""
        return cls(
            dim=config.dim,
            depth=config.depth,
            mlp_dim=config.mlp_dim,
            kernel=(*config.patch, 1),
            tokens=config.num_prefix + grid[0] * grid[1],
            distilled=config.distilled,
            classes=config.num_classes if has_head else None,
            qkv_bias=config.qkv_bias,
            head_norm=config.head_norm,
        )

    @property
    def patch(self) -> tuple[int, int]:
        """Patch size (frequency, time)."""
        return self.kernel[:2]

    @property
    def patches(self) -> int:
        """Positions without prefix tokens."""
        return self.tokens - (2 if self.distilled else 1)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical names and shapes of a model of these sizes."""
        dim, vector, wide = self.dim, (self.dim,), (self.mlp_dim,)
        shapes: dict[str, tuple[int, ...]] = {
            "embed/cls": (1, 1, dim),
            "embed/pos": (1, self.tokens, dim),
            "embed/proj/kernel": (*self.kernel, dim),
            "embed/proj/bias": vector,
            "norm/scale": vector,
            "norm/bias": vector,
        }
        if self.distilled:
            shapes["embed/dist"] = (1, 1, dim)
        for i in range(self.depth):
            block = f"blocks/{i}"
            for norm in ("ln1", "ln2"):
                shapes |= {f"{block}/{norm}/scale": vector, f"{block}/{norm}/bias": vector}
            for part in ("q", "k", "v", "out"):
                shapes[f"{block}/attn/{part}/kernel"] = (dim, dim)
                if self.qkv_bias or part == "out":
                    shapes[f"{block}/attn/{part}/bias"] = vector
            shapes |= {f"{block}/mlp/up/kernel": (dim, *wide), f"{block}/mlp/up/bias": wide}
            shapes |= {f"{block}/mlp/down/kernel": (*wide, dim), f"{block}/mlp/down/bias": vector}
        if self.classes is not None:
            if self.head_norm:
                shapes |= {"head/norm/scale": vector, "head/norm/bias": vector}
            classes = (self.classes,)
            shapes |= {"head/linear/kernel": (dim, *classes), "head/linear/bias": classes}
        return shapes


def infer_sizes(
    layout: Layout, shapes: Mapping[str, tuple[int, ...]], *, qkv_bias: bool = True
) -> Sizes:
    """Sizes that most tensors agree on; what no tensor tells is taken from the base model.

    The result only says what to expect: every shape is compared with it afterwards.
    """
    rules = {source: rule.targets for source, rule in layout.rules}
    named: dict[str, list[tuple[int, ...]]] = collections.defaultdict(list)
    depth = 1
    for name, shape in shapes.items():
        source, block = template(name)
        if source in rules and shape:
            named[rules[source][0]].append(shape)
            depth = max(depth, (block or 0) + 1)

    def vote(targets: tuple[str, ...], default: int, axis: int = -1) -> int:
        votes = collections.Counter(
            shape[axis] for target in targets for shape in named.get(target, []) if shape[axis] > 0
        )
        return votes.most_common(1)[0][0] if votes else default

    norms = [f"blocks/{{i}}/{n}/{p}" for n in ("ln1", "ln2") for p in ("scale", "bias")]
    dim = vote((*norms, "embed/cls", "norm/scale", "embed/proj/bias"), BASE[0])
    pos = next(iter(named.get("embed/pos", [])), ())
    tokens = 0
    if len(pos) == 3:
        tokens = pos[1] if pos[2] == dim else pos[2]
    head = any(target.startswith("head/") for target in named)
    return Sizes(
        dim=dim,
        depth=depth,
        mlp_dim=vote(("blocks/{i}/mlp/up/kernel", "blocks/{i}/mlp/up/bias"), BASE[1], 0),
        kernel=_kernel(layout, next(iter(named.get("embed/proj/kernel", [])), ()), dim),
        tokens=tokens,
        distilled=_distilled(layout, shapes, "embed/dist" in named, tokens),
        classes=vote(("head/linear/bias",), 1) if head else None,
        qkv_bias=qkv_bias,
    )


def _kernel(layout: Layout, shape: tuple[int, ...], dim: int) -> tuple[int, int, int]:
    if len(shape) != 4 or shape[0] != dim or 0 in shape:
        return 16, 16, 1
    if layout.rule != "ssast" and shape[2] != shape[3] and shape[2:] != FRAME_PATCH:
        return 16, 16, 1  # every other published patch is square
    channels = 3 if shape[1] == 3 and layout.rule == "imagenet" else 1
    return shape[2], shape[3], channels


def _distilled(
    layout: Layout, shapes: Mapping[str, tuple[int, ...]], token: bool, tokens: int
) -> bool:
    """Whether there is (or should be) a DIST token: by name, by its head, by the square grid."""
    if layout.distilled is not None:
        return layout.distilled
    if token or any("head_dist." in n or n.startswith("distillation_class") for n in shapes):
        return True
    with_two, with_one = tokens - 2, tokens - 1
    return not _square(with_one) and _square(with_two)


def _square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number
