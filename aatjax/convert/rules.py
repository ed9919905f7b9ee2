"""The published weight layouts as rules: name in the file, canonical names, change of axes.

A rule works both ways. `{i}` stands for the number of a block. A source tensor with several
targets (fused query, key, value) is cut in equal parts along the output axis.
"""

import dataclasses
import re
from collections.abc import Iterable
from typing import Literal

import numpy as np
from jaxtyping import Float

from aatjax.models.config import Pooling
from aatjax.models.positions import PositionRule

Turn = Literal["copy", "linear", "conv"]


@dataclasses.dataclass(frozen=True)
class TensorRule:
    """One tensor of a layout.

    Attributes:
        source: name in the file, without the layout's prefix.
        targets: canonical names.
        turn: `linear` transposes (out, in); `conv` takes (out, in, f, t) to (f, t, in, out).
    """

    source: str
    targets: tuple[str, ...]
    turn: Turn = "copy"

    def to_canonical(self, value: Float[np.ndarray, "..."]) -> list[Float[np.ndarray, "..."]]:
        """Return the canonical arrays, one per target."""
        if self.turn == "linear":
            value = value.T
        elif self.turn == "conv":
            value = value.transpose(2, 3, 1, 0)
        if len(self.targets) == 1:
            return [np.ascontiguousarray(value)]
        return [np.ascontiguousarray(p) for p in np.split(value, len(self.targets), axis=-1)]

    def to_source(self, values: list[Float[np.ndarray, "..."]]) -> Float[np.ndarray, "..."]:
        """Return the array of the file from the canonical ones."""
        value = values[0] if len(values) == 1 else np.concatenate(values, axis=-1)
        if self.turn == "linear":
            value = value.T
        elif self.turn == "conv":
            value = value.transpose(3, 2, 0, 1)
        return np.ascontiguousarray(value)

    def source_shape(self, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
        """Return the shape in the file from the canonical ones."""
        *rest, last = shapes[0]
        shape = (*rest, last * len(shapes))
        if self.turn == "linear":
            return shape[::-1]
        return (shape[3], shape[2], shape[0], shape[1]) if self.turn == "conv" else shape


@dataclasses.dataclass(frozen=True)
class WeightLayout:
    """A published form of AST weights.

    Attributes:
        name: short name, as reported.
        title: name in messages.
        prefix: prefix of the names of the body.
        body: rules of embedding, blocks and final norm.
        head_prefix: prefix of the names of the head.
        head: rules of the classifier; empty where it is not used (ImageNet, pretext tasks).
        ignored: patterns (full match, prefixes included) of tensors that are skipped on purpose.
        rule: how its positions are adapted to other lengths.
        distilled: whether there is a DIST token; None where the file decides.
        eps: epsilons of body and head LayerNorms, unless a config.json says otherwise.
        pool: how a model with such a head pools its tokens.
        numbers: names of integer scalars that describe the pretraining grid (SSAST).
        wrapper: prefix before all names, see `wrap`.
    """

    name: str
    title: str
    prefix: str
    body: tuple[TensorRule, ...]
    head_prefix: str = ""
    head: tuple[TensorRule, ...] = ()
    ignored: tuple[str, ...] = ()
    rule: PositionRule = "audioset"
    distilled: bool | None = True
    eps: tuple[float, float] = (1e-6, 1e-5)
    pool: Pooling = "cls_dist"
    numbers: tuple[str, ...] = ()
    wrapper: str = ""

    @property
    def rules(self) -> tuple[tuple[str, TensorRule], ...]:
        """Every rule with the full name of its source."""
        body = ((self.prefix + rule.source, rule) for rule in self.body)
        return (*body, *((self.head_prefix + rule.source, rule) for rule in self.head))

    def is_ignored(self, name: str) -> bool:
        """Whether the tensor is skipped on purpose."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)

    def wrap(self, wrapper: str) -> "WeightLayout":
        """Return the layout with a prefix before all its names, such as `module.`."""
        if not wrapper:
            return self
        return dataclasses.replace(
            self,
            title=f"{self.title} (names behind {wrapper!r})",
            wrapper=wrapper,
            prefix=wrapper + self.prefix,
            head_prefix=wrapper + self.head_prefix,
            ignored=tuple(f"{re.escape(wrapper)}(?:{pattern})" for pattern in self.ignored),
            numbers=tuple(wrapper + name for name in self.numbers),
        )


def _linear(source: str, *targets: str) -> tuple[TensorRule, TensorRule]:
    return (
        TensorRule(f"{source}.weight", tuple(f"{target}/kernel" for target in targets), "linear"),
        TensorRule(f"{source}.bias", tuple(f"{target}/bias" for target in targets)),
    )


def _norm(source: str, target: str) -> tuple[TensorRule, TensorRule]:
    return (
        TensorRule(f"{source}.weight", (f"{target}/scale",)),
        TensorRule(f"{source}.bias", (f"{target}/bias",)),
    )


def _make_body(embedding: str, block: str, parts: str, norm: str) -> tuple[TensorRule, ...]:
    """The rules of a body.

    Args:
        embedding: names of CLS, DIST, positions and patch projection.
        block: prefix of the names of a block.
        parts: names in a block: norm, query-key-value (one or three), output, norm, up, down.
        norm: name of the final norm.
    """
    cls, dist, pos, projection = embedding.split()
    before, *qkv, out, after, up, down = (f"{block}{part}" for part in parts.split())
    to = "blocks/{i}"
    targets = [f"{to}/attn/{part}" for part in "qkv"]
    return (
        TensorRule(cls, ("embed/cls",)),
        TensorRule(dist, ("embed/dist",)),
        TensorRule(pos, ("embed/pos",)),
        TensorRule(f"{projection}.weight", ("embed/proj/kernel",), "conv"),
        TensorRule(f"{projection}.bias", ("embed/proj/bias",)),
        *_norm(before, f"{to}/ln1"),
        *(
            _linear(qkv[0], *targets)
            if len(qkv) == 1
            else (rule for pair in map(_linear, qkv, targets) for rule in pair)
        ),
        *_linear(out, f"{to}/attn/out"),
        *_norm(after, f"{to}/ln2"),
        *_linear(up, f"{to}/mlp/up"),
        *_linear(down, f"{to}/mlp/down"),
        *_norm(norm, "norm"),
    )


_TIMM = _make_body(
    "cls_token dist_token pos_embed patch_embed.proj",
    "blocks.{i}.",
    "norm1 attn.qkv attn.proj norm2 mlp.fc1 mlp.fc2",
    "norm",
)
_HF_EMBEDDING = (
    "embeddings.cls_token embeddings.distillation_token embeddings.position_embeddings "
    "embeddings.patch_embeddings.projection"
)
_HF_FILE = _make_body(  # what files of every version of transformers hold
    _HF_EMBEDDING,
    "encoder.layer.{i}.",
    "layernorm_before attention.attention.query attention.attention.key attention.attention.value "
    "attention.output.dense layernorm_after intermediate.dense output.dense",
    "layernorm",
)
_HF_MEMORY = _make_body(  # names of state_dict() in transformers 5
    _HF_EMBEDDING,
    "layers.{i}.",
    "layernorm_before attention.q_proj attention.k_proj attention.v_proj attention.o_proj "
    "layernorm_after mlp.fc1 mlp.fc2",
    "layernorm",
)
_AST_HEAD = (*_norm("mlp_head.0", "head/norm"), *_linear("mlp_head.1", "head/linear"))
_HF_HEAD = (
    *_norm("classifier.layernorm", "head/norm"),
    *_linear("classifier.dense", "head/linear"),
)
_OLD_HEADS = r"(v\.)?head(_dist)?\.(weight|bias)"
_PRETEXT = (r"mask_embed", r"[cg]predlayer\.[02]\.(weight|bias)")
_NO_EPS = (1e-12, 1e-12)


def _make_hf_layouts() -> Iterable[WeightLayout]:
    for rules in (_HF_FILE, _HF_MEMORY):
        for prefix in ("audio_spectrogram_transformer.", ""):
            yield WeightLayout(
                "hf-ast", "Hugging Face AST", prefix, rules, "", _HF_HEAD, eps=_NO_EPS
            )
        for name, prefix in (("deit", "deit."), ("vit", "vit."), ("vit", "")):
            yield WeightLayout(
                f"hf-{name}",
                "Hugging Face DeiT" if name == "deit" else "Hugging Face ViT or DeiT",
                prefix,
                rules,
                ignored=(
                    r"((cls|distillation)_)?classifier\.(weight|bias)",
                    re.escape(prefix) + r"(pooler\.dense\.(weight|bias)|embeddings\.mask_token)",
                ),
                rule="imagenet",
                distilled=None,
                eps=_NO_EPS,
            )


_CANONICAL = [target for rule in (*_TIMM, *_AST_HEAD) for target in rule.targets]
_CANONICAL += ["pool/query", "pool/prototypes"]
NATIVE = WeightLayout(
    "native",
    "aatjax weights",
    "",
    tuple(TensorRule(name, (name,)) for name in _CANONICAL),
    distilled=None,
)
LAYOUTS: tuple[WeightLayout, ...] = (
    NATIVE,
    WeightLayout("original", "original AST .pth", "v.", _TIMM, "", _AST_HEAD, (_OLD_HEADS,)),
    WeightLayout(
        "ssast",
        "SSAST pretraining checkpoint",
        "v.",
        _TIMM,
        ignored=(_OLD_HEADS, *_PRETEXT),
        rule="ssast",
        pool="mean_patches",
        numbers=("p_input_fdim", "p_input_tdim"),
    ),
    WeightLayout(
        "timm",
        "timm DeiT or ViT",
        "",
        _TIMM,
        ignored=(_OLD_HEADS,),
        rule="imagenet",
        distilled=None,
    ),
    *_make_hf_layouts(),
    WeightLayout(
        "petl-ast",
        "PETL_AST checkpoint",
        "",
        _HF_FILE,
        "",
        _linear("classification_head", "head/linear"),
        eps=_NO_EPS,
        pool="mean_all",
    ),
)
HF_AST = next(layout for layout in LAYOUTS if layout.name == "hf-ast")
