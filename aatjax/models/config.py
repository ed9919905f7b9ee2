"""What an Audio Spectrogram Transformer is made of: sizes, patch grid, pooling, head, precision."""

import dataclasses
from typing import Any, Literal

from aatjax.errors import UsageError

Pool = Literal["cls_dist", "mean_all", "mean_patches", "cls"]
Positions = Literal["learned", "zeros"]

SIZES: dict[str, dict[str, int]] = {
    "tiny": dict(dim=192, depth=12, heads=3, mlp_dim=768),
    "small": dict(dim=384, depth=12, heads=6, mlp_dim=1536),
    "base": dict(dim=768, depth=12, heads=12, mlp_dim=3072),
}


@dataclasses.dataclass(frozen=True)
class ASTConfig:
    """Shape of an AST (Gong et al., "AST: Audio Spectrogram Transformer", 2021).

    Attributes:
        dim: width D of a token.
        depth: number of Transformer blocks.
        heads: attention heads; `dim` must be a multiple.
        mlp_dim: hidden width of the MLP.
        patch: patch size in (mel bins, frames).
        stride: patch stride in (mel bins, frames).
        mels: mel bins of the input.
        frames: 10 ms frames of the input.
        num_classes: outputs of the head.
        distilled: whether a distillation token follows CLS (AST, DeiT) or not (plain ViT).
        pool: `cls_dist` averages CLS and DIST (just CLS without a distillation token),
            `mean_all` averages every token, `mean_patches` the patches, `cls` takes CLS.
        head_norm: whether the head is LayerNorm + Linear (AST) or Linear alone.
        eps: epsilon of every LayerNorm of the body (timm 1e-6, Hugging Face 1e-12).
        head_eps: epsilon of the head's LayerNorm (PyTorch default 1e-5).
        qkv_bias: whether the query, key and value projections have biases.
        dtype: compute type of activations, "float32" or "bfloat16"; LayerNorm, softmax and
            logits are float32 either way.
        scan: run the blocks as one scanned body (compiles once, needs equal blocks).
        remat: recompute each block's activations in the backward pass.
        positions: `learned` (as loaded, cut or interpolated) or `zeros`: what the published
            parameter-efficient code (arXiv 2312.03694, 2402.00828) trains on, whose loader zeroes
            the positions of every input length but the checkpoint's own.
        mask_padding: patches that lie wholly in the padding of a clip are seen by nobody: they
            are no keys of the attention, no input of mixtures, no part of pooled means. Adapters
            that convolve along the tokens (conformer, convpass) still hear them at the edge. AST
            itself does not mask.
    """

    dim: int = 768
    depth: int = 12
    heads: int = 12
    mlp_dim: int = 3072
    patch: tuple[int, int] = (16, 16)
    stride: tuple[int, int] = (10, 10)
    mels: int = 128
    frames: int = 1024
    num_classes: int = 527
    distilled: bool = True
    pool: Pool = "cls_dist"
    head_norm: bool = True
    eps: float = 1e-6
    head_eps: float = 1e-5
    qkv_bias: bool = True
    dtype: Literal["float32", "bfloat16"] = "float32"
    scan: bool = False
    remat: bool = False
    positions: Positions = "learned"
    mask_padding: bool = False

    def __post_init__(self) -> None:
        for name in ("dim", "depth", "heads", "mlp_dim", "num_classes"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} must be at least 1")
        if self.dim % self.heads:
            raise UsageError(f"dim={self.dim} is not a multiple of heads={self.heads}")
        if min(*self.patch, *self.stride) < 1:
            raise UsageError(f"patch={self.patch} and stride={self.stride} must be at least 1")
        if self.mels < self.patch[0] or self.frames < self.patch[1]:
            raise UsageError(
                f"input of {self.mels} mel bins x {self.frames} frames is smaller than one patch "
                f"of {self.patch[0]} x {self.patch[1]}: give more frames"
            )
        if self.pool not in ("cls_dist", "mean_all", "mean_patches", "cls"):
            raise UsageError(
                f"pool={self.pool!r} is not one of cls_dist, mean_all, mean_patches, cls"
            )
        if self.positions not in ("learned", "zeros"):
            raise UsageError(f"positions={self.positions!r} is neither learned nor zeros")
        if self.dtype not in ("float32", "bfloat16"):
            raise UsageError(f"dtype={self.dtype!r} is neither float32 nor bfloat16")

    @classmethod
    def size(cls, name: str, **changes: Any) -> "ASTConfig":
        """The published `tiny`, `small` or `base` size, with fields changed by keyword."""
        if name not in SIZES:
            raise UsageError(f"unknown model size {name!r}: one of {', '.join(SIZES)}")
        fields: dict[str, Any] = {**SIZES[name], **changes}
        return cls(**fields)

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
        """Length of the token sequence."""
        rows, columns = self.grid
        return self.num_prefix + rows * columns

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary that `from_json` reads."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "ASTConfig":
        """Rebuilds a config from `to_json`; unknown fields raise UsageError."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise UsageError(f"unknown model fields {', '.join(unknown)}")
        pairs = {name: tuple(fields[name]) for name in ("patch", "stride") if name in fields}
        return cls(**{**fields, **pairs})
