"""The names of a method's parameters in the checkpoints of the papers' repositories."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal

import numpy as np

from aatjax.convert.lazy_tensor import StoredTensor

Turn = Literal["copy", "linear", "pointwise", "depthwise"]
BlockNames = dict[str, tuple[str, Turn]]
"""Parameter of an adapter block -> its name in the file's block, and its change of axes."""

LAYER = "encoder.layer.{i}."
ATTENTION = f"{LAYER}attention.attention."
AAT_BLOCK = "v.blocks.{i}."


def _name_linear(source: str, suffix: str, turn: Turn = "linear") -> BlockNames:
    return {f"w_{suffix}": (f"{source}.weight", turn), f"b_{suffix}": (f"{source}.bias", "copy")}


AAT_ADAPTER: BlockNames = _name_linear("fc1", "down") | _name_linear("fc2", "up")
_CONFORMER_NORMS: BlockNames = {
    "norm/scale": ("lnorm.weight", "copy"),
    "norm/bias": ("lnorm.bias", "copy"),
    "batch_norm/scale": ("bnorm.weight", "copy"),
    "batch_norm/bias": ("bnorm.bias", "copy"),
    "batch_norm/mean": ("bnorm.running_mean", "copy"),
    "batch_norm/var": ("bnorm.running_var", "copy"),
}
ADAPTERS: dict[str, BlockNames] = {
    "bottleneck": _name_linear("linear_downsample", "down") | _name_linear("linear_upsample", "up"),
    "convpass": _name_linear("adapter_down", "down")
    | _name_linear("adapter_up", "up")
    | _name_linear("adapter_conv", "conv"),
    "conformer": _name_linear("pwise_conv1", "in", "pointwise")
    | _name_linear("dwise_conv", "conv", "depthwise")
    | _name_linear("pwise_conv2", "out", "pointwise")
    | _CONFORMER_NORMS,
}
"""The adapter blocks of PETL_AST by kind."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A parameter of a method in the file.

    Attributes:
        names: its name, or where it is stacked, one for each expert.
        turn: `linear` reverses the axes; `pointwise` and `depthwise` are those of 1-d convolutions
            (out, in, width), without the axis of length one.
        stacked: whether it has an axis for the experts.
        row: (which, of how many) where one tensor holds a row for each block.
    """

    names: tuple[str, ...]
    turn: Turn = "copy"
    stacked: bool = False
    row: tuple[int, int] | None = None

    def load(self, tensors: Mapping[str, StoredTensor]) -> np.ndarray:
        """Return the parameter, float32.

        Raises:
            ValueError: the tensors have not the axes for this.
        """
        found = [np.asarray(tensors[name].load(), np.float32) for name in self.names]
        turned = [self._turn(value) for value in found]
        return np.stack(turned) if self.stacked else turned[0]

    def _turn(self, value: np.ndarray) -> np.ndarray:
        if self.row is not None:
            row, rows = self.row
            if len(value) != rows:
                raise ValueError(f"{len(value)} rows, {rows} expected")
            return value[row : row + 1]
        if self.turn in ("pointwise", "depthwise"):
            value = value.squeeze(axis=2 if self.turn == "pointwise" else 1)
        return value if self.turn == "copy" else np.ascontiguousarray(value.T)


def list_parts(
    method: Mapping[str, Any], depth: int, names: Collection[str]
) -> Iterator[tuple[str, Part]]:
    """Yield the path of every parameter of a method in an adapted model, and where it is in a file.

    Args:
        method: a method as `Method.to_json` writes it.
        depth: number of blocks.
        names: names in the file, where their spelling varies.
    """
    if method["name"] == "combined":
        for each in method["methods"]:
            yield from list_parts(each, depth, names)
    elif method["name"] == "prompt":
        yield from _list_prompts(method, depth)
    else:
        rules = list(_list_rules(method, names))
        for i in range(depth):
            for path, part in rules:
                numbered = tuple(name.replace("{i}", str(i)) for name in part.names)
                yield f"blocks/{i}/{path}", dataclasses.replace(part, names=numbered)


def _list_prompts(method: Mapping[str, Any], depth: int) -> Iterator[tuple[str, Part]]:
    is_deep = method.get("deep", True)
    # Deep prompts of the first block are its own, unless they never enter the model.
    is_first = is_deep and not method.get("keep_dist", False)
    yield "blocks/0/prompts" if is_first else "embed/prompts", Part(("prompt_embeddings",))
    for i in range(1, depth) if is_deep else ():
        row = (i - 1, depth - 1)
        yield f"blocks/{i}/prompts", Part(("deep_prompt_embeddings",), row=row)


def _list_rules(method: Mapping[str, Any], names: Collection[str]) -> Iterator[tuple[str, Part]]:
    """Yield the parameters of one block."""
    location = method.get("location")
    sites = ("mhsa", "ffn") if location == "both" else (str(location),)
    match method["name"]:
        case "aat":
            if method["mlp"]:
                yield from _list_adapter("mlp/mlp_adapter", f"{AAT_BLOCK}mlp_adapter", AAT_ADAPTER)
            if method["spatial"]:
                yield from _list_adapter(
                    "attn/spatial_adapter", f"{AAT_BLOCK}s_adapter", AAT_ADAPTER
                )
        case "prefix":
            yield "attn/k/prefix", Part((f"{ATTENTION}key_tokens",))
            yield "attn/v/prefix", Part((f"{ATTENTION}value_tokens",))
        case "lora":
            yield from _list_lora(method["targets"], names)
        case "adapter":
            for site in sites:
                module = f"{LAYER}adapter_module"  # of the ablation, else one for each site
                is_single = any(f"{module}.".replace("{i}", "0") in name for name in names)
                module += "" if is_single else f"_{site.upper()}"
                path = f"{'attn' if site == 'mhsa' else 'mlp'}/adapter"
                yield from _list_adapter(path, module, ADAPTERS[method["block"]])
        case _:
            for site in sites:
                yield from _list_mixture(method, site, f"_{site}" if len(sites) > 1 else "")


def _list_adapter(path: str, module: str, block: BlockNames) -> Iterator[tuple[str, Part]]:
    for parameter, (name, turn) in block.items():
        yield f"{path}/{parameter}", Part((f"{module}.{name}",), turn)


def _list_lora(targets: Collection[str], names: Collection[str]) -> Iterator[tuple[str, Part]]:
    for target in targets:
        module = f"{LAYER}attention.output." if target == "o" else ATTENTION
        upper = any(f"lora_down_{target.upper()}." in name for name in names)  # in the ablation
        letter = target.upper() if upper else target
        path = f"attn/{'out' if target == 'o' else target}/lora"
        yield f"{path}_a", Part((f"{module}lora_down_{letter}.weight",), "linear")
        yield f"{path}_b", Part((f"{module}lora_up_{letter}.weight",), "linear")


def _list_mixture(method: Mapping[str, Any], site: str, suffix: str) -> Iterator[tuple[str, Part]]:
    # Added twice, the mixture is a part of the block.
    is_twice = method["as_published"] and method["location"] == "mhsa"
    path = "" if is_twice else "attn/" if site == "mhsa" else "mlp/"
    path += method["name"]
    module, experts = f"{LAYER}moa{suffix}", range(method["num_experts"])
    block = ADAPTERS[method["expert"]]
    if method["expert"] == "bottleneck":
        for parameter, (name, turn) in block.items():
            each = tuple(f"{module}.moa.{n}.{name}" for n in experts)
            yield f"{path}/{parameter}", Part(each, turn, stacked=True)
    else:
        for n in experts:
            yield from _list_adapter(f"{path}/blocks/{n}", f"{module}.moa.{n}", block)
    if method["name"] == "soft_moa":
        yield f"{path}/phi", Part((f"{module}.slot_params",))
    else:
        router = f"{LAYER}router{suffix}.ff"
        yield f"{path}/w_router", Part((f"{router}.weight",), "linear")
        yield f"{path}/b_router", Part((f"{router}.bias",))
