"""The front end as ONNX operations: waveform to normalised log-mel."""

from typing import Any

import numpy as np

from aatjax.audio.fbank import ENERGY_FLOOR, FFT, FRAME, HOP, PRE_EMPHASIS, mel_bank
from aatjax.audio.frontend import FrontEnd


def frame_transform() -> np.ndarray:
    """The map of a frame to its spectrum, `[400, 2 * 257]` in float64: real parts, then imaginary.

    Removal of the mean, pre-emphasis, window and Fourier transform are linear, so one matrix is
    all of them.
    """
    centre = np.eye(FRAME) - 1.0 / FRAME
    previous = np.eye(FRAME)[[0, *range(FRAME - 1)]]
    emphasise = np.eye(FRAME) - PRE_EMPHASIS * previous
    frames = np.hanning(FRAME)[:, None] * (emphasise @ centre)
    spectrum = np.fft.rfft(frames, FFT, axis=0).T
    return np.concatenate([spectrum.real, spectrum.imag], axis=1)


def front_end_nodes(frontend: FrontEnd, output: str, valid: str | None) -> tuple[list, list]:
    """Nodes from inputs `waveform` `[b, s]` float32 and `length` `[b]` int64.

    Args:
        frontend: what they compute.
        output: name of the normalised log-mel `[b, t, f]` float32.
        valid: name of the number of sounding frames `[b]` int32, or None if nobody asks.

    Returns:
        Nodes and initializers; every name inside begins with `fe_`.
    """
    from onnx import helper, numpy_helper

    nodes: list[Any] = []
    constants: list[Any] = []
    count, frames = frontend.frames + 2, frontend.frames

    def constant(name: str, value: Any, dtype: Any) -> str:
        constants.append(numpy_helper.from_array(np.asarray(value, dtype), f"fe_{name}"))
        return f"fe_{name}"

    def node(kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        name = name if name in (output, valid) else f"fe_{name}"
        label = f"fe_{kind}_{len(nodes)}"
        nodes.append(helper.make_node(kind, inputs, [name], name=label, **attributes))
        return name

    def whole(name: str, *values: int) -> str:
        return constant(name, values, np.int64)

    # Frames are two hops and a half: three shifted views of the hops.
    missing = count * HOP - frontend.samples
    padded = "waveform"
    if missing > 0:
        padded = node("Pad", [padded, whole("pads", 0, 0, 0, missing)], "padded")
    hops = node("Reshape", [padded, whole("hops_shape", 0, count, HOP)], "hops")
    axis = whole("axis", 1)
    views = [
        node("Slice", [hops, whole(f"from{i}", i), whole(f"to{i}", i + frames), axis], f"view{i}")
        for i in range(3)
    ]
    half = [whole("zero", 0), whole("rest", FRAME - 2 * HOP), whole("last", 2)]
    views[2] = node("Slice", [views[2], *half], "half")
    framed = node("Concat", views, "frames", axis=2)
    wide = node("Cast", [framed], "wide", to=11)
    spectrum = node(
        "MatMul", [wide, constant("transform", frame_transform(), np.float64)], "spectrum"
    )
    square = node("Mul", [spectrum, spectrum], "square")
    bins, last = FFT // 2 + 1, whole("bins_axis", 2)
    parts = [
        node("Slice", [square, whole(f"{n}_from", at), whole(f"{n}_to", at + bins), last], n)
        for n, at in (("real", 0), ("imaginary", bins))
    ]
    power = node("Cast", [node("Add", parts, "power_wide")], "power", to=1)
    bank = constant("bank", mel_bank(frontend.rate, frontend.mels), np.float32)
    energy = node("MatMul", [power, bank], "energy")
    floor = constant("floor", ENERGY_FLOOR, np.float32)
    log_mel = node("Log", [node("Max", [energy, floor], "floored")], "logarithm")

    ends = constant("ends", [FRAME + HOP * np.arange(frames)], np.int64)
    length = node("Max", ["length", whole("one_frame", FRAME)], "length")
    column = node("Unsqueeze", [length, axis], "length_column")
    sounding = node("LessOrEqual", [ends, column], "sounding")
    mask = node("Unsqueeze", [sounding, last], "mask")
    filled = node("Where", [mask, log_mel, constant("fill", frontend.fill, np.float32)], "filled")
    centred = node("Sub", [filled, constant("mean", frontend.mean, np.float32)], "centred")
    node("Div", [centred, constant("scale", 2 * frontend.std, np.float32)], output)
    if valid is not None:
        numbers = node("Cast", [sounding], "numbers", to=6)
        node("ReduceSum", [numbers, axis], valid, keepdims=0)
    return nodes, constants
