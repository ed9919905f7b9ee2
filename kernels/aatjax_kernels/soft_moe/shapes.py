"""Shapes of real workloads, for which the kernels must compile."""

from typing import NamedTuple


class SoftMoeShape(NamedTuple):
    """One Soft-MoA layer of AST-base (d = 768).

    Attributes:
        batch: clips.
        tokens: 12 floor((frames - 16) / 10 + 1) + 2 at 100 frames a second.
        experts, slots, width: experts, slots per expert and bottleneck width.
    """

    batch: int
    tokens: int
    experts: int
    slots: int
    width: int


TOKENS = (110, 146, 470, 590, 602, 1214, 3590)
"""1, 1.3, 4 and 5 seconds, 512 and 1,024 frames, 30 seconds."""

MIXTURES = ((7, 1, 6), (15, 1, 2), (24, 1, 1), (7, 2, 6), (16, 8, 6))
"""Experts, slots per expert and bottleneck width: the papers' settings, and 128 slots."""

SHAPES = tuple(
    SoftMoeShape(max(4, 32 * 602 // tokens // 4 * 4), tokens, *mixture)
    for tokens in TOKENS
    for mixture in MIXTURES
)
