"""Configs: to JSON and back, what is refused and how, and every shipped one on a little data."""

import csv
import dataclasses
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import soundfile
from flax import nnx

from aatjax import petl, surgery
from aatjax.audio.augment import Augment
from aatjax.cli.fields import replace_fields
from aatjax.config import Config, Data, Model, list_configs, load_config
from aatjax.convert import write_native
from aatjax.errors import UsageError
from aatjax.experiments import run
from aatjax.models.ast import AST, ASTConfig
from aatjax.petl.base import METHODS
from aatjax.train.distributed import find_differences
from aatjax.train.optim import Optim
from aatjax.train.sharding import MeshShape
from aatjax.train.training import Training


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Types unchecked, as they are for a user: what is refused is refused by our own words."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def through_json(config: Config) -> Config:
    return Config.from_json(json.loads(json.dumps(config.to_json())))


def test_the_configs_of_the_package_are_found() -> None:
    assert {"default", "folder", "esc"} <= set(list_configs())
    for name in list_configs():
        assert load_config(name).name == name


@pytest.mark.parametrize("name", list_configs())
def test_a_shipped_config_survives_json(name: str) -> None:
    config = load_config(name)
    assert through_json(config) == config
    assert through_json(config).to_json() == config.to_json()


@pytest.mark.parametrize("method", sorted({*METHODS, *petl.TABLE} - {"combined", "stacked"}))
def test_every_method_survives_json(method: str) -> None:
    config = load_config("default").with_method(method)
    assert config.petl == petl.TABLE.get(method) or config.petl == METHODS[method]()
    again = through_json(config)
    assert again == config and type(again.petl) is type(config.petl)


def test_methods_joined_by_plus_are_combined_and_survive_json() -> None:
    config = load_config("default").with_method("aat_m+lora+bitfit")
    assert config.petl == petl.Combined((petl.AAT(spatial=False), petl.LoRA(), petl.BitFit()))
    assert through_json(config) == config
    with pytest.raises(UsageError, match="unknown method 'lorra', did you mean 'lora'"):
        load_config("default").with_method("aat+lorra")


def test_no_field_is_lost() -> None:
    config = Config(
        petl=petl.SoftMoA(num_experts=2, slots=3, reduction=4.5, location="both", train_norm=False),
        model=Model(
            "a b.pth", 99, "mean_all", False, True, "bfloat16", True, True, "zeros", True, "main"
        ),
        data=Data(
            format="names",
            path="/x",
            pattern="(?P<label>.)",
            columns={"path": "file", "label": "class"},
            root="/r",
            group="(.)_",
            fold="3",
            test_fraction=0.3,
            valid_fraction=0.1,
            seed=4,
            split_method="stratified",
            pad="repeat",
            statistics="train",
            channels=1,
            truncated="keep",
            max_bad=3.0,
            cache="/c",
            train_clips=7,
            test_clips=8,
            protocol="aat",
            shots=5,
            draw=2,
            leaks="report",
            windows="random",
            pooling="max",
            hop=0.5,
        ),
        training=Training(
            epochs=2,
            batch_size=3,
            eval_batch_size=5,
            loss="bce",
            select="average",
            average=0.5,
            save_every=2,
            seed=9,
            threads=0,
            max_skipped=3,
            on_save_error="continue",
            kernels="fixed",
            deterministic=True,
            profile="2:3",
            cache_prefix=True,
            buckets=(32, 64),
            balance="sampler",
            head_init="zeros",
            ridge_suffices=0.9,
            focal=1.0,
            label_smoothing=0.1,
            accumulate=3,
            patience=4,
        ),
        optim=Optim(
            lr=0.5,
            schedule="steps",
            warmup_steps=3,
            weight_decay=0.2,
            decay_mask="no_bias_ln",
            b1=0.8,
            b2=0.7,
            eps=1e-3,
            clip=2.0,
            decay_start=2,
            decay_rate=0.1,
            decay_every=4,
        ),
        augment=Augment(0.1, 2.0, 3, 4, True, True, True, 6.0, 0.1, 0.2),
        mesh=MeshShape(2, -1, 4),
        name="n",
    )
    plain = Config(petl=petl.Linear())
    for part in ("model", "data", "training", "optim", "augment", "mesh"):
        for field in dataclasses.fields(getattr(config, part)):
            here, default = (getattr(getattr(c, part), field.name) for c in (config, plain))
            assert here != default, f"the test leaves {part}.{field.name} at its default"
    assert through_json(config) == config


def test_sounds_in_several_files_survive_json_and_the_command_line() -> None:
    data = Data(path={"train": "a.csv", "test": "b.csv"}, columns={"path": "file", "label": "kind"})
    config = Config(petl=petl.Linear(), data=data)
    assert through_json(config) == config and data.title != "auto"
    flags = [
        "--data.path",
        "train=a.csv",
        "test=b.csv",
        "--data.columns",
        "path=file",
        "label=kind",
    ]
    assert replace_fields(Config(petl=petl.Linear()), flags, "aatjax train") == config
    assert replace_fields(config, ["--data.path", "x=1"], "").data.path == "x=1"  # a folder's name
    stored = config.to_json()
    stored["data"] = {"format": "auto", "path": "sounds"}  # written before these fields were there
    assert Config.from_json(stored).data == Data(path="sounds")
    for flags, message in (
        (["--data.path", "train=a.csv", "dev=b.csv"], "'dev=b.csv' is not NAME=VALUE with a NAME"),
        (["--data.columns", "file=path"], "a NAME of path|label|labels|fold|split|group"),
        (["--data.columns"], "name one or more"),
    ):
        with pytest.raises(UsageError, match=re.escape(message)):
            replace_fields(config, flags, "aatjax train")
    with pytest.raises(UsageError, match=r"data.path={'dev': 'x'} is not of type"):
        Config.from_json({**stored, "data": {"path": {"dev": "x"}}})


@pytest.mark.parametrize(("before", "now"), [("uniform", "none"), ("balanced", "sampler")])
def test_a_field_under_its_former_name_is_read(before: str, now: str) -> None:
    stored = Config(petl=petl.Linear()).to_json()
    del stored["training"]["balance"]
    stored["training"]["sampling"] = before
    assert Config.from_json(stored).training == Training(balance=now)  # pyright: ignore
    stored["training"]["sampling"] = ["balanced"]
    with pytest.raises(UsageError, match=r"training\.balance="):
        Config.from_json(stored)


def test_absent_parts_take_their_defaults(unchecked: None) -> None:
    config = Config.from_json({"petl": {"name": "linear"}, "optim": {"lr": 1}})
    assert config == Config(petl=petl.Linear(), optim=Optim(lr=1.0))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "no petl"),
        ({"petl": {"name": "lineer"}}, "unknown method 'lineer', did you mean 'linear'"),
        ({"petl": {"name": "aat", "ration": 1}}, "petl has no field 'ration'.*'ratio'"),
        ({"petl": {"name": "linear"}, "trainin": {}}, "config has no field 'trainin'.*'training'"),
        ({"training": {"epoch": 3}}, "training has no field 'epoch', did you mean 'epochs'"),
        ({"optim": {"zzz": 3}}, r"optim has no field 'zzz' \(there are lr, "),
        ({"training": {"epochs": -1}}, "epochs=-1 must be at least 0"),
        ({"training": {"epochs": "ten"}}, "training.epochs='ten' is not of type int"),
        ({"training": {"epochs": 2.5}}, "training.epochs=2.5"),
        ({"training": {"buckets": 32}}, "training.buckets=32 is not of type"),
        ({"training": {"buckets": ["a"]}}, r"training.buckets=\['a'\] is not of type"),
        ({"training": {"epochs": True}}, "training.epochs=True"),
        ({"training": 5}, "config.training=5 is not an object"),
        ({"petl": "linear"}, "config.petl='linear' is not an object"),
        ({"petl": {"name": "soft_moa", "slots": None}}, "petl.slots=None"),
        ({"petl": {"name": "soft_moa", "location": "here"}}, "petl.location='here'"),
        ({"optim": {"lr": "1e-3"}}, r"optim.lr='1e-3' is not of type Optional\[float\]"),
        ({"optim": {"eps": None}}, "optim.eps=None"),
        ({"optim": {"schedule": "cosin"}}, "optim.schedule='cosin'.*cosine"),
        ({"data": {"path": 3}}, "data.path=3"),
        ({"data": {"format": "foldr"}}, "data.format='foldr'"),
        ({"data": {"max_bad": -1}}, "max_bad"),
        ({"data": {"test_fraction": 1.0}}, "test_fraction=1.0 must be at least 0 and below 1"),
        ({"data": {"statistics": "imagenet"}}, "statistics='imagenet' is not one of"),
        ({"data": {"format": "synthetic", "path": "/x"}}, "data.path='/x' does not go with"),
        ({"data": {"format": "synthetic", "fold": "1"}}, "data.fold='1' does not go with"),
        ({"model": {"dtype": "float16"}}, "model.dtype='float16'"),
        ({"model": {"frames": "x"}}, "model.frames='x'"),
        ({"name": 3}, "config.name=3"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    fields: dict[str, Any], words: str, unchecked: None
) -> None:
    """B24."""
    whole = fields if "petl" in fields or not fields else {"petl": {"name": "linear"}, **fields}
    with pytest.raises(UsageError, match=words) as caught:
        Config.from_json(whole)
    assert "\n" not in str(caught.value)


def test_differences_name_the_field_and_both_values() -> None:
    one = load_config("default")
    assert find_differences(one.to_json(), one.to_json()) == []
    two = dataclasses.replace(
        one.with_method("linear"),
        optim=dataclasses.replace(one.optim, lr=0.5),
        data=dataclasses.replace(one.data, seed=7),
    )
    found = find_differences(one.to_json(), two.to_json())
    assert ("data.seed", 0, 7) in found
    assert ("optim.lr", one.optim.lr, 0.5) in found
    assert ("petl.name", "soft_moa", "linear") in found
    assert ("petl.slots", 1, None) in found
    assert not [path for path, *_ in found if not path.startswith(("data.s", "optim.lr", "petl."))]


# Files.


def test_a_python_file(tmp_path: Path) -> None:
    path = tmp_path / "my config.py"
    path.write_text(
        "import aatjax\nfrom aatjax import petl\n"
        "config = aatjax.Config(name='mine', petl=petl.AAT(ratio=0.5))\n"
    )
    assert load_config(str(path)) == Config(name="mine", petl=petl.AAT(ratio=0.5))


def test_a_json_file(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    config = load_config("folder")
    path.write_text(json.dumps(config.to_json()))
    assert load_config(str(path)) == config


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.py", "x = 1\n", "does not bind config"),
        ("a.py", "config = 3\n", "does not bind config"),
        ("a.py", "config = (\n", "SyntaxError at line 1"),
        ("a.py", "\nimport gone_from_here\n", "ModuleNotFoundError at line 2.*gone_from_here"),
        (
            "a.py",
            "from aatjax import Training\nTraining(epochs=-1)",
            "epochs=-1 must be at least 0",
        ),
        ("a.json", "{", "not a config: .*a.json: cannot be read: not JSON"),
        ("a.json", "[1]", "not a JSON object"),
        ("a.json", '{"petl": {"name": "linear"}, "nam": "x"}', "did you mean 'name'"),
    ],
)
def test_a_file_that_is_no_config(name: str, text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UsageError, match=words) as caught:
        load_config(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["gone.py", "gone.json", "some/gone.py"])
def test_no_such_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="gone"):
        load_config(str(tmp_path / name))


def test_no_such_name() -> None:
    with pytest.raises(UsageError, match=r"no config 'foldr', did you mean 'folder'\?"):
        load_config("foldr")
    with pytest.raises(UsageError, match=r"no config 'zzz' \(there are default, "):
        load_config("zzz")


# Every shipped config, two steps.


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = ASTConfig(
        dim=32, depth=1, heads=2, mlp_dim=48, stride=(16, 16), frames=98, num_classes=2
    )
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    write_native(path, surgery.arrays(AST(config, rngs=nnx.Rngs(0))), config)
    return path


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same sounds as class folders and in ESC's layout."""
    root = tmp_path_factory.mktemp("sounds")
    (root / "esc" / "audio").mkdir(parents=True)
    (root / "esc" / "meta").mkdir()
    rows = []
    for label, name in enumerate(("hiss", "tone")):
        (root / "folder" / name).mkdir(parents=True)
        for i in range(6):
            rng = np.random.default_rng(10 * label + i)
            wave = 0.1 * rng.normal(size=12000)
            wave += label * 0.5 * np.sin(np.arange(12000) / (3 + i))
            file = f"{i % 2 + 1}-{label}{i}-A-{label}.wav"
            for place in (root / "folder" / name, root / "esc" / "audio"):
                soundfile.write(place / file, wave, 16000)
            rows.append([file, i % 2 + 1, label, name, "True", f"{label}{i}", "A"])
    with (root / "esc" / "meta" / "esc50.csv").open("w", newline="") as table:
        writer = csv.writer(table)
        heads = ["filename", "fold", "target", "category", "esc10", "src_file", "take"]
        writer.writerows([heads, *rows])
    return {"esc": root / "esc", "auto": root / "folder", "folder": root / "folder"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["default", "esc", "folder"])
def test_a_shipped_config_trains(
    name: str, backbone: Path, sounds: dict[str, Path], tmp_path: Path
) -> None:
    shipped = load_config(name)
    data = dataclasses.replace(
        shipped.data, train_clips=1, test_clips=1, cache=str(tmp_path / "cache")
    )
    if data.format != "synthetic":
        data = dataclasses.replace(data, path=str(sounds[data.format]))
    if data.format == "esc":
        data = dataclasses.replace(data, fold="1")
    config = dataclasses.replace(
        shipped,
        data=data,
        model=dataclasses.replace(shipped.model, source=str(backbone)),
        training=dataclasses.replace(shipped.training, epochs=2),
    )
    result = run.train(config, run_dir=tmp_path / "run", show=None)
    assert result.run is not None
    first = 0 if config.training.head_init == "ridge" else 1  # the head's start is a row of its own
    assert [row["epoch"] for row in result.run.history] == list(range(first, 3))
    assert result.method == shipped.petl.name
    assert result.headline is not None and result.headline[0] == "accuracy"
    assert result.artefact == tmp_path / "run" / "adapter.safetensors"
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert Config.from_json(written) == config
    figures = json.loads((tmp_path / "run" / "result.json").read_text())
    assert figures["trainable"] == result.trainable > 0
    assert figures["headline"] == list(result.headline)
    assert {p.name for p in (tmp_path / "run").iterdir()} >= {
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "tensorboard",
        "adapter.safetensors",
    }


@pytest.mark.parametrize("format", ["synthetic", "folder"])
def test_validation_clips_are_split_off_the_training_part(
    format: Any, sounds: dict[str, Path], tmp_path: Path
) -> None:
    data = Data(
        format=format,
        valid_fraction=0.5,
        train_clips=4,
        test_clips=2,
        cache=str(tmp_path),
        path=None if format == "synthetic" else str(sounds["folder"]),
    )
    parts = run.make_partition(data)
    assert parts.valid is not None and parts.test is not None
    ids = [{clip.id for clip in part.clips} for part in (parts.train, parts.valid, parts.test)]
    assert all(ids) and sum(map(len, ids)) == len(set.union(*ids))
    if format == "synthetic":
        assert len(ids[0]) == len(ids[1])
    else:  # by the hash of each name: half of 10
        assert [len(part) for part in ids[:2]] == [5, 5]
        kinds = [{clip.label for clip in part.clips} for part in (parts.train, parts.valid)]
        assert kinds[0] == kinds[1]
    again = run.make_partition(data)
    assert [c.id for c in again.train.clips] == [c.id for c in parts.train.clips]


@pytest.mark.parametrize("statistics", ["model", "esc50", "train"])
def test_statistics(statistics: str, sounds: dict[str, Path], tmp_path: Path) -> None:
    config = Config(
        petl=petl.Linear(),
        data=Data(path=str(sounds["folder"]), statistics=statistics, cache=str(tmp_path)),
    )
    model = AST(ASTConfig(dim=8, depth=1, heads=1, mlp_dim=8, frames=98), rngs=nnx.Rngs(0))
    parts = run.make_partition(config.data)
    found = run.prepare_front_end(config, model, parts.train)
    expected = {"model": (-4.2677393, 4.5689974), "esc50": (-6.6268077, 5.358466)}
    if statistics != "train":
        assert (found.mean, found.std) == expected[statistics]
        return
    features = np.concatenate(
        [
            np.asarray(found.features(jnp.asarray(audio[None]), jnp.asarray([length]))).ravel()
            for audio, length in (
                found.fit(parts.train.waveform(i)) for i in range(len(parts.train))
            )
        ]
    )
    assert found.mean == pytest.approx(features.mean(), rel=1e-4)
    assert found.std == pytest.approx(features.std(ddof=1), rel=1e-4)


def test_a_config_file_imports_its_neighbours(tmp_path):
    (tmp_path / "neighbour_of_config.py").write_text("EPOCHS = 7\n")
    text = "import aatjax\nfrom neighbour_of_config import EPOCHS\n"
    text += "training = aatjax.Training(epochs=EPOCHS)\n"
    text += "config = aatjax.Config(petl=aatjax.petl.Linear(), training=training)\n"
    (tmp_path / "mine.py").write_text(text)
    before = list(sys.path)
    assert load_config(str(tmp_path / "mine.py")).training.epochs == 7
    assert sys.path == before
