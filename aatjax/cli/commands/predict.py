"""Predicts the classes of sound files of any length, or when each class begins and ends."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, Literal, cast

from tyro.conf import OmitArgPrefixes, Positional

from aatjax.cli.arguments import Count, Switch, Unset
from aatjax.cli.dry_run import make_begin
from aatjax.errors import DataError, Range, UsageError, format_count, printable

if TYPE_CHECKING:
    from aatjax.audio.waveform import AudioError
    from aatjax.inference.classifier import Classifier
    from aatjax.inference.prediction import Prediction
    from aatjax.inference.prediction_formats import PredictionFormat
    from aatjax.inference.segment_formats import SegmentFormat
    from aatjax.inference.segmentation import SegmentationRules, Track
    from aatjax.inference.stream import StreamEnd, StreamResult

GROUP = "use"
ONLY_WITH_SEGMENTS = ("smooth", "threshold", "min_duration", "gap")


@dataclasses.dataclass(frozen=True)
class PredictOptions:
    """The prediction.

    Attributes:
        adapter: adapter.safetensors, its run folder, or weights with a head
        files: sound files of any length, folders, patterns such as "a/*.wav", lists (NAME.txt, a
            name per line), or - for names from standard input
        base: the backbone's weights, if they moved since training
        hop: seconds between window starts (default: no overlap)
        top: classes to print
        to: form of the output: table, csv or json; with --segments audacity and rttm too
        json: as --to json: one object per line and file, with the windows
        csv: as --to csv
        out: write to this file, complete or not at all, instead of to standard output
        batch_size: windows per batch, of one file or several (default 8)
        embeddings: write the mean patch token of each window to this .npz or .parquet file
        segments: print classes with start and end times
        smooth: with --segments: median filter over the windows of this many seconds
        threshold: with --segments: ON[:OFF], the probability at which a class begins, and below
            which it ends (default: as calibrated in training)
        min_duration: with --segments: omit segments shorter than this many seconds
        gap: with --segments: join segments of a class at most this many seconds apart
        dry_run: find the files, open the adapter, check what would be written, and stop
    """

    adapter: Positional[Path]
    files: Positional[tuple[str, ...]]
    base: Unset[str] = None
    hop: Unset[Annotated[float, Range(above=0)]] = None
    top: Count = 3
    to: Unset[Literal["table", "csv", "json", "audacity", "rttm"]] = None
    json: Switch = False
    csv: Switch = False
    out: Unset[Path] = None
    batch_size: Unset[Count] = None
    embeddings: Unset[Path] = None
    segments: Switch = False
    smooth: Unset[float] = None
    threshold: Unset[str] = None
    min_duration: Unset[float] = None
    gap: Unset[float] = None
    dry_run: Switch = False


def main(prediction: OmitArgPrefixes[PredictOptions]) -> None:
    """Run `aatjax predict`."""
    from aatjax.audio.listing import find_sounds

    files = find_sounds(prediction.files, sys.stdin)
    options = dataclasses.replace(prediction, files=tuple(files))
    _check(options)

    from aatjax.inference.classifier import Classifier

    rules = _make_rules(options) if options.segments else None
    classifier = Classifier.load(options.adapter, base=options.base)
    make_begin(options.dry_run, f"would predict {format_count(len(files), 'file')}")()
    with contextlib.ExitStack() as stack:
        output = _Output(options, stack)
        if options.segments or options.embeddings is not None or options.batch_size is not None:
            problems = _predict_stream(classifier, options, rules, output, stack)
        else:
            problems = _predict_files(classifier, options, output)
        problems.raise_if_none_read()
    problems.finish()


def _check(options: PredictOptions) -> None:
    """Raise UsageError for flags that exclude each other, WriteError for a place to write."""
    from aatjax.io.atomic import check_output

    for name in ONLY_WITH_SEGMENTS:
        if not options.segments and getattr(options, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} needs --segments; add it")
    forms = [name for name in ("json", "csv") if getattr(options, name)]
    forms += [f"to {options.to}"] * (options.to is not None)
    if len(forms) > 1:
        raise UsageError(f"--{' and --'.join(forms)} exclude each other: give one form")
    form = _find_form(options)
    if form in ("audacity", "rttm") and not options.segments:
        raise UsageError(f"--to {form} writes when classes begin and end: add --segments")
    if form == "audacity" and len(options.files) > 1:
        raise UsageError(
            "an Audacity label track belongs to one recording: give one file at a time, or "
            "another form (--to)"
        )
    if form == "rttm":
        from aatjax.inference.segment_formats import format_rttm_field

        names: dict[str, str] = {}
        for path in options.files:
            other = names.setdefault(format_rttm_field(path), path)
            if other != path:
                raise UsageError(
                    f"{other!r} and {path!r} have the same name in RTTM, which has no spaces: "
                    "rename one, or give them one at a time"
                )
    for flag in ("out", "embeddings"):
        path = getattr(options, flag)
        if path is not None and path.is_dir():
            raise UsageError(f"--{flag} {path} is a folder: give the name of a file")
        if path is not None:
            check_output(path)
    if options.embeddings is not None:
        from aatjax.inference.embeddings import check_embeddings_path

        check_embeddings_path(options.embeddings)
    if options.embeddings is not None and options.embeddings == options.out:
        raise UsageError("--out and --embeddings name the same file: give two")


def _make_rules(options: PredictOptions) -> SegmentationRules:
    from aatjax.inference.segmentation import SegmentationRules

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
    try:
        return SegmentationRules(
            smooth=options.smooth or 0.0,
            on=on,
            off=off,
            min_duration=options.min_duration or 0.0,
            gap=options.gap or 0.0,
        )
    except UsageError as error:  # NAME=VALUE must be ...
        name, _, rest = str(error).partition("=")
        flag = "threshold" if name in ("on", "off") else name.replace("_", "-")
        raise UsageError(f"--{flag} {rest}") from None


def _predict_files(classifier: Classifier, options: PredictOptions, output: _Output) -> _Problems:
    """Predict file by file; a truncated file is an error."""
    from aatjax.audio.waveform import AudioError

    problems = _Problems(len(options.files))
    for path in options.files:
        try:
            prediction = classifier.predict(path, hop=options.hop)
        except AudioError as error:
            problems.add(error)
        else:
            output.add(prediction)
    return problems


def _predict_stream(
    classifier: Classifier,
    options: PredictOptions,
    rules: SegmentationRules | None,
    output: _Output,
    stack: contextlib.ExitStack,
) -> _Problems:
    """Predict in batches that files share; a truncated file is used up to the damage."""
    from aatjax.inference.classifier import BATCH
    from aatjax.inference.embeddings import open_embeddings
    from aatjax.inference.stream import StreamResult, stream_windows

    problems = _Problems(len(options.files))
    add = None
    if options.embeddings is not None:
        size = classifier.model.config.dim
        add = stack.enter_context(open_embeddings(options.embeddings, size))

    def stream() -> Iterator[StreamResult | StreamEnd]:
        batch, vectors = options.batch_size or BATCH, add is not None
        for event in stream_windows(
            classifier, options.files, hop=options.hop, batch=batch, vectors=vectors
        ):
            if not isinstance(event, StreamResult):
                if event.error is not None:
                    problems.add(event.error, used=event.samples > 0)
            elif add is not None:
                add(options.files[event.file], event)
            yield event

    if rules is None:
        _write_predictions(stream(), classifier, options, output)
    else:
        _write_segments(stream(), classifier, options, rules, output)
    return problems


def _write_predictions(
    events: Iterator[StreamResult | StreamEnd],
    classifier: Classifier,
    options: PredictOptions,
    output: _Output,
) -> None:
    """Write the prediction of each file."""
    from aatjax.inference.prediction import WindowLogits
    from aatjax.inference.stream import StreamResult

    parts: list[WindowLogits] = []
    for event in events:
        if isinstance(event, StreamResult):
            parts.append(event.windows)
        elif parts:
            path = options.files[event.file]
            windows = WindowLogits.join(parts)
            output.add(classifier.summarize(path, windows, event.notes))
            parts = []


def _write_segments(
    events: Iterator[StreamResult | StreamEnd],
    classifier: Classifier,
    options: PredictOptions,
    rules: SegmentationRules,
    output: _Output,
) -> None:
    """Write the segments of each file."""
    from aatjax.inference.segmentation import Track
    from aatjax.inference.stream import segment_stream

    for track in segment_stream(classifier, options.files, events, rules, hop=options.hop):
        if not isinstance(track, Track):
            continue
        cut = track.cut or ""  # reported as an error already
        _print_notes(track.path, [note for note in track.notes if not cut.endswith(note)])
        output.add(track)


class _Output:
    """Writes results in the form that was asked for; names of files keep their bytes."""

    def __init__(self, options: PredictOptions, stack: contextlib.ExitStack) -> None:
        from aatjax.io.atomic import open_output

        self._form: SegmentFormat = _find_form(options)
        self._top, self._path = options.top, options.out
        self._file: BinaryIO | None = None
        if options.out is not None:
            self._file = stack.enter_context(open_output(options.out))
        self._first = True

    def add(self, result: Prediction | Track) -> None:
        from aatjax.inference.prediction import Prediction
        from aatjax.inference.prediction_formats import format_prediction
        from aatjax.inference.segment_formats import format_segments
        from aatjax.io.atomic import report_write_errors

        if isinstance(result, Prediction):
            _print_notes(result.path, [n for n in result.notes if n != result.reason])
            form = cast("PredictionFormat", self._form)
            text = format_prediction(result, form, top=self._top, first=self._first)
        else:
            text = format_segments(result, self._form, first=self._first)
        self._first = False
        if self._file is not None and self._path is not None:
            with report_write_errors(self._path):
                self._file.write(text.encode("utf-8", "surrogateescape"))
        elif self._form == "table":
            print(text, end="", flush=True)
        else:
            sys.stdout.flush()
            sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape"))
            sys.stdout.buffer.flush()


def _find_form(options: PredictOptions) -> SegmentFormat:
    form = "json" if options.json else "csv" if options.csv else "table"
    return cast("SegmentFormat", options.to or form)


def _print_notes(path: str, notes: Sequence[str]) -> None:
    """Print what is odd with a file."""
    if notes:
        print(f"aatjax: {printable(path)}: {printable(', '.join(notes))}", file=sys.stderr)


class _Problems:
    """Reports file errors as they occur; raises at the end if there were any."""

    def __init__(self, files: int) -> None:
        self._files, self._unread, self._truncated = files, 0, 0

    def add(self, error: AudioError, *, used: bool = False) -> None:
        """Report an error; `used`: the file was used up to the damage."""
        self._truncated += used
        self._unread += not used
        note = ""
        if used:
            note = "; the part before is used"
        elif error.reason == "truncated" and error.__cause__ is None:
            note = "; --batch-size or --segments use the part before"
        print(f"aatjax: {printable(str(error))}{note}", file=sys.stderr)

    def raise_if_none_read(self) -> None:
        """Raise DataError if no file could be read, so that nothing is written."""
        if self._unread == self._files:
            self.finish()

    def finish(self) -> None:
        """Raise DataError if a file could not be read to its end."""
        parts = [
            f"{count} of {self._files} files could not be read{to_the_end}"
            for count, to_the_end in ((self._unread, ""), (self._truncated, " to the end"))
            if count
        ]
        if parts:
            raise DataError(", ".join(parts))
