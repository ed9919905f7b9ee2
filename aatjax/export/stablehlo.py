"""Serialized programs (`jax.export`, StableHLO), one a platform and input, with their weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from safetensors.numpy import load_file, save_file

from aatjax.errors import UsageError
from aatjax.export.inline_jaxpr import plain
from aatjax.export.merged_model import Clips, Subject
from aatjax.io.optional import need

WEIGHTS = "weights.safetensors"
PLATFORMS = ("cpu", "cuda", "tpu")

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


def refused(subject: Subject) -> None:
    """Nothing is refused but for want of flatbuffers, by which jax writes programs."""
    need("flatbuffers", extra="export")


def write(folder: Path, subject: Subject, platforms: Sequence[str] = PLATFORMS) -> tuple[str, ...]:
    """Writes the weights and, for each platform, a program from log-mel and one from waveforms.

    Raises:
        UsageError: a platform that is not one of `PLATFORMS`.
    """
    wrong = [name for name in platforms if name not in PLATFORMS]
    if wrong or not platforms:
        raise UsageError(
            f"platforms={','.join(platforms)!r}: give one or more of {', '.join(PLATFORMS)}"
        )
    forward, weights = subject.forward()
    frontend = subject.frontend
    size = (frontend.frames, frontend.mels)
    shapes = {path: jax.ShapeDtypeStruct(v.shape, v.dtype) for path, v in weights.items()}
    with jax.default_matmul_precision("highest"):
        one = plain(
            forward,
            shapes,
            jax.ShapeDtypeStruct((1, *size), jnp.float32),
            jax.ShapeDtypeStruct((1,), jnp.int32),
        )

    def from_log_mel(weights: Any, x: Any, valid: Any) -> Any:
        return jax.vmap(lambda x, valid: one(weights, x[None], valid[None])[0])(x, valid)

    def from_waveform(weights: Any, waveform: Any, length: Any) -> Any:
        return from_log_mel(weights, frontend(waveform, length), frontend.count_frames(length))

    (batch,) = export.symbolic_shape("batch")
    programs = {
        "log_mel": (from_log_mel, (batch, *size)),
        "waveform": (from_waveform, (batch, frontend.samples)),
    }
    for platform in platforms:
        for name, (function, shape) in programs.items():
            with jax.default_matmul_precision("highest"):
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


def run(folder: Path, entries: dict[str, Any], clips: Clips) -> tuple[dict[str, np.ndarray], str]:
    """Logits of the programs for the platforms that are here, and which those are."""
    need("flatbuffers", extra="export")
    weights = load_file(folder / WEIGHTS)
    found: dict[str, np.ndarray] = {}
    here, away = [], []
    for platform in entries["platforms"]:
        device = _device(platform)
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
            f"none of the platforms {', '.join(away)} is here, so nothing could be checked: add "
            "the one of this machine to --platforms"
        )
    not_run = f"; not run: {', '.join(away)}" if away else ""
    return found, f"jax {jax.__version__} on {', '.join(here)}{not_run}"


def _device(platform: str) -> Any:
    try:
        return jax.local_devices(backend=platform)[0]
    except RuntimeError:
        return None


def usage(subject: Subject, platforms: Sequence[str] = PLATFORMS) -> str:
    """Markdown for the card."""
    frontend = subject.frontend
    return USAGE.format(
        platform=platforms[0],
        samples=frontend.samples,
        rate=frontend.rate,
        frames=frontend.frames,
        mels=frontend.mels,
    )
