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
from torch.nn.functional import gelu
from transformers import ASTForAudioClassification

from aatjax import surgery
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
    """Experts on every token, weighted by a router (arXiv 2402.00828)."""

    def __init__(self, values: dict[str, torch.Tensor]):
        super().__init__()
        self.w_router = nn.Parameter(values["w_router"])
        self.b_router = nn.Parameter(values["b_router"])
        self.experts = make_experts(values)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gates = (x @ self.w_router + self.b_router).softmax(dim=-1)
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
    "mlp_adapter": (Beside, Bottleneck),
    "adapter": (Beside, Bottleneck),
    "spatial_adapter": (After, Bottleneck),
}
"""Modules by the attribute under which aatjax puts them around a sub-layer."""

ADDED = re.compile(rf"^(?P<site>.*)/(?P<module>{'|'.join(ADAPTERS)}|lora)[/_](?P<parameter>\w+)$")


def make_torch_model(model: AST, attention: str = "sdpa") -> nn.Module:
    """Return an adapted model in PyTorch; frozen parameters need no gradient.

    Args:
        model: an AST with LoRA, bottlenecks beside the MLPs, AAT, Soft-MoA, Dense-MoA, or only
            parameters of its own trained.
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
            values[match["parameter"]] = torch.tensor(arrays[path])
        elif path.startswith(("blocks", "head")):
            found.get_parameter(rename(path)).requires_grad_(True)
    for (site, module), values in sites.items():
        parent, _, child = rename(site).rpartition(".")
        owner = found.get_submodule(parent)
        base = owner.get_submodule(child)
        if module == "lora":
            method: Any = model.method
            new: nn.Module = LowRank(base, values, method.alpha / values["a"].shape[1])
        else:
            place, kind = ADAPTERS[module]
            new = place(base, kind(values))
        setattr(owner, child, new)
    return found.train()


def rename(path: str) -> str:
    """Return the name of a module or parameter in transformers."""
    for old, new in NAMES:
        path = path.replace(old, new)
    return path
