"""Server metrics for Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

LATENCIES = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class ServerMetrics:
    """Counts of requests and batches, in a registry of their own; thread-safe."""

    def __init__(self) -> None:
        self.registry: CollectorRegistry = CollectorRegistry()
        options = {"namespace": "aatjax", "registry": self.registry}
        self._requests = Counter("requests", "Answered requests.", ["status"], **options)
        self._latency = Histogram(
            "request_seconds", "Seconds from request to answer.", buckets=LATENCIES, **options
        )
        self._batches = Counter("batches", "Batches that the model computed.", **options)
        self._windows = Counter("windows", "Windows that the model computed.", **options)
        self._compute = Counter("compute_seconds", "Seconds of computing batches.", **options)

    def add_gauge(self, name: str, help: str, read: Callable[[], float]) -> None:
        """Report the current value of a function as `aatjax_NAME`."""
        Gauge(name, help, namespace="aatjax", registry=self.registry).set_function(read)

    def count_request(self, status: int, seconds: float) -> None:
        """Count an answered request."""
        self._requests.labels(str(status)).inc()
        self._latency.observe(seconds)

    def count_batch(self, windows: int, seconds: float) -> None:
        """Count a computed batch."""
        self._batches.inc()
        self._windows.inc(windows)
        self._compute.inc(seconds)

    def format(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)
