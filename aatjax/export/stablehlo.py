"""StableHLO: programs serialized by `jax.export`, per platform and input, with their weights."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from safetensors.numpy import load_file, save_file

from aatjax.errors import UsageError
from aatjax.export.formats import ExportFormat, Logits
from aatjax.export.inline_jaxpr import inline_model
from aatjax.export.merged_model import MergedModel, ParityClips
from aatjax.io.optional import need

WEIGHTS = "weights.safetensors"
PLATFORMS = ("cpu", "cuda", "tpu")
LIBRARIES = ("flatbuffers",)
SOURCE_FILES = "jax_hlo_source_file_canonicalization_regex"

USAGE = """Needs jax, flatbuffers and safetensors, not aatjax:

```python
import jax.export
import numpy as np
from safetensors.numpy import load_file

weights = load_file("weights.safetensors")
with open("{platform}_waveform.jaxexport", "rb") as file:
    program = jax.export.deserialize(bytearray(file.read()))
waveform = np.zeros((1, {samples}), np.float32)  # mono, {rate} Hz, in [-1, 1]
length = np.array([{samples}], np.int32)  # samples that are sound, the rest is filled
logits = program.call(weights, waveform, length)
```

`{platform}_log_mel.jaxexport` takes the weights, log-mel [batch, {frames}, {mels}] float32,
normalised as (x - mean) / (2 std) with the numbers in `export.json`, and how many frames of each
clip are sound, int32. Any batch size. Matrix products are in full float32 on every platform."""


def check_platforms(platforms: Sequence[str]) -> None:
    """Refuse platforms that programs are not written for.

    Raises:
        UsageError: one is unknown, or there is none.
    """
    wrong = [name for name in platforms if name not in PLATFORMS]
    if wrong or not platforms:
        raise UsageError(
            f"--platforms {','.join(platforms)}: give one or more of {', '.join(PLATFORMS)}"
        )


def _check(model: MergedModel) -> None:
    """Any model can be written."""


def _write(
    folder: Path, model: MergedModel, platforms: Sequence[str] = PLATFORMS
) -> tuple[str, ...]:
    """Write the weights and, per platform, a program from log-mel and one from waveforms."""
    frontend = model.frontend
    with jax.default_matmul_precision("highest"):
        one, weights = inline_model(model)
    shapes = {path: jax.ShapeDtypeStruct(v.shape, v.dtype) for path, v in weights.items()}

    def from_log_mel(weights: Any, x: Any, valid: Any) -> Any:
        return jax.vmap(lambda x, valid: one(weights, x[None], valid[None])[0])(x, valid)

    def from_waveform(weights: Any, waveform: Any, length: Any) -> Any:
        return from_log_mel(weights, frontend(waveform, length), frontend.count_frames(length))

    (batch,) = export.symbolic_shape("batch")
    programs = {
        "log_mel": (from_log_mel, (batch, frontend.frames, frontend.mels)),
        "waveform": (from_waveform, (batch, frontend.samples)),
    }
    for platform in platforms:
        for name, (function, shape) in programs.items():
            with jax.default_matmul_precision("highest"), _hide_folders():
                exported = export.export(jax.jit(function), platforms=[platform])(
                    shapes,
                    jax.ShapeDtypeStruct(shape, jnp.float32),
                    jax.ShapeDtypeStruct((batch,), jnp.int32),
                )
            data = exported.serialize()
            (folder / f"{platform}_{name}.jaxexport").write_bytes(data)
    arrays = {path: np.ascontiguousarray(value) for path, value in weights.items()}
    save_file(arrays, folder / WEIGHTS)
    return ()


@contextlib.contextmanager
def _hide_folders() -> Iterator[None]:
    """Programs name the files of their source by name alone: paths say who wrote them where."""
    before = getattr(jax.config, SOURCE_FILES)
    jax.config.update(SOURCE_FILES, r".*[/\\]")
    try:
        yield
    finally:
        jax.config.update(SOURCE_FILES, before)


def _run(folder: Path, entries: dict[str, Any], clips: ParityClips) -> Logits:
    need(*LIBRARIES, extra="export")
    weights = load_file(folder / WEIGHTS)
    found: dict[str, np.ndarray] = {}
    here, away = [], []
    for platform in entries["platforms"]:
        device = _find_device(platform)
        if device is None:
            away.append(platform)
            continue
        here.append(platform)
        with jax.default_device(device):
            for name, given in (
                ("log_mel", (clips.features, clips.valid.astype(np.int32))),
                ("waveform", (clips.waveform, clips.length.astype(np.int32))),
            ):
                data = (folder / f"{platform}_{name}.jaxexport").read_bytes()
                program = export.deserialize(bytearray(data))
                title = f"{name.replace('_', '-')} on {platform}"
                found[title] = np.asarray(program.call(weights, *given))
    if not here:
        raise UsageError(
            f"this machine has none of the platforms {', '.join(away)}, so nothing could be "
            "checked: add its own to --platforms"
        )
    not_run = f"; not run: {', '.join(away)}" if away else ""
    return found, f"jax {jax.__version__} on {', '.join(here)}{not_run}"


def _find_device(platform: str) -> Any:
    try:
        return jax.local_devices(backend=platform)[0]
    except RuntimeError:
        return None


STABLEHLO_FORMAT = ExportFormat("stablehlo", _check, _write, _run, USAGE, LIBRARIES)
