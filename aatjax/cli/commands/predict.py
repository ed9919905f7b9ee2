"""`aatjax predict`: what an adapter hears."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aatjax.cli.arguments import parser_of
from aatjax.errors import DataError, UsageError

if TYPE_CHECKING:
    from aatjax.audio.waveform import AudioError
    from aatjax.inference.classifier import Classifier, Prediction
    from aatjax.inference.segmentation import Format, Rules, Track
    from aatjax.inference.stream import NpzVectors, OutputFile, ParquetVectors

FORMATS = ("table", "csv", "json", "audacity", "rttm")
ONLY_WITH_SEGMENTS = ("format", "out", "smooth", "threshold", "min_duration", "gap")


def main(arguments: list[str]) -> None:
    """Runs `aatjax predict`."""
    parser = parser_of("predict")
    parser.add_argument("adapter", type=Path, help="adapter.safetensors, or weights with a head")
    parser.add_argument("files", nargs="+", help="sound files of any length")
    parser.add_argument("--base", help="the backbone's weights, where they have moved")
    parser.add_argument("--hop", type=float, help="seconds between windows (default: no overlap)")
    parser.add_argument("--top", type=int, default=3, help="classes shown (default 3)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, with windows")
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="windows computed at a time, of one file or several (default 8)",
    )
    parser.add_argument(
        "--embeddings",
        type=Path,
        metavar="FILE",
        help="write the mean patch token of each window to .npz or .parquet",
    )
    parser.add_argument("--segments", action="store_true", help="what is heard from when to when")
    late = parser.add_argument_group("with --segments")
    late.add_argument("--format", choices=FORMATS, help="default table; json: a line a file")
    late.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="write there, whole or not at all, instead of to standard output",
    )
    late.add_argument(
        "--smooth", type=float, metavar="SECONDS", help="median of the windows in so many seconds"
    )
    late.add_argument(
        "--threshold",
        metavar="ON[:OFF]",
        help="probability from which on a class begins, and below which it ends "
        "(default: as calibrated in training)",
    )
    late.add_argument(
        "--min-duration", type=float, metavar="SECONDS", help="leave shorter segments out"
    )
    late.add_argument(
        "--gap",
        type=float,
        metavar="SECONDS",
        help="join segments of a class that are no further apart",
    )
    options = parser.parse_args(arguments)
    _check(options)
    if options.segments:
        _segments(options)
    elif options.embeddings is not None or options.batch_size is not None:
        _streamed(options)
    else:
        _plainly(options)


def _check(options: argparse.Namespace) -> None:
    """Raises UsageError for flags that do not go together."""
    for name in ONLY_WITH_SEGMENTS:
        if not options.segments and getattr(options, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} needs --segments; add it")
    if options.segments and options.json:
        raise UsageError("--json tells windows, --segments has --format json: give one of them")
    if options.batch_size is not None and options.batch_size < 1:
        raise UsageError(f"--batch-size {options.batch_size} must be at least 1")
    if options.format == "audacity" and len(options.files) > 1:
        raise UsageError(
            "an Audacity label track belongs to one recording: give one file at a time, or "
            "another --format"
        )
    if options.format == "rttm":
        from aatjax.inference.segmentation import field

        names: dict[str, str] = {}
        for path in options.files:
            if names.setdefault(field(path), path) != path:
                raise UsageError(
                    f"{names[field(path)]!r} and {path!r} have the same name in RTTM, which has "
                    "no spaces: rename one, or give them one at a time"
                )
    for flag in ("out", "embeddings"):
        path = getattr(options, flag)
        if path is not None and path.is_dir():
            raise UsageError(f"--{flag} {path} is a folder: give the name of a file")
    if options.embeddings is not None:
        from aatjax.inference.stream import check_ending

        check_ending(options.embeddings)
    if options.embeddings is not None and options.embeddings == options.out:
        raise UsageError("--out and --embeddings name the same file: give two")


def _plainly(options: argparse.Namespace) -> None:
    """File by file, each whole or not at all."""
    from aatjax.audio.waveform import AudioError
    from aatjax.inference.classifier import Classifier

    classifier = Classifier.load(options.adapter, base=options.base)
    failed: list[AudioError] = []
    for path in options.files:
        try:
            prediction = classifier.predict(path, hop=options.hop)
        except AudioError as error:
            failed.append(error)
            print(f"aatjax: {error}", file=sys.stderr)
            continue
        _show(prediction, options)
    if failed:
        raise DataError(f"{len(failed)} of {len(options.files)} files could not be read")


def _show(prediction: Prediction, options: argparse.Namespace) -> None:
    import json

    from aatjax.errors import printable

    if options.json:
        print(json.dumps(prediction.to_json()), flush=True)
        return
    best = "  ".join(f"{label} {p:.3f}" for label, p in prediction.top(options.top))
    print(f"{printable(prediction.path)}  {best}{_doubt(prediction)}", flush=True)


def _streamed(options: argparse.Namespace) -> None:
    """The same lines from batches that files share; vectors are written besides."""
    import numpy as np

    from aatjax.inference.classifier import Classifier
    from aatjax.inference.stream import Heard

    classifier = Classifier.load(options.adapter, base=options.base)
    told = _Told(options.files)
    heard: list[Heard] = []
    with _vectors(options, classifier) as vectors:
        for event in _events(options, classifier):
            if isinstance(event, Heard):
                if vectors is not None:
                    vectors.add(options.files[event.file], event)
                heard.append(event)
                continue
            if event.error is not None:
                told.add(event.error, cut=event.samples > 0)
            if event.samples:
                found, plain = (
                    np.concatenate([getattr(part, name) for part in heard])
                    for name in ("probabilities", "plain")
                )
                spans = [span for part in heard for span in part.spans]
                _show(classifier.summary(options.files[event.file], found, plain, spans), options)
            heard = []
        told.refuse_nothing()
    told.finish()


def _segments(options: argparse.Namespace) -> None:
    """What is heard when."""
    from aatjax.audio.waveform import AudioError
    from aatjax.inference.classifier import Classifier
    from aatjax.inference.stream import Heard, Joined

    rules = _rules(options)
    classifier = Classifier.load(options.adapter, base=options.base)
    joined = Joined(classifier, options.files, rules, options.hop)
    told = _Told(options.files)
    form: Format = options.format or "table"
    first = True
    with _vectors(options, classifier) as vectors, _out(options) as out:
        for event in _events(options, classifier):
            if vectors is not None and isinstance(event, Heard):
                vectors.add(options.files[event.file], event)
            track = joined.take(event)
            if isinstance(track, AudioError):
                told.add(track)
            elif track is not None:
                if not isinstance(event, Heard) and event.error is not None:
                    told.add(event.error, cut=True)
                _write(track, form, out, first=first)
                first = False
        told.refuse_nothing()
    told.finish()


def _write(track: Track, form: Format, out: OutputFile | None, *, first: bool) -> None:
    """One file's segments to a file, or to standard output; names keep their bytes."""
    from aatjax.inference.segmentation import written

    text = written(track, form, first=first)
    if out is not None:
        out.write(text.encode("utf-8", "surrogateescape"))
    elif form == "table":
        print(text, end="", flush=True)
    else:
        sys.stdout.flush()
        sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape"))
        sys.stdout.buffer.flush()


def _rules(options: argparse.Namespace) -> Rules:
    from aatjax.inference.segmentation import Rules

    on, off = None, None
    if options.threshold is not None:
        try:
            on, *rest = (float(part) for part in options.threshold.split(":"))
            off = rest.pop() if rest else None
            if rest:
                raise ValueError
        except ValueError:
            raise UsageError(
                f"--threshold {options.threshold}: give a probability such as 0.6, or two such as "
                "0.6:0.4"
            ) from None
    return Rules(
        options.smooth or 0.0, "median", on, off, options.min_duration or 0.0, options.gap or 0.0
    )


def _events(options: argparse.Namespace, classifier: Classifier) -> Any:
    from aatjax.inference.classifier import BATCH
    from aatjax.inference.stream import hear

    return hear(
        classifier,
        options.files,
        hop=options.hop,
        batch=options.batch_size or BATCH,
        vectors=options.embeddings is not None,
    )


def _vectors(
    options: argparse.Namespace, classifier: Classifier
) -> contextlib.AbstractContextManager[NpzVectors | ParquetVectors | None]:
    from aatjax.inference.stream import vectors_to

    if options.embeddings is None:
        return contextlib.nullcontext()
    return vectors_to(options.embeddings, classifier.model.config.dim)


def _out(options: argparse.Namespace) -> contextlib.AbstractContextManager[OutputFile | None]:
    from aatjax.inference.stream import OutputFile

    return contextlib.nullcontext() if options.out is None else OutputFile(options.out)


class _Told:
    """Says what is wrong with files as it comes, and ends with the exit code for that."""

    def __init__(self, files: list[str]) -> None:
        self._all, self._unread, self._cut = len(files), 0, 0

    def add(self, error: AudioError, *, cut: bool = False) -> None:
        self._cut += cut
        self._unread += not cut
        rest = "; what comes before is given" if cut else ""
        print(f"aatjax: {error}{rest}", file=sys.stderr)

    def refuse_nothing(self) -> None:
        """Raises where no file could be read, so that nothing is written."""
        if self._unread == self._all:
            self.finish()

    def finish(self) -> None:
        """Raises where a file could not be read to its end."""
        parts = [f"{self._unread} of {self._all} files could not be read"] * (self._unread > 0)
        parts += [f"{self._cut} of {self._all} files could not be read to the end"] * (
            self._cut > 0
        )
        if parts:
            raise DataError(", ".join(parts))


def _doubt(prediction: Any, most: int = 5) -> str:
    """What is said of a sound that may be one of several classes; nothing where that is unknown."""
    if not prediction.unsure:
        return ""
    names, more = prediction.possible[:most], len(prediction.possible) - most
    named = ", ".join(names) + (f" and {more} more" if more > 0 else "")
    if len(prediction.possible) == len(prediction.classes):
        named = "any class"
    return f"  unsure: {named} ({prediction.coverage:.0%})"
