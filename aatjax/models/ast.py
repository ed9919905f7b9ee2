"""The Audio Spectrogram Transformer (AST; Gong et al. 2021, arXiv 2104.01778) in Flax NNX.

    log-mel [b, t, f] -> PatchEmbed -> [b, n, d] -> Block, ..., Block -> LayerNorm
                                                                            |
                         logits [b, c] <- Head <- [b, p] <- Pool <----------+

Axes: clips `b`, frames `t`, mel bins `f`, tokens `n`, token width `d`, pooled
width `p`, classes `c`.

Methods of adaptation attach to submodules by path, so these names are part of the interface:
`embed`, `blocks/*`, `blocks/*/attn`, `attn/q|k|v|out`, `mlp`, `mlp/up`, `mlp/down`, `ln1`, `ln2`,
`norm`, `pool`, `head`. Nothing in this file depends on adaptation.
"""

import dataclasses
import functools
from collections.abc import Hashable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import ones, truncated_normal, zeros
from jaxtyping import Array, Float, Integer

from aatjax import ops, surgery
from aatjax.errors import UsageError, check_kind
from aatjax.models.config import ASTConfig
from aatjax.models.entry import entry
from aatjax.models.pool import Pool, make_pool
from aatjax.models.provenance import LoadedArrays, Origin
from aatjax.models.scan import run_blocks
from aatjax.models.tokens import (
    FirstTokens,
    Mask,
    Tokens,
    call_first,
    cut_mask,
    is_per_token,
)

INIT = truncated_normal(0.02)
HEAD_INIT = truncated_normal(0.01)


def make_linear(
    inputs: int, outputs: int, config: ASTConfig, *, bias: bool = True, rngs: nnx.Rngs
) -> nnx.Linear:
    """Return a linear layer of the body; it computes in the type of the config."""
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=bias,
        dtype=jnp.dtype(config.dtype),
        kernel_init=INIT,
        bias_init=zeros,
        dot_general=ops.dot_general,
        rngs=rngs,
    )


class LayerNorm(nnx.Module):
    """LayerNorm over the last axis; computes and returns float32."""

    def __init__(self, dim: int, *, epsilon: float, rngs: nnx.Rngs):
        self.epsilon = epsilon
        self.scale: nnx.Param[Array] = nnx.Param(ones(rngs.params(), (dim,), jnp.float32))
        self.bias: nnx.Param[Array] = nnx.Param(zeros(rngs.params(), (dim,), jnp.float32))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return ops.layer_norm(x, self.scale[...], self.bias[...], self.epsilon)


class PatchEmbed(nnx.Module):
    """Overlapping patches, CLS and DIST tokens, learned positions: `[b, t, f] -> [b, n, d]`.

    The spectrogram is an image whose height is frequency (lowest bin first) and whose width is
    time. Patches follow the prefix tokens, one row of equal frequency after the other: patch
    (row, column) is token `num_prefix + row * columns + column`. An input shorter than
    `config.frames` takes the positions of its own columns.
    """

    def __init__(self, config: ASTConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.proj: nnx.Conv = nnx.Conv(
            1,
            config.dim,
            config.patch,
            strides=config.stride,
            padding="VALID",
            dtype=jnp.dtype(config.dtype),
            rngs=rngs,
        )

        def draw(rows: int) -> nnx.Param[Array]:
            return nnx.Param(INIT(rngs.params(), (1, rows, config.dim), jnp.float32))

        self.cls: nnx.Param[Array] = draw(1)
        self.dist: nnx.Param[Array] | None = draw(1) if config.distilled else None
        self.pos: nnx.Param[Array] = draw(config.num_tokens)

    def __call__(self, x: Float[Array, "b t f"]) -> Tokens:
        image = jnp.swapaxes(x.astype(jnp.dtype(self.config.dtype)), 1, 2)[..., None]
        patches = self.proj(image)
        batch, rows, columns, dim = patches.shape
        prefix = [self.cls[...]] if self.dist is None else [self.cls[...], self.dist[...]]
        tokens = [jnp.broadcast_to(p, (batch, 1, dim)).astype(patches.dtype) for p in prefix]
        tokens.append(patches.reshape(batch, rows * columns, dim))
        return jnp.concatenate(tokens, axis=1) + self._positions(columns).astype(patches.dtype)

    def _positions(self, columns: int) -> Float[Array, "1 n d"]:
        pos, prefix = self.pos[...], self.config.num_prefix
        rows, all_columns = self.config.grid
        if columns == all_columns:
            return pos
        patches = pos[:, prefix:].reshape(1, rows, all_columns, -1)[:, :, :columns]
        return jnp.concatenate([pos[:, :prefix], patches.reshape(1, rows * columns, -1)], axis=1)

    def mask(self, valid: Integer[Array, " b"], frames: int | None = None) -> Mask:
        """Return which tokens hold sound: prefix tokens, and patches that begin inside the clip.

        Args:
            valid: number of frames of each clip that are not padding.
            frames: length of the input; None is `config.frames`.
        """
        config = dataclasses.replace(self.config, frames=frames or self.config.frames)
        rows, columns = config.grid
        starts = jnp.arange(columns, dtype=jnp.int32) * config.stride[1]
        inside = starts[None] < jnp.maximum(jnp.asarray(valid, jnp.int32), 1)[:, None]
        prefix = jnp.ones((valid.shape[0], config.num_prefix), bool)
        return jnp.concatenate([prefix, jnp.tile(inside, (1, rows))], axis=1)


class Attention(nnx.Module):
    """Multi-head self-attention with its output projection: `[b, n, d] -> [b, n, d]`.

    With `keeps_weights`, the weights `[b, h, n, m]` are left in `recorded_weights`.
    """

    takes_count = True

    def __init__(self, config: ASTConfig, *, rngs: nnx.Rngs):
        self.heads: int = config.heads
        self.keeps_weights: bool = False
        dim, bias = config.dim, config.qkv_bias
        self.q: nnx.Linear = make_linear(dim, dim, config, bias=bias, rngs=rngs)
        self.k: nnx.Linear = make_linear(dim, dim, config, bias=bias, rngs=rngs)
        self.v: nnx.Linear = make_linear(dim, dim, config, bias=bias, rngs=rngs)
        self.out: nnx.Linear = make_linear(dim, dim, config, rngs=rngs)

    def __call__(
        self, x: Tokens, mask: Mask | None = None, count: int | None = None
    ) -> FirstTokens:
        batch, tokens, dim = x.shape
        # A method may put learned keys and values in front of those of the tokens (prefix tuning).
        shape = (batch, -1, self.heads, dim // self.heads)
        q = self.q(x[:, :count]).reshape(shape)
        k, v = (project(x).reshape(shape) for project in (self.k, self.v))
        if mask is not None:
            learned = jnp.ones((batch, k.shape[1] - tokens), bool)
            mask = jnp.concatenate([learned, mask], axis=1)
        if self.keeps_weights:
            self.recorded_weights: nnx.Intermediate[Array] = nnx.Intermediate(
                ops.attention_weights(q, k, mask=mask)
            )
        return self.out(ops.attention(q, k, v, mask=mask).reshape(batch, -1, dim))


class Mlp(nnx.Module):
    """Down(GELU(Up x)) with the exact (erf) GELU: `[b, n, d] -> [b, n, d]`."""

    per_token = True

    def __init__(self, config: ASTConfig, *, rngs: nnx.Rngs):
        self.up: nnx.Linear = make_linear(config.dim, config.mlp_dim, config, rngs=rngs)
        self.down: nnx.Linear = make_linear(config.mlp_dim, config.dim, config, rngs=rngs)

    def __call__(self, x: Tokens, mask: Mask | None = None) -> Tokens:
        return self.down(ops.gelu(self.up(x)))


class Block(nnx.Module):
    """Pre-LayerNorm Transformer block: x = x + Attn(LN1 x), then x + MLP(LN2 x).

    With `count`, only the first `count` tokens of the output.
    """

    takes_count = True

    def __init__(self, config: ASTConfig, *, rngs: nnx.Rngs):
        self.ln1: LayerNorm = LayerNorm(config.dim, epsilon=config.eps, rngs=rngs)
        self.attn: Attention = Attention(config, rngs=rngs)
        self.ln2: LayerNorm = LayerNorm(config.dim, epsilon=config.eps, rngs=rngs)
        self.mlp: Mlp = Mlp(config, rngs=rngs)

    def __call__(
        self, x: Tokens, mask: Mask | None = None, count: int | None = None
    ) -> FirstTokens:
        read = count if is_per_token(self.mlp) else None  # tokens that the MLP reads
        u = self.ln1(x).astype(x.dtype)
        x = x[:, :read] + call_first(self.attn, u, mask, read)
        u = self.ln2(x).astype(x.dtype)
        return x[:, :count] + call_first(self.mlp, u, cut_mask(mask, read), count)


class Head(nnx.Module):
    """Classifier, `[b, p] -> [b, c]` in float32: a LayerNorm if `config.head_norm`, then linear."""

    def __init__(self, config: ASTConfig, *, rngs: nnx.Rngs):
        self.norm: LayerNorm | None = (
            LayerNorm(config.pooled_dim, epsilon=config.head_eps, rngs=rngs)
            if config.head_norm
            else None
        )
        self.linear: nnx.Linear = nnx.Linear(
            config.pooled_dim,
            config.num_classes,
            dtype=jnp.float32,
            kernel_init=HEAD_INIT,
            bias_init=zeros,
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "b p"]) -> Float[Array, "b c"]:
        with jax.named_scope("head"):
            return self.linear(x if self.norm is None else self.norm(x))


class AST(nnx.Module):
    """Audio Spectrogram Transformer: normalised log-mel `[b, t, f]` to logits `[b, c]`.

    Args:
        config: sizes and options.
        rngs: source of the initial weights (truncated normal 0.02, as in DeiT).

    Attributes:
        origin: where the backbone was loaded from.
        loaded: digests of the arrays as they were loaded.
        labels: class names of the loaded head, if known.
        statistics: mean and standard deviation of the log-mel of the pretraining data, if known.
        method: the adaptation method, once adapted.
        first_trained: index of the first block with a trained parameter; None if something before
            the blocks is trained.
    """

    def __init__(self, config: ASTConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.origin: Origin | None = None
        self.loaded: LoadedArrays | None = None
        self.labels: tuple[str, ...] | None = None
        self.statistics: tuple[float, float] | None = None
        self.method: Hashable = None
        self.first_trained: int | None = None
        self.embed: PatchEmbed = PatchEmbed(config, rngs=rngs)
        self.blocks: nnx.List[Block] = nnx.List(
            [Block(config, rngs=rngs) for _ in range(config.depth)]
        )
        self.norm: LayerNorm = LayerNorm(config.dim, epsilon=config.eps, rngs=rngs)
        self.pool: Pool = make_pool(config, rngs=rngs)
        self.head: Head = Head(config, rngs=rngs)

    def train(self, **attributes: Any) -> None:
        """Switch to training mode, as Flax does; what is frozen stays in evaluation mode."""
        super().train(**attributes)
        surgery.rest_frozen(self)

    @entry
    def __call__(
        self, x: Float[Array, "b t f"], valid: Integer[Array, " b"] | None = None
    ) -> Float[Array, "b c"]:
        """Return logits `[b, c]` in float32.

        Args:
            x: normalised log-mel `[b, config.frames, config.mels]`.
            valid: number of frames of each clip that are not padding; used only with
                `config.mask_padding`. None is all.
        """
        mask = self._mask(valid, x.shape[1] if x.ndim == 3 else None)
        return self._classify(self._embed(x, mask), mask, 0)

    @entry
    def tokens(self, x: Float[Array, "b t f"], mask: Mask | None = None) -> Tokens:
        """Return all tokens after the final LayerNorm, in float32.

        Raises:
            UsageError: the input is not `[b, config.frames, config.mels]`. With a mask it may have
                fewer frames: those that are padding in every clip can be omitted.
        """
        return self.norm(self._run_blocks(self._embed(x, mask), mask, 0, self.config.depth))

    def _embed(self, x: Float[Array, "b t f"], mask: Mask | None) -> Tokens:
        config = self.config
        shorter = mask is not None and x.ndim == 3 and config.patch[1] <= x.shape[1]
        frames = min(config.frames, x.shape[1]) if shorter else config.frames
        if x.ndim != 3 or x.shape[1:] != (frames, config.mels):
            raise UsageError(
                f"the model takes [batch, {config.frames} frames, {config.mels} mel bins], "
                f"the input is {list(x.shape)}: {self._advise(x.shape)}"
            )
        return self.embed(x)

    @entry
    def run_until(
        self, x: Float[Array, "b t f"], valid: Integer[Array, " b"] | None, block: int
    ) -> FirstTokens:
        """Return the tokens that enter a block, in the compute type.

        Of those behind the last block only the ones that are pooled.
        """
        return self._run_blocks(self.embed(x), self._mask(valid), 0, block, self._reads_at(block))

    @entry
    def run_from(
        self, tokens: Tokens, valid: Integer[Array, " b"] | None, block: int
    ) -> Float[Array, "b c"]:
        """Return the logits of tokens that enter a block; see `run_until`."""
        return self._classify(tokens, self._mask(valid), block)

    @entry
    def run_pooled(
        self, x: Float[Array, "b t f"], valid: Integer[Array, " b"] | None
    ) -> Float[Array, "b p"]:
        """Return the pooled vector, which the head reads."""
        mask = self._mask(valid)
        return self._pool(self._embed(x, mask), mask, 0)

    def _classify(self, tokens: Tokens, mask: Mask | None, block: int) -> Float[Array, "b c"]:
        """Return the logits of tokens that enter a block."""
        return self.head(self._pool(tokens, mask, block))

    def _pool(self, tokens: Tokens, mask: Mask | None, block: int) -> Float[Array, "b p"]:
        """Return the pooled vector of tokens that enter a block; computes only what it reads."""
        depth = self.config.depth
        count = self._reads_at(depth)
        tokens = self._run_blocks(tokens, mask, block, depth, count)
        return self.pool(self.norm(tokens), cut_mask(mask, count))

    def _reads_at(self, block: int) -> int | None:
        """Return how many first tokens are read of those that enter a block, or None for all."""
        return getattr(self.pool, "reads", None) if block == self.config.depth else None

    def _mask(self, valid: Integer[Array, " b"] | None, frames: int | None = None) -> Mask | None:
        if not self.config.mask_padding or valid is None:
            return None
        return self.embed.mask(valid, frames)

    def _run_blocks(
        self, x: Tokens, mask: Mask | None, start: int, end: int, count: int | None = None
    ) -> FirstTokens:
        first = self.first_trained
        return run_blocks(
            list(self.blocks)[start:end],
            x,
            mask,
            count=count,
            scan=self.config.scan,
            remat=self.config.remat,
            first_trained=first - start if first is not None and start <= first < end else None,
        )

    def _advise(self, shape: tuple[int, ...]) -> str:
        config = self.config
        if len(shape) != 3:
            return "give three axes, a single clip as [1, frames, mel bins]"
        if shape[1:] == (config.mels, config.frames):
            return "transpose the last two axes"
        if shape[2] != config.mels:
            return f"load it with mels={shape[2]} or compute {config.mels} mel bins"
        return f"load it with frames={shape[1]} or cut the input"


def make_abstract(config: ASTConfig) -> AST:
    """Return a model whose parameters are shapes, to be changed freely; nothing is computed."""
    graphdef, state = _trace_init(config)
    return nnx.merge(graphdef, state, copy=True)


@functools.lru_cache(16)
def _trace_init(config: ASTConfig) -> tuple[Any, Any]:
    # Rngs count their keys; a traced count costs 2 ms each, for some 200 parameters.
    return nnx.split(nnx.eval_shape(lambda: AST(config, rngs=cast("nnx.Rngs", _OneKey()))))


class _OneKey:
    """Stands for random keys where no value is computed: the same key each time."""

    def params(self) -> jax.Array:
        return jax.random.key(0)


def check_model(model: object, what: str) -> None:
    """Refuse what is no AST, such as the name of one.

    Raises:
        UsageError: it says where a model comes from; `what` is the function.
    """
    advice = "give an AST, from aatjax.load(...), aatjax.adapt(...) or load_adapter(...).model"
    check_kind(f"{what}: model", model, AST, advice)
