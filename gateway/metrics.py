"""Prometheus metrics of the gateway, in a registry of their own.

Labels have few values (routes, status codes, failure codes): the number of series does not grow with
consumers, models or Islands.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gateway.service import FailureCode, ModelInfo

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST.encode()

#: Seconds. From a cached prefix on a near Island to a model that must be loaded first.
_TTFT_BUCKETS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
#: Seconds. From 1,000 tokens/s to a stall that makes the supervisor hand over.
_GAP_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

NS: Final = 1e-9


class _Models(Collector):
    """Gauges read from the service when Prometheus asks."""

    def __init__(self, models: Callable[[], tuple[ModelInfo, ...]]) -> None:
        self._models = models

    def collect(self) -> Iterable[Metric]:
        models = self._models()
        yield GaugeMetricFamily("archipelag_models", "Models that can be asked for.", value=len(models))
        yield GaugeMetricFamily(
            "archipelag_models_ready",
            "Models with at least one Island ready.",
            value=sum(1 for model in models if model.ready > 0),
        )


class GatewayMetrics:
    """Counters and histograms; one instance per app."""

    def __init__(self, models: Callable[[], tuple[ModelInfo, ...]] | None = None) -> None:
        registry = CollectorRegistry()
        self.registry = registry
        self._requests = Counter(
            "archipelag_http_requests", "Requests by route and status.", ["route", "status"], registry=registry
        )
        self._in_flight = Gauge(
            "archipelag_http_requests_in_flight", "Requests being answered.", registry=registry
        )
        self.jobs_in_flight = Gauge("archipelag_jobs_in_flight", "Jobs running now.", registry=registry)
        self._ttft = Histogram(
            "archipelag_time_to_first_token_seconds",
            "From the request's arrival to its first token.",
            buckets=_TTFT_BUCKETS,
            registry=registry,
        )
        self._gap = Histogram(
            "archipelag_inter_token_seconds",
            "Time per token between two arrivals of tokens of one job.",
            buckets=_GAP_BUCKETS,
            registry=registry,
        )
        self._queue = Histogram(
            "archipelag_island_queue_seconds",
            "Expected wait on the Island when the job was placed.",
            buckets=_TTFT_BUCKETS,
            registry=registry,
        )
        self.prompt_tokens = Counter("archipelag_prompt_tokens", "Tokens in.", registry=registry)
        self.completion_tokens = Counter("archipelag_completion_tokens", "Tokens out.", registry=registry)
        self.drafts = Counter(
            "archipelag_drafts", "Tokens that heads of chains guessed and had checked.", registry=registry
        )
        self.drafts_right = Counter(
            "archipelag_drafts_right", "Those guesses that were right.", registry=registry
        )
        self.hand_overs = Counter(
            "archipelag_hand_overs", "Jobs taken over by another Island.", registry=registry
        )
        self.disconnects = Counter(
            "archipelag_consumer_disconnects", "Consumers that left before the end.", registry=registry
        )
        self._failures = Counter(
            "archipelag_job_failures", "Jobs that failed, by code.", ["code"], registry=registry
        )
        self._cells: dict[tuple[str, int], Counter] = {}
        if models is not None:
            registry.register(_Models(models))

    @contextmanager
    def request(self, route: str) -> Generator[Callable[[int], None]]:
        """Counts a request while it lasts. Call what is yielded with the status (0: the client left first)."""

        def ended(status: int) -> None:
            cell = self._cells.get((route, status))
            if cell is None:
                cell = self._cells[route, status] = self._requests.labels(route, str(status or 499))
            cell.inc()

        self._in_flight.inc()
        try:
            yield ended
        finally:
            self._in_flight.dec()

    def first_token(self, since_arrival_ns: int) -> None:
        self._ttft.observe(since_arrival_ns * NS)

    def tokens(self, gap_ns: int, count: int) -> None:
        """`count` tokens came `gap_ns` after the previous ones."""
        self._gap.observe(gap_ns * NS / count)

    def placed(self, queue_ns: int) -> None:
        self._queue.observe(queue_ns * NS)

    def failed(self, code: FailureCode) -> None:
        self._failures.labels(code).inc()

    def render(self) -> bytes:
        """The text format, for scraping."""
        return generate_latest(self.registry)
