"""The config of an experiment: typed, frozen dataclasses, to and from JSON."""

import dataclasses
import importlib
import pkgutil
import runpy
import sys
import traceback
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

from aatjax.audio.augment import Augment
from aatjax.audio.frontend import PRESETS, Pad
from aatjax.audio.scoring import Scoring, WindowPooling
from aatjax.data.benchmarks import BENCHMARKS
from aatjax.data.clip_windows import TrainWindows
from aatjax.data.formats import SourceFormat, detect_benchmark
from aatjax.data.manifest import Column
from aatjax.data.parts import Part
from aatjax.data.splits import SplitMethod
from aatjax.errors import AatjaxError, DataError, Range, Seed, UsageError, check_fields, suggest
from aatjax.io.json_fields import check_json_fields, shorten
from aatjax.io.json_file import read_json_object
from aatjax.models.config import Pooling, PositionInit
from aatjax.petl import Method, make_method
from aatjax.train.optim import Optim
from aatjax.train.sharding import MeshShape
from aatjax.train.training import Training, upgrade_training


@dataclasses.dataclass(frozen=True)
class Model:
    """The backbone.

    Attributes:
        source: weights: a file, a folder, a Hugging Face id, `embedded`, `random:tiny|small|base`,
            or changed, `random:tiny,depth=4,stride=16`.
        frames: input length in 10 ms frames; None takes the checkpoint's.
        pool: pooling; None takes the checkpoint's.
        head_norm: whether the new head has a LayerNorm; None takes the checkpoint's form.
        reset: replace the weights by random ones of the same shape (a baseline).
        dtype: compute type; `auto` is bfloat16 where the device multiplies it, else float32.
        scan: run the blocks as one scanned body.
        remat: recompute activations in the backward pass.
        positions: `learned`, or `zeros` as in the published parameter-efficient code.
        mask_padding: mask out patches of padding (see `ASTConfig`).
        revision: commit or branch of a Hugging Face id.
    """

    source: str = "embedded"
    frames: Annotated[int, Range(1, 10**6)] | None = None
    pool: Pooling | None = None
    head_norm: bool | None = None
    reset: bool = False
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    scan: bool = False
    remat: bool = False
    positions: PositionInit = "learned"
    mask_padding: bool = False
    revision: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, "model.")


@dataclasses.dataclass(frozen=True)
class Data:
    """The sounds and their division.

    A benchmark of the papers is divided as `protocol` says. For other sets without `fold`, the
    test part is that of the official division if there is one, else it is split off
    (`test_fraction`, groups kept whole).

    Attributes:
        format: `synthetic`, `folder` (class sub-folders), `manifest` (CSV or JSON lines), `esc`
            (ESC-50's layout), `names` (file names by `pattern`), `parts` (`train.csv`, `valid.csv`,
            `test.csv`, or such folders), `prepared` (by `aatjax prepare`), `huggingface` (parquet,
            `save_to_disk` or audio folder), the name of a benchmark (`esc50`), or `auto` to detect
            it.
        path: the folder or file, or one for each part of the official division, such as
            `train=train.csv valid=val.csv test=test.csv`; not for `synthetic`.
        pattern: regular expression with a group `label` for `names`.
        columns: columns of a CSV by what they hold, such as `path=file label=class`; `labels` for
            several in a cell, and `fold`, `split`, `group`.
        root: folder that the names in a CSV are relative to; None for the folder of the CSV.
        group: regular expression that finds the recording or speaker in a file name, in its first
            parentheses: `(\\d{8})_NO`.
        fold: the fold held out as test part; of a benchmark, the run of its protocol.
        protocol: how a benchmark is divided and how weights are chosen: `honest` (the default),
            `aat` (arXiv 2401.10544) or `petl` (arXiv 2312.03694 and 2402.00828).
        shots: few-shot training: clips per class; None takes all.
        draw: seed of the draw of a few-shot run.
        leaks: `refuse` recordings or speakers that are in two parts, or `report` them.
        test_fraction: share of the clips split off for testing.
        valid_fraction: share of the training clips split off for validation; 0 for none.
        seed: seed of the split.
        split_method: how these parts are split off: by a `hash` of the name of each clip or its
            group, so that clips that are added later move no others; or `stratified`, every class
            at the same fraction, which depends on all the clips.
        pad: padding of short clips: `log_mel_zero` (as AST), `silence`, `repeat`.
        windows: what training reads of a clip longer than the input: `every` window, weighted so
            that the clip counts once; one input from the `start`; or one from a `random` place in
            each epoch.
        pooling: how the score of a clip is made of its windows: `mean`, `max`, `attention`
            (learned on the validation clips), or the `first` window alone.
        hop: seconds between the starts of scored windows; None for no overlap.
        statistics: normalisation: `model` (that of the weights, AudioSet's if unknown), the name
            of a preset, or `train` to compute it on the training clips.
        channels: `mean`, `left` or a channel number.
        truncated: `skip` or `keep` files that were cut off.
        max_bad: tolerated share of unreadable files, or their number from 1 up.
        cache: folder of decoded audio; None takes the user's cache folder.
        train_clips, test_clips: clips per class of the synthetic sounds.
    """

    format: SourceFormat = "auto"
    path: dict[Part, str] | str | None = None
    pattern: str | None = None
    columns: dict[Column, str] | None = None
    root: str | None = None
    group: str | None = None
    fold: str | None = None
    protocol: Literal["honest", "aat", "petl"] | None = None
    shots: Annotated[int, Range(1)] | None = None
    draw: Seed = 0
    leaks: Literal["refuse", "report"] = "refuse"
    test_fraction: Annotated[float, Range(0, below=1)] = 0.2
    valid_fraction: Annotated[float, Range(0, below=1)] = 0.0
    seed: Seed = 0
    split_method: SplitMethod = "hash"
    pad: Pad = "log_mel_zero"
    windows: TrainWindows = "every"
    pooling: WindowPooling = "mean"
    hop: Annotated[float, Range(above=0)] | None = None
    statistics: str = "model"
    channels: Literal["mean", "left"] | int = "mean"
    truncated: Literal["skip", "keep"] = "skip"
    max_bad: Annotated[float, Range(0)] = 0.05
    cache: str | None = None
    train_clips: Annotated[int, Range(1, 10**6)] = 20
    test_clips: Annotated[int, Range(1, 10**6)] = 40

    @property
    def scoring(self) -> Scoring:
        """How the score of a clip is made of its windows."""
        return Scoring(self.pooling, self.hop)

    def __post_init__(self) -> None:
        check_fields(self, "data.")
        known = ("model", "train", *PRESETS)
        if self.statistics not in known:
            raise UsageError(
                f"data.statistics={shorten(self.statistics)} is not one of {', '.join(known)}"
            )
        if self.path == {} or self.columns == {}:
            raise UsageError("data.path and data.columns name one or more: NAME=VALUE ...")
        for name in ("path", "fold"):
            if self.format == "synthetic" and getattr(self, name) is not None:
                raise UsageError(
                    f"data.{name}={getattr(self, name)!r} does not go with data.format='synthetic',"
                    " which reads no files: add --data.format auto, or take the config 'folder'"
                )

    @property
    def title(self) -> str:
        """Name of the folder or file, or of the folder of several files; else the format."""
        paths = list(self.path.values()) if isinstance(self.path, dict) else [self.path]
        if paths[0] is None:
            return self.format
        first = Path(paths[0]).expanduser().absolute()
        return first.parent.name if isinstance(self.path, dict) else first.name


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment.

    Attributes:
        petl: the adaptation method.
        model: the backbone.
        data: the sounds.
        training: epochs, batch, selection, seed.
        optim: AdamW and its schedule.
        augment: augmentation of training batches.
        mesh: how several devices share the work.
        name: used for the run folder.
    """

    petl: Method
    model: Model = Model()
    data: Data = Data()
    training: Training = Training()
    optim: Optim = Optim()
    augment: Augment = Augment()
    mesh: MeshShape = MeshShape()
    name: str = "experiment"

    def to_json(self) -> dict[str, Any]:
        """Return a plain dictionary that `from_json` reads."""
        return {**dataclasses.asdict(self), "petl": self.petl.to_json()}

    @staticmethod
    def from_json(fields: dict[str, Any]) -> "Config":
        """Rebuild a config.

        Raises:
            UsageError: an unknown field, with the nearest one, or a value of the wrong type.
        """
        if "petl" not in fields:
            raise UsageError("the config has no petl, the adaptation method")
        fields = _upgrade(fields)
        hints = typing.get_type_hints(Config)
        values: dict[str, Any] = dict(fields)
        for name, cls in hints.items():
            if name not in fields or cls is str:
                continue
            part = fields[name]
            if not isinstance(part, dict):
                raise UsageError(f"config.{name}={shorten(part)} is not an object with fields")
            if cls is Method:
                values[name] = Method.from_json(part)
            else:
                check_json_fields(name, part, cls)
                lists = {key: tuple(v) for key, v in part.items() if isinstance(v, list)}
                values[name] = cls(**part | lists)
        check_json_fields("config", values, Config)
        return Config(**values)

    def with_method(self, name: str) -> "Config":
        """Return the same experiment with another method, at its own learning rate.

        Args:
            name: a row of the papers' tables, or several joined by `+`.
        """
        optim = dataclasses.replace(self.optim, lr=None)
        return dataclasses.replace(self, petl=make_method(name), optim=optim)

    def with_protocol(self, name: str) -> "Config":
        """Return the same experiment with the division and selection of a benchmark's protocol.

        Raises:
            UsageError: the data are no benchmark, or it has no such protocol.
        """
        benchmark = detect_benchmark(self.data.path, self.data.format, self.data.pattern)
        if benchmark is None:
            raise UsageError(
                f"--protocol {name} applies to benchmarks only: take one of `aatjax recipes`, or "
                f"name it by --data.format, one of {', '.join(BENCHMARKS)}"
            )
        protocol = BENCHMARKS[benchmark].protocol(name)
        select = "best" if protocol.selection == "best" else "last"
        data: dict[str, Any] = {"protocol": name}
        if name != "honest":  # the papers' code cuts every clip at its start
            data |= {"windows": "start", "pooling": "first"}
        return dataclasses.replace(
            self,
            data=dataclasses.replace(self.data, **data),
            training=dataclasses.replace(self.training, select=select),
        )


def list_configs() -> list[str]:
    """Return the names of the configs in the package, without the recipes."""
    folder = importlib.import_module("aatjax.configs").__path__
    return sorted(m.name for m in pkgutil.iter_modules(folder) if m.name != "recipes")


def load_config(name: str) -> Config:
    """Load a config of `aatjax.configs`, a recipe, a Python file or a JSON file.

    A Python file binds `config = aatjax.Config(...)`; it is executed, so read it first.

    Raises:
        UsageError: no such config, or the file does not bind one.
    """
    path = Path(name)
    recipes = importlib.import_module("aatjax.configs.recipes")
    if path.suffix == ".json":
        try:
            return Config.from_json(read_json_object(path, advice="write it again"))
        except DataError as error:
            raise UsageError(f"not a config: {error}") from error
    if path.suffix == ".py":
        config = _run_file(path)
    elif name in list_configs():
        config = importlib.import_module(f"aatjax.configs.{name}").config
    elif name in recipes.list_recipes():
        config = recipes.make_recipe(name).config
    else:
        if name and path.is_dir():
            raise UsageError(
                f"{name!r} is a folder, not a config: of sounds, `aatjax adapt {name}` or `aatjax "
                f"train folder --data {name}`; of a run, `aatjax train {name}/config.json`"
            )
        hint = suggest(name, [*list_configs(), *recipes.list_recipes()])
        raise UsageError(
            f"no config {name!r}{hint} (there are {', '.join(list_configs())}, and those of "
            "`aatjax recipes`; a file ends in .py or .json)"
        )
    if not isinstance(config, Config):
        raise UsageError(f"{name}: does not bind config = aatjax.Config(...)")
    return config


def _run_file(path: Path) -> Any:
    """Run a Python file, which may import its neighbours; return what it binds as `config`."""
    if not path.exists():
        raise UsageError(f"{path}: no such config file")
    before = list(sys.path)
    sys.path.insert(0, str(path.resolve().parent))
    try:
        return runpy.run_path(str(path)).get("config")
    except AatjaxError:
        raise
    except Exception as error:
        line = getattr(traceback.extract_tb(error.__traceback__)[-1], "lineno", None)
        line = error.lineno if isinstance(error, SyntaxError) else line
        raise UsageError(
            f"{path}: could not be run: {type(error).__name__} at line {line}: {error}"
        ) from error
    finally:
        sys.path[:] = before


WHOLE = {"seed", "test_fraction", "valid_fraction"}
"""Fields of `data` that show that a version of this package wrote them, all that it had."""


def _upgrade(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a stored config under their present names."""
    training, data = fields.get("training"), fields.get("data")
    if isinstance(data, dict) and data.keys() >= WHOLE and "split_method" not in data:
        data = {**data, "split_method": "stratified"}
        fields = {**fields, "data": data}
    if isinstance(training, dict):
        training = upgrade_training(training)
        fields = {**fields, "training": training}
    if not isinstance(training, dict) or "crop" not in training or not isinstance(data, dict):
        return fields
    rest = {name: value for name, value in training.items() if name != "crop"}
    return {**fields, "training": rest, "data": {"windows": training["crop"], **data}}
