"""Environmental sounds in ESC-50's layout (ESC-50, ESC-10), one fold held out at a time.

    aatjax train esc --data.path ESC-50-master --cross-validate
    aatjax train esc --data.path ESC-50-master --data.fold 1 --method aat

Windows of three seconds (298 frames): all of a clip in testing, a random one in training, where
half of the clips are also mixed with another. Nothing is chosen on the held-out fold: the figures
are those of the last epoch. On ESC-10, with the embedded backbone, a fold takes
about a minute on one CPU core.
"""

from aatjax.audio.augment import Augment
from aatjax.config import Config, Data, Model
from aatjax.petl.soft_moa import SoftMoA
from aatjax.train.training import Training

config: Config = Config(
    name="esc",
    petl=SoftMoA(num_experts=7, slots=1),
    model=Model(frames=298),
    data=Data(format="esc", windows="random"),
    training=Training(epochs=40, batch_size=16),
    augment=Augment(mixup=0.5, freq_mask=24, time_mask=48, roll=True),
)
