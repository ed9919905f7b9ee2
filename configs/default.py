"""The embedded default: Soft-MoA on the small AST in the package, 10 synthetic sounds.

Task: 10 classes of synthetic environmental sounds that the backbone was not trained on, 20 labelled
clips per class; 400 test clips. Nothing is downloaded.

    aatjax train
"""

from aatjax.config import Config, Data, Model
from aatjax.petl.soft_moa import SoftMoA
from aatjax.train.training import Training

config: Config = Config(
    name="default",
    petl=SoftMoA(num_experts=7, slots=1),
    model=Model(pool="bands"),
    data=Data(format="synthetic"),
    training=Training(epochs=20, batch_size=32, head_init="ridge"),
)
