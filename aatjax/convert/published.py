"""Fine-tuned checkpoints of the papers' repositories: the backbone, and the tensors of a method.

AAT (arXiv 2401.10544) and PETL_AST (arXiv 2312.03694, 2402.00828) save the whole model. Its method
and sizes are inferred from names and shapes; every tensor must be one of that method, and every
tensor of the method must be there. What no tensor shows is assumed as in the published runs, and
listed.
"""

import collections
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from aatjax.convert.detect import choose_layout, split_block_number
from aatjax.convert.lazy_tensor import FLOATS, StoredTensor
from aatjax.convert.patch_grid import GridRequest
from aatjax.convert.published_names import AAT_BLOCK, ATTENTION, LAYER, list_parts
from aatjax.convert.read import Checkpoint, list_some, read_tensors
from aatjax.convert.sources import open_weights
from aatjax.errors import DataError

Shapes = dict[str, tuple[int, ...]]
MARKS = {"linear_downsample": "bottleneck", "adapter_down": "convpass", "pwise_conv1": "conformer"}
COUNTER = re.compile(r"\.bnorm\.num_batches_tracked$")


@dataclasses.dataclass(frozen=True)
class PublishedFile:
    """A fine-tuned checkpoint of one of the two repositories.

    Attributes:
        name: where it lies.
        checkpoint: the backbone with its head.
        tensors: those of the method, by name without a wrapper's prefix.
        method: the method, as `Method.from_json` takes it.
        assumed: what no tensor shows, one phrase each.
    """

    name: str
    checkpoint: Checkpoint
    tensors: Mapping[str, StoredTensor]
    method: dict[str, Any]
    assumed: tuple[str, ...]

    def load_parameters(self, method: Mapping[str, Any], shapes: Shapes) -> dict[str, np.ndarray]:
        """Read the parameters of a method, by their paths in the adapted model.

        Args:
            method: `self.method`, or another reading of the same tensors.
            shapes: shape of every parameter that the method adds.

        Raises:
            DataError: the file lacks tensors of this method, has others or other shapes, or some
                are not finite.
        """
        parts = dict(list_parts(method, self.checkpoint.config.depth, self.tensors))
        assert parts.keys() == shapes.keys(), sorted(parts.keys() ^ shapes.keys())[:4]
        names = {name for part in parts.values() for name in part.names}
        found = {name for name in self.tensors if not COUNTER.search(name)}
        groups = {
            "missing": sorted(names - found),
            "unexpected": sorted(found - names),
            "not of a floating type": sorted(
                name for name in names & found if self.tensors[name].dtype not in FLOATS
            ),
        }
        if not any(groups.values()):
            values, groups = self._load(parts, shapes)
            if not any(groups.values()):
                return values
        wrong = "; ".join(f"{len(n)} {kind} ({list_some(n)})" for kind, n in groups.items() if n)
        raise DataError(
            f"{self.name}: read as {method['name']} of {REPOSITORIES[self.checkpoint.layout]}, but "
            f"of its tensors {wrong}. Nothing was loaded"
        )

    def _load(
        self, parts: Mapping[str, Any], shapes: Shapes
    ) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
        values: dict[str, np.ndarray] = {}
        groups: dict[str, list[str]] = {"of the wrong shape": [], "with NaN or infinity": []}
        for path, part in parts.items():
            try:
                values[path] = part.load(self.tensors)
            except ValueError:
                values[path] = np.zeros(0)
            held = " and ".join(f"{n} {list(self.tensors[n].shape)}" for n in part.names[:2])
            if values[path].shape != shapes[path]:
                groups["of the wrong shape"].append(held)
            elif not np.isfinite(values[path]).all():
                groups["with NaN or infinity"].append(held)
        return values, groups


REPOSITORIES = {"original": "AAT", "petl-ast": "PETL_AST"}
"""By the layout of the backbone."""


def open_published(source: object, *, frames: int | None = None) -> PublishedFile | None:
    """Open a checkpoint that the code of AAT or PETL_AST saved of a model with added modules.

    Args:
        source: a file, or a state dictionary of tensors.
        frames: 10 ms frames of the input, where the number of positions does not show them.

    Returns:
        The file, or None if it is something else, such as a model without added modules (linear,
        full, BitFit, partial), which `aatjax.load` reads.

    Raises:
        DataError: damaged or incomplete, or a model that aatjax does not have.
    """
    file = open_weights(source)
    layout = choose_layout({name: tensor.shape for name, tensor in file.tensors.items()})
    if layout is None or layout.name not in REPOSITORIES:
        return None
    known = {name for name, _ in layout.rules}
    body = {
        name: tensor
        for name, tensor in file.tensors.items()
        if split_block_number(name)[0] in known or layout.is_ignored(name)
    }
    added = {
        name.removeprefix(layout.wrapper): tensor
        for name, tensor in file.tensors.items()
        if name not in body
    }
    infer = _infer_aat if layout.name == "original" else _infer_petl
    try:
        method, assumed = infer(_fold(added))
    except DataError as error:
        raise DataError(f"{file.path}: {error}") from None
    if method is None:
        return None
    checkpoint = read_tensors(
        dataclasses.replace(file, tensors=body), GridRequest.from_arguments(None, frames, None)
    )
    return PublishedFile(str(file.path), checkpoint, added, method, assumed)


def _fold(tensors: Mapping[str, StoredTensor]) -> Shapes:
    """Most frequent shape of each name, with the number of the block as `{i}`."""
    found: dict[str, collections.Counter[tuple[int, ...]]] = {}
    for name, tensor in tensors.items():
        folded = split_block_number(name)[0]
        found.setdefault(folded, collections.Counter())[tensor.shape] += 1
    return {name: counter.most_common(1)[0][0] for name, counter in found.items()}


Inferred = tuple[dict[str, Any] | None, tuple[str, ...]]
"""A method or None, and what was assumed."""


def _infer_aat(shapes: Shapes) -> Inferred:
    if any(name.startswith(f"{AAT_BLOCK}b_adapter") for name in shapes):
        raise DataError(
            "it has AAT's batch adapters (b_adapter), which are not in the paper and, with their "
            "skip, are no method of aatjax"
        )
    methods: list[dict[str, Any]] = []
    deep, shallow = (shapes.get(f"{kind}prompt_embeddings") for kind in ("deep_", ""))
    if deep is not None and shallow is not None:
        if deep[1:2] != shallow[1:2]:
            raise DataError(
                f"deep_prompt_embeddings {list(deep)} and prompt_embeddings {list(shallow)} differ "
                "in number, as in AAT's branch for ImageNet weights, which is no method of aatjax"
            )
        fixed = {"keep_dist": True, "pool": None, "as_published": True}
        methods.append({"name": "prompt", "tokens": deep[1], **fixed})
    modules = {"mlp": "mlp_adapter", "spatial": "s_adapter"}
    downs = {k: shapes.get(f"{AAT_BLOCK}{name}.fc1.weight") for k, name in modules.items()}
    if found := [shape for shape in downs.values() if shape is not None]:
        present = {kind: shape is not None for kind, shape in downs.items()}
        methods.append({"name": "aat", **present, "width": found[0][0], "as_published": True})
    if len(methods) > 1:
        return {"name": "combined", "methods": methods}, ()
    return (methods[0] if methods else None), ()


def _infer_petl(shapes: Shapes) -> Inferred:
    if "prompt_embeddings" in shapes:
        tokens, deep = shapes["prompt_embeddings"][1], "deep_prompt_embeddings" in shapes
        fields = {"name": "prompt", "tokens": tokens, "deep": deep, "as_published": True}
        return fields, ("pool all, the mean over all tokens",)
    if rows := shapes.get(f"{ATTENTION}key_tokens"):
        return {"name": "prefix", "tokens": 2 * rows[1], "as_published": True}, ()
    modules = {name.removeprefix(LAYER).split(".")[0] for name in shapes}
    downs = {name: shape for name, shape in shapes.items() if ".lora_down_" in name}
    if downs:
        return _infer_lora(downs)
    if modules & {"adapter_module", "adapter_module_FFN"}:
        return _infer_adapter(shapes, modules)
    if modules & {"moa", "moa_mhsa"}:
        return _infer_mixture(shapes, "moa" if "moa" in modules else "moa_mhsa")
    return None, ()


def _infer_lora(downs: Shapes) -> Inferred:
    letters = {name.removesuffix(".weight")[-1].lower() for name in downs}
    rank, dim = next(iter(downs.values()))
    alpha = 0.125 * dim / rank
    fields = {"rank": rank, "alpha": alpha, "targets": [t for t in "qkvo" if t in letters]}
    assumed = f"alpha {alpha:g}, a scale of 0.125 as in the published runs"
    return {"name": "lora", **fields, "as_published": True}, (assumed,)


def _infer_adapter(shapes: Shapes, modules: set[str]) -> Inferred:
    fields = {"name": "adapter", **_infer_block(shapes), "as_published": True}
    if "adapter_module" in modules:  # of the ablation
        fields |= {"location": "ffn", "position": "after"}
        return fields, ("location ffn", "order parallel", "position after")
    fields["location"] = "both" if "adapter_module_MHSA" in modules else "ffn"
    return fields, ("order parallel",)


def _infer_mixture(shapes: Shapes, module: str) -> Inferred:
    if f"{LAYER}{module}.scale" in shapes:
        raise DataError(
            "its Soft-MoA normalises (moa.scale) over the experts instead of the width, which no "
            "published run did and no method of aatjax does"
        )
    numbers = [int(found[1]) for name in shapes if (found := re.search(r"\.moa\.(\d+)\.", name))]
    block = _infer_block(shapes)
    fields = {
        "num_experts": max(numbers, default=0) + 1,
        "expert": block["block"],
        "width": block["width"],
        "location": "mhsa" if module == "moa" else "both",
        "as_published": True,
    }
    slots = shapes.get(f"{LAYER}{module}.slot_params")
    kind = {"name": "dense_moa"} if slots is None else {"name": "soft_moa", "slots": slots[-1]}
    return {**kind, **fields}, ("location mhsa",) if module == "moa" else ()


def _infer_block(shapes: Shapes) -> dict[str, Any]:
    """Kind, width and kernel of the adapter blocks."""
    for name, shape in shapes.items():
        mark = name.split(".")[-2]
        if mark in MARKS and name.endswith(".weight"):
            if mark != "pwise_conv1":
                return {"block": MARKS[mark], "width": shape[0]}
            kernel = shapes.get(name.replace(mark, "dwise_conv"), (1,))[-1]
            return {"block": "conformer", "width": shape[0] // 2, "kernel": kernel}
    raise DataError(f"its adapters are of an unknown kind ({list_some(shapes)})")
