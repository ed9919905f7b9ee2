"""A page of static files: the ONNX model, onnxruntime-web and the page of `aatjax demo`."""

import base64
import hashlib
import io
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from aatjax.data.decode_cache import find_user_cache
from aatjax.errors import DataError, UnavailableError, printable
from aatjax.export import onnx_file
from aatjax.export.merged_model import Clips, Subject
from aatjax.inference.calibration import read_calibration
from aatjax.inference.classifier import Classifier
from aatjax.inference.demo import ONNX, PAGE, make_page_config, read_page_file
from aatjax.io.atomic import write_bytes

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
LICENCE = f"""onnxruntime-web {VERSION}, https://github.com/microsoft/onnxruntime

MIT License

Copyright (c) Microsoft Corporation

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction,
including without limitation the rights to use, copy, modify, merge, publish, distribute,
sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial
portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES
OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN
CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""

USAGE = """Everything is in this folder, nothing is fetched from elsewhere:

```sh
python -m http.server 8000 --bind 127.0.0.1    # then open http://localhost:8000
```

Any web server of static files does; browsers do not let a page opened as a file read its model. The
microphone needs https or localhost."""


def refused(subject: Subject) -> None:
    """What `onnx` refuses."""
    onnx_file.refused(subject)


def write(
    folder: Path, subject: Subject, runtime: str | None = None, title: str = "aatjax"
) -> tuple[str, ...]:
    """Writes the graphs, the page and the runtime.

    Args:
        folder: an empty folder.
        subject: the model.
        runtime: the package as `npm pack` writes it; None takes it from the cache or the registry.
        title: heading of the page.

    Raises:
        UnavailableError: the runtime is not at hand and cannot be fetched.
        DataError: it is not what was published.
    """
    package = _package(runtime)
    onnx_file.write(folder, subject)
    adapter = subject.adapter
    classifier = Classifier(
        subject.served,
        adapter.classes,
        adapter.frontend,
        multi_label=adapter.multi_label,
        calibration=read_calibration(adapter.info, len(adapter.classes)),
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
    (folder / "runtime" / "LICENSE.txt").write_text(LICENCE)
    # onnx may write its weights for their owner alone; a web server is often somebody else.
    (folder / onnx_file.WEIGHTS).chmod((folder / "index.html").stat().st_mode)
    return ()


def run(folder: Path, entries: dict[str, Any], clips: Clips) -> tuple[dict[str, np.ndarray], str]:
    """As `onnx`: the page runs the same graphs."""
    return onnx_file.run(folder, entries, clips)


def usage(subject: Subject, **options: Any) -> str:
    """Markdown for the card."""
    return USAGE


def _package(given: str | None) -> bytes:
    """onnxruntime-web as published, from a file, the cache or the registry."""
    if given is not None:
        try:
            package = Path(given).read_bytes()
        except OSError as error:
            raise DataError(
                f"{printable(given)}: cannot be read: {error.strerror or error}"
            ) from error
        return _checked(package, printable(given))
    kept = find_user_cache() / PACKAGE
    if kept.is_file():
        return _checked(kept.read_bytes(), f"{printable(kept)} (delete it)")
    package = _checked(_fetched(), "what the registry sent")
    write_bytes(kept, package)
    return package


def _fetched() -> bytes:
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
            f"{address}: cannot be fetched ({type(error).__name__}); where there is a network, run "
            f"`npm pack onnxruntime-web@{VERSION}` and give --runtime {PACKAGE}"
        ) from error


def _checked(package: bytes, what: str) -> bytes:
    if base64.b64encode(hashlib.sha512(package).digest()).decode() != INTEGRITY:
        raise DataError(f"{what}: is not onnxruntime-web {VERSION} as it was published (hash)")
    return package
