"""What the server counts, as Prometheus reads it (text format 0.0.4)."""

import threading
from collections import Counter

LATENCIES = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Gauges:
    """Counts of requests and batches; any thread may count."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[int] = Counter()
        self._latency = [0] * (len(LATENCIES) + 1)
        self._seconds = 0.0
        self._batches = self._windows = 0
        self._computing = 0.0

    def request(self, status: int, seconds: float) -> None:
        """One request was answered."""
        with self._lock:
            self._requests[status] += 1
            place = sum(seconds > limit for limit in LATENCIES)
            self._latency[place] += 1
            self._seconds += seconds

    def batch(self, windows: int, seconds: float) -> None:
        """One pass of the model was made."""
        with self._lock:
            self._batches += 1
            self._windows += windows
            self._computing += seconds

    def text(self, now: dict[str, int]) -> str:
        """All counts; `now` are figures of this moment by name."""
        with self._lock:
            total, below = sum(self._latency), 0
            lines = ["# TYPE aatjax_requests_total counter"]
            for status, count in sorted(self._requests.items()):
                lines.append(f'aatjax_requests_total{{status="{status}"}} {count}')
            lines.append("# TYPE aatjax_request_seconds histogram")
            for limit, count in zip(LATENCIES, self._latency, strict=False):
                below += count
                lines.append(f'aatjax_request_seconds_bucket{{le="{limit}"}} {below}')
            lines += [
                f'aatjax_request_seconds_bucket{{le="+Inf"}} {total}',
                f"aatjax_request_seconds_sum {self._seconds:.6f}",
                f"aatjax_request_seconds_count {total}",
            ]
            counters = {
                "batches": self._batches,
                "windows": self._windows,
                "compute_seconds": round(self._computing, 6),
            }
        for name, value in counters.items():
            lines += [f"# TYPE aatjax_{name}_total counter", f"aatjax_{name}_total {value}"]
        for name, value in now.items():
            lines += [f"# TYPE aatjax_{name} gauge", f"aatjax_{name} {value}"]
        return "\n".join(lines) + "\n"
