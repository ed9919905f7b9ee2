"""Sizes of a model, inferred from the shapes of its tensors."""

import collections
import dataclasses
import math
from collections.abc import Mapping

from aatjax.convert.detect import split_block_number
from aatjax.convert.rules import WeightLayout
from aatjax.models.config import ASTConfig
from aatjax.models.pool import find_pool_shapes

BASE = (768, 3072)
FRAME_PATCH = (128, 2)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a model; `kernel` is (f, t, input channels), `classes` None without a head.

    `pooled` is the width that the head reads, None for `dim`; `pool` has the shapes of trained
    pooling by path.
    """

    dim: int
    depth: int
    mlp_dim: int
    kernel: tuple[int, int, int]
    tokens: int
    distilled: bool
    classes: int | None
    qkv_bias: bool = True
    head_norm: bool = True
    pooled: int | None = None
    pool: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @classmethod
    def from_config(cls, config: ASTConfig, grid: tuple[int, int], *, has_head: bool) -> "Sizes":
        """Return the sizes of a configured model whose positions lie on `grid`."""
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
            pooled=config.pooled_dim,
            pool=find_pool_shapes(config),
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
        """Return canonical names and shapes of a model of these sizes."""
        dim, mlp = self.dim, self.mlp_dim
        linears = {f"attn/{part}": (dim, dim) for part in ("q", "k", "v", "out")}
        linears |= {"mlp/up": (dim, mlp), "mlp/down": (mlp, dim)}
        shapes: dict[str, tuple[int, ...]] = {
            "embed/cls": (1, 1, dim),
            "embed/pos": (1, self.tokens, dim),
            "embed/proj/kernel": (*self.kernel, dim),
            "embed/proj/bias": (dim,),
        }
        if self.distilled:
            shapes["embed/dist"] = (1, 1, dim)
        norms = ["norm"]
        for i in range(self.depth):
            norms += [f"blocks/{i}/ln1", f"blocks/{i}/ln2"]
            for name, (rows, columns) in linears.items():
                shapes[f"blocks/{i}/{name}/kernel"] = (rows, columns)
                if self.qkv_bias or name not in ("attn/q", "attn/k", "attn/v"):
                    shapes[f"blocks/{i}/{name}/bias"] = (columns,)
        if self.classes is not None:
            pooled = self.pooled or dim
            norms += ["head/norm"] if self.head_norm else []
            shapes["head/linear/kernel"] = (pooled, self.classes)
            shapes["head/linear/bias"] = (self.classes,)
            shapes |= dict(self.pool)
        widths = {norm: self.pooled or dim if norm == "head/norm" else dim for norm in norms}
        return shapes | {
            f"{n}/{part}": (w,) for n, w in widths.items() for part in ("scale", "bias")
        }


def infer_sizes(
    layout: WeightLayout, shapes: Mapping[str, tuple[int, ...]], *, qkv_bias: bool = True
) -> Sizes:
    """Return the sizes that most tensors agree on, or of the base model where no tensor shows one.

    The result is only what to expect: every shape is compared with it afterwards.
    """
    rules = {source: rule.targets for source, rule in layout.rules}
    named: dict[str, list[tuple[int, ...]]] = collections.defaultdict(list)
    depth = 1
    for name, shape in shapes.items():
        source, block = split_block_number(name)
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
        head_norm=not layout.head or any(r.targets[0] == "head/norm/scale" for r in layout.head),
    )


def _kernel(layout: WeightLayout, shape: tuple[int, ...], dim: int) -> tuple[int, int, int]:
    if len(shape) != 4 or shape[0] != dim or 0 in shape:
        return 16, 16, 1
    if layout.rule != "ssast" and shape[2] != shape[3] and shape[2:] != FRAME_PATCH:
        return 16, 16, 1  # every other published patch is square
    channels = 3 if shape[1] == 3 and layout.rule == "imagenet" else 1
    return shape[2], shape[3], channels


def _distilled(
    layout: WeightLayout, shapes: Mapping[str, tuple[int, ...]], token: bool, tokens: int
) -> bool:
    """Whether there must be a DIST token: by its name, its head, or the square grid."""
    if layout.distilled is not None:
        return layout.distilled
    if token or any("head_dist." in n or n.startswith("distillation_class") for n in shapes):
        return True
    with_two, with_one = tokens - 2, tokens - 1
    return not _square(with_one) and _square(with_two)


def _square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number
