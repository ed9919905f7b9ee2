"""The configuration of an AST: sizes, patch grid, pooling, head, precision."""

import dataclasses
import math
import re
from typing import Annotated, Any, Literal

from aatjax.errors import Range, UsageError, check_fields, suggest
from aatjax.io.json_fields import check_json_fields

Pooling = Literal[
    "cls_dist",
    "mean_all",
    "mean_patches",
    "cls",
    "stats",
    "bands",
    "attention",
    "prototypes",
]
PositionInit = Literal["learned", "zeros"]
Size = Annotated[int, Range(1)]
Frames = Annotated[int, Range(1, 10**6)]
Pair = Annotated[tuple[int, int], Range(1)]

SIZES: dict[str, dict[str, int]] = {
    "tiny": dict(dim=192, depth=12, heads=3, mlp_dim=768),
    "small": dict(dim=384, depth=12, heads=6, mlp_dim=1536),
    "base": dict(dim=768, depth=12, heads=12, mlp_dim=3072),
}


MOST: dict[str, float] = {
    **{"dim": 2**16, "depth": 64, "heads": 2**10, "mlp_dim": 2**18, "mels": 2**12},
    **{"frames": 10**6, "num_classes": 10**6, "patch": 2**12, "stride": 2**12},
    "prototypes": 2**16,
    **{"eps": 0.999, "head_eps": 0.999},
}
"""The largest sizes that a file may state: more is damage, or meant to fill the memory."""

MOST_TOKENS = 10**6
SHAPE = ("dim", "depth", "heads", "mlp_dim", "patch", "stride", "mels", "frames")
"""The fields that a random model may change: `random:tiny,depth=4`."""


@dataclasses.dataclass(frozen=True)
class ASTConfig:
    """Shape of an AST (Gong et al. 2021, arXiv 2104.01778); the defaults are AST-base.

    Attributes:
        dim: token width D.
        depth: number of Transformer blocks.
        heads: attention heads; divides `dim`.
        mlp_dim: hidden width of the MLP.
        patch: patch size in (mel bins, frames).
        stride: patch stride in (mel bins, frames).
        mels: mel bins of the input.
        frames: 10 ms frames of the input.
        num_classes: outputs of the head.
        distilled: a distillation token follows CLS (AST, DeiT; a plain ViT has none).
        pool: mean of CLS and DIST (`cls_dist`; CLS alone without DIST), of all tokens
            (`mean_all`), of the patches (`mean_patches`), or the CLS token (`cls`); the mean of CLS
            and DIST beside mean and standard deviation of the patches (`stats`), or of those of
            each row of equal frequency (`bands`); or trained with the head: `attention` (a query),
            `prototypes` (similarities to some vectors). See `aatjax.models.pool`.
        prototypes: number of vectors of the pooling `prototypes`.
        head_norm: the head is LayerNorm + Linear (AST) instead of Linear alone.
        eps: epsilon of every LayerNorm of the body (timm 1e-6, Hugging Face 1e-12).
        head_eps: epsilon of the head's LayerNorm (PyTorch's default 1e-5).
        qkv_bias: the query, key and value projections have biases.
        dtype: compute type of activations; LayerNorm, softmax and logits are float32 in both.
        scan: run the blocks as one scanned body (compiles once; needs equal blocks).
        remat: recompute the activations of each block in the backward pass.
        positions: `learned` (as loaded, cut or interpolated), or `zeros`, which the published
            parameter-efficient code (arXiv 2312.03694, 2402.00828) trains on: its loader sets the
            positions to zero for every input length but that of the checkpoint.
        implementation: `fastest` on the device, or `reference`: plain operations throughout, with
            derivatives of every kind (forward mode, Hessians) and of any order.
        mask_padding: mask out patches that lie wholly in the padding of a clip: of attention
            keys, of the input of mixtures, of pooled means. Adapters that convolve along the
            tokens (conformer, convpass) still read them at the border. AST itself does not mask.
    """

    dim: Size = 768
    depth: Size = 12
    heads: Size = 12
    mlp_dim: Size = 3072
    patch: Pair = (16, 16)
    stride: Pair = (10, 10)
    mels: Size = 128
    frames: Frames = 1024
    num_classes: Size = 527
    distilled: bool = True
    pool: Pooling = "cls_dist"
    prototypes: Size = 64
    head_norm: bool = True
    eps: Annotated[float, Range(0)] = 1e-6
    head_eps: Annotated[float, Range(0)] = 1e-5
    qkv_bias: bool = True
    dtype: Literal["float32", "bfloat16"] = "float32"
    scan: bool = False
    remat: bool = False
    positions: PositionInit = "learned"
    mask_padding: bool = False
    implementation: Literal["fastest", "reference"] = "fastest"

    def __post_init__(self) -> None:
        check_fields(self, "model ")
        if self.dim % self.heads:
            raise UsageError(f"model dim={self.dim} is not a multiple of heads={self.heads}")
        if self.mels < self.patch[0] or self.frames < self.patch[1]:
            raise UsageError(
                f"input of {self.mels} mel bins x {self.frames} frames is smaller than one patch "
                f"of {self.patch[0]} x {self.patch[1]}: give more frames"
            )
        if self.num_tokens > MOST_TOKENS:
            raise UsageError(
                f"model: {self.num_tokens} tokens of {self.mels} mel bins x {self.frames} "
                f"frames, at most {MOST_TOKENS} are possible"
            )

    @classmethod
    def size(cls, name: str, **changes: Any) -> "ASTConfig":
        """Return the published `tiny`, `small` or `base` size with some fields changed."""
        if name not in SIZES:
            hint = suggest(name, SIZES) or f": one of {', '.join(SIZES)}"
            raise UsageError(f"unknown model size {name!r}{hint}")
        return cls(**{**SIZES[name], **changes})

    @classmethod
    def from_text(cls, text: str) -> "ASTConfig":
        """Return the shape that `random:` names: `base`, or changed, `tiny,depth=4,stride=16`.

        `d128x4` is a width of 128 and 4 blocks, with heads of width 32 and an MLP four times as
        wide; a patch or stride may be oblong, `patch=128x4` mel bins by frames.

        Raises:
            UsageError: an unknown size or field, or a value that is no whole number.
        """
        size, *changes = text.split(",")
        fields: dict[str, Any] = {}
        if shape := re.fullmatch(r"d([1-9]\d{0,4})x([1-9]\d?)", size):
            dim, depth = map(int, shape.groups())
            if dim % 32 or dim > MOST["dim"] or depth > MOST["depth"]:
                raise UsageError(
                    f"random:{text}: the width {dim} must be a multiple of 32, at most "
                    f"{MOST['dim']}, and the depth {depth} at most {MOST['depth']}"
                )
            size = "tiny"
            fields = {"dim": dim, "depth": depth, "heads": dim // 32, "mlp_dim": 4 * dim}
        for change in changes:
            name, _, value = change.partition("=")
            if name not in SHAPE:
                hint = suggest(name, SHAPE) or f" (there are {', '.join(SHAPE)})"
                raise UsageError(f"random:{text}: a model has no size {name!r}{hint}")
            pair = name in ("patch", "stride")
            numbers = value.split("x") if pair and value.count("x") == 1 else [value]
            if not all(number.isascii() and number.isdigit() for number in numbers):
                oblong = ", or two such as 128x4" if pair else ""
                raise UsageError(f"random:{text}: {name}={value!r} is not a whole number{oblong}")
            if any(len(number) > 9 or int(number) > MOST[name] for number in numbers):
                raise UsageError(f"random:{text}: {name} is at most {MOST[name]}")
            both = (int(numbers[0]), int(numbers[-1]))
            fields[name] = both if pair else both[0]
        return cls.size(size, **fields)

    @property
    def grid(self) -> tuple[int, int]:
        """Patch rows (frequency) and columns (time)."""
        rows = (self.mels - self.patch[0]) // self.stride[0] + 1
        columns = (self.frames - self.patch[1]) // self.stride[1] + 1
        return rows, columns

    @property
    def num_prefix(self) -> int:
        """Tokens before the patches: CLS and, if distilled, DIST."""
        return 2 if self.distilled else 1

    @property
    def num_tokens(self) -> int:
        """Length of the token sequence, prefix tokens included."""
        return self.num_prefix + math.prod(self.grid)

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled vector, which the head reads."""
        match self.pool:
            case "stats":
                return 3 * self.dim
            case "bands":
                return (1 + 2 * self.grid[0]) * self.dim
            case "prototypes":
                return self.prototypes
            case _:
                return self.dim

    @property
    def pooling(self) -> tuple[int, str | None]:
        """What weights of a head depend on: the width that it reads, and trained pooling."""
        return self.pooled_dim, self.pool if self.pool in ("attention", "prototypes") else None

    def without_execution(self) -> "ASTConfig":
        """Return the config with the options that change no result at their defaults."""
        return dataclasses.replace(self, scan=False, remat=False, implementation="fastest")

    def to_json(self) -> dict[str, Any]:
        """Return a plain dictionary that `from_json` reads."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "ASTConfig":
        """Rebuild a config from `to_json`.

        Raises:
            UsageError: an unknown field, or a value of the wrong type or size.
        """
        check_json_fields("model", fields, cls, most=MOST)
        pairs = {name: tuple(fields[name]) for name in ("patch", "stride") if name in fields}
        return cls(**{**fields, **pairs})
