"""The page: its server answers as `predict` does, its files are complete, and browsers run it."""

import base64
import hashlib
import http.client
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
from flax import nnx

from aatjax import petl, surgery
from aatjax.audio.frontend import FrontEnd
from aatjax.convert import write_native
from aatjax.convert.load import load
from aatjax.data.synthetic.synthesize import synthesize
from aatjax.errors import DataError, UnavailableError, UsageError
from aatjax.export import export, verify, web
from aatjax.inference.calibration import Calibration, compute_probabilities, decide
from aatjax.inference.classifier import Classifier
from aatjax.inference.demo import ONNX, PAGE, page_config, page_file
from aatjax.inference.demo.server import MOST_BYTES, Server
from aatjax.models.ast import AST, ASTConfig
from aatjax.train.adapter_file import save_adapter

CONFIG = ASTConfig(
    dim=32,
    depth=1,
    heads=2,
    mlp_dim=48,
    stride=(16, 16),
    frames=98,
    mels=64,
    num_classes=3,
    pool="mean_patches",
)
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
        if isinstance(variable, surgery.Trainable):
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


@pytest.fixture(scope="module")
def server(classifier: Classifier) -> Iterator[Server]:
    config = page_config(classifier, title="<b>t</b>", method="soft_moa", backend="server")
    with Server(classifier, config, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def ask(
    server: Server, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, bytes, Any]:
    link = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=30)
    headers = {key.replace("_", "-"): value for key, value in headers.items()}
    if body is not None:
        headers.setdefault("Content-Type", "application/octet-stream")
    link.request("GET" if body is None else "POST", path, body, headers)
    answer = link.getresponse()
    return answer.status, answer.read(), answer.headers


def wave(seconds: float, seed: int = 0, rate: int = 16000) -> np.ndarray:
    return synthesize("siren", seed, seconds=seconds, rate=rate)


def as_wav(samples: np.ndarray, rate: int = 16000) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, "PCM_16", format="WAV")
    return file.getvalue()


# --- the server ----------------------------------------------------------------------------------


def test_the_pages_answers_are_those_of_predict(server: Server, classifier: Classifier) -> None:
    for seconds in (0.01, 0.4, 0.98):
        samples = wave(seconds)[: classifier.frontend.samples]
        status, body, _ = ask(server, "/hear", samples.astype("<i2").tobytes())
        want = classifier.predict_waveform(samples)
        told = json.loads(body)
        assert status == 200 and told["calibrated"] == pytest.approx(want.probabilities)
        assert told["given"] == [name == want.label for name in CLASSES]
        assert want.possible is not None
        assert told["possible"] == [name in want.possible for name in CLASSES]
    long = wave(3.3)
    told = json.loads(ask(server, "/file", as_wav(long))[1])
    want = classifier.predict_waveform(long)
    assert told["calibrated"] == pytest.approx(want.probabilities)
    assert [w["end"] for w in told["windows"]] == [w.end for w in want.windows]
    assert told["windows"][1]["calibrated"] == pytest.approx(want.windows[1].probabilities)


def test_a_clip_with_none_of_several_labels_gets_none(classifier: Classifier) -> None:
    sure = Classifier(
        classifier.model,
        CLASSES,
        classifier.frontend,
        multi_label=True,
        calibration=Calibration(1.0, (1.0, 1.0, 1.0), 0.0, 0.9, 50),
    )
    with Server(sure, "{}", 0) as server:
        assert server.window(wave(0.5).astype("<i2").tobytes())["given"] == [False] * 3


def test_a_long_file_is_heard_in_part_and_that_is_said(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "note" not in json.loads(ask(server, "/file", as_wav(wave(2.5)))[1])
    monkeypatch.setattr("aatjax.inference.demo.server.MOST_SECONDS", 2.0)
    told = json.loads(ask(server, "/file", as_wav(wave(2.5)))[1])
    assert told["windows"][-1]["end"] == 2.0 and "first 0.0333333 minutes" in told["note"]


def test_the_page_and_its_files(server: Server) -> None:
    status, body, headers = ask(server, "/")
    assert status == 200 and body == page_file("index.html")
    assert headers["X-Content-Type-Options"] == "nosniff"
    config = json.loads(ask(server, "/config.json")[1])
    assert config["classes"] == list(CLASSES) and config["title"] == "<b>t</b>"
    for name, kind in PAGE.items():
        status, _, headers = ask(server, f"/{name}")
        assert (status, headers["Content-Type"]) == (200, kind)
    for path in ("/../server.py", "/page/index.html", "/server.py", "/%2e%2e/x", "/onnx.js"):
        assert ask(server, path)[0] == 404


def test_refusals(server: Server, classifier: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = wave(0.5).astype("<i2").tobytes()
    for host in ("evil.example", "127.0.0.1.evil.example:80", ""):
        assert ask(server, "/hear", samples, Host=host)[0] == 403
        assert ask(server, "/", Host=host)[0] == 403
    assert ask(server, "/hear", samples, Content_Type="text/plain")[0] == 415
    assert ask(server, "/elsewhere", samples)[0] == 404
    assert ask(server, "/hear", b"")[0] == 422
    whole = np.zeros(classifier.frontend.samples + 1, "<i2").tobytes()
    assert ask(server, "/hear", whole)[0] == 422
    status, body, _ = ask(server, "/file", b"no sound at all")
    assert status == 422 and "<bytes>" not in json.loads(body)["error"]
    link = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=30)
    for length, status in ((str(MOST_BYTES + 1), 413), ("-5", 411), ("many", 411)):
        link.putrequest("POST", "/file")
        link.putheader("Content-Type", "application/octet-stream")
        link.putheader("Content-Length", length)
        link.endheaders()
        answer = link.getresponse()
        assert answer.status == status and json.loads(answer.read())["error"]
        link.close()
    with pytest.raises(UsageError, match="give another --port"):
        Server(classifier, "{}", server.server_address[1])
    with pytest.raises(UsageError, match="between 0 and 65535"):
        Server(classifier, "{}", 99999)


# --- the page ------------------------------------------------------------------------------------


def test_the_page_asks_nobody_else_and_sets_names_as_text() -> None:
    for name in (*PAGE, ONNX):
        text = page_file(name).decode()
        assert not re.findall(
            r"(?:https?:)?//[a-z0-9-]+\.[a-z]", text.replace("http://localhost", "")
        )
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text
        )
    assert "default-src 'self'" in page_file("index.html").decode()


NODE = """
import {{ decide, probabilities, summary }} from "{place}/decide.js";
import {{ logMel, toInt16 }} from "{place}/sound.js";
import {{ readFileSync }} from "node:fs";
const given = JSON.parse(readFileSync(0));
const out = given.logits.map((row) => {{
  const temperature = given.config.calibration ? given.config.calibration.temperature : 1;
  const many = given.config.multi_label;
  return decide(probabilities(row, temperature, many), probabilities(row, 1, many), given.config);
}});
console.log(JSON.stringify({{ out, mel: logMel(Int16Array.from(given.samples), 16000, 64)
  .map((row) => [...row]), rounded: [...toInt16([0.5, -1, 2, -2, 1e-5])] }}));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="the page's functions need node to run")
@pytest.mark.parametrize("many", [False, True])
def test_decisions_and_log_mel_in_javascript_are_those_here(many: bool, tmp_path: Path) -> None:
    for name in ("decide.js", "sound.js", "resample.js"):
        (tmp_path / name).write_bytes(page_file(name))
    (tmp_path / "package.json").write_text('{"type": "module"}')
    (tmp_path / "run.js").write_text(NODE.format(place=tmp_path))
    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=(40, 5))
    decisions = Calibration(1.7, (0.3, 0.5, 0.6, 0.4, 0.5) if many else None, 0.55, 0.9, 30)
    frontend = FrontEnd(frames=40, mels=64)
    samples = wave(1.0)[: frontend.samples]
    config = {"classes": list("abcde"), "multi_label": many, "calibration": decisions.to_json()}
    given = {"logits": logits.tolist(), "config": config, "samples": samples.tolist()}
    done = subprocess.run(
        ["node", str(tmp_path / "run.js")], input=json.dumps(given), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    want = decide(
        compute_probabilities(logits, 1.7, many),
        compute_probabilities(logits, 1.0, many),
        decisions,
    )
    for i, row in enumerate(told["out"]):
        assert row["calibrated"] == pytest.approx(want.probabilities[i])
        assert row["given"] == want.given[i].tolist()
        assert row["possible"] == want.possible[i].tolist()
    import jax.numpy as jnp

    mel = frontend.features(jnp.asarray(samples[None]), jnp.asarray([len(samples)]))[0]
    np.testing.assert_allclose(told["mel"], mel, atol=2e-3)
    assert told["rounded"] == [16384, -32768, 32767, -32768, 0]


RESAMPLED = """
import {{ Resampler, rateOf, resample }} from "{place}/resample.js";
import {{ readFileSync }} from "node:fs";
const {{ samples, from, file }} = JSON.parse(readFileSync(0));
const filter = new Resampler(from, 16000), parts = [];
for (let i = 0; i < samples.length; i += 700) parts.push(...filter.push(samples.slice(i, i + 700)));
const bytes = Uint8Array.from(file).buffer;
const whole = [...resample(samples, from, 16000)];
console.log(JSON.stringify({{ whole, parts, rate: rateOf(bytes) }}));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="the page's functions need node to run")
@pytest.mark.parametrize(
    ("rate", "kind"), [(44100, "WAV"), (48000, "FLAC"), (8000, "OGG"), (22050, "MP3")]
)
def test_resampling_in_javascript_is_that_of_the_decoder(
    rate: int, kind: str, tmp_path: Path
) -> None:
    """Noise up to half the rate: a softer filter is tens of dB away near the edge."""
    (tmp_path / "resample.js").write_bytes(page_file("resample.js"))
    (tmp_path / "package.json").write_text('{"type": "module"}')
    (tmp_path / "run.js").write_text(RESAMPLED.format(place=tmp_path))
    rng = np.random.default_rng(0)
    samples = (0.1 * rng.normal(size=rate)).astype(np.float32)
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind)
    given = {"samples": samples.tolist(), "from": rate, "file": list(file.getvalue())}
    done = subprocess.run(
        ["node", str(tmp_path / "run.js")], input=json.dumps(given), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["rate"] == rate
    want = soxr.resample(samples, rate, 16000, "HQ")
    assert len(told["whole"]) == len(want) == 16000
    inside = slice(300, -300)
    apart = np.asarray(told["whole"])[inside] - want[inside]
    assert np.sqrt(np.mean(apart**2)) < 0.03 * np.sqrt(np.mean(want**2))
    first = len(told["parts"])  # what is known before the end is the same, in whatever parts
    assert 15500 < first < 16000 and told["parts"] == pytest.approx(told["whole"][:first])


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


def test_the_static_page_is_complete_and_sealed(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("jax2onnx", reason="the page's model needs jax2onnx")
    package = tmp_path / "runtime.tgz"
    package.write_bytes(fake_package(monkeypatch))
    write = web.onnx_files.write

    def private(folder: Path, subject: Any) -> tuple[str, ...]:
        notes = write(folder, subject)
        (folder / "weights.data").chmod(0o600)  # as some versions of onnx leave it
        return notes

    monkeypatch.setattr(web.onnx_files, "write", private)
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


def test_the_runtime_is_the_published_one_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9/")
    with pytest.raises(UnavailableError, match=r"npm pack onnxruntime-web@[0-9.]+.*--runtime"):
        web._package(None)
    with pytest.raises(DataError, match="cannot be read"):
        web._package(str(tmp_path / "absent.tgz"))
    other = tmp_path / "other.tgz"
    other.write_bytes(b"something else")
    with pytest.raises(DataError, match=r"other\.tgz: is not onnxruntime-web .*hash"):
        web._package(str(other))
    package = fake_package(monkeypatch)
    monkeypatch.setattr(web, "_fetched", lambda: package)
    assert web._package(None) == package
    monkeypatch.setattr(web, "_fetched", lambda: pytest.fail("fetched again"))
    assert web._package(None) == package
    assert [p.name for p in (tmp_path / "aatjax").iterdir()] == [web.PACKAGE]
    (tmp_path / "aatjax" / web.PACKAGE).write_bytes(package[:-1])
    with pytest.raises(DataError, match="delete it"):
        web._package(None)


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
def test_a_browser_hears_what_predict_hears(
    served: str, classifier: Classifier, tmp_path: Path
) -> None:
    """A file and a microphone that plays it, the network cut but for the page's own host."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    sound = tmp_path / "a <b> & c.wav"
    # The same second again and again: whatever part the microphone's window holds, it is that.
    sound.write_bytes(as_wav(np.tile(wave(1.0), 5)))
    want = classifier.predict(sound)
    asked: list[str] = []
    faults: list[str] = []

    def meet(route: Any) -> None:
        asked.append(route.request.url)
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
        page.on("dialog", lambda dialog: faults.append("a name was run"))
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
        said = page.locator("article", has_text="b.aiff").get_by_text("cannot decode the file")
        said.wait_for()  # for want of a picture where aatjax decodes, else of the sound itself
        asks = "fetch('config.json').then((a) => a.json()).then((c) => c.backend)"
        heard = 2 if page.evaluate(asks) == "server" else 1
        assert page.locator("article[data-top]").count() == heard
        page.set_input_files("#file", sound)
        page.wait_for_function("n => document.querySelectorAll('[data-top]').length > n", arg=heard)
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
    assert faults == [] and asked and all(url.startswith(served) for url in asked)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("served", ["web"], indirect=True)
def test_a_browser_without_network_hears_real_clips(
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
