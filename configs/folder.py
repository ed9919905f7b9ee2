"""Your own sounds: AAT on a folder of class folders, or a CSV of files and labels.

    aatjax train folder --data.path my_sounds/
    aatjax train folder --data.path labels.csv --model.source audioset_10_10_0.4593.pth

A fifth of the clips is held out for testing; the clips of one recording stay together where file
names or a column identify it. For a published AST add a batch that fits, such as
`--training.batch-size 8` on a laptop.
"""

from aatjax.audio.augment import Augment
from aatjax.config import Config, Data
from aatjax.petl.aat import AAT
from aatjax.train.optim import Optim
from aatjax.train.training import Training

config: Config = Config(
    name="folder",
    petl=AAT(),
    data=Data(format="auto"),
    training=Training(epochs=40, batch_size=32),
    optim=Optim(weight_decay=0.05),
    augment=Augment(freq_mask=24, time_mask=24),
)
