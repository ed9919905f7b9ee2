"""The atlas of the experts: on sounds whose answer is known, and against the weights themselves."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aatjax import petl, surgery
from aatjax.audio.fbank import hertz_to_mel, mel_bank
from aatjax.audio.frontend import FrontEnd
from aatjax.data.source import Clip, Reader, Source
from aatjax.errors import UsageError
from aatjax.models.ast import AST, ASTConfig
from aatjax.reports.routing_maps import Atlas, atlas, choose, mel_to_hertz, row_hertz

RATE = 16000
HERTZ = (400.0, 4000.0)
CLASSES = ("low", "high", "never")
FRONTEND = FrontEnd(frames=98)
TINY = ASTConfig(
    dim=32,
    depth=1,
    heads=2,
    mlp_dim=48,
    stride=(16, 16),
    frames=98,
    num_classes=3,
    pool="mean_patches",
)


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


def listening(strength: float = 3.0) -> AST:
    """Expert 0 is made to read loud tokens of the low tone's row, expert 1 those of the high."""
    model = adapted(petl.SoftMoA(num_experts=2, reduction=8))
    source = tones(12)
    x, _ = batch_of(source)
    tokens = np.asarray(model.blocks[0].ln1(model.embed(x)))[:, TINY.num_prefix :]
    rows, columns = TINY.grid
    tokens = tokens.reshape(len(source), rows, columns, -1)
    low, high = row_hertz(TINY, RATE)
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
    drawn = atlas(listening(), tones(12), FRONTEND)
    site = drawn.sites[0]
    assert (site.path, site.block, len(site.experts)) == ("blocks/0/attn/soft_moa", 0, 2)
    for e, hertz in enumerate(HERTZ):
        expert = site.experts[e]
        assert expert.read is not None and expert.read_by_class is not None
        for grid in (expert.read, expert.read_by_class[e], expert.write_by_class[e]):
            band = drawn.band(grid)
            assert band is not None and band[0] < hertz < band[1], (e, band)
            rows = (drawn.low >= band[0]) & (drawn.high <= band[1])
            assert rows.sum() <= 2
        assert expert.read.max() > 2
        served = drawn.serves(expert)
        assert served and served[0][0] == CLASSES[e]
        assert expert.by_class[e] > expert.by_class[1 - e]
        assert np.isnan(expert.by_class[2]), "no clip of the third class"
    assert not [alarm for alarm in site.alarms if alarm.severity == "alarm"]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "method",
    [
        petl.SoftMoA(num_experts=3, slots=2, location="both"),
        petl.DenseMoA(num_experts=3),
        petl.TopKMoA(num_experts=3, top=1),
        petl.SoftMoA(num_experts=1, as_published=True),
    ],
    ids=lambda method: method.name,
)
def test_the_atlas_is_the_mean_of_the_weights(method: petl.Method, masked: bool) -> None:
    model = adapted(method, mask_padding=masked)
    source = tones(10)
    drawn = atlas(model, source, FRONTEND, batch_size=4)  # the last batch is filled up
    x, valid = batch_of(source)
    found = petl.routing(model, x, valid)
    assert [site.path for site in drawn.sites] == sorted(found)
    classes = np.arange(10) % 2
    for site in drawn.sites:
        weights = found[site.path]
        gates = weights.combine if weights.dispatch is None else weights.combine.sum(axis=3)
        size = gates.shape[2]
        use = weights.use
        np.testing.assert_allclose([e.use for e in site.experts], size * use, rtol=1e-4)
        seen = gates.sum(axis=(0, 2))
        for e, expert in enumerate(site.experts):
            write = size * gates[..., e].sum(axis=0) / seen
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
    assert np.mean([s.balance for s in drawn.sites]) == pytest.approx(figures["balance"], abs=1e-5)
    if not masked:
        entropy = np.mean([s.combine_entropy for s in drawn.sites])
        assert entropy == pytest.approx(figures["combine_entropy"], abs=1e-5)
    if "slot_similarity" in figures and drawn.sites[0].similarity is not None:
        alike = np.mean([s.similarity for s in drawn.sites])
        assert alike == pytest.approx(figures["slot_similarity"], abs=1e-5)


def test_a_collapsed_router_is_flagged() -> None:
    model = adapted(petl.DenseMoA(num_experts=4))
    assert not atlas(model, tones(4), FRONTEND).alarms
    set_to(model, "dense_moa/b_router", np.array([0.0, 9, 0, 0], np.float32))
    alarms = atlas(model, tones(4), FRONTEND).sites[0].alarms
    assert [alarm.kind for alarm in alarms] == ["collapsed", "starved"]
    assert all(alarm.severity == "alarm" for alarm in alarms)
    assert "expert 1 of 4" in alarms[0].text and "experts 0, 2, 3" in alarms[1].text


def test_slots_that_are_all_one_are_noted() -> None:
    model = adapted(petl.SoftMoA(num_experts=3))
    set_to(model, "soft_moa/phi", np.zeros((32, 3, 1), np.float32))
    site = atlas(model, tones(4), FRONTEND).sites[0]
    assert [alarm.kind for alarm in site.alarms] == ["alike", "flat"]
    assert all(alarm.severity == "note" for alarm in site.alarms)
    for expert in site.experts:
        assert expert.read is not None
        np.testing.assert_allclose(expert.read, 1, atol=1e-4)
        np.testing.assert_allclose(expert.write, 1, atol=1e-4)


def test_a_soft_mixture_in_which_one_expert_writes_all_is_flagged() -> None:
    model = adapted(petl.SoftMoA(num_experts=3))
    set_to(model, "ln1/scale", np.zeros(32, np.float32))
    set_to(model, "ln1/bias", np.ones(32, np.float32))
    phi = np.zeros((32, 3, 1), np.float32)
    phi[:, 2] = 0.3
    set_to(model, "soft_moa/phi", phi)
    kinds = {alarm.kind for alarm in atlas(model, tones(4), FRONTEND).sites[0].alarms}
    assert {"collapsed", "starved"} <= kinds


def test_rows_span_the_frequencies_of_their_filters() -> None:
    low, high = row_hertz(TINY, RATE)
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
    drawn = Atlas((), 0, (), (), edges[:4], edges[1:], np.arange(5.0), np.arange(5.0) + 1)
    grid = np.full((rows, columns), 0.1)
    grid[1:3] = 3
    assert drawn.band(grid) == (1, 3) and drawn.span(grid) is None
    grid = np.full((rows, columns), 0.1)
    grid[:, 4] = 3
    assert drawn.band(grid) is None and drawn.span(grid) == (4, 5)
    assert drawn.band(np.ones((rows, columns))) is None


def test_clips_are_taken_in_turn_over_the_classes() -> None:
    clips = [Clip(str(i), (0 if i < 8 else 1,), None) for i in range(12)]
    source = Source(clips, CLASSES, name="s", reader=Tones())
    assert [clip.id for clip in choose(source, 2, 99).clips] == ["0", "1", "8", "9"]
    assert [clip.id for clip in choose(source, 8, 3).clips] == ["0", "1", "8"]


def test_what_has_no_atlas_is_told() -> None:
    with pytest.raises(UsageError, match="lora has no mixture"):
        atlas(adapted(petl.LoRA()), tones(), FRONTEND)
    two = Source(tones().clips, CLASSES[:2], name="two", reader=Tones())
    with pytest.raises(UsageError, match="two has 2 classes"):
        atlas(adapted(petl.SoftMoA()), two, FRONTEND)


def test_the_model_is_left_as_it_was() -> None:
    model = adapted(petl.SoftMoA(num_experts=2))
    before = set(surgery.variables(model))
    atlas(model, tones(4), FRONTEND)
    assert set(surgery.variables(model)) == before
