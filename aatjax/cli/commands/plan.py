"""Estimates memory, FLOPs and traffic of a config's train step on a TPU, without one."""

from json import dumps
from typing import Annotated, Any

from aatjax.cli.arguments import ConfigArguments, Count
from aatjax.errors import Range, UsageError, format_count

GROUP = "plan"


def main(
    config: ConfigArguments,
    *,
    fields: list[str],
    topology: tuple[str, ...] = (),
    per_device: Count | None = None,
    classes: Count | None = None,
    fit: bool = False,
    memory: Annotated[float, Range(above=0)] | None = None,
    advise: bool = False,
    json: bool = False,
) -> None:
    """Compile the train step for a TPU, a pod, fake CPU devices or the GPU of this machine.

    Args:
        topology: v4, v5e, v5p, v6e or tpu7x with a grid (v5e:16x16, v5p:4x4x4), cpu:8, gpu
        per_device: clips per device and step (default: training.batch-size over all devices, or
            the nearest that divides)
        classes: outputs of the head if the data is not known (default 50)
        fit: find the largest batch per device that fits, with and without rematerialisation
            (--model.remat); without --topology for this machine
        memory: GiB of a device (default: of the chip, the GPU, or this machine's memory)
        advise: also compile the changes that save memory, as is done if the step does not fit
        json: print one JSON object per topology
    """
    settings = config.load("plan", fields)
    if fit and (per_device is not None or advise):
        raise UsageError("--fit finds the batch itself: omit --per-device and --advise")
    import jax

    from aatjax.analysis import plan
    from aatjax.analysis.topology import hide_accelerators

    jax.config.update("jax_enable_compilation_cache", False)  # the time to compile is reported
    if not topology:
        if not fit:
            raise UsageError("plan needs --topology, such as v5e:4x4, cpu:8 or gpu")
        topology = ("gpu" if jax.default_backend() == "gpu" else "cpu:1",)
    hide_accelerators(topology)
    classes = classes or plan.infer_num_classes(settings) or 50
    limit = None if memory is None else int(memory * 2**30)
    if fit:
        fits = [_fit(settings, name, classes, limit, json) for name in topology]
    else:
        more = {"num_classes": classes, "batch_per_device": per_device, "memory": limit}
        fits = [_plan(settings, name, more, advise, json) for name in topology]
    if not all(fits):
        raise SystemExit(1)


def _plan(settings: Any, name: str, more: dict[str, Any], advise: bool, json: bool) -> bool:
    """Plan one topology, print it, and return whether the step fits."""
    from aatjax.analysis import plan

    found = plan.plan_step(settings, name, **more)
    rows = []
    if advise or not found.fits:
        rows = plan.suggest_changes(settings, found, **more)
    if json:
        changes = {what: one.to_json() for what, one in rows}
        print(dumps({**found.to_json(), "advice": changes}), flush=True)
    else:
        print(_plan_text(settings.petl.name, found, rows), flush=True)
    return found.fits


def _fit(settings: Any, name: str, classes: int, limit: int | None, json: bool) -> bool:
    """Find the largest batches of one topology, print them, and return whether a clip fits."""
    from aatjax.analysis.largest_batch import find_largest_batch

    found = [
        find_largest_batch(settings, name, remat=remat, num_classes=classes, memory=limit)
        for remat in (False, True)
    ]
    if json:
        print(dumps({"topology": name, "largest": [one.to_json() for one in found]}), flush=True)
    else:
        print(_fit_text(settings.petl.name, found), flush=True)
    return any(one.per_device for one in found)


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"


def _fit_text(method: str, found: list[Any]) -> str:
    """Return the largest batches as text."""
    plan = found[0].plan
    lines = [
        f"{method} on {plan.topology}: {plan.devices} devices, {plan.dtype}, "
        f"{_gib(found[0].memory)} per device"
    ]
    for one in found:
        what = "--model.remat true" if one.remat else "--model.remat false"
        text = f"does not fit: one clip per device needs {_gib(one.plan.needed)}"
        if one.per_device:
            text = (
                f"up to {format_count(one.per_device, 'clip')} per device, "
                f"{one.plan.batch_size:,} per step, in {_gib(one.plan.needed)}"
            )
        lines.append(f"  {what:<20} {text} ({format_count(len(one.compiled), 'program')} compiled)")
    return "\n".join(lines)


def _plan_text(method: str, found: Any, rows: list[tuple[str, Any]]) -> str:
    """Return the plan as text."""

    have = "" if found.memory is None else f" of {_gib(found.memory)}"
    verdict = "fits" if found.fits else f"does not fit, by {_gib(found.over)}"
    chips = f"{found.chips} chips, " if found.chips != found.devices else ""
    lines = [
        f"{method} on {found.topology}: {chips}{found.devices} devices, {found.hosts} hosts, "
        f"{found.batch_size} clips per step, {found.dtype}, {found.trainable:,} trainable",
        f"  memory per device {verdict}: {_gib(found.needed)}{have}",
    ]
    if found.asked is not None:
        lines.insert(
            1,
            f"  batch             {found.asked} clips do not divide over the devices: planned with "
            f"the nearest that does (--training.batch-size {found.batch_size})",
        )
    if found.arguments:
        kept = found.outputs - found.aliased
        parts = [f"arguments {_gib(found.arguments)}", f"temporaries {_gib(found.temporaries)}"]
        lines.append(f"                    {', '.join([*parts, f'outputs {_gib(kept)}'])}")
        moved = [f"{n} {kind} {_gib(size)}" for kind, (n, size) in found.collectives.items()]
        lines.append(f"  collectives       {', '.join(moved) or 'none'}")
        lines.append(f"  kernels           {found.kernels} Pallas calls per step")
    total = found.flops * found.devices
    lines.append(
        f"  FLOPs             {total / 1e12:.2f} T per step, {found.flops / 1e12:.3f} T per device"
    )
    if found.step_s is not None:
        bound = "compute" if found.step_s == found.compute_s else "memory"
        lines += [
            f"  step              at least {1e3 * found.step_s:.1f} ms ({bound}; "
            f"{1e3 * found.compute_s:.1f} ms compute, {1e3 * found.memory_s:.1f} ms memory, "
            f"{_gib(found.traffic)} moved)",
            f"  input             up to {found.clips_per_host:,.0f} clips/s from each host",
        ]
    lines.append(f"  compiled in       {found.compile_s:.0f} s")
    for what, one in rows:
        saved = _gib(abs(found.needed - one.needed))
        word = "saves" if one.needed < found.needed else "adds"
        lines.append(
            f"  {what:<26} {word} {saved}: {_gib(one.needed)}, {'fits' if one.fits else 'too much'}"
        )
    return "\n".join(lines)
