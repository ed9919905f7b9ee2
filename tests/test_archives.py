"""Unpacking archives: hostile and damaged ones leave nothing behind, whole ones are whole."""

import bz2
import gzip
import io
import json
import os
import stat
import struct
import tarfile
import time
import tracemalloc
import zipfile
import zlib
from collections import namedtuple

import numpy as np
import pytest

from aatjax.errors import DataError, WriteError
from aatjax.io import archives
from aatjax.io.archives import ArchiveLimits, is_archive, unpack_archive

MIB = 2**20
FILES = {
    "esc/audio/1 dog.wav": np.random.default_rng(0).bytes(3 * MIB // 2),
    "esc/audio/Ünïcode 音/鳥.flac": b"bird" * 999,
    "esc/meta.csv": b"a,b\n",
    "empty.wav": b"",
    "esc/more.zip": b"PK\x03\x04 stays as it is",
}
HIDDEN = {
    ".DS_Store": b"x",
    "esc/audio/._1 dog.wav": b"x",
    "__MACOSX/esc/a.wav": b"x",
    ".git/config": b"x",
    ".unpacked.json": b"{}",
}
TARS = ["w", "w:gz", "w:bz2", "w:xz"]


def make_zip(path, members, method=zipfile.ZIP_DEFLATED):
    """A zip of (name or ZipInfo, bytes), the same name twice if it is given twice."""
    with zipfile.ZipFile(path, "w", method) as packed:
        for name, content in members:
            if not isinstance(name, zipfile.ZipInfo):
                name, raw = zipfile.ZipInfo("x"), name
                name.filename = name.orig_filename = raw
                name.compress_type = method
            with pytest.warns() if name.filename in packed.NameToInfo else open(os.devnull):
                packed.writestr(name, content)
    return path


def make_tar(path, members, mode="w:gz", format=tarfile.PAX_FORMAT):
    """A tar of (name or TarInfo, bytes)."""
    with tarfile.TarFile.open(path, mode, format=format) as packed:  # pyright: ignore
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            packed.addfile(info, io.BytesIO(content))
    return path


def special(name, type, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = type, link
    return info


def with_mode(name, mode):
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, mode << 16
    return info


def files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != archives.MARKER
    }


@pytest.fixture
def place(tmp_path):
    """A folder to write to, inside of one in which anything else would be seen."""
    return tmp_path / "outside" / "in"


@pytest.fixture
def refuse(place):
    """Unpacks what has to be refused; returns the message once nothing was found written."""

    def refused(archive, *named, error: type[Exception] = DataError, **options):
        before = sorted(archive.parent.rglob("*"))
        with pytest.raises(error) as caught:
            unpack_archive(archive, place, **options)
        message = str(caught.value)
        assert "\n" not in message and len(message) < 700
        for word in named:
            assert word in message, message
        assert sorted(archive.parent.rglob("*")) == before
        return message

    return refused


NAMES = [
    ("../x.wav", "leads out"),
    ("a/../../x.wav", "leads out"),
    ("/tmp/aatjax-x.wav", "absolute"),
    ("//x.wav", "absolute"),
    ("C:/x.wav", "drive"),
    ("a/c:x.wav", "drive"),
    ("..\\x.wav", "backslash"),
    ("a\\x.wav", "backslash"),
    ("x" * 256, "too long"),
    ("a/" * 2050 + "x.wav", "too long"),
    ("a\n/../../x", "leads out"),
]


@pytest.mark.parametrize("make", [make_zip, make_tar])
@pytest.mark.parametrize("name, why", NAMES)
def test_names_that_lead_elsewhere_are_refused(tmp_path, refuse, make, name, why):
    archive = make(tmp_path / "a", [("good.wav", b"x"), (name, b"x")])
    refuse(archive, str(archive), f"'{name[:99]}".replace("\n", "\\n"), why, "nothing was unpacked")


def test_names_that_are_empty_or_hold_a_nul_are_refused(tmp_path, refuse):
    archive = make_zip(tmp_path / "a", [("good.wav", b"x"), ("a_b.wav", b"x")])
    archive.write_bytes(archive.read_bytes().replace(b"a_b.wav", b"a\0b.wav"))
    refuse(archive, "'a\\x00b.wav'", "NUL")
    refuse(make_zip(tmp_path / "a", [("good.wav", b"x"), ("", b"x")]), "member ''", "empty")
    refuse(make_zip(tmp_path / "a", [("good.wav", b"x"), (".", b"x")]), "'.'", "without a name")
    info = tarfile.TarInfo("t.wav")
    info.pax_headers = {"path": "a\0b.wav"}
    refuse(make_tar(tmp_path / "a", [("good.wav", b"x"), (info, b"x")]), "'a\\x00b.wav'", "NUL")
    refuse(make_tar(tmp_path / "a", [("good.wav", b"x"), ("", b"x")]), "member ''", "empty")
    refuse(make_tar(tmp_path / "a", [("good.wav", b"x"), (".", b"x")]), "'.'", "without a name")


@pytest.mark.parametrize("mode", TARS)
@pytest.mark.parametrize(
    "info, why",
    [
        (special("link.wav", tarfile.SYMTYPE, "/etc"), "symbolic link"),
        (special("hard.wav", tarfile.LNKTYPE, "good.wav"), "hard link"),
        (special("dev.wav", tarfile.CHRTYPE), "device node"),
        (special("disk.wav", tarfile.BLKTYPE), "device node"),
        (special("fifo.wav", tarfile.FIFOTYPE), "FIFO"),
        (special("what.wav", b"V"), "unknown kind"),
        (special("holes.wav", tarfile.GNUTYPE_SPARSE), "sparse"),
    ],
)
def test_a_tar_with_anything_but_files_is_refused(tmp_path, refuse, info, why, mode):
    archive = make_tar(tmp_path / "a.tar", [("good.wav", b"x"), (info, b"")], mode)
    refuse(archive, str(archive), f"'{info.name}'", why)


@pytest.mark.parametrize(
    "kind, why",
    [
        (stat.S_IFLNK, "symbolic link"),
        (stat.S_IFCHR, "device node"),
        (stat.S_IFBLK, "device node"),
        (stat.S_IFIFO, "FIFO"),
        (stat.S_IFSOCK, "socket"),
    ],
)
def test_a_zip_with_anything_but_files_is_refused(tmp_path, refuse, kind, why):
    members = [("good.wav", b"x"), (with_mode("odd.wav", kind | 0o777), b"/etc")]
    refuse(make_zip(tmp_path / "a.zip", members), "'odd.wav'", why)


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_names_that_collide_are_refused(tmp_path, refuse, make):
    path = tmp_path / "a"
    refuse(make(path, [("a/x.wav", b"1"), ("a/x.wav", b"2")]), "'a/x.wav'", "twice")
    refuse(make(path, [("a/x.wav", b"1"), ("./a//x.wav", b"2")]), "'./a//x.wav'", "twice")
    refuse(make(path, [("a", b"1"), ("a!", b""), ("a/x.wav", b"2")]), "'a'", "file and a folder")
    refuse(make(path, [("a/b/x.wav", b"1"), ("a", b"2")]), "'a'", "file and a folder")
    folder = "a/" if make is make_zip else special("a", tarfile.DIRTYPE)
    refuse(make(path, [("a", b"1"), (folder, b"")]), "'a", "file and a folder")
    refuse(make(path, [(folder, b""), ("a", b"1")]), "'a'", "file and a folder")
    unpack_archive(make(path, [(folder, b""), ("a/x.wav", b"1")]), tmp_path / "fine")


@pytest.mark.slow
@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_many_members_are_listed_in_little_time_and_memory(tmp_path, make):
    """A tenth of 10^5 members: time and memory grow in proportion."""
    archive = make(tmp_path / "a", [(f"c{i % 50}/{i}.wav", b"") for i in range(10_000)])
    reader = archives._find_reader(archive)
    assert reader is not None
    start = time.process_time()
    tracemalloc.start()
    found = archives._list_files(archive, reader(archive), 2**30, ArchiveLimits())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == 10_000 and peak < 20 * 2**20
    assert time.process_time() - start < 10


def test_too_much_is_refused(tmp_path, refuse, place):
    members = [(f"{i}.wav", bytes(1000)) for i in range(5)]
    for archive in (make_zip(tmp_path / "z", members), make_tar(tmp_path / "t", members)):
        refuse(
            archive,
            "'4.wav'",
            "4 members",
            "ArchiveLimits.members",
            limits=ArchiveLimits(members=4),
        )
        refuse(
            archive,
            "'4.wav'",
            "5000 bytes",
            "ArchiveLimits.bytes",
            limits=ArchiveLimits(bytes=4999),
        )
        unpack_archive(
            archive, place / archive.name, limits=ArchiveLimits(members=5, bytes=5000, ratio=1)
        )


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_bombs_are_refused(tmp_path, refuse, place, make):
    archive = make(tmp_path / "a", [("good.wav", b"x"), ("bomb.wav", bytes(32 * MIB))])
    refuse(archive, "'bomb.wav'", "100 times", "ArchiveLimits.ratio")
    unpack_archive(archive, place / "trusted", limits=ArchiveLimits(ratio=1e5))
    silence = make(tmp_path / "b", [("silence.wav", bytes(16 * MIB))])
    assert files(unpack_archive(silence, place / "silence")) == {"silence.wav": bytes(16 * MIB)}


def test_a_tar_cannot_hide_a_bomb_in_its_headers_or_after_its_end(tmp_path, refuse, monkeypatch):
    info = tarfile.TarInfo("x.wav")
    info.pax_headers = {"comment": "0" * MIB}
    refuse(make_tar(tmp_path / "a", [(info, b"x")]), "damaged", "header of more than")
    archive = make_tar(tmp_path / "b", [("x.wav", b"x")])
    archive.write_bytes(gzip.compress(gzip.decompress(archive.read_bytes()) + bytes(20 * MIB)))
    refuse(archive, "damaged", "after its end")
    monkeypatch.setattr(archives, "PADDING", 100)
    monkeypatch.setattr(archives, "COMPRESSIBLE", 1000)
    many = make_tar(tmp_path / "c", [(f"{i}.wav", b"x") for i in range(3000)])
    refuse(many, ".wav'", "100 times")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
@pytest.mark.parametrize("said", [10, 999, 1001, 5000])
def test_a_zip_that_lies_about_a_size_is_refused(tmp_path, refuse, place, method, said):
    archive = make_zip(tmp_path / "a", [("liar.wav", bytes(1000))], method)
    content = bytearray(archive.read_bytes())
    at = content.index(b"PK\x01\x02")
    assert struct.unpack_from("<I", content, at + 24) == (1000,)
    struct.pack_into("<I", content, at + 24, said)
    archive.write_bytes(content)
    refuse_inside(place, archive, "liar.wav")
    if said < 1000:  # and the checksum that fits the lie
        struct.pack_into("<I", content, at + 16, zlib.crc32(bytes(said)))
        archive.write_bytes(content)
        refuse_inside(place, archive, "liar.wav")


def refuse_inside(place, archive, name):
    """Damage that only shows in the content: no file, no marker, no temporary file."""
    with pytest.raises(DataError, match=f"'{name}' is damaged.*download it again") as caught:
        unpack_archive(archive, place)
    assert "\n" not in str(caught.value)
    assert [path for path in place.parent.rglob("*") if not path.is_dir()] == []


def test_a_wrong_checksum_is_refused(tmp_path, refuse, place):
    sound = np.random.default_rng(1).bytes(100_000)
    archive = make_zip(tmp_path / "a.zip", [("x.wav", sound)], zipfile.ZIP_STORED)
    flip(archive, 50_000)
    refuse_inside(place, archive, "x.wav")
    place.rmdir()
    place.parent.rmdir()
    for mode in TARS[1:]:
        archive = make_tar(tmp_path / "a.tar", [("x.wav", sound)], mode)
        flip(archive, 50_000)
        refuse(archive, "damaged", "download it again")
    archive = make_tar(tmp_path / "a.tar", [("y.wav", b""), ("x.wav", sound)], "w")
    flip(archive, 512 + 10)
    refuse(archive, "damaged", "bad checksum", "download it again")


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 0x55
    path.write_bytes(content)


@pytest.mark.parametrize("mode", TARS)
def test_a_tar_cut_short_is_refused(tmp_path, refuse, mode):
    rng = np.random.default_rng(1)
    members = [("x.wav", rng.bytes(100_000)), ("y.wav", rng.bytes(100_000))]
    archive = make_tar(tmp_path / "a.tar", members, mode)
    whole = archive.read_bytes()
    for end in (300, 1000, 100_000, 150_000, 100_864 + 512, len(whole) - 6):
        if mode == "w" and end == len(whole) - 6:
            end = 2 * 100_864  # a plain tar may lack its padding, not its end
        archive.write_bytes(whole[:end])
        refuse(archive, str(archive), "damaged", "download it again")


def test_a_zip_cut_short_is_refused(tmp_path, refuse):
    archive = make_zip(tmp_path / "a.zip", FILES.items())
    whole = archive.read_bytes()
    for end in (10, 1000, len(whole) // 2, len(whole) - 1):
        archive.write_bytes(whole[:end])
        assert is_archive(archive)
        refuse(archive, "damaged", "download it again")


def test_encrypted_and_unknown_methods_are_refused(tmp_path, refuse):
    archive = make_zip(tmp_path / "a.zip", [("good.wav", b"x"), ("secret.wav", b"x")])
    whole = archive.read_bytes()
    for at, value, why in ((8, 1, "encrypted"), (10, 9, "method not known")):
        content = bytearray(whole)
        struct.pack_into("<H", content, content.rindex(b"PK\x01\x02") + at, value)
        archive.write_bytes(content)
        refuse(archive, "'secret.wav'", why)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"no archive", id="text"),
        pytest.param(bytes(1024), id="zeros"),
        pytest.param(gzip.compress(b"only a text"), id="gzip of a text"),
        pytest.param(bz2.compress(bytes(999)), id="bzip2 of zeros"),
    ],
)
def test_what_is_no_archive_is_refused(tmp_path, refuse, content):
    path = tmp_path / "a.zip"
    path.write_bytes(content)
    assert not is_archive(path)
    refuse(path, str(path), "neither a zip nor a tar")


def test_paths_that_are_no_file_are_refused(tmp_path, refuse):
    os.mkfifo(tmp_path / "fifo")
    refuse(tmp_path / "fifo", "is not a file")
    refuse(tmp_path, "is not a file")
    refuse(tmp_path / "none.zip", "none.zip: cannot be read: No such file")
    assert not any(is_archive(tmp_path / name) for name in ("fifo", ".", "none.zip"))


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_links_inside_the_folder_are_not_followed(tmp_path, refuse, place, make):
    archive = make(tmp_path / "a", [("first.wav", b"x"), ("a/b/x.wav", b"x")])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (place / "a").mkdir(parents=True)
    (place / "a" / "b").symlink_to(elsewhere)
    refuse(archive, str(place / "a" / "b"), "symbolic link", "remove it")
    (place / "a" / "b").unlink()
    (place / "a" / "b").mkdir()
    (place / "a" / "b" / "x.wav").symlink_to(elsewhere / "x.wav")
    refuse(archive, str(place / "a" / "b" / "x.wav"), "symbolic link")
    (place / "a" / "b" / "x.wav").unlink()
    (place / "first.wav").mkdir()
    refuse(archive, str(place / "first.wav"), "in the way")
    (place / "first.wav").rmdir()
    os.rename(place, tmp_path / "moved")
    place.symlink_to(tmp_path / "moved")  # the folder itself is the user's own choice
    assert len(files(unpack_archive(archive, place))) == 2


def test_a_link_made_meanwhile_is_not_followed(tmp_path, place):
    archive = make_zip(tmp_path / "a.zip", [("1.wav", b"x"), ("a/2.wav", b"x")])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with pytest.raises(DataError, match="symbolic link"):
        unpack_archive(archive, place, progress=lambda *_: (place / "a").symlink_to(elsewhere))
    assert not list(elsewhere.iterdir()) and list(files(place)) == ["1.wav"]


def pack(path, kind):
    """All files and hidden ones, with a bit that must not survive."""
    if kind in TARS:
        members = [(special(".", tarfile.DIRTYPE), b""), (special("esc", tarfile.DIRTYPE), b"")]
        for name, content in {**FILES, **HIDDEN}.items():
            info = tarfile.TarInfo(f"./{name}")
            info.mode = 0o6777
            members.append((info, content))
        return make_tar(path, members, kind)
    members: list = [("esc/", b""), ("esc/nothing in here/", b"")]
    for name, content in {**FILES, **HIDDEN}.items():
        info = with_mode(name, stat.S_IFREG | 0o6777)
        info.compress_type = kind
        members.append((info, content))
    return make_zip(path, members)


KINDS = [*TARS, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(tmp_path, place, kind):
    archive = pack(tmp_path / "named.badly", kind)
    assert is_archive(archive)
    calls = []
    assert unpack_archive(archive, place, progress=lambda *call: calls.append(call)) == place
    assert files(place) == FILES
    assert calls == [(i, 5) for i in range(1, 6)]
    plain = tmp_path / "plain"
    plain.touch()
    for name in FILES:
        assert (place / name).stat().st_mode == plain.stat().st_mode
    found = archive.stat()
    assert json.loads((place / archives.MARKER).read_text()) == {
        "archive": "named.badly",
        "size": found.st_size,
        "mtime_ns": found.st_mtime_ns,
        "files": 5,
    }
    assert sorted(path.name for path in place.iterdir()) == [".unpacked.json", "empty.wav", "esc"]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT])
def test_older_tars(tmp_path, place, format):
    members = {"a" * 90 + "/" + "b" * 90 + ".wav": b"long", "ü é.wav": b"x"}
    archive = make_tar(tmp_path / "a.tar", members.items(), "w", format)
    assert files(unpack_archive(archive, place)) == members


def test_names_in_utf8_that_do_not_say_so(tmp_path, place):
    archive = make_zip(tmp_path / "a.zip", [("鳥 ü.wav", b"x")])
    content = bytearray(archive.read_bytes())
    for header, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        struct.pack_into("<H", content, content.index(header) + at, 0)
    archive.write_bytes(content)
    assert files(unpack_archive(archive, place)) == {"鳥 ü.wav": b"x"}


def marks(folder):
    return {
        path: (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_run_writes_only_what_is_missing(tmp_path, place, kind):
    archive = pack(tmp_path / "a", kind)
    unpack_archive(archive, place)
    (place / archives.MARKER).unlink()
    before = marks(place)
    gone, cut = place / "esc/audio/1 dog.wav", place / "esc/meta.csv"
    gone.unlink()
    cut.write_bytes(b"a")
    planted = place / f".x.wav.{0:032x}.tmp"
    planted.write_bytes(b"half")
    calls = []
    unpack_archive(archive, place, progress=lambda *call: calls.append(call))
    assert files(place) == FILES and calls == [(4, 5), (5, 5)]
    after = marks(place)
    for path in before.keys() - {gone, cut}:
        assert after[path] == before[path]
    assert (place / archives.MARKER).exists() and not planted.exists()


def test_a_marker_says_that_all_is_done(tmp_path, place, monkeypatch):
    archive = pack(tmp_path / "a.zip", zipfile.ZIP_DEFLATED)
    unpack_archive(archive, place)
    before = marks(place)
    with monkeypatch.context() as patch:
        patch.setattr(archives, "_find_reader", lambda path: pytest.fail("the archive was read"))
        assert unpack_archive(archive, place) == place
    assert marks(place) == before

    other = pack(tmp_path / "b.zip", zipfile.ZIP_DEFLATED)
    with pytest.raises(DataError, match=r"holds the files of a\.zip and not of b\.zip"):
        unpack_archive(other, place)
    os.utime(archive, ns=(0, 0))
    with pytest.raises(DataError, match="choose another folder"):
        unpack_archive(archive, place)
    for text in ("", "[]", "[" * 100_000, "{}"):
        (place / archives.MARKER).write_text(text)
        with pytest.raises(DataError, match="choose another folder"):
            unpack_archive(archive, place)
    (place / archives.MARKER).unlink()
    assert before.keys() - marks(place).keys() == {place / archives.MARKER}


@pytest.mark.parametrize("kind", KINDS)
def test_an_interruption_leaves_whole_files(tmp_path, place, kind, monkeypatch):
    archive = pack(tmp_path / "a", kind)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", stop)
        unpack_archive(archive, place)
    assert files(place) == {}
    with pytest.raises(KeyboardInterrupt):
        unpack_archive(archive, place, progress=lambda done, total: stop() if done == 2 else None)
    left = files(place)
    assert len(left) == 2 and left.items() <= FILES.items()
    assert not (place / archives.MARKER).exists()
    assert files(unpack_archive(archive, place)) == FILES


def test_too_little_space_is_reported_before(tmp_path, refuse, monkeypatch):
    archive = make_zip(tmp_path / "a.zip", [("x.wav", bytes(5000))])
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda path: usage(4999))
    refuse(archive, "5000 bytes are needed and 4999 are free", error=WriteError)


def test_a_folder_that_cannot_be_written_is_named(tmp_path, place, monkeypatch):
    archive = make_zip(tmp_path / "a.zip", [("x.wav", b"x")])
    place.parent.mkdir()
    place.write_text("a file")
    with pytest.raises(WriteError, match="cannot be written"):
        unpack_archive(archive, place)
    assert place.read_text() == "a file"
    place.unlink()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(WriteError) as caught:
        unpack_archive(archive, place)
    assert str(caught.value) == (
        f"{place / 'x.wav'}: cannot be written: No space left on device; free space there or "
        "choose another folder"
    )
    assert list(place.iterdir()) == []


def test_an_archive_that_changes_meanwhile_is_refused(tmp_path, place, monkeypatch):
    archive = make_zip(tmp_path / "a.zip", [("x.wav", b"x")])
    check = archives._check_space

    def swap(*arguments):
        make_zip(archive, [("y.wav", b"x")])
        check(*arguments)

    monkeypatch.setattr(archives, "_check_space", swap)
    with pytest.raises(DataError, match="changed while it was unpacked"):
        unpack_archive(archive, place)
    assert files(place) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_random_damage_is_never_a_traceback_and_never_half_a_file(tmp_path, kind):
    rng = np.random.default_rng(2)
    members = {f"d{i}/{i}.wav": rng.bytes(200) for i in range(4)}
    if kind in TARS:
        archive = make_tar(tmp_path / "a", members.items(), kind)
    else:
        archive = make_zip(tmp_path / "a", members.items(), kind)
    whole = archive.read_bytes()
    for i in range(60):
        content = bytearray(whole)
        for at in rng.integers(0, len(content), 3):
            content[at] = rng.integers(256)
        archive.write_bytes(content)
        into = tmp_path / "outside" / str(i)
        try:
            unpack_archive(archive, into)
        except DataError as error:
            assert "\n" not in str(error)
        assert {path.name for path in tmp_path.iterdir()} <= {"a", "outside"}
        if kind != "w":  # a plain tar has no checksum of the content
            for content in files(into).values() if into.exists() else ():
                assert content in members.values()
