"""What `/metrics` tells Prometheus; each app has a registry of its own."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CHARACTERS = (1e2, 1e3, 3e3, 1e4, 3e4, 1e5, 3e5, 1e6)


class Metrics:
    """`waiting` gives the requests and characters that wait or run now."""

    def __init__(self, waiting: Callable[[], tuple[int, int]]) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "prunekit_requests", "Requests answered.", ["route", "status"], registry=registry
        )
        self.seconds = Histogram(
            "prunekit_request_seconds",
            "From the first byte of a request to the last of its answer.",
            ["route"],
            buckets=SECONDS,
            registry=registry,
        )
        self.rejected = Counter(
            "prunekit_rejected", "Requests refused, by reason.", ["reason"], registry=registry
        )
        self.characters_in = Counter(
            "prunekit_characters_in", "Characters of passages.", registry=registry
        )
        self.characters_kept = Counter(
            "prunekit_characters_kept", "Characters of them kept.", registry=registry
        )
        self._batch_requests = Histogram(
            "prunekit_batch_requests", "Requests a batch.", buckets=SIZES, registry=registry
        )
        self._batch_characters = Histogram(
            "prunekit_batch_characters",
            "Characters a batch, as the model reads them.",
            buckets=CHARACTERS,
            registry=registry,
        )
        self._batch_seconds = Histogram(
            "prunekit_batch_seconds", "Seconds a batch.", buckets=SECONDS, registry=registry
        )
        requests = Gauge("prunekit_queue_requests", "Waiting or running.", registry=registry)
        requests.set_function(lambda: waiting()[0])
        characters = Gauge("prunekit_queue_characters", "Waiting or running.", registry=registry)
        characters.set_function(lambda: waiting()[1])

    def on_batch(self, requests: int, characters: int, seconds: float) -> None:
        self._batch_requests.observe(requests)
        self._batch_characters.observe(characters)
        self._batch_seconds.observe(seconds)

    def page(self) -> bytes:
        return generate_latest(self._registry)
