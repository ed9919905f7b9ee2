"""Every recipe runs; its numbers are the papers'; the readable configs equal the recipes."""

import dataclasses
import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from flax import nnx
from official_layouts import MAKERS

from aatjax import surgery
from aatjax.cli.commands.recipes import count_cost, estimate_time
from aatjax.cli.fields import replace_fields
from aatjax.cli.main import run
from aatjax.config import Config, list_configs, load_config
from aatjax.configs.recipes import DIFFERENCES, list_recipes, make_recipe
from aatjax.data.benchmarks import BENCHMARKS
from aatjax.data.prepare import prepare
from aatjax.experiments.partition import make_partition
from aatjax.experiments.run import train
from aatjax.models.ast import AST
from aatjax.models.config import ASTConfig
from aatjax.petl.base import adapt
from aatjax.train.metrics.results import NAMES

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {name: make_recipe(name) for name in list_recipes()}
METHODS = {recipe.method for recipe in RECIPES.values()}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory):
    """From the name of a benchmark to a small prepared set, made once."""
    home = tmp_path_factory.mktemp("prepared")
    made: dict[str, str] = {}

    def of(name: str) -> str:
        if name not in MAKERS:
            pytest.skip(f"MAKERS in tests/official_layouts.py has no small copy of {name}")
        if name not in made:
            MAKERS[name](home / "official" / name)
            made[name] = str(prepare(name, home / "official" / name, to=home, subset=True).folder)
        return made[name]

    return of


def shrunk(config: Config, path: str, weights: str) -> Config:
    """The config on a small set and model; two steps."""
    clips = len(load_parts(config, path))
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, source=weights, frames=64),
        data=dataclasses.replace(config.data, path=path),
        training=dataclasses.replace(
            config.training, epochs=1, batch_size=4 * -(-clips // 8), threads=0
        ),
    )


def load_parts(config: Config, path: str):
    return make_partition(dataclasses.replace(config.data, path=path)).train


def chosen() -> list[str]:
    """A third of the recipes, with every benchmark and every method in it at least twice.

    What a benchmark brings (classes, loss, metric) and what a method brings do not depend on each
    other; that every recipe divides its set and adapts its model is looked at below.
    """
    methods = sorted(METHODS)
    return [
        f"{benchmark}_{method}"
        for i, benchmark in enumerate(BENCHMARKS)
        for j, method in enumerate(methods)
        if (i + j) % 3 == 0
    ]


def test_what_runs_has_every_benchmark_and_method_twice() -> None:
    names = [RECIPES[name] for name in chosen()]
    for of in (BENCHMARKS, METHODS):
        assert min(sum(key in (r.benchmark, r.method) for r in names) for key in of) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", chosen())
def test_a_recipe_runs_two_steps(name, small_ast, prepared, tmp_path) -> None:
    recipe = RECIPES[name]
    config = shrunk(recipe.config, prepared(recipe.benchmark), small_ast)
    result = train(config, run_dir=tmp_path, show=None)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 2
    result_file = json.loads((tmp_path / "result.json").read_text())
    assert result_file["data"]["benchmark"] == BENCHMARKS[recipe.benchmark].title
    assert result_file["data"]["whole"] is False and "chosen_on_test" not in result_file["data"]
    assert result.headline is not None
    assert result.headline[0] == NAMES[BENCHMARKS[recipe.benchmark].metric]


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_a_recipe_divides_its_set_and_adapts_its_model(benchmark: str, prepared) -> None:
    recipes = [recipe for recipe in RECIPES.values() if recipe.benchmark == benchmark]
    divisions = [dataclasses.replace(r.config.data, path=prepared(benchmark)) for r in recipes]
    for data in {data.statistics: data for data in divisions}.values():
        parts = make_partition(data)
        assert len(parts.train) and parts.test is not None and len(parts.test)
    classes = len(BENCHMARKS[benchmark].classes)
    head = 768 * classes + classes
    for recipe in recipes:
        frames = recipe.config.model.frames
        base = ASTConfig.size("base", frames=frames, num_classes=classes)
        shape = dataclasses.replace(base, depth=2)
        model = nnx.eval_shape(
            lambda r=recipe, s=shape: adapt(AST(s, rngs=nnx.Rngs(0)), r.config.petl)
        )
        trained = {
            path: var.size
            for path, var in surgery.variables(model).items()
            if isinstance(var, nnx.Param)
        }
        assert sum(size for path, size in trained.items() if "head/linear" in path) == head
        assert (sum(trained.values()) > head + 2 * 768) == (recipe.method != "linear")


def test_a_readable_config_equals_the_recipe_of_its_name() -> None:
    readable = sorted(set(list_configs()) & set(RECIPES))
    assert len(readable) == 9
    for name in readable:
        assert load_config(name) == RECIPES[name].config
    conformer = load_config("esc50_conformer")
    assert load_config("esc50_adapter") == dataclasses.replace(
        conformer.with_method("bottleneck_pfeiffer"), name="esc50_adapter", optim=conformer.optim
    )


READABLE = sorted({*list_configs()} - {"default", "folder", "esc", "verdict"})


def read_docstring(name: str) -> dict[str, str]:
    """The parts of a readable config's docstring by their first words."""
    text = import_module(f"aatjax.configs.{name}").__doc__ or ""
    rows = re.findall(r"^(Paper row|Expected|Time): +(.*?)(?=^\w|\n\n)", text, re.M | re.S)
    return {"": text, **{word: " ".join(row.split()) for word, row in rows}}


@pytest.mark.parametrize("name", READABLE)
def test_a_readable_config_states_row_figure_time_and_command(name: str) -> None:
    parts = read_docstring(name)
    assert re.search(r"arXiv 24\d\d|arXiv 23\d\d", parts["Paper row"])
    assert re.search(r"[\d.]+ to [\d.]+ %", parts["Expected"])
    assert "PFLOPs" in parts["Time"] and f"\n    aatjax train {name}" in parts[""]
    (recipe,) = re.findall(r"^Differs: .*`aatjax recipes (\w+)`", parts[""], re.M)
    assert recipe == ("esc50_conformer" if name == "esc50_adapter" else name)


@pytest.mark.slow
@pytest.mark.parametrize("name", READABLE)
def test_the_counts_of_a_readable_config_are_those_of_aatjax_recipes(name: str) -> None:
    parts, config = read_docstring(name), load_config(name)
    trained, flops = count_cost(config)
    assert f"{trained:,}" in parts[""]
    for bound in re.findall(r"[\d,]+ (?:PFLOPs|minutes)", estimate_time(config, flops)):
        assert bound in parts["Time"]


def test_there_is_a_recipe_for_every_benchmark_and_method() -> None:
    assert len(RECIPES) == len(BENCHMARKS) * len(METHODS) >= 63
    assert {"aat", "soft_moa", "dense_moa", "lora", "conformer", "linear", "full"} == METHODS


@pytest.mark.parametrize(
    ("name", "frames", "batch", "epochs", "lr", "loss", "statistics"),
    [
        ("esc50_aat", 512, 42, 25, 1e-4, "ce", "esc50"),
        ("esc50_soft_moa", 500, 32, 50, 5e-3, "ce", "audioset"),
        ("esc10_full", 500, 32, 50, 5e-5, "ce", "audioset"),
        ("urbansound8k_linear", 400, 32, 30, 1e-3, "ce", "audioset"),
        ("urbansound8k_aat", 400, 48, 25, 1e-5, "ce", "us8k"),
        ("speech_commands_v2_aat", 128, 128, 30, 5e-4, "bce", "speech_commands_v2"),
        ("speech_commands_v2_lora", 100, 128, 75, 5e-3, "ce", "audioset"),
        ("speech_commands_v1_lora", 100, 128, 75, 5e-3, "ce", "audioset"),
        ("openmic2018_aat", 1024, 12, 30, 1e-4, "bce", "openmic"),
        ("openmic2018_soft_moa", 1024, 12, 30, 5e-3, "bce", "audioset"),
        ("gtzan_aat", 3000, 2, 30, 1e-5, "ce", "gtzan"),
        ("fluent_speech_commands_conformer", 400, 32, 75, 5e-3, "ce", "audioset"),
        ("iemocap_dense_moa", 800, 32, 20, 5e-3, "ce", "audioset"),
        ("iemocap_aat", 800, 32, 20, 1e-4, "ce", "audioset"),
    ],
)
def test_the_numbers_are_the_papers(name, frames, batch, epochs, lr, loss, statistics) -> None:
    config = load_config(name)
    assert (config.model.frames, config.training.batch_size) == (frames, batch)
    assert (config.training.epochs, config.optim.lr, config.training.loss) == (epochs, lr, loss)
    assert config.data.statistics == statistics
    petl = not name.endswith("_aat")
    assert (config.optim.b2, config.optim.weight_decay) == ((0.98, 0.1) if petl else (0.999, 0.05))
    assert (config.model.pool, config.model.head_norm) == (
        ("mean_all", False) if petl else (None, None)
    )


def test_a_conformer_sees_31_tokens_of_speech_and_8_of_sounds() -> None:
    kernels = {
        b: getattr(RECIPES[f"{b}_conformer"].config.petl, "kernel", None) for b in BENCHMARKS
    }
    speech = {"speech_commands_v1", "speech_commands_v2", "fluent_speech_commands", "iemocap"}
    assert kernels == {b: 31 if b in speech else 8 for b in BENCHMARKS}


def test_openmics_schedule_is_its_own() -> None:
    optim = load_config("openmic2018_aat").optim
    assert (optim.warmup_steps, optim.decay_start) == (1000, 10)
    assert (optim.decay_rate, optim.decay_every) == (0.5, 5)
    augment = load_config("openmic2018_aat").augment
    assert (augment.mixup, augment.noise, augment.roll) == (0.5, True, True)
    assert (augment.freq_mask, augment.time_mask) == (48, 192)


def test_petl_masks_after_normalisation_and_aat_before_it_under_every_protocol() -> None:
    for name, recipe in RECIPES.items():
        config, petl = recipe.config, recipe.setting.paper == "arXiv 2312.03694"
        masked = config.augment.freq_mask > 0
        assert config.augment.spec_after_norm == (petl and masked), name
        for protocol in BENCHMARKS[recipe.benchmark].protocols:
            assert config.with_protocol(protocol.name).augment == config.augment
    masking = {r.benchmark for r in RECIPES.values() if r.config.augment.spec_after_norm}
    assert masking == {"esc50", "esc10", "urbansound8k"}
    assert not RECIPES["esc50_aat"].config.augment.spec_after_norm


def test_aat_adds_noise_and_rolls_together() -> None:
    both = {name for name, recipe in RECIPES.items() if recipe.config.augment.noise}
    assert both == {name for name, recipe in RECIPES.items() if recipe.config.augment.roll}
    aat = {name for name in both if name.endswith("_aat")}
    assert aat == {f"{name}_aat" for name in ("speech_commands_v1", "speech_commands_v2")} | {
        "openmic2018_aat"
    }


def test_every_difference_from_the_papers_code_is_a_remark_and_in_the_documents() -> None:
    page = " ".join((ROOT / "docs/benchmarks.md").read_text(encoding="utf-8").split())
    remarks = {remark for recipe in RECIPES.values() for remark in recipe.remarks}
    assert set(DIFFERENCES.values()) <= remarks
    assert [text for text in DIFFERENCES.values() if f"- {text}." not in page] == []
    assert DIFFERENCES["stereo"] in RECIPES["urbansound8k_lora"].remarks
    assert DIFFERENCES["stereo"] not in RECIPES["urbansound8k_aat"].remarks
    assert DIFFERENCES["warmup"] in RECIPES["openmic2018_aat"].remarks
    assert DIFFERENCES["warmup"] not in RECIPES["esc50_aat"].remarks


@pytest.mark.parametrize("name", ["esc50_dense_moa", "esc50_conformer", "esc50_lora", "gtzan_aat"])
def test_the_flags_that_a_difference_names_are_flags(name: str) -> None:
    text = " ".join(RECIPES[name].remarks)
    fields = ["--petl.as-published"] if "--petl.as-published" in text else []
    fields += ["--petl.scale", "alpha/reduction"] if "--petl.scale" in text else []
    fields += ["--model.positions", "zeros"] if "--model.positions" in text else []
    changed = replace_fields(RECIPES[name].config, fields, "aatjax train")
    assert changed.petl.as_published and changed != RECIPES[name].config


def test_expected_figures_are_published_or_known_to_be_missing(capsys) -> None:
    assert "88.3 %" in RECIPES["esc50_conformer"].expected
    assert "27.52 %" in RECIPES["fluent_speech_commands_linear"].expected
    assert "97.31 %" in RECIPES["speech_commands_v2_full"].expected
    assert RECIPES["gtzan_lora"].expected == "no figure is published"
    assert all("no figure" in r.expected for r in RECIPES.values() if "moa" in r.method)
    assert run(["recipes", "openmic2018_aat"]) == 0
    out = capsys.readouterr().out
    assert "CHOOSES ON TEST CLIPS" in out and "aatjax prepare openmic2018 --download" in out
    assert run(["recipes", "esc50_conformer"]) == 0
    assert "308,498 parameters" in capsys.readouterr().out


def test_recipes_are_listed_and_found(capsys) -> None:
    assert "recipes" not in list_configs()
    assert run(["recipes"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in (*BENCHMARKS, *METHODS))
    assert run(["recipes", "esc50_softmoa"]) == 2
    assert "did you mean 'esc50_soft_moa'" in capsys.readouterr().err
    assert run(["train", "esc50_softmoa"]) == 2
    assert "did you mean 'esc50_soft_moa'" in capsys.readouterr().err
    assert run(["recipes", "esc50_aat", "--json"]) == 0
    assert Config.from_json(json.loads(capsys.readouterr().out)) == load_config("esc50_aat")


def test_an_unprepared_set_says_how_to_prepare_it(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["train", "gtzan_aat", "--out", str(tmp_path / "run")]) == 65
    assert "aatjax prepare gtzan --from ARCHIVE" in capsys.readouterr().err


def test_the_list_of_recipes_needs_no_jax() -> None:
    code = "import sys; from aatjax.cli.main import run; assert run(['recipes']) == 0; "
    code += "assert 'jax' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
