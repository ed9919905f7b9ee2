"""How often conformal sets hold the truth: every ordered pair of folds, one tunes, one is counted.

    python tools/measure_coverage.py ESC-10
    python tools/measure_coverage.py ESC-10 --method linear --coverage 0.8

The other folds train. Printed are, for each pair, the share of test clips whose class is in the set
and the mean size of a set; then the pooled share with its 95 % interval over pairs, the range that
split conformal prediction promises, and the share of clips answered with one class.
"""

import argparse
from itertools import permutations
from pathlib import Path

import numpy as np

from aatjax import load, petl
from aatjax.data.benchmarks import BENCHMARKS
from aatjax.data.decode_cache import decode_all
from aatjax.inference.calibration import apply_calibration, fit_calibration
from aatjax.train.evaluation import clip_logits
from aatjax.train.fit import fit
from aatjax.train.loop import Training
from aatjax.train.metrics.intervals import mean_interval


def main() -> None:
    """Runs the command line; see above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--benchmark", default="esc10", choices=tuple(BENCHMARKS))
    parser.add_argument("--method", default="soft_moa")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--coverage", type=float, default=0.9)
    parser.add_argument("--cache", type=Path, default=Path("runs/coverage-cache"))
    options = parser.parse_args()
    source = decode_all(BENCHMARKS[options.benchmark].read(options.folder), options.cache)
    folds = sorted({str(clip.fold) for clip in source.clips})
    parts = {
        fold: source.subset([i for i, c in enumerate(source.clips) if str(c.fold) == fold])
        for fold in folds
    }
    shares, sizes, single = [], [], []
    for valid, test in permutations(folds, 2):
        rest = [i for i, c in enumerate(source.clips) if str(c.fold) not in (valid, test)]
        model = petl.adapt(
            load("embedded", num_classes=len(source.classes)), petl.make_method(options.method)
        )
        run = fit(
            model, source.subset(rest), training=Training(epochs=options.epochs), lr=3e-3, show=None
        )
        decisions = fit_calibration(
            clip_logits(run.model, parts[valid], run.frontend),
            parts[valid].targets(),
            source.multi_label,
            options.coverage,
        )
        applied = apply_calibration(clip_logits(run.model, parts[test], run.frontend), decisions)
        truth = parts[test].targets() == 1
        possible = np.asarray(applied.possible)
        shares.append(float((possible | ~truth).all(axis=1).mean()))
        sizes.append(float(possible.sum(axis=1).mean()))
        single.append(float((possible.sum(axis=1) == 1).mean()))
        print(
            f"tuned on fold {valid}, fold {test}: {shares[-1]:.3f} covered, "
            f"{sizes[-1]:.2f} classes a set"
        )
    clips = min(len(part) for part in parts.values())
    mean, low, high = mean_interval(shares)
    print(
        f"{options.method}: {mean:.3f} [{low:.3f}, {high:.3f}] covered, {options.coverage} to "
        f"{options.coverage + 1 / (clips + 1):.3f} promised; {np.mean(sizes):.2f} classes a set, "
        f"{np.mean(single):.2f} of the sets hold one class"
    )


if __name__ == "__main__":
    main()
