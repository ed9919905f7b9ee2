"""The shape of the small AST that most tests run."""

from typing import Any

from aatjax.models.ast import ASTConfig


def tiny_config(**changes: Any) -> ASTConfig:
    """An AST of one block of width 32 for one second of sound and three classes."""
    fields: dict[str, Any] = {
        "dim": 32,
        "depth": 1,
        "heads": 2,
        "mlp_dim": 48,
        "stride": (16, 16),
        "frames": 98,
        "num_classes": 3,
        "pool": "mean_patches",
    }
    return ASTConfig(**{**fields, **changes})
