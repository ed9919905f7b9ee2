"""The stages of `tools/on_gpu.py`: what is worth knowing of a GPU, in order of value.

A stage is a list of measurements, each of which gives a row of figures. `--rehearse` runs all of
them on a CPU at toy sizes.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aatjax import petl, surgery
from aatjax.analysis.method_costs import MethodCost
from aatjax.analysis.plan import plan_step
from aatjax.analysis.step_timing import LoopedMoA, PreparedSteps, make_batch, prepare_steps
from aatjax.audio.frontend import FrontEnd
from aatjax.config import Config, Model
from aatjax.io.timing import Timing, time_interleaved
from aatjax.models.config import ASTConfig
from aatjax.ops.kernel_timer import find_platform
from aatjax.petl.base import Method
from aatjax.train.training import Training
from aatjax_kernels.attention import OP as ATTENTION
from aatjax_kernels.selection import Op
from aatjax_kernels.soft_moe import OP as SOFT_MOE

DIM, HEADS, HEAD, CLASSES = 768, 12, 64, 50
TOKENS = {110: 128, 590: 32, 1214: 32, 3590: 8}
"""Tokens of 1, 5, 10 and 30 s, and clips of a batch."""
MIXTURES = {8: (8, 1, 6), 24: (24, 1, 2), 128: (16, 8, 6)}
"""Experts, slots per expert and bottleneck width, by the number of slots."""
LIMITS = {"float32": 2e-5, "bfloat16": 2e-2}
"""Largest error that passes, relative to the largest number of the truth."""

Row = dict[str, Any]
Measurement = tuple[str, Callable[[], Row | list[Row]]]
"""The key of a row or of several, and what measures them."""


@dataclasses.dataclass(frozen=True)
class Day:
    """What the stages need to know.

    Attributes:
        rehearse: toy sizes.
    """

    rehearse: bool

    @property
    def tokens(self) -> dict[int, int]:
        return {20: 2} if self.rehearse else TOKENS

    @property
    def rounds(self) -> int:
        return 2 if self.rehearse else 15


@dataclasses.dataclass(frozen=True)
class EmbeddingBias(Method):
    """Trains the bias of the patch embedding: the backward pass of a model without adapters."""

    name = "embedding_bias"

    def inject(self, model: Any, *, rngs: Any) -> None:
        """Mark `embed/proj/bias`."""
        surgery.unfreeze(model, "embed/proj/bias")


def list_correct(day: Day) -> Iterator[Measurement]:
    """Every op and implementation against float64, on ragged shapes, after memory full of NaN."""
    lengths = ((3, 37), (2, 590), (70, 110)) if not day.rehearse else ((2, 21),)
    for dtype in ("float32", "bfloat16"):
        for masked in (False, True) if not day.rehearse else (dtype == "float32",):
            for clips, tokens in lengths:
                pairs = [(ATTENTION, shape_attention(clips, tokens, dtype, masked))]
                for slots in (8,) if day.rehearse else (8, 128):
                    pairs.append((SOFT_MOE, shape_soft_moe(clips, tokens, slots, dtype, masked)))
                for op, arrays in pairs:
                    yield describe(op, arrays), functools.partial(check_op, op, arrays)


def list_ceilings(day: Day) -> Iterator[Measurement]:
    """What the device reaches at best: bytes copied and products of bfloat16, per second."""
    size = 2**10 if day.rehearse else 2**29
    side = 64 if day.rehearse else 8192

    def copy() -> Row:
        x = jnp.ones(size, jnp.bfloat16)
        seconds = time_repeated({"copy": lambda x: x + 1}, (x,), day.rounds)["copy"].median
        return {"what": "copy", "bytes_per_s": 4 * size / seconds}

    def multiply() -> Row:
        x = jnp.ones((side, side), jnp.bfloat16)
        run = {"product": lambda x: (x @ x).astype(x.dtype)}
        seconds = time_repeated(run, (x,), day.rounds)["product"].median
        return {"what": "bfloat16 product", "flops_per_s": 2 * side**3 / seconds}

    yield "copy", copy
    yield "product", multiply


def list_attention(day: Day) -> Iterator[Measurement]:
    """Attention, forward and with the backward pass, in every implementation."""
    for tokens, clips in day.tokens.items():
        for dtype in ("bfloat16",) if not day.rehearse else ("float32",):
            arrays = shape_attention(clips, tokens, dtype, masked=False)
            yield describe(ATTENTION, arrays), functools.partial(time_op, ATTENTION, arrays, day)


def list_soft_moe(day: Day) -> Iterator[Measurement]:
    """The Soft-MoA layer, forward and with the backward pass, in every implementation."""
    for tokens, clips in day.tokens.items():
        for slots in MIXTURES if not day.rehearse else (8,):
            dtype = "float32" if day.rehearse else "bfloat16"
            arrays = shape_soft_moe(clips, tokens, slots, dtype, masked=False)
            yield describe(SOFT_MOE, arrays), functools.partial(time_op, SOFT_MOE, arrays, day)


METHODS: dict[str, Method] = {
    "no adapter": EmbeddingBias(),
    "linear": petl.Linear(),
    "lora": petl.LoRA(),
    "aat": petl.AAT(),
    "soft_moa": petl.SoftMoA(),
    "dense_moa": petl.DenseMoA(),
    "dense_moa, looped": LoopedMoA(),
    "full": petl.Full(),
}


def list_steps(day: Day) -> Iterator[Measurement]:
    """The training step of AST-base in bfloat16; the first rows are the ones that matter most."""
    sizes = [(512, 32), (1024, 16), (512, 64), (1024, 32)] if not day.rehearse else [(64, 2)]
    for frames, clips in sizes:
        few = day.rehearse or (frames, clips) not in sizes[:2]
        names = ["no adapter", "soft_moa"] if few else list(METHODS)
        key = f"{frames} frames, {clips} clips"
        yield key, functools.partial(time_steps, day, frames, clips, names)


def list_torch(day: Day) -> Iterator[Measurement]:
    """The same models in PyTorch, eager and compiled, in turn with ours."""
    device = "cpu" if day.rehearse else "cuda"
    if not all(map(importlib.util.find_spec, ("torch", "transformers"))):
        yield "torch", lambda: {"skipped": "PyTorch and transformers are not installed"}
        return
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        yield "torch", lambda: {"skipped": "this PyTorch finds no GPU"}
        return
    for frames, clips in ((512, 32), (1024, 16)) if not day.rehearse else ((64, 2),):
        for name in ("soft_moa",) if day.rehearse else ("soft_moa", "aat", "lora", "full"):
            key = f"{name}, {frames} frames, {clips} clips"
            yield key, functools.partial(time_torch, day, name, frames, clips, device)


def list_front_end(day: Day) -> Iterator[Measurement]:
    """Log-mel of clips of ten seconds, on the device."""
    clips = 2 if day.rehearse else 64

    def run() -> Row:
        frontend = FrontEnd(frames=64 if day.rehearse else 1024)
        batch = make_batch(frontend, clips, CLASSES, 0)
        audio, length = jnp.asarray(batch["audio"]), jnp.asarray(batch["length"])
        compute = jax.jit(frontend)
        timings = time_interleaved(
            {"log-mel": lambda: jax.block_until_ready(compute(audio, length))}, rounds=day.rounds
        )
        return {"what": "log-mel", "clips": clips, "ms": 1e3 * timings["log-mel"].median}

    yield "log-mel", run


def list_plans(day: Day) -> Iterator[Measurement]:
    """What `aatjax plan` says of the steps that were timed."""
    frames, clips = (64, 2) if day.rehearse else (512, 32)
    topology = "cpu:1" if day.rehearse else "gpu"

    def run(name: str) -> Row:
        model = Model(
            source="random:tiny,depth=1" if day.rehearse else "random:base",
            frames=frames,
            dtype="float32" if day.rehearse else "bfloat16",
            scan=not day.rehearse,
        )
        config = Config(petl=METHODS[name], model=model, training=Training(batch_size=clips))
        plan = plan_step(config, topology, num_classes=CLASSES)
        figures = {"method": name, "frames": frames, "clips": clips, "flops": plan.flops}
        return figures | {"bytes": plan.traffic, "needed": plan.needed}

    for name in ("soft_moa",) if day.rehearse else ("soft_moa", "aat"):
        yield name, functools.partial(run, name)


def list_serving(day: Day) -> Iterator[Measurement]:
    """Clips per second of one model, for batches as a server forms them."""
    frames = 64 if day.rehearse else 1024

    def run(clips: int) -> Row:
        steps = make_step(day, "soft_moa", frames, clips)
        timing = time_interleaved({"infer": steps.infer}, rounds=day.rounds)["infer"]
        return {"clips": clips, "frames": frames, "clips_per_s": clips / timing.median}

    for clips in (1, 8, 64) if not day.rehearse else (1,):
        yield f"{clips} clips", functools.partial(run, clips)


@dataclasses.dataclass(frozen=True)
class Stage:
    """Measurements, and the seconds that they may take."""

    seconds: float
    measurements: Callable[[Day], Iterator[Measurement]]


STAGES = {
    "correct": Stage(90, list_correct),
    "ceilings": Stage(30, list_ceilings),
    "attention": Stage(80, list_attention),
    "soft_moe": Stage(120, list_soft_moe),
    "steps": Stage(240, list_steps),
    "torch": Stage(180, list_torch),
    "front_end": Stage(30, list_front_end),
    "plans": Stage(60, list_plans),
    "serving": Stage(60, list_serving),
}


def shape_attention(clips: int, tokens: int, dtype: str, masked: bool) -> tuple[Any, ...]:
    """Return the shapes of query, key, value and mask, as AST-base has them."""
    x = jax.ShapeDtypeStruct((clips, tokens, HEADS, HEAD), jnp.dtype(dtype))
    return x, x, x, jax.ShapeDtypeStruct((clips, tokens), jnp.bool_) if masked else None


def shape_soft_moe(
    clips: int, tokens: int, slots: int, dtype: str, masked: bool
) -> tuple[Any, ...]:
    """Return the shapes of the arguments of a Soft-MoA layer of AST-base."""
    experts, each, width = MIXTURES[slots]
    shapes = ((DIM, experts, each), (experts, DIM, width), (experts, width))
    shapes += ((experts, width, DIM), (experts, DIM))
    x = jax.ShapeDtypeStruct((clips, tokens, DIM), jnp.dtype(dtype))
    mask = jax.ShapeDtypeStruct((clips, tokens), jnp.bool_) if masked else None
    return x, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes), mask


def describe(op: Op, arrays: tuple[Any, ...]) -> str:
    """Return op, shape, type and whether there is a mask."""
    x = arrays[0]
    slots = "" if op is ATTENTION else f", {math.prod(arrays[1].shape[1:])} slots"
    masked = "" if arrays[-1] is None else ", masked"
    return f"{op.name} {'x'.join(map(str, x.shape))}{slots} {x.dtype.name}{masked}"


def make_values(op: Op, arrays: tuple[Any, ...]) -> tuple[list[np.ndarray | None], np.ndarray]:
    """Return float64 arguments that the type of the op holds exactly, and an output gradient."""
    rng = np.random.default_rng(0)
    values: list[np.ndarray | None] = []
    for place, like in enumerate(arrays):
        if like is None:
            values.append(None)
        elif like.dtype == jnp.bool_:
            mask = rng.random(like.shape) < 0.7
            mask[:, 0] = True
            values.append(mask)
        else:
            scale = 1.0 if place in op.batched else 0.05
            drawn = (scale * rng.normal(size=like.shape)).astype(like.dtype)
            values.append(np.asarray(drawn, np.float64))
    out = jax.eval_shape(functools.partial(op.run, "reference"), *arrays)
    return values, np.asarray(rng.normal(size=out.shape).astype(out.dtype), np.float64)


def run_both(op: Op, name: str, values: list[Any], dout: Any) -> tuple[Any, ...]:
    """Return output and gradients."""
    places = [i for i, v in enumerate(values) if v is not None and v.dtype != jnp.bool_]

    def apply(*floats: Any) -> Any:
        given = dict(enumerate(values)) | dict(zip(places, floats, strict=True))
        return op.run(name, *(given[place] for place in range(len(values))))

    out, pull = jax.vjp(apply, *(values[place] for place in places))
    return out, *pull(dout.astype(out.dtype))


def check_op(op: Op, arrays: tuple[Any, ...]) -> list[Row]:
    """Compare every implementation that takes these shapes with float64 on the CPU."""
    values, dout = make_values(op, arrays)
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        held = [None if value is None else jnp.asarray(value) for value in values]
        truth = [np.asarray(x) for x in run_both(op, "reference", held, jnp.asarray(dout))]
    rows = []
    for name in op.candidates[find_platform()]:
        row: Row = {"what": describe(op, arrays), "implementation": name}
        given = [
            None if like is None else jnp.asarray(value, like.dtype)
            for value, like in zip(values, arrays, strict=True)
        ]
        poison()
        try:
            run = jax.jit(functools.partial(run_both, op, name))
            found = [np.asarray(x, np.float64) for x in run(given, jnp.asarray(dout))]
        except Exception as error:
            rows.append(row | {"refused": str(error).splitlines()[0][:200]})
            continue
        errors = [
            float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))
            for a, b in zip(found, truth, strict=True)
        ]
        worst = math.inf if any(map(math.isnan, errors)) else max(errors)
        rows.append(row | {"error": worst, "right": worst < LIMITS[arrays[0].dtype.name]})
    return rows


def poison() -> None:
    """Fill memory with NaN and free it, so that what is read before it is written shows."""
    for size in (2**12, 2**18, 2**24):
        jax.block_until_ready([jnp.full(size, jnp.nan) for _ in range(4)])


def time_repeated(
    functions: dict[str, Callable[..., Any]], arguments: tuple[Any, ...], rounds: int
) -> dict[str, Timing]:
    """Time functions of `x` and more to an array like `x`, many calls in one program.

    A kernel may take less than a launch: each program calls its function 20 times, each time on
    the result of the last.
    """
    times = 20

    def make(function: Callable[..., Any]) -> Callable[[], object]:
        @jax.jit
        def repeat(x: Any, *others: Any) -> Any:
            return jax.lax.fori_loop(0, times, lambda _, x: function(x, *others), x)

        return lambda: jax.block_until_ready(repeat(*arguments))

    made = {name: make(function) for name, function in functions.items()}
    found = time_interleaved(made, rounds=rounds)
    return {
        name: Timing(tuple(second / times for second in timing.seconds))
        for name, timing in found.items()
    }


def time_op(op: Op, arrays: tuple[Any, ...], day: Day) -> list[Row]:
    """Time the implementations of an op in turn: forward, and with the backward pass."""
    values, _ = make_values(op, arrays)
    given = [
        None if like is None else jnp.asarray(value, like.dtype)
        for value, like in zip(values, arrays, strict=True)
    ]
    x: Any = given[0]
    rest = given[1:]

    def forward(name: str, x: Any) -> Any:
        others = [x, x, None] if op is ATTENTION else rest
        return op.run(name, x, *others)

    def both(name: str, x: Any) -> Any:
        others = [x, x, None] if op is ATTENTION else rest
        out, *grads = run_both(op, name, [x, *others], x)
        small = sum(g.astype(jnp.float32).mean() for g in grads[1:] if g.shape != x.shape)
        total = sum(g for g in grads if g.shape == x.shape)
        return (out + total + small).astype(x.dtype)

    rows = []
    for which, function in (("forward", forward), ("both", both)):
        running: dict[str, Callable[..., Any]] = {}
        for name in op.candidates[find_platform()]:
            with contextlib.suppress(Exception):
                call = functools.partial(function, name)
                jax.block_until_ready(jax.jit(call)(x))
                running[name] = call
        for name, timing in time_repeated(running, (x,), day.rounds).items():
            row = {"what": describe(op, arrays), "pass": which, "implementation": name}
            tensors = x.size * x.dtype.itemsize
            figures = {"us": 1e6 * timing.median, "tensor_bytes": tensors}
            rows.append(row | figures | {"tensors_per_s": tensors / timing.median})
    return rows


def make_step(day: Day, name: str, frames: int, clips: int) -> PreparedSteps:
    """Compile the steps of a method on AST-base, or on a small AST."""
    shape: dict[str, Any] = {"frames": frames, "num_classes": CLASSES}
    if day.rehearse:
        config = ASTConfig(dim=32, depth=1, heads=2, mlp_dim=64, **shape)
    else:
        config = ASTConfig(dtype="bfloat16", scan=True, **shape)
    return prepare_steps(config, METHODS[name], batch_size=clips)


def time_steps(day: Day, frames: int, clips: int, names: list[str]) -> list[Row]:
    """Time training steps in turn, and the forward pass that ridge features take."""
    made = {name: make_step(day, name, frames, clips) for name in names}
    train = time_interleaved({n: s.train for n, s in made.items()}, rounds=day.rounds)
    features = {"ridge features": made[names[0]].infer}
    train |= time_interleaved(features, rounds=day.rounds)
    rows = []
    for name, timing in train.items():
        low, high = timing.quartiles
        row: Row = {"method": name, "frames": frames, "clips": clips, "ms": 1e3 * timing.median}
        row |= {"low_ms": 1e3 * low, "high_ms": 1e3 * high}
        if name in METHODS:
            config = ASTConfig(frames=frames, num_classes=CLASSES)
            flops = clips * MethodCost(config, name, METHODS[name]).training.total
            row |= {"temporaries": made[name].temporary_bytes}
            row |= {} if day.rehearse else {"flops_per_s": flops / timing.median}
        stats = jax.devices()[0].memory_stats() or {}
        rows.append(row | {"peak_bytes": stats.get("peak_bytes_in_use")})
    return rows


def time_torch(day: Day, name: str, frames: int, clips: int, device: str) -> list[Row]:
    """Time a step in PyTorch, eager and compiled, in turn with ours."""
    import torch
    from flax import nnx

    from aatjax.models.ast import AST
    from benchmarks.torch_model import make_torch_model

    shape: dict[str, Any] = {"frames": frames, "num_classes": CLASSES}
    small = dict(dim=32, depth=1, heads=2, mlp_dim=64) if day.rehearse else {}
    model = petl.adapt(AST(ASTConfig(**small, **shape), rngs=nnx.Rngs(0)), METHODS[name])
    theirs: Any = make_torch_model(model).to(device)
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-3)
    x = torch.randn(clips, frames, 128, device=device)
    labels = torch.zeros(clips, dtype=torch.long, device=device)

    def make(network: Any) -> Callable[[], object]:
        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16):
                logits = network(x).logits
            torch.nn.functional.cross_entropy(logits.float(), labels).backward()
            optimizer.step()
            if device == "cuda":
                torch.cuda.synchronize()

        return step

    steps = {"aatjax": make_step(day, name, frames, clips).train, "pytorch eager": make(theirs)}
    if not day.rehearse:
        with contextlib.suppress(Exception):  # no compiler on this machine
            compiled = make(torch.compile(theirs))
            compiled()
            steps["pytorch compiled"] = compiled
    timings = time_interleaved(steps, rounds=day.rounds, warm_up=3)
    row = {"method": name, "frames": frames, "clips": clips}
    return [
        row
        | {"what": what, "ms": 1e3 * timing.median}
        | {"over_aatjax": timing.compute_ratio(timings["aatjax"])}
        for what, timing in timings.items()
    ]
