"""Numbers about a server, as Prometheus reads them."""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from poe.serving.engine import Engine

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counts the requests of one server. `status` is the HTTP status; 499: the client left early."""

    def __init__(self, engine: Engine) -> None:
        self._registry = registry = CollectorRegistry()
        registry.register(_EngineCollector(engine))
        labels, buckets = ["model"], _SECONDS
        self.requests = Counter(
            "poe_requests", "Requests by model and HTTP status.", ["model", "status"], registry=registry
        )
        self.prompt_tokens = Counter("poe_prompt_tokens", "Tokens of prompts.", labels, registry=registry)
        self.completion_tokens = Counter("poe_completion_tokens", "Tokens of replies.", labels, registry=registry)
        self.first_token = Histogram(
            "poe_time_to_first_token_seconds",
            "Time from a request to the first text of its reply.",
            labels,
            registry=registry,
            buckets=buckets,
        )
        self.duration = Histogram(
            "poe_request_seconds", "Time from a request to its whole reply.", labels, registry=registry, buckets=buckets
        )

    def write(self) -> bytes:
        """Return all numbers in Prometheus' text format."""
        return generate_latest(self._registry)


class Watch:
    """Measures one request. The first `close` counts it."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics, self._start = metrics, time.perf_counter()
        self._has_text = self._is_closed = False
        self.model = "unknown"

    def begin(self, prompt_tokens: int) -> None:
        """Count the prompt of a request that was accepted."""
        self._metrics.prompt_tokens.labels(self.model).inc(prompt_tokens)

    def note_text(self) -> None:
        """Note that a part of the reply is there."""
        if not self._has_text:
            self._has_text = True
            self._metrics.first_token.labels(self.model).observe(time.perf_counter() - self._start)

    def close(self, status: int, completion_tokens: int = 0) -> None:
        """Count the request with its status."""
        if self._is_closed:
            return
        self._is_closed = True
        self._metrics.requests.labels(self.model, str(status)).inc()
        self._metrics.completion_tokens.labels(self.model).inc(completion_tokens)
        if status == 200:
            self._metrics.duration.labels(self.model).observe(time.perf_counter() - self._start)


class _EngineCollector:
    """Reads the numbers of an engine at the moment when they are asked for."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        engine = self._engine
        yield GaugeMetricFamily("poe_rows_running", "Replies that are decoded now.", engine.num_running)
        yield GaugeMetricFamily("poe_rows_waiting", "Replies that wait for a place.", engine.num_waiting)
        yield CounterMetricFamily("poe_passes", "Passes of the model.", engine.passes)
        yield CounterMetricFamily(
            "poe_pass_rows", "Rows of all passes; by poe_passes_total it is the mean batch.", engine.decoded_rows
        )
