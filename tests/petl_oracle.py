"""An AST with any adaptation method in float64 NumPy, written from the formulas of the papers.

Nothing of aatjax is imported: the paths of the parameters say what a model contains, the fields of
the method what is computed. Loops where they are the plainest form.
"""

import math
from typing import Any

import numpy as np
from scipy.special import erf

Parameters = dict[str, np.ndarray]


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def softmax(x: np.ndarray, axis: Any = -1) -> np.ndarray:
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


class Oracle:
    """Logits of one model; `penalty` holds what the method adds to the loss.

    Args:
        parameters: every parameter and statistic by path.
        config: the model's config (sizes, pooling, epsilons).
        methods: the methods on the model, for what the parameters do not show.
        training: BatchNorm by the batch instead of by its statistics.
        valid: sounding frames of each clip, if padding is masked.
    """

    def __init__(
        self,
        parameters: Any,
        config: Any,
        methods: tuple[Any, ...],
        *,
        training: bool = False,
        valid: np.ndarray | None = None,
    ):
        self.w: Parameters = {p: np.asarray(v, np.float64) for p, v in parameters.items()}
        self.config, self.training, self.valid = config, training, valid
        self.methods = {method.name: method for method in methods}
        self.penalty = 0.0

    def has(self, path: str) -> bool:
        return any(p.startswith(path) for p in self.w)

    def field(self, method: str, name: str, default: Any = None) -> Any:
        return getattr(self.methods.get(method), name, default)

    # ---------------------------------------------------------------------- pieces

    def norm(self, path: str, x: np.ndarray, eps: float) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        variance = (centred**2).mean(-1, keepdims=True)
        unit = centred / np.sqrt(variance + eps)
        return unit * self.w[f"{path}/scale"] + self.w[f"{path}/bias"]

    def linear(self, path: str, x: np.ndarray) -> np.ndarray:
        y = x @ self.w[f"{path}/kernel"] + self.w[f"{path}/bias"]
        if f"{path}/lora_a" in self.w:
            lora = self.methods["lora"]
            rank = self.w[f"{path}/lora_a"].shape[1]
            published = lora.as_published or lora.scale == "alpha/reduction"
            scale = lora.alpha / ((lora.reduction or 128) if published else rank)
            y = y + scale * (x @ self.w[f"{path}/lora_a"] @ self.w[f"{path}/lora_b"])
        if f"{path}/prefix" in self.w:
            rows = np.repeat(self.w[f"{path}/prefix"], x.shape[0], axis=0)
            y = np.concatenate([rows, y], axis=1)
        return y

    def adapter(self, path: str, z: np.ndarray, published: bool) -> np.ndarray:
        """A bottleneck, conformer or convpass block on tokens [b, n, d]."""
        w = {p.removeprefix(f"{path}/"): v for p, v in self.w.items() if p.startswith(f"{path}/")}
        if "w_in" in w:
            if "norm/scale" in w and not published:
                z = self.norm(f"{path}/norm", z, 1e-5)
            both = z @ w["w_in"] + w["b_in"]
            width = both.shape[-1] // 2
            gated = both[..., :width] * sigmoid(both[..., width:])
            before = (len(w["w_conv"]) - 1) // 2
            padded = np.pad(gated, ((0, 0), (before, len(w["w_conv"])), (0, 0)))
            tokens = z.shape[1]
            mixed = w["b_conv"] + sum(
                row * padded[:, j : j + tokens] for j, row in enumerate(w["w_conv"])
            )
            mean, var = w["batch_norm/mean"], w["batch_norm/var"]
            if self.training:
                mean, var = mixed.mean(axis=(0, 1)), mixed.var(axis=(0, 1))
            unit = (mixed - mean) / np.sqrt(var + 1e-5)
            unit = unit * w["batch_norm/scale"] + w["batch_norm/bias"]
            return unit * sigmoid(unit) @ w["w_out"] + w["b_out"]
        hidden = z @ w["w_down"] + w["b_down"]
        if "w_conv" not in w:
            return gelu(hidden) @ w["w_up"] + w["b_up"]
        hidden = hidden * sigmoid(1.702 * hidden)
        if not published:
            padded = np.pad(hidden, ((0, 0), (1, 1), (0, 0)))
            tokens = z.shape[1]
            hidden = w["b_conv"] + sum(
                padded[:, j : j + tokens] @ rows for j, rows in enumerate(w["w_conv"])
            )
        return hidden * sigmoid(1.702 * hidden) @ w["w_up"] + w["b_up"]

    def expert(self, path: str, number: int, z: np.ndarray, published: bool) -> np.ndarray:
        if f"{path}/w_down" in self.w:
            down, b_down, up, b_up = (
                self.w[f"{path}/{name}"][number] for name in ("w_down", "b_down", "w_up", "b_up")
            )
            return gelu(z @ down + b_down) @ up + b_up
        return self.adapter(f"{path}/blocks/{number}", z, published)

    def soft_mixture(self, path: str, x: np.ndarray, mask: np.ndarray) -> np.ndarray:
        published = self.field("soft_moa", "as_published", False)
        phi = self.w[f"{path}/phi"]
        experts, slots = phi.shape[1:]
        keys = x
        if f"{path}/scale" in self.w:
            phi = phi / np.sqrt((phi**2).sum(axis=0) + 1e-6) * self.w[f"{path}/scale"]
            keys = x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)
        out = np.zeros_like(x)
        for clip, tokens in enumerate(x):
            here = np.flatnonzero(mask[clip])
            scores = np.einsum("nd,dep->nep", keys[clip, here], phi)
            read = softmax(scores.reshape(len(here), -1))
            answers = []
            for e in range(experts):
                own = [softmax(scores[:, e, p]) @ tokens[here] for p in range(slots)]
                answers += list(self.expert(path, e, np.array(own)[None], published)[0])
            out[clip, here] = read @ np.array(answers)
        return out + self.adapter(f"{path}/shared", x, False) if self.has(f"{path}/shared") else out

    def look_aside(self, path: str, x: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Convolutions along time, then along frequency; other tokens have no neighbours."""
        rows, columns = self.config.grid
        first = x.shape[1] - rows * columns
        down, up = self.w[f"{path}/w_down"], self.w[f"{path}/w_up"]
        before = (len(down) - 1) // 2

        def convolve(z: np.ndarray, taps: np.ndarray, step: tuple[int, int]) -> np.ndarray:
            out = z @ taps[before]
            for row, column in np.ndindex(rows, columns):
                for j in range(len(taps)):
                    i, k = (
                        at + (j - before) * by for at, by in zip((row, column), step, strict=True)
                    )
                    if j != before and 0 <= i < rows and 0 <= k < columns:
                        other = z[:, first + i * columns + k]
                        out[:, first + row * columns + column] += other @ taps[j]
            return out

        hidden = convolve(x * mask[..., None], down, (0, 1)) + self.w[f"{path}/b_down"]
        return convolve(gelu(hidden), up, (1, 0)) + self.w[f"{path}/b_up"]

    def gated_mixture(self, path: str, x: np.ndarray, mask: np.ndarray) -> np.ndarray:
        published = self.field("dense_moa", "as_published", False)
        gates = softmax(x @ self.w[f"{path}/w_router"] + self.w[f"{path}/b_router"])
        top = self.field("top_k_moa", "top")
        if top is not None:
            chosen = np.zeros_like(gates)
            for clip, token in np.ndindex(gates.shape[:2]):
                chosen[clip, token, np.argsort(gates[clip, token])[-top:]] = 1
            share = chosen[mask].mean(axis=0) / top
            balance = self.field("top_k_moa", "balance")
            self.penalty += balance * len(share) * (share * gates[mask].mean(axis=0)).sum()
            gates = gates * chosen
            gates = gates / gates.sum(-1, keepdims=True)
        gates = gates * mask[..., None]
        return sum(
            gates[..., e, None] * self.expert(path, e, x, published) for e in range(gates.shape[-1])
        )

    # ---------------------------------------------------------------------- the model

    def beside(self, site: str, u: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """The sum of the parallel adapters and mixtures at a site."""
        added = np.zeros_like(u)
        if self.has(f"{site}/mlp_adapter/"):
            added = added + self.adapter(f"{site}/mlp_adapter", u, False)
        if self.has(f"{site}/soft_moa/"):
            added = added + self.soft_mixture(f"{site}/soft_moa", u, mask)
        if self.has(f"{site}/loaa/"):
            added = added + self.look_aside(f"{site}/loaa", u, mask)
        for name in ("dense_moa", "top_k_moa"):
            if self.has(f"{site}/{name}/"):
                added = added + self.gated_mixture(f"{site}/{name}", u, mask)
        return added

    def sub_layer(self, site: str, apply: Any, u: np.ndarray, mask: np.ndarray) -> np.ndarray:
        if not self.has(f"{site}/adapter/"):
            y = apply(u)
            if self.has(f"{site}/spatial_adapter/"):
                y = y + self.adapter(f"{site}/spatial_adapter", y, False)
            return y + self.beside(site, u, mask)
        method = self.methods["adapter"]
        published = method.as_published
        position = method.position or ("before" if method.order == "parallel" else "after")

        def a(z: np.ndarray) -> np.ndarray:
            return self.adapter(f"{site}/adapter", z, published)

        if position == "after":
            return apply(u) + a(apply(u))
        if method.order == "parallel":
            return apply(u) + a(u)
        return apply(a(u)) + a(u) if published else apply(u + a(u))

    def attention(self, site: str, x: np.ndarray, mask: np.ndarray) -> np.ndarray:
        heads = self.config.heads
        size = x.shape[-1] // heads
        q, k, v = (self.linear(f"{site}/{name}", x) for name in "qkv")
        more = k.shape[1] - x.shape[1]
        out = np.zeros_like(x)
        for clip in range(x.shape[0]):
            keep = np.concatenate([np.ones(more, bool), mask[clip]])
            for head in range(heads):
                part = slice(head * size, (head + 1) * size)
                scores = q[clip, :, part] @ k[clip, keep, part].T / math.sqrt(size)
                out[clip, :, part] = softmax(scores) @ v[clip, keep, part]
        return self.linear(f"{site}/out", out)

    def block(self, number: int, x: np.ndarray, mask: np.ndarray) -> np.ndarray:
        at, eps = f"blocks/{number}", self.config.eps
        u = self.norm(f"{at}/ln1", x, eps)
        twice = np.zeros_like(x)
        if self.has(f"{at}/soft_moa/") or self.has(f"{at}/dense_moa/"):
            twice = self.beside(at, u, mask)
        x = x + self.sub_layer(
            f"{at}/attn", lambda z: self.attention(f"{at}/attn", z, mask), u, mask
        )
        x = x + twice
        u = self.norm(f"{at}/ln2", x, eps)

        def mlp(z: np.ndarray) -> np.ndarray:
            return self.linear(f"{at}/mlp/down", gelu(self.linear(f"{at}/mlp/up", z)))

        return x + self.sub_layer(f"{at}/mlp", mlp, u, mask) + twice

    def embed(self, x: np.ndarray) -> np.ndarray:
        config = self.config
        rows, columns = config.grid
        kernel = self.w["embed/proj/kernel"][:, :, 0]
        patches = []
        for row in range(rows):
            for column in range(columns):
                low, start = row * config.stride[0], column * config.stride[1]
                patch = x[:, start : start + config.patch[1], low : low + config.patch[0]]
                patches.append(np.einsum("btf,ftd->bd", patch, kernel) + self.w["embed/proj/bias"])
        tokens = np.stack(patches, axis=1)
        prefix = [self.w["embed/cls"][0]]
        if config.distilled:
            prefix.append(self.w["embed/dist"][0])
        prefix = np.repeat(np.concatenate(prefix)[None], x.shape[0], axis=0)
        return np.concatenate([prefix, tokens], axis=1) + self.w["embed/pos"]

    def pool(
        self, kind: str, tokens: np.ndarray, mask: np.ndarray, prefix: int, start: int
    ) -> np.ndarray:
        """Statistics pooling, or trained pooling, of the tokens of one clip."""
        patches = tokens[start:][mask[start:]]
        if kind == "stats":
            deviation = np.sqrt(patches.var(axis=0) + 1e-6)
            return np.concatenate([tokens[:prefix].mean(axis=0), patches.mean(axis=0), deviation])
        if kind == "bands":
            columns = self.config.grid[1]
            rows = range(self.config.grid[0])
            every = [slice(start + row * columns, start + (row + 1) * columns) for row in rows]
            of_rows = [tokens[row][mask[row]] for row in every]
            means = [of.mean(axis=0) for of in of_rows]
            deviations = [np.sqrt(of.var(axis=0) + 1e-6) for of in of_rows]
            return np.concatenate([tokens[:prefix].mean(axis=0), *means, *deviations])
        if kind == "attention":
            query = self.w["pool/query"]
            return softmax(tokens[mask] @ query / math.sqrt(len(query))) @ tokens[mask]

        def unit(z: np.ndarray) -> np.ndarray:
            return z / np.sqrt((z**2).sum(-1, keepdims=True) + 1e-6)

        return (unit(patches) @ unit(self.w["pool/prototypes"]).T).max(axis=0)

    def logits(self, x: np.ndarray) -> np.ndarray:
        config = self.config
        x = np.asarray(x, np.float64)
        tokens = self.embed(x)
        mask = np.ones(tokens.shape[:2], bool)
        if self.valid is not None:
            for clip, frames in enumerate(self.valid):
                for column in range(config.grid[1]):
                    if column * config.stride[1] >= max(frames, 1):
                        mask[clip, config.num_prefix + column :: config.grid[1]] = False
                mask[clip, : config.num_prefix] = True
        method = self.methods.get("prompt")
        prefix, places = config.num_prefix, 0
        if method is not None:
            defect = method.as_published and method.keep_dist
            if config.distilled and not method.keep_dist:
                tokens, mask = np.delete(tokens, 1, axis=1), np.delete(mask, 1, axis=1)
                prefix = 1
            places = 0 if defect else method.tokens
            room = np.zeros((len(tokens), places, tokens.shape[2]))
            if not method.deep:
                room = room + self.w["embed/prompts"]
            tokens = np.concatenate([tokens[:, :prefix], room, tokens[:, prefix:]], axis=1)
            learned = np.ones((len(mask), places), bool)
            mask = np.concatenate([mask[:, :prefix], learned, mask[:, prefix:]], axis=1)
        for number in range(config.depth):
            if f"blocks/{number}/prompts" in self.w:
                end = prefix + self.w[f"blocks/{number}/prompts"].shape[1]
                tokens[:, prefix:end] = self.w[f"blocks/{number}/prompts"]
            tokens = self.block(number, tokens, mask)
        tokens = self.norm("norm", tokens, config.eps)
        pool = config.pool if method is None or method.pool is None else method.pool
        ranges = {
            "cls_dist": slice(0, prefix),
            "cls": slice(0, 1),
            "mean_all": slice(None),
            "all": slice(None),
            "mean_patches": slice(prefix + places, None),
            "patches": slice(prefix + places, None),
            "prompts": slice(prefix, prefix + places),
            "prompts_patches": slice(1, None),
        }
        pooled = []
        for clip, row in enumerate(tokens):
            if pool not in ranges:
                pooled.append(self.pool(pool, row, mask[clip], prefix, prefix + places))
                continue
            part = ranges[pool]
            pooled.append(row[part][mask[clip, part]].mean(axis=0))
        z = np.stack(pooled)
        if config.head_norm:
            z = self.norm("head/norm", z, config.head_eps)
        return self.linear("head/linear", z)
