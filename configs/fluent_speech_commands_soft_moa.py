"""Soft-MoA on Fluent Speech Commands: seven experts of one slot, 947,479 trainable parameters.

Paper row: arXiv 2402.00828; no table of it is known to us. The abstract states that Soft-MoA is
           on par with Dense-MoA and better than a single adapter, by up to 2.5 points.
Expected:  73.2 to 75.7 % accuracy: from the single adapter's 73.19 % (arXiv 2312.03694) up.
Time:      not measured; one run is 307 PFLOPs, at least 26 minutes on one TPU v5e chip.
Differs:   from the paper's code in what `aatjax recipes fluent_speech_commands_soft_moa` lists.

    aatjax prepare fluent_speech_commands --from fluent_speech_commands_dataset.zip
    aatjax train fluent_speech_commands_soft_moa --protocol petl
"""

from aatjax.config import Config, Data, Model
from aatjax.petl import SoftMoA
from aatjax.train.optim import Optim
from aatjax.train.training import Training

config: Config = Config(
    name="fluent_speech_commands_soft_moa",
    petl=SoftMoA(num_experts=7, slots=1),
    model=Model(
        source="MIT/ast-finetuned-audioset-10-10-0.4593",
        frames=400,
        pool="mean_all",
        head_norm=False,
    ),
    data=Data(
        format="fluent_speech_commands", path="data/fluent_speech_commands", statistics="audioset"
    ),
    training=Training(epochs=75, batch_size=32, loss="ce", select="best"),
    optim=Optim(lr=5e-3),
)
