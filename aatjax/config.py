"""A whole experiment as typed, frozen dataclasses: defaults in one place, to and from JSON."""

import dataclasses
import difflib
import importlib.util
import pkgutil
import traceback
import typing
from pathlib import Path
from typing import Any, Literal

from aatjax.audio.augment import Augment
from aatjax.audio.frontend import PRESETS, Pad
from aatjax.data.benchmarks import BENCHMARKS
from aatjax.data.formats import SourceFormat, detect_benchmark
from aatjax.errors import AatjaxError, DataError, UsageError
from aatjax.io.json_file import read_json_object
from aatjax.models.config import Pooling, PositionInit
from aatjax.petl import Method, find_method, make_method
from aatjax.train.distributed import find_differences
from aatjax.train.loop import Training
from aatjax.train.optim import Optim
from aatjax.train.sharding import MeshShape


@dataclasses.dataclass(frozen=True)
class Model:
    """Which backbone, and how it is run.

    Attributes:
        source: weights: a file, a folder, a Hugging Face id, `embedded`, `random:tiny|small|base`.
        frames: input length in 10 ms frames; None takes the checkpoint's.
        pool: pooling; None takes what the checkpoint was made with.
        head_norm: whether the new head has a LayerNorm; None takes the checkpoint's form.
        reset: forget the weights and start from random ones of the same shape (a baseline).
        dtype: compute type.
        scan: run the blocks as one scanned body.
        remat: recompute activations in the backward pass.
        positions: `learned`, or `zeros` as the published parameter-efficient code has them.
        mask_padding: patches of padding are seen by nobody (see `ASTConfig`).
        revision: commit or branch of a Hugging Face id.
    """

    source: str = "embedded"
    frames: int | None = None
    pool: Pooling | None = None
    head_norm: bool | None = None
    reset: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    scan: bool = False
    remat: bool = False
    positions: PositionInit = "learned"
    mask_padding: bool = False
    revision: str | None = None


@dataclasses.dataclass(frozen=True)
class Data:
    """Which sounds, and how they are divided and heard.

    A benchmark of the papers is divided as `protocol` says. Other sets: without `fold`, a test
    part is taken from the official division if there is one, else split off (`test_fraction`,
    stratified, groups kept whole).

    Attributes:
        format: `synthetic`, `folder` (class sub-folders), `manifest` (CSV or JSON lines), `esc`
            (ESC-50's layout), `names` (file names by `pattern`), `prepared` (by `aatjax prepare`),
            `huggingface` (parquet, `save_to_disk` or audio folder), the name of a benchmark
            (`esc50`), or `auto` by what lies there.
        path: the folder or file; not for `synthetic`.
        pattern: regular expression with a group `label` for `names`.
        fold: the fold held out as test part; of a benchmark, the run of its protocol.
        protocol: how a benchmark is divided and how weights are chosen: `honest` (the default),
            `aat` (arXiv 2401.10544) or `petl` (arXiv 2312.03694 and 2402.00828).
        shots: few-shot training: so many clips of each class; None takes all.
        draw: which clips of a few-shot run: seed of the draw.
        leaks: what becomes of recordings or speakers that are in two parts: `refuse` or `report`.
        test_fraction: share of the clips split off for testing.
        valid_fraction: share of the training clips split off for validation; 0 for none.
        seed: seed of the split.
        pad: what fills a clip that is too short: `log_mel_zero` (as AST), `silence`, `repeat`.
        statistics: normalisation: `model` (what the weights were trained with, AudioSet's where
            they do not tell), the name of a preset, or `train` to compute it on the training clips.
        channels: `mean`, `left` or a channel number.
        truncated: what becomes of files that were cut off: `skip` or `keep`.
        max_bad: share of unreadable files (or, from 1 up, their number) that is put up with.
        cache: folder of decoded audio; None takes the user's cache folder.
        train_clips, test_clips: clips a class of the synthetic sounds.
    """

    format: SourceFormat = "auto"
    path: str | None = None
    pattern: str | None = None
    fold: str | None = None
    protocol: Literal["honest", "aat", "petl"] | None = None
    shots: int | None = None
    draw: int = 0
    leaks: Literal["refuse", "report"] = "refuse"
    test_fraction: float = 0.2
    valid_fraction: float = 0.0
    seed: int = 0
    pad: Pad = "log_mel_zero"
    statistics: str = "model"
    channels: Literal["mean", "left"] | int = "mean"
    truncated: Literal["skip", "keep"] = "skip"
    max_bad: float = 0.05
    cache: str | None = None
    train_clips: int = 20
    test_clips: int = 40

    def __post_init__(self) -> None:
        for name in ("test_fraction", "valid_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"data.{name}={getattr(self, name)} must lie in [0, 1)")
        known = ("model", "train", *PRESETS)
        if self.statistics not in known:
            raise UsageError(
                f"data.statistics={self.statistics!r} is not one of {', '.join(known)}"
            )
        if self.shots is not None and self.shots < 1:
            raise UsageError(f"data.shots={self.shots} must be at least 1 clip a class")
        if self.draw < 0:
            raise UsageError(f"data.draw={self.draw} must be 0 or more")
        if not self.max_bad >= 0:
            raise UsageError(f"data.max_bad={self.max_bad} must be 0 or more")
        if self.format == "synthetic" and (self.path is not None or self.fold is not None):
            given = "path" if self.path is not None else "fold"
            raise UsageError(
                f"data.{given}={getattr(self, given)!r} does not go with data.format='synthetic', "
                "which reads no files: give data.format='auto' too, or take the config 'folder'"
            )


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
        """A plain dictionary that `from_json` reads."""
        return {**dataclasses.asdict(self), "petl": self.petl.to_json()}

    @staticmethod
    def from_json(fields: dict[str, Any]) -> "Config":
        """Rebuilds a config.

        Raises:
            UsageError: an unknown field; the message suggests the nearest.
        """
        parts: dict[str, Any] = {
            "model": Model,
            "data": Data,
            "training": Training,
            "optim": Optim,
            "augment": Augment,
            "mesh": MeshShape,
        }
        if "petl" not in fields:
            raise UsageError("the config has no petl, the adaptation method")
        values: dict[str, Any] = dict(fields)
        for name in ("petl", *parts):
            if not isinstance(fields.get(name, {}), dict):
                raise UsageError(f"config.{name}={fields[name]!r} is not an object with fields")
        method = {key: value for key, value in fields["petl"].items() if key != "name"}
        _check("petl", method, find_method(str(fields["petl"].get("name"))))
        values["petl"] = Method.from_json(fields["petl"])
        for name, cls in parts.items():
            if name in fields:
                _check(name, fields[name], cls)
                values[name] = cls(**{key: _tupled(v) for key, v in fields[name].items()})
        _check("config", values, Config)
        return Config(**values)

    def with_method(self, name: str) -> "Config":
        """The same experiment with a row of the papers' tables, another method, or a+b."""
        return dataclasses.replace(self, petl=make_method(name))

    def with_protocol(self, name: str) -> "Config":
        """The same experiment divided, and its weights chosen, as a protocol of its benchmark says.

        Raises:
            UsageError: the data are no benchmark, or it has no such protocol.
        """
        benchmark = detect_benchmark(self.data.path, self.data.format)
        if benchmark is None:
            raise UsageError(
                f"--protocol {name} goes with a benchmark only: take one of `aatjax recipes`, or "
                f"name it by --data.format, one of {', '.join(BENCHMARKS)}"
            )
        protocol = BENCHMARKS[benchmark].protocol(name)
        select = "best" if protocol.selection == "best" else "last"
        return dataclasses.replace(
            self,
            data=dataclasses.replace(self.data, protocol=name),  # pyright: ignore[reportArgumentType]
            training=dataclasses.replace(self.training, select=select),
        )


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two config dictionaries, as `data.fold: '1' -> '2'`."""
    found = find_differences(old, new)
    return [f"{path}: {before!r} -> {after!r}" for path, before, after in found]


def available() -> list[str]:
    """Names of the configs that come with the package, beside the recipes."""
    folder = importlib.import_module("aatjax.configs").__path__
    return sorted(m.name for m in pkgutil.iter_modules(folder) if m.name != "recipes")


def recipes() -> dict[str, Any]:
    """The papers' recipes by name, see `configs/recipes.py`."""
    return importlib.import_module("aatjax.configs.recipes").RECIPES


def load_config(name: str) -> Config:
    """The config of a name in `aatjax.configs`, a Python file, or a JSON file.

    A Python file binds `config = aatjax.Config(...)`; it is run, so read it before.

    Raises:
        UsageError: no such config, or the file does not bind one.
    """
    path = Path(name)
    if path.suffix == ".json":
        try:
            return Config.from_json(read_json_object(path, advice="write it again"))
        except DataError as error:
            raise UsageError(f"not a config: {error}") from error
    if path.suffix == ".py":
        if not path.exists():
            raise UsageError(f"{path}: no such config file")
        spec = importlib.util.spec_from_file_location("aatjax_user_config", path)
        if spec is None or spec.loader is None:
            raise UsageError(f"{path}: not a Python file")
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except AatjaxError:
            raise
        except Exception as error:
            line = getattr(traceback.extract_tb(error.__traceback__)[-1], "lineno", None)
            line = error.lineno if isinstance(error, SyntaxError) else line
            raise UsageError(
                f"{path}: could not be run: {type(error).__name__} at line {line}: {error}"
            ) from error
    elif name in available():
        module = importlib.import_module(f"aatjax.configs.{name}")
    elif name in recipes():
        return recipes()[name].config
    else:
        near = difflib.get_close_matches(name, [*available(), *recipes()], n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise UsageError(
            f"no config {name!r}{hint} (there are {', '.join(available())}, and those of `aatjax "
            "recipes`; a file ends in .py or .json)"
        )
    config = getattr(module, "config", None)
    if not isinstance(config, Config):
        raise UsageError(f"{name}: does not bind config = aatjax.Config(...)")
    return config


def _check(where: str, fields: dict[str, Any], cls: type[Any]) -> None:
    """Refuses fields that the dataclass does not have, and values of another type."""
    names = [field.name for field in dataclasses.fields(cls)]
    hints = typing.get_type_hints(cls)
    for name in fields:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f", did you mean {near[0]!r}?" if near else f" (there are {', '.join(names)})"
            raise UsageError(f"{where} has no field {name!r}{hint}")
        if not _fits(fields[name], hints[name]):
            expected = getattr(hints[name], "__name__", None) or str(hints[name])
            raise UsageError(
                f"{where}.{name}={fields[name]!r} is not of type "
                f"{expected if expected != 'Literal' else hints[name]}".replace("typing.", "")
            )


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value, as it comes from JSON, is of a field's type; whole numbers are floats."""
    options = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return value in options
    if typing.get_origin(hint) is tuple:  # JSON has no tuples
        plain = options[0] in (int, float, str)
        listed = isinstance(value, list | tuple)
        return listed and (not plain or all(_fits(v, options[0]) for v in value))
    if options:
        return any(_fits(value, option) for option in options)
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, int | float)
    return isinstance(value, typing.get_origin(hint) or hint)
