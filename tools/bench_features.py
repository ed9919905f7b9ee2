"""Feature extraction: this front end on the device against transformers' extractor, in turn.

    python tools/bench_features.py
    python tools/bench_features.py --frames 512 --batch 64 --rounds 30

Both take the same int16 clips, which fill the input, and give normalised log-mel; transformers'
is its NumPy path (torchaudio is not asked for). The whole of each is timed: here the transfer of
the samples to the device too. Printed are median clips/s and the median ratio of the same rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np

from aatjax.audio.frontend import FrontEnd

WARM_UP = 2


def here(frontend: FrontEnd, clips: np.ndarray) -> Callable[[], np.ndarray]:
    """The front end that training runs, compiled."""
    length = np.full(len(clips), clips.shape[1], np.int32)
    run = jax.jit(frontend)
    return lambda: np.asarray(run(clips, length))


def transformers(frontend: FrontEnd, clips: np.ndarray) -> Callable[[], np.ndarray]:
    """The published extractor on the same samples in [-1, 1)."""
    from transformers import ASTFeatureExtractor

    extractor = ASTFeatureExtractor(max_length=frontend.frames, num_mel_bins=frontend.mels)
    waves = list(clips.astype(np.float32) / 32768)
    return lambda: extractor(waves, sampling_rate=frontend.rate, return_tensors="np").input_values


def main() -> None:
    """Runs the command line; see above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    frontend = FrontEnd(frames=options.frames)
    rng = np.random.default_rng(0)
    clips = rng.integers(-8000, 8000, (options.batch, frontend.samples), np.int16)
    ways = {
        "transformers": transformers(frontend, clips),
        f"aatjax on {jax.devices()[0].device_kind}": here(frontend, clips),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results = {}
    for turn in range(WARM_UP + options.rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            results[name] = way()
            if turn >= WARM_UP:
                seconds[name].append(time.perf_counter() - began)
    theirs, ours = results.values()
    print(
        f"largest difference {np.abs(theirs - ours).max():.2g}, {options.frames} frames, "
        f"batch {options.batch}"
    )
    base = seconds["transformers"]
    for name, spent in seconds.items():
        ratio = statistics.median(b / s for b, s in zip(base, spent, strict=True))
        print(f"{name:<20} {options.batch / statistics.median(spent):8.1f} clips/s {ratio:7.1f}x")


if __name__ == "__main__":
    main()
