"""Coverage of conformal prediction sets."""

from itertools import permutations
from pathlib import Path

import numpy as np
import tyro

from aatjax import load, petl
from aatjax.data.benchmarks import BENCHMARKS
from aatjax.data.decode_cache import decode_all
from aatjax.inference.calibration import apply_calibration, fit_calibration
from aatjax.train.evaluation import score_clips
from aatjax.train.fit import fit
from aatjax.train.metrics.intervals import mean_interval
from aatjax.train.metrics.results import format_figure
from aatjax.train.training import Training


def coverage(
    folder: tyro.conf.Positional[Path],
    benchmark: str = "esc10",
    method: str = "soft_moa",
    epochs: int = 12,
    coverage: float = 0.9,
    cache: Path = Path("runs/coverage-cache"),
) -> None:
    """Measure how often conformal sets contain the true class.

    For every ordered pair of folds one calibrates, one is counted, and the others train. Prints for
    each pair the share of test clips whose class is in the set, and the mean size of a set; then
    the mean share with its 95 % interval over pairs, the range that split conformal prediction
    promises, and the share of sets with one class.

    Args:
        folder: the benchmark's folder, such as ESC-10.
        benchmark: its name.
        method: the method.
        epochs: epochs of training.
        coverage: the requested coverage.
        cache: folder of decoded clips.
    """
    source = decode_all(BENCHMARKS[benchmark].read(folder), cache)
    labels = [str(clip.fold) for clip in source.clips]
    parts = {
        fold: source.subset([i for i, label in enumerate(labels) if label == fold])
        for fold in sorted(set(labels))
    }
    shares, sizes, single = [], [], []
    for valid, test in permutations(parts, 2):
        rest = [i for i, label in enumerate(labels) if label not in (valid, test)]
        model = load("embedded", num_classes=len(source.classes))
        model = petl.adapt(model, petl.make_method(method))
        run = fit(model, source.subset(rest), training=Training(epochs=epochs), lr=3e-3, show=None)
        logits = {
            fold: score_clips(run.model, parts[fold], run.frontend).logits for fold in (valid, test)
        }
        targets = parts[valid].targets()
        calibration = fit_calibration(logits[valid], targets, source.multi_label, coverage)
        truth = parts[test].targets() == 1
        possible = np.asarray(apply_calibration(logits[test], calibration).possible)
        shares.append(float((possible | ~truth).all(axis=1).mean()))
        sizes.append(float(possible.sum(axis=1).mean()))
        single.append(float((possible.sum(axis=1) == 1).mean()))
        print(
            f"calibrated on fold {valid}, fold {test}: {shares[-1]:.3f} covered, "
            f"{sizes[-1]:.2f} classes per set"
        )
    clips = min(len(part) for part in parts.values())
    mean, low, high = mean_interval(shares)
    print(
        f"{method}: {format_figure(mean, low, high)} covered, {coverage} to "
        f"{coverage + 1 / (clips + 1):.3f} promised; {np.mean(sizes):.2f} classes per set, "
        f"{np.mean(single):.2f} of the sets have one class"
    )
