"""Estimates memory, FLOPs and traffic of a config's train step on a TPU, without one."""

from typing import Any

from aatjax.cli.arguments import ConfigArguments, Count
from aatjax.errors import UsageError

GROUP = "plan"


def main(
    config: ConfigArguments,
    *,
    fields: list[str],
    topology: tuple[str, ...] = (),
    per_device: Count | None = None,
    classes: Count | None = None,
    advise: bool = False,
    json: bool = False,
) -> None:
    """Compile the train step for a TPU, a pod, fake CPU devices or the GPU of this machine.

    Args:
        topology: v4, v5e, v5p, v6e or tpu7x with a grid (v5e:16x16, v5p:4x4x4), cpu:8, gpu
        per_device: clips per device and step (default: training.batch-size over all devices)
        classes: outputs of the head if the data is not known (default 50)
        advise: also compile the changes that save memory, as is done if the step does not fit
        json: print one JSON object per topology
    """
    settings = config.load("plan", fields)
    from json import dumps

    import jax

    from aatjax.analysis import plan

    jax.config.update("jax_enable_compilation_cache", False)  # the time to compile is reported
    if not topology:
        raise UsageError("plan needs --topology, such as v5e:4x4, cpu:8 or gpu")
    plan.hide_accelerators(topology)
    classes = classes or plan.infer_num_classes(settings) or 50
    more = {"num_classes": classes, "batch_per_device": per_device}
    fits = True
    for name in topology:
        found = plan.plan_step(settings, name, **more)
        fits = fits and found.fits
        rows = []
        if advise or not found.fits:
            rows = plan.suggest_changes(settings, found, **more)
        if json:
            changes = {what: one.to_json() for what, one in rows}
            print(dumps({**found.to_json(), "advice": changes}), flush=True)
        else:
            print(_plan_text(settings.petl.name, found, rows), flush=True)
    if not fits:
        raise SystemExit(1)


def _plan_text(method: str, found: Any, rows: list[tuple[str, Any]]) -> str:
    """Return the plan as text."""

    def gib(size: float) -> str:
        return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"

    have = "" if found.memory is None else f" of {gib(found.memory)}"
    verdict = "fits" if found.fits else f"does not fit, by {gib(found.over)}"
    chips = f"{found.chips} chips, " if found.chips != found.devices else ""
    lines = [
        f"{method} on {found.topology}: {chips}{found.devices} devices, {found.hosts} hosts, "
        f"{found.batch_size} clips per step, {found.dtype}, {found.trainable:,} trainable",
        f"  memory per device {verdict}: {gib(found.needed)}{have}",
    ]
    if found.arguments:
        kept = found.outputs - found.aliased
        parts = [f"arguments {gib(found.arguments)}", f"temporaries {gib(found.temporaries)}"]
        lines.append(f"                    {', '.join([*parts, f'outputs {gib(kept)}'])}")
        moved = [f"{n} {kind} {gib(size)}" for kind, (n, size) in found.collectives.items()]
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
