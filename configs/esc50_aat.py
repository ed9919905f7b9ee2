"""AAT beside the MLPs and between the time steps (MS) on ESC-50, 7,140,914 trainable parameters.

Paper row: arXiv 2401.10544, a figure without numbers: about 96.2 % at epoch 25.
Expected:  about 96 % accuracy, 95.3 to 97.0 % (95% interval of a share of 2,000 clips); the
           protocol aat chooses the epoch by the test clips, so honest figures are lower.
Time:      not measured; five runs are 50 PFLOPs, at least 4 minutes on one TPU v5e chip.
Differs:   from the paper's code in what `aatjax recipes esc50_aat` lists.

    aatjax prepare esc50 --download
    aatjax train esc50_aat --cross-validate --protocol aat
"""

from aatjax.audio.augment import Augment
from aatjax.config import Config, Data, Model
from aatjax.petl import AAT
from aatjax.train.optim import Optim
from aatjax.train.training import Training

config: Config = Config(
    name="esc50_aat",
    petl=AAT(),
    model=Model(source="MIT/ast-finetuned-audioset-10-10-0.4593", frames=512),
    data=Data(format="esc50", path="data/esc50", statistics="esc50"),
    training=Training(epochs=25, batch_size=42, loss="ce"),
    optim=Optim.aat(lr=1e-4),
    augment=Augment(freq_mask=24, time_mask=96),
)
