"""A training loop of one's own, as Flax documents it: only the adapter receives updates."""

import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

import aatjax
from aatjax import data, petl

sounds = data.Synthetic(("frog", "rain", "siren"), clips=8, seconds=1.0)
model = aatjax.adapt(aatjax.load("embedded", num_classes=3, frames=98), petl.SoftMoA())
frontend = aatjax.FrontEnd(frames=98)
optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)


@nnx.jit
def step(model: aatjax.AST, optimizer: nnx.Optimizer[aatjax.AST], x: Array, y: Array) -> Array:
    """Update the model in place on log-mel `[b, t, f]` and classes `[b]`; return the loss."""

    def compute_loss(model: aatjax.AST) -> Array:
        model.train()  # batch statistics and balance losses, where a method has them
        losses = optax.softmax_cross_entropy_with_integer_labels(model(x), y)
        return losses.mean() + aatjax.surgery.sum_penalties(model)

    loss, grads = nnx.value_and_grad(compute_loss)(model)
    optimizer.update(model, grads)
    return loss


fitted = [frontend.fit(sounds.waveform(i)) for i in range(len(sounds))]
x = frontend(jnp.array([wave for wave, _ in fitted]), jnp.array([n for _, n in fitted]))
y = jnp.array([clip.label[0] for clip in sounds.clips])
losses = [float(step(model, optimizer, x, y)) for _ in range(20)]
print(f"loss {losses[0]:.4f} at first, {losses[-1]:.4f} after 20 steps")
model.eval()
print(f"accuracy on the training clips {float((model(x).argmax(-1) == y).mean()):.2f}")
aatjax.save_adapter(
    "own.safetensors", model, classes=sounds.classes, multi_label=False, frontend=frontend
)
print(aatjax.load_adapter("own.safetensors").classes)
