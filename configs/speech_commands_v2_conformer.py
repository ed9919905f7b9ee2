"""Conformer adapters of width 8, kernel 31 (Pfeiffer) on Speech Commands v2, 299,171
trainable parameters.

Paper row: arXiv 2312.03694, table 1, Conformer (Pfeiffer): 96.28 %.
Expected:  96.3 % accuracy, 95.9 to 96.6 % (95% interval of a share of 11,005 clips).
Time:      not measured; one run is 245 PFLOPs, at least 21 minutes on one TPU v5e chip.
Differs:   from the paper's code in what `aatjax recipes speech_commands_v2_conformer` lists.

    aatjax prepare speech_commands_v2 --download
    aatjax train speech_commands_v2_conformer --protocol petl
"""

from aatjax.config import Config, Data, Model
from aatjax.petl import Adapter
from aatjax.train.optim import Optim
from aatjax.train.training import Training

config: Config = Config(
    name="speech_commands_v2_conformer",
    petl=Adapter(block="conformer", width=8, kernel=31),
    model=Model(
        source="MIT/ast-finetuned-audioset-10-10-0.4593",
        frames=100,
        pool="mean_all",
        head_norm=False,
    ),
    data=Data(format="speech_commands_v2", path="data/speech_commands_v2", statistics="audioset"),
    training=Training(epochs=75, batch_size=128, loss="ce", select="best"),
    optim=Optim(lr=5e-3),
)
