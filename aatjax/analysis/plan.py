"""What a run would need on a chip or a pod, from a compile without it.

The train step of a config is lowered and compiled for the topology by the real compiler (libtpu for
TPUs, which `pip install 'aatjax[tpu]'` brings); no device, data set or weights are needed. Memory
is the compiler's own plan; collectives, kernels and bytes are read from the compiled program
(`aatjax.analysis.hlo`); FLOPs from the traced step (`aatjax.analysis.flops`). Times are lower bounds, not
measurements.
"""

import contextlib
import dataclasses
import os
import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from aatjax import surgery
from aatjax.analysis import flops
from aatjax.analysis.hlo import Program
from aatjax.audio.frontend import FrontEnd
from aatjax.config import Config, Model
from aatjax.convert import read_checkpoint
from aatjax.convert.load import apply_load_options, locate_weights, select_load_options
from aatjax.errors import AatjaxError, DataError, UsageError
from aatjax.models.ast import AST
from aatjax.models.config import ASTConfig
from aatjax.petl import adapt
from aatjax.train.optim import make_optimizer
from aatjax.train.sharding import BATCH, MeshShape, check_batch, count_batch_shards, make_shardings
from aatjax.train.state import cast_frozen, make_abstract_state
from aatjax.train.step import make_steps

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip: peak bf16 FLOP/s, bytes of high-bandwidth memory, bytes/s to and from it."""

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


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the compiler says of one train step. Bytes and FLOPs are those of one device a step.

    Attributes:
        topology: where it would run.
        devices: devices, and `hosts` of them.
        chips: chips; a chip of some generations is two devices.
        batch_size: clips a step over all devices.
        dtype: compute type.
        trainable: parameters that are trained.
        arguments, outputs, aliased, temporaries, code: bytes; what is given away for an output
            (aliased) is counted in both.
        memory: bytes that a device has; None where it is not known.
        collectives: (operations, bytes) by kind.
        kernels: Pallas kernels that a step runs.
        flops: of products and convolutions.
        traffic: bytes moved to and from memory by the compiled program.
        compute_s, memory_s: least time for `flops` at the chip's peak and for `traffic` at its
            bandwidth; None where the chip is not known.
        compile_s: seconds that the compile took here.
        over: bytes by which it does not fit; 0 where it does.
    """

    topology: str
    devices: int
    hosts: int
    chips: int
    batch_size: int
    dtype: str
    trainable: int
    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    memory: int | None
    collectives: dict[str, tuple[int, int]]
    kernels: int
    flops: float
    traffic: int
    compute_s: float | None
    memory_s: float | None
    compile_s: float
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
        """Clips a second that every host must read, decode and send at that bound."""
        return None if self.step_s is None else self.batch_size / self.step_s / self.hosts

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary, with what is computed from the fields."""
        return {
            **dataclasses.asdict(self),
            "needed": self.needed,
            "fits": self.fits,
            "step_s": self.step_s,
            "clips_per_host": self.clips_per_host,
        }


def read_shape(model: Model, num_classes: int) -> ASTConfig:
    """Read the shape of a config's backbone from its weights.

    Raises:
        AatjaxError: the weights are not here; the message says how to plan without them.
    """
    source, options = model.source, select_load_options(model)
    if source.startswith("random:"):
        size = ASTConfig.size(source.removeprefix("random:"))
        return apply_load_options(size, options, num_classes)
    try:
        config = read_checkpoint(locate_weights(source, model.revision)).config
    except AatjaxError as error:
        raise type(error)(
            f"{error}; to plan for the shape of AST-base without weights, add --model.source "
            "random:base"
        ) from error
    return apply_load_options(config, options, num_classes)


def devices_of(topology: str) -> tuple[list[Any], Chip | None]:
    """The devices of a topology such as `v5e:4x4`, `cpu:8` or `gpu`, and what a device can do.

    Raises:
        UsageError: an unknown name, or a size that libtpu does not know.
    """
    kind, _, grid = topology.partition(":")
    if kind == "cpu":
        if not grid.isdigit() or int(grid) < 1:
            raise UsageError(f"topology {topology!r}: give the number of devices, such as cpu:8")
        with contextlib.suppress(RuntimeError):  # too late: the backend is there already
            jax.config.update("jax_num_cpu_devices", int(grid))
        found = jax.devices("cpu")
        if len(found) < int(grid):
            raise UsageError(
                f"topology {topology!r}: JAX has started with {len(found)} CPU devices: run it in "
                f"a fresh process, or set XLA_FLAGS=--xla_force_host_platform_device_count={grid}"
            )
        return found[: int(grid)], None
    if kind == "gpu":
        try:
            found = jax.devices("gpu")
        except RuntimeError as error:
            raise UsageError(f"topology 'gpu': no GPU here: {error}") from error
        return found[: int(grid)] if grid.isdigit() else found, None
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+)+", grid):
        raise UsageError(
            f"topology {topology!r}: give a TPU as {', '.join(CHIPS)} with its grid (v5e:16x16, "
            "v5p:4x4x4), cpu:8, or gpu"
        )
    for name, value in LIBTPU.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:
        said = (str(error).splitlines() or [type(error).__name__])[0][:200]
        if "libtpu" in said.lower() or "not implemented" in said:
            said += "; pip install 'aatjax[tpu]' brings the TPU's compiler"
        raise UsageError(f"topology {topology!r}: {said}") from error
    chip = CHIPS[kind]
    each = len(found) / _product(grid)  # devices a chip
    return list(found), Chip(chip.flops / each, chip.memory / each, chip.bandwidth / each)


def _product(grid: str) -> int:
    total = 1
    for side in grid.split("x"):
        total *= int(side)
    return total


def plan(
    config: Config,
    topology: str,
    *,
    num_classes: int = 50,
    batch_per_device: int | None = None,
) -> Plan:
    """Compiles a config's train step for a topology and reads off what it needs.

    Args:
        config: the experiment; its data is not looked at.
        topology: `v5e:16x16` and the like, `cpu:8`, or `gpu`.
        num_classes: outputs of the head.
        batch_per_device: clips a device; by default `training.batch_size` over all devices.

    Raises:
        UsageError: a topology or a mesh that cannot be.
    """
    devices, chip = devices_of(topology)
    mesh = config.mesh.make(devices)
    batch_size = config.training.batch_size
    if batch_per_device is not None:
        batch_size = batch_per_device * count_batch_shards(mesh)
    check_batch(mesh, batch_size)
    shape = read_shape(config.model, num_classes)
    step, arguments, parts = _step(config, shape, mesh, batch_size)
    trainable = sum(leaf.size for leaf in jax.tree.leaves(parts.trainable))
    # Traced without a mesh, the jaxpr has the whole batch in one piece.
    count = flops.count(step, *_bare(arguments)) / len(devices)
    began = time.monotonic()
    kind = topology.partition(":")[0]
    facts: dict[str, Any] = {
        "topology": topology,
        "devices": len(devices),
        "hosts": len({device.process_index for device in devices}),
        "chips": _product(topology.partition(":")[2]) if kind in CHIPS else len(devices),
        "batch_size": batch_size,
        "dtype": shape.dtype,
        "trainable": trainable,
        "flops": count,
        "memory": None if chip is None else int(chip.memory),
        "compute_s": None if chip is None else count / chip.flops,
    }
    try:
        with jax.set_mesh(mesh):
            compiled = step.lower(*arguments).compile()
    except Exception as error:
        over = _over(str(error))
        if over is None:
            raise
        needed = over + int(facts["memory"] or 0)
        return Plan(
            **facts,
            arguments=0,
            outputs=0,
            aliased=0,
            temporaries=needed,
            code=0,
            traffic=0,
            kernels=0,
            collectives={},
            memory_s=None,
            over=over,
            compile_s=time.monotonic() - began,
        )
    seconds = time.monotonic() - began
    memory = compiled.memory_analysis()
    program = Program(compiled.as_text() or "")
    traffic = program.traffic()
    found = Plan(
        **facts,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        collectives=program.collectives(),
        kernels=program.kernels(),
        traffic=traffic,
        memory_s=None if chip is None else traffic / chip.bandwidth,
        compile_s=seconds,
    )
    over = 0 if found.memory is None else max(0, found.needed - found.memory)
    return dataclasses.replace(found, over=over)


def _over(message: str) -> int | None:
    """By how many bytes a program does not fit, from the compiler's complaint; None if not that."""
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return None
    match = re.search(r"[Ee]xceeded hbm capacity by ([\d.]+)([KMG])", message)
    if not match:
        return 1
    return int(float(match.group(1)) * {"K": 1 << 10, "M": 1 << 20, "G": GIB}[match.group(2)])


def _step(
    config: Config, shape: ASTConfig, mesh: Any, batch_size: int
) -> tuple[Any, tuple[Any, ...], surgery.SplitModel]:
    """The train step, and its arguments as shapes with shardings."""
    model: AST = nnx.eval_shape(lambda: adapt(AST(shape, rngs=nnx.Rngs(0)), config.petl))
    parts = surgery.split(model)
    training = config.training
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
    rows = NamedSharding(mesh, BATCH)
    batch = {
        "audio": jax.ShapeDtypeStruct((batch_size, frontend.samples), jnp.int16, sharding=rows),
        "length": jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=rows),
        "target": jax.ShapeDtypeStruct((batch_size, shape.num_classes), jnp.float32, sharding=rows),
        "weight": jax.ShapeDtypeStruct((batch_size,), jnp.float32, sharding=rows),
    }
    frozen = cast_frozen(parts.frozen, jnp.dtype(shape.dtype))

    def placed(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    key = jax.eval_shape(lambda: jax.random.key(0))
    return (
        steps.train,
        (
            jax.tree.map(placed, state, layout),
            jax.tree.map(placed, frozen, make_shardings(frozen, mesh)),
            batch,
            placed(key, layout.step),
        ),
        parts,
    )


def _bare(tree: Any) -> Any:
    """The same shapes, lying nowhere."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def advice(
    config: Config, topology: str, found: Plan, *, num_classes: int, batch_per_device: int | None
) -> list[tuple[str, Plan]]:
    """What could be changed, each compiled: bfloat16, recomputation, pieces of weights, batch."""
    model = config.model
    tried: list[tuple[str, Config, int | None]] = []
    if model.dtype == "float32":
        changed = dataclasses.replace(model, dtype="bfloat16")
        tried.append(
            ("--model.dtype bfloat16", dataclasses.replace(config, model=changed), batch_per_device)
        )
    if not model.remat:
        changed = dataclasses.replace(model, remat=True)
        tried.append(
            ("--model.remat", dataclasses.replace(config, model=changed), batch_per_device)
        )
    if config.mesh == MeshShape() and found.devices > 1:
        pieces = min(found.devices, 8)
        mesh = MeshShape(fsdp=pieces)
        tried.append(
            (f"--mesh.fsdp {pieces}", dataclasses.replace(config, mesh=mesh), batch_per_device)
        )
    each = found.batch_size // found.devices
    if each > 1:
        tried.append((f"batch of {each // 2} a device", config, each // 2))
    rows = []
    for what, changed, batch in tried:
        with contextlib.suppress(DataError, UsageError):
            one = plan(changed, topology, num_classes=num_classes, batch_per_device=batch)
            rows.append((what, one))
    return rows


def prepare_environment(topologies: list[str]) -> None:
    """Before JAX starts: no accelerator is looked for unless it is asked for."""
    if all(not name.startswith("gpu") for name in topologies):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])


def classes_of(config: Config) -> int | None:
    """The number of classes where it is known without reading the data."""
    if config.data.format == "synthetic":
        from aatjax.data.synthetic.synthesize import TARGET_SOUNDS

        return len(TARGET_SOUNDS)
    if config.data.format == "folder" and config.data.path and Path(config.data.path).is_dir():
        return sum(entry.is_dir() for entry in Path(config.data.path).iterdir()) or None
    return None
