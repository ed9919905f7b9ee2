"""Pooling of the tokens into one vector per clip."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal
from jaxtyping import Array, Float

from aatjax.models.config import ASTConfig, Pooling
from aatjax.models.tokens import Mask, Tokens, average_tokens

EPSILON = 1e-6  # added to variances and squared lengths


class Pool(nnx.Module):
    """One vector per clip, `[b, n, d] -> [b, p]`, by `config.pool`.

    Attributes:
        prefix: number of tokens before the patches and any prompts.
        start: number of tokens before the patches.
        bands: rows of patches of equal frequency whose statistics are taken apart; 1 for all.
    """

    def __init__(self, config: ASTConfig):
        self.kind: Pooling = config.pool
        self.prefix: int = config.num_prefix
        self.start: int = config.num_prefix
        self.bands: int = config.grid[0] if config.pool == "bands" else 1

    @property
    def reads(self) -> int | None:
        """Number of first tokens that are read, or None for all."""
        return {"cls_dist": self.prefix, "cls": 1}.get(self.kind)

    def __call__(self, tokens: Tokens, mask: Mask | None = None) -> Float[Array, "b p"]:
        match self.kind:
            case "cls_dist":
                return tokens[:, : self.prefix].mean(axis=1)
            case "cls":
                return tokens[:, 0]
            case "mean_patches":
                return average_tokens(tokens, mask, self.start)
            case "mean_all":
                return average_tokens(tokens, mask)
            case "stats" | "bands":
                return self._concatenate_statistics(tokens, mask)
            case _:
                return self.weigh(tokens, mask)

    def _concatenate_statistics(self, tokens: Tokens, mask: Mask | None) -> Float[Array, "b p"]:
        batch, width = tokens.shape[0], tokens.shape[-1]
        patches = tokens[:, self.start :].reshape(batch, self.bands, -1, width)
        kept = None if mask is None else mask[:, self.start :].reshape(batch, self.bands, -1, 1)
        mean = patches.mean(axis=2, where=kept)
        variance = jnp.square(patches - mean[:, :, None]).mean(axis=2, where=kept)
        first = tokens[:, : self.prefix].mean(axis=1)
        deviation = jnp.sqrt(variance + EPSILON)
        statistics = [mean.reshape(batch, -1), deviation.reshape(batch, -1)]
        return jnp.concatenate([first, *statistics], axis=1)

    def weigh(self, tokens: Tokens, mask: Mask | None) -> Float[Array, "b p"]:
        """Pool by trained parameters."""
        raise NotImplementedError(f"{type(self).__name__} does not implement weigh")


class AttentionPool(Pool):
    """Mean of all tokens, weighted by softmax(tokens q / sqrt(d)) with a trained query q `[d]`.

    At its start, q = 0, it is the mean.
    """

    def __init__(self, config: ASTConfig, *, rngs: nnx.Rngs):
        super().__init__(config)
        self.query: nnx.Param[Array] = nnx.Param(jnp.zeros((config.dim,), jnp.float32))

    def weigh(self, tokens: Tokens, mask: Mask | None) -> Float[Array, "b p"]:
        """Return the weighted mean."""
        query = self.query[...]
        scores = tokens @ (query / jnp.sqrt(query.shape[0]))
        if mask is not None:
            scores = jnp.where(mask, scores, -jnp.inf)
        return jnp.einsum("bn,bnd->bd", jax.nn.softmax(scores, axis=1), tokens)


class PrototypePool(Pool):
    """Largest cosine similarity of the patches to each of `config.prototypes` trained vectors.

    As in the probes of arXiv 2509.24901, with real instead of binary prototypes.
    """

    def __init__(self, config: ASTConfig, *, rngs: nnx.Rngs):
        super().__init__(config)
        shape = (config.prototypes, config.dim)
        self.prototypes: nnx.Param[Array] = nnx.Param(normal(1.0)(rngs.params(), shape))

    def weigh(self, tokens: Tokens, mask: Mask | None) -> Float[Array, "b p"]:
        """Return the similarities `[b, prototypes]`."""
        patches, prototypes = tokens[:, self.start :], self.prototypes[...]
        similar = jnp.einsum("bnd,kd->bnk", _scale(patches), _scale(prototypes))
        if mask is not None:
            similar = jnp.where(mask[:, self.start :, None], similar, -1.0)
        return similar.max(axis=1)


def _scale(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Return vectors of unit length."""
    return x * jax.lax.rsqrt(jnp.square(x).sum(axis=-1, keepdims=True) + EPSILON)


def find_pool_shapes(config: ASTConfig) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Return the paths and shapes of trained pooling; empty if the pooling is not trained."""
    shapes = {"attention": ("query", (config.dim,))}
    shapes |= {"prototypes": ("prototypes", (config.prototypes, config.dim))}
    name, shape = shapes.get(config.pool, ("", ()))
    return ((f"pool/{name}", shape),) if name else ()


def make_pool(config: ASTConfig, *, rngs: nnx.Rngs) -> Pool:
    """Return the pooling of a config, with new weights where it has any."""
    match config.pool:
        case "attention":
            return AttentionPool(config, rngs=rngs)
        case "prototypes":
            return PrototypePool(config, rngs=rngs)
        case _:
            return Pool(config)
