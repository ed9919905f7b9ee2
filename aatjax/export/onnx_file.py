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
from aatjax.export.formats import ExportFormat, Logits
from aatjax.export.inline_jaxpr import inline_model
from aatjax.export.merged_model import MergedModel, ParityClips
from aatjax.export.onnx_frontend import make_front_end_nodes
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


LIBRARIES = ("jax2onnx", "onnxruntime", "onnx")


def _check(model: MergedModel) -> None:
    """Any model can be written."""


def _write(folder: Path, model: MergedModel) -> tuple[str, ...]:
    """Write both graphs and their weights."""
    import onnx
    from onnx.external_data_helper import convert_model_to_external_data

    graph = _make_graph(model)
    onnx.checker.check_model(graph)
    convert_model_to_external_data(graph, location=WEIGHTS, size_threshold=SMALL)
    onnx.save_model(graph, str(folder / LOG_MEL))
    (folder / WEIGHTS).chmod((folder / LOG_MEL).stat().st_mode & 0o777)  # else for the owner only
    graph = onnx.load(str(folder / LOG_MEL), load_external_data=False)
    _add_front_end(graph.graph, model)
    (folder / WAVEFORM).write_bytes(graph.SerializeToString())
    return ()


def _make_graph(model: MergedModel) -> Any:
    """The model from log-mel to logits, for any batch size."""
    import jax2onnx

    one, weights = inline_model(model)
    config = model.merged.config
    shape = ("batch", config.frames, config.mels)
    inputs: list[Any] = [jax.ShapeDtypeStruct(shape, jnp.float32)]  # pyright: ignore
    names = ["log_mel"]
    if model.masks_padding:
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
            f"jax2onnx {version('jax2onnx')} cannot convert this {model.method.name} model "
            f"({type(error).__name__}: {' '.join(str(error).split())[:120]}): "
            "export it to stablehlo"
        ) from error


def _add_front_end(graph: Any, model: MergedModel) -> None:
    """Insert the front end before the graph, in place."""
    from onnx import TensorProto, helper

    nodes, constants = make_front_end_nodes(
        model.frontend, "log_mel", "valid" if model.masks_padding else None
    )
    old = list(graph.node)
    del graph.node[:], graph.input[:]
    graph.node.extend([*nodes, *old])
    graph.initializer.extend(constants)
    graph.input.extend(
        [
            helper.make_tensor_value_info(
                "waveform", TensorProto.FLOAT, ["batch", model.frontend.samples]
            ),
            helper.make_tensor_value_info("length", TensorProto.INT64, ["batch"]),
        ]
    )


def _run(folder: Path, entries: dict[str, Any], clips: ParityClips) -> Logits:
    """Run all clips in a batch and one alone, from log-mel and from waveforms."""
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
    """Suppress the converter's warnings about types that it fills in later."""
    logger = logging.getLogger("onnx_ir")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


ONNX_FORMAT = ExportFormat("onnx", _check, _write, _run, USAGE, LIBRARIES)
