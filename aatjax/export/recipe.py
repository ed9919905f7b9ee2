"""The Python recipe in a card: how a file of any length is read with an export.

It is `aatjax.audio.windows` and `aatjax.audio.scoring`, written for numpy with the numbers of one
adapter filled in. The temperature is folded into the exported head, so the recipe undoes it before
windows are pooled and applies it after.
"""

from aatjax.audio.frontend import FrontEnd
from aatjax.audio.scoring import LONG_ENOUGH, Scoring
from aatjax.audio.waveform import FRAME, SILENCE
from aatjax.audio.windows import compute_step

READ = """```python
import numpy as np
import soundfile
import soxr

SIZE, STEP = {size}, {step}  # samples of a window, and between the starts of windows
TEMPERATURE = {temperature!r}  # is in the weights of the head


def read_windows(path):
    sound, rate = soundfile.read(path, dtype="float32", always_2d=True)
    sound = {mix}
    if rate != {rate}:
        sound = soxr.resample(sound, rate, {rate}, quality="HQ")
    sound = np.clip(np.rint(sound * 32768), -32768, 32767).astype(np.float32) / 32768
    if len(sound) <= {frame}:
        return []  # too short
    starts = range(0, len(sound), STEP)
    starts = [s for s in starts if s == 0 or s - STEP + SIZE < len(sound) >= s + {frame}]
    windows = [sound[s : s + SIZE] for s in starts]
    return [w for w in windows if np.ptp(w) > {silence} / 32768]  # those with sound


def pool(logits, lengths):
    z = TEMPERATURE * np.asarray(logits, np.float64)
    {probability}
    {pooling}
    {calibrate}


windows = read_windows("sound.wav")
if not windows:
    raise SystemExit("no class: silent, or too short")
lengths = np.array([len(w) for w in windows])
"""

SINGLE = """p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)"""
SEVERAL = "p = 1 / (1 + np.exp(-z))"
CALIBRATE_SINGLE = """p = p ** (1 / TEMPERATURE)
    return p / p.sum()"""
CALIBRATE_SEVERAL = """odds = (p / (1 - p)) ** (1 / TEMPERATURE)
    return odds / (1 + odds)"""
POOLING = {
    "mean": "p = np.average(p, axis=0, weights=lengths)",
    "max": f"p = p[lengths >= {LONG_ENOUGH} * lengths.max()].max(axis=0)",
    "attention": """w = lengths[:, None] * np.exp({sharpness!r} * p)
    p = (w * p).sum(axis=0) / w.sum(axis=0)""",
    "first": "p = p[0]",
}
PADDED = "waveform = np.stack([np.pad(w, (0, SIZE - len(w))) for w in windows])"
REPEATED = """waveform = np.stack([np.resize(w, SIZE) for w in windows])  # as in training"""

IN_TORCH = """{given}
features = extractor({name}, sampling_rate={rate}, return_tensors="pt")
with torch.no_grad():
    logits = model(**features).logits.numpy()"""

RUN = {
    "hf": """
import torch
from transformers import ASTFeatureExtractor, ASTForAudioClassification

extractor = ASTFeatureExtractor.from_pretrained(".")
model = ASTForAudioClassification.from_pretrained(".").eval()
{logits}
classes = list(model.config.id2label.values())
""",
    "peft": """
import torch
from peft import PeftModel
from transformers import ASTFeatureExtractor, ASTForAudioClassification

extractor = ASTFeatureExtractor.from_pretrained("base")
base = ASTForAudioClassification.from_pretrained("base")
model = PeftModel.from_pretrained(base, "transformers-5").eval()
{logits}
classes = list(base.config.id2label.values())
""",
    "onnx": """
import json

import onnxruntime

session = onnxruntime.InferenceSession("waveform.onnx")
{padded}
filled = {valid}
(logits,) = session.run(None, {{"waveform": waveform, "length": filled.astype(np.int64)}})
with open("export.json", encoding="utf-8") as file:
    classes = json.load(file)["classes"]
""",
    "stablehlo": """
import json

import jax.export
from safetensors.numpy import load_file

weights = load_file("weights.safetensors")
with open("{platform}_waveform.jaxexport", "rb") as file:
    program = jax.export.deserialize(bytearray(file.read()))
{padded}
filled = {valid}
logits = program.call(weights, waveform, filled.astype(np.int32))
with open("export.json", encoding="utf-8") as file:
    classes = json.load(file)["classes"]
""",
}
"""How the logits of windows are computed, by format."""

END = """
for name, p in zip(classes, pool(logits, lengths)):
    print(f"{{name}} {{p:.3f}}")
```"""


def write_recipe(
    to: str,
    frontend: FrontEnd,
    scoring: Scoring,
    *,
    temperature: float,
    multi_label: bool,
    platform: str = "cpu",
) -> str:
    """Return the recipe of a format as Markdown; '' for formats that read files themselves.

    Args:
        to: the format.
        frontend: the adapter's.
        scoring: how windows are pooled.
        temperature: folded into the exported head.
        multi_label: whether a clip may have any number of classes.
        platform: of `stablehlo`.
    """
    if to not in RUN:
        return ""
    repeats = frontend.pad == "repeat"
    channel = {"mean": "sound.mean(axis=1)", "left": "sound[:, 0]"}
    head = READ.format(
        size=frontend.samples,
        step=compute_step(frontend.samples, scoring.hop),
        temperature=float(temperature),
        mix=channel.get(str(frontend.channels), f"sound[:, {frontend.channels}]"),
        rate=frontend.rate,
        frame=FRAME,
        silence=SILENCE,
        probability=SEVERAL if multi_label else SINGLE,
        pooling=POOLING[scoring.pooling].format(sharpness=scoring.sharpness),
        calibrate=CALIBRATE_SEVERAL if multi_label else CALIBRATE_SINGLE,
    )
    padded = REPEATED if repeats else PADDED
    logits = IN_TORCH.format(
        given=f"{padded}\nwaveform = list(waveform)" if repeats else "",
        name="waveform" if repeats else "windows",
        rate=frontend.rate,
    )
    run = RUN[to].format(
        padded=padded,
        logits=logits,
        valid="np.full(len(windows), SIZE)" if repeats else f"np.maximum(lengths, {FRAME})",
        platform=platform,
    )
    return head + run + END.format()
