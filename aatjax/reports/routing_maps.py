"""Maps of the routing weights of a mixture over time, frequency and classes."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float

from aatjax.audio.fbank import HOP, LOW_HZ, hertz_to_mel
from aatjax.audio.frontend import FrontEnd
from aatjax.data.pipeline import make_eval_batches
from aatjax.data.source import Source
from aatjax.errors import UsageError
from aatjax.io.progress import track
from aatjax.models.ast import AST
from aatjax.models.config import ASTConfig
from aatjax.petl import routing_weights

COLLAPSED = 0.5  # normalised entropy of the use of the experts below which they have collapsed
STARVED = 0.1  # use below which an expert has next to no effect; 1 is a fair share
ALIKE = 0.99  # mean cosine between the slots of a clip above which all experts get one vector
FLAT = 0.99  # normalised dispatch entropy above which slots are plain means over the tokens
PEAK = 1.25  # peak over mean below which a profile has no band
PREFERRED = 1.1  # use in a class over use in all clips from which an expert prefers the class
MOST_CLASSES = 100  # with maps by class
BATCH = 16


@dataclasses.dataclass(frozen=True)
class RoutingIssue:
    """An anomaly of a mixture.

    Attributes:
        kind: `collapsed`, `starved`, `alike` or `flat`.
        severity: `warning`, or `note` where it does no harm by itself.
        text: one sentence.
    """

    kind: str
    severity: str
    text: str


@dataclasses.dataclass(frozen=True)
class ExpertMap:
    """Routing weights of one expert of one mixture, averaged over clips.

    Weights are relative to uniform routing: 1 is the mean over tokens (reading) or experts
    (writing). Grids are `[rows, columns]`, lowest frequency and earliest time first, averaged over
    the expert's slots.

    Attributes:
        use: its share of what all tokens take, times the number of experts.
        by_class: the same in the clips of each class, `[c]`; NaN for a class without clips.
        read: dispatch weights over the patches; None for mixtures without slots.
        write: combine weights, or gates, over the patches.
        read_special, write_special: the same of the CLS and DIST tokens.
        read_by_class, write_by_class: the grids for the clips of each class, `[c, rows, columns]`;
            None for more than `MOST_CLASSES` classes.
        entropy: of its dispatch over the tokens, 0 (one token) to 1 (uniform); None without.
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
class MixtureMap:
    """Routing weights of one mixture.

    Attributes:
        path: its path in the model.
        block: number of its block, from 0.
        experts: its experts.
        balance: normalised entropy of the use of the experts, 0 (collapsed on one) to 1.
        combine_entropy: of what a token takes, over experts and slots, 0 to 1.
        similarity: mean cosine between the slots of a clip; None without slots or with one.
        issues: its anomalies.
    """

    path: str
    block: int
    experts: tuple[ExpertMap, ...]
    balance: float
    combine_entropy: float
    similarity: float | None
    issues: tuple[RoutingIssue, ...]


@dataclasses.dataclass(frozen=True)
class RoutingMap:
    """Routing weights of all mixtures of a model over some clips.

    Attributes:
        classes: class names.
        clips: number of clips.
        mixtures: in the model's order.
        special: names of the tokens before the patches.
        low, high: frequencies in Hz that each row of patches spans, `[rows]`.
        start, end: seconds that each column spans, `[columns]`.
    """

    classes: tuple[str, ...]
    clips: int
    mixtures: tuple[MixtureMap, ...]
    special: tuple[str, ...]
    low: Float[np.ndarray, " r"]
    high: Float[np.ndarray, " r"]
    start: Float[np.ndarray, " k"]
    end: Float[np.ndarray, " k"]

    @property
    def issues(self) -> list[RoutingIssue]:
        """Those of all mixtures."""
        return [issue for mixture in self.mixtures for issue in mixture.issues]

    def find_band(self, grid: Float[np.ndarray, "r k"]) -> tuple[float, float] | None:
        """Lowest and highest Hz of the rows around the peak of at least half its height.

        None where no row stands out: the peak is below 1.25 times the mean, or all rows are high.
        """
        rows = _find_peak(grid.mean(axis=1))
        return None if rows is None else (float(self.low[rows[0]]), float(self.high[rows[1]]))

    def find_span(self, grid: Float[np.ndarray, "r k"]) -> tuple[float, float] | None:
        """First and last second of the columns around the peak; None where none stands out."""
        columns = _find_peak(grid.mean(axis=0))
        if columns is None:
            return None
        return float(self.start[columns[0]]), float(self.end[columns[1]])

    def rank_classes(self, expert: ExpertMap, most: int = 3) -> list[tuple[str, float]]:
        """Classes in which an expert is used at least a tenth more, with use over its mean use."""
        lift = np.nan_to_num(expert.by_class / max(expert.use, 1e-12))
        order = np.argsort(-lift, kind="stable")[:most]
        return [(self.classes[i], float(lift[i])) for i in order if lift[i] >= PREFERRED]


def map_routing(
    model: AST,
    source: Source,
    frontend: FrontEnd,
    *,
    per_class: int = 8,
    most: int = 200,
    batch_size: int = BATCH,
) -> RoutingMap:
    """Average the routing weights of every mixture over labelled clips, and by class.

    Of Soft-MoA (arXiv 2402.00828, sec. 3.2) the dispatch weights, a softmax over the tokens for
    each slot, are what an expert reads; the combine weights, a softmax over all slots for each
    token, where it writes. Dense and top-k mixtures have gates only, which count as writing.

    Args:
        model: a model adapted with SoftMoA, DenseMoA or TopKMoA; not changed.
        source: clips with the classes of the model's head.
        frontend: the front end that the model was trained with.
        per_class: clips taken of each class, the first ones.
        most: clips taken in total.
        batch_size: clips per step.

    Raises:
        UsageError: the model has no mixture, or the classes differ.
    """
    if not routing_weights.has_mixtures(model):
        name = getattr(model.method, "name", "a model without a method")
        raise UsageError(f"{name} has no mixture of adapters, so there is no routing to map")
    if len(source.classes) != model.config.num_classes:
        raise UsageError(
            f"{source.name} has {len(source.classes)} classes, the model's head "
            f"{model.config.num_classes}: give clips of the model's classes"
        )
    clips = take_per_class(source, per_class, most)
    sums = _sum_clips(model, clips, frontend, batch_size)
    config = model.config
    frame = HOP / frontend.rate
    start = np.arange(config.grid[1]) * config.stride[1] * frame
    low, high = find_row_frequencies(config, frontend.rate)
    return RoutingMap(
        classes=source.classes,
        clips=len(clips),
        mixtures=tuple(
            _map_mixture(path, sums[path], config) for path in sorted(sums, key=_sort_key)
        ),
        special=("CLS", "DIST")[: config.num_prefix],
        low=low,
        high=high,
        start=start,
        end=start + config.patch[1] * frame,
    )


def take_per_class(source: Source, per_class: int, most: int) -> Source:
    """The first `per_class` clips of each class, at most `most`, taken from the classes in turn."""
    members: dict[int, list[int]] = {}
    for index, clip in enumerate(source.clips):
        members.setdefault(clip.label[0] if clip.label else -1, []).append(index)
    turns = [
        indices[turn]
        for turn in range(per_class)
        for indices in members.values()
        if turn < len(indices)
    ]
    return source.subset(sorted(turns[:most]))


def find_row_frequencies(
    config: ASTConfig, rate: int
) -> tuple[Float[np.ndarray, " r"], Float[np.ndarray, " r"]]:
    """Lowest and highest Hz of each row of patches: the outer edges of its mel filters."""
    low, high = hertz_to_mel(np.array([LOW_HZ, rate / 2]))
    step = (high - low) / (config.mels + 1)
    first = np.arange(config.grid[0]) * config.stride[0]
    last = first + config.patch[0] - 1
    return mel_to_hertz(low + step * first), mel_to_hertz(low + step * (last + 2))


def mel_to_hertz(mel: Float[np.ndarray, " r"]) -> Float[np.ndarray, " r"]:
    """Inverse of `audio.fbank.hertz_to_mel`."""
    return 700.0 * np.expm1(mel / 1127.0)


def _sort_key(path: str) -> tuple[int, str]:
    return _parse_block(path), path


def _parse_block(path: str) -> int:
    found = re.match(r"blocks/(\d+)(/|$)", path)
    return int(found.group(1)) if found else -1


def _sum_clips(
    model: AST, clips: Source, frontend: FrontEnd, batch_size: int
) -> dict[str, dict[str, np.ndarray]]:
    """Sums over clips of the weights of every mixture, by its path."""
    graphdef, state = nnx.split(routing_weights.make_probe(model))
    keep = model.config.num_classes <= MOST_CLASSES

    @jax.jit
    def run(
        state: Any, x: jax.Array, valid: jax.Array, weight: jax.Array, target: jax.Array
    ) -> dict[str, dict[str, jax.Array]]:
        found = routing_weights.run_probe(nnx.merge(graphdef, state, copy=True), x, valid)
        label = target * weight[:, None]
        return {path: _sum_weights(arrays, weight, label, keep) for path, arrays in found.items()}

    sums: dict[str, dict[str, np.ndarray]] = {}
    batches = make_eval_batches(clips, frontend, batch_size=batch_size, threads=0)
    for batch in track(batches, "routing", len(clips), batch_size):
        length = jnp.asarray(batch["length"])
        x = frontend(jnp.asarray(batch["audio"]), length)
        weight, target = jnp.asarray(batch["weight"]), jnp.nan_to_num(batch["target"])
        found = jax.device_get(run(state, x, frontend.count_frames(length), weight, target))
        for path, arrays in found.items():
            total = sums.setdefault(path, {})
            for name, array in arrays.items():
                total[name] = total.get(name, 0.0) + np.asarray(array, np.float64)
    return sums


def _sum_weights(
    arrays: dict[str, jax.Array], weight: jax.Array, label: jax.Array, keep: bool
) -> dict[str, jax.Array]:
    """Sums over a batch `b` of one mixture's weights, in total and by class (`c`)."""
    combine = arrays["combine"]
    gates = combine if combine.ndim == 3 else combine.sum(axis=3)
    present = gates.sum(axis=2)  # 0 where a token is masked, else 1
    taken = routing_weights.measure_entropy(combine, tuple(range(2, combine.ndim)))
    sums = {
        "clips": weight.sum(),
        "class_clips": label.sum(axis=0),
        "write": jnp.einsum("b,bne->en", weight, gates),
        "present": weight @ present,
        "class_use": jnp.einsum("bc,bne->ce", label, gates),
        "combine_entropy": weight @ ((taken * present).sum(axis=1) / present.sum(axis=1)),
    }
    if keep:
        sums["class_write"] = jnp.einsum("bc,bne->cen", label, gates)
        sums["class_present"] = label.T @ present
    if "dispatch" in arrays:
        dispatch = arrays["dispatch"]
        sent = dispatch.mean(axis=3)
        sums["read"] = jnp.einsum("b,bne->en", weight, sent)
        if keep:
            sums["class_read"] = jnp.einsum("bc,bne->cen", label, sent)
        sums["read_entropy"] = weight @ routing_weights.measure_entropy(dispatch, (1,)).mean(axis=2)
        if dispatch.shape[2] * dispatch.shape[3] > 1:
            each = jax.vmap(lambda slots: routing_weights.measure_similarity(slots[None]))
            sums["similarity"] = weight @ each(arrays["slots"])
    return sums


def _map_mixture(path: str, sums: dict[str, np.ndarray], config: ASTConfig) -> MixtureMap:
    clips, prefix = float(sums["clips"]), config.num_prefix
    size, tokens = sums["write"].shape
    share = sums["write"].sum(axis=1) / sums["write"].sum()
    write = size * sums["write"] / np.maximum(sums["present"], 1e-12)
    read = tokens * sums["read"] / clips if "read" in sums else None
    class_write = class_read = None
    with np.errstate(invalid="ignore", divide="ignore"):
        by_class = size * sums["class_use"] / sums["class_use"].sum(axis=1, keepdims=True)
        if "class_write" in sums:
            class_write = size * sums["class_write"] / sums["class_present"][:, None]
        if "class_read" in sums:
            class_read = tokens * sums["class_read"] / sums["class_clips"][:, None, None]

    def grid(weights: np.ndarray) -> np.ndarray:
        return weights[..., prefix:].reshape(*weights.shape[:-1], *config.grid)

    experts = tuple(
        ExpertMap(
            use=float(size * share[e]),
            by_class=by_class[:, e],
            read=None if read is None else grid(read[e]),
            write=grid(write[e]),
            read_special=() if read is None else tuple(map(float, read[e, :prefix])),
            write_special=tuple(map(float, write[e, :prefix])),
            read_by_class=None if class_read is None else grid(class_read[:, e]),
            write_by_class=None if class_write is None else grid(class_write[:, e]),
            entropy=None if read is None else float(sums["read_entropy"][e] / clips),
        )
        for e in range(size)
    )
    balance = float(routing_weights.measure_entropy(jnp.asarray(share), (0,)))
    similarity = float(sums["similarity"] / clips) if "similarity" in sums else None
    return MixtureMap(
        path=path,
        block=_parse_block(path),
        experts=experts,
        balance=balance,
        combine_entropy=float(sums["combine_entropy"] / clips),
        similarity=similarity,
        issues=_find_issues(path, experts, balance, similarity),
    )


def _find_issues(
    path: str, experts: tuple[ExpertMap, ...], balance: float, similarity: float | None
) -> tuple[RoutingIssue, ...]:
    found: list[RoutingIssue] = []
    size = len(experts)
    use = [expert.use for expert in experts]
    if size > 1 and balance < COLLAPSED:
        best = int(np.argmax(use))
        text = f"collapsed: {use[best] / size:.0%} of the output is from expert {best} of {size}"
        found.append(RoutingIssue("collapsed", "warning", f"{text} (balance {balance:.2f})"))
    starved = [str(e) for e in range(size) if use[e] < STARVED]
    if starved:
        plural = "s" if len(starved) > 1 else ""
        text = f"expert{plural} {', '.join(starved)} of {size}: use below a tenth of a fair share"
        found.append(RoutingIssue("starved", "warning", text))
    if similarity is not None and similarity > ALIKE:
        text = f"all slots hold nearly the same vector (mean cosine {similarity:.3f})"
        found.append(RoutingIssue("alike", "note", text))
    entropies = [expert.entropy for expert in experts if expert.entropy is not None]
    if entropies and min(entropies) > FLAT:
        text = "every slot is nearly the mean of all tokens"
        found.append(RoutingIssue("flat", "note", text))
    return tuple(dataclasses.replace(one, text=f"{path}: {one.text}") for one in found)


def _find_peak(profile: Float[np.ndarray, " k"]) -> tuple[int, int] | None:
    """First and last place around the peak of at least half its height; None where flat."""
    peak = int(profile.argmax())
    if not profile[peak] > PEAK * profile.mean():
        return None
    high: Bool[np.ndarray, " k"] = profile >= profile[peak] / 2
    first, last = peak, peak
    while first > 0 and high[first - 1]:
        first -= 1
    while last < len(profile) - 1 and high[last + 1]:
        last += 1
    return None if last - first == len(profile) - 1 else (first, last)
