"""The published weight layouts as rules: name in the file, canonical names, how to turn it.

A rule reads both ways. `{i}` stands for the number of a block. A source tensor with several
targets (fused query, key, value) is cut in equal parts along the output axis.
"""

import dataclasses
import re
from collections.abc import Iterable
from typing import Literal

import numpy as np
from jaxtyping import Float

Turn = Literal["copy", "linear", "conv"]
Positions = Literal["audioset", "imagenet", "ssast"]


@dataclasses.dataclass(frozen=True)
class Rule:
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
        """The canonical arrays, one for each target."""
        if self.turn == "linear":
            value = value.T
        elif self.turn == "conv":
            value = value.transpose(2, 3, 1, 0)
        if len(self.targets) == 1:
            return [np.ascontiguousarray(value)]
        return [np.ascontiguousarray(p) for p in np.split(value, len(self.targets), axis=-1)]

    def to_source(self, values: list[Float[np.ndarray, "..."]]) -> Float[np.ndarray, "..."]:
        """The array of the file from the canonical ones."""
        value = values[0] if len(values) == 1 else np.concatenate(values, axis=-1)
        if self.turn == "linear":
            value = value.T
        elif self.turn == "conv":
            value = value.transpose(3, 2, 0, 1)
        return np.ascontiguousarray(value)

    def source_shape(self, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
        """The shape in the file from the canonical ones."""
        *rest, last = shapes[0]
        shape = (*rest, last * len(shapes))
        if self.turn == "linear":
            return shape[::-1]
        return (shape[3], shape[2], shape[0], shape[1]) if self.turn == "conv" else shape


@dataclasses.dataclass(frozen=True)
class Layout:
    """A published form of AST weights.

    Attributes:
        name: short name, as reported.
        title: what to call it in messages.
        prefix: what stands before the names of the body.
        body: rules of embedding, blocks and final norm.
        head_prefix: what stands before the names of the head.
        head: rules of the classifier; empty where it is of no use (ImageNet, pretext tasks).
        ignored: patterns (full match, prefixes included) of tensors knowingly left out.
        rule: how its positions are adapted to other lengths.
        distilled: whether there is a DIST token; None where the file decides.
        eps: epsilons of body and head LayerNorms, unless a config.json says otherwise.
        numbers: names of integer scalars that describe the pretraining grid (SSAST).
    """

    name: str
    title: str
    prefix: str
    body: tuple[Rule, ...]
    head_prefix: str = ""
    head: tuple[Rule, ...] = ()
    ignored: tuple[str, ...] = ()
    rule: Positions = "audioset"
    distilled: bool | None = True
    eps: tuple[float, float] = (1e-6, 1e-5)
    numbers: tuple[str, ...] = ()

    @property
    def rules(self) -> tuple[tuple[str, Rule], ...]:
        """Every rule with the full name of its source."""
        body = ((self.prefix + rule.source, rule) for rule in self.body)
        return (*body, *((self.head_prefix + rule.source, rule) for rule in self.head))

    def is_ignored(self, name: str) -> bool:
        """Whether the tensor is knowingly left out."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)


def _linear(source: str, *targets: str) -> tuple[Rule, Rule]:
    return (
        Rule(f"{source}.weight", tuple(f"{target}/kernel" for target in targets), "linear"),
        Rule(f"{source}.bias", tuple(f"{target}/bias" for target in targets)),
    )


def _norm(source: str, target: str) -> tuple[Rule, Rule]:
    return (
        Rule(f"{source}.weight", (f"{target}/scale",)),
        Rule(f"{source}.bias", (f"{target}/bias",)),
    )


def _embedding(cls: str, dist: str, pos: str, projection: str) -> tuple[Rule, ...]:
    return (
        Rule(cls, ("embed/cls",)),
        Rule(dist, ("embed/dist",)),
        Rule(pos, ("embed/pos",)),
        Rule(f"{projection}.weight", ("embed/proj/kernel",), "conv"),
        Rule(f"{projection}.bias", ("embed/proj/bias",)),
    )


_B = "blocks/{i}"
_QKV = tuple(f"{_B}/attn/{part}" for part in ("q", "k", "v"))

_TIMM = (
    *_embedding("cls_token", "dist_token", "pos_embed", "patch_embed.proj"),
    *_norm("blocks.{i}.norm1", f"{_B}/ln1"),
    *_linear("blocks.{i}.attn.qkv", *_QKV),
    *_linear("blocks.{i}.attn.proj", f"{_B}/attn/out"),
    *_norm("blocks.{i}.norm2", f"{_B}/ln2"),
    *_linear("blocks.{i}.mlp.fc1", f"{_B}/mlp/up"),
    *_linear("blocks.{i}.mlp.fc2", f"{_B}/mlp/down"),
    *_norm("norm", "norm"),
)
_HF_EMBEDDING = _embedding(
    "embeddings.cls_token",
    "embeddings.distillation_token",
    "embeddings.position_embeddings",
    "embeddings.patch_embeddings.projection",
)
_FILE_LAYER = "encoder.layer.{i}"
_HF_FILE = (  # what files of every version of transformers hold
    *_HF_EMBEDDING,
    *_norm(f"{_FILE_LAYER}.layernorm_before", f"{_B}/ln1"),
    *_linear(f"{_FILE_LAYER}.attention.attention.query", _QKV[0]),
    *_linear(f"{_FILE_LAYER}.attention.attention.key", _QKV[1]),
    *_linear(f"{_FILE_LAYER}.attention.attention.value", _QKV[2]),
    *_linear(f"{_FILE_LAYER}.attention.output.dense", f"{_B}/attn/out"),
    *_norm(f"{_FILE_LAYER}.layernorm_after", f"{_B}/ln2"),
    *_linear(f"{_FILE_LAYER}.intermediate.dense", f"{_B}/mlp/up"),
    *_linear(f"{_FILE_LAYER}.output.dense", f"{_B}/mlp/down"),
    *_norm("layernorm", "norm"),
)
_HF_MEMORY = (  # names of state_dict() in transformers 5
    *_HF_EMBEDDING,
    *_norm("layers.{i}.layernorm_before", f"{_B}/ln1"),
    *_linear("layers.{i}.attention.q_proj", _QKV[0]),
    *_linear("layers.{i}.attention.k_proj", _QKV[1]),
    *_linear("layers.{i}.attention.v_proj", _QKV[2]),
    *_linear("layers.{i}.attention.o_proj", f"{_B}/attn/out"),
    *_norm("layers.{i}.layernorm_after", f"{_B}/ln2"),
    *_linear("layers.{i}.mlp.fc1", f"{_B}/mlp/up"),
    *_linear("layers.{i}.mlp.fc2", f"{_B}/mlp/down"),
    *_norm("layernorm", "norm"),
)
_AST_HEAD = (*_norm("mlp_head.0", "head/norm"), *_linear("mlp_head.1", "head/linear"))
_HF_HEAD = (
    *_norm("classifier.layernorm", "head/norm"),
    *_linear("classifier.dense", "head/linear"),
)
_OLD_HEADS = r"(v\.)?head(_dist)?\.(weight|bias)"
_PRETEXT = (
    r"mask_embed",
    r"[cg]predlayer\.[02]\.(weight|bias)",
)
_NO_EPS = (1e-12, 1e-12)


def _layouts() -> Iterable[Layout]:
    for module in ("module.", ""):
        ignored = (re.escape(module) + _OLD_HEADS,)
        yield Layout(
            "original", "original AST .pth", f"{module}v.", _TIMM, module, _AST_HEAD, ignored
        )
        yield Layout(
            "ssast",
            "SSAST pretraining checkpoint",
            f"{module}v.",
            _TIMM,
            ignored=(*ignored, *(re.escape(module) + pattern for pattern in _PRETEXT)),
            rule="ssast",
            numbers=(f"{module}p_input_fdim", f"{module}p_input_tdim"),
        )
        yield Layout(
            "timm",
            "timm DeiT or ViT",
            module,
            _TIMM,
            ignored=ignored,
            rule="imagenet",
            distilled=None,
        )
    for rules in (_HF_FILE, _HF_MEMORY):
        for prefix in ("audio_spectrogram_transformer.", ""):
            yield Layout("hf-ast", "Hugging Face AST", prefix, rules, "", _HF_HEAD, eps=_NO_EPS)
        for name, prefix in (("deit", "deit."), ("vit", "vit."), ("vit", "")):
            yield Layout(
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


def _canonical() -> tuple[Rule, ...]:
    names = [target for rule in (*_TIMM, *_AST_HEAD) for target in rule.targets]
    return tuple(Rule(name, (name,)) for name in names)


NATIVE = Layout("native", "aatjax weights", "", _canonical(), distilled=None)
LAYOUTS: tuple[Layout, ...] = (NATIVE, *_layouts())
HF_AST = next(layout for layout in LAYOUTS if layout.name == "hf-ast")
