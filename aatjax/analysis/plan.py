"""Memory, FLOPs and traffic of a training step on a chip or a pod, without the device.

The train step of a config is lowered and compiled for the topology by the real compiler (libtpu for
TPUs, installed by `pip install 'aatjax[tpu]'`); no device, data set or weights are needed. Memory
is the compiler's own figure; collectives, kernels and bytes are read from the compiled program
(`aatjax.analysis.hlo`), FLOPs from the traced step (`aatjax.analysis.flops`). Times are lower
bounds, not measurements.
"""

import contextlib
import dataclasses
import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from aatjax import surgery
from aatjax.analysis.flops import count_flops
from aatjax.analysis.hlo import Program
from aatjax.analysis.topology import GIB, Chip, count_chips, find_devices, find_memory
from aatjax.audio.frontend import FrontEnd
from aatjax.config import Config, Model
from aatjax.convert import read_checkpoint
from aatjax.convert.load import apply_load_options, locate_weights, select_load_options
from aatjax.errors import AatjaxError, DataError, UsageError
from aatjax.models.ast import AST, make_abstract
from aatjax.models.config import ASTConfig
from aatjax.petl import adapt
from aatjax.train.optim import make_optimizer
from aatjax.train.sharding import (
    BATCH,
    MeshShape,
    count_batch_shards,
    find_near_batches,
    make_shardings,
)
from aatjax.train.state import cast_frozen, make_abstract_state
from aatjax.train.step import make_steps


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """The compiler's figures of one train step; bytes and FLOPs are per device and step.

    Attributes:
        topology: the chip and its grid.
        devices, hosts, chips: their numbers; a chip of some generations is two devices.
        batch_size: clips per step over all devices.
        asked: the config's batch, where it does not divide over the devices and `batch_size` is
            the nearest that does; else None.
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
    asked: int | None = None

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


def plan_step(
    config: Config,
    topology: str,
    *,
    num_classes: int = 50,
    batch_per_device: int | None = None,
    memory: int | None = None,
) -> StepPlan:
    """Compile a config's train step for a topology and return what it needs.

    Args:
        config: the experiment; its data is not read.
        topology: `v5e:16x16` and the like, `cpu:8`, or `gpu`.
        num_classes: outputs of the head.
        batch_per_device: clips per device; by default `training.batch_size` over all devices, or
            the nearest batch that divides over them.
        memory: bytes of a device; by default those of the chip or the GPU.

    Raises:
        UsageError: an impossible topology or mesh.
    """
    devices, chip = find_devices(topology)
    mesh = config.mesh.make(devices)
    shards, asked = count_batch_shards(mesh), config.training.batch_size
    batch_size = find_near_batches(asked, shards)[0]
    if batch_per_device is not None:
        batch_size = asked = batch_per_device * shards
    shape = read_shape(config.model, num_classes, devices[0])
    step, arguments, trainable = make_abstract_step(config, shape, mesh, batch_size)
    # Traced without a mesh, the jaxpr has the whole batch in one piece.
    unplaced = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    flops = count_flops(step, *unplaced) / len(devices)
    plan = StepPlan(
        topology=topology,
        devices=len(devices),
        hosts=len({device.process_index for device in devices}),
        chips=count_chips(topology, len(devices)),
        batch_size=batch_size,
        dtype=shape.dtype,
        trainable=trainable,
        flops=flops,
        memory=memory or find_memory(devices, chip),
        compute_s=None if chip is None else flops / chip.flops,
        asked=None if asked == batch_size else asked,
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


def make_abstract_step(
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
    config: Config,
    plan: StepPlan,
    *,
    num_classes: int,
    batch_per_device: int | None,
    memory: int | None = None,
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
            more = {"batch_per_device": batch, "memory": memory}
            found = plan_step(changed, plan.topology, num_classes=num_classes, **more)
            rows.append((what, found))
    return rows
