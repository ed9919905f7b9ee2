"""Writes weights: aatjax's own .safetensors, Orbax folders, and what transformers loads."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Array, Float
from safetensors.numpy import save_file

from aatjax.convert.detect import expand_layout
from aatjax.convert.infer_config import Sizes
from aatjax.convert.metadata import Statistics, describe_checkpoint, find_wrong_label
from aatjax.convert.orbax import write_orbax_files
from aatjax.convert.rules import HF_AST
from aatjax.errors import DataError, UsageError
from aatjax.io.atomic import write_file, write_folder
from aatjax.io.json_file import write_json
from aatjax.models.config import ASTConfig
from aatjax.models.positions import PositionRule

Params = Mapping[str, Float[np.ndarray, "..."]] | Mapping[str, Float[Array, "..."]]

AUDIOSET_MEAN, AUDIOSET_STD = -4.2677393, 4.5689974


def write_native(
    path: str | Path,
    params: Params,
    config: ASTConfig,
    labels: Iterable[str] | None = None,
    dtype: Literal["float32", "float16"] = "float32",
    *,
    grid: tuple[int, int] | None = None,
    rule: PositionRule = "audioset",
    statistics: Statistics | None = None,
) -> None:
    """Write canonical parameters and their description to one .safetensors file, atomically.

    Args:
        path: the file; an older one is replaced once the new one is complete.
        params: canonical names to arrays, with or without the head.
        config: the model they belong to.
        labels: class names, one per class.
        dtype: stored type; float16 halves the file.
        grid: (frequency, time) grid of `embed/pos` where it is not `config.grid`.
        rule: how positions on another grid are adapted.
        statistics: mean and standard deviation of the log-mel that the model was trained on.

    Raises:
        DataError: names or shapes are not those of `config`, or a number float16 cannot hold.
        WriteError: the file could not be written; an older one is unchanged.
    """
    if dtype not in ("float32", "float16"):
        raise UsageError(f"dtype={dtype!r} is neither float32 nor float16")
    names = _check_labels(labels, config)
    arrays = _check_params(params, config, grid or config.grid)
    if dtype == "float16":
        for name, value in arrays.items():
            if np.abs(value).max(initial=0.0) > np.finfo(np.float16).max:
                raise DataError(f"{name} exceeds what float16 holds: write float32")
    text = describe_checkpoint(config, names, grid or config.grid, rule, statistics)
    stored = {name: np.ascontiguousarray(value, dtype) for name, value in arrays.items()}
    write_file(Path(path), lambda place: save_file(stored, place, {"aatjax": text}))


def write_orbax(
    path: str | Path,
    params: Params,
    config: ASTConfig,
    labels: Iterable[str] | None = None,
    *,
    grid: tuple[int, int] | None = None,
    rule: PositionRule = "audioset",
    statistics: Statistics | None = None,
    replace: bool = False,
) -> None:
    """Write an Orbax folder (`params/` and `aatjax.json`), atomically.

    Args and errors as `write_native`; `replace` allows a folder that is not empty.
    """
    names = _check_labels(labels, config)
    arrays = _check_params(params, config, grid or config.grid)
    text = describe_checkpoint(config, names, grid or config.grid, rule, statistics)
    write_folder(Path(path), lambda f: write_orbax_files(f, arrays, text), replace=replace)


def write_hf(
    path: str | Path,
    params: Params,
    config: ASTConfig,
    labels: Iterable[str] | None = None,
    *,
    mean: float = AUDIOSET_MEAN,
    std: float = AUDIOSET_STD,
    multi_label: bool | None = None,
    replace: bool = False,
) -> tuple[str, ...]:
    """Write a folder that transformers (4 and 5) loads, atomically.

    With a head it is an `ASTForAudioClassification`, without one an `ASTModel`. Its patches are
    square: those that are higher than wide get zeros behind them, and the input as many frames,
    which no output depends on.

    Args:
        path: the folder; it must not exist yet, or be empty.
        params: canonical names to arrays; `embed/pos` on `config.grid`.
        config: the model they belong to.
        labels: class names, one per class.
        mean: log-mel mean that ASTFeatureExtractor subtracts.
        std: log-mel standard deviation; the extractor divides by twice this.
        multi_label: whether transformers' pipeline takes the sigmoid of the logits or their
            softmax; None does not say.
        replace: allow a folder that is not empty.

    Returns:
        Notes on small differences of Hugging Face's form; empty if there are none.

    Raises:
        UsageError: a model that Hugging Face's AST cannot express.
        DataError: names or shapes are not those of `config`.
        WriteError: the folder could not be written.
    """
    has_head = any(name.startswith("head/") for name in params)
    _check_expressible(config, has_head)
    names = _check_labels(labels, config)
    arrays = _check_params(params, config, config.grid)
    notes: list[str] = []
    if config.patch[1] < config.patch[0]:
        notes.append(
            f"Hugging Face's AST has square patches: those of {config.patch[0]} x "
            f"{config.patch[1]} are written with zeros behind them, which changes no output"
        )
        config, arrays = _make_square(config, arrays)
    if has_head and config.head_eps != config.eps:
        notes.append(
            f"Hugging Face has one LayerNorm epsilon: {config.eps:g} is written, the head used "
            f"{config.head_eps:g} (a small change while the pooled vector's variance is far larger)"
        )
    shapes = {name: value.shape for name, value in arrays.items()}
    prefix = HF_AST.prefix if has_head else ""
    tensors = {
        name if name.startswith("classifier.") else prefix + name.removeprefix(HF_AST.prefix): (
            rule.to_source([arrays[target] for target in targets])
        )
        for name, (rule, targets, _) in expand_layout(HF_AST, shapes, config.depth).items()
    }

    def fill(folder: Path) -> None:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        entries = _make_hf_config(config, names, has_head)
        if has_head and multi_label is not None:
            kind = "multi_label" if multi_label else "single_label"
            entries["problem_type"] = f"{kind}_classification"
        write_json(folder / "config.json", entries)
        write_json(folder / "preprocessor_config.json", _make_hf_extractor(config, mean, std))

    write_folder(Path(path), fill, replace=replace)
    return tuple(notes)


def _check_expressible(config: ASTConfig, has_head: bool) -> None:
    always = "Hugging Face's AST always has one"
    reasons = {
        f"it has no distillation token, {always}": not config.distilled,
        f"it pools {config.pool}, Hugging Face's AST the mean of CLS and DIST": (
            has_head and config.pool != "cls_dist"
        ),
        f"its head has no LayerNorm, {always}": has_head and not config.head_norm,
        f"its patches are {config.patch}, Hugging Face's AST has square ones": (
            config.patch[0] < config.patch[1]
        ),
    }
    if any(reasons.values()):
        listed = "; ".join(reason for reason, holds in reasons.items() if holds)
        raise UsageError(f"Hugging Face cannot express this model: {listed}: write native weights")


def _make_square(
    config: ASTConfig, arrays: dict[str, Float[np.ndarray, "..."]]
) -> tuple[ASTConfig, dict[str, Float[np.ndarray, "..."]]]:
    """The same model with square patches: zeros follow the kernel, and frames the input."""
    height, width = config.patch
    kernel = arrays["embed/proj/kernel"]
    wider = np.pad(kernel, ((0, 0), (0, height - width), (0, 0), (0, 0)))
    config = dataclasses.replace(
        config, patch=(height, height), frames=config.frames + height - width
    )
    return config, arrays | {"embed/proj/kernel": wider}


def _make_hf_config(config: ASTConfig, labels: list[str] | None, has_head: bool) -> dict[str, Any]:
    entries: dict[str, Any] = {
        "architectures": ["ASTForAudioClassification" if has_head else "ASTModel"],
        "model_type": "audio-spectrogram-transformer",
        "hidden_size": config.dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_dim,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": config.eps,
        "patch_size": config.patch[0],
        "qkv_bias": config.qkv_bias,
        "frequency_stride": config.stride[0],
        "time_stride": config.stride[1],
        "max_length": config.frames,
        "num_mel_bins": config.mels,
        "torch_dtype": "float32",
    }
    if has_head:
        names = labels or [f"LABEL_{i}" for i in range(config.num_classes)]
        entries["id2label"] = {str(i): name for i, name in enumerate(names)}
        entries["label2id"] = {name: i for i, name in enumerate(names)}
    return entries


def _make_hf_extractor(config: ASTConfig, mean: float, std: float) -> dict[str, Any]:
    return {
        "feature_extractor_type": "ASTFeatureExtractor",
        "sampling_rate": 16000,
        "num_mel_bins": config.mels,
        "max_length": config.frames,
        "mean": mean,
        "std": std,
        "do_normalize": True,
        "return_attention_mask": False,
        "feature_size": 1,
        "padding_side": "right",
        "padding_value": 0.0,
    }


def _check_labels(labels: Iterable[str] | None, config: ASTConfig) -> list[str] | None:
    if labels is None:
        return None
    names = [str(label) for label in labels]
    if len(names) != config.num_classes:
        raise UsageError(f"{len(names)} labels for {config.num_classes} classes")
    if wrong := find_wrong_label(names):
        raise UsageError(f"labels have {wrong}")
    return names


def _check_params(
    params: Params, config: ASTConfig, grid: tuple[int, int]
) -> dict[str, Float[np.ndarray, "..."]]:
    """The parameters as float32 arrays, once names and shapes are exactly those of the config."""
    arrays = {name: np.asarray(value, np.float32) for name, value in params.items()}
    has_head = any(name.startswith("head/") for name in arrays)
    shapes = Sizes.from_config(config, grid, has_head=has_head).shapes()
    wrong = [f"{name} is missing" for name in shapes if name not in arrays]
    for name, value in arrays.items():
        if name not in shapes:
            wrong.append(f"{name} is unknown")
        elif value.shape != shapes[name]:
            wrong.append(f"{name} is {value.shape}, expected {shapes[name]}")
    if wrong:
        more = f", and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise DataError(f"parameters do not fit the model: {', '.join(wrong[:4])}{more}")
    return {name: arrays[name] for name in shapes}
