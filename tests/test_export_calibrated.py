"""A user of an export reads what `aatjax predict` says: calibration, windows, the recipe."""

import json
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from flax import nnx

from aatjax import Scoring, load, petl, predict, surgery
from aatjax.audio.frontend import FrontEnd
from aatjax.convert import write_native
from aatjax.export import ExportMismatchError, export, parity
from aatjax.inference.calibration import Calibration
from aatjax.models.ast import AST, ASTConfig
from aatjax.train.adapter_file import save_adapter

CONFIG = ASTConfig(dim=32, depth=1, heads=2, mlp_dim=48, stride=(16, 16), frames=60, num_classes=4)
CLASSES = ("dog", "rain", "siren", "wind")
SCORINGS = {
    "mean": Scoring(),
    "hop": Scoring(hop=0.25),
    "max": Scoring("max"),
    "first": Scoring("first"),
    "attention": Scoring("attention", sharpness=5.0),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    write_native(path, surgery.arrays(AST(CONFIG, rngs=nnx.Rngs(0))), CONFIG)
    return path


def make_adapter(
    path: Path,
    base: Path,
    scoring: Scoring,
    *,
    multi_label: bool = False,
    pad: Any = "log_mel_zero",
    method: petl.Method | None = None,
) -> Path:
    model = petl.adapt(load(base, num_classes=4), method or petl.LoRA(reduction=8), seed=3)
    rng = np.random.default_rng(0)
    for value in surgery.variables(model).values():
        if isinstance(value, nnx.Param):
            value[...] = value[...] + jnp.asarray(0.3 * rng.normal(size=value.shape), jnp.float32)
    thresholds = (0.3, 0.6, 0.5, 0.4) if multi_label else None
    return save_adapter(
        path,
        model,
        classes=CLASSES,
        multi_label=multi_label,
        frontend=FrontEnd(frames=60, pad=pad),
        scoring=scoring,
        extra={"decisions": Calibration(1.8, thresholds, 0.7, 0.9, 40).to_json()},
    )


def write_sound(path: Path, rate: int = 44100) -> Path:
    """Two channels, 2.5 s: a sound, a second of silence, another sound."""
    rng = np.random.default_rng(1)
    time = np.arange(round(0.8 * rate)) / rate
    first = 0.3 * np.sin(2 * np.pi * 700 * time) + 0.01 * rng.normal(size=time.size)
    second = 0.2 * rng.normal(size=round(0.71 * rate))
    whole = np.concatenate([first, np.zeros(round(1.2 * rate)), second])
    soundfile.write(path, np.stack([whole, 0.5 * whole], axis=1), rate, subtype="PCM_16")
    return path


def run_recipe(folder: Path, sound: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """The probabilities by the recipe in a card, and the logits of the windows."""
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    (code,) = (block for block in blocks if "def read_windows" in block)
    (folder / "sound.wav").write_bytes(sound.read_bytes())
    names: dict[str, Any] = {}
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        exec(compile(code, "README.md", "exec"), names)
    assert names["classes"] == list(CLASSES)
    return names["pool"](names["logits"], names["lengths"]), names["logits"]


CASES = [
    ("onnx", "mean", False, "log_mel_zero"),
    pytest.param("onnx", "hop", True, "silence", marks=pytest.mark.slow),
    pytest.param("onnx", "attention", True, "repeat", marks=pytest.mark.slow),
    pytest.param("hf", "mean", False, "log_mel_zero", marks=pytest.mark.slow),
    pytest.param("hf", "max", True, "log_mel_zero", marks=pytest.mark.slow),
    pytest.param("hf", "first", False, "repeat", marks=pytest.mark.slow),
    pytest.param("peft", "attention", False, "log_mel_zero", marks=pytest.mark.slow),
    pytest.param("stablehlo", "max", True, "repeat", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("to", "scoring", "multi_label", "pad"), CASES)
def test_the_recipe_of_the_card_gives_the_probabilities_of_predict(
    to: str,
    scoring: str,
    multi_label: bool,
    pad: Any,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rule = SCORINGS[scoring]
    path = make_adapter(tmp_path / "a.safetensors", base, rule, multi_label=multi_label, pad=pad)
    sound = write_sound(tmp_path / "sound.wav")
    options: dict[str, Any] = {"platforms": ("cpu",)} if to == "stablehlo" else {}
    done = export(path, to, tmp_path / "out", check=[sound], **options)
    want = predict(path, sound)
    found, _ = run_recipe(done.folder, sound, monkeypatch)
    np.testing.assert_allclose(found, want.probabilities, atol=1e-5)
    assert f"{want.label} {want.probability:.3f}" in capsys.readouterr().out
    entries = json.loads((done.folder / "export.json").read_text())
    assert entries["parity"]["probabilities"] < 1e-5
    assert entries["calibration"]["temperature"] == 1.8
    card = (done.folder / "README.md").read_text()
    assert "Calibrated on 40 validation clips" in card and "Of a longer file" in card
    if multi_label:
        assert "dog 0.3, rain 0.6, siren 0.5, wind 0.4" in card


def test_the_pipeline_of_transformers_gives_the_probabilities_of_predict(
    base: Path, tmp_path: Path
) -> None:
    """E13: of a file of one window, without the recipe."""
    pipeline = pytest.importorskip("transformers", reason="transformers is not installed").pipeline
    rng = np.random.default_rng(0)
    sound = tmp_path / "one.wav"
    soundfile.write(sound, 0.2 * rng.normal(size=9000), 16000, subtype="PCM_16")
    for multi_label in (False, True):
        path = make_adapter(
            tmp_path / f"{multi_label}.safetensors", base, Scoring(), multi_label=multi_label
        )
        out = tmp_path / f"out-{multi_label}"
        export(path, "hf", out)
        samples, _ = soundfile.read(sound, dtype="float32")
        classify = pipeline("audio-classification", model=str(out))
        found = {row["label"]: row["score"] for row in classify(samples, top_k=4)}
        want = predict(path, sound).to_json()["probabilities"]
        assert found == pytest.approx(want, abs=1e-5)


def test_the_check_refuses_other_probabilities_of_whole_files(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_adapter(tmp_path / "a.safetensors", base, Scoring())
    monkeypatch.setattr(parity, "find_limit", lambda want, tolerance: 10.0)
    from aatjax.export import writer

    compare = writer.compare_outputs

    def spoil(want: Any, found: Any, *rest: Any, **more: Any) -> Any:
        for logits in found.values():
            logits[:, 0] += 1.0
        return compare(want, found, *rest, **more)

    monkeypatch.setattr(writer, "compare_outputs", spoil)
    with pytest.raises(ExportMismatchError, match=r"probabilities of siren .* `aatjax predict`"):
        export(path, "safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_plain_weights_are_calibrated_too(base: Path, tmp_path: Path) -> None:
    path = make_adapter(tmp_path / "a.safetensors", base, Scoring())
    export(path, "safetensors", tmp_path / "out")
    sound = write_sound(tmp_path / "s.wav", 16000)
    want, found = predict(path, sound), predict(tmp_path / "out" / "model.safetensors", sound)
    windows = [row.probabilities for row in want.windows]
    np.testing.assert_allclose([row.probabilities for row in found.windows], windows, atol=1e-5)
