"""Runs a config: from sounds and weights to a trained adapter, its figures and its files."""

import contextlib
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import jax

from aatjax.audio.frontend import PRESETS, FrontEnd, compute_statistics
from aatjax.config import Config, Data, Model
from aatjax.convert.load import load, make_front_end, reset_weights, select_load_options
from aatjax.data.pipeline import make_eval_batches
from aatjax.data.source import Source
from aatjax.errors import AatjaxError, OutOfMemoryError, UsageError
from aatjax.experiments.partition import cache_folder, divide, open_data
from aatjax.experiments.run_dir import claim_clips, claim_config
from aatjax.inference.calibration import fit_calibration
from aatjax.io.json_file import read_json, write_json
from aatjax.io.lock import lock_folder
from aatjax.models.ast import AST
from aatjax.models.summary import summary
from aatjax.petl import adapt
from aatjax.train.distributed import agree, is_main, run_on_main
from aatjax.train.evaluation import clip_logits, measure_metrics
from aatjax.train.fit import FitContext, Run, fit
from aatjax.train.logging import TextStream
from aatjax.train.metrics.results import Metrics
from aatjax.train.watchdog import Watchdog

Headline = tuple[str, float | None, float | None, float | None]
Show = TextStream | Literal["stderr"] | None


@dataclasses.dataclass(frozen=True)
class Result:
    """What `train` returns.

    Attributes:
        method: short name of the method.
        trainable: number of parameters trained.
        headline: (metric, value, low, high) on the test clips, or None without any.
        seconds: training time.
        artefact: the adapter file.
        run: the whole run, or None where it was finished before.
        about: what a report must tell of the data, see `division.Parts`.
    """

    method: str
    trainable: int
    headline: Headline | None
    seconds: float
    artefact: Path
    run: Run | None
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def front_end(config: Config, model: AST, train: Source) -> FrontEnd:
    """The front end of a run, with its normalisation statistics."""
    data = config.data
    frontend = dataclasses.replace(make_front_end(model), pad=data.pad, channels=data.channels)
    if config.data.statistics == "model":
        return frontend
    if config.data.statistics != "train":
        return frontend.with_statistics(*PRESETS[config.data.statistics])
    batches = (
        (b["audio"][b["weight"] > 0], b["length"][b["weight"] > 0])
        for b in make_eval_batches(train, frontend, batch_size=64)
    )
    return frontend.with_statistics(*compute_statistics(frontend, batches))


def load_backbone(model: Model, *, num_classes: int, seed: int) -> AST:
    """The frozen model that a config names, with a new head."""
    backbone = load(
        model.source,
        num_classes=num_classes,
        revision=model.revision,
        seed=seed,
        **select_load_options(model),
    )
    if model.reset:
        reset_weights(backbone, seed)
    return backbone


def run_folder(config: Config) -> Path:
    """The default folder of a config's runs."""
    fold = "" if config.data.fold is None else f"-fold{config.data.fold}"
    return Path("runs") / f"{config.name}-{config.petl.name}{fold}"


def train(
    config: Config,
    *,
    run_dir: str | Path | None = None,
    show: Show = "stderr",
    allow_change: Sequence[str] = (),
    stuck_after: float = 600.0,
) -> Result:
    """Trains what a config says, evaluates it, and writes the run folder.

    The folder holds config.json, clips.json, checkpoints, metrics.jsonl, TensorBoard events,
    quarantine.jsonl (where files were unreadable), result.json and adapter.safetensors. Called
    again with the same config it goes on where it stopped, or returns the finished result.

    Where several processes were joined (`start_processes`), all call this with the same
    arguments, share the folder, and read their parts of each batch; process 0 writes.

    Args:
        config: the experiment.
        run_dir: its folder; by default `runs/<name>-<method>`.
        show: stream of the progress display, None for silence.
        allow_change: fields of the config that may have changed since the run was started, whole
            parts of it, or `clips` for the data set.
        stuck_after: seconds without progress of one process after which all are ended.

    Raises:
        UsageError: the folder holds a run of another config, or of other clips; or is in use; or
            processes were started with different things. The differences are listed.
        DataError, WriteError, NotFiniteError, InterruptedRunError: see the parts.
    """
    screen = (sys.stderr if isinstance(show, str) else show) if is_main() else None
    folder = Path(run_dir) if run_dir is not None else run_folder(config)
    watchdog = Watchdog(jax.process_index(), stuck=stuck_after)
    watchdog.start()
    with contextlib.ExitStack() as held:
        try:
            agree(
                {"config": config.to_json(), "aatjax": version("aatjax"), "jax": jax.__version__},
                {},
            )
            run_on_main(lambda: held.enter_context(lock_folder(folder)))
            result = _train(config, folder, screen, allow_change, watchdog)
        except AatjaxError as error:
            watchdog.finish(str(error))
            raise
        except Exception as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                short = OutOfMemoryError(_out_of_memory(error))
                watchdog.finish(str(short))
                raise short from error
            watchdog.blame()
            raise
        watchdog.finish()
        return result


def _out_of_memory(error: Exception) -> str:
    said = str(error).partition("RESOURCE_EXHAUSTED:")[2].strip().splitlines()
    return (
        f"out of memory: {(said or ['no details'])[0][:300]}; take a smaller "
        "--training.batch-size, --model.dtype bfloat16, or --model.remat, which recomputes "
        "activations; `aatjax plan` tells what fits before it is run"
    )


def _train(
    config: Config,
    folder: Path,
    screen: TextStream | None,
    allow: Sequence[str],
    watchdog: Watchdog,
) -> Result:
    result_file, artefact = folder / "result.json", folder / "adapter.safetensors"

    def claimed() -> dict[str, Any] | None:
        claim_config(folder, config, allow)
        return read_json(result_file) if result_file.exists() and artefact.exists() else None

    done = run_on_main(claimed)
    if done is not None:
        if screen is not None:
            print(f"{folder}: finished before; delete it to train anew", file=screen)
        headline = None if done["headline"] is None else tuple(done["headline"])
        return Result(
            done["method"],
            done["trainable"],
            headline,
            done["seconds"],
            artefact,
            None,
            done.get("data", {}),
        )

    quarantine = folder / "quarantine.jsonl" if is_main() else None
    parts = divide(config.data, quarantine=quarantine, show=screen)
    used = parts.sources()
    about = dict(parts.about)
    if parts.chosen_on_test is not None:
        about["chosen_on_test"] = parts.chosen_on_test
    agree(
        {"data": {name: source.fingerprint() for name, source in used.items()}},
        {f"{name} clips": [clip.id for clip in source.clips] for name, source in used.items()},
    )
    run_on_main(lambda: claim_clips(folder, used, allow))
    seed = config.training.seed
    classes = len(parts.train.classes)
    with _on_host():
        backbone = load_backbone(config.model, num_classes=classes, seed=seed)
        model = adapt(backbone, config.petl, seed=seed)
    counts = summary(model)
    if screen is not None:
        share = 100 * counts.trainable / counts.total
        print(
            f"{config.petl.name}: {counts.trainable:,} trainable of {counts.total:,} parameters "
            f"({share:.2f}%); {len(parts.train)} training clips",
            file=screen,
            flush=True,
        )
    run = fit(
        model,
        parts.train,
        parts.test,
        valid=parts.valid,
        training=config.training,
        optim=config.optim,
        augment=config.augment,
        frontend=front_end(config, model, parts.train),
        mesh=config.mesh,
        run_dir=folder,
        show=screen,
        context=FitContext(
            watchdog.beat, parts.chosen_on_test, cache_folder(config.data).parent / "prefix"
        ),
    )
    watchdog.beat("report", 0)
    headline = None if run.test is None else run.test.headline
    decided: dict[str, Any] = {}
    if parts.valid is not None and run.valid_logits is not None:
        targets = parts.valid.targets()
        decided["decisions"] = fit_calibration(run.valid_logits, targets, run.multi_label).to_json()

    def written() -> None:
        extra = {"config": config.to_json(), "data": parts.train.fingerprint(), "about": about}
        for weights in run.models:
            if weights != run.selected:
                run.save(folder / f"{weights}.safetensors", weights=weights, extra=extra)
        run.save(artefact, extra=extra | decided)
        figures = {
            "method": config.petl.name,
            "trainable": counts.trainable,
            "frozen": counts.frozen,
            "train_clips": len(parts.train),
            "headline": headline,
            "data": about,
            **decided,
            **run.to_json(),
        }
        write_json(result_file, figures)

    run_on_main(written)
    return Result(config.petl.name, counts.trainable, headline, run.seconds, artefact, run, about)


def _on_host() -> contextlib.AbstractContextManager[Any]:
    """A context in which arrays are made in the host's memory, not on the first accelerator."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX was told to leave the CPU alone
        return contextlib.nullcontext()


def evaluate_adapter(
    adapter: Any, data: Data | None = None, *, bootstrap: int = 1000
) -> tuple[Metrics, Source]:
    """Metrics of an adapter on the test part of its own config, or on other labelled sounds.

    Args:
        adapter: what `aatjax.load_adapter` returned.
        data: other data; its classes must be the adapter's.
        bootstrap: resamples for the intervals.
    """
    test = labelled_clips(adapter, data)
    logits = clip_logits(adapter.model, test, adapter.frontend)
    return measure_metrics(logits, test, bootstrap), test


def labelled_clips(adapter: Any, data: Data | None = None) -> Source:
    """The clips that `evaluate_adapter` evaluates on.

    Raises:
        UsageError: the adapter tells of no test part, its set has changed since it was trained, or
            the classes of the data are not its own.
    """
    if data is None:
        if "config" not in adapter.info:
            raise UsageError("the adapter holds no config: name the sounds to evaluate on")
        parts = divide(Config.from_json(adapter.info["config"]).data)
        if adapter.info.get("data", parts.train.fingerprint()) != parts.train.fingerprint():
            raise UsageError(
                f"{parts.train.name}: the training clips are not those that the adapter was "
                "trained on: files were added, removed or changed, and the test part of now may "
                "hold clips that it knows; name the sounds to evaluate on"
            )
        test = parts.test
        if test is None:
            raise UsageError(
                "the adapter's config has no test part: name the sounds to evaluate on"
            )
    else:
        test = open_data(dataclasses.replace(data, channels=adapter.frontend.channels))
    if test.classes != adapter.classes:
        missing = sorted(set(test.classes) - set(adapter.classes))
        raise UsageError(
            f"{test.name} has classes the adapter does not know ({', '.join(missing[:5])})"
            if missing
            else f"{test.name} has {len(test.classes)} of the adapter's {len(adapter.classes)} "
            "classes: use a manifest that lists the same classes"
        )
    return test
