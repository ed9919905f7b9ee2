"""Environmental sounds in ESC-50's layout (ESC-50, ESC-10), one fold held out at a time.

    aatjax train esc --data.path ESC-50-master --cross-validate
    aatjax train esc --data.path ESC-50-master --data.fold 1 --method aat

The first three seconds of each clip (298 frames). Nothing is selected on the held-out fold: the
figures are those of the last epoch.
"""

from aatjax.audio.augment import Augment
from aatjax.config import Config, Data, Model
from aatjax.petl.soft_moa import SoftMoA
from aatjax.train.loop import Training
from aatjax.train.optim import Optim

config = Config(
    name="esc",
    petl=SoftMoA(num_experts=7, slots=1, reduction=16),
    model=Model(frames=298),
    data=Data(format="esc"),
    training=Training(epochs=20, batch_size=16),
    optim=Optim(lr=5e-3),
    augment=Augment(freq_mask=24, time_mask=48),
)
