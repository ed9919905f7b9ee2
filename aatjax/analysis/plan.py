"""Memory, FLOPs and traffic of a training step on a chip or a pod, without the device.

The train step of a config is lowered and compiled for the topology by the real compiler (libtpu for
TPUs, installed by `pip install 'aatjax[tpu]'`); no device, data set or weights are needed. Memory
is the compiler's own figure; collectives, kernels and bytes are read from the compiled program
(`aatjax.analysis.hlo`), FLOPs from the traced step (`aatjax.analysis.flops`). Times are lower
bounds, not measurements.
"""

import contextlib
import dataclasses
import math
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from aatjax import surgery
from aatjax.analysis.flops import count_flops
from aatjax.analysis.hlo import Program
from aatjax.audio.frontend import FrontEnd
from aatjax.config import Config, Model
from aatjax.convert import read_checkpoint
from aatjax.convert.load import apply_load_options, locate_weights, select_load_options
from aatjax.errors import AatjaxError, DataError, UsageError
from aatjax.models.ast import AST, make_abstract
from aatjax.models.config import ASTConfig
from aatjax.petl import adapt
from aatjax.train.optim import make_optimizer
from aatjax.train.sharding import BATCH, MeshShape, check_batch, count_batch_shards, make_shardings
from aatjax.train.state import cast_frozen, make_abstract_state
from aatjax.train.step import make_steps

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak bf16 FLOP/s of a chip, bytes of high-bandwidth memory, and its bytes/s."""

    flops: float
    memory: float
    bandwidth: float


CHIPS = {
    "v4": Chip(275e12, 32 * GIB, 1228e9),
    "v5e": Chip(197e12, 16 * GIB, 819e9),
    "v5p": Chip(459e12, 95 * GIB, 2765e9),
    "v6e": Chip(918e12, 32 * GIB, 1640e9),
    "tpu7x": Chip(2307e12, 192 * GIB, 7380e9),
}
"""Google's figures (docs.cloud.google.com/tpu/docs, pages of each version), whole chips."""

LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""Environment in which libtpu compiles without a TPU."""


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """The compiler's figures of one train step; bytes and FLOPs are per device and step.

    Attributes:
        topology: the chip and its grid.
        devices, hosts, chips: their numbers; a chip of some generations is two devices.
        batch_size: clips per step over all devices.
        dtype: compute type.
        trainable: trainable parameters.
        arguments, outputs, aliased, temporaries, code: bytes; donated arguments (aliased) are
            counted in arguments and in outputs.
        memory: bytes that a device has; None where unknown.
        collectives: (operations, bytes) by kind.
        kernels: Pallas kernels per step.
        flops: of products and convolutions.
        traffic: bytes moved to and from memory by the compiled program.
        compute_s, memory_s: least time for `flops` at the chip's peak and for `traffic` at its
            bandwidth; None where the chip is unknown.
        compile_s: seconds that the compilation took here.
        over: bytes by which it does not fit; 0 where it does.
    """

    topology: str
    devices: int
    hosts: int
    chips: int
    batch_size: int
    dtype: str
    trainable: int
    flops: float
    memory: int | None
    compute_s: float | None
    compile_s: float = 0.0
    arguments: int = 0
    outputs: int = 0
    aliased: int = 0
    temporaries: int = 0
    code: int = 0
    collectives: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    kernels: int = 0
    traffic: int = 0
    memory_s: float | None = None
    over: int = 0

    @property
    def needed(self) -> int:
        """Bytes that a device needs."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code

    @property
    def fits(self) -> bool:
        return self.over == 0

    @property
    def step_s(self) -> float | None:
        """A lower bound on the time of a step."""
        if self.compute_s is None or self.memory_s is None:
            return None
        return max(self.compute_s, self.memory_s)

    @property
    def clips_per_host(self) -> float | None:
        """Clips per second that every host must read, decode and send at that bound."""
        return None if self.step_s is None else self.batch_size / self.step_s / self.hosts

    def to_json(self) -> dict[str, Any]:
        """Return a plain dictionary, properties included."""
        properties = ("needed", "fits", "step_s", "clips_per_host")
        return {**dataclasses.asdict(self), **{name: getattr(self, name) for name in properties}}


def read_shape(model: Model, num_classes: int, device: Any = None) -> ASTConfig:
    """Read the shape of a config's backbone from its weights, for a device.

    Raises:
        AatjaxError: the weights were not found; the message says how to plan without them.
    """
    source, options = model.source, select_load_options(model)
    if source.startswith("random:"):
        size = ASTConfig.from_text(source.removeprefix("random:"))
        return apply_load_options(size, options, num_classes, device)
    try:
        config = read_checkpoint(locate_weights(source, model.revision)).config
    except AatjaxError as error:
        raise type(error)(
            f"{error}; to plan for the shape of AST-base without weights, add --model.source "
            "random:base"
        ) from error
    return apply_load_options(config, options, num_classes, device)


def infer_num_classes(config: Config) -> int | None:
    """Return the number of classes where it is known without reading the data."""
    if config.data.format == "synthetic":
        from aatjax.data.synthetic.synthesize import TARGET_SOUNDS

        return len(TARGET_SOUNDS)
    path = config.data.path
    if config.data.format == "folder" and isinstance(path, str) and Path(path).is_dir():
        return sum(entry.is_dir() for entry in Path(path).iterdir()) or None
    return None


def hide_accelerators(topologies: Sequence[str]) -> None:
    """Keep JAX from starting an accelerator, unless the GPU is one of the topologies."""
    if all(not name.startswith("gpu") for name in topologies):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])


def find_devices(topology: str) -> tuple[list[Any], Chip | None]:
    """Return the devices of a topology such as `v5e:4x4`, `cpu:8` or `gpu`, and one's figures.

    Raises:
        UsageError: an unknown name, or a size that libtpu does not support.
    """
    kind, _, grid = topology.partition(":")
    if kind == "cpu":
        return _find_cpus(topology, grid), None
    if kind == "gpu":
        try:
            devices = jax.devices("gpu")
        except RuntimeError as error:
            raise UsageError(f"topology 'gpu': no GPU found: {error}") from error
        return devices[: int(grid)] if grid.isdigit() else devices, None
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+)+", grid):
        raise UsageError(
            f"topology {topology!r}: give a TPU as {', '.join(CHIPS)} with its grid (v5e:16x16, "
            "v5p:4x4x4), cpu:8, or gpu"
        )
    for name, value in LIBTPU.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:
        message = (str(error).splitlines() or [type(error).__name__])[0][:200]
        if "libtpu" in message.lower() or "not implemented" in message:
            message += "; pip install 'aatjax[tpu]' for the TPU compiler"
        raise UsageError(f"topology {topology!r}: {message}") from error
    chip = CHIPS[kind]
    each = len(devices) / _count_chips(topology, len(devices))  # devices per chip
    return list(devices), Chip(chip.flops / each, chip.memory / each, chip.bandwidth / each)


def _find_cpus(topology: str, count: str) -> list[Any]:
    if not count.isdigit() or int(count) < 1:
        raise UsageError(f"topology {topology!r}: give the number of devices, such as cpu:8")
    with contextlib.suppress(RuntimeError):  # the backend has started already
        jax.config.update("jax_num_cpu_devices", int(count))
    devices = jax.devices("cpu")
    if len(devices) < int(count):
        raise UsageError(
            f"topology {topology!r}: JAX has started with {len(devices)} CPU devices: run it in a "
            f"new process, or set XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return devices[: int(count)]


def _count_chips(topology: str, devices: int) -> int:
    kind, _, grid = topology.partition(":")
    return math.prod(map(int, grid.split("x"))) if kind in CHIPS else devices


def plan_step(
    config: Config,
    topology: str,
    *,
    num_classes: int = 50,
    batch_per_device: int | None = None,
) -> StepPlan:
    """Compile a config's train step for a topology and return what it needs.

    Args:
        config: the experiment; its data is not read.
        topology: `v5e:16x16` and the like, `cpu:8`, or `gpu`.
        num_classes: outputs of the head.
        batch_per_device: clips per device; by default `training.batch_size` over all devices.

    Raises:
        UsageError: an impossible topology or mesh.
    """
    devices, chip = find_devices(topology)
    mesh = config.mesh.make(devices)
    batch_size = config.training.batch_size
    if batch_per_device is not None:
        batch_size = batch_per_device * count_batch_shards(mesh)
    check_batch(mesh, batch_size)
    shape = read_shape(config.model, num_classes, devices[0])
    step, arguments, trainable = _make_step(config, shape, mesh, batch_size)
    # Traced without a mesh, the jaxpr has the whole batch in one piece.
    unplaced = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    flops = count_flops(step, *unplaced) / len(devices)
    plan = StepPlan(
        topology=topology,
        devices=len(devices),
        hosts=len({device.process_index for device in devices}),
        chips=_count_chips(topology, len(devices)),
        batch_size=batch_size,
        dtype=shape.dtype,
        trainable=trainable,
        flops=flops,
        memory=None if chip is None else int(chip.memory),
        compute_s=None if chip is None else flops / chip.flops,
    )
    return _compile(plan, step, arguments, mesh, chip)


def _compile(
    plan: StepPlan, step: Any, arguments: tuple[Any, ...], mesh: Any, chip: Chip | None
) -> StepPlan:
    """Return the plan with the figures of the compiled step."""
    began = time.monotonic()
    try:
        with jax.set_mesh(mesh):
            compiled = step.lower(*arguments).compile()
    except Exception as error:
        over = parse_overflow(str(error))
        if over is None:
            raise
        seconds, needed = time.monotonic() - began, over + (plan.memory or 0)
        return dataclasses.replace(plan, temporaries=needed, over=over, compile_s=seconds)
    seconds = time.monotonic() - began
    memory, program = compiled.memory_analysis(), Program(compiled.as_text() or "")
    traffic = program.count_traffic()
    plan = dataclasses.replace(
        plan,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        collectives=program.count_collectives(),
        kernels=program.count_kernels(),
        traffic=traffic,
        memory_s=None if chip is None else traffic / chip.bandwidth,
        compile_s=seconds,
    )
    over = 0 if plan.memory is None else max(0, plan.needed - plan.memory)
    return dataclasses.replace(plan, over=over)


def parse_overflow(message: str) -> int | None:
    """Return the bytes by which a program does not fit, from the compiler's error, or None."""
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return None
    match = re.search(r"[Ee]xceeded hbm capacity by ([\d.]+)([KMG])", message)
    if not match:
        return 1
    return int(float(match.group(1)) * {"K": 1 << 10, "M": 1 << 20, "G": GIB}[match.group(2)])


def _make_step(
    config: Config, shape: ASTConfig, mesh: Any, batch_size: int
) -> tuple[Any, tuple[Any, ...], int]:
    """Return the train step, its arguments as shapes with shardings, and trainable parameters."""
    model: AST = nnx.eval_shape(lambda model: adapt(model, config.petl), make_abstract(shape))
    parts, training = surgery.split(model), config.training
    tx = make_optimizer(config.optim, steps_per_epoch=100, epochs=training.epochs)
    state, layout = make_abstract_state(parts, tx, mesh, average=training.average is not None)
    frontend = FrontEnd(frames=shape.frames, mels=shape.mels, pad=config.data.pad)
    steps = make_steps(
        parts.graphdef,
        tx,
        frontend=frontend,
        augment=config.augment,
        loss=training.loss or "ce",
        average=training.average,
        layout=layout,
    )

    def place(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    rows = NamedSharding(mesh, BATCH)
    batch = {
        "audio": jax.ShapeDtypeStruct((batch_size, frontend.samples), jnp.int16),
        "length": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        "target": jax.ShapeDtypeStruct((batch_size, shape.num_classes), jnp.float32),
        "weight": jax.ShapeDtypeStruct((batch_size,), jnp.float32),
    }
    frozen = cast_frozen(parts.frozen, jnp.dtype(shape.dtype))
    arguments = (
        jax.tree.map(place, state, layout),
        jax.tree.map(place, frozen, make_shardings(frozen, mesh)),
        {name: place(leaf, rows) for name, leaf in batch.items()},
        place(jax.eval_shape(lambda: jax.random.key(0)), layout.step),
    )
    trainable = sum(leaf.size for leaf in jax.tree.leaves(parts.trainable))
    return steps.train, arguments, trainable


def suggest_changes(
    config: Config, plan: StepPlan, *, num_classes: int, batch_per_device: int | None
) -> list[tuple[str, StepPlan]]:
    """Plan what could be changed: bfloat16, recomputation, sharded weights, a smaller batch.

    Returns:
        Pairs of a flag, or of words, and the plan with it.
    """
    model, replace = config.model, dataclasses.replace
    tried: list[tuple[str, Config, int | None]] = []
    if plan.dtype == "float32":
        changed = replace(config, model=replace(model, dtype="bfloat16"))
        tried.append(("--model.dtype bfloat16", changed, batch_per_device))
    if not model.remat:
        changed = replace(config, model=replace(model, remat=True))
        tried.append(("--model.remat", changed, batch_per_device))
    if config.mesh == MeshShape() and plan.devices > 1:
        pieces = min(plan.devices, 8)
        changed = replace(config, mesh=MeshShape(fsdp=pieces))
        tried.append((f"--mesh.fsdp {pieces}", changed, batch_per_device))
    each = plan.batch_size // plan.devices
    if each > 1:
        tried.append((f"batch of {each // 2} per device", config, each // 2))
    rows = []
    for what, changed, batch in tried:
        with contextlib.suppress(DataError, UsageError):
            more = {"num_classes": num_classes, "batch_per_device": batch}
            rows.append((what, plan_step(changed, plan.topology, **more)))
    return rows
