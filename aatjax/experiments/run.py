"""Experiments: a config trained and evaluated in its run folder."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from aatjax.audio.frontend import PRESETS, FrontEnd, compute_statistics
from aatjax.config import Config, Data, Model
from aatjax.convert.load import (
    check_source,
    load,
    make_front_end,
    reset_weights,
    select_load_options,
)
from aatjax.data.clip_windows import cut_clips
from aatjax.data.known_files import Peers
from aatjax.data.pipeline import make_eval_batches
from aatjax.data.source import Source
from aatjax.errors import AatjaxError, OutOfMemoryError, UsageError, format_count
from aatjax.experiments.clip_scores import write_clip_scores
from aatjax.experiments.older_runs import (
    fill_defaults,
    find_older_method,
    find_weights,
    was_stratified,
)
from aatjax.experiments.partition import Partition, find_audio_cache, make_partition, open_data
from aatjax.inference.calibration import calibrate_clips
from aatjax.io.digest import hash_file
from aatjax.io.json_file import write_json
from aatjax.io.lock import lock_folder
from aatjax.io.progress import SHOWN_AFTER, StageBar, TextStream, track
from aatjax.models.ast import AST
from aatjax.models.summary import summary
from aatjax.petl import Method, adapt
from aatjax.train.adapter_file import ARTEFACT, read_metadata
from aatjax.train.distributed import (
    agree,
    gather_bytes,
    get_watchdog,
    is_distributed,
    is_main,
    run_on_main,
)
from aatjax.train.fit import FitContext, Run, fit
from aatjax.train.fit_checks import check_changes, check_parts, check_scoring, check_selection
from aatjax.train.logging import Show, choose_stream
from aatjax.train.metrics.decisions import Calibration
from aatjax.train.metrics.results import format_clips
from aatjax.train.run_dir import RunClaims, has_checkpoint, restore_result
from aatjax.train.sharding import MeshShape
from aatjax.train.watchdog import Watchdog

Headline = tuple[str, float | None, float | None, float | None]
"""Metric, value, and the bounds of its 95% interval."""

LESS_MEMORY = (
    "take a smaller --training.batch-size, --model.dtype bfloat16, or --model.remat, which "
    "recomputes activations; `aatjax plan` estimates the memory in advance"
)


@dataclasses.dataclass(frozen=True)
class ExperimentResult:
    """Result of `train`.

    Attributes:
        method: short name of the method.
        trainable: number of trainable parameters.
        headline: metric, value and interval on the test clips, or None without any.
        counts: the number of test clips and their groups, as `320 clips, 64 groups`.
        seconds: training time.
        artefact: the adapter file.
        run: the whole run, or None where it was finished before.
        about: what reports state of the data, see `Partition`.
    """

    method: str
    trainable: int
    headline: Headline | None
    seconds: float
    artefact: Path
    run: Run | None
    counts: str = ""
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return what is printed, as values of JSON."""
        fields = {name: value for name, value in vars(self).items() if name != "run"}
        return {**fields, "artefact": str(self.artefact)}


def prepare_front_end(config: Config, model: AST, train: Source) -> FrontEnd:
    """Return the front end of a run, with its normalisation statistics."""
    data = config.data
    frontend = dataclasses.replace(make_front_end(model), pad=data.pad, channels=data.channels)
    if data.statistics == "model":
        return frontend
    if data.statistics != "train":
        return frontend.with_statistics(*PRESETS[data.statistics])
    clips = train
    if data.windows == "every":
        clips = cut_clips(train, frontend, data.scoring, train=True).windows
    batches = make_eval_batches(clips, frontend, batch_size=64)
    fitted = (
        (b["audio"][b["weight"] > 0], b["length"][b["weight"] > 0])
        for b in track(batches, "statistics", len(clips), 64)
    )
    return frontend.with_statistics(*compute_statistics(frontend, fitted))


def load_backbone(model: Model, *, num_classes: int, seed: int) -> AST:
    """Load the frozen model of a config, with a new head."""
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


def check_selections(config: Config, parts: Partition) -> None:
    """Refuse a config that chooses by validation clips where there are none.

    Raises:
        UsageError: it says what to give.
    """
    check_selection(config.training, parts.valid, parts.test, parts.chosen_on_test)
    check_scoring(config.data.scoring, parts.valid)


def name_run_folder(config: Config) -> Path:
    """Return the default folder of a config's runs."""
    fold = "" if config.data.fold is None else f"-fold{config.data.fold}"
    return Path("runs") / f"{config.name}-{config.petl.name}{fold}"


def train(
    config: Config,
    *,
    run_dir: str | Path | None = None,
    show: Show = "stderr",
    allow_change: Sequence[str] = (),
    stuck_after: float = 600.0,
    begin: Callable[[], None] = lambda: None,
) -> ExperimentResult:
    """Train a config, evaluate it, and write the run folder.

    The folder holds config.json, clips.json, checkpoints, metrics.jsonl, TensorBoard events,
    quarantine.jsonl (if files were unreadable), result.json, test_clips.json and
    adapter.safetensors. Called again with the same config, it resumes, or returns the finished
    result. What a finished run is made of is compared like that of a running one, and a folder that
    is refused stays as it was. More epochs go on from the last checkpoint where the learning rate
    does not depend on their number.

    Where several processes take part (`start_processes`), all call this with the same arguments,
    share the folder, and read their parts of each batch; process 0 writes.

    Args:
        config: the experiment.
        run_dir: its folder; by default `runs/<name>-<method>`.
        show: stream of the progress display; None or False for silence.
        allow_change: fields of the config that may have changed since the run was started, whole
            parts of it, or `clips` for the data set.
        stuck_after: seconds without progress of one process after which all are ended.
        begin: called when everything was checked that can be known without decoding a sound or
            building the model.

    Raises:
        UsageError: the folder is in use, or holds a run of another config or other clips; or
            processes were started with different arguments. The differences are listed.
        DataError, WriteError, NotFiniteError, InterruptedRunError: see the parts.
    """
    screen = choose_stream(show) if is_main() else None
    folder = Path(run_dir) if run_dir is not None else name_run_folder(config)
    check_changes(allow_change, config.to_json(), "frontend")
    watchdog = get_watchdog(stuck_after)
    with contextlib.ExitStack() as held:
        try:
            versions = {"aatjax": version("aatjax"), "jax": jax.__version__}
            agree({"config": config.to_json(), **versions}, {})
            run_on_main(lambda: held.enter_context(lock_folder(folder)))
            result = _train(config, folder, screen, allow_change, watchdog, begin)
        except AatjaxError as error:
            watchdog.finish(str(error))
            raise
        except Exception as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                short = OutOfMemoryError.explain(str(error), LESS_MEMORY)
                watchdog.finish(str(short))
                raise short from error
            if (lost := watchdog.blame(error)) is not None:
                raise lost from error
            raise
        watchdog.beat("start", 0)
        return result


def _train(
    config: Config,
    folder: Path,
    screen: TextStream | None,
    allow: Sequence[str],
    watchdog: Watchdog,
    begin: Callable[[], None],
) -> ExperimentResult:
    if any(name.startswith("data") for name in allow):
        allow = (*allow, "frontend")
    claims = RunClaims(folder, allow)
    stratified = run_on_main(lambda: was_stratified(claims))
    if stratified and config.data.split_method == "hash":
        data = dataclasses.replace(config.data, split_method="stratified")
        config = dataclasses.replace(config, data=data)
        if screen is not None:
            print(f"{folder}: keeps its split (data.split_method='stratified')", file=screen)
    weights = dataclasses.replace(
        config.model, source=run_on_main(lambda: find_weights(claims, config))
    )
    older = run_on_main(
        lambda: find_older_method(claims, dataclasses.replace(config, model=weights))
    )
    done = run_on_main(lambda: _check_config(claims, config, None if older is None else older[0]))
    if older is not None:
        config = dataclasses.replace(config, petl=Method.from_json(older[1]))
        if screen is not None:
            print(f"{folder}: keeps the sizes of its version: {config.petl}", file=screen)
    is_new = run_on_main(lambda: not claims.is_started)
    if done is None and (config.mesh != MeshShape() or jax.devices()[0].platform != "cpu"):
        check_parts(config.mesh.make(), config.training)  # before hours of reading
    quarantine = folder / "quarantine.jsonl" if is_main() else None

    def check(listed: Partition) -> None:
        check_selections(config, listed)
        check_source(config.model.source, config.model.revision)
        begin()

    # A folder with a run in it is written to only when everything agrees.
    peers = None
    if is_distributed():
        peers = Peers(jax.process_index(), jax.process_count(), gather_bytes)
    parts = make_partition(
        config.data,
        quarantine=quarantine if is_new else None,
        show=screen,
        peers=peers,
        check=check,
    )
    used = parts.sources()
    agree(
        {"data": {name: source.fingerprint() for name, source in used.items()}},
        {f"{name} clips": [clip.id for clip in source.clips] for name, source in used.items()},
    )
    changed = run_on_main(lambda: _check_clips(claims, used, is_finished=done is not None))
    seed = config.training.seed
    with _use_host_memory():
        backbone = load_backbone(weights, num_classes=len(parts.train.classes), seed=seed)
        if done is not None and not changed:
            _check_backbone(backbone, folder)
            run_on_main(claims.repair)
            if screen is not None:
                print(f"{folder}: finished before; delete it to retrain", file=screen)
            return _restore_result(done, folder)
        model = adapt(backbone, config.petl, seed=seed)
    counts = summary(model)
    if screen is not None:
        print(
            f"{config.petl.name}: {counts.trainable:,} trainable of {counts.total:,} parameters "
            f"({100 * counts.trainable / counts.total:.2f}%); "
            f"{format_count(len(parts.train), 'training clip')}",
            file=screen,
            flush=True,
        )
    with StageBar(quiet=screen is None, stream=screen, after=SHOWN_AFTER):
        frontend = prepare_front_end(config, model, parts.train)
    run = fit(
        model,
        parts.train,
        parts.test,
        valid=parts.valid,
        training=config.training,
        optim=config.optim,
        augment=config.augment,
        frontend=frontend,
        windows=config.data.windows,
        scoring=config.data.scoring,
        mesh=config.mesh,
        run_dir=folder,
        show=screen,
        context=FitContext(
            watchdog.beat,
            parts.chosen_on_test,
            find_audio_cache(config.data).parent / "prefix",
            holds_lock=True,
            claims=claims,
            begin=lambda: _list_unreadable(config.data, changed, quarantine),
        ),
    )
    watchdog.beat("report", 0)
    about = dict(parts.about)
    if parts.chosen_on_test is not None:
        about["chosen_on_test"] = parts.chosen_on_test
    if run.test_scores is not None and (omitted := run.test_scores.describe()):
        about["not_counted"] = "; ".join(omitted)
    result = ExperimentResult(
        config.petl.name,
        counts.trainable,
        None if run.test is None else run.test.headline,
        run.seconds,
        folder / ARTEFACT,
        run,
        "" if run.test is None else run.test.counts,
        about,
    )
    calibration = None
    if run.valid_scores is not None:
        logits, clips = run.valid_scores.select()
        calibration, text = calibrate_clips(logits, clips.targets(), run.multi_label)
        about["calibration"] = text
        if screen is not None:
            print(text, file=screen, flush=True)
    run_on_main(lambda: _write_result(folder, config, parts, counts.frozen, result, calibration))
    return result


def _check_config(
    claims: RunClaims, config: Config, method: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """Compare the config with that of the run folder; return the result of a finished run.

    A method of an older version stays as it was written, so that it is known again.
    """
    older = {} if method is None else {"petl": method}
    claims.check(
        "config.json",
        {**config.to_json(), **older},
        upgrade=lambda stored: {**fill_defaults(stored), **older},
    )
    return restore_result(claims.folder)


def _check_clips(
    claims: RunClaims, parts: Mapping[str, Source], *, is_finished: bool
) -> dict[str, str]:
    """Compare the clips with those of the run folder; return all changes that are allowed."""
    claims.check_clips(parts)
    if is_finished and claims.changed and not has_checkpoint(claims.folder):
        raise UsageError(
            f"{claims.folder}: the run is finished and its checkpoints are gone, so it cannot go "
            f"on with the change ({'; '.join(claims.changed.values())}): choose another folder "
            "(run_dir=)"
        )
    return claims.changed


def _check_backbone(backbone: AST, folder: Path) -> None:
    """Refuse the result of a finished run whose backbone is no longer the same."""
    before = read_metadata(folder / ARTEFACT).base
    now = backbone.origin
    if now is not None and now.fingerprint != before.fingerprint:
        raise UsageError(
            f"{folder} holds a run on other weights: {before.source} had fingerprint "
            f"{before.fingerprint[:12]}, now {now.fingerprint[:12]}: restore them, or choose "
            "another folder (run_dir=)"
        )


def _list_unreadable(data: Data, changed: Mapping[str, str], quarantine: Path | None) -> None:
    """List the unreadable files of a data set that has changed since the run was started."""
    if quarantine is not None and any(name.startswith("clips.") for name in changed):
        open_data(data, quarantine=quarantine)


def _restore_result(done: Mapping[str, Any], folder: Path) -> ExperimentResult:
    headline = None if done["headline"] is None else tuple(done["headline"])
    test = done.get("test") or {}
    return ExperimentResult(
        done["method"],
        done["trainable"],
        headline,
        done["seconds"],
        folder / ARTEFACT,
        None,
        format_clips(test["clips"], test.get("groups")) if "clips" in test else "",
        done.get("data", {}),
    )


def _write_result(
    folder: Path,
    config: Config,
    parts: Partition,
    frozen: int,
    result: ExperimentResult,
    calibration: Calibration | None,
) -> None:
    """Write the adapter files, and result.json."""
    run = result.run
    assert run is not None
    decisions: dict[str, Any] = {}
    if calibration is not None:
        decisions["decisions"] = calibration.to_json()
    extra = {"config": config.to_json(), "data": parts.train.fingerprint(), "about": result.about}
    for weights in run.models:
        if weights != run.selected:
            run.save(folder / f"{weights}.safetensors", weights=weights, extra=extra)
    run.save(folder / ARTEFACT, extra=extra | decisions)
    figures = {
        "method": result.method,
        "trainable": result.trainable,
        "frozen": frozen,
        "train_clips": len(parts.train),
        "headline": result.headline,
        "data": result.about,
        **decisions,
        **run.to_json(),
        "adapter": hash_file(folder / ARTEFACT),
    }
    if run.test is not None and run.test_scores is not None:
        write_clip_scores(folder, run.test, run.test_scores.select()[1])
    write_json(folder / "result.json", figures)


def _use_host_memory() -> contextlib.AbstractContextManager[Any]:
    """A context in which arrays are made in the host's memory, not on the first accelerator."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX runs without its CPU backend
        return contextlib.nullcontext()
