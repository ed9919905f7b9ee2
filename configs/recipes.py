"""The papers' recipes: every benchmark with every main method, `BENCHMARK_METHOD`.

    aatjax recipes                          the list, and where to get each set
    aatjax recipes esc50_soft_moa           one of them: figures, sources, command
    aatjax prepare esc50 --from ESC-50-master.zip
    aatjax train esc50_soft_moa --cross-validate

Each is put together from what the papers' code gives: of arXiv 2401.10544 (AAT) for `aat`, of
arXiv 2312.03694 and 2402.00828 (PETL) for all others. Where a paper did not use a benchmark, the
length, batch and loss are the other's, and the description says so. They start from AST trained on
AudioSet (10-10, 0.4593 mAP), and are divided honestly; `--protocol aat` or `--protocol petl` is
that of a paper.
"""

import dataclasses

from aatjax.audio.augment import Augment
from aatjax.config import Config, Data, Model
from aatjax.data.benchmarks import BENCHMARKS
from aatjax.petl.base import Method
from aatjax.petl.presets import TABLE
from aatjax.train.loop import Training
from aatjax.train.optim import Optim

SOURCE = "MIT/ast-finetuned-audioset-10-10-0.4593"
AAT, PETL = "arXiv 2401.10544", "arXiv 2312.03694"


@dataclasses.dataclass(frozen=True)
class Setting:
    """How one paper's code treats one benchmark.

    Attributes:
        paper: whose.
        frames: input length in 10 ms frames.
        batch_size, epochs: of training.
        freq_mask, time_mask: SpecAugment.
        lr: learning rate where the paper has one a benchmark (AAT), else None.
        bce: binary cross-entropy over the classes, as AAT has for single labels too.
        mixup, noise: of training.
        warmup_steps, decay_start, decay_rate, decay_every: of AAT's schedule.
    """

    paper: str
    frames: int
    batch_size: int
    epochs: int
    freq_mask: int = 0
    time_mask: int = 0
    lr: float | None = None
    bce: bool = False
    mixup: float = 0.0
    noise: bool = False
    warmup_steps: int = 0
    decay_start: int = 5
    decay_rate: float = 0.85
    decay_every: int = 1


_AAT_SPEECH = Setting(AAT, 128, 128, 30, 48, 48, lr=5e-4, bce=True, mixup=0.6, noise=True)
_AAT: dict[str, Setting] = {
    "esc50": Setting(AAT, 512, 42, 25, 24, 96, lr=1e-4),
    "urbansound8k": Setting(AAT, 400, 48, 25, 24, 96, lr=1e-5),
    "speech_commands_v1": _AAT_SPEECH,
    "speech_commands_v2": _AAT_SPEECH,
    "openmic2018": Setting(
        AAT,
        1024,
        12,
        30,
        48,
        192,
        lr=1e-4,
        bce=True,
        mixup=0.5,
        noise=True,
        warmup_steps=1000,
        decay_start=10,
        decay_rate=0.5,
        decay_every=5,
    ),
    "gtzan": Setting(AAT, 3000, 2, 30, 48, 576, lr=1e-5),
}
_PETL: dict[str, Setting] = {
    "esc50": Setting(PETL, 500, 32, 50, 24, 80),
    "urbansound8k": Setting(PETL, 400, 32, 30, 24, 80),
    "speech_commands_v2": Setting(PETL, 100, 128, 75),
    "fluent_speech_commands": Setting(PETL, 400, 32, 75),
    "iemocap": Setting(PETL, 800, 32, 20),
}
_ALIKE = {"esc10": "esc50", "speech_commands_v1": "speech_commands_v2"}

METHODS: dict[str, Method] = {
    "aat": TABLE["aat_ms"],
    "soft_moa": TABLE["soft_moa"],
    "dense_moa": TABLE["dense_moa"],
    "lora": TABLE["lora"],
    "conformer": TABLE["conformer_pfeiffer"],
    "linear": TABLE["linear"],
    "full": TABLE["full"],
}
_SPEECH = ("speech_commands_v1", "speech_commands_v2", "fluent_speech_commands", "iemocap")
_RATES = {"linear": 1e-3, "full": 5e-5}  # arXiv 2312.03694; adapters, LoRA and mixtures 5e-3

# Accuracy in %, arXiv 2312.03694v4, table 1.
_TABLE_1 = {
    "full": (87.48, 84.31, 97.31, 93.29),
    "linear": (75.85, 77.93, 41.78, 27.52),
    "lora": (86.45, 83.83, 93.61, 76.00),
    "conformer": (88.30, 84.57, 96.28, 95.48),
}
_TABLE_1_SETS = ("esc50", "urbansound8k", "speech_commands_v2", "fluent_speech_commands")
_AAT_FIGURES = {
    "esc50": "about 96.2 % at epoch 25, the mean over test folds (read off a figure)",
    "speech_commands_v2": "about 97.5 % on the validation list at epoch 30 with learning rate "
    "2.5e-4 (read off a figure)",
    "openmic2018": "98.7 % mAP in a figure without a title, with every label that was asked about "
    "taken as present; honest mAP lies far below",
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One benchmark with one method.

    Attributes:
        config: what `aatjax train` runs.
        benchmark, method: its parts.
        setting: the paper's treatment of the benchmark.
        expected: what is published for it, or that nothing is known.
        remarks: where it departs from the papers.
    """

    config: Config
    benchmark: str
    method: str
    setting: Setting
    expected: str
    remarks: tuple[str, ...]


def _setting(benchmark: str, method: str) -> tuple[Setting, str | None]:
    """The treatment of a benchmark, and a remark where it is not that of the method's paper."""
    own, other = (_AAT, _PETL) if method == "aat" else (_PETL, _AAT)
    for name in (benchmark, _ALIKE.get(benchmark, benchmark)):
        if name in own:
            remark = None if name == benchmark else f"length, batch and epochs are those of {name}"
            return own[name], remark
    found = other[_ALIKE.get(benchmark, benchmark) if benchmark not in other else benchmark]
    return found, f"length, batch, loss and augmentation are those of {found.paper}"


def _optim(method: str, setting: Setting) -> Optim:
    if method != "aat":
        return Optim.soft_moa(lr=_RATES.get(method, 5e-3))
    return dataclasses.replace(
        Optim.aat(lr=setting.lr or 1e-4),
        warmup_steps=setting.warmup_steps,
        decay_start=setting.decay_start,
        decay_rate=setting.decay_rate,
        decay_every=setting.decay_every,
    )


def _expected(benchmark: str, method: str) -> str:
    if method in _TABLE_1 and benchmark in _TABLE_1_SETS:
        value = _TABLE_1[method][_TABLE_1_SETS.index(benchmark)]
        return f"accuracy {value} % (arXiv 2312.03694, table 1; --protocol petl)"
    if method == "aat" and benchmark in _AAT_FIGURES:
        return f"{_AAT_FIGURES[benchmark]} (arXiv 2401.10544; --protocol aat)"
    if method in ("soft_moa", "dense_moa"):
        return (
            "no figure is known to us: arXiv 2402.00828 says that Soft-MoA is on par with "
            "Dense-MoA and up to 2.5 points above a single adapter on four benchmarks"
        )
    return "no figure is published"


def recipe(benchmark: str, method: str) -> Recipe:
    """The recipe of a benchmark and a method, both by name."""
    about = BENCHMARKS[benchmark]
    setting, remark = _setting(benchmark, method)
    single = about.metric == "accuracy"
    remarks = [] if remark is None else [remark]
    petl = METHODS[method]
    if method == "conformer" and benchmark in _SPEECH:
        petl = dataclasses.replace(petl, kernel=31)  # pyright: ignore[reportCallIssue]
    if method == "lora":
        remarks.append(
            "LoRA's scale is alpha / rank, 2.67; the published figures are of 0.125: --petl.scale "
            "alpha/reduction"
        )
    if method == "aat":
        model = Model(source=SOURCE, frames=setting.frames)
        statistics = about.statistics or "audioset"
        if setting.lr is not None:
            remarks.append("the learning rate is that of the script as committed, the last run's")
    else:
        model = Model(source=SOURCE, frames=setting.frames, pool="mean_all", head_norm=False)
        statistics = "audioset"
        remarks.append("positions are AST's; the published code ran with --model.positions zeros")
    config = Config(
        name=f"{benchmark}_{method}",
        petl=petl,
        model=model,
        data=Data(format=about.name, path=f"data/{benchmark}", statistics=statistics),  # pyright: ignore[reportArgumentType]
        training=Training(
            epochs=setting.epochs,
            batch_size=setting.batch_size,
            loss="bce" if setting.bce or not single else "ce",
            select="best" if about.protocols[0].selection == "best" else "last",
        ),
        optim=_optim(method, setting),
        augment=Augment(
            freq_mask=setting.freq_mask,
            time_mask=setting.time_mask,
            mixup=setting.mixup,
            noise=setting.noise,
        ),
    )
    return Recipe(config, benchmark, method, setting, _expected(benchmark, method), tuple(remarks))


RECIPES: dict[str, Recipe] = {
    f"{benchmark}_{method}": recipe(benchmark, method)
    for benchmark in BENCHMARKS
    for method in METHODS
}
