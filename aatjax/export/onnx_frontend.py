"""The front end as ONNX operations: waveform to normalised log-mel."""

from typing import Any

import numpy as np

from aatjax.audio.fbank import ENERGY_FLOOR, FFT, FRAME, HOP, PRE_EMPHASIS, mel_bank
from aatjax.audio.frontend import FrontEnd

FLOAT, INT32, DOUBLE = 1, 6, 11  # of TensorProto


class _GraphBuilder:
    """Collects nodes and constants, whose names begin with `fe_` except for the outputs."""

    def __init__(self, *outputs: str | None) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self._outputs = outputs

    def add(self, kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        """Add a node; return the name of its output."""
        from onnx import helper

        name = name if name in self._outputs else f"fe_{name}"
        label = f"fe_{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=label, **attributes))
        return name

    def constant(self, name: str, value: Any, dtype: Any = np.float32) -> str:
        """Add a constant; return its name."""
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), f"fe_{name}"))
        return f"fe_{name}"

    def index(self, name: str, *values: int) -> str:
        """Add a constant vector of whole numbers."""
        return self.constant(name, values, np.int64)

    def slice(self, x: str, start: int, stop: int, axis: str, name: str) -> str:
        """Add a slice along one axis."""
        bounds = [self.index(f"{name}_from", start), self.index(f"{name}_to", stop)]
        return self.add("Slice", [x, *bounds, axis], name)


def make_frame_transform() -> np.ndarray:
    """Return the map of a frame to its spectrum, `[400, 2 * 257]`: real parts, then imaginary.

    Removal of the mean, pre-emphasis, window and Fourier transform are linear: one float64 matrix.
    """
    centre = np.eye(FRAME) - 1.0 / FRAME
    previous = np.eye(FRAME)[[0, *range(FRAME - 1)]]
    emphasise = np.eye(FRAME) - PRE_EMPHASIS * previous
    frames = np.hanning(FRAME)[:, None] * (emphasise @ centre)
    spectrum = np.fft.rfft(frames, FFT, axis=0).T
    return np.concatenate([spectrum.real, spectrum.imag], axis=1)


def make_front_end_nodes(
    frontend: FrontEnd, output: str, valid: str | None
) -> tuple[list[Any], list[Any]]:
    """Return nodes and constants from `waveform` `[b, s]` float32 and `length` `[b]` int64.

    Args:
        frontend: what they compute.
        output: name of the normalised log-mel `[b, t, f]` float32.
        valid: name of the number of valid frames `[b]` int32, or None if it is not needed.
    """
    graph = _GraphBuilder(output, valid)
    log_mel = _add_log_mel(graph, frontend)
    rows = graph.index("rows", 1)
    ends = graph.index("ends", *(FRAME + HOP * i for i in range(frontend.frames)))
    length = graph.add("Max", ["length", graph.index("one_frame", FRAME)], "length")
    column = graph.add("Unsqueeze", [length, rows], "length_column")
    inside = graph.add("LessOrEqual", [ends, column], "inside")
    mask = graph.add("Unsqueeze", [inside, graph.index("columns", 2)], "mask")
    fill = graph.constant("fill", frontend.fill)
    filled = graph.add("Where", [mask, log_mel, fill], "filled")
    centred = graph.add("Sub", [filled, graph.constant("mean", frontend.mean)], "centred")
    graph.add("Div", [centred, graph.constant("scale", 2 * frontend.std)], output)
    if valid is not None:
        numbers = graph.add("Cast", [inside], "numbers", to=INT32)
        graph.add("ReduceSum", [numbers, rows], valid, keepdims=0)
    return graph.nodes, graph.constants


def _add_log_mel(graph: _GraphBuilder, frontend: FrontEnd) -> str:
    """Add the log-mel of `waveform`. Frames are two hops and a half: three slices of the hops."""
    count, frames = frontend.frames + 2, frontend.frames
    missing = count * HOP - frontend.samples
    padded = "waveform"
    if missing > 0:
        padded = graph.add("Pad", [padded, graph.index("pads", 0, 0, 0, missing)], "padded")
    hops = graph.add("Reshape", [padded, graph.index("hops_shape", 0, count, HOP)], "hops")
    axis, last = graph.index("axis", 1), graph.index("last", 2)
    parts = [graph.slice(hops, i, i + frames, axis, f"part{i}") for i in range(3)]
    parts[2] = graph.slice(parts[2], 0, FRAME - 2 * HOP, last, "half")
    framed = graph.add("Concat", parts, "frames", axis=2)
    wide = graph.add("Cast", [framed], "wide", to=DOUBLE)
    transform = graph.constant("transform", make_frame_transform(), np.float64)
    spectrum = graph.add("MatMul", [wide, transform], "spectrum")
    square = graph.add("Mul", [spectrum, spectrum], "square")
    bins = FFT // 2 + 1
    real = graph.slice(square, 0, bins, last, "real")
    imaginary = graph.slice(square, bins, 2 * bins, last, "imaginary")
    power = graph.add("Add", [real, imaginary], "power_wide")
    power = graph.add("Cast", [power], "power", to=FLOAT)
    bank = graph.constant("bank", mel_bank(frontend.rate, frontend.mels))
    energy = graph.add("MatMul", [power, bank], "energy")
    floored = graph.add("Max", [energy, graph.constant("floor", ENERGY_FLOOR)], "floored")
    return graph.add("Log", [floored], "logarithm")
