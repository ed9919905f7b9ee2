"""Programs of the kernels' ops, to compile without the device."""

import dataclasses
import functools
import json
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from aatjax_kernels.attention import attention
from aatjax_kernels.attention import fused as fused_attention
from aatjax_kernels.dispatch import KernelOptions
from aatjax_kernels.soft_moe import fused as fused_soft_moe
from aatjax_kernels.soft_moe import soft_moe

Op = Literal["soft_moe", "attention"]
Pass = Literal["forward", "backward", "both"]
Dtype = Literal["bfloat16", "float32"]
DIM = 768
SHAPES = {
    "soft_moe": (
        "128,1214,8,1,6",
        "32,1214,8,1,6",
        "32,590,8,1,6",
        "128,110,8,1,6",
        "32,1214,16,8,6",
    ),
    "attention": ("128,110,12,64", "32,590,12,64", "32,1214,12,64", "8,3590,12,64"),
}
"""soft_moe: batch,tokens,experts,slots,bottleneck; attention: batch,tokens,heads,width."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One program: op, shape, implementation, type of the activations, pass and TPU."""

    op: Op
    shape: tuple[int, ...]
    implementation: str
    dtype: Dtype
    direction: Pass
    chip: str = ""

    @property
    def tensor_bytes(self) -> int:
        """Bytes of one activation tensor."""
        width = math.prod(self.shape[2:]) if self.op == "attention" else DIM
        return math.prod(self.shape[:2]) * width * jnp.dtype(self.dtype).itemsize

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Job":
        fields = json.loads(text)
        return cls(**{**fields, "shape": tuple(fields["shape"])})


def make_program(job: Job) -> tuple[Any, tuple[Any, ...]]:
    """Return the function to compile and the shapes of its arguments."""
    forward, arguments = make_attention(job) if job.op == "attention" else make_soft_moe(job)
    x = arguments[0]

    def both(*values: Any) -> Any:
        out, pull = jax.vjp(forward, *values[:-1])
        return out, pull(values[-1])

    if job.direction == "forward":
        return forward, arguments
    if job.direction == "both" or job.implementation in ("reference", "blocked", "splash"):
        return both, (*arguments, x)
    return make_backward(job, arguments)


def make_attention(job: Job) -> tuple[Any, tuple[Any, ...]]:
    """Return attention without a mask, of [b, n, h k] as products leave it."""
    flat = (*job.shape[:2], math.prod(job.shape[2:]))

    def forward(*values: Any) -> Any:
        values = tuple(value.reshape(job.shape) for value in values)
        if job.implementation == "splash":
            return run_splash(*values).reshape(flat)
        layer: Any = attention
        return layer(*values, implementation=job.implementation).reshape(flat)

    x: Any = jax.ShapeDtypeStruct(flat, jnp.dtype(job.dtype))
    return forward, (x, x, x)


def make_soft_moe(job: Job) -> tuple[Any, tuple[Any, ...]]:
    """Return the layer with all its parameters."""
    batch, tokens, experts, slots, width = job.shape
    shapes = ((DIM, experts, slots), (experts, DIM, width), (experts, width))
    shapes += ((experts, width, DIM), (experts, DIM))
    x: Any = jax.ShapeDtypeStruct((batch, tokens, DIM), jnp.dtype(job.dtype))

    def forward(*values: Any) -> Any:
        layer: Any = soft_moe
        return layer(*values, implementation=job.implementation)

    return forward, (x, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))


def make_backward(job: Job, arguments: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """Return the backward pass alone: what the forward pass kept comes from HBM."""
    x = arguments[0]
    if job.op == "soft_moe":
        choice = fused_soft_moe.choose_soft_moe(
            job.implementation, KernelOptions(), (), *arguments, None
        )
        forward = functools.partial(fused_soft_moe.forward, choice, keep=True)
        kept = jax.eval_shape(forward, *arguments, None)[1]
        backward = functools.partial(fused_soft_moe.backward, choice)
        return lambda *values: backward(*values, None), (x, kept, *arguments)
    heads: Any = jax.ShapeDtypeStruct(job.shape, x.dtype)
    choice = fused_attention.choose_attention(
        job.implementation, (heads, heads, heads, None), (), None, False
    )
    batch, tokens, count, _ = job.shape
    log_sum = jax.ShapeDtypeStruct((batch, count, tokens), jnp.float32)

    def pull(*values: Any) -> Any:
        *arrays, out, dout = (value.reshape(job.shape) for value in values[:-1])
        grads = fused_attention.backward(choice, dout, (out, values[-1]), *arrays, None)
        return tuple(grad.reshape(x.shape) for grad in grads)

    return pull, (*arguments, x, x, log_sum)


def run_splash(query: Any, key: Any, value: Any) -> Any:
    """Run JAX's own kernel for TPU, at the block sizes that it takes: tokens padded to them."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, tokens, heads, width = query.shape
    block = min(range(128, 769, 128), key=lambda size: (-(-tokens // size) * size, -size))
    padded = -(-tokens // block) * block
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks: Any = {f"block_{name}": block for name in names}
    sizes = kernel.BlockSizes(**blocks)
    mask = masks.MultiHeadMask([masks.FullMask((padded, padded))] * heads)
    run = kernel.make_splash_mha(mask=mask, head_shards=1, q_seq_shards=1, block_sizes=sizes)
    inside = (jnp.arange(padded) < tokens).astype(jnp.int32)
    segments = kernel.SegmentIds(inside, inside) if padded > tokens else None
    query, key, value = (
        jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, padded - tokens), (0, 0)))
        for x in (query * width**-0.5, key, value)
    )
    out: Any = jax.vmap(lambda q, k, v: run(q, k, v, segment_ids=segments))(query, key, value)
    return jnp.swapaxes(out[:, :, :tokens], 1, 2)
