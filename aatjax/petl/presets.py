"""The rows of the papers' method tables by name, at their published sizes for AST-base.

Errors of the published code are not reproduced; the docstring of each method names them.
"""

from aatjax.errors import UsageError, suggest
from aatjax.petl.aat import AAT
from aatjax.petl.adapter import Adapter
from aatjax.petl.base import METHODS, Method
from aatjax.petl.combined import Combined
from aatjax.petl.dense_moa import DenseMoA, TopKMoA
from aatjax.petl.loaa import LoAA
from aatjax.petl.lora import LoRA
from aatjax.petl.prefix import Prefix
from aatjax.petl.prompt import Prompt
from aatjax.petl.simple import BitFit, Full, LayerNormTuning, Linear, Partial, Ridge
from aatjax.petl.soft_moa import SoftMoA

TABLE: dict[str, Method] = {
    "ridge": Ridge(),
    # arXiv 2401.10544, whose head has a LayerNorm
    "linear": Linear(),
    "partial": Partial(),
    "prompt_12": Prompt(tokens=12, keep_dist=True, pool=None),
    "aat_m": AAT(spatial=False),
    "aat_s": AAT(mlp=False),
    "aat_ms": AAT(),
    # arXiv 2312.03694
    "bitfit": BitFit(),
    "layer_norm": LayerNormTuning(),
    "spt_300": Prompt(tokens=300, deep=False),
    "dpt_25": Prompt(tokens=25),
    "prefix_24": Prefix(),
    "lora": LoRA(),
    "bottleneck_pfeiffer": Adapter(),
    "bottleneck_houlsby": Adapter(location="both"),
    "conformer_pfeiffer": Adapter(block="conformer", width=8),
    "conformer_houlsby": Adapter(block="conformer", width=8, location="both"),
    # arXiv 2402.00828
    "dense_moa": DenseMoA(),
    "dense_moa_houlsby": DenseMoA(location="both"),
    "top_k_moa": TopKMoA(),
    "soft_moa": SoftMoA(),
    "soft_moa_houlsby": SoftMoA(location="both"),
    # after the papers
    "soft_moa_shared": SoftMoA(shared=True),
    "loaa": LoAA(),
    "full": Full(),
}


def make_method(name: str) -> Method:
    """Return a row (`conformer_houlsby`), a method at its defaults (`aat`), or several (`a+b`).

    Raises:
        UsageError: no such name; the message suggests the nearest.
    """
    if "+" in name:
        return Combined(tuple(make_method(part) for part in name.split("+")))
    if name in TABLE:
        return TABLE[name]
    if name in METHODS:
        return METHODS[name]()
    known = sorted({*TABLE, *METHODS})
    rows = f"there are {', '.join(known)}; join several with +"
    raise UsageError(f"unknown method {name!r}{suggest(name, known)} ({rows})")
