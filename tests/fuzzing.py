"""Seeded damage to files, and a runner that checks what a reader does with each of them.

    cases = Cases(samples=(wav, flac), attacks=(lying_header,), count=2000, seed=1)
    report = run(read_file, cases)  # read_file is a function of a module, of one path
    assert not report.problems, report

A problem names the number of its case: `cases[1234]` are the bytes of that file again.
"""

import dataclasses
import math
import multiprocessing
import os
import random
import resource
import signal
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from aatjax.errors import DataError, UsageError

SECONDS = 5.0
"""CPU seconds that one call may take."""
MEMORY = 1 << 30
"""Bytes that a reader may need beside what its process had before."""
WALL = 120.0
"""Seconds after which a call that waits for something is given up."""
MOST_PROBLEMS = 20
FIELDS = (0, 1, 2, 0x7F, 0x7FFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)
"""Values that length fields are set to."""


@dataclasses.dataclass(frozen=True)
class Cases:
    """Files to read: whole samples, then attacks as they are, then mutations of the samples.

    Attributes:
        samples: whole files.
        attacks: files made by hand.
        count: number of mutations.
        seed: of the mutations.
    """

    samples: tuple[bytes, ...]
    attacks: tuple[bytes, ...] = ()
    count: int = 100
    seed: int = 0

    def __len__(self) -> int:
        return len(self.samples) + len(self.attacks) + self.count

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(index)
        given = (*self.samples, *self.attacks)
        if index < len(given):
            return given[index]
        rng = random.Random(f"{self.seed}/{index - len(given)}")
        return mutate(rng.choice(self.samples), rng, rng.choice(self.samples))


@dataclasses.dataclass(frozen=True)
class Report:
    """What a reader did.

    Attributes:
        calls: files that it was given.
        accepted: files that it read.
        slowest: CPU seconds of the slowest call.
        memory: bytes by which its process grew at most.
        problems: foreign exceptions, slow calls, deaths of the process and output on the screen.
    """

    calls: int
    accepted: int
    slowest: float
    memory: int
    problems: tuple[str, ...]


def mutate(data: bytes, rng: random.Random, other: bytes = b"") -> bytes:
    """Damage a file in one to four ways; `other` is a second file to splice with."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        data = rng.choice(MUTATIONS)(data, rng, other)
    return data


def flip_bits(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """Flip up to 32 bits, near each other or all over the file."""
    changed = bytearray(data)
    if not changed:
        return data
    start, length = _choose_block(data, rng)
    inside = rng.random() < 0.5
    for _ in range(rng.choice((1, 2, 8, 32))):
        at = start + rng.randrange(length) if inside and length else rng.randrange(len(data))
        changed[at] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """Remove the end of the file."""
    return data[: _choose_offset(data, rng)]


def insert(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """Insert random bytes, zeros or ones."""
    at, length = _choose_offset(data, rng), rng.choice((1, 2, 3, 4, 7, 8, 16, 100, 5000))
    new = rng.choice((rng.randbytes(length), bytes(length), b"\xff" * length))
    return data[:at] + new + data[at:]


def delete(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """Remove a block."""
    start, length = _choose_block(data, rng)
    return data[:start] + data[start + length :]


def duplicate(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """Repeat a block some times."""
    start, length = _choose_block(data, rng)
    times = 1 + rng.choice((1, 2, 50)) * (length < 10_000)
    return data[:start] + data[start : start + length] * times + data[start + length :]


def swap(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """Exchange two blocks that follow one another."""
    start, length = _choose_block(data, rng)
    middle, end = start + length, min(len(data), start + 2 * length)
    return data[:start] + data[middle:end] + data[start:middle] + data[end:]


def set_field(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """Set two, four or eight bytes to a value that lengths are overrun by."""
    width = rng.choice((1, 2, 4, 4, 8))
    at = _choose_offset(data, rng) // rng.choice((1, 2, 4)) * rng.choice((1, 1, 2, 4))
    at = min(at, max(0, len(data) - width))
    order = rng.choice(("little", "big"))
    value = rng.choice(FIELDS) & (256**width - 1)
    return data[:at] + value.to_bytes(width, order) + data[at + width :]


def splice(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """Join the start of one file and the end of another."""
    return data[: _choose_offset(data, rng)] + other[_choose_offset(other, rng) :]


MUTATIONS = (flip_bits, cut, insert, delete, duplicate, swap, set_field, set_field, splice)


def _choose_offset(data: bytes, rng: random.Random) -> int:
    """Return an offset; every second one is near the start, where the headers are."""
    if rng.random() < 0.5:
        return rng.randint(0, len(data))
    return min(len(data), int(math.exp(rng.uniform(0, math.log(len(data) + 2))) - 1))


def _choose_block(data: bytes, rng: random.Random) -> tuple[int, int]:
    """Return the offset and the length of a part of the file."""
    start = _choose_offset(data, rng)
    rest = len(data) - start
    return start, min(rest, int(math.exp(rng.uniform(0, math.log(rest + 2)))))


def run(
    read: Callable[[Path], object],
    cases: Cases,
    *,
    allowed: tuple[type[Exception], ...] = (DataError, UsageError),
    name: str = "case.bin",
) -> Report:
    """Give every case to a reader, in a process of its own.

    Args:
        read: function of a module (the process imports it) that takes the path of a file.
        cases: the files.
        allowed: exceptions that are an answer; their messages must be one line.
        name: name of the file that is written for each case.

    Returns:
        What happened. A case that kills its process is a problem; the next ones run in a new one.
    """
    problems: list[str] = []
    done = accepted = memory = 0
    slowest = 0.0
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        while done < len(cases) and len(problems) < MOST_PROBLEMS:
            ours, theirs = context.Pipe(duplex=False)
            arguments = (read, cases, done, allowed, Path(folder, name), theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            while done < len(cases) and len(problems) < MOST_PROBLEMS:
                try:
                    answer = ours.recv() if ours.poll(WALL) else None
                except EOFError:
                    answer = None
                if answer is None:
                    break
                was_read, seconds, grown, problem = answer
                accepted, slowest = accepted + was_read, max(slowest, seconds)
                memory = max(memory, grown)
                problems += [f"case {done}: {problem}"] if problem else []
                done += 1
            finished = done == len(cases)
            process.join(5 if finished else 0.2)
            if process.is_alive():
                process.kill()
                process.join()
            if not finished and len(problems) < MOST_PROBLEMS:
                problems.append(f"case {done}: {_explain_death(process.exitcode)}")
                done += 1
    return Report(done, accepted, slowest, memory, tuple(problems))


def _explain_death(code: int | None) -> str:
    if code == -signal.SIGXCPU:
        return f"took more than {SECONDS:g} CPU s"
    if code == -signal.SIGKILL:
        return f"did not end in {WALL:g} s"
    return f"ended the process with code {code}"


def _serve(
    read: Callable[[Path], object],
    cases: Cases,
    first: int,
    allowed: tuple[type[Exception], ...],
    path: Path,
    answers: Connection,
) -> None:
    """Read the cases from `first` on under limits of memory and CPU time."""
    screen = os.open(path.with_name("screen"), os.O_CREAT | os.O_TRUNC | os.O_RDWR | os.O_APPEND)
    os.dup2(screen, 1)
    os.dup2(screen, 2)
    before = 0
    for index in range(first, len(cases)):
        path.write_bytes(cases[index])
        if index < first + 2:  # the first call loads libraries
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + (MEMORY if index > first else 2 * MEMORY)
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        start = time.process_time()
        cpu = math.ceil(start + SECONDS + 1)
        resource.setrlimit(resource.RLIMIT_CPU, (cpu, resource.RLIM_INFINITY))
        was_read, problem = _call(read, path, allowed)
        seconds = time.process_time() - start
        if seconds > SECONDS:
            problem = problem or f"took {seconds:.1f} CPU s"
        if said := os.pread(screen, 500, 0):
            os.ftruncate(screen, 0)
            problem = problem or f"writes on the screen: {said.decode(errors='replace').strip()}"
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        answers.send((was_read, seconds, grown, problem))


def _call(
    read: Callable[[Path], object], path: Path, allowed: tuple[type[Exception], ...]
) -> tuple[bool, str]:
    """Return whether a file was read, and what is wrong with that."""
    try:
        read(path)
    except allowed as error:
        one_line = "\n" not in str(error) and str(error).isprintable()
        return False, "" if one_line else f"a message of several lines: {error!s:.300}"
    except BaseException as error:
        at = error.__traceback__
        while at is not None and at.tb_next is not None:
            at = at.tb_next
        where = f"{Path(at.tb_frame.f_code.co_filename).name}:{at.tb_lineno}" if at else ""
        return False, f"{type(error).__name__} at {where}: {str(error)[:300]}"
    return True, ""
