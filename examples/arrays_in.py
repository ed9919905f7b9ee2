"""Arrays and batches in: sounds that are in memory, a loss and an optimiser of one's own."""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import aatjax
from aatjax import data, petl

rate, names = 22050, ("low", "high")
rng = np.random.default_rng(0)
time = np.arange(rate) / rate


def make_sounds(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy tones `[n, s]` in [-1, 1], and their classes `[n]`."""
    labels = rng.integers(0, 2, count)
    pitch = np.where(labels == 0, 300, 2000) * rng.uniform(0.8, 1.2, count)
    tones = np.sin(2 * np.pi * pitch[:, None] * time)
    return 0.3 * tones + 0.1 * rng.normal(size=tones.shape), labels


def stream() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches that are made while the model trains; any iterable will do, such as a DataLoader."""
    for _ in range(5):
        yield make_sounds(8)


def focal_loss(logits: Array, target: Array) -> Array:
    """One loss per clip `[b]` (Lin et al. 2017, eq. 4)."""
    losses = optax.softmax_cross_entropy(logits, target)
    return losses * jnp.square(1 - jnp.exp(-losses))


def show(moment: aatjax.Moment) -> None:
    """Print the loss of an epoch."""
    if moment.row is not None:
        print(f"epoch {moment.epoch}  loss {moment.row['train/loss']:.3f}")


valid = data.Arrays(*make_sounds(16), names, rate=rate)
model = aatjax.adapt(aatjax.load("embedded", num_classes=2, frames=98), petl.AAT())
run = aatjax.fit(
    model,
    data.Batches(stream, names, length=5, rate=rate),
    valid=valid,
    training=aatjax.Training(epochs=2, batch_size=8, select="best"),
    loss=focal_loss,
    optim=optax.adam(1e-3),
    on_epoch=lambda moment: print(
        moment.epoch, f"{moment.row['train/loss']:.3f}" if moment.row else ""
    ),
    show=False,
)
print(run.valid.accuracy if run.valid else None)
matrix, labels, ids = aatjax.embed(run.model, valid)
print(matrix.shape, labels.shape, ids[0])
