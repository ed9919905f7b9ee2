"""Bottleneck adapters of width 12 beside the MLPs (Pfeiffer) on ESC-50, 288,962 trainable
parameters.

Paper row: arXiv 2312.03694, table 1, Bottleneck (Pfeiffer): 88.38 %.
Expected:  88.4 % accuracy, 86.9 to 89.7 % (95% interval of a share of 2,000 clips).
Time:      not measured; five runs are 91 PFLOPs, at least 8 minutes on one TPU v5e chip.
Differs:   from the paper's code in what `aatjax recipes esc50_conformer` lists.

    aatjax prepare esc50 --download
    aatjax train esc50_adapter --cross-validate --protocol petl
"""

from aatjax.audio.augment import Augment
from aatjax.config import Config, Data, Model
from aatjax.petl import Adapter
from aatjax.train.optim import Optim
from aatjax.train.training import Training

config: Config = Config(
    name="esc50_adapter",
    petl=Adapter(block="bottleneck"),
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
