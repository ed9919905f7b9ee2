"""transformers' AST with adapters in plain PyTorch, from the weights of an aatjax model.

Written from the formulas of the papers, as one would write it: a module beside or after another, a
loop over the experts. Trained parameters have the names and shapes of aatjax.
"""

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from flax import nnx
from torch import nn
from torch.nn.functional import (
    conv1d,
    conv2d,
    gelu,
    glu,
    one_hot,
    pad,
    scaled_dot_product_attention,
    silu,
)
from transformers import ASTForAudioClassification

from aatjax import petl, surgery
from aatjax.convert.write import write_hf
from aatjax.models.ast import AST

NAMES = (
    ("blocks/", "audio_spectrogram_transformer.layers/"),
    ("ln1", "layernorm_before"),
    ("ln2", "layernorm_after"),
    ("attn/out", "attention/o_proj"),
    ("attn/q", "attention/q_proj"),
    ("attn/k", "attention/k_proj"),
    ("attn/v", "attention/v_proj"),
    ("attn", "attention"),
    ("mlp/up", "mlp/fc1"),
    ("mlp/down", "mlp/fc2"),
    ("head/norm", "classifier.layernorm"),
    ("head/linear", "classifier.dense"),
    ("embed/proj", "audio_spectrogram_transformer.embeddings.patch_embeddings.projection"),
    ("/kernel", "/weight"),
    ("/scale", "/weight"),
    ("/", "."),
)
"""Paths of aatjax, and what replaces them in transformers 5, in this order."""


class Bottleneck(nn.Module):
    """W_up GELU(W_down x + b_down) + b_up."""

    def __init__(self, values: dict[str, torch.Tensor]):
        super().__init__()
        self.down, self.up = make_linear(values, "down"), make_linear(values, "up")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(gelu(self.down(x)))


class SoftMixture(nn.Module):
    """Experts on slots, which are convex combinations of the tokens (arXiv 2402.00828)."""

    def __init__(self, values: dict[str, torch.Tensor]):
        super().__init__()
        self.phi = nn.Parameter(values["phi"])
        self.experts = make_experts(values)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = torch.einsum("bnd,dep->bnep", x, self.phi)
        dispatch = logits.softmax(dim=1)
        combine = logits.flatten(2).softmax(dim=-1).view_as(logits)
        slots = torch.einsum("bnep,bnd->bepd", dispatch, x)
        outputs = [expert(slots[:, i]) for i, expert in enumerate(self.experts)]
        return torch.einsum("bnep,bepd->bnd", combine, torch.stack(outputs, dim=1))


class DenseMixture(nn.Module):
    """Experts on every token, weighted by a router (arXiv 2402.00828).

    With `top`, the gates of the best experts alone, and a load-balance loss in `penalty`.
    """

    def __init__(
        self, values: dict[str, torch.Tensor], top: int | None = None, balance: float = 0.0
    ):
        super().__init__()
        self.top, self.balance = top, balance
        self.w_router = nn.Parameter(values["w_router"])
        self.b_router = nn.Parameter(values["b_router"])
        self.experts = make_experts(values)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gates = (x @ self.w_router + self.b_router).softmax(dim=-1)
        if self.top is not None:
            count = gates.shape[-1]
            hits = one_hot(gates.topk(self.top).indices, count).sum(dim=-2).to(gates.dtype)
            share, mean = hits.mean(dim=(0, 1)) / self.top, gates.mean(dim=(0, 1))
            self.penalty = self.balance * count * (share * mean).sum()
            gates = gates * hits
            gates = gates / gates.sum(dim=-1, keepdim=True)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=-1)
        return torch.einsum("bnde,bne->bnd", outputs, gates)


class LowRank(nn.Module):
    """W x + b + scale B A x."""

    def __init__(self, base: nn.Module, values: dict[str, torch.Tensor], scale: float):
        super().__init__()
        self.base, self.scale = base, scale
        self.a, self.b = nn.Parameter(values["a"]), nn.Parameter(values["b"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.scale * (x @ self.a @ self.b)


class Conformer(nn.Module):
    """LayerNorm, gated projection, depthwise convolution, BatchNorm, swish, projection."""

    def __init__(self, values: dict[str, torch.Tensor]):
        super().__init__()
        width, dim = values["w_out"].shape
        self.norm, self.batch_norm = nn.LayerNorm(dim), nn.BatchNorm1d(width)
        for own, name in ((self.norm, "norm"), (self.batch_norm, "batch_norm")):
            own.weight = nn.Parameter(values[f"{name}/scale"])
            own.bias = nn.Parameter(values[f"{name}/bias"])
        self.enter, self.leave = make_linear(values, "in"), make_linear(values, "out")
        self.kernel = nn.Parameter(values["w_conv"].T[:, None].contiguous())
        self.bias = nn.Parameter(values["b_conv"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = glu(self.enter(self.norm(x)), dim=-1).transpose(1, 2)
        taps = self.kernel.shape[-1]
        hidden = pad(hidden, ((taps - 1) // 2, taps - 1 - (taps - 1) // 2))
        hidden = conv1d(hidden, self.kernel, self.bias, groups=hidden.shape[1])
        return self.leave(silu(self.batch_norm(hidden)).transpose(1, 2))


class LookAside(nn.Module):
    """Convolutions over the grid of patches, along time and along frequency (arXiv 2412.05951)."""

    def __init__(self, values: dict[str, torch.Tensor], grid: tuple[int, int]):
        super().__init__()
        self.grid = grid
        self.w_down, self.w_up = nn.Parameter(values["w_down"]), nn.Parameter(values["w_up"])
        self.b_down, self.b_up = nn.Parameter(values["b_down"]), nn.Parameter(values["b_up"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = gelu(self.convolve(x, self.w_down, self.b_down, along_time=True))
        return self.convolve(hidden, self.w_up, self.b_up, along_time=False)

    def convolve(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, along_time: bool
    ) -> torch.Tensor:
        """Convolve the patches; other tokens have no neighbours."""
        rows, columns = self.grid
        first, centre = x.shape[1] - rows * columns, (len(weight) - 1) // 2
        patches = x[:, first:].transpose(1, 2).unflatten(2, self.grid)
        kernel = weight.permute(2, 1, 0)
        kernel = kernel[:, :, None] if along_time else kernel[..., None]
        edges = (centre, len(weight) - 1 - centre)
        patches = pad(patches, (*edges, 0, 0) if along_time else (0, 0, *edges))
        patches = conv2d(patches, kernel, bias).flatten(2).transpose(1, 2)
        return torch.cat([x[:, :first] @ weight[centre] + bias, patches], dim=1)


class PrefixAttention(nn.Module):
    """Attention with learned keys and values in front of those of the tokens."""

    def __init__(self, base: Any, heads: int, key: torch.Tensor, value: torch.Tensor):
        super().__init__()
        self.base, self.heads = base, heads
        self.key, self.value = nn.Parameter(key), nn.Parameter(value)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        def split(tokens: torch.Tensor) -> torch.Tensor:
            return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        keys = torch.cat([self.key.expand(len(x), -1, -1), self.base.k_proj(x)], dim=1)
        values = torch.cat([self.value.expand(len(x), -1, -1), self.base.v_proj(x)], dim=1)
        read = scaled_dot_product_attention(split(self.base.q_proj(x)), split(keys), split(values))
        return self.base.o_proj(read.transpose(1, 2).flatten(2)), None


class Prompts(nn.Module):
    """Learned tokens after CLS and DIST: put in after a module, or in place of others before it."""

    def __init__(self, base: nn.Module, rows: torch.Tensor, *, insert: bool):
        super().__init__()
        self.base, self.insert = base, insert
        self.rows = nn.Parameter(rows)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.insert:
            x = self.base(x, *args, **kwargs)
        rows, start = (
            self.rows.expand(len(x), -1, -1),
            2 + (0 if self.insert else len(self.rows[0])),
        )
        x = torch.cat([x[:, :2], rows, x[:, start:]], dim=1)
        return x if self.insert else self.base(x, *args, **kwargs)


class Beside(nn.Module):
    """base(x) + adapter(x)."""

    def __init__(self, base: nn.Module, adapter: nn.Module):
        super().__init__()
        self.base, self.adapter = base, adapter

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return add(self.base(x, *args, **kwargs), self.adapter(x))


class After(nn.Module):
    """z + adapter(z) with z = base(x)."""

    def __init__(self, base: nn.Module, adapter: nn.Module):
        super().__init__()
        self.base, self.adapter = base, adapter

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        z = self.base(*args, **kwargs)
        return add(z, self.adapter(z[0] if isinstance(z, tuple) else z))


def add(output: Any, more: torch.Tensor) -> Any:
    """Add to what a module of transformers returns; attention returns its weights beside it."""
    return (output[0] + more, *output[1:]) if isinstance(output, tuple) else output + more


def make_linear(values: dict[str, torch.Tensor], name: str) -> nn.Linear:
    """Return the linear layer `w_NAME`, `b_NAME`."""
    weight, bias = values[f"w_{name}"], values[f"b_{name}"]
    linear = nn.Linear(weight.shape[0], weight.shape[1])
    linear.weight, linear.bias = nn.Parameter(weight.T.contiguous()), nn.Parameter(bias)
    return linear


def make_experts(values: dict[str, torch.Tensor]) -> nn.ModuleList:
    """Return a bottleneck for each expert."""
    names = ("w_down", "b_down", "w_up", "b_up")
    pairs = zip(*(values[name] for name in names), strict=True)
    return nn.ModuleList(Bottleneck(dict(zip(names, own, strict=True))) for own in pairs)


ADAPTERS = {
    "soft_moa": (Beside, SoftMixture),
    "dense_moa": (Beside, DenseMixture),
    "top_k_moa": (Beside, DenseMixture),
    "mlp_adapter": (Beside, Bottleneck),
    "adapter": (Beside, Bottleneck),
    "spatial_adapter": (After, Bottleneck),
    "loaa": (Beside, LookAside),
}
"""Modules by the attribute under which aatjax puts them around a sub-layer."""

ADDED = re.compile(
    rf"^(?P<site>.*?)/(?P<module>{'|'.join(ADAPTERS)}|lora|prefix|prompts)(?:[/_](?P<parameter>[\w/]+))?$"
)


def make_torch_model(model: AST, attention: str = "sdpa") -> nn.Module:
    """Return an adapted model in PyTorch; frozen parameters need no gradient.

    Args:
        model: an AST with square patches, pooled by CLS and DIST, with any one method.
        attention: `sdpa` or `eager`.
    """
    arrays = {path: np.asarray(value) for path, value in surgery.arrays(model).items()}
    body = {path: value for path, value in arrays.items() if not ADDED.match(path)}
    with TemporaryDirectory() as folder:
        write_hf(Path(folder) / "weights", body, model.config)
        found: Any = ASTForAudioClassification.from_pretrained(
            Path(folder) / "weights", attn_implementation=attention
        )
    found.classifier.layernorm.eps = model.config.head_eps
    trained = [p for p, v in surgery.variables(model).items() if isinstance(v, nnx.Param)]
    if not set(body) <= set(trained):  # not full fine-tuning
        found.requires_grad_(False)
    sites: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    for path in trained:
        if match := ADDED.match(path):
            values = sites.setdefault((match["site"], match["module"]), {})
            values[match["parameter"] or match["module"]] = torch.tensor(arrays[path])
        elif path.startswith(("blocks", "head", "embed/proj", "norm")):
            found.get_parameter(rename(path)).requires_grad_(True)
    for (site, module), values in sites.items():
        add_module(found, model, site, module, values)
    prompts: Any = model.method
    if isinstance(prompts, petl.Prompt) and ("embed", "prompts") not in sites:
        # Places that every block fills itself.
        empty = torch.zeros(1, prompts.tokens, model.config.dim)
        add_module(found, model, "embed", "prompts", {"prompts": empty})
        found.audio_spectrogram_transformer.embeddings.rows.requires_grad_(False)
    return found.train()


def add_module(
    found: Any, model: AST, site: str, module: str, values: dict[str, torch.Tensor]
) -> None:
    """Put a module of a method at its place in transformers' model."""
    method: Any = model.method
    name = "audio_spectrogram_transformer.embeddings" if site == "embed" else rename(site)
    parent, _, child = name.rpartition(".")
    if module == "prefix" and child == "v_proj":
        return  # put in with the keys
    if module == "prefix":
        parent, _, child = parent.rpartition(".")
    owner = found.get_submodule(parent)
    base = owner.get_submodule(child)
    if module == "lora":
        new: nn.Module = LowRank(base, values, method.alpha / values["a"].shape[1])
    elif module == "prefix":
        arrays = surgery.arrays(model)
        other = site.removesuffix("/k") + "/v/prefix"
        value = torch.tensor(np.asarray(arrays[other]))
        new = PrefixAttention(base, model.config.heads, values["prefix"], value)
    elif module == "prompts":
        new = Prompts(base, values["prompts"], insert=site == "embed")
    elif module == "loaa":
        new = Beside(base, LookAside(values, model.config.grid))
    elif module == "top_k_moa":
        new = Beside(base, DenseMixture(values, method.top, method.balance))
    elif "w_conv" in values:
        new = Beside(base, Conformer(values))
    else:
        place, kind = ADAPTERS[module]
        new = place(base, kind(values))
    setattr(owner, child, new)


def rename(path: str) -> str:
    """Return the name of a module or parameter in transformers."""
    if path.startswith("norm/"):
        path = f"audio_spectrogram_transformer.layer{path}"
    for old, new in NAMES:
        path = path.replace(old, new)
    return path
