"""AAT (MS) on Speech Commands v2, 7,129,379 trainable parameters.

Paper row: arXiv 2401.10544, a figure without numbers: about 97.5 % on the validation list at epoch
           30, learning rate 2.5e-4.
Expected:  about 97.5 % accuracy, 97.2 to 97.8 % (95% interval of a share of 9,981 clips).
Time:      not measured; one run is 141 PFLOPs, at least 12 minutes on one TPU v5e chip.
Differs:   from the paper's code in what `aatjax recipes speech_commands_v2_aat` lists.

    aatjax prepare speech_commands_v2 --download
    aatjax train speech_commands_v2_aat --protocol aat --optim.lr 2.5e-4
"""

from aatjax.audio.augment import Augment
from aatjax.config import Config, Data, Model
from aatjax.petl import AAT
from aatjax.train.optim import Optim
from aatjax.train.training import Training

config: Config = Config(
    name="speech_commands_v2_aat",
    petl=AAT(),
    model=Model(source="MIT/ast-finetuned-audioset-10-10-0.4593", frames=128),
    data=Data(
        format="speech_commands_v2", path="data/speech_commands_v2", statistics="speech_commands_v2"
    ),
    training=Training(epochs=30, batch_size=128, loss="bce", select="best"),
    optim=Optim.aat(lr=5e-4),
    augment=Augment(mixup=0.6, freq_mask=48, time_mask=48, noise=True, roll=True),
)
