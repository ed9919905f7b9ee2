"""Copies of a sound in another part of a set are found; other sounds are not taken for copies."""

import io
import os
import time

import numpy as np
import pytest
import soundfile
import soxr

from aatjax.audio.decode import as_waveform
from aatjax.data.duplicates import find_duplicates, fingerprint_clips, hash_audio, hash_samples
from aatjax.data.formats import open_source
from aatjax.data.source import Clip, Reader, Source
from aatjax.data.synthetic.synthesize import SOUNDS, synthesize
from aatjax.errors import DataError, UsageError


def encoded(samples, format, subtype, gain=1.0):
    """Through a lossy coder and back."""
    file = io.BytesIO()
    soundfile.write(file, gain * samples / 32768, 16000, format=format, subtype=subtype)
    file.seek(0)
    return as_waveform(soundfile.read(file, dtype="float32")[0], 16000)


def quieter(samples, gain):
    return np.rint(gain * samples).astype(np.int16)


def telephone(samples):
    """To 8 kHz and back."""
    narrow = soxr.resample(samples.astype(np.float32) / 32768, 16000, 8000)
    return as_waveform(narrow, 8000)


def padded(samples):
    return np.concatenate([np.zeros(160, np.int16), samples, np.zeros(5000, np.int16)])


CHANGES = {
    "ogg": lambda x: encoded(x, "OGG", "VORBIS"),
    "mp3": lambda x: encoded(x, "MP3", "MPEG_LAYER_III"),
    "-6 dB, ogg": lambda x: encoded(x, "OGG", "VORBIS", gain=0.5),
    "-6 dB": lambda x: quieter(x, 0.5),
    "-20 dB": lambda x: quieter(x, 0.1),
    "8 kHz": telephone,
    "10 ms late": padded,
    "10 ms cut": lambda x: x[160:],
}


def search(sounds, parts, **options):
    """Duplicates among samples; ids are the indices."""
    ids = [str(i) for i in range(len(sounds))]
    hashes = [hash_audio(x) for x in sounds]
    return find_duplicates(ids, parts, hashes, [hash_samples(x) for x in sounds], **options)


def between(duplicates):
    return [(d.first, d.second) for d in duplicates]


def random_bits(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 32), np.uint8)


def listed(bits):
    return [row.tobytes() for row in bits]


def flipped(row, count, seed):
    """The hash with `count` bits turned over."""
    where = np.random.default_rng(seed).choice(256, count, replace=False)
    bits = np.unpackbits(row)
    bits[where] ^= 1
    return np.packbits(bits)


class TestSounds:
    def test_an_exact_copy_in_another_part_is_found(self):
        sounds = [synthesize("bark", k) for k in range(4)]
        found = search([*sounds, sounds[2]], ["train"] * 4 + ["test"])
        assert between(found) == [("2", "4")]
        assert found[0].exact and found[0].distance == 0 and found[0].parts == ("train", "test")

    def test_zeros_at_the_ends_do_not_hide_an_exact_copy(self):
        sound = synthesize("bark", 0)
        (found,) = search([sound, padded(sound)], ["1", "2"])
        assert found.exact and found.distance == 0

    @pytest.fixture(scope="class")
    def sounds(self):
        """One clip of every class, with its hashes."""
        sounds = [synthesize(name, 0) for name in SOUNDS]
        return sounds, [hash_audio(x) for x in sounds], [hash_samples(x) for x in sounds]

    @pytest.mark.parametrize("change", CHANGES)
    def test_a_changed_copy_is_found(self, sounds, change):
        sounds, hashes, exact = sounds
        changed = [CHANGES[change](sound) for sound in sounds]
        count = len(sounds)
        found = find_duplicates(
            [str(i) for i in range(2 * count)],
            ["train"] * count + ["test"] * count,
            [*hashes, *map(hash_audio, changed)],
            [*exact, *map(hash_samples, changed)],
        )
        right = {(str(i), str(i + count)) for i in range(count)}
        assert set(between(found)) <= right
        assert len(found) >= 0.93 * count
        assert change == "10 ms late" or not any(d.exact for d in found)

    def test_clips_of_one_class_are_not_copies_of_each_other(self):
        sounds = [synthesize(name, seed) for name in SOUNDS for seed in range(3)]
        assert search(sounds, [str(i % 4) for i in range(len(sounds))]) == []

    def test_stationary_noise_and_tones_of_one_kind_are_not_copies_of_each_other(self):
        rng = np.random.default_rng(0)
        time = np.arange(32000) / 16000
        hiss = [rng.normal(0, 2000, 32000).astype(np.int16) for _ in range(20)]
        hum = [
            (8000 * np.sin(2 * np.pi * (rng.uniform(80, 3000) * time + rng.random()))) for _ in hiss
        ]
        noisy = [(x / 4 + rng.normal(0, 30, x.size)).astype(np.int16) for x in hum]
        click = [np.zeros(32000, np.int16) for _ in hiss]
        for sound in click:
            sound[rng.integers(1000, 30000, 3)] = rng.integers(5000, 30000, 3)
        sounds = [*hiss, *(x.astype(np.int16) for x in hum), *noisy, *click]
        assert search(sounds, [str(i % 5) for i in range(len(sounds))]) == []

    def test_clean_beeps_of_one_rhythm_are_not_copies_of_each_other(self):
        rng = np.random.default_rng(0)
        beep = np.arange(2000) / 16000
        sounds = np.zeros((40, 32000), np.int16)
        for sound in sounds:
            for start in range(0, 32000, 8000):
                sound[start : start + 2000] = 5000 * np.sin(rng.uniform(1000, 19000) * beep)
        assert search(list(sounds), [str(i % 5) for i in range(len(sounds))]) == []

    def test_copies_within_a_part_or_outside_all_parts_are_not_reported(self):
        sound = synthesize("bark", 0)
        assert search([sound, sound, quieter(sound, 0.5)], ["test"] * 3) == []
        assert search([sound, sound], ["test", None]) == []

    @pytest.mark.parametrize(
        "silence",
        [
            np.zeros(32000, np.int16),
            np.zeros(0, np.int16),
            np.full(32000, 77, np.int16),
            np.eye(1, 32000, 99, dtype=np.int16)[0],
            np.tile(np.array([0, 5], np.int16), 100),
        ],
        ids=["zeros", "empty", "constant", "one sample", "a few samples"],
    )
    def test_silence_matches_nothing(self, silence):
        assert hash_audio(silence) is None and hash_samples(silence) == ""
        assert search([silence, silence], ["train", "test"]) == []

    def test_an_unchanging_or_very_short_sound_has_an_exact_copy_only(self):
        tone = (8000 * np.sin(np.arange(16000) * (2 * np.pi / 32))).astype(np.int16)
        short = synthesize("bark", 0)[8000:9000]
        for sound in (tone, short):
            assert hash_audio(sound) is None
            (found,) = search([sound, sound.copy()], ["1", "2"])
            assert found.exact and found.distance == 0

    def test_the_hash_has_the_same_bits_everywhere_and_fits_long_clips(self):
        sound = synthesize(SOUNDS[0], 3, seconds=20)
        bits = hash_audio(sound)
        assert bits is not None and len(bits) == 32 and bits == hash_audio(sound.copy())
        near = hash_audio(encoded(sound, "OGG", "VORBIS"))
        assert near is not None
        differ = np.unpackbits(np.frombuffer(bits, np.uint8) ^ np.frombuffer(near, np.uint8))
        assert differ.mean() < 0.2


class TestSearch:
    def test_planted_pairs_among_20000_random_hashes(self):
        bits = random_bits(20_000)
        right = set()
        for k in range(200):  # up to 40 of 256 bits, less than a fifth
            bits[100 * k + 50] = flipped(bits[100 * k + 1], k % 41, seed=k)
            right.add((str(100 * k + 1), str(100 * k + 50)))
        ids = [str(i) for i in range(len(bits))]
        parts = ["a" if i % 2 else "b" for i in range(len(bits))]
        start = time.monotonic()
        found = find_duplicates(ids, parts, listed(bits), [""] * len(bits))
        assert time.monotonic() - start < 20
        assert set(between(found)) == right
        distances = [d.distance for d in found]
        assert distances == sorted(distances)
        assert {round(256 * x) for x in distances} == set(range(41))

    @pytest.mark.parametrize(("turned", "count"), [(51, 1), (52, 0)])
    def test_the_threshold_is_a_share_of_the_bits(self, turned, count):
        bits = random_bits(1)[0]
        hashes = listed([bits, flipped(bits, turned, seed=0)])
        found = find_duplicates(["a", "b"], ["1", "2"], hashes, ["", ""], threshold=0.2)
        assert [d.distance for d in found] == [turned / 256] * count
        assert find_duplicates(["a", "b"], ["1", "2"], hashes, ["", ""], threshold=0.1) == []
        exactly = find_duplicates(["a", "b"], ["1", "2"], hashes[:1] * 2, ["", ""], threshold=0)
        assert [d.distance for d in exactly] == [0] and not exactly[0].exact

    @pytest.mark.parametrize("exact", ["", "5f"])
    def test_thousands_of_equal_clips_are_each_reported_once(self, exact):
        count = 5000
        ids = [str(i) for i in range(count)]
        parts = ["train"] * (count - 10) + ["test"] * 10
        start = time.monotonic()
        found = find_duplicates(ids, parts, listed(random_bits(1)) * count, [exact] * count)
        assert time.monotonic() - start < 10
        assert {d.first for d in found} | {d.second for d in found} == set(ids)
        assert len(found) == len(set(between(found))) < count + 10
        assert all(d.parts == ("train", "test") and d.exact == bool(exact) for d in found)

    def test_thousands_of_nearly_equal_clips_end_in_reasonable_time_and_size(self):
        count = 1000
        bits = random_bits(1)[0]
        hashes = listed(flipped(bits, 8, seed=i) for i in range(count))
        ids = [str(i) for i in range(count)]
        parts = [str(i % 2) for i in range(count)]
        start = time.monotonic()
        found = find_duplicates(ids, parts, hashes, [""] * count)
        assert time.monotonic() - start < 60
        assert {d.first for d in found} | {d.second for d in found} == set(ids)
        assert len(found) <= 16 * count

    def test_few_equal_clips_are_reported_pair_by_pair(self):
        hashes = listed(random_bits(1)) * 4
        found = find_duplicates(list("abcd"), ["1", "2", "1", "3"], hashes, [""] * 4)
        assert between(found) == [("a", "b"), ("a", "d"), ("b", "c"), ("b", "d"), ("c", "d")]

    def test_equal_and_near_clips_of_several_parts_are_joined(self):
        bits = random_bits(3)
        hashes = listed([bits[0], bits[0], flipped(bits[0], 20, seed=0), bits[1], bits[2]])
        found = find_duplicates(list("abcde"), ["1", "2", "1", "2", "1"], hashes, [""] * 5)
        assert between(found) == [("a", "b"), ("b", "c")]
        assert [round(256 * d.distance) for d in found] == [0, 20]

    def test_nothing_to_compare(self):
        assert find_duplicates([], [], [], []) == []
        assert find_duplicates(["a", "b"], ["1", "2"], [None, None], ["", ""]) == []

    def test_arguments_that_cannot_be(self):
        with pytest.raises(UsageError, match="2 ids, 1 parts"):
            find_duplicates(["a", "b"], ["1"], [None, None], ["", ""])
        with pytest.raises(UsageError, match=r"threshold is 0\.5"):
            find_duplicates(["a"], ["1"], [None], [""], threshold=0.5)
        with pytest.raises(UsageError, match="32 bytes"):
            find_duplicates(["a"], ["1"], [b"short"], [""])


class Held(Reader):
    """Samples kept in memory."""

    def __init__(self, sounds):
        self.sounds = sounds

    def read(self, clip):
        if clip.id not in self.sounds:
            raise DataError(f"{clip.id}: is lost")
        return self.sounds[clip.id]


def held(sounds, lost=()):
    clips = [Clip(id, (0,), None) for id in (*sounds, *lost)]
    return Source(clips, ["x"], name="held", reader=Held(sounds))


class TestFingerprints:
    def test_every_clip_is_described_in_order(self):
        sounds = {name: synthesize(name, 1, seconds=0.5) for name in SOUNDS[:6]}
        sounds["silence"] = np.zeros(8000, np.int16)
        seen = []
        hashes, exact = fingerprint_clips(held(sounds), progress=lambda *state: seen.append(state))
        assert hashes == [hash_audio(x) for x in sounds.values()] and hashes[-1] is None
        assert exact == [hash_samples(x) for x in sounds.values()] and exact[-1] == ""
        assert seen == [("compare", k, 7) for k in range(1, 8)]
        assert (hashes, exact) == fingerprint_clips(held(sounds), workers=1)

    def test_a_clip_that_cannot_be_read_is_named(self):
        with pytest.raises(DataError, match="gone: is lost"):
            fingerprint_clips(held({"there": synthesize("bark", 0)}, lost=["gone"]))

    def test_at_least_one_worker_is_needed(self):
        with pytest.raises(UsageError, match="workers is 0"):
            fingerprint_clips(held({"a": synthesize("bark", 0)}), workers=0)


@pytest.mark.parametrize("name", ["speech_commands_v0.01", "esc10"])
def test_real_sounds_are_distinguished_and_their_copies_found(real_audio, name):
    source = open_source(real_audio / name)
    source = source.subset(range(0, len(source), 8))
    hashes, exact = fingerprint_clips(source, workers=os.cpu_count() or 1)
    ids = [clip.id for clip in source.clips]
    everywhere = find_duplicates(ids, ids, hashes, exact)
    assert everywhere == []
    few = range(0, len(source), 4)
    copies = [CHANGES["-6 dB, ogg"](source.waveform(i)) for i in few]
    found = find_duplicates(
        [*ids, *(f"copy of {ids[i]}" for i in few)],
        ["train"] * len(ids) + ["test"] * len(few),
        [*hashes, *map(hash_audio, copies)],
        [*exact, *map(hash_samples, copies)],
    )
    assert all(d.second == f"copy of {d.first}" for d in found)
    assert len(found) >= 0.9 * len(few)
