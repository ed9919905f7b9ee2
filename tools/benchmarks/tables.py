"""Tables of the documents, made from the CSV files that benchmarks wrote.

A document holds a table between `<!-- bench.py tables: NAME -->` and `<!-- end -->`.
"""

import csv
import re
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from aatjax.experiments.compare.statistics import compute_paired_p, correct_p
from aatjax.experiments.compare.tables import make_markdown_table
from aatjax.train.metrics.intervals import mean_interval

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "docs/figures"
DOCUMENTS = ("docs/costs.md", "docs/results.md", "kernels/README.md")
PLACE = re.compile(r"(<!-- bench.py tables: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

Row = dict[str, str]


def tables() -> None:
    """Write the tables of all documents again."""
    for name in DOCUMENTS:
        path = ROOT / name
        path.write_text(fill(path.read_text()))
        print(path.relative_to(ROOT))


def fill(text: str) -> str:
    """Return a document with its tables made from the figures.

    Raises:
        KeyError: a table has an unknown name.
    """
    return PLACE.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}", text)


def read(name: str) -> list[Row]:
    """Return the rows of a CSV file of figures."""
    with (FIGURES / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def group(rows: Sequence[Row], *columns: str) -> dict[tuple[str, ...], list[Row]]:
    """Return the rows by their values in some columns, in the order in which these come."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[column] for column in columns), []).append(row)
    return found


def shorten(cpu: str) -> str:
    """Return the name of a processor; of the variables that limit it, what they mean."""
    name, _, limit = cpu.partition(", XLA_FLAGS=")
    return f"{name}; held to AVX2" if "AVX2" in limit else name


def make_epochs() -> str:
    """Return the time of an epoch against PyTorch, a table for each CPU and model."""
    titles = ("method", "attention of PyTorch", "PyTorch s", "aatjax s", "PyTorch / aatjax")
    titles = (*titles, "the same, CPU s", "page faults a step")
    parts = []
    about = ("cpu", "model", "frames", "batch")
    for (cpu, model, frames, batch), rows in group(read("epochs"), *about).items():
        lines = [
            (
                row["method"],
                {"sdpa": "fused", "eager": "plain"}[row["attention"]],
                row["pytorch_s"],
                row["aatjax_s"],
                row["ratio"],
                f"{float(row['pytorch_cpu_s']) / float(row['aatjax_cpu_s']):.2f}",
                row["aatjax_faults_a_step"],
            )
            for row in rows
        ]
        caption = f"{shorten(cpu)}. {model}, {frames} frames, batch {batch}:"
        parts.append(f"{caption}\n\n{make_markdown_table(titles, lines)}")
    return "\n\n".join(parts)


def make_step() -> str:
    """Return the time of a step of AST-base against PyTorch."""
    rows = [
        (shorten(row["cpu"]), row["step"], row["ms"], row["pytorch_float32_over"])
        for row in read("step")
    ]
    return make_markdown_table(("CPU", "step", "ms", "PyTorch float32 / it"), rows)


def make_soft_moe() -> str:
    """Return the time of the Soft-MoA layer: geometric means over shapes, and their range."""
    rows = []
    for (cpu,), of_cpu in group(read("soft_moe"), "device").items():
        columns = ("tokens", "slots")
        shapes = group(of_cpu, *columns).values()
        times = [{row["implementation"]: float(row["ms"]) for row in shape} for shape in shapes]
        for other in ("reference", "torch"):
            ratios = [each[other] / each["xla"] for each in times]
            mean = f"{statistics.geometric_mean(ratios):.2f}"
            rows.append((shorten(cpu), other, mean, f"{min(ratios):.2f}-{max(ratios):.2f}"))
    return make_markdown_table(
        ("CPU", "other", "other / `xla`", "least and largest of the shapes"), rows
    )


def make_prefix() -> str:
    """Return the time of epochs without and with stored tokens."""
    rows = [
        (
            f"{row['weights']}, {row['frames']} frames",
            row["method"],
            row["without_s"],
            row["with_s"],
            row["ratio"],
        )
        for row in read("prefix")
    ]
    return make_markdown_table(("model", "method", "without", "with", "without / with"), rows)


def make_intervals() -> str:
    """Return the share of the intervals that contain the truth, a column for each test set."""
    rows = [row for row in read("intervals") if row["what"] == "interval"]
    single = [row for row in rows if "folds" not in row["figure"]]
    designs = dict.fromkeys((row["clips"], row["groups"]) for row in single)
    heads = [f"{n} clips" + f", {groups} speakers" * bool(groups) for n, groups in designs]
    lines = []
    for (figure, truth), found in group(single, "figure", "truth").items():
        share = {(row["clips"], row["groups"]): row["share"] for row in found}
        lines.append((figure, truth, *(share.get(design, "") for design in designs)))
    text = make_markdown_table(("metric", "truth", *heads), lines)
    folds = [
        (row["figure"], row["clips"], row["truth"], row["share"], row["width"])
        for row in rows
        if "folds" in row["figure"]
    ]
    heads = ("figure", "clips per fold", "truth", "share", "mean width")
    return f"{text}\n\n{make_markdown_table(heads, folds)}"


def make_tests() -> str:
    """Return the share of tests with p < 0.05, without and with a true difference."""
    rows = [row for row in read("intervals") if row["what"] == "test"]
    gains = list(dict.fromkeys(row["truth"] for row in rows))
    lines = [
        (design, clips, groups, *(row["share"] for row in found))
        for (design, clips, groups), found in group(rows, "figure", "clips", "groups").items()
    ]
    heads = ("runs", "clips", "speakers", *(f"true difference {gain}" for gain in gains))
    return make_markdown_table(heads, lines)


def make_serving() -> str:
    """Return the latency of the server by part of the measurement, and its memory."""
    rows = read("serving")
    lines = [
        (row["part"], row["requests"], row["p50_ms"], row["p99_ms"], row["seconds"], row["rss_mib"])
        for row in rows
        if row["part"] != "memory"
    ]
    memory = [int(row["rss_mib"]) for row in rows if row["part"] == "memory"]
    if memory:
        count = sum(int(row["requests"]) for row in rows if row["part"] == "memory")
        span = f"{memory[0]} at first, {min(memory)} to {max(memory)}, {memory[-1]} at last"
        lines.append(("memory", f"{count}", "", "", "", span))
    heads = ("", "requests", "p50 ms", "p99 ms", "s from the start", "MiB")
    loads = [float(row["load_average"]) for row in rows]
    where = f"{shorten(rows[0]['cpu'])}; load average {min(loads):.0f} to {max(loads):.0f}"
    answers = Counter[str]()
    for row in rows:
        for status in row["answers"].split():
            number, _, code = status.partition("x")
            answers[code] += int(number)
    said = ", ".join(f"{number:,} answers {code}" for code, number in sorted(answers.items()))
    return f"{where}; {said}.\n\n{make_markdown_table(heads, lines)}"


def make_gpu_step() -> str:
    """Return the cost of a training step as compiled for an H100, by what runs its ops."""
    lines = [
        (
            row["method"],
            f"{row['batch']} x {row['frames']}",
            row["kernels"],
            f"{int(row['bytes']) / 1e9:.0f}",
            row["kernels_run"],
            f"{int(row['temporaries']) / 2**30:.1f}",
        )
        for row in read("gpu_step")
    ]
    heads = ("method", "clips x frames", "`--kernels`", "GB", "kernels", "GiB of temporaries")
    return make_markdown_table(heads, lines)


def _read_cells(part: str) -> tuple[list[Row], dict[str, dict[tuple[str, ...], float]]]:
    """Return the rows of a part of the verdict, and each method's accuracy by cell."""
    rows = [row for row in read("verdict") if row["part"] == part]
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for row in rows:
        cell = (row["backbone"], row["task"], row["fold"], row["shots"])
        found.setdefault(row["method"], {})[cell] = float(row["accuracy"])
    return rows, found


def _compare_folds(
    cells: dict[tuple[str, ...], float], others: dict[tuple[str, ...], float]
) -> tuple[str, float | None]:
    """Return the mean difference over folds with its interval, and p; backbones are averaged."""
    by_fold: dict[tuple[str, ...], list[float]] = {}
    for cell, accuracy in cells.items():
        by_fold.setdefault(cell[1:], []).append(accuracy - others[cell])
    change = np.array([np.mean(values) for values in by_fold.values()])
    middle, low, high = mean_interval(change)
    interval = "" if low is None or high is None else f" [{low:+.3f}, {high:+.3f}]"
    return f"{middle:+.3f}{interval}", compute_paired_p(change)


def make_adapt() -> str:
    """Return what `adapt` chose for each set, its accuracy, and the difference to ridge."""
    lines = []
    for (name,), rows in group(read("adapt"), "set").items():
        ridge, own = (
            {("", name, r["fold"]): float(r["accuracy"]) for r in rows if r["asked"] == asked}
            for asked in ("ridge", "")
        )
        chosen = [row for row in rows if not row["asked"]]
        trained = sum(row["epochs"] != "0" for row in chosen)
        lines.append(
            (
                name,
                f"{statistics.mean(float(row['left_out']) for row in chosen):.3f}",
                f"{trained} of {len(chosen)}",
                f"{statistics.mean(ridge.values()):.3f}",
                f"{statistics.mean(own.values()):.3f}",
                " ".join(f"{v:.3f}" for v in own.values()),
                _compare_folds(own, ridge)[0],
            )
        )
    heads = ("set", "left out", "trained", "ridge", "adapt", "folds", "over ridge")
    return make_markdown_table(heads, lines)


def make_verdict() -> str:
    """Return the accuracy of every method over all cells, and its difference to ridge."""
    rows, cells = _read_cells("main")
    backbones = list(dict.fromkeys(row["backbone"] for row in rows))
    ridge = cells["ridge"]
    against = {n: _compare_folds(own, ridge) for n, own in cells.items() if own is not ridge}
    p = {name: p for name, (_, p) in against.items() if p is not None}
    corrected, lines = correct_p(p), []
    for name, own in cells.items():
        of = [row for row in rows if row["method"] == name]
        means = (
            f"{statistics.mean(v for cell, v in own.items() if cell[0] == backbone):.3f}"
            for backbone in backbones
        )
        size = next(row["trainable"] for row in of if row["task"] == "esc10")
        spent = statistics.mean(float(row["cpu_s"]) for row in of)
        change = ("", "") if name == "ridge" else (against[name][0], f"{corrected[name]:.3f}")
        lines.append((name, f"{int(size):,}", *means, *change, f"{spent:.0f}"))
    heads = ("method", "trainable", *backbones, "over ridge", "p (Holm)", "CPU s")
    tasks = make_verdict_tasks(rows)
    return f"{make_markdown_table(heads, lines)}\n\n{tasks}"


def make_verdict_tasks(rows: Sequence[Row]) -> str:
    """Return the mean accuracy of every method by backbone and task."""
    columns = list(dict.fromkeys((row["backbone"], row["task"]) for row in rows))
    lines = []
    for (method,), of in group(rows, "method").items():
        by_column = group(of, "backbone", "task")
        means = (statistics.mean(float(r["accuracy"]) for r in by_column[c]) for c in columns)
        lines.append((method, *(f"{mean:.3f}" for mean in means)))
    return make_markdown_table(("method", *(f"{b}: {t}" for b, t in columns)), lines)


def make_verdict_shots() -> str:
    """Return the mean accuracy by clips per class."""
    rows, _ = _read_cells("shots")
    shots = list(dict.fromkeys(row["shots"] for row in rows))
    lines = []
    for (task, method), of in group(rows, "task", "method").items():
        by_shots = {k[0]: v for k, v in group(of, "shots").items()}
        means = (f"{statistics.mean(float(r['accuracy']) for r in by_shots[k]):.3f}" for k in shots)
        lines.append((task, method, *means))
    return make_markdown_table(("task", "method", *shots), lines)


def make_verdict_placement() -> str:
    """Return what AAT's adapters and their blocks change, against all of them."""
    rows, cells = _read_cells("placement")
    whole = cells["mlp and spatial"]
    lines = []
    for name, own in cells.items():
        size = next(r["trainable"] for r in rows if r["method"] == name and r["task"] == "esc10")
        change = "" if own is whole else _compare_folds(own, whole)[0]
        lines.append((name, f"{int(size):,}", f"{statistics.mean(own.values()):.3f}", change))
    heads = ("AAT", "trainable", "accuracy", "to MLP and spatial in all blocks")
    return make_markdown_table(heads, lines)


def make_verdict_pretraining() -> str:
    """Return the mean accuracy by objective of the pretraining."""
    _, cells = _read_cells("pretraining")
    lines = []
    for name, own in cells.items():
        of = {b: {c[1:]: v for c, v in own.items() if c[0] == b} for b in ("labelled", "masked")}
        pairs = [{("", *c): v for c, v in of[b].items()} for b in of]
        means = (f"{statistics.mean(of[b].values()):.3f}" for b in of)
        lines.append((name, *means, _compare_folds(pairs[1], pairs[0])[0]))
    heads = ("method", "by labels", "masked patches", "masked - labels")
    return make_markdown_table(heads, lines)


TABLES: dict[str, Callable[[], str]] = {
    "epochs": make_epochs,
    "gpu-step": make_gpu_step,
    "step": make_step,
    "soft-moe": make_soft_moe,
    "prefix": make_prefix,
    "serving": make_serving,
    "intervals": make_intervals,
    "tests": make_tests,
    "adapt": make_adapt,
    "verdict": make_verdict,
    "verdict-shots": make_verdict_shots,
    "verdict-placement": make_verdict_placement,
    "verdict-pretraining": make_verdict_pretraining,
}
