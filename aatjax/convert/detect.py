"""What a file that is no AST checkpoint seems to be, told from the names of its tensors."""

import re
from collections.abc import Iterable

# The first pattern that some name matches (re.search) decides.
_SIGNS: tuple[tuple[str, str], ...] = (
    (r"^(param_groups|exp_avg|optimizer)$", "the state of an optimizer, not of a model"),
    (r"\b[smb]_adapter\.|prompt_embeddings", "an AST fine-tuned with AAT adapters or prompts"),
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


def guess_origin(names: Iterable[str]) -> str | None:
    """What tensors of these names probably belong to, or None."""
    listed = [name[:200] for name in names]
    for pattern, what in _SIGNS:
        if any(re.search(pattern, name) for name in listed):
            return f"it looks like {what}"
    return None
