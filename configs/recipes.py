"""The papers' recipes: every benchmark with every main method, `BENCHMARK_METHOD`.

    aatjax recipes                          the list, and where to get each set
    aatjax recipes esc50_soft_moa           one of them: settings, published figure, commands
    aatjax prepare esc50 --from ESC-50-master.zip
    aatjax train esc50_soft_moa --cross-validate

The settings are those of the papers' code: of arXiv 2401.10544 (AAT) for `aat`, of arXiv 2312.03694
and 2402.00828 (PETL) for all others. Where a paper did not use a benchmark, length, batch and loss
are the other paper's, and the remarks state so. All start from AST trained on AudioSet (10-10,
0.4593 mAP) and are divided honestly; `--protocol aat` or `--protocol petl` is that of a paper.
`DIFFERENCES` lists what is still not as in that code; a recipe's remarks are those that apply.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from aatjax.data.benchmarks import BENCHMARKS

if TYPE_CHECKING:
    from aatjax.config import Config
    from aatjax.train.optim import Optim

SOURCE = "MIT/ast-finetuned-audioset-10-10-0.4593"
AAT, PETL = "arXiv 2401.10544", "arXiv 2312.03694"


@dataclasses.dataclass(frozen=True)
class PaperSetting:
    """How one paper's code treats one benchmark.

    Attributes:
        paper: whose.
        frames: input length in 10 ms frames.
        batch_size, epochs: of training.
        freq_mask, time_mask: SpecAugment.
        lr: learning rate where the paper has one per benchmark (AAT), else None.
        bce: binary cross-entropy over the classes, as AAT has for single labels too.
        mixup: of training.
        noise: of training; AAT's loader adds noise and rolls under one flag.
        schedule: warmup steps, start, rate and interval of AAT's decay, where they differ.
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
    schedule: tuple[int, int, float, int] = (0, 5, 0.85, 1)


_AAT_SPEECH = PaperSetting(AAT, 128, 128, 30, 48, 48, 5e-4, True, 0.6, True)
_OPENMIC = (1000, 10, 0.5, 5)
_AAT: dict[str, PaperSetting] = {
    "esc50": PaperSetting(AAT, 512, 42, 25, 24, 96, lr=1e-4),
    "urbansound8k": PaperSetting(AAT, 400, 48, 25, 24, 96, lr=1e-5),
    "speech_commands_v1": _AAT_SPEECH,
    "speech_commands_v2": _AAT_SPEECH,
    "openmic2018": PaperSetting(AAT, 1024, 12, 30, 48, 192, 1e-4, True, 0.5, True, _OPENMIC),
    "gtzan": PaperSetting(AAT, 3000, 2, 30, 48, 576, lr=1e-5),
}
_PETL: dict[str, PaperSetting] = {
    "esc50": PaperSetting(PETL, 500, 32, 50, 24, 80),
    "urbansound8k": PaperSetting(PETL, 400, 32, 30, 24, 80),
    "speech_commands_v2": PaperSetting(PETL, 100, 128, 75),
    "fluent_speech_commands": PaperSetting(PETL, 400, 32, 75),
    "iemocap": PaperSetting(PETL, 800, 32, 20),
}
_UNTRIED = PaperSetting(PETL, 1024, 32, 50)
_SIMILAR = {"esc10": "esc50", "speech_commands_v1": "speech_commands_v2"}

METHODS = {
    "aat": "aat_ms",
    "soft_moa": "soft_moa",
    "dense_moa": "dense_moa",
    "lora": "lora",
    "conformer": "conformer_pfeiffer",
    "linear": "linear",
    "full": "full",
}
"""Names in the recipes, and the rows of `aatjax methods` that they are."""

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


DIFFERENCES: dict[str, str] = {
    # of the PETL code (arXiv 2312.03694, 2402.00828)
    "division": "folds and choice of the epoch are honest, and all of a long clip counts; the "
    "paper's division, choice and cut: --protocol petl (AAT: aat)",
    "positions": "positions are AST's; the code's are zero and frozen: --model.positions zeros",
    "method": "modules are the paper's; the code starts them at random, adds a mixture beside the "
    "attention twice, omits a conformer's LayerNorm, sets positions to zero: --petl.as-published",
    "lora": "LoRA's scale is alpha / rank, 2.67; the published figures are of 0.125: --petl.scale "
    "alpha/reduction",
    "head": "the head starts from a truncated normal of 0.01 with zero bias; the code's starts as "
    "U(-1/sqrt(D), 1/sqrt(D)): --petl.as-published",
    "stereo": "the channels of a stereo clip are averaged; the code takes the first: --data.path "
    "FOLDER of the unpacked archive, with --data.channels left",
    "rounding": "clips are resampled by soxr and rounded to int16; the code resamples by librosa's "
    "kaiser_best to floating point",
    # of AAT's code (arXiv 2401.10544)
    "lr": "the learning rate is that of the script as committed, the last run's",
    "bias": "the bias of the head starts at zero; the code's starts as U(-1/sqrt(D), 1/sqrt(D)): "
    "--petl.as-published",
    "float16": "computed in float32 (--model.dtype auto: bfloat16 where native); the code in "
    "float16 with a scaled loss",
    "partner": "a clip is mixed with one of its batch; the code draws it from the training list",
    "warmup": "the warm-up is linear; the code's rises every 50 steps",
}
"""Where a recipe is not what its paper's code runs, one line each, and the flag that changes it."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One benchmark with one method.

    Attributes:
        config: what `aatjax train` runs.
        benchmark, method: by name.
        setting: the paper's treatment of the benchmark.
        expected: the published figure, or that there is none.
        remarks: where it departs from the papers.
    """

    config: Config
    benchmark: str
    method: str
    setting: PaperSetting
    expected: str
    remarks: tuple[str, ...]


def list_recipes() -> list[str]:
    """Return the names of all recipes; imports no JAX."""
    return [f"{benchmark}_{method}" for benchmark in BENCHMARKS for method in METHODS]


def make_recipe(name: str) -> Recipe:
    """Return the recipe of a name from `list_recipes`."""
    from aatjax.audio.augment import Augment
    from aatjax.config import Config, Data, Model
    from aatjax.petl.presets import TABLE
    from aatjax.train.training import Training

    method = next(method for method in METHODS if name.endswith(f"_{method}"))
    benchmark = name.removesuffix(f"_{method}")
    about = BENCHMARKS[benchmark]
    setting, remark = _find_setting(benchmark, method)
    differences = _list_differences(benchmark, method, setting)
    petl = TABLE[METHODS[method]]
    if method == "conformer" and benchmark in _SPEECH:
        petl = petl.replace(kernel=31)
    model: dict[str, Any] = {"source": SOURCE, "frames": setting.frames}
    statistics = "audioset"
    if method == "aat":
        statistics = about.statistics or statistics
    else:
        model |= {"pool": "mean_all", "head_norm": False}
    config = Config(
        name=name,
        petl=petl,
        model=Model(**model),
        data=Data(format=about.name, path=f"data/{benchmark}", statistics=statistics),  # pyright: ignore[reportArgumentType]
        training=Training(
            epochs=setting.epochs,
            batch_size=setting.batch_size,
            loss="bce" if setting.bce or about.metric != "accuracy" else "ce",
            select="best" if about.protocols[0].selection == "best" else "last",
        ),
        optim=_make_optim(method, setting),
        augment=Augment(
            freq_mask=setting.freq_mask,
            time_mask=setting.time_mask,
            mixup=setting.mixup,
            noise=setting.noise,
            roll=setting.noise,
            spec_after_norm=setting.paper == PETL and setting.freq_mask > 0,
        ),
    )
    expected = _find_expected(benchmark, method)
    remarks = [*filter(None, [remark]), *(DIFFERENCES[name] for name in differences)]
    return Recipe(config, benchmark, method, setting, expected, tuple(remarks))


def _list_differences(benchmark: str, method: str, setting: PaperSetting) -> list[str]:
    """Names of the `DIFFERENCES` that apply to a recipe."""
    protocols = {protocol.name for protocol in BENCHMARKS[benchmark].protocols}
    names = ["division"] if {"aat" if method == "aat" else "petl"} & protocols else []
    if method == "aat":
        applies = {
            "lr": setting.lr is not None,
            "bias": True,
            "float16": True,
            "partner": setting.mixup > 0,
            "warmup": setting.schedule[0] > 0,
        }
    else:
        applies = {
            "positions": True,
            "method": "moa" in method or method == "conformer",
            "lora": method == "lora",
            "head": True,
            "stereo": benchmark == "urbansound8k",
            "rounding": True,
        }
    return [*names, *(name for name, is_so in applies.items() if is_so)]


def _find_setting(benchmark: str, method: str) -> tuple[PaperSetting, str | None]:
    """The treatment of a benchmark, and a remark where it is not that of the method's paper."""
    own, other = (_AAT, _PETL) if method == "aat" else (_PETL, _AAT)
    similar = _SIMILAR.get(benchmark, benchmark)
    if benchmark in own:
        return own[benchmark], None
    if similar in own:
        return own[similar], f"length, batch and epochs are those of {similar}"
    found = other.get(benchmark, other.get(similar))
    if found is None:
        return _UNTRIED, "length, batch and epochs are guesses: no paper used this set"
    return found, f"length, batch, loss and augmentation are those of {found.paper}"


def _make_optim(method: str, setting: PaperSetting) -> Optim:
    from aatjax.train.optim import Optim

    if method != "aat":
        return Optim.soft_moa(lr=_RATES.get(method, 5e-3))
    names = ("warmup_steps", "decay_start", "decay_rate", "decay_every")
    schedule = dict(zip(names, setting.schedule, strict=True))
    return dataclasses.replace(Optim.aat(lr=setting.lr or 1e-4), **schedule)


def _find_expected(benchmark: str, method: str) -> str:
    if method in _TABLE_1 and benchmark in _TABLE_1_SETS:
        value = _TABLE_1[method][_TABLE_1_SETS.index(benchmark)]
        return f"accuracy {value} % (arXiv 2312.03694, table 1; --protocol petl)"
    if method == "aat" and benchmark in _AAT_FIGURES:
        return f"{_AAT_FIGURES[benchmark]} (arXiv 2401.10544; --protocol aat)"
    if method in ("soft_moa", "dense_moa"):
        return (
            "no figure is known to us: arXiv 2402.00828 states that Soft-MoA is on par with "
            "Dense-MoA and up to 2.5 points above a single adapter on four benchmarks"
        )
    return "no figure is published"
