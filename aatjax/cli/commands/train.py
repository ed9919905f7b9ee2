"""`aatjax train`: trains a config and prints its figures."""

import argparse
import sys
from pathlib import Path
from typing import Any

from aatjax.cli.arguments import config_of, text_table, with_interval

HELP = """usage: aatjax train [CONFIG] [--method NAME] [--run DIR] [--FIELD VALUE ...]

Trains what CONFIG says (a name, a .py or a .json file; by default the embedded one, which needs
no download), prints the result and where the adapter lies. The same command goes on after an
interruption.

  --method NAME      another method: a row of `aatjax methods` such as conformer_houlsby, several
                     joined by +, or one at its defaults:
{methods}
  --run DIR          run folder (default runs/CONFIG-METHOD)
  --cross-validate   once for every fold of the data or run of its protocol, mean and interval
  --protocol NAME    divide a benchmark as a paper does: honest (default), aat or petl
  --draws N          few-shot training (--data.shots K) N times, each with other clips
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


def main(arguments: list[str]) -> None:
    """Runs `aatjax train`."""
    config, options = config_of("train", arguments, HELP, _flags)
    if options.protocol is not None:
        config = config.with_protocol(options.protocol)
    from aatjax.experiments import cross_validation
    from aatjax.experiments import run as experiment
    from aatjax.train import distributed

    given = distributed.Processes(options.coordinator, options.processes, options.process)
    distributed.start_processes(given)
    distributed.check_devices()
    keep_compiled()
    show = None if options.quiet else sys.stderr
    more = {"allow_change": options.allow_change, "stuck_after": options.stuck_after}
    if options.cross_validate or options.draws is not None:
        repeated = cross_validation.cross_validate(
            config,
            run_dir=options.run,
            show=show,
            draws=options.draws,
            folds=options.cross_validate,
            **more,
        )
        if distributed.is_main():
            print(_repeated_text(config.petl.name, repeated))
        return
    result = experiment.train(config, run_dir=options.run, show=show, **more)
    if not distributed.is_main():
        return
    metric = result.headline[0] if result.headline else "test"
    row = [
        result.method,
        f"{result.trainable:,}",
        with_interval(result.headline),
        f"{result.seconds:.0f}",
    ]
    print(text_table(["method", "trainable", metric, "seconds"], [row]))
    print("\n".join(_choice(result.about.get("chosen_on_test"))), end="")
    print(f"adapter: {result.artefact} ({result.artefact.stat().st_size / 1e6:.2f} MB)")


def _repeated_text(method: str, repeated: Any) -> str:
    """A row for each run, and the mean."""
    rows = [
        [
            name.replace("fold", "fold ").replace("draw", "draw "),
            f"{run.trainable:,}",
            with_interval(run.headline),
            f"{run.seconds:.0f}",
        ]
        for name, run in repeated.runs.items()
    ]
    seconds = sum(run.seconds for run in repeated.runs.values())
    mean = with_interval((repeated.metric, repeated.mean, repeated.low, repeated.high))
    name = "mean" if repeated.epoch is None else f"mean, epoch {repeated.epoch}"
    rows.append([name, "", mean, f"{seconds:.0f}"])
    if repeated.last is not None:
        rows.append(["mean, last epoch", "", f"{repeated.last:.3f}", ""])
    text = text_table([method, "trainable", repeated.metric, "seconds"], rows)
    return "\n".join([text, *_choice(repeated.chosen_on_test)])


def _choice(paper: str | None) -> list[str]:
    """What must be said of weights that were chosen by the clips that are reported."""
    if paper is None:
        return []
    return [f"NOTE: chosen by the clips that are reported, as in {paper}: the figure is too high"]


def keep_compiled() -> None:
    """Keeps compiled programs in the user's cache folder, for this version and kind of machine."""
    import platform

    import jax

    from aatjax.data.decode_cache import find_user_cache
    from aatjax.io.digest import hash_bytes

    if getattr(jax.config, "jax_compilation_cache_dir", None) is not None:
        return
    try:
        about = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0]
    except OSError:
        about = platform.processor()
    machine = hash_bytes(f"{platform.machine()} {about}")[:12]
    folder = find_user_cache() / "compiled" / f"{jax.__version__}-{machine}"
    jax.config.update("jax_compilation_cache_dir", str(folder))


def _flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path)
    parser.add_argument("--cross-validate", action="store_true")
    parser.add_argument("--protocol")
    parser.add_argument("--draws", type=int)
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--allow-change", action="append", default=[])
    parser.add_argument("--coordinator")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    parser.add_argument("--stuck-after", type=float, default=600.0)
