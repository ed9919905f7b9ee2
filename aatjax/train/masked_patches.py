"""Masked patch modelling, to pretrain a backbone on sounds without labels (arXiv 2110.09784)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import truncated_normal
from jaxtyping import Array, Float, Int

from aatjax import surgery
from aatjax.errors import UsageError
from aatjax.models.ast import AST
from aatjax.models.config import ASTConfig
from aatjax.models.tokens import Mask, Tokens

RECONSTRUCTION = 10.0  # weight of the squared error beside the contrast, as in SSAST
SHARE = 0.6
EPSILON = 1e-6


class MaskedEmbed(nnx.Module):
    """The embedding, with patches of each clip replaced by a trained vector.

    The places are drawn in each training step, and the same in every evaluation.

    Attributes:
        share: of the patches that is masked.
        targets: the masked patches of the last input, and `places`, where they are.
    """

    def __init__(self, base: nnx.Module, config: ASTConfig, share: float, *, rngs: nnx.Rngs):
        self.base = base
        self.config: ASTConfig = config
        patches = config.grid[0] * config.grid[1]
        self.count: int = max(1, round(share * patches))
        self.deterministic: bool = True
        self.rngs: nnx.RngStream = rngs.masks.fork()
        self.vector: nnx.Param[Array] = nnx.Param(
            truncated_normal(0.02)(rngs.params(), (config.dim,), jnp.float32)
        )

    def __call__(self, x: Float[Array, "b t f"]) -> Tokens:
        config = self.config
        tokens, blank = self.base(x), self.base(jnp.zeros_like(x[:1]))
        key = jax.random.key(0) if self.deterministic else self.rngs()
        start = config.num_prefix
        draws = jax.random.uniform(key, (x.shape[0], tokens.shape[1] - start))
        places = jnp.argsort(draws, axis=1)[:, : self.count]
        clips = jnp.arange(len(x))[:, None]
        hidden = jnp.zeros(draws.shape, bool).at[clips, places].set(True)
        hidden = jnp.concatenate([jnp.zeros((len(x), start), bool), hidden], axis=1)
        self.places: nnx.Intermediate[Array] = nnx.Intermediate(places)
        self.targets: nnx.Intermediate[Array] = nnx.Intermediate(cut_patches(x, config, places))
        replaced = blank + self.vector[...].astype(tokens.dtype)[None, None]
        return jnp.where(hidden[..., None], replaced, tokens)


class MaskedHead(nnx.Module):
    """Loss per clip from the tokens, `[b, n, d] -> [b, 1]`, in place of the pooling.

    The contrast (InfoNCE) tells each masked patch from the others of its clip, the reconstruction
    is the mean squared error (SSAST, sec. 2.3, equations 1 and 2).
    """

    def __init__(self, source: MaskedEmbed, config: ASTConfig, *, rngs: nnx.Rngs):
        self.source = source
        self.start: int = config.num_prefix
        pixels = config.patch[0] * config.patch[1]
        self.reconstruct: nnx.Linear = nnx.Linear(config.dim, pixels, rngs=rngs)
        self.contrast: nnx.Linear = nnx.Linear(config.dim, pixels, rngs=rngs)

    def __call__(self, tokens: Tokens, mask: Mask | None = None) -> Float[Array, "b 1"]:
        places, targets = self.source.places[...], self.source.targets[...]
        hidden = jnp.take_along_axis(tokens[:, self.start :], places[..., None], axis=1)
        error = jnp.square(self.reconstruct(hidden) - targets).mean(axis=(1, 2))
        scores = jnp.einsum("bmp,bkp->bmk", self.contrast(hidden), targets)
        right = jnp.diagonal(jax.nn.log_softmax(scores, axis=2), axis1=1, axis2=2)
        return (RECONSTRUCTION * error - right.mean(axis=1))[:, None]


class LossHead(nnx.Module):
    """Hands the loss on as the logits of every class."""

    def __init__(self, classes: int):
        self.classes: int = classes

    def __call__(self, losses: Float[Array, "b 1"]) -> Float[Array, "b c"]:
        return jnp.broadcast_to(losses, (losses.shape[0], self.classes))


def cut_patches(
    x: Float[Array, "b t f"], config: ASTConfig, places: Int[Array, "b m"]
) -> Float[Array, "b m p"]:
    """Return some patches of log-mel, each of mean 0 and variance 1."""
    columns = config.grid[1]
    (height, width), (down, right) = config.patch, config.stride
    low = (places // columns * down)[..., None] + jnp.arange(height)[None, None]
    first = (places % columns * right)[..., None] + jnp.arange(width)[None, None]
    clips = jnp.arange(x.shape[0])[:, None, None, None]
    patches = x[clips, first[:, :, None, :], low[:, :, :, None]]
    flat = patches.reshape(*places.shape, height * width).astype(jnp.float32)
    centred = flat - flat.mean(axis=2, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=2, keepdims=True) + EPSILON)


def mask_patches(model: AST, *, share: float = SHARE, seed: int = 0) -> AST:
    """Return a copy of a model, all of it trained, whose logits are its loss on masked patches.

    Train it with `read_loss`, then take the arrays of its body.

    Raises:
        UsageError: its patches overlap, so that a masked patch could be copied from its neighbours.
    """
    config = model.config
    if any(step < size for step, size in zip(config.stride, config.patch, strict=True)):
        raise UsageError(
            f"masked patches: patches of {config.patch} at a stride of {config.stride} overlap, so "
            "that a masked one shows in its neighbours: give a stride as large as the patch"
        )
    masked = surgery.clone(model)
    rngs = nnx.Rngs(params=seed, masks=seed)
    embed = MaskedEmbed(masked.embed, config, share, rngs=rngs)
    anything: Any = masked
    anything.embed, anything.pool = embed, MaskedHead(embed, config, rngs=rngs)
    anything.head = LossHead(config.num_classes)
    surgery.unfreeze(masked, "**")
    masked.first_trained = None
    masked.eval()
    return masked


def read_loss(logits: Float[Array, "b c"], target: Float[Array, "b c"]) -> Float[Array, " b"]:
    """Return the loss that the model of `mask_patches` hands on; the labels do not matter."""
    return logits[:, 0] + 0.0 * target[:, 0]
