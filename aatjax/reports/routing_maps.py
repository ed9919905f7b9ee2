"""Where on time and frequency the experts of a mixture read and write, and whom they serve."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from aatjax.audio.fbank import HOP, LOW_HZ, hertz_to_mel
from aatjax.audio.frontend import FrontEnd
from aatjax.data.pipeline import make_eval_batches
from aatjax.data.source import Source
from aatjax.errors import UsageError
from aatjax.models.ast import AST
from aatjax.models.config import ASTConfig
from aatjax.petl import routing_weights

COLLAPSED = 0.5  # entropy of the use of the experts, over its largest: below is a collapse
STARVED = 0.1  # use of an expert over its fair share: below, it does next to nothing
ALIKE = 0.99  # mean cosine between the slots of a clip: above, all experts work on one vector
FLAT = 0.99  # entropy of the dispatch, over its largest: above, slots are means over all tokens
EVEN = 1.25  # a profile whose peak is below so many times its mean has no band
BATCH = 16


@dataclasses.dataclass(frozen=True)
class Alarm:
    """Something about a mixture that a person should know.

    Attributes:
        kind: `collapsed`, `starved`, `alike` or `flat`.
        severity: `alarm`, or `note` where it is odd but harms nothing by itself.
        text: one sentence.
    """

    kind: str
    severity: str
    text: str


@dataclasses.dataclass(frozen=True)
class Expert:
    """One expert of one mixture, over the clips of an atlas.

    Weights are given over what they would be if all were alike: 1 is neither more nor less than
    any other token (reading) or expert (writing). Grids are `[rows, columns]`, lowest frequency
    and earliest time first; of an expert's slots they are the mean.

    Attributes:
        use: what all tokens read from it.
        by_class: the same in the clips of each class, `[c]`; NaN for a class without clips.
        read: dispatch weights over the patches; None for mixtures without slots.
        write: combine weights, or gates, over the patches.
        read_special, write_special: the same of the CLS and DIST tokens.
        read_by_class, write_by_class: the grids for the clips of each class, `[c, rows, columns]`;
            None for more classes than `MOST_CLASSES`.
        entropy: of its dispatch over the tokens, 0 (one token) to 1 (all alike); None without.
    """

    use: float
    by_class: Float[np.ndarray, " c"]
    read: Float[np.ndarray, "r k"] | None
    write: Float[np.ndarray, "r k"]
    read_special: tuple[float, ...]
    write_special: tuple[float, ...]
    read_by_class: Float[np.ndarray, "c r k"] | None
    write_by_class: Float[np.ndarray, "c r k"] | None
    entropy: float | None


@dataclasses.dataclass(frozen=True)
class Site:
    """One mixture.

    Attributes:
        path: where in the model it is.
        block: number of its block, from 0.
        experts: its experts.
        balance: entropy of the use of the experts, 0 (one does all) to 1.
        combine_entropy: of what a token reads, over experts and slots, 0 to 1.
        similarity: mean cosine between the slots of a clip; None without slots or with one.
        alarms: what a person should know.
    """

    path: str
    block: int
    experts: tuple[Expert, ...]
    balance: float
    combine_entropy: float
    similarity: float | None
    alarms: tuple[Alarm, ...]


@dataclasses.dataclass(frozen=True)
class Atlas:
    """What the mixtures of a model do with some clips.

    Attributes:
        classes: class names.
        clips: number of clips.
        sites: the mixtures, in the model's order.
        special: names of the tokens before the patches.
        low, high: frequencies in Hz that each row of patches spans, `[rows]`.
        start, end: seconds that each column spans, `[columns]`.
    """

    classes: tuple[str, ...]
    clips: int
    sites: tuple[Site, ...]
    special: tuple[str, ...]
    low: Float[np.ndarray, " r"]
    high: Float[np.ndarray, " r"]
    start: Float[np.ndarray, " k"]
    end: Float[np.ndarray, " k"]

    @property
    def alarms(self) -> list[Alarm]:
        """Those of all sites."""
        return [alarm for site in self.sites for alarm in site.alarms]

    def band(self, grid: Float[np.ndarray, "r k"]) -> tuple[float, float] | None:
        """Hz from where to where a grid is high: rows around its peak of half the peak or more.

        None where none stands out: the peak is less than 1.25 times the mean, or all are high.
        """
        rows = _run(grid.mean(axis=1))
        return None if rows is None else (float(self.low[rows[0]]), float(self.high[rows[1]]))

    def span(self, grid: Float[np.ndarray, "r k"]) -> tuple[float, float] | None:
        """Seconds from when to when a grid is high; None where no column stands out."""
        columns = _run(grid.mean(axis=0))
        if columns is None:
            return None
        return float(self.start[columns[0]]), float(self.end[columns[1]])

    def serves(self, expert: Expert, most: int = 3) -> list[tuple[str, float]]:
        """The classes that use an expert most, with use there over its use in all clips.

        Only those in which it is used at least a tenth more.
        """
        lift = np.nan_to_num(expert.by_class / max(expert.use, 1e-12))
        order = [i for i in np.argsort(-lift, kind="stable")[:most] if lift[i] >= 1.1]
        return [(self.classes[i], float(lift[i])) for i in order]


MOST_CLASSES = 100


def atlas(
    model: AST,
    source: Source,
    frontend: FrontEnd,
    *,
    per_class: int = 8,
    most: int = 200,
    batch_size: int = BATCH,
) -> Atlas:
    """Averages the routing weights of every mixture over labelled clips, and per class.

    Of Soft-MoA (arXiv 2402.00828, sec. 3.2) the dispatch weights, a softmax over the tokens for
    each slot, tell where an expert reads; the combine weights, a softmax over all slots for each
    token, where it writes. Dense and top-k mixtures have gates only, which count as writing.

    Args:
        model: a model adapted with SoftMoA, DenseMoA or TopKMoA.
        source: clips with the classes of the model's head.
        frontend: the front end that the model was trained with.
        per_class: clips taken of each class, the first ones.
        most: clips taken in all.
        batch_size: clips a step.

    Raises:
        UsageError: the model has no mixture, or the classes do not fit.
    """
    if not routing_weights.has_mixtures(model):
        name = getattr(model.method, "name", "a model without a method")
        raise UsageError(f"{name} has no mixture of adapters to draw an atlas of")
    if len(source.classes) != model.config.num_classes:
        raise UsageError(
            f"{source.name} has {len(source.classes)} classes, the model's head "
            f"{model.config.num_classes}: give clips of the model's classes"
        )
    clips = choose(source, per_class, most)
    sums: dict[str, dict[str, np.ndarray]] = {}
    run = _sums(model)
    for batch in make_eval_batches(clips, frontend, batch_size=batch_size, threads=0):
        length = jnp.asarray(batch["length"])
        x = frontend(jnp.asarray(batch["audio"]), length)
        found = jax.device_get(
            run(x, frontend.count_frames(length), batch["weight"], np.nan_to_num(batch["target"]))
        )
        for site, arrays in found.items():
            into = sums.setdefault(site, {})
            for name, array in arrays.items():
                into[name] = into.get(name, 0.0) + np.asarray(array, np.float64)
    config = model.config
    frame = HOP / frontend.rate
    first = np.arange(config.grid[1]) * config.stride[1] * frame
    low, high = row_hertz(config, frontend.rate)
    order = sorted(sums, key=_position)
    return Atlas(
        classes=source.classes,
        clips=len(clips),
        sites=tuple(_site(path, sums[path], config) for path in order),
        special=("CLS", "DIST")[: config.num_prefix],
        low=low,
        high=high,
        start=first,
        end=first + config.patch[1] * frame,
    )


def choose(source: Source, per_class: int, most: int) -> Source:
    """The first `per_class` clips of each class, taken in turn over the classes up to `most`."""
    turns: dict[int, list[int]] = {}
    for index, clip in enumerate(source.clips):
        key = clip.label[0] if clip.label else -1
        turns.setdefault(key, []).append(index)
    taken = [
        indices[turn]
        for turn in range(per_class)
        for indices in turns.values()
        if turn < len(indices)
    ]
    return source.subset(sorted(taken[:most]))


def row_hertz(config: ASTConfig, rate: int) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest frequency in Hz of each row of patches: outer edges of its mel filters."""
    low, high = hertz_to_mel(np.array([LOW_HZ, rate / 2]))
    step = (high - low) / (config.mels + 1)
    first = np.arange(config.grid[0]) * config.stride[0]
    last = first + config.patch[0] - 1
    return mel_to_hertz(low + step * first), mel_to_hertz(low + step * (last + 2))


def mel_to_hertz(mel: Float[np.ndarray, " r"]) -> Float[np.ndarray, " r"]:
    """Inverse of `audio.fbank.hertz_to_mel`."""
    return 700.0 * np.expm1(mel / 1127.0)


def _position(path: str) -> tuple[int, str]:
    return _block(path), path


def _block(path: str) -> int:
    found = re.match(r"blocks/(\d+)(/|$)", path)
    return int(found.group(1)) if found else -1


def _sums(model: AST) -> Any:
    """A compiled function of a batch: sums over its clips, of every mixture."""
    probe = routing_weights.make_probe(model)
    graphdef, state = nnx.split(probe)
    keep = model.config.num_classes <= MOST_CLASSES

    @jax.jit
    def run(
        state: Any, x: jax.Array, valid: jax.Array, weight: jax.Array, target: jax.Array
    ) -> dict[str, dict[str, jax.Array]]:
        found = routing_weights.run_probe(nnx.merge(graphdef, state, copy=True), x, valid)
        label = target * weight[:, None]
        return {site: _reduced(arrays, weight, label, keep) for site, arrays in found.items()}

    return lambda *batch: run(state, *map(jnp.asarray, batch))


def _reduced(
    arrays: dict[str, jax.Array], weight: jax.Array, label: jax.Array, keep: bool
) -> dict[str, jax.Array]:
    """Sums over a batch `b` of one mixture's weights, in all (`a`) and by class (`c`)."""
    combine = arrays["combine"]
    gates = combine if combine.ndim == 3 else combine.sum(axis=3)
    seen = gates.sum(axis=2)  # 0 where a token is masked, else 1
    sums = {
        "clips": weight.sum(),
        "class_clips": label.sum(axis=0),
        "write": jnp.einsum("b,bne->en", weight, gates),
        "seen": jnp.einsum("b,bn->n", weight, seen),
        "class_use": jnp.einsum("bc,bne->ce", label, gates),
        "combine_entropy": _weighted(_token_entropy(combine, seen), weight),
    }
    if keep:
        sums["class_write"] = jnp.einsum("bc,bne->cen", label, gates)
        sums["class_seen"] = jnp.einsum("bc,bn->cn", label, seen)
    if "dispatch" in arrays:
        dispatch = arrays["dispatch"]
        sent = dispatch.mean(axis=3)
        sums["read"] = jnp.einsum("b,bne->en", weight, sent)
        if keep:
            sums["class_read"] = jnp.einsum("bc,bne->cen", label, sent)
        spread = routing_weights.measure_entropy(dispatch, (1,)).mean(axis=2)
        sums["read_entropy"] = jnp.einsum("b,be->e", weight, spread)
        if dispatch.shape[2] * dispatch.shape[3] > 1:
            alike = jax.vmap(lambda slots: routing_weights.measure_similarity(slots[None]))(
                arrays["slots"]
            )
            sums["similarity"] = _weighted(alike, weight)
    return sums


def _weighted(values: jax.Array, weight: jax.Array) -> jax.Array:
    return (values * weight).sum()


def _token_entropy(combine: jax.Array, seen: jax.Array) -> jax.Array:
    """Mean over the tokens that are seen of the entropy of what they read, `[b]`."""
    each = routing_weights.measure_entropy(combine, tuple(range(2, combine.ndim)))
    return (each * seen).sum(axis=1) / seen.sum(axis=1)


def _site(path: str, sums: dict[str, np.ndarray], config: ASTConfig) -> Site:
    clips, prefix = float(sums["clips"]), config.num_prefix
    size, tokens = sums["write"].shape
    share = sums["write"].sum(axis=1) / sums["write"].sum()
    write = size * sums["write"] / np.maximum(sums["seen"], 1e-12)[None]
    read = tokens * sums["read"] / clips if "read" in sums else None
    with np.errstate(invalid="ignore", divide="ignore"):
        of_class = size * sums["class_use"] / sums["class_use"].sum(axis=1, keepdims=True)
        class_write = class_read = None
        if "class_write" in sums:
            class_write = size * sums["class_write"] / sums["class_seen"][:, None]
        if "class_read" in sums:
            class_read = tokens * sums["class_read"] / sums["class_clips"][:, None, None]

    def grid(weights: np.ndarray) -> np.ndarray:
        return weights[..., prefix:].reshape(*weights.shape[:-1], *config.grid)

    experts = tuple(
        Expert(
            use=float(size * share[e]),
            by_class=of_class[:, e],
            read=None if read is None else grid(read[e]),
            write=grid(write[e]),
            read_special=() if read is None else tuple(map(float, read[e, :prefix])),
            write_special=tuple(map(float, write[e, :prefix])),
            read_by_class=None if class_read is None else grid(class_read[:, e]),
            write_by_class=None if class_write is None else grid(class_write[:, e]),
            entropy=float(sums["read_entropy"][e] / clips) if read is not None else None,
        )
        for e in range(size)
    )
    balance = float(routing_weights.measure_entropy(jnp.asarray(share), (0,)))
    similarity = float(sums["similarity"] / clips) if "similarity" in sums else None
    return Site(
        path=path,
        block=_block(path),
        experts=experts,
        balance=balance,
        combine_entropy=float(sums["combine_entropy"] / clips),
        similarity=similarity,
        alarms=_alarms(path, experts, balance, similarity),
    )


def _alarms(
    path: str, experts: tuple[Expert, ...], balance: float, similarity: float | None
) -> tuple[Alarm, ...]:
    found: list[Alarm] = []
    size = len(experts)
    use = [expert.use for expert in experts]
    if size > 1 and balance < COLLAPSED:
        best = int(np.argmax(use))
        found.append(
            Alarm(
                "collapsed",
                "alarm",
                f"{path}: collapsed: expert {best} of {size} gives {use[best] / size:.0%} of all "
                f"that is read (balance {balance:.2f})",
            )
        )
    starved = [str(e) for e in range(size) if use[e] < STARVED]
    if starved:
        named = f"expert{'s' if len(starved) > 1 else ''} {', '.join(starved)}"
        text = f"{path}: {named} of {size}: used for less than a tenth of a fair share"
        found.append(Alarm("starved", "alarm", text))
    if similarity is not None and similarity > ALIKE:
        text = f"{path}: all slots hold nearly the same vector (mean cosine {similarity:.3f})"
        found.append(Alarm("alike", "note", text))
    spread = [expert.entropy for expert in experts if expert.entropy is not None]
    if spread and min(spread) > FLAT:
        text = f"{path}: every slot is nearly the plain mean of all tokens"
        found.append(Alarm("flat", "note", text))
    return tuple(found)


def _run(profile: np.ndarray) -> tuple[int, int] | None:
    """First and last of the places around the peak of half the peak or more; None where even."""
    peak = int(profile.argmax())
    if not profile[peak] > EVEN * profile.mean():
        return None
    high = profile >= profile[peak] / 2
    first, last = peak, peak
    while first > 0 and high[first - 1]:
        first -= 1
    while last < len(profile) - 1 and high[last + 1]:
        last += 1
    return None if last - first == len(profile) - 1 else (first, last)
