"""Descriptions beside the tensors: Hugging Face's config.json and aatjax's own entry."""

import collections
import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

from aatjax.convert.detect import EXPECTED, guess_origin
from aatjax.convert.infer_config import Sizes
from aatjax.convert.rules import WeightLayout
from aatjax.errors import DataError, Range, UsageError, check_fields, printable
from aatjax.io.json_fields import read_json_fields, shorten
from aatjax.io.json_file import parse_json
from aatjax.models.config import ASTConfig
from aatjax.models.positions import RULES, PositionRule

FORMAT = 1
MOST_STATISTICS = 1e6
Statistics = tuple[float, float]
_MODELS = {"hf-ast": "audio-spectrogram-transformer", "hf-deit": "deit", "hf-vit": "vit"}
HfSize = Annotated[int, Range(1, 10**6)] | None


@dataclasses.dataclass(frozen=True)
class HfFields:
    """The entries of a config.json that are read, with their types and bounds."""

    hidden_size: HfSize = None
    num_hidden_layers: HfSize = None
    num_attention_heads: HfSize = None
    intermediate_size: HfSize = None
    frequency_stride: HfSize = None
    time_stride: HfSize = None
    max_length: HfSize = None
    num_mel_bins: HfSize = None
    patch_size: HfSize = None
    layer_norm_eps: Annotated[float, Range(0, below=1)] | None = None
    qkv_bias: bool | None = None
    hidden_act: str | None = None
    id2label: dict[str, str | int | float] | None = None

    def __post_init__(self) -> None:
        check_fields(self, "config.json ")


@dataclasses.dataclass(frozen=True)
class HfDescription:
    """A config.json of `transformers`, with no `fields` where there is none.

    Attributes:
        fields: its entries, checked against `HfFields`.
        is_ast: whether it describes an AST (not an ImageNet model).
    """

    fields: dict[str, Any]
    is_ast: bool

    @property
    def heads(self) -> int | None:
        """Attention heads."""
        return self.fields.get("num_attention_heads")

    @property
    def qkv_bias(self) -> bool:
        """Whether query, key and value have biases."""
        return self.fields.get("qkv_bias", True) is not False

    @property
    def eps(self) -> tuple[float, float] | None:
        """The one LayerNorm epsilon, for body and head."""
        value = self.fields.get("layer_norm_eps", 1e-12) if self.fields else None
        return None if value is None else (float(value), float(value))

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Class names in order; None for none or for the placeholders LABEL_0, LABEL_1, ..."""
        names = self.fields.get("id2label")
        if not isinstance(names, dict) or not names:
            return None
        try:
            by_number = {int(key): str(value) for key, value in names.items()}
        except ValueError:
            return None
        if sorted(by_number) != list(range(len(by_number))):
            return None
        labels = tuple(by_number[i] for i in range(len(by_number)))
        return None if labels == tuple(f"LABEL_{i}" for i in range(len(labels))) else labels

    def find_contradictions(self, sizes: Sizes) -> list[str]:
        """List where config.json and the shapes of the weights disagree, one phrase each."""
        facts = {
            "hidden_size": sizes.dim,
            "num_hidden_layers": sizes.depth,
            "intermediate_size": sizes.mlp_dim,
            "patch_size": sizes.patch[0],
        }
        found = [
            f"config.json says {name}={self.fields[name]}, the weights {value}"
            for name, value in facts.items()
            if self.fields.get(name, value) != value
        ]
        if self.fields.get("hidden_act", "gelu") != "gelu":
            found.append(
                f"config.json has activation {shorten(self.fields['hidden_act'])}, not gelu"
            )
        labels = self.fields.get("id2label")
        if self.is_ast and sizes.classes and isinstance(labels, dict):
            if len(labels) != sizes.classes:
                found.append(f"config.json names {len(labels)} labels, the head {sizes.classes}")
            elif any(
                not key.isdecimal() or len(key) > 9 or int(key) >= len(labels) for key in labels
            ):
                found.append(f"the keys of id2label are not 0 to {len(labels) - 1}")
            elif wrong := find_wrong_label(list(map(str, labels.values()))):
                found.append(f"id2label has {wrong}")
        return found


def read_hf_description(
    config: dict[str, Any] | None, layout: WeightLayout, path: Path
) -> HfDescription:
    """Read a config.json where it belongs to these weights.

    Raises:
        DataError: it describes another kind of model, or holds impossible numbers.
    """
    if config is None or layout.name not in _MODELS or "model_type" not in config:
        return HfDescription({}, False)
    kind = config["model_type"]
    allowed = ("deit", "vit") if layout.rule == "imagenet" else (_MODELS[layout.name],)
    if kind not in allowed:
        raise DataError(
            f"{path}: config.json says model_type {shorten(kind)}, the tensors are named as "
            f"in {layout.title}: the two do not belong together"
        )
    try:
        read_json_fields("config.json", config, HfFields, ignore_others=True)
    except UsageError as error:
        raise DataError(f"{path}: {error}") from error
    config = {name: value for name, value in config.items() if value is not None}
    return HfDescription(config, layout.name == "hf-ast")


def find_wrong_label(labels: Sequence[str]) -> str:
    """Describe what is wrong with class names, an empty or a repeated one; "" if nothing is."""
    for number, label in enumerate(labels):
        if not label.strip():
            return f"an empty name for class {number}"
    repeated = [name for name, count in collections.Counter(labels).items() if count > 1]
    return f"the name {repeated[0][:80]!r} for more than one class" if repeated else ""


def read_statistics(value: Any) -> Statistics:
    """Return (mean, std) of the log-mel that a model was trained on.

    Raises:
        DataError: not two finite numbers, the second above 0.
    """
    if isinstance(value, list | tuple) and len(value) == 2:
        mean, std = value
        numbers = all(type(x) in (int, float) and abs(x) <= MOST_STATISTICS for x in (mean, std))
        if numbers and std > 0:
            return float(mean), float(std)
    raise DataError(f"statistics {shorten(value)} are not a mean and a standard deviation")


@dataclasses.dataclass(frozen=True)
class NativeDescription:
    """The `aatjax` entry of a file that aatjax wrote."""

    config: ASTConfig
    labels: tuple[str, ...] | None
    grid: tuple[int, int]
    rule: PositionRule
    statistics: Statistics | None


def read_native_description(text: str, path: Path, names: Iterable[str]) -> NativeDescription:
    """Read the description of canonical parameters.

    Raises:
        DataError: not one, of a newer format, or of an adapter instead of a whole model.
    """
    try:
        entries = parse_json(text)
        version = entries.get("format")
    except (ValueError, RecursionError, AttributeError):
        raise DataError(f"{path}: its aatjax entry is not readable as JSON") from None
    if "config" not in entries or "method" in entries or "petl" in entries:
        origin = guess_origin(names) or "it looks like an aatjax adapter"
        raise DataError(
            f"{path}: not the weights of a whole model: {origin}; load it as an adapter; {EXPECTED}"
        )
    if type(version) is not int or version != FORMAT:
        raise DataError(
            f"{path}: format {shorten(version)}, this version reads format {FORMAT}: update aatjax"
        )
    try:
        config = ASTConfig.from_json(entries["config"])
        labels, statistics = entries.get("labels"), entries.get("statistics")
        if labels is not None:
            if not isinstance(labels, list) or not all(isinstance(n, str) for n in labels):
                raise DataError("labels are not a list of names")
            if wrong := find_wrong_label(labels):
                raise DataError(f"labels have {wrong}")
        rows, columns = entries.get("grid") or config.grid
        rule = entries.get("rule", "audioset")
        if rule not in RULES or type(rows) is not int or type(columns) is not int:
            raise DataError(
                f"grid {shorten(rows)} x {shorten(columns)} with position rule {shorten(rule)}"
            )
        if not (1 <= rows <= 10**5 and 1 <= columns <= 10**5):
            raise DataError(f"a position grid of {rows} x {columns}")
        return NativeDescription(
            config,
            None if labels is None else tuple(labels),
            (rows, columns),
            cast(PositionRule, rule),
            None if statistics is None else read_statistics(statistics),
        )
    except (UsageError, DataError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path}: its aatjax entry describes no AST ({printable(str(error)[:300])})"
        ) from None


def describe_checkpoint(
    config: ASTConfig,
    labels: Iterable[str] | None,
    grid: tuple[int, int],
    rule: PositionRule,
    statistics: Statistics | None = None,
) -> str:
    """Return the JSON text that accompanies canonical parameters (format 1)."""
    entries: dict[str, Any] = {
        "format": FORMAT,
        "config": config.to_json(),
        "labels": None if labels is None else list(labels),
        "grid": list(grid),
        "rule": rule,
        "statistics": statistics,
    }
    return json.dumps(entries, ensure_ascii=False)
