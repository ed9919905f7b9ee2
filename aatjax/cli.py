"""The command line: `aatjax VERB ...`. Heavy imports happen inside the verbs."""

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from aatjax.errors import AatjaxError, DataError, UsageError
from aatjax.interrupt import terminable

VERBS = {
    "train": "adapt a pretrained AST to sounds and evaluate it",
    "eval": "metrics of an adapter on labelled sounds",
    "predict": "what an adapter hears in sound files",
    "convert": "read any published weights, write aatjax, Hugging Face or Orbax files",
    "plan": "whether a config's step fits a chip or a pod, and what it moves; without the chip",
    "chaos": "kill a small run again and again on your own disk, resume, compare bit for bit",
    "summary": "what a config trains and what it leaves frozen",
    "methods": "what each adaptation method trains and costs, as a table",
}

TRAIN_HELP = """usage: aatjax train [CONFIG] [--method NAME] [--run DIR] [--FIELD VALUE ...]

Trains what CONFIG says (a name, a .py or a .json file; by default the embedded one, which needs
no download), prints the result and where the adapter lies. The same command goes on after an
interruption.

  --method NAME      another method: a row of `aatjax methods` such as conformer_houlsby, several
                     joined by +, or one at its defaults:
{methods}
  --run DIR          run folder (default runs/CONFIG-METHOD)
  --cross-validate   once for every fold of the data, mean and interval
  --allow-change F   go on in a run folder although field F of the config (optim.lr), a part of it
                     (optim) or the data set (clips) has changed; may be given again
  --quiet            no progress

  --coordinator HOST:PORT --processes N --process I
                     process I of N that train together; not needed under SLURM, Open MPI, GKE and
                     on TPU hosts, where they are found
  --stuck-after S    end all processes when one makes no progress for S seconds (default 600)

configs: {configs}
every field of the config is a flag: aatjax train CONFIG --flags lists them
"""

PLAN_HELP = """usage: aatjax plan [CONFIG] --topology NAME ... [--method NAME] [--FIELD VALUE ...]

Compiles the train step of CONFIG for a TPU, a pod, fake CPU devices or the GPU here, and prints
whether it fits, bytes a device, collectives, FLOPs, and lower bounds on time and input. Needs no
TPU, no data and no weights. Exit code 1 where it does not fit.

  --topology NAME    v4, v5e, v5p, v6e or tpu7x with a grid (v5e:16x16, v5p:4x4x4), cpu:8, gpu
  --per-device N     clips a device a step (default: training.batch-size over all devices)
  --classes N        outputs of the head where the data do not tell (default 50)
  --advise           also compile what could be changed, as is done where it does not fit
  --json             one JSON object a topology
  --method NAME      another method: a row of `aatjax methods`, or one at its defaults

configs: {configs}
every field of the config is a flag: aatjax plan CONFIG --flags lists them
"""

SUMMARY_HELP = """usage: aatjax summary [CONFIG] [--method NAME] [--FIELD VALUE ...]

Prints the trained and frozen parameters of what CONFIG says, module by module; trains nothing.

  --method NAME      another method: a row of `aatjax methods`, a method at its defaults, or
                     several joined by +

configs: {configs}
every field of the config is a flag: aatjax summary CONFIG --flags lists them
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `aatjax` command; exits with the code of the error, if any."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names that the locale cannot write are escaped
            stream.reconfigure(errors="backslashreplace")
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))


def run(arguments: list[str]) -> int:
    """Runs one command and returns its exit code; a user's mistake gives one line, no traceback."""
    try:
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(overview())
            return 0
        if arguments[0] == "--version":
            from importlib.metadata import version

            print(version("aatjax"))
            return 0
        verb, rest = arguments[0], arguments[1:]
        if verb not in VERBS:
            import difflib

            near = difflib.get_close_matches(verb, VERBS, n=1)
            hint = f", did you mean {near[0]!r}?" if near else f" (there are {', '.join(VERBS)})"
            raise UsageError(f"unknown command {verb!r}{hint}")
        command: Callable[[list[str]], None] = globals()[f"_{verb}"]
        _quiet_libraries()
        with terminable():
            command(rest)
        sys.stdout.flush()
        return 0
    except AatjaxError as error:
        print(f"aatjax: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return _leave(error.exit_code)
    except SystemExit as end:  # --help, and what tyro says of a flag
        return end.code if isinstance(end.code, int) else 2 * (end.code is not None)
    except KeyboardInterrupt:
        print("aatjax: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as if SIGPIPE had ended it: not everything was written


def _leave(code: int) -> int:
    """The exit code; where other processes run, ends at once instead of waiting for them."""
    if "aatjax.train.processes" in sys.modules:
        from aatjax.train.processes import several

        with contextlib.suppress(RuntimeError, AssertionError):  # no device: no peers
            if several():
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
    return code


def _keep_compiled() -> None:
    """Keeps compiled programs in the user's cache folder, for this version and kind of machine."""
    import hashlib
    import platform

    import jax

    if getattr(jax.config, "jax_compilation_cache_dir", None) is not None:
        return
    try:
        about = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0]
    except OSError:
        about = platform.processor()
    machine = hashlib.sha256(f"{platform.machine()} {about}".encode()).hexdigest()[:12]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "aatjax" / "compiled" / f"{jax.__version__}-{machine}"
    jax.config.update("jax_compilation_cache_dir", str(folder))


def overview() -> str:
    """The text of `aatjax --help`."""
    width = max(map(len, VERBS))
    lines = [
        "usage: aatjax VERB ...",
        "",
        "Parameter-efficient fine-tuning of the Audio Spectrogram Transformer.",
        "",
        *(f"  {verb:<{width}}  {what}" for verb, what in VERBS.items()),
        "",
        "aatjax train            runs at once, on synthetic sounds and the weights in the package",
        "aatjax VERB --help      more about one verb",
    ]
    return "\n".join(lines)


def _quiet_libraries() -> None:
    import logging
    import warnings

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.getLogger("absl").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module="orbax")


class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line, with the nearest flag."""

    def error(self, message: str) -> NoReturn:
        wrong = next((w for w in message.split() if w.startswith("--")), None)
        hint = "" if wrong is None else _nearest(wrong, list(self._option_string_actions))
        raise UsageError(f"{message}{hint}; see {self.prog} --help")


def _nearest(word: str, known: Sequence[str]) -> str:
    """`, did you mean ...?` where one of the known words is near."""
    import difflib

    near = difflib.get_close_matches(word.partition("=")[0], known, n=1, cutoff=0.7)
    return f", did you mean {near[0]!r}?" if near and near[0] != word else ""


def _parser(verb: str) -> argparse.ArgumentParser:
    return _Parser(prog=f"aatjax {verb}", description=VERBS[verb], allow_abbrev=False)


def _config(verb: str, arguments: list[str]) -> tuple[Any, argparse.Namespace]:
    """CONFIG, the flags of the verb, and every other flag as a field of the config."""
    import textwrap

    import tyro

    from aatjax.config import available, load_config
    from aatjax.petl import METHODS

    if any(a in ("-h", "--help") for a in arguments):
        text = {"train": TRAIN_HELP, "plan": PLAN_HELP}.get(verb, SUMMARY_HELP)
        indent = " " * 21
        names = ", ".join(sorted(METHODS.keys() - {"combined"}))
        methods = textwrap.fill(names, 98, initial_indent=indent, subsequent_indent=indent)
        print(text.format(methods=methods, configs=", ".join(available())))
        raise SystemExit(0)
    parser = _Parser(prog=f"aatjax {verb}", add_help=False, allow_abbrev=False)
    parser.add_argument("--method")
    parser.add_argument("--run", type=Path)
    parser.add_argument("--cross-validate", action="store_true")
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--flags", action="store_true")
    parser.add_argument("--allow-change", action="append", default=[])
    parser.add_argument("--coordinator")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    parser.add_argument("--stuck-after", type=float, default=600.0)
    if verb == "plan":
        parser.add_argument("--topology", nargs="+", default=[])
        parser.add_argument("--per-device", type=int)
        parser.add_argument("--classes", type=int)
        parser.add_argument("--advise", action="store_true")
        parser.add_argument("--json", action="store_true")
    name = arguments[0] if arguments and not arguments[0].startswith("-") else None
    options, fields = parser.parse_known_args(arguments[1 if name else 0 :])
    for field in fields:
        hint = _nearest(field, list(parser._option_string_actions))
        if field.startswith("--") and "." not in field and hint:
            raise UsageError(f"unknown flag {field!r}{hint}")
    config = load_config(name or "default")
    if options.method:
        config = config.with_method(options.method)
    if options.flags:
        fields = ["--help"]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            config = tyro.cli(
                tyro.conf.AvoidSubcommands[type(config)],
                default=config,
                args=fields,
                prog=f"aatjax {verb} {name or 'default'}",
                description="Every field of the config as a flag.",
            )
    except SystemExit as end:
        if not said.getvalue():
            raise
        raise UsageError(_unbox(said.getvalue())) from end
    return config, options


def _unbox(text: str) -> str:
    """What tyro says of a wrong flag in a box of several lines, as one line."""
    inside = (line.strip(" │") for line in text.splitlines()[1:])  # the first is a title
    words = (line for line in inside if line.strip("─-╰╯"))
    return " ".join(words).partition(" For full helptext")[0]


def _train(arguments: list[str]) -> None:
    config, options = _config("train", arguments)
    from aatjax import experiment
    from aatjax.train import processes

    given = processes.Processes(options.coordinator, options.processes, options.process)
    processes.start(given)
    processes.check_devices()
    _keep_compiled()
    show = None if options.quiet else sys.stderr
    more = {"allow_change": options.allow_change, "stuck_after": options.stuck_after}
    if options.cross_validate:
        result = experiment.cross_validate(config, run_dir=options.run, show=show, **more)
        if not processes.is_main():
            return
        rows = [
            [f"fold {fold}", f"{r.trainable:,}", _value(r.headline), f"{r.seconds:.0f}"]
            for fold, r in result.folds.items()
        ]
        headline = (result.metric, result.mean, result.low, result.high)
        seconds = sum(r.seconds for r in result.folds.values())
        rows.append(["mean", "", _value(headline), f"{seconds:.0f}"])
        print(_table([config.petl.name, "trainable", result.metric, "seconds"], rows))
        return
    result = experiment.train(config, run_dir=options.run, show=show, **more)
    if not processes.is_main():
        return
    metric = result.headline[0] if result.headline else "test"
    row = [result.method, f"{result.trainable:,}", _value(result.headline), f"{result.seconds:.0f}"]
    print(_table(["method", "trainable", metric, "seconds"], [row]))
    print(f"adapter: {result.artefact} ({result.artefact.stat().st_size / 1e6:.2f} MB)")


def _chaos(arguments: list[str]) -> None:
    parser = _parser("chaos")
    parser.add_argument("config", nargs="?", default="default", help="a small config")
    parser.add_argument("--workdir", type=Path, required=True, help="a new folder on the disk")
    parser.add_argument("--interruptions", type=int, default=20, help="how many (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="seed of their moments")
    options, fields = parser.parse_known_args(arguments)
    if options.interruptions < 1:
        raise UsageError(f"--interruptions {options.interruptions} must be at least 1")
    from aatjax.chaos import Trial

    trial = Trial(
        [options.config, *fields], options.workdir, seed=options.seed,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )  # fmt: skip
    found = trial.run(options.interruptions)
    certificate = options.workdir / "certificate.txt"
    certificate.write_text(found.text() + "\n", encoding="utf-8")
    print(found.text())
    if found.problems:
        raise SystemExit(1)


def _plan(arguments: list[str]) -> None:
    config, options = _config("plan", arguments)
    import json

    from aatjax import plan

    if not options.topology:
        raise UsageError("plan needs --topology, such as v5e:4x4, cpu:8 or gpu")
    plan.prepare_environment(options.topology)
    classes = options.classes or plan.classes_of(config) or 50
    more = {"num_classes": classes, "batch_per_device": options.per_device}
    _, remark = plan.shape_of(config.model, classes)
    if remark is not None:
        print(f"aatjax: {remark}", file=sys.stderr)
    fits = True
    for topology in options.topology:
        found = plan.plan(config, topology, **more)
        fits = fits and found.fits
        rows = []
        if options.advise or not found.fits:
            rows = plan.advice(config, topology, found, **more)
        if options.json:
            changes = {what: one.to_json() for what, one in rows}
            print(json.dumps({**found.to_json(), "advice": changes}), flush=True)
        else:
            print(_plan_text(config.petl.name, found, rows), flush=True)
    if not fits:
        raise SystemExit(1)


def _plan_text(method: str, found: Any, rows: list[tuple[str, Any]]) -> str:
    """A plan as a person reads it."""

    def gib(size: float) -> str:
        return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"

    have = "" if found.memory is None else f" of {gib(found.memory)}"
    verdict = "fits" if found.fits else f"does not fit, by {gib(found.over)}"
    chips = f"{found.chips} chips, " if found.chips != found.devices else ""
    lines = [
        f"{method} on {found.topology}: {chips}{found.devices} devices, {found.hosts} hosts, "
        f"{found.batch_size} clips a step, {found.dtype}, {found.trainable:,} trainable",
        f"  memory a device   {verdict}: {gib(found.needed)}{have}",
    ]
    if found.arguments:
        kept = found.outputs - found.aliased
        parts = [f"arguments {gib(found.arguments)}", f"temporaries {gib(found.temporaries)}"]
        lines.append(f"                    {', '.join([*parts, f'outputs {gib(kept)}'])}")
        moved = [f"{n} {kind} {gib(size)}" for kind, (n, size) in found.collectives.items()]
        lines.append(f"  collectives       {', '.join(moved) or 'none'}")
        lines.append(f"  kernels           {found.kernels} Pallas calls a step")
    total = found.flops * found.devices
    lines.append(
        f"  FLOPs             {total / 1e12:.2f} T a step, {found.flops / 1e12:.3f} T a device"
    )
    if found.step_s is not None:
        bound = "compute" if found.step_s == found.compute_s else "memory"
        lines += [
            f"  step              at least {1e3 * found.step_s:.1f} ms ({bound}; "
            f"{1e3 * found.compute_s:.1f} ms compute, {1e3 * found.memory_s:.1f} ms memory, "
            f"{gib(found.traffic)} moved)",
            f"  input             up to {found.clips_per_host:,.0f} clips/s from each host",
        ]
    lines.append(f"  compiled in       {found.compile_s:.0f} s")
    for what, one in rows:
        saved = gib(abs(found.needed - one.needed))
        word = "saves" if one.needed < found.needed else "adds"
        lines.append(
            f"  {what:<26} {word} {saved}: {gib(one.needed)}, {'fits' if one.fits else 'too much'}"
        )
    return "\n".join(lines)


def _summary(arguments: list[str]) -> None:
    config, _ = _config("summary", arguments)
    from aatjax import experiment, petl
    from aatjax.counts import summary

    classes = 10
    if config.data.format == "synthetic" or config.data.path is not None:
        classes = len(experiment.divide(config.data).train.classes)
    model = experiment.load_backbone(config.model, num_classes=classes, seed=0)
    print(summary(petl.adapt(model, config.petl)))


def _methods(arguments: list[str]) -> None:
    parser = _parser("methods")
    parser.add_argument("--size", default="base", choices=("tiny", "small", "base"))
    parser.add_argument("--frames", type=int, default=500, help="input length (default 500)")
    parser.add_argument("--classes", type=int, default=50, help="classes (default 50)")
    parser.add_argument(
        "--body-norm", action="store_true",
        help="the head is a linear layer alone, after the mean of all tokens (arXiv 2312.03694)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    import json

    from aatjax.comparison import compare
    from aatjax.models.config import ASTConfig

    changes = {"pool": "mean_all", "head_norm": False} if options.body_norm else {}
    config = ASTConfig.size(
        options.size, frames=options.frames, num_classes=options.classes, **changes
    )
    costs = compare(config)
    if options.json:
        rows = [
            {"name": c.name, "trainable": c.trainable, "share": c.share, "flops": c.flops,
             "method": c.method.to_json()}
            for c in costs
        ]  # fmt: skip
        print(json.dumps(rows, indent=2))
        return
    table = [
        [c.name, c.method.name, c.placement, f"{c.trainable:,}", f"{c.share:.2%}",
         f"{c.flops / 1e9:+.3f}"]
        for c in costs
    ]  # fmt: skip
    heads = ["row", "method", "placement", "trainable", "share", "GFLOPs a clip"]
    print(_table(heads, table))


def _eval(arguments: list[str]) -> None:
    parser = _parser("eval")
    parser.add_argument("adapter", type=Path, help="adapter.safetensors")
    parser.add_argument("path", nargs="?", help="labelled sounds; default: the run's own test part")
    parser.add_argument("--format", default="auto", help="auto, folder, manifest, esc or names")
    parser.add_argument("--base", help="the backbone's weights, where they have moved")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    import json

    from aatjax import experiment
    from aatjax.config import Data
    from aatjax.train.artefact import load_adapter

    adapter = load_adapter(options.adapter, base=options.base)
    data = None if options.path is None else Data(path=options.path, format=options.format)
    result, source = experiment.evaluate_adapter(adapter, data)
    if options.json:
        print(json.dumps(result.to_json(), indent=2))
    else:
        print(f"{options.adapter} on {source.name}")
        print(result.table())


def _predict(arguments: list[str]) -> None:
    parser = _parser("predict")
    parser.add_argument("adapter", type=Path, help="adapter.safetensors, or weights with a head")
    parser.add_argument("files", nargs="+", help="sound files of any length")
    parser.add_argument("--base", help="the backbone's weights, where they have moved")
    parser.add_argument("--hop", type=float, help="seconds between windows (default: no overlap)")
    parser.add_argument("--top", type=int, default=3, help="classes shown (default 3)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, with windows")
    options = parser.parse_args(arguments)
    import json

    from aatjax.audio.listing import show
    from aatjax.audio.waveform import BadAudio
    from aatjax.classifier import Classifier

    classifier = Classifier.load(options.adapter, base=options.base)
    failed: list[BadAudio] = []
    for path in options.files:
        try:
            prediction = classifier.predict(path, hop=options.hop)
        except BadAudio as error:
            failed.append(error)
            print(f"aatjax: {error}", file=sys.stderr)
            continue
        if options.json:
            print(json.dumps(prediction.to_json()), flush=True)
        else:
            best = "  ".join(f"{label} {p:.3f}" for label, p in prediction.top(options.top))
            print(f"{show(path)}  {best}", flush=True)
    if failed:
        raise DataError(f"{len(failed)} of {len(options.files)} files could not be read")


def _convert(arguments: list[str]) -> None:
    parser = _parser("convert")
    parser.add_argument("source", help="file, folder or Hugging Face id (owner/name)")
    parser.add_argument("out", type=Path, help="file or folder to write")
    parser.add_argument(
        "--to", choices=("native", "hf", "orbax"),
        help="default: native for a name ending in .safetensors, else hf",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument("--frames", type=int, help="another input length, positions fitted")
    parser.add_argument("--rgb", choices=("sum", "mean"), default="sum")
    parser.add_argument("--revision")
    options = parser.parse_args(arguments)

    from aatjax.audio.frontend import PRESETS
    from aatjax.convert import read_checkpoint, write_hf, write_native, write_orbax
    from aatjax.loading import find, fit_positions

    checkpoint = read_checkpoint(find(options.source, options.revision), rgb=options.rgb)
    if options.frames is not None or options.to == "hf":
        checkpoint = fit_positions(checkpoint, options.frames)
    params, config, labels = checkpoint.params, checkpoint.config, checkpoint.labels
    form = options.to or ("native" if options.out.suffix == ".safetensors" else "hf")
    notes: tuple[str, ...] = ()
    if form == "hf":
        mean, std = checkpoint.statistics or PRESETS["audioset"]
        notes = write_hf(options.out, params, config, labels, mean=mean, std=std)
    elif form == "native":
        write_native(
            options.out, params, config, labels, options.dtype,
            grid=checkpoint.grid, rule=checkpoint.rule, statistics=checkpoint.statistics,
        )  # fmt: skip
    else:
        write_orbax(
            options.out, params, config, labels,
            grid=checkpoint.grid, rule=checkpoint.rule, statistics=checkpoint.statistics,
        )  # fmt: skip
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    count = sum(value.size for value in params.values())
    print(f"{options.out}: {form}, from {checkpoint.layout}, {count:,} parameters")


def _value(headline: tuple[str, float | None, float | None, float | None] | None) -> str:
    if headline is None or headline[1] is None:
        return "n/a"
    _, value, low, high = headline
    bounds = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
    return f"{value:.3f}{bounds}"


def _table(heads: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
             for row in [heads, *rows]]  # fmt: skip
    return "\n".join(lines)
