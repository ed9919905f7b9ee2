"""Soft-MoA on ESC-50: seven experts of one slot beside attention, 962,090 trainable parameters.

Paper row: arXiv 2402.00828; no table of it is known to us. The abstract states that Soft-MoA is
           on par with Dense-MoA and better than a single adapter, by up to 2.5 points.
Expected:  88.4 to 90.9 % accuracy: from the single adapter's 88.38 % (arXiv 2312.03694) up.
Time:      not measured; five runs are 91 PFLOPs, at least 8 minutes on one TPU v5e chip.
Differs:   from the paper's code in what `aatjax recipes esc50_soft_moa` lists.

    aatjax prepare esc50 --download
    aatjax train esc50_soft_moa --cross-validate --protocol petl
"""

from aatjax.audio.augment import Augment
from aatjax.config import Config, Data, Model
from aatjax.petl import SoftMoA
from aatjax.train.optim import Optim
from aatjax.train.training import Training

config: Config = Config(
    name="esc50_soft_moa",
    petl=SoftMoA(num_experts=7, slots=1),
    model=Model(
        source="MIT/ast-finetuned-audioset-10-10-0.4593",
        frames=500,
        pool="mean_all",
        head_norm=False,
    ),
    data=Data(format="esc50", path="data/esc50", statistics="audioset"),
    training=Training(epochs=50, batch_size=32, loss="ce"),
    optim=Optim(lr=5e-3),
    augment=Augment(freq_mask=24, time_mask=80, spec_after_norm=True),
)
