"""Maps of routing weights: on sounds with known answers, and against the weights themselves."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_model import tiny_config

from aatjax import petl, surgery
from aatjax.audio.fbank import hertz_to_mel, mel_bank
from aatjax.audio.frontend import FrontEnd
from aatjax.data.source import Clip, Reader, Source
from aatjax.errors import UsageError
from aatjax.models.ast import AST, ASTConfig
from aatjax.reports.routing_maps import (
    RoutingMap,
    find_row_frequencies,
    map_routing,
    mel_to_hertz,
    take_per_class,
)

RATE = 16000
HERTZ = (400.0, 4000.0)
CLASSES = ("low", "high", "never")
FRONTEND = FrontEnd(frames=98)
TINY = tiny_config()


class Tones(Reader):
    """A tone of the class's frequency in a little noise; clip ids are numbers."""

    seconds: float = 1.0

    def read(self, clip: Clip) -> np.ndarray:
        rng = np.random.default_rng(int(clip.id))
        time = np.arange(int((0.6 if int(clip.id) % 3 else self.seconds) * RATE)) / RATE
        wave = np.sin(2 * np.pi * HERTZ[clip.label[0]] * time + rng.uniform(0, 6))
        return (8000 * wave + 20 * rng.normal(size=len(time))).astype(np.int16)


def tones(count: int = 10) -> Source:
    clips = [Clip(str(i), (i % 2,), None) for i in range(count)]
    return Source(clips, CLASSES, name="tones", reader=Tones())


def batch_of(source: Source) -> tuple[jnp.ndarray, jnp.ndarray]:
    fitted = [FRONTEND.fit(source.waveform(i)) for i in range(len(source))]
    length = jnp.asarray([n for _, n in fitted])
    return FRONTEND(jnp.asarray(np.stack([a for a, _ in fitted])), length), FRONTEND.count_frames(
        length
    )


def adapted(method: petl.Method, **changes: object) -> AST:
    config = ASTConfig(**{**TINY.to_json(), **changes})  # pyright: ignore[reportArgumentType]
    return petl.adapt(AST(config, rngs=nnx.Rngs(0)), method)


def set_to(model: AST, name: str, value: np.ndarray) -> None:
    paths = [path for path in surgery.variables(model) if path.endswith(name)]
    assert paths
    surgery.assign(model, {path: value for path in paths}, what=name)


def adapt_to_tones(strength: float = 3.0) -> AST:
    """A model: expert 0 reads loud tokens of the low tone's row, expert 1 those of the high."""
    model = adapted(petl.SoftMoA(num_experts=2, reduction=8))
    source = tones(12)
    x, _ = batch_of(source)
    tokens = np.asarray(model.blocks[0].ln1(model.embed(x)))[:, TINY.num_prefix :]
    rows, columns = TINY.grid
    tokens = tokens.reshape(len(source), rows, columns, -1)
    low, high = find_row_frequencies(TINY, RATE)
    phi = np.zeros((TINY.dim, 2, 1), np.float32)
    for e, hertz in enumerate(HERTZ):
        row = int(np.flatnonzero((low < hertz) & (hertz < high))[0])
        loud = tokens[e::2, row, :3].reshape(-1, TINY.dim)
        rest = np.delete(tokens, row, axis=1).reshape(-1, TINY.dim)
        direction = loud.mean(axis=0) - rest.mean(axis=0)
        phi[:, e, 0] = strength * direction / np.linalg.norm(direction)
    set_to(model, "0/attn/soft_moa/phi", phi)
    return model


def test_the_bands_and_the_classes_of_known_experts_are_found() -> None:
    routing = map_routing(adapt_to_tones(), tones(12), FRONTEND)
    mixture = routing.mixtures[0]
    assert (mixture.path, mixture.block, len(mixture.experts)) == ("blocks/0/attn/soft_moa", 0, 2)
    for e, hertz in enumerate(HERTZ):
        expert = mixture.experts[e]
        assert expert.read is not None and expert.read_by_class is not None
        for grid in (expert.read, expert.read_by_class[e], expert.write_by_class[e]):
            band = routing.find_band(grid)
            assert band is not None and band[0] < hertz < band[1], (e, band)
            rows = (routing.low >= band[0]) & (routing.high <= band[1])
            assert rows.sum() <= 2
        assert expert.read.max() > 2
        preferred = routing.rank_classes(expert)
        assert preferred and preferred[0][0] == CLASSES[e]
        assert expert.by_class[e] > expert.by_class[1 - e]
        assert np.isnan(expert.by_class[2]), "no clip of the third class"
    assert not [issue for issue in mixture.issues if issue.severity == "warning"]


@pytest.mark.parametrize(
    ("method", "masked"),
    [
        (petl.SoftMoA(num_experts=3, slots=2, location="both"), False),
        (petl.SoftMoA(num_experts=3, slots=2), True),
        pytest.param(petl.DenseMoA(num_experts=3), True, marks=pytest.mark.slow),
        (petl.TopKMoA(num_experts=3, top=1), False),
        pytest.param(petl.SoftMoA(num_experts=1, as_published=True), False, marks=pytest.mark.slow),
    ],
    ids=["soft", "soft-masked", "dense-masked", "top", "published"],
)
def test_the_maps_are_the_mean_of_the_weights(method: petl.Method, masked: bool) -> None:
    model = adapted(method, mask_padding=masked)
    source = tones(10)
    routing = map_routing(model, source, FRONTEND, batch_size=4)  # the last batch is filled up
    x, valid = batch_of(source)
    expected = petl.routing(model, x, valid)
    assert [mixture.path for mixture in routing.mixtures] == sorted(expected)
    classes = np.arange(10) % 2
    for mixture in routing.mixtures:
        weights = expected[mixture.path]
        gates = weights.combine if weights.dispatch is None else weights.combine.sum(axis=3)
        size = gates.shape[2]
        use = weights.use
        np.testing.assert_allclose([e.use for e in mixture.experts], size * use, rtol=1e-4)
        present = gates.sum(axis=(0, 2))
        for e, expert in enumerate(mixture.experts):
            write = size * gates[..., e].sum(axis=0) / present
            np.testing.assert_allclose(expert.write.ravel(), write[2:], rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(expert.write_special, write[:2], rtol=1e-4, atol=1e-6)
            mine = gates[classes == 1]
            part = size * mine[..., e].sum() / mine.sum()
            np.testing.assert_allclose(expert.by_class[1], part, rtol=1e-4, atol=1e-6)
            if weights.dispatch is None:
                assert expert.read is None and expert.entropy is None
                continue
            tokens = gates.shape[1]
            sent = weights.dispatch[:, :, e].mean(axis=2)
            assert expert.read is not None and expert.read_by_class is not None
            np.testing.assert_allclose(expert.read.ravel(), tokens * sent.mean(0)[2:], rtol=1e-4)
            total = expert.read.sum() + sum(expert.read_special)
            assert total == pytest.approx(tokens, rel=1e-4), "dispatch sums to one over the tokens"
            by_class = tokens * sent[classes == 0].mean(axis=0)[2:]
            np.testing.assert_allclose(expert.read_by_class[0].ravel(), by_class, rtol=1e-4)
    figures = petl.diagnose_routing(model, x, valid)
    assert np.mean([s.balance for s in routing.mixtures]) == pytest.approx(
        figures["balance"], abs=1e-5
    )
    if not masked:
        entropy = np.mean([s.combine_entropy for s in routing.mixtures])
        assert entropy == pytest.approx(figures["combine_entropy"], abs=1e-5)
    if "slot_similarity" in figures and routing.mixtures[0].similarity is not None:
        alike = np.mean([s.similarity for s in routing.mixtures])
        assert alike == pytest.approx(figures["slot_similarity"], abs=1e-5)


def test_a_collapsed_router_is_flagged() -> None:
    model = adapted(petl.DenseMoA(num_experts=4))
    assert not map_routing(model, tones(4), FRONTEND).issues
    set_to(model, "dense_moa/b_router", np.array([0.0, 9, 0, 0], np.float32))
    issues = map_routing(model, tones(4), FRONTEND).mixtures[0].issues
    assert [issue.kind for issue in issues] == ["collapsed", "starved"]
    assert all(issue.severity == "warning" for issue in issues)
    assert "expert 1 of 4" in issues[0].text and "experts 0, 2, 3" in issues[1].text


def test_identical_slots_are_noted() -> None:
    model = adapted(petl.SoftMoA(num_experts=3))
    set_to(model, "soft_moa/phi", np.zeros((32, 3, 1), np.float32))
    mixture = map_routing(model, tones(4), FRONTEND).mixtures[0]
    assert [issue.kind for issue in mixture.issues] == ["alike", "flat"]
    assert all(issue.severity == "note" for issue in mixture.issues)
    for expert in mixture.experts:
        assert expert.read is not None
        np.testing.assert_allclose(expert.read, 1, atol=1e-4)
        np.testing.assert_allclose(expert.write, 1, atol=1e-4)


def test_a_soft_mixture_with_one_writing_expert_is_flagged() -> None:
    model = adapted(petl.SoftMoA(num_experts=3))
    set_to(model, "ln1/scale", np.zeros(32, np.float32))
    set_to(model, "ln1/bias", np.ones(32, np.float32))
    phi = np.zeros((32, 3, 1), np.float32)
    phi[:, 2] = 0.3
    set_to(model, "soft_moa/phi", phi)
    kinds = {issue.kind for issue in map_routing(model, tones(4), FRONTEND).mixtures[0].issues}
    assert {"collapsed", "starved"} <= kinds


def test_rows_span_the_frequencies_of_their_filters() -> None:
    low, high = find_row_frequencies(TINY, RATE)
    bank = mel_bank(RATE, 128) > 0
    for row in range(TINY.grid[0]):
        filters = bank[:, 16 * row : 16 * row + 16].any(axis=1)
        bins = np.flatnonzero(filters) * RATE / 512
        assert low[row] <= bins[0] + 1e-6 and bins[-1] <= high[row] + 1e-6
        assert bins[0] - low[row] < 32 and high[row] - bins[-1] < 32  # less than a bin
    hertz = np.array([20.0, 440.0, 8000.0])
    np.testing.assert_allclose(mel_to_hertz(hertz_to_mel(hertz)), hertz)


def test_bands_and_spans() -> None:
    rows, columns = 4, 5
    edges = np.arange(5.0)
    routing = RoutingMap((), 0, (), (), edges[:4], edges[1:], np.arange(5.0), np.arange(5.0) + 1)
    grid = np.full((rows, columns), 0.1)
    grid[1:3] = 3
    assert routing.find_band(grid) == (1, 3) and routing.find_span(grid) is None
    grid = np.full((rows, columns), 0.1)
    grid[:, 4] = 3
    assert routing.find_band(grid) is None and routing.find_span(grid) == (4, 5)
    assert routing.find_band(np.ones((rows, columns))) is None


def test_clips_are_taken_in_turn_over_the_classes() -> None:
    clips = [Clip(str(i), (0 if i < 8 else 1,), None) for i in range(12)]
    source = Source(clips, CLASSES, name="s", reader=Tones())
    assert [clip.id for clip in take_per_class(source, 2, 99).clips] == ["0", "1", "8", "9"]
    assert [clip.id for clip in take_per_class(source, 8, 3).clips] == ["0", "1", "8"]


def test_a_model_without_mixtures_and_other_classes_are_refused() -> None:
    with pytest.raises(UsageError, match="lora has no mixture"):
        map_routing(adapted(petl.LoRA()), tones(), FRONTEND)
    two = Source(tones().clips, CLASSES[:2], name="two", reader=Tones())
    with pytest.raises(UsageError, match="two has 2 classes"):
        map_routing(adapted(petl.SoftMoA()), two, FRONTEND)


def test_the_model_is_not_changed() -> None:
    model = adapted(petl.SoftMoA(num_experts=2))
    before = set(surgery.variables(model))
    map_routing(model, tones(4), FRONTEND)
    assert set(surgery.variables(model)) == before
