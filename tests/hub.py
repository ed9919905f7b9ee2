"""A local stub of the Hugging Face Hub: tiny weights under the published names and file lists."""

import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ast_oracle import deit_tensors, file_tensors, random_hf_ast
from huggingface_hub import constants
from safetensors.torch import save
from transformers import ASTFeatureExtractor

COMMIT = "5" * 40
AUDIOSET = "MIT/ast-finetuned-audioset-"
FILES = (
    ".gitattributes",
    "README.md",
    "config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "pytorch_model.bin",
)
DEIT = "facebook/deit-base-distilled-patch16-384"
STRIDES = {
    f"{AUDIOSET}10-10-0.4593": 10,
    f"{AUDIOSET}12-12-0.447": 12,
    f"{AUDIOSET}14-14-0.443": 14,
    f"{AUDIOSET}16-16-0.442": 16,
    "MIT/ast-finetuned-speech-commands-v2": 10,
}
REPOSITORIES = {**dict.fromkeys(STRIDES, FILES), DEIT: (*FILES, "tf_model.h5")}
LABELS = ("Speech", "Dog", "Rain", "Siren", "Piano")


def make_files(name: str) -> dict[str, bytes]:
    """The files of a repository: real names, one small random block, 128 frames."""
    model = random_hf_ast(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=96,
        frequency_stride=STRIDES.get(name, 10),
        time_stride=STRIDES.get(name, 10),
        id2label=dict(enumerate(LABELS)),
    )
    config = model.config.to_dict() | {"architectures": ["ASTForAudioClassification"]}
    tensors = file_tensors(model)
    if name == DEIT:
        tensors = deit_tensors(model, files=True)
        config |= {"architectures": ["DeiTForImageClassificationWithTeacher"]}
        config |= {"model_type": "deit", "image_size": 192}
        for key in ("frequency_stride", "time_stride", "max_length", "num_mel_bins"):
            config.pop(key)
    extractor = ASTFeatureExtractor(max_length=128).to_dict()
    contents = {
        "config.json": json.dumps(config).encode(),
        "preprocessor_config.json": json.dumps(extractor).encode(),
        "model.safetensors": save(tensors, {"format": "pt"}),
    }
    other = {file: f"{file} of {name}: not to be read".encode() for file in REPOSITORIES[name]}
    return {**other, **contents}


class Hub(http.server.ThreadingHTTPServer):
    """Serves `repositories`, and keeps the paths of all requests in `asked`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def find(self, name: str) -> dict[str, bytes] | None:
        if name in REPOSITORIES and name not in self.repositories:
            self.repositories[name] = make_files(name)
        return self.repositories.get(name)

    def downloaded(self, name: str) -> set[str]:
        start = f"/{name}/resolve/"
        return {path.rpartition("/")[2] for path in self.asked if path.startswith(start)}


class Handler(http.server.BaseHTTPRequestHandler):
    """The three kinds of requests that huggingface_hub makes for a download."""

    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        found = re.fullmatch(
            r"(?:/api/models)?/([^/]+/[^/]+)(?:/(revision|tree|resolve)/([^/]+)(?:/(.+))?)?", path
        )
        files = self.server.find(found[1]) if found else None
        if found is None or files is None:
            return self._send(404, {"X-Error-Code": "RepoNotFound"})
        name, kind, revision, file = found.groups()
        if revision not in (None, "main", COMMIT):
            return self._send(404, {"X-Error-Code": "RevisionNotFound"})
        if kind == "resolve":
            content = files.get(file)
            if content is None:
                return self._send(404, {"X-Error-Code": "EntryNotFound"})
            etag = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            return self._send(200, etag, content)
        rows: Any = [
            {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
            for name, content in files.items()
        ]
        if kind != "tree":
            siblings = [{"rfilename": name} for name in files]
            rows = {"id": name, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
        return self._send(200, {"Content-Type": "application/json"}, json.dumps(rows).encode())

    def _send(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        del format, args


@contextlib.contextmanager
def serve_hub(cache: Path) -> Iterator[Hub]:
    """Run the stub, with huggingface_hub pointed to it and to a cache of its own."""
    with Hub() as server, pytest.MonkeyPatch.context() as patch:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "ENDPOINT", server.address)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setenv("NO_PROXY", "127.0.0.1")
        yield server
        server.shutdown()


def go_offline(patch: pytest.MonkeyPatch) -> None:
    """As with HF_HUB_OFFLINE=1."""
    patch.setattr(constants, "HF_HUB_OFFLINE", True)
