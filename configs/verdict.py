"""The verdict: do adapters earn their parameters over a ridge regression on frozen features?

Written before it was run.

Question. With the backbone in the package, and with one that has heard speech only: is a method of
the table more accurate than ridge, which takes no gradient? Does it pay per parameter and per
second? From how many clips on? Where do adapters belong, and how many experts are enough? Does a
backbone that was pretrained by labels serve better than one by masked patches?

Cells. 25: ESC-10, four folds; ESC-50's other 40 classes of fold 4, two halves by recording; Free
Spoken Digits, five speakers, 12 takes each; Arabic Speech Commands, six speakers of the development
list, five takes of each word; Speech Commands, two halves by speaker; and with the backbone of
speech alone ESC-10 and ESC-50 again. The part named is held out, all others train.

Rule. One recipe for all (below): statistics pooling, the head starts as ridge (`linear` at zero,
`scratch` at random), the last epoch counts. The rate is one of two, the preset of the method and a
third of it, by the accuracy on a fifth of the training clips of the first cell of the task (whole
speakers or recordings); equal ones give the lower. Main test: differences to ridge, averaged within
each of the seven pairs of backbone and task, Student's t over the seven, Holm over the 11 methods,
0.05. A method that is not above ridge there is said not to be. Beside it the mean over cells and
the number of cells won.

Shots. Ridge, linear, LoRA, bottleneck, Soft-MoA and full with 1, 2, 4, 8 and 16 clips per class
(three draws), on the last fold of ESC-10 and of the digits. Placement. Bottleneck adapters at the
attention, the MLP and both, in all, the first and the last two blocks; Soft-MoA with 1, 3, 7 and 14
experts; the same tasks, all folds. Pretraining. Ridge, Soft-MoA and full on a backbone of masked
patches, of the same sounds and as many steps; the same tasks, all folds.

Budget. 12 epochs a run, one seed, some 650 runs, four hours on two CPU cores:

    python tools/bench.py verdict --data FOLDER --speech FILE --masked FILE
"""

from aatjax.audio.augment import Augment
from aatjax.config import Config, Data, Model
from aatjax.petl.soft_moa import SoftMoA
from aatjax.train.training import Training

config: Config = Config(
    name="verdict",
    petl=SoftMoA(num_experts=7, slots=1),
    model=Model(pool="stats"),
    data=Data(statistics="train", windows="random", leaks="report"),
    training=Training(epochs=12, batch_size=32, head_init="ridge"),
    augment=Augment(mixup=0.5, freq_mask=24, time_mask=16, gain=10.0, warp=0.2, lowpass=0.3),
)
METHODS: tuple[str, ...] = (
    "ridge",
    "linear",
    "bitfit",
    "lora",
    "bottleneck",
    "conformer",
    "aat_ms",
    "loaa",
    "dense_moa",
    "soft_moa",
    "full",
    "scratch",
)
"""Rows, with the sizes of `tools/bench.py compare-methods`; the first is what others must beat."""
