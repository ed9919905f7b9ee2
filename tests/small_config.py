"""A config that trains in a few seconds, for tests of the command line in a process."""

from aatjax.config import Config, Data, Model
from aatjax.petl.soft_moa import SoftMoA
from aatjax.train.optim import Optim
from aatjax.train.training import Training

config = Config(
    name="small",
    petl=SoftMoA(num_experts=2, reduction=48),
    model=Model(source="embedded", frames=98),
    data=Data(format="synthetic", train_clips=2, test_clips=1, valid_fraction=0.5),
    training=Training(epochs=3, batch_size=4),
    optim=Optim(lr=1e-3),
)
