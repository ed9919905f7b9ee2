"""ONNX: one graph from log-mel, one from waveforms, and the weights that they share."""

import contextlib
import logging
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aatjax.errors import UsageError
from aatjax.export.inline_jaxpr import plain
from aatjax.export.merged_model import Clips, Subject
from aatjax.export.onnx_frontend import front_end_nodes
from aatjax.io.optional import need

LOG_MEL, WAVEFORM, WEIGHTS = "log_mel.onnx", "waveform.onnx", "weights.data"
OPSET = 21
SMALL = 1024
"""Constants of fewer bytes stay inside the graphs."""

USAGE = """```python
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("waveform.onnx")  # weights.data must lie beside it
waveform = np.zeros((1, {samples}), np.float32)  # mono, {rate} Hz, in [-1, 1]
length = np.array([{samples}], np.int64)  # samples that are sound, the rest is filled
(logits,) = session.run(None, {{"waveform": waveform, "length": length}})
```

`log_mel.onnx` takes `log_mel`, [batch, {frames}, {mels}] float32, normalised as
(x - mean) / (2 std) with the numbers in `export.json`{valid}. Any batch size."""


def refused(subject: Subject) -> None:
    """Nothing is refused but for want of the libraries (UnavailableError)."""
    need("jax2onnx", "onnxruntime", "onnx", extra="export")


def write(folder: Path, subject: Subject) -> tuple[str, ...]:
    """Writes both graphs and their weights."""
    import onnx
    from onnx.external_data_helper import convert_model_to_external_data

    model = _graph(subject)
    onnx.checker.check_model(model)
    convert_model_to_external_data(model, location=WEIGHTS, size_threshold=SMALL)
    onnx.save_model(model, str(folder / LOG_MEL))
    (folder / WEIGHTS).chmod((folder / LOG_MEL).stat().st_mode & 0o777)  # else for the owner only
    model = onnx.load(str(folder / LOG_MEL), load_external_data=False)
    _from_waveforms(model, subject)
    (folder / WAVEFORM).write_bytes(model.SerializeToString())
    return ()


def _graph(subject: Subject) -> Any:
    """The model from log-mel to logits, for any batch size."""
    import jax2onnx

    forward, weights = subject.forward()
    config = subject.served.config
    size = (config.frames, config.mels)
    one = plain(
        forward,
        weights,
        jax.ShapeDtypeStruct((1, *size), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )
    inputs: list[Any] = [jax.ShapeDtypeStruct(("batch", *size), jnp.float32)]  # pyright: ignore
    names = ["log_mel"]
    if subject.masks:
        names.append("valid")
        inputs.append(jax.ShapeDtypeStruct(("batch",), jnp.int32))  # pyright: ignore

    def batched(x: Any, *valid: Any) -> Any:
        if valid:
            return jax.vmap(lambda x, n: one(weights, x[None], n[None])[0])(x, *valid)
        whole = jnp.full((1,), config.frames, jnp.int32)
        return jax.vmap(lambda x: one(weights, x[None], whole)[0])(x)

    try:
        with _quiet():
            return jax2onnx.to_onnx(
                batched,
                inputs,
                model_name="aatjax",
                opset=OPSET,
                input_names=names,
                output_names=["logits"],
            )
    except (NotImplementedError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise UsageError(
            f"jax2onnx {version('jax2onnx')} cannot convert this {subject.method.name} model "
            f"({type(error).__name__}: {' '.join(str(error).split())[:120]}): "
            "export it to stablehlo"
        ) from error


def _from_waveforms(model: Any, subject: Subject) -> None:
    """Puts the front end before the graph, in place."""
    from onnx import TensorProto, helper

    graph = model.graph
    nodes, constants = front_end_nodes(
        subject.frontend, "log_mel", "valid" if subject.masks else None
    )
    old = list(graph.node)
    del graph.node[:], graph.input[:]
    graph.node.extend([*nodes, *old])
    graph.initializer.extend(constants)
    graph.input.extend(
        [
            helper.make_tensor_value_info(
                "waveform", TensorProto.FLOAT, ["batch", subject.frontend.samples]
            ),
            helper.make_tensor_value_info("length", TensorProto.INT64, ["batch"]),
        ]
    )


def run(folder: Path, entries: dict[str, Any], clips: Clips) -> tuple[dict[str, np.ndarray], str]:
    """Logits by onnxruntime: all clips in a batch and one alone, from log-mel and waveforms."""
    need("onnxruntime", extra="export")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3

    def logits(name: str, given: dict[str, np.ndarray]) -> np.ndarray:
        session = sessions[name]
        known = {i.name for i in session.get_inputs()}
        wanted = {key: value for key, value in given.items() if key in known}
        return np.asarray(session.run(None, wanted)[0])

    sessions = {
        name: onnxruntime.InferenceSession(
            str(folder / name), options, providers=["CPUExecutionProvider"]
        )
        for name in (LOG_MEL, WAVEFORM)
    }
    found = {}
    for batch, some in ((f"batch {len(clips.names)}", clips), ("batch 1", clips[:1])):
        valid = some.valid.astype(np.int32)
        found[f"log-mel, {batch}"] = logits(LOG_MEL, {"log_mel": some.features, "valid": valid})
        sound = {"waveform": some.waveform, "length": some.length.astype(np.int64)}
        found[f"waveform, {batch}"] = logits(WAVEFORM, sound)
    return found, f"onnxruntime {version('onnxruntime')}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the converter's warnings about types that it fills in later."""
    logger = logging.getLogger("onnx_ir")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def usage(subject: Subject) -> str:
    """Markdown for the card."""
    frontend = subject.frontend
    valid = ", and `valid`, the frames of each clip that are sound, int32" if subject.masks else ""
    return USAGE.format(
        samples=frontend.samples,
        rate=frontend.rate,
        frames=frontend.frames,
        mels=frontend.mels,
        valid=valid,
    )
