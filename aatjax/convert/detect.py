"""Which layout a file follows, or what else it seems to be, by the names of its tensors."""

import re
from collections.abc import Iterable, Mapping

from aatjax.convert.rules import LAYOUTS, TensorRule, WeightLayout

# The first pattern that some name matches (re.search) decides.
SIGNS: tuple[tuple[str, str], ...] = (
    (r"^(param_groups|exp_avg|optimizer)$", "the state of an optimizer, not of a model"),
    (
        r"\b(s|b|mlp)_adapter\.|prompt_embeddings|\badapter_module|lora_(down|up)_|"
        r"\bmoa(_\w+)?\.moa\.|\b(key|value)_tokens$",
        "an AST fine-tuned with AAT adapters or prompts, or by PETL_AST: aatjax.load_published or "
        "`aatjax convert FILE adapter.safetensors` reads it",
    ),
    (r"lora_[AB]|base_model\.model\.", "a LoRA or PEFT adapter"),
    (r"^(adapter|trainable|stats)/|^blocks/.*(adapter|lora|prompt|experts)", "an aatjax adapter"),
    (
        r"adapter|prompt|lora|moa|experts",
        "a model with adapters, prompts or experts inside (parameter-efficient fine-tuning)",
    ),
    (r"relative_position_bias_table", "a Swin-like model (HTS-AT, CLAP)"),
    (r"feature_extractor\.conv_layers|masked_spec_embed", "wav2vec 2.0, HuBERT or WavLM"),
    (r"word_embeddings|token_type_embeddings", "a BERT-like language model"),
    (r"conv_block\d\.conv\d|fc_audioset|spectrogram_extractor", "a PANNs network such as CNN14"),
    (r"audio_branch|text_branch", "a CLAP model"),
    (r"^(model\.)?(encoder|decoder)\.(conv1|embed_positions|layers\.\d+\.fc1)", "Whisper"),
    (r"post_extract_proj|grep_linear", "BEATs"),
    (r"decoder_blocks|decoder_embed", "a masked autoencoder with its decoder"),
    (r"vision_model\.|text_model\.", "a CLIP-like model"),
    (r"^layer\d\.\d+\.conv\d|^(features|classifier)\.\d+\.weight", "a convolutional network"),
    (r"^(transformer\.)?h\.\d+\.|model\.layers\.\d+\.self_attn", "a GPT-like language model"),
    (r"cpredlayer|mask_embed|p_input_fdim", "an SSAST pretraining checkpoint"),
    (r"audio_spectrogram_transformer\.", "a Hugging Face AST"),
    (r"dist_token|distillation_token", "an AST or DeiT"),
    (r"patch_embed|cls_token", "a vision Transformer (ViT)"),
)
EXPECTED = (
    "expected: AST (original .pth or Hugging Face), SSAST pretraining, ImageNet DeiT or ViT, or a "
    "file aatjax wrote"
)
WRAPPERS = ("module.", "_orig_mod.", "model.")
"""Prefixes of names by DataParallel, torch.compile, and modules that hold the model."""


def guess_origin(names: Iterable[str]) -> str | None:
    """Return what tensors of these names probably belong to, or None."""
    listed = [name[:200] for name in names]
    for pattern, what in SIGNS:
        if any(re.search(pattern, name) for name in listed):
            return f"it looks like {what}"
    return None


def find_wrapper(names: Iterable[str]) -> str:
    """Return the `WRAPPERS` that all names begin with, joined."""
    listed, wrapper = list(names), ""
    while listed and (
        found := [w for w in WRAPPERS if all(n.startswith(wrapper + w) for n in listed)]
    ):
        wrapper += found[0]
    return wrapper


def choose_layout(shapes: Mapping[str, tuple[int, ...]]) -> WeightLayout | None:
    """Return the layout whose names cover most of the file.

    None if no layout covers half of the file and none finds most of its own names there. Names
    that several layouts share (bare Hugging Face bodies) are decided by the patch kernel: one
    input channel is AST, three are ImageNet.
    """
    names = [split_block_number(name)[0] for name in shapes]
    wrapper = find_wrapper(names)
    best: tuple[float, WeightLayout] | None = None
    for bare in LAYOUTS:
        layout = bare.wrap(wrapper)
        known = {source for source, _ in layout.rules}
        covered = sum(name in known for name in names)
        complete = len(known.intersection(names)) >= 0.8 * len(layout.body)
        rank = covered + 0.5 * sum(layout.is_ignored(n) or n in layout.numbers for n in names)
        kernel = next(n for n, rule in layout.rules if rule.targets == ("embed/proj/kernel",))
        channels = shapes.get(kernel, ())[1:2]
        if channels == (3,) and layout.rule == "imagenet":
            rank += 1
        if (complete or 2 * covered >= len(names) > 0) and (best is None or rank > best[0]):
            best = (rank, layout)
    return None if best is None else best[1]


def split_block_number(name: str) -> tuple[str, int | None]:
    """Return a name with the number of its block replaced by `{i}`, and that number."""
    found = re.search(r"(?:^|[./])(?:blocks|layer|layers)[./](\d{1,4})[./]", name)
    if found is None:
        return name, None
    return f"{name[: found.start(1)]}{{i}}{name[found.end(1) :]}", int(found.group(1))


def expand_layout(
    layout: WeightLayout, shapes: Mapping[str, tuple[int, ...]], depth: int
) -> dict[str, tuple[TensorRule, tuple[str, ...], tuple[int, ...]]]:
    """List the tensors of a file of this layout.

    Args:
        layout: one of `LAYOUTS`.
        shapes: canonical names and shapes, every one expected.
        depth: number of blocks.

    Returns:
        For each name in the file: its rule, canonical names and shape in the file.
    """
    found = {}
    for source, rule in layout.rules:
        for i in range(depth) if "{i}" in source else (0,):
            targets = tuple(target.replace("{i}", str(i)) for target in rule.targets)
            if all(target in shapes for target in targets):
                shape = rule.source_shape([shapes[target] for target in targets])
                found[source.replace("{i}", str(i))] = (rule, targets, shape)
    return found
