"""Small adapter files on a small backbone."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from aatjax import load, petl, surgery
from aatjax.audio.frontend import FrontEnd
from aatjax.convert import write_native
from aatjax.models.ast import AST, ASTConfig
from aatjax.train.adapter_file import encode_adapter, read_info, save_adapter

TINY = ASTConfig(dim=32, depth=2, heads=2, mlp_dim=48, stride=(16, 16), frames=39, num_classes=5)
CLASSES = ("yes", "no", 'naïve, "quoted"\n')
FRONTEND = FrontEnd(frames=39, mean=-5.5, std=3.25, pad="repeat")


def write_base(path: Path, seed: int = 0, config: ASTConfig = TINY) -> Path:
    write_native(path, surgery.arrays(AST(config, rngs=nnx.Rngs(seed))), config)
    return path


def trained(source: Path | str, method: petl.Method, *, classes: int = 3, **options: Any) -> AST:
    """An adapted model whose trainable parameters are far from their initial values."""
    model = petl.adapt(load(source, num_classes=classes, **options), method, seed=3)
    rng = np.random.default_rng(0)
    for value in surgery.variables(model).values():
        if isinstance(value, nnx.Param):
            value[...] = value[...] + jnp.asarray(0.3 * rng.normal(size=value.shape), jnp.float32)
    return model


def save(path: Path, model: AST, **extra: Any) -> Path:
    frontend = dataclasses.replace(FRONTEND, frames=model.config.frames)
    return save_adapter(
        path, model, classes=CLASSES, multi_label=True, frontend=frontend, extra=extra
    )


def inputs(frames: int = 39) -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(1).normal(size=(2, frames, 128)), jnp.float32)


def rewrite(
    path: Path,
    change: Callable[[dict[str, Any]], object] = lambda info: None,
    tensors: dict[str, np.ndarray] | None = None,
    *,
    out: Path | None = None,
) -> Path:
    """An adapter file again with other metadata or tensors, its checksum right."""
    info = read_info(path)
    assert info is not None
    change(info)
    out = out or path
    out.write_bytes(encode_adapter(info, load_file(path) if tensors is None else tensors))
    return out
