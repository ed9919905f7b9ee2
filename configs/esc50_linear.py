"""A linear head on the frozen AST for ESC-50, 39,986 trainable parameters.

Paper row: arXiv 2312.03694, table 1, Linear: 75.85 %.
Expected:  75.9 % accuracy, 73.9 to 77.7 % (95% interval of a share of 2,000 clips).
Time:      not measured; five runs are 45 PFLOPs, at least 4 minutes on one TPU v5e chip.
Differs:   from the paper's code in what `aatjax recipes esc50_linear` lists.

    aatjax prepare esc50 --download
    aatjax train esc50_linear --cross-validate --protocol petl
"""

from aatjax.audio.augment import Augment
from aatjax.config import Config, Data, Model
from aatjax.petl import Linear
from aatjax.train.optim import Optim
from aatjax.train.training import Training

config: Config = Config(
    name="esc50_linear",
    petl=Linear(),
    model=Model(
        source="MIT/ast-finetuned-audioset-10-10-0.4593",
        frames=500,
        pool="mean_all",
        head_norm=False,
    ),
    data=Data(format="esc50", path="data/esc50", statistics="audioset"),
    training=Training(epochs=50, batch_size=32, loss="ce"),
    optim=Optim(lr=1e-3),
    augment=Augment(freq_mask=24, time_mask=80, spec_after_norm=True),
)
