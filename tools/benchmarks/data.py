"""Throughput of log-mel features and of reading clips."""

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from aatjax.audio.frontend import FrontEnd
from aatjax.data.benchmarks import BENCHMARKS
from aatjax.data.decode_cache import decode_all
from aatjax.data.prepare import prepare
from aatjax.data.source import Source
from aatjax.data.tfds import Prepared
from aatjax.io.timing import time_interleaved
from benchmarks import print_timings


def features(frames: int = 1024, batch: int = 32, rounds: int = 20) -> None:
    """Compare feature extraction on the device with transformers' extractor.

    Both take the same int16 clips, which fill the input, and return normalised log-mel;
    transformers' is its NumPy path (torchaudio is not used). The transfer of the samples to the
    device is included.

    Args:
        frames: input length.
        batch: clips per call.
        rounds: rounds that count.
    """
    from transformers import ASTFeatureExtractor

    frontend = FrontEnd(frames=frames)
    rng = np.random.default_rng(0)
    clips = rng.integers(-8000, 8000, (batch, frontend.samples), np.int16)
    extractor = ASTFeatureExtractor(max_length=frontend.frames, num_mel_bins=frontend.mels)
    waves = list(clips.astype(np.float32) / 32768)
    length = np.full(batch, clips.shape[1], np.int32)
    compiled = jax.jit(frontend)

    def run_extractor() -> Any:
        return extractor(waves, sampling_rate=frontend.rate, return_tensors="np").input_values

    def run_frontend() -> np.ndarray:
        return np.asarray(compiled(clips, length))

    difference = np.abs(run_extractor() - run_frontend()).max()
    print(f"largest difference {difference:.2g}, {frames} frames, batch {batch}")
    name = f"aatjax on {jax.devices()[0].device_kind}"
    functions = {"transformers": run_extractor, name: run_frontend}
    print_timings(time_interleaved(functions, rounds=rounds), "transformers", batch)


def reading(
    folder: tyro.conf.Positional[Path],
    benchmark: str = "esc10",
    threads: int = 2,
    passes: int = 5,
) -> None:
    """Compare reading the clips of a benchmark: decoded each time, cached, and prepared.

    Each is a pass over all clips in order, read by threads as in training. Also prints the seconds
    of preparation.

    Args:
        folder: the benchmark's folder, such as ESC-50-master.
        benchmark: its name.
        threads: threads that read.
        passes: passes that count.
    """
    decoded = BENCHMARKS[benchmark].read(folder)
    with tempfile.TemporaryDirectory() as place:
        began = time.perf_counter()
        outcome = prepare(benchmark, folder, to=place, subset=True)
        print(f"prepared {len(decoded)} clips in {time.perf_counter() - began:.1f} s")
        sources: dict[str, Source] = {
            "decoded": decoded,
            "cached": decode_all(decoded, Path(place) / "cache"),
            "prepared": Prepared(outcome.folder),
        }

        def read_all(source: Source) -> None:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda i: int(source.waveform(i).sum()), range(len(source))))

        functions = {
            name: lambda source=source: read_all(source) for name, source in sources.items()
        }
        timings = time_interleaved(functions, rounds=passes, warm_up=1)
        print_timings(timings, "decoded", len(decoded))
