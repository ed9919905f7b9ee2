"""The Audio Spectrogram Transformer (Gong et al. 2021, arXiv 2104.01778) as Flax NNX modules.

Submodules carry the names that adaptation methods attach to: `embed`, `blocks/*`, `blocks/*/attn`,
`attn/q|k|v|out`, `mlp`, `mlp/up`, `mlp/down`, `ln1`, `ln2`, `norm`, `pool`, `head`. A model does
not know that it will be adapted. `embed`, the blocks and their sub-layers take a mask of the tokens
that hold sound, or None where all do.
"""

import dataclasses
from collections.abc import Hashable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import ones, truncated_normal, zeros
from jaxtyping import Array, Bool, Float, Integer

from aatjax import ops
from aatjax.errors import UsageError
from aatjax.models.config import ASTConfig
from aatjax.models.provenance import Origin
from aatjax.models.scan import call_masked, run_blocks

WEIGHT = truncated_normal(0.02)
HEAD_WEIGHT = truncated_normal(0.01)

__all__ = ["AST", "ASTConfig", "Attention", "Block", "Head", "Mlp", "PatchEmbed", "Pool"]


def _linear(
    inputs: int, outputs: int, config: ASTConfig, *, bias: bool = True, rngs: nnx.Rngs
) -> nnx.Linear:
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=bias,
        dtype=jnp.dtype(config.dtype),
        kernel_init=WEIGHT,
        bias_init=zeros,
        dot_general=ops.dot_general,
        rngs=rngs,
    )


class LayerNorm(nnx.Module):
    """LayerNorm over the last axis, float32 out whatever comes in: `ops.layer_norm`."""

    def __init__(self, dim: int, *, epsilon: float, rngs: nnx.Rngs):
        self.epsilon = epsilon
        self.scale = nnx.Param(ones(rngs.params(), (dim,)))
        self.bias = nnx.Param(zeros(rngs.params(), (dim,)))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return ops.layer_norm(x, self.scale[...], self.bias[...], self.epsilon)


def _layer_norm(config: ASTConfig, eps: float, rngs: nnx.Rngs) -> LayerNorm:
    return LayerNorm(config.dim, epsilon=eps, rngs=rngs)


class PatchEmbed(nnx.Module):
    """Overlapping patches, CLS and DIST tokens, learned positions.

    Height is frequency (lowest bin first), width is time; patches are flattened frequency-major:
    token index = row * columns + column, after the prefix tokens. An input shorter than
    `config.frames` has the positions of its own columns.
    """

    def __init__(self, config: ASTConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.proj = nnx.Conv(
            1,
            config.dim,
            config.patch,
            strides=config.stride,
            padding="VALID",
            dtype=jnp.dtype(config.dtype),
            rngs=rngs,
        )
        self.cls = nnx.Param(WEIGHT(rngs.params(), (1, 1, config.dim)))
        self.dist = (
            nnx.Param(WEIGHT(rngs.params(), (1, 1, config.dim))) if config.distilled else None
        )
        self.pos = nnx.Param(WEIGHT(rngs.params(), (1, config.num_tokens, config.dim)))

    def __call__(self, x: Float[Array, "b t f"]) -> Float[Array, "b n d"]:
        image = jnp.swapaxes(x, 1, 2)[..., None]
        patches = self.proj(image)
        batch, rows, columns, dim = patches.shape
        patches = patches.reshape(batch, rows * columns, dim)
        prefix = [self.cls[...]] if self.dist is None else [self.cls[...], self.dist[...]]
        tokens = [jnp.broadcast_to(p, (batch, 1, dim)).astype(patches.dtype) for p in prefix]
        return jnp.concatenate([*tokens, patches], axis=1) + self._positions(columns).astype(
            patches.dtype
        )

    def _positions(self, columns: int) -> Float[Array, "1 n d"]:
        pos, prefix = self.pos[...], self.config.num_prefix
        rows, every = self.config.grid
        if columns == every:
            return pos
        patches = pos[:, prefix:].reshape(1, rows, every, -1)[:, :, :columns]
        return jnp.concatenate([pos[:, :prefix], patches.reshape(1, rows * columns, -1)], axis=1)

    def mask(self, valid: Integer[Array, " b"], frames: int | None = None) -> Bool[Array, "b n"]:
        """Which tokens hold sound in clips of `valid` frames: prefixes, patches that reach in.

        Args:
            valid: frames of each clip that are sound.
            frames: length of the input; None is `config.frames`.
        """
        config = dataclasses.replace(self.config, frames=frames or self.config.frames)
        rows, columns = config.grid
        starts = jnp.arange(columns) * config.stride[1]
        sounding = starts[None] < jnp.maximum(valid, 1)[:, None]
        prefix = jnp.ones((valid.shape[0], config.num_prefix), bool)
        return jnp.concatenate([prefix, jnp.tile(sounding, (1, rows))], axis=1)


class Attention(nnx.Module):
    """Multi-head self-attention with its output projection: `[b, n, d] -> [b, n, d]`."""

    def __init__(self, config: ASTConfig, *, rngs: nnx.Rngs):
        self.heads = config.heads
        bias = config.qkv_bias
        self.q = _linear(config.dim, config.dim, config, bias=bias, rngs=rngs)
        self.k = _linear(config.dim, config.dim, config, bias=bias, rngs=rngs)
        self.v = _linear(config.dim, config.dim, config, bias=bias, rngs=rngs)
        self.out = _linear(config.dim, config.dim, config, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None = None
    ) -> Float[Array, "b n d"]:
        batch, tokens, dim = x.shape
        # Keys and values may be more than the tokens: a method may put some in front.
        shape = (batch, -1, self.heads, dim // self.heads)
        q, k, v = (project(x).reshape(shape) for project in (self.q, self.k, self.v))
        if mask is not None:
            more = k.shape[1] - tokens
            mask = jnp.concatenate([jnp.ones((batch, more), bool), mask], axis=1)
        return self.out(ops.attention(q, k, v, mask=mask).reshape(batch, tokens, dim))


class Mlp(nnx.Module):
    """FC2(GELU(FC1 x)) with the exact (erf) GELU: `[b, n, d] -> [b, n, d]`."""

    def __init__(self, config: ASTConfig, *, rngs: nnx.Rngs):
        self.up = _linear(config.dim, config.mlp_dim, config, rngs=rngs)
        self.down = _linear(config.mlp_dim, config.dim, config, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None = None
    ) -> Float[Array, "b n d"]:
        return self.down(ops.gelu(self.up(x)))


class Block(nnx.Module):
    """Pre-LayerNorm Transformer block: x + Attn(LN1 x), then x + MLP(LN2 x)."""

    def __init__(self, config: ASTConfig, *, rngs: nnx.Rngs):
        self.ln1 = _layer_norm(config, config.eps, rngs)
        self.attn = Attention(config, rngs=rngs)
        self.ln2 = _layer_norm(config, config.eps, rngs)
        self.mlp = Mlp(config, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None = None
    ) -> Float[Array, "b n d"]:
        x = x + call_masked(self.attn, self.ln1(x).astype(x.dtype), mask)
        return x + call_masked(self.mlp, self.ln2(x).astype(x.dtype), mask)


class Pool(nnx.Module):
    """One vector a clip, `[b, n, d] -> [b, d]`, by `config.pool`."""

    def __init__(self, config: ASTConfig):
        self.kind, self.prefix = config.pool, config.num_prefix

    def __call__(
        self, tokens: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None = None
    ) -> Float[Array, "b d"]:
        match self.kind:
            case "cls_dist":
                return tokens[:, : self.prefix].mean(axis=1)
            case "cls":
                return tokens[:, 0]
            case "mean_patches":
                return average_tokens(tokens, mask, self.prefix)
            case _:
                return average_tokens(tokens, mask)


def average_tokens(
    tokens: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None, start: int = 0
) -> Float[Array, "b d"]:
    """Mean of the tokens from `start` on, those outside the mask left out."""
    if mask is None:
        return tokens[:, start:].mean(axis=1)
    return tokens[:, start:].mean(axis=1, where=mask[:, start:, None])


class Head(nnx.Module):
    """Classifier on the pooled vector, `[b, d] -> [b, c]` in float32; LayerNorm first if asked."""

    def __init__(self, config: ASTConfig, *, rngs: nnx.Rngs):
        self.norm = _layer_norm(config, config.head_eps, rngs) if config.head_norm else None
        self.linear = nnx.Linear(
            config.dim,
            config.num_classes,
            dtype=jnp.float32,
            kernel_init=HEAD_WEIGHT,
            bias_init=zeros,
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b c"]:
        with jax.named_scope("head"):
            return self.linear(x if self.norm is None else self.norm(x))


class AST(nnx.Module):
    """Audio Spectrogram Transformer: normalised log-mel `[b, t, f]` to logits `[b, c]`.

    Args:
        config: the model's shape.
        rngs: source of the initial weights (truncated normal 0.02 as in DeiT).

    Attributes:
        origin: where the backbone came from, once it was loaded.
        labels: class names of a head that was loaded.
        statistics: mean and standard deviation of the log-mel that it was trained on, if known.
        method: what adapted the model, if anything did.
        first_trained: the first block that has a trained parameter, where nothing below has one.
    """

    def __init__(self, config: ASTConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.origin: Origin | None = None
        self.labels: tuple[str, ...] | None = None
        self.statistics: tuple[float, float] | None = None
        self.method: Hashable = None
        self.first_trained: int | None = None
        self.embed = PatchEmbed(config, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.depth)])
        self.norm = _layer_norm(config, config.eps, rngs)
        self.pool = Pool(config)
        self.head = Head(config, rngs=rngs)

    def tokens(
        self, x: Float[Array, "b t f"], mask: Bool[Array, "b n"] | None = None
    ) -> Float[Array, "b n d"]:
        """All tokens after the final LayerNorm, float32.

        Raises:
            UsageError: the input is not `[b, config.frames, config.mels]`. Where padding is masked
                it may be shorter: frames that nobody sees need not be there.
        """
        config = self.config
        shorter = mask is not None and x.ndim == 3 and config.patch[1] <= x.shape[1]
        frames = min(config.frames, x.shape[1]) if shorter else config.frames
        if x.ndim != 3 or x.shape[1:] != (frames, config.mels):
            raise UsageError(
                f"the model takes [batch, {config.frames} frames, {config.mels} mel bins], "
                f"the input is {list(x.shape)}: {self._advice(x.shape)}"
            )
        return self.norm(self._run(self._embedded(x), mask, 0, config.depth))

    def run_until(
        self, x: Float[Array, "b t f"], valid: Integer[Array, " b"] | None, start: int
    ) -> Float[Array, "b n d"]:
        """The tokens that enter block `start`, in the compute type; see `after`."""
        return self._run(self._embedded(x), self._mask(valid), 0, start)

    def run_from(
        self, tokens: Float[Array, "b n d"], valid: Integer[Array, " b"] | None, start: int
    ) -> Float[Array, "b c"]:
        """Logits from the tokens that enter block `start`: `after(before(x))` is `__call__(x)`."""
        mask = self._mask(valid)
        tokens = self._run(tokens, mask, start, self.config.depth)
        return self.head(self.pool(self.norm(tokens), mask))

    def _embedded(self, x: Float[Array, "b t f"]) -> Float[Array, "b n d"]:
        return self.embed(x.astype(jnp.dtype(self.config.dtype)))

    def _run(
        self, x: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None, start: int, end: int
    ) -> Float[Array, "b n d"]:
        config = self.config
        if start == end:
            return x
        first = self.first_trained
        return run_blocks(
            list(self.blocks)[start:end],
            x,
            mask,
            scan=config.scan,
            remat=config.remat,
            first_trained=first - start if first is not None and start <= first < end else None,
        )

    def _mask(
        self, valid: Integer[Array, " b"] | None, frames: int | None = None
    ) -> Bool[Array, "b n"] | None:
        """Which tokens hold sound, where the config asks for that."""
        if not self.config.mask_padding or valid is None:
            return None
        return self.embed.mask(valid, frames)

    def _advice(self, shape: tuple[int, ...]) -> str:
        config = self.config
        if len(shape) != 3:
            return "give three axes, a single clip as [1, frames, mel bins]"
        if shape[1:] == (config.mels, config.frames):
            return "transpose the last two axes"
        if shape[2] != config.mels:
            return f"load it with mels={shape[2]} or compute {config.mels} mel bins"
        return f"load it with frames={shape[1]} or cut the input"

    def __call__(
        self, x: Float[Array, "b t f"], valid: Integer[Array, " b"] | None = None
    ) -> Float[Array, "b c"]:
        """Logits `[b, c]` in float32 of normalised log-mel `[b, t, f]`.

        Args:
            x: the clips.
            valid: frames of each clip that are sound and not padding; only looked at with
                `config.mask_padding`. None means all.
        """
        mask = self._mask(valid, x.shape[1] if x.ndim == 3 else None)
        return self.head(self.pool(self.tokens(x, mask), mask))
