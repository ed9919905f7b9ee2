"""Conformer adapters of width 8, kernel 8 (Pfeiffer) on UrbanSound8K, 277,738 trainable parameters.

Paper row: arXiv 2312.03694, table 1, Conformer (Pfeiffer): 84.57 %.
Expected:  84.6 % accuracy, 83.8 to 85.3 % (95% interval of a share of 8,732 clips).
Time:      not measured; ten runs are 417 PFLOPs, at least 35 minutes on one TPU v5e chip.
Differs:   from the paper's code in what `aatjax recipes urbansound8k_conformer` lists.

    aatjax prepare urbansound8k --from UrbanSound8K.tar.gz
    aatjax train urbansound8k_conformer --cross-validate --protocol petl
"""

from aatjax.audio.augment import Augment
from aatjax.config import Config, Data, Model
from aatjax.petl import Adapter
from aatjax.train.optim import Optim
from aatjax.train.training import Training

config: Config = Config(
    name="urbansound8k_conformer",
    petl=Adapter(block="conformer", width=8, kernel=8),
    model=Model(
        source="MIT/ast-finetuned-audioset-10-10-0.4593",
        frames=400,
        pool="mean_all",
        head_norm=False,
    ),
    data=Data(format="urbansound8k", path="data/urbansound8k", statistics="audioset"),
    training=Training(epochs=30, batch_size=32, loss="ce"),
    optim=Optim(lr=5e-3),
    augment=Augment(freq_mask=24, time_mask=80, spec_after_norm=True),
)
