"""The page: its server answers as `predict`, its files are complete, browsers run it."""

import base64
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
import soxr
from flax import nnx
from tiny_model import tiny_config

from aatjax import petl, surgery
from aatjax.audio.decode import decode
from aatjax.audio.frontend import FrontEnd
from aatjax.audio.scoring import Scoring
from aatjax.audio.windows import find_starts
from aatjax.cli import main
from aatjax.convert import write_native
from aatjax.convert.load import load
from aatjax.data.synthetic.synthesize import synthesize
from aatjax.errors import DataError, UnavailableError
from aatjax.export import export, verify, web
from aatjax.inference.calibration import Calibration, apply_calibration
from aatjax.inference.classifier import Classifier
from aatjax.inference.demo import ONNX, PAGE, read_page_file
from aatjax.models.ast import AST
from aatjax.reports.html.page import clean
from aatjax.train.adapter_file import save_adapter

pytest.importorskip(
    "fastapi", reason="the page's server needs fastapi: pip install 'aatjax[serve]'"
)
pytest.importorskip("httpx", reason="starlette's test client needs httpx")

from fastapi.testclient import TestClient

from aatjax.inference.demo.server import Page
from aatjax.inference.server.serve import open_socket

CONFIG = tiny_config(mels=64)
CLASSES = ("<script>alert(1)</script>", "dog & 'cat'", "</script>\u202e")
MAIN = "from aatjax.cli.main import main; main()"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    arrays = surgery.arrays(AST(CONFIG, rngs=nnx.Rngs(0)))
    write_native(folder / "base.safetensors", arrays, CONFIG)
    model = petl.adapt(
        load(folder / "base.safetensors", num_classes=3), petl.SoftMoA(num_experts=2)
    )
    rng = np.random.default_rng(0)
    for variable in surgery.variables(model).values():
        if isinstance(variable, nnx.Param):
            noise = 0.3 * rng.normal(size=variable[...].shape)
            variable[...] = variable[...] + noise.astype(np.float32)
    return save_adapter(
        folder / "adapter.safetensors",
        model,
        classes=CLASSES,
        multi_label=False,
        frontend=FrontEnd(frames=98, mels=64),
        extra={"decisions": Calibration(1.4, None, 0.7, 0.9, 50).to_json()},
    )


@pytest.fixture(scope="module")
def classifier(adapter: Path) -> Classifier:
    return Classifier.load(adapter)


@contextlib.contextmanager
def connect(classifier: Classifier) -> Iterator[TestClient]:
    page = Page(classifier, "<b>t</b>")
    with TestClient(page.make_app(page.start), base_url="http://localhost") as client:
        while client.get("/readyz").status_code != 200:
            time.sleep(0.05)
        yield client


@pytest.fixture(scope="module")
def client(classifier: Classifier) -> Iterator[TestClient]:
    with connect(classifier) as client:
        yield client


ROUTE = "/v1/adapters/demo/predict?partial=true&detail=true"
BINARY = {"Content-Type": "application/octet-stream"}


def post(client: TestClient, body: bytes, path: str = ROUTE, **headers: str) -> Any:
    headers = {key.replace("_", "-"): value for key, value in headers.items()}
    return client.post(path, content=body, headers=BINARY | headers)


def wave(seconds: float, seed: int = 0, rate: int = 16000) -> np.ndarray:
    return synthesize("siren", seed, seconds=seconds, rate=rate)


def as_wav(samples: np.ndarray, rate: int = 16000) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, "PCM_16", format="WAV")
    return file.getvalue()


# --- the server ----------------------------------------------------------------------------------


def test_the_servers_answers_are_those_of_predict(
    client: TestClient, classifier: Classifier
) -> None:
    for seconds in (0.4, 0.98, 3.3):
        samples = wave(seconds)
        answer = post(client, as_wav(samples)).json()
        expected = classifier.predict_waveform(samples).to_json(detail=True)
        assert answer.pop("adapter") == "demo" and expected.pop("path") == ""
        for found, want in zip(answer.pop("windows"), expected.pop("windows"), strict=True):
            assert found.pop("probabilities") == pytest.approx(want.pop("probabilities"), abs=1e-5)
            assert found.pop("probability") == pytest.approx(want.pop("probability"), abs=1e-5)
            assert found == want
        for name in ("probability", "probabilities"):
            assert answer.pop(name) == pytest.approx(expected.pop(name), abs=1e-5)
        assert answer == expected


def test_a_clip_without_any_of_several_labels_has_none(classifier: Classifier) -> None:
    sure = Classifier(
        classifier.model,
        CLASSES,
        classifier.frontend,
        multi_label=True,
        calibration=Calibration(1.0, (1.0, 1.0, 1.0), 0.0, 0.9, 50),
    )
    with connect(sure) as client:
        assert post(client, as_wav(wave(0.5))).json()["given"] == []


def test_a_part_of_a_file_is_used_with_a_note(
    client: TestClient, classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = as_wav(wave(2.5))
    assert "note" not in post(client, whole).json()
    cut = post(client, whole[:40044]).json()
    assert cut["note"] == "truncated 20000/40000 frames" and cut["windows"][-1]["end"] == 1.25
    monkeypatch.setattr("aatjax.inference.demo.server.MAX_SECONDS", 2.0)
    with connect(classifier) as short:
        answer = post(short, whole).json()
    assert (
        answer["windows"][-1]["end"] == pytest.approx(2.0, abs=0.025)
        and "first 0.0333333 minutes" in answer["note"]
    )


def test_the_page_and_its_files(client: TestClient) -> None:
    index = client.get("/")
    assert index.status_code == 200 and index.content == read_page_file("index.html")
    assert index.headers["X-Content-Type-Options"] == "nosniff"
    config = client.get("/config.json").json()
    assert config["classes"] == list(CLASSES) and config["title"] == "<b>t</b>"
    assert config["method"] == "soft_moa"
    kinds = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
    for name in PAGE:
        file = client.get(f"/{name}")
        assert file.status_code == 200
        assert file.headers["Content-Type"] == f"{kinds[name.split('.')[1]]}; charset=utf-8"
    for path in ("/../server.py", "/page/index.html", "/server.py", "/%2e%2e/x", "/onnx.js"):
        assert client.get(path).status_code == 404


def test_refusals(client: TestClient, adapter: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sound = as_wav(wave(0.5))
    for host in ("evil.example", "127.0.0.1.evil.example:80", ""):
        assert post(client, sound, Host=host).status_code == 400
        assert client.get("/", headers={"Host": host}).status_code == 400
    assert post(client, sound, Content_Type="text/plain").status_code == 415
    assert post(client, sound, "/elsewhere").status_code == 405
    assert client.delete("/v1/adapters/demo").status_code == 405
    assert post(client, b"").status_code == 400
    refused = post(client, b"no sound at all")
    assert refused.status_code == 422 and "<bytes>" not in refused.json()["error"]
    assert post(client, sound, Content_Length=str(2**26 + 1)).status_code == 413
    with open_socket("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        for wrong, code, reason in (
            (port, 69, "give another --port"),
            ("99999", 2, "--port 99999 must be at least 0 and at most 65535"),
        ):
            assert main.run(["demo", str(adapter), "--port", wrong, "--no-browser"]) == code
            assert reason in capfd.readouterr().err


def test_without_its_libraries_the_demo_names_the_extra(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("aatjax.io.optional.find_spec", lambda name: None)
    assert main.run(["demo", str(adapter)]) == 69
    assert "pip install 'aatjax[serve]'" in capfd.readouterr().err


# --- the page ------------------------------------------------------------------------------------


def test_the_page_contacts_no_other_host_and_sets_names_as_text() -> None:
    for name in (*PAGE, ONNX):
        text = read_page_file(name).decode()
        assert not re.findall(
            r"(?:https?:)?//[a-z0-9-]+\.[a-z]", text.replace("http://localhost", "")
        )
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text
        )
    assert "default-src 'self'" in read_page_file("index.html").decode()


def run_node(folder: Path, script: str, given: Any) -> Any:
    """The JSON that a script prints from `given`, with the page's functions beside it."""
    for name in (*PAGE, ONNX):
        (folder / name).write_bytes(read_page_file(name))
    (folder / "package.json").write_text('{"type": "module"}')
    head = 'import { readFileSync } from "node:fs";\nconst given = JSON.parse(readFileSync(0));\n'
    (folder / "run.js").write_text(head + script)
    command = ["node", str(folder / "run.js")]
    done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


needs_node = pytest.mark.skipif(
    shutil.which("node") is None, reason="the page's functions need node to run"
)
DECIDED = """
import { decide, probabilities } from "./decide.js";
import { logMel, toInt16 } from "./sound.js";
const sets = given.configs.map((config) => given.logits.map((row) => {
  const { multi_label: many, calibration } = config;
  const calibrated = probabilities(row, calibration.temperature, many);
  return decide(calibrated, probabilities(row, 1, many), config);
}));
console.log(JSON.stringify({ sets, mel: logMel(Int16Array.from(given.samples), 16000, 64)
  .map((row) => [...row]), rounded: [...toInt16([0.5, -1, 2, -2, 1e-5])] }));
"""


@needs_node
def test_prediction_sets_and_log_mel_in_javascript_are_those_of_python(tmp_path: Path) -> None:
    logits = 2 * np.random.default_rng(0).normal(size=(40, 5))
    frontend = FrontEnd(frames=40, mels=64)
    samples = wave(1.0)[: frontend.samples]
    tasks = [
        Calibration(1.7, thresholds, 0.55, 0.9, 30)
        for thresholds in (None, (0.3, 0.5, 0.6, 0.4, 0.5))
    ]
    configs = [
        {"classes": list("abcde"), "multi_label": c.multi_label, "calibration": c.to_json()}
        for c in tasks
    ]
    given = {"logits": logits.tolist(), "configs": configs, "samples": samples.tolist()}
    found = run_node(tmp_path, DECIDED, given)
    for calibration, rows in zip(tasks, found["sets"], strict=True):
        want = apply_calibration(logits, calibration)
        for i, row in enumerate(rows):
            assert row["calibrated"] == pytest.approx(want.probabilities[i])
            assert row["given"] == want.given[i].tolist()
            assert row["possible"] == want.possible[i].tolist()
    mel = frontend.features(jnp.asarray(samples[None]), jnp.asarray([len(samples)]))[0]
    np.testing.assert_allclose(found["mel"], mel, atol=2e-3)
    assert found["rounded"] == [16384, -32768, 32767, -32768, 0]


POOLED = """
import { isSilent, starts, summary } from "./decide.js";
console.log(JSON.stringify({
  answers: given.configs.map((config) => summary(given.windows, 99999, config)),
  none: summary(given.windows.map((w) => ({ ...w, silent: true })), 99999, given.configs[0]),
  short: summary(given.windows, 400, given.configs[0]),
  starts: given.sizes.map(([samples, step]) => starts(samples, 1000, step)),
  silent: given.sounds.map((x) => isSilent(Int16Array.from(x))),
}));
"""


@needs_node
def test_files_of_several_windows_in_javascript_are_those_of_python(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=(5, 4))
    spans = [(0, 1.0), (1.0, 2.0), (2.0, 3.0), (3.0, 4.0), (4.0, 4.3)]
    silent = [False, True, False, False, False]
    rows = zip(logits.tolist(), spans, silent, strict=True)
    windows = [{"logits": z, "start": a, "end": b, "silent": s} for z, (a, b), s in rows]
    scorings = [Scoring(), Scoring("max"), Scoring("first"), Scoring("attention", sharpness=6.0)]
    tasks = [(s, many) for s in scorings for many in (False, True)]
    fitted = {many: Calibration(1.7, (0.4,) * 4 if many else None, 0.6, 0.9, 30) for many in (0, 1)}
    configs = [
        {
            "classes": list("abcd"),
            "multi_label": many,
            "calibration": fitted[many].to_json(),
            "scoring": dataclasses.asdict(scoring),
        }
        for scoring, many in tasks
    ]
    sizes = [(n, step) for n in (1, 999, 1000, 1399, 1400, 2500, 5000) for step in (1000, 300)]
    sounds = [[0] * 9, [7, 8, 9, 8], [1, 4, 0]]
    given = {"windows": windows, "configs": configs, "sizes": sizes, "sounds": sounds}
    found = run_node(tmp_path, POOLED, given)
    kept = np.flatnonzero(~np.array(silent))
    lengths = np.array([10 * (b - a) for a, b in spans])[kept]
    for (scoring, many), row in zip(tasks, found["answers"], strict=True):
        pooled = scoring.pool(logits[kept], lengths, many)[None]
        want = apply_calibration(pooled, fitted[many])
        assert row["calibrated"] == pytest.approx(want.probabilities[0])
        assert row["possible"] == want.possible[0].tolist()
    assert found["none"]["reason"] == "silent" and not any(found["none"]["given"])
    assert found["short"]["reason"].startswith("too short")
    assert found["starts"] == [list(find_starts(n, 1000, step)) for n, step in sizes]
    assert found["silent"] == [True, True, False]


ASKED = """
import { readAnswer, wav } from "./server.js";
const files = ["mean", 1].map((channels) => [
  ...new Uint8Array(wav(Int16Array.from(given.samples), 16000, channels))]);
console.log(JSON.stringify({ files, answer: readAnswer(given.answer, given.classes) }));
"""


@needs_node
def test_the_page_reads_the_servers_answers(
    client: TestClient, classifier: Classifier, tmp_path: Path
) -> None:
    samples = wave(0.9)
    answer = post(client, as_wav(samples)).json()
    given = {"samples": samples.tolist(), "answer": answer, "classes": CLASSES}
    found = run_node(tmp_path, ASKED, given)
    for file, channels in zip(found["files"], ("mean", 1), strict=True):
        np.testing.assert_array_equal(decode(bytes(file), channels=channels).waveform, samples)
    want = classifier.predict_waveform(samples)
    assert want.given is not None and want.possible is not None
    assert found["answer"]["calibrated"] == pytest.approx(want.probabilities, abs=1e-5)
    assert found["answer"]["given"] == [name in want.given for name in CLASSES]
    assert found["answer"]["possible"] == [name in want.possible for name in CLASSES]
    (window,) = found["answer"]["windows"]
    assert window["calibrated"] == pytest.approx(want.probabilities, abs=1e-5)
    assert window["end"] == 0.9


NAMED = """
import { shown } from "./names.js";
console.log(JSON.stringify(given.map(shown)));
"""


@needs_node
def test_names_of_any_script_leave_the_page_in_order(tmp_path: Path) -> None:
    """As the reports show them: bidi marks, zero width and controls escaped, Hebrew isolated."""
    names = ["dog", "a\u202eb", "\u200b\ufeff\x1b[31m", "\t\r\x00\u2028\xa0", "\u72d7 \U0001f600"]
    names += ["\u05d0\u05d1 1", "\u0633\u06af", "\U0001e900", "\u2066x\u2069", "\U000e0001"]
    found = run_node(tmp_path, NAMED, names)
    assert found == [clean(name) for name in names]
    assert found[1] == "a\\u202eb" and found[5] == "\u2068\u05d0\u05d1 1\u2069"


READ = """
import { Reader } from "./sound.js";
const touched = [];
const channel = (samples) => ({
  length: samples.length,
  subarray(a, b) { touched.push(Math.min(b, samples.length)); return samples.subarray(a, b); },
});
const read = (rate, which, spans) => {
  const reader = new Reader(
    { channels: given.channels.map((c) => channel(Float32Array.from(c))), rate }, 16000, which);
  return spans.map(([start, size]) => [...reader.read(start, size)]);
};
const [first] = read(44100, "mean", [[0, 1600]]);
const used = Math.max(...touched);
const whole = (rate) => read(rate, "mean", [[0, 1e9]])[0];
console.log(JSON.stringify({
  first, used, wholes: [16000, 44100, 8000].map(whole),
  windows: read(44100, "mean", given.spans), left: read(16000, "left", [[0, 50]])[0],
}));
"""


@needs_node
def test_the_page_resamples_no_more_of_a_file_than_it_shows(tmp_path: Path) -> None:
    channels = 0.1 * np.random.default_rng(0).normal(size=(2, 2 * 44100))
    spans = [(0, 16000), (8000, 16000), (20000, 100), (31000, 16000)]
    found = run_node(tmp_path, READ, {"channels": channels.tolist(), "spans": spans})
    same, whole, slow = map(np.asarray, found["wholes"])
    assert len(whole) == 2 * 16000 and len(slow) == 4 * 44100 and len(same) == 2 * 44100
    np.testing.assert_array_equal(found["first"], whole[:1600])
    assert found["used"] <= 44100, "a tenth of a second needs less than a second of the file"
    for (start, size), window in zip(spans, found["windows"], strict=True):
        np.testing.assert_array_equal(window, whole[start : start + size])
    np.testing.assert_allclose(same, 32768 * channels.mean(0), atol=0.6)
    want = soxr.resample(np.float32(channels.mean(0)), 44100, 16000, "HQ")[300:-300] * 32768
    assert np.sqrt(np.mean((whole[300:-300] - want) ** 2)) < 0.03 * np.sqrt(np.mean(want**2))


RESAMPLED = """
import { Resampler, rateOf } from "./resample.js";
console.log(JSON.stringify(given.map(({ samples, from, file }) => {
  const filter = new Resampler(from, 16000), parts = [];
  for (let i = 0; i < samples.length; i += 700) {
    parts.push(...filter.push(samples.slice(i, i + 700)));
  }
  const whole = new Resampler(from, 16000), count = whole.count(samples.length);
  const all = [...whole.push([...samples, ...new Array(2 * whole.reach).fill(0)])].slice(0, count);
  const bytes = Uint8Array.from(file).buffer;
  return { whole: all, parts, rate: rateOf(bytes) };
})));
"""


@needs_node
def test_resampling_in_javascript_is_that_of_the_decoder(tmp_path: Path) -> None:
    """Noise up to half the rate: a softer filter is tens of dB away near the edge."""
    given = []
    for rate, kind in [(44100, "WAV"), (48000, "FLAC"), (8000, "OGG"), (22050, "MP3")]:
        samples = (0.1 * np.random.default_rng(0).normal(size=rate)).astype(np.float32)
        file = io.BytesIO()
        soundfile.write(file, samples, rate, format=kind)
        given.append({"samples": samples.tolist(), "from": rate, "file": list(file.getvalue())})
    for sound, found in zip(given, run_node(tmp_path, RESAMPLED, given), strict=True):
        assert found["rate"] == sound["from"]
        want = soxr.resample(np.float32(sound["samples"]), sound["from"], 16000, "HQ")
        assert len(found["whole"]) == len(want) == 16000
        inside = slice(300, -300)
        difference = np.asarray(found["whole"])[inside] - want[inside]
        assert np.sqrt(np.mean(difference**2)) < 0.03 * np.sqrt(np.mean(want**2))
        # Samples known before the end are the same, however the input is cut.
        first = len(found["parts"])
        assert 15500 < first < 16000 and found["parts"] == pytest.approx(found["whole"][:first])


# --- the static page -----------------------------------------------------------------------------


def fake_package(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A package with files of the runtime's names, taken for the published one."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as packed:
        for name in web.RUNTIME:
            member = tarfile.TarInfo(f"package/dist/{name}")
            member.size = 4
            packed.addfile(member, io.BytesIO(b"fake"))
    package = file.getvalue()
    digest = base64.b64encode(hashlib.sha512(package).digest()).decode()
    monkeypatch.setattr(web, "INTEGRITY", digest)
    return package


def test_the_static_page_is_complete_and_verified(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("jax2onnx", reason="the page's model needs jax2onnx")
    package = tmp_path / "runtime.tgz"
    package.write_bytes(fake_package(monkeypatch))

    onnx = web.ONNX_FORMAT

    def private(folder: Path, subject: Any) -> tuple[str, ...]:
        notes = onnx.write(folder, subject)
        (folder / "weights.data").chmod(0o600)  # as some versions of onnx leave it
        return notes

    monkeypatch.setattr(web, "ONNX_FORMAT", dataclasses.replace(onnx, write=private))
    done = export(adapter, "web", tmp_path / "page", runtime=str(package))
    assert max(done.largest.values()) < 1e-4
    folder = tmp_path / "page"
    for name in (*PAGE, ONNX):
        text = (folder / name).read_text()
        for other in re.findall(
            r"""(?:from |import\(|src=|href=)["'](?:\./)?([a-z/.-]+)["']""", text
        ):
            assert (folder / other).is_file(), f"{name} asks for {other}"
    config = json.loads((folder / "config.json").read_text())
    assert config["backend"] == "onnx" and config["classes"] == list(CLASSES)
    assert config["calibration"]["temperature"] == 1.4 and config["title"] == adapter.parent.name
    assert "<script>alert" not in (folder / "README.md").read_text()
    assert "Permission is hereby granted" in (folder / "runtime" / "LICENSE.txt").read_text()
    assert len({file.stat().st_mode for file in folder.iterdir() if file.is_file()}) == 1
    verify(folder)
    (folder / "page.js").write_text("alert(1)")
    with pytest.raises(DataError, match=r"page\.js.*changed"):
        verify(folder)


def test_only_the_published_runtime_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9/")
    with pytest.raises(UnavailableError, match=r"npm pack onnxruntime-web@[0-9.]+.*--runtime"):
        web.find_package(None)
    with pytest.raises(DataError, match="cannot be read"):
        web.find_package(str(tmp_path / "absent.tgz"))
    other = tmp_path / "other.tgz"
    other.write_bytes(b"something else")
    with pytest.raises(DataError, match=r"other\.tgz: is not onnxruntime-web .*hash"):
        web.find_package(str(other))
    package = fake_package(monkeypatch)
    monkeypatch.setattr(web, "_download", lambda: package)
    assert web.find_package(None) == package
    monkeypatch.setattr(web, "_download", lambda: pytest.fail("downloaded again"))
    assert web.find_package(None) == package
    assert [p.name for p in (tmp_path / "aatjax").iterdir()] == [web.PACKAGE]
    (tmp_path / "aatjax" / web.PACKAGE).write_bytes(package[:-1])
    with pytest.raises(DataError, match="delete it"):
        web.find_package(None)


# --- a browser -----------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--use-fake-ui-for-media-stream",
    "--use-fake-device-for-media-stream",
]


@pytest.fixture
def served(request: pytest.FixtureRequest, adapter: Path, tmp_path: Path) -> Iterator[str]:
    """The address of the page: of `aatjax demo`, or of the static files."""
    if request.param == "demo":
        command = [sys.executable, "-c", MAIN, "demo", str(adapter), "--port", "0", "--no-browser"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        address = process.stdout.readline().split()[0]
    else:
        pytest.importorskip("jax2onnx", reason="the page's model needs jax2onnx")
        try:
            export(adapter, "web", tmp_path / "page", runtime=os.environ.get("AATJAX_ORT_WEB"))
        except UnavailableError as error:
            pytest.skip(str(error))
        process = subprocess.Popen(
            [
                sys.executable,
                "-u",
                "-m",
                "http.server",
                "0",
                "--bind",
                "127.0.0.1",
                "--directory",
                str(tmp_path / "page"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout is not None
        found = re.search(r"port (\d+)", process.stdout.readline())
        assert found is not None
        address = f"http://localhost:{found.group(1)}/"
    yield address
    process.terminate()
    assert process.wait(30) == 143 or request.param == "web"


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("served", ["demo", "web"], indirect=True)
def test_a_browser_predicts_as_predict(served: str, classifier: Classifier, tmp_path: Path) -> None:
    """A file and a microphone that plays it, the network cut but for the page's own host."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    sound = tmp_path / "a <b> & c.wav"
    # One second repeated: every window of the microphone holds the same sound.
    sound.write_bytes(as_wav(np.tile(wave(1.0), 5)))
    want = classifier.predict(sound)
    requests: list[str] = []
    faults: list[str] = []

    def meet(route: Any) -> None:
        requests.append(route.request.url)
        if route.request.url.startswith(served):
            route.continue_()
        else:
            route.abort()

    with sync_api.sync_playwright() as play:
        plain = tmp_path / "mic.wav"
        plain.write_bytes(sound.read_bytes())
        browser = play.chromium.launch(
            executable_path=CHROMIUM, args=[*FLAGS, f"--use-file-for-fake-audio-capture={plain}"]
        )
        page = browser.new_context(permissions=["microphone"]).new_page()
        page.route("**/*", meet)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", lambda dialog: faults.append("a name was executed"))
        page.goto(served)
        page.wait_for_selector("body[data-ready=yes]", timeout=60_000)
        page.set_input_files("#file", sound)
        page.wait_for_selector("article[data-top]", timeout=60_000)
        assert page.get_attribute("article", "data-top") == want.label
        assert page.inner_text("article h3") == "a <b> & c.wav"
        shown = page.inner_text("#classes li:first-child .share")
        assert abs(int(shown.split()[0]) - 100 * want.probability) <= 2
        aiff = tmp_path / "b.aiff"
        soundfile.write(aiff, wave(1.0), 16000)
        page.set_input_files("#file", aiff)
        note = page.locator("article", has_text="b.aiff").get_by_text("cannot decode the file")
        note.wait_for()  # of the spectrogram where aatjax decodes the file, else of the file
        asks = "fetch('config.json').then((a) => a.json()).then((c) => c.backend)"
        count = 2 if page.evaluate(asks) == "server" else 1
        assert page.locator("article[data-top]").count() == count
        page.set_input_files("#file", sound)
        page.wait_for_function("n => document.querySelectorAll('[data-top]').length > n", arg=count)
        page.fill("#threshold", "0.99")
        assert page.inner_text("#answer") == "don\u2019t know"
        page.fill("#threshold", "0")
        assert page.inner_text("#answer") == want.label
        page.click("#record")
        page.wait_for_function(
            "label => document.querySelector('#answer').textContent === label"
            " && document.querySelector('#record').getAttribute('aria-pressed') === 'true'",
            arg=want.label,
            timeout=30_000,
        )
        page.wait_for_timeout(3000)
        assert page.inner_text("#classes li:first-child .name") == want.label
        page.click("#record")
        assert page.get_attribute("#record", "aria-pressed") == "false"
        assert not page.is_visible("#problem")
        browser.close()
    assert faults == [] and requests and all(url.startswith(served) for url in requests)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("served", ["web"], indirect=True)
def test_a_browser_without_network_predicts_real_clips(
    served: str, classifier: Classifier, real_audio: Path
) -> None:
    """Whole recordings of 44.1 kHz, decoded and resampled by the page."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    clips = sorted((real_audio / "esc10" / "audio").glob("*.ogg"))[::80]
    if not clips:
        pytest.skip(f"no esc10 in {real_audio}")
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        context = browser.new_context()
        page = context.new_page()
        page.goto(served)
        page.wait_for_selector("body[data-ready=yes]", timeout=60_000)
        context.set_offline(True)
        for n, clip in enumerate(clips):
            want = classifier.predict(clip)
            page.set_input_files("#file", clip)
            page.wait_for_function("n => document.querySelectorAll('[data-top]').length > n", arg=n)
            assert page.locator("article").first.get_attribute("data-top") == want.label
            shown = page.locator("article p").first.inner_text()
            share = re.search(r"(\d+) %\)$", shown)
            assert share and abs(int(share[1]) - 100 * want.probability) < 2.5, clip.name
        assert not page.is_visible("#problem")
        browser.close()
