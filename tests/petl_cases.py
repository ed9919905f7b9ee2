"""Instances of every adaptation method, with the paths that they train, on a tiny AST."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from aatjax import petl, surgery
from aatjax.models.ast import AST, ASTConfig
from aatjax.petl import Method

CONFIG = ASTConfig(dim=16, depth=2, heads=2, mlp_dim=24, mels=36, frames=46, num_classes=5)
HEAD = ("head/norm/*", "head/linear/*")
BARE_HEAD = ("norm/*", "head/linear/*")
ADAPTER = ("w_down", "b_down", "w_up", "b_up")
MIXTURE = ("phi", *ADAPTER)


def at(site: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"blocks/*/{site}/{name}" for name in names)


MLP = at("mlp/mlp_adapter", ADAPTER)
SPATIAL = at("attn/spatial_adapter", ADAPTER)
ATTN_MIXTURE, MLP_MIXTURE = at("attn/soft_moa", MIXTURE), at("mlp/soft_moa", MIXTURE)
LN1, LN2 = ("blocks/*/ln1/*",), ("blocks/*/ln2/*",)


def soft(**fields: Any) -> Method:
    return petl.SoftMoA(**{**dict(num_experts=3, slots=2, reduction=4.0), **fields})


def dense(**fields: Any) -> Method:
    return petl.DenseMoA(**{**dict(num_experts=3, reduction=4.0), **fields})


def adapter(**fields: Any) -> Method:
    return petl.Adapter(**{**dict(reduction=4.0, kernel=3), **fields})


CONFORMER = ("norm/scale", "norm/bias", "w_in", "b_in", "w_conv", "b_conv", "w_out", "b_out")
CONFORMER += ("batch_norm/scale", "batch_norm/bias")
CONVPASS = (*ADAPTER, "w_conv", "b_conv")
ROUTER = ("w_router", "b_router")


def lora(letters: str) -> tuple[str, ...]:
    names = [{"o": "out"}.get(letter, letter) for letter in letters]
    return tuple(f"blocks/*/attn/{name}/lora_{part}" for name in names for part in "ab")


FACTORS = ("lora_a", "lora_b")
PREFIX = ("blocks/*/attn/k/prefix", "blocks/*/attn/v/prefix")
DEEP = ("blocks/*/prompts",)

# An instance of a method, and globs of all that it trains in addition to the head (None: not
# stated). A method of `petl_oracle` has its cases here; any other is tested at its defaults.
CASES: dict[str, tuple[Method, tuple[str, ...] | None]] = {
    "linear": (petl.Linear(), ()),
    "ridge": (petl.Ridge(), ()),
    "full": (petl.Full(), ("embed/*", "embed/proj/*", "blocks/*", "norm/*")),
    "partial": (petl.Partial(), ("blocks/1/*",)),
    "bitfit": (petl.BitFit(), ("blocks/*/bias", "norm/bias")),
    "layer_norm": (petl.LayerNormTuning(), (*LN1, *LN2, "norm/*")),
    "aat_m": (petl.AAT(spatial=False), MLP),
    "aat_s": (petl.AAT(mlp=False), SPATIAL),
    "aat": (petl.AAT(), MLP + SPATIAL),
    "adapter": (adapter(), at("mlp/adapter", ADAPTER) + LN2),
    "adapter_mhsa": (petl.Adapter(width=3, location="mhsa"), at("attn/adapter", ADAPTER) + LN1),
    "adapter_both": (
        adapter(location="both"),
        at("attn/adapter", ADAPTER) + at("mlp/adapter", ADAPTER) + LN1 + LN2,
    ),
    "adapter_after": (adapter(position="after"), at("mlp/adapter", ADAPTER) + LN2),
    "adapter_sequential": (
        adapter(order="sequential", location="both", train_norm=False),
        at("attn/adapter", ADAPTER) + at("mlp/adapter", ADAPTER),
    ),
    "adapter_sequential_before": (
        adapter(order="sequential", position="before"),
        at("mlp/adapter", ADAPTER) + LN2,
    ),
    "conformer": (adapter(block="conformer"), at("mlp/adapter", CONFORMER) + LN2),
    "conformer_even": (
        adapter(block="conformer", kernel=4, inner_norm=False, location="both"),
        at("attn/adapter", CONFORMER[2:]) + at("mlp/adapter", CONFORMER[2:]) + LN1 + LN2,
    ),
    "convpass": (adapter(block="convpass"), at("mlp/adapter", CONVPASS) + LN2),
    "lora": (petl.LoRA(rank=4, alpha=8), lora("qv")),
    "lora_all": (
        petl.LoRA(targets=("q", "k", "v", "o"), reduction=8, scale="alpha/reduction"),
        lora("qkvo"),
    ),
    "lora_mlp": (
        petl.LoRA(rank=2, targets=("v", "up", "down")),
        lora("v") + at("mlp/up", FACTORS) + at("mlp/down", FACTORS),
    ),
    "loaa": (petl.LoAA(width=3), at("mlp/loaa", ADAPTER) + LN2),
    "loaa_both": (
        petl.LoAA(width=3, kernel=4, location="both", train_norm=False),
        at("attn/loaa", ADAPTER) + at("mlp/loaa", ADAPTER),
    ),
    "prefix": (petl.Prefix(tokens=4), PREFIX),
    "prompt": (petl.Prompt(tokens=3), DEEP),
    "prompt_shallow": (petl.Prompt(tokens=3, deep=False, pool="prompts"), ("embed/prompts",)),
    "prompt_patches": (petl.Prompt(tokens=3, pool="patches"), DEEP),
    "prompt_but_cls": (petl.Prompt(tokens=3, pool="prompts_patches"), DEEP),
    "prompt_cls": (petl.Prompt(tokens=3, pool="cls"), DEEP),
    "prompt_aat": (petl.Prompt(tokens=3, keep_dist=True, pool=None), DEEP),
    "prompt_own_pool": (petl.Prompt(tokens=2, deep=False, pool=None), ("embed/prompts",)),
    "soft_moa": (petl.SoftMoA(), ATTN_MIXTURE + LN1),
    "soft_moa_mhsa": (soft(), ATTN_MIXTURE + LN1),
    "soft_moa_ffn": (soft(location="ffn", reduction=None, width=2), MLP_MIXTURE + LN2),
    "soft_moa_both": (soft(location="both"), ATTN_MIXTURE + MLP_MIXTURE + LN1 + LN2),
    "soft_moa_no_norm": (soft(location="both", train_norm=False), ATTN_MIXTURE + MLP_MIXTURE),
    "soft_moa_normalized": (
        soft(normalize=True),
        (*ATTN_MIXTURE, "blocks/*/attn/soft_moa/scale", *LN1),
    ),
    "soft_moa_shared": (
        soft(shared=True),
        ATTN_MIXTURE + at("attn/soft_moa/shared", ADAPTER) + LN1,
    ),
    "soft_moa_convpass": (
        soft(expert="convpass"),
        at("attn/soft_moa/blocks/*", CONVPASS) + at("attn/soft_moa", ("phi",)) + LN1,
    ),
    "dense_moa": (
        dense(reduction=None, budget=600),
        at("attn/dense_moa", (*ROUTER, *ADAPTER)) + LN1,
    ),
    "dense_moa_both": (
        dense(location="both"),
        at("attn/dense_moa", (*ROUTER, *ADAPTER))
        + at("mlp/dense_moa", (*ROUTER, *ADAPTER))
        + LN1
        + LN2,
    ),
    "dense_moa_conformer": (
        dense(expert="conformer", kernel=3, location="ffn"),
        at("mlp/dense_moa/blocks/*", CONFORMER) + at("mlp/dense_moa", ROUTER) + LN2,
    ),
    "top_k_moa": (
        petl.TopKMoA(num_experts=4, top=2, reduction=4.0, balance=0.3),
        at("attn/top_k_moa", (*ROUTER, *ADAPTER)) + LN1,
    ),
    "combined": (
        petl.Combined((petl.AAT(), petl.LoRA(targets=("q", "k"), reduction=4), soft())),
        MLP + SPATIAL + lora("qk") + ATTN_MIXTURE + LN1,
    ),
    "combined_rows": (
        petl.Combined(
            (petl.Prefix(tokens=4), petl.Prompt(tokens=3), petl.LoRA(rank=1, targets=("k", "v")))
        ),
        PREFIX + DEEP + lora("kv"),
    ),
    "stacked": (petl.Stacked((petl.AAT(), soft())), ATTN_MIXTURE + LN1),
}
_listed = {method.name for method, _ in CASES.values()}
WITHOUT_ORACLE = [name for name in petl.METHODS if name not in _listed]
CASES |= {name: (petl.METHODS[name](), None) for name in WITHOUT_ORACLE}
PUBLISHED: dict[str, tuple[Method, tuple[str, ...] | None]] = {
    "linear": (petl.Linear(as_published=True), ()),
    "full": (petl.Full(as_published=True), CASES["full"][1]),
    "bitfit": (petl.BitFit(as_published=True), CASES["bitfit"][1]),
    "adapter": (adapter(as_published=True), CASES["adapter"][1]),
    "adapter_sequential_before": (
        adapter(order="sequential", position="before", as_published=True),
        CASES["adapter_sequential_before"][1],
    ),
    "conformer": (adapter(block="conformer", as_published=True), CASES["conformer"][1]),
    "convpass": (adapter(block="convpass", as_published=True), CASES["convpass"][1]),
    "lora": (petl.LoRA(reduction=8, as_published=True), CASES["lora"][1]),
    "prefix": (petl.Prefix(tokens=4, as_published=True), CASES["prefix"][1]),
    "prompt": (petl.Prompt(tokens=3, as_published=True), CASES["prompt"][1]),
    "prompt_aat": (
        petl.Prompt(tokens=3, keep_dist=True, pool=None, as_published=True),
        ("embed/prompts", "blocks/1/prompts"),
    ),
    "soft_moa": (soft(as_published=True), at("soft_moa", MIXTURE) + LN1),
    "soft_moa_both": (soft(location="both", as_published=True), CASES["soft_moa_both"][1]),
    "dense_moa": (dense(as_published=True), at("dense_moa", (*ROUTER, *ADAPTER)) + LN1),
}
# Not the identity at initialisation.
CHANGES_AT_INIT = {
    name for name in CASES if name.startswith(("prompt", "prefix", "combined_rows", "ridge"))
}
# Parameters of the published forms that never get a gradient.
UNUSED_AS_PUBLISHED = {
    "conformer": ("adapter/norm/scale", "adapter/norm/bias"),
    "convpass": ("w_conv", "b_conv"),
    "prompt_aat": ("embed/prompts",),
}

# Cases that run the same code as another one, in another place or size.
REPEATS = {"partial", "bitfit", "layer_norm", "conformer_even", "adapter_sequential"}
REPEATS |= {"aat_m", "aat_s", "adapter_mhsa", "adapter_both", "adapter_after", "lora_all"}
REPEATS |= {"soft_moa", "soft_moa_both", "soft_moa_ffn", "soft_moa_no_norm", "dense_moa_both"}
REPEATS |= {"combined_rows", "prompt_patches", "prompt_but_cls", "prompt_cls", "prompt_own_pool"}
FORMS = [(name, False) for name in CASES] + [(name, True) for name in PUBLISHED]
"""(name, as published) of every case."""
WITH_ORACLE = [form for form in FORMS if form[0] not in WITHOUT_ORACLE]
KINDS = [name for name in CASES if name not in {*REPEATS, *WITHOUT_ORACLE}]
PUBLISHED_KINDS = ["adapter_sequential_before", "conformer", "convpass", "lora", "prompt_aat"]
PUBLISHED_KINDS += ["soft_moa", "dense_moa"]
"""Published forms that compute something else than the default, not only from other weights."""


def find_form(name: str, published: bool) -> tuple[Method, tuple[str, ...] | None]:
    return (PUBLISHED if published else CASES)[name]


def list_parts(method: Method) -> tuple[Method, ...]:
    return method.methods if isinstance(method, petl.Combined | petl.Stacked) else (method,)


@functools.cache
def _make_model(config: ASTConfig, seed: int) -> AST:
    return AST(config, rngs=nnx.Rngs(seed))


def make_model(seed: int = 0, **changes: Any) -> AST:
    return surgery.clone(_make_model(dataclasses.replace(CONFIG, **changes), seed))


def make_clips(frames: int = 46, mels: int = 36, seed: int = 0) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(2, frames, mels)), jnp.float32)


def list_trained(adapted: AST) -> set[str]:
    return {p for p, v in surgery.variables(adapted).items() if isinstance(v, nnx.Param)}


def add_noise(module: Any, scale: float = 0.1, kind: type[nnx.Variable] = nnx.Variable) -> Any:
    """The module with noise added to every variable of a kind, in place."""
    rng = np.random.default_rng(7)
    values = surgery.arrays(module, kind)
    moved = {p: v + scale * rng.normal(size=v.shape).astype(v.dtype) for p, v in values.items()}
    surgery.assign(module, moved, what="the test")
    return module


def randomize(adapted: AST) -> AST:
    """The model with noise on every weight, and possible BatchNorm statistics, in place."""
    add_noise(adapted, scale=0.25)
    stats = surgery.arrays(adapted, nnx.BatchStat)
    variances = {p: jnp.abs(v) + 0.5 for p, v in stats.items() if p.endswith("var")}
    surgery.assign(adapted, variances, what="the test")
    return adapted
