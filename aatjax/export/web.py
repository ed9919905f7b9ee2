"""Web: a static page with the ONNX model, onnxruntime-web and the files of `aatjax demo`."""

import base64
import hashlib
import io
import os
import tarfile
from importlib.resources import files
from pathlib import Path

from aatjax.errors import DataError, UnavailableError, printable
from aatjax.export.formats import ExportFormat
from aatjax.export.merged_model import MergedModel
from aatjax.export.onnx_file import ONNX_FORMAT, WEIGHTS
from aatjax.inference.classifier import Classifier
from aatjax.inference.demo import ONNX, PAGE, make_page_config, read_page_file
from aatjax.io.atomic import write_bytes
from aatjax.io.host import find_user_cache

VERSION = "1.30.0"
PACKAGE = f"onnxruntime-web-{VERSION}.tgz"
INTEGRITY = (
    "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
)
"""SHA-512 of the package, as the registry has it."""
REGISTRY = "https://registry.npmjs.org"
RUNTIME = (
    "ort.wasm.min.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
)
MOST_BYTES = 200 * 2**20
USAGE = """Everything is in this folder, nothing is fetched from elsewhere:

```sh
python -m http.server 8000 --bind 127.0.0.1    # then open http://localhost:8000
```

Any web server of static files does; browsers do not let a page opened as a file read its model. The
microphone needs https or localhost."""


def _write(
    folder: Path, model: MergedModel, runtime: str | None = None, title: str = "aatjax"
) -> tuple[str, ...]:
    """Write the graphs, the page, and the runtime from a package of `npm pack`."""
    package = find_package(runtime)
    ONNX_FORMAT.write(folder, model)
    adapter = model.adapter
    classifier = Classifier(
        model.merged,
        adapter.classes,
        adapter.frontend,
        multi_label=adapter.multi_label,
        calibration=model.calibration,
        scoring=adapter.scoring,
    )
    for name in (*PAGE, ONNX):
        (folder / name).write_bytes(read_page_file(name))
    config = make_page_config(
        classifier, title=title, method=adapter.info["method"]["name"], backend="onnx"
    )
    (folder / "config.json").write_text(config, encoding="utf-8")
    (folder / "runtime").mkdir()
    with tarfile.open(fileobj=io.BytesIO(package)) as packed:
        for name in RUNTIME:
            member = packed.extractfile(f"package/dist/{name}")
            assert member is not None
            (folder / "runtime" / name).write_bytes(member.read())
    licence = (files("aatjax.export") / "onnxruntime_licence.txt").read_text()
    (folder / "runtime" / "LICENSE.txt").write_text(licence.format(VERSION=VERSION))
    # onnx may write its weights for their owner alone; a web server is often somebody else.
    (folder / WEIGHTS).chmod((folder / "index.html").stat().st_mode)
    return ()


def find_package(given: str | None) -> bytes:
    """Return onnxruntime-web as published, from a file, the cache or the registry.

    Raises:
        UnavailableError: it cannot be downloaded.
        DataError: it is not the published package.
    """
    if given is not None:
        try:
            package = Path(given).read_bytes()
        except OSError as error:
            raise DataError(
                f"{printable(given)}: cannot be read: {error.strerror or error}"
            ) from error
        return _check_package(package, printable(given))
    kept = find_user_cache() / PACKAGE
    if kept.is_file():
        return _check_package(kept.read_bytes(), f"{printable(kept)} (delete it)")
    package = _check_package(_download(), "the registry's package")
    write_bytes(kept, package)
    return package


def _download() -> bytes:
    import requests

    registry = os.environ.get("npm_config_registry", REGISTRY)  # noqa: SIM112, as npm has it
    address = f"{registry.rstrip('/')}/onnxruntime-web/-/{PACKAGE}"
    try:
        answer = requests.get(address, timeout=60, stream=True)
        answer.raise_for_status()
        found = bytearray()
        for chunk in answer.iter_content(2**20):
            found += chunk
            if len(found) > MOST_BYTES:
                raise DataError(f"{address}: is larger than the package was when it was published")
        return bytes(found)
    except requests.RequestException as error:
        raise UnavailableError(
            f"{address}: cannot be downloaded ({type(error).__name__}): with a network, run "
            f"`npm pack onnxruntime-web@{VERSION}` and add --runtime {PACKAGE}"
        ) from error


def _check_package(package: bytes, what: str) -> bytes:
    if base64.b64encode(hashlib.sha512(package).digest()).decode() != INTEGRITY:
        raise DataError(f"{what}: is not onnxruntime-web {VERSION} as it was published (hash)")
    return package


WEB_FORMAT = ExportFormat(
    "web", ONNX_FORMAT.check, _write, ONNX_FORMAT.run, USAGE, ONNX_FORMAT.libraries
)
