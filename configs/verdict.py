"""The verdict: which method to take, asked of the same clips with the same budget.

Written before it was run; `python tools/bench.py verdict` runs it, and docs/results.md reports it.

Question. Does a trained method lie above ridge regression on frozen features, the closed form, and
does one family of adapters lie above the others?

Cells. A cell is a backbone and a fold of a task that is held out: ESC-10 (4 folds), the other 40
classes of ESC-50 in fold 4 (4 parts of its recordings), spoken digits (FSDD, 5 speakers), Arabic
Speech Commands (6 validation speakers, two takes of each word), and a cut of Speech Commands (4
parts of its speakers). 23 folds on two backbones: the embedded one, and one that has heard speech
only. Some 80 test clips per cell.

Methods. ridge, linear, BitFit, LoRA, bottleneck, conformer, AAT, LoAA, Dense-MoA, Soft-MoA, full,
and full from random weights. All but ridge and the last start from the ridge head, on mean and
deviation of the patches of each frequency band; a clip that is shorter than the input is repeated.

Budget. Settings below for every method: 12 epochs, batches of 16. The learning rate is one of
three, the method's own divided or multiplied by three, by the mean accuracy on one further fold of
ESC-10 and one of the digits with the first fold set aside; one seed.

Rule. Accuracies are compared with ridge by fold (backbones averaged), so that clips, recordings and
speakers of one fold count once: Student's t over the folds, Holm over the methods, 5 %. A family is
said to lie above ridge where the corrected p is below 0.05 and the mean difference above 0; nothing
is said of methods whose difference is not significant, other than its interval.

Beside it, on the embedded backbone: a curve over 1, 2, 4, 8 and 16 clips per class, for ridge,
LoRA, Soft-MoA and full; AAT's two adapters and the blocks that they are put in; and supervised
against masked pretraining on the same sounds, for ridge, AAT, Soft-MoA and full.
"""

from aatjax.audio.augment import Augment
from aatjax.config import Config, Data, Model
from aatjax.petl.simple import Ridge
from aatjax.train.training import Training

config: Config = Config(
    name="verdict",
    petl=Ridge(),
    model=Model(pool="bands"),
    data=Data(
        format="manifest", pad="repeat", windows="random", statistics="train", leaks="report"
    ),
    training=Training(epochs=12, batch_size=16, head_init="ridge"),
    augment=Augment(mixup=0.5, freq_mask=24, time_mask=24),
)
