# SPDX-License-Identifier: Apache-2.0
"""Exporters of a process's cache activity to Prometheus and OpenTelemetry, over :func:`cuda_progcache.subscribe`.

>>> from cuda_progcache.service.observe import to_prometheus
>>> stop = to_prometheus()  # doctest: +SKIP

The client libraries are the extras ``metrics`` and ``telemetry``; they are imported when an exporter is started.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from cuda_progcache.events import Event, subscribe

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider
    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import Metric

    from cuda_progcache.store.tiers.tally import TierStats

#: Bucket bounds for compile times, in seconds.
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
#: The metrics of a tier: the metric's name without its prefix, the field of TierStats, and what it counts.
_OF_TIERS = (
    ("hits", "hits", "lookups that found a program"),
    ("misses", "misses", "lookups that found none"),
    ("errors", "errors", "calls that failed"),
    ("timeouts", "timeouts", "calls that ran out of time"),
    ("skipped", "skipped", "calls skipped while the tier was out of use"),
    ("corrupt", "corrupt", "objects other than those requested"),
    ("untrusted", "untrusted", "objects without a trusted signature"),
    ("stored", "stored", "objects written"),
    ("dropped", "dropped", "objects that couldn't be written"),
    ("read_bytes", "bytes_in", "bytes of objects read"),
    ("written_bytes", "bytes_out", "bytes of objects written"),
    ("call_seconds", "seconds", "seconds waited for the tier's answers"),
)


def to_prometheus(registry: CollectorRegistry | None = None) -> Callable[[], None]:
    """Export the cache activity of the current process as Prometheus metrics.

    ================================== ======================== =====================================================
    metric                             labels                   counts
    ================================== ======================== =====================================================
    ``progcache_events_total``         kind, target, arch       events (:class:`~cuda_progcache.Event`), by kind
    ``progcache_compile_seconds``      target, arch             compile times in seconds (a histogram)
    ``progcache_saved_seconds_total``  target, arch             compile time that hits saved, in seconds
    ``progcache_tier_..._total``       tier                     for each tier in use: hits, misses, errors, timeouts,
                                                                skipped, corrupt, untrusted, stored, dropped,
                                                                read_bytes, written_bytes, call_seconds
    ``progcache_tier_open``            tier                     1 while the tier is out of use
    ================================== ======================== =====================================================

    Program names and reasons aren't labels, since their number is unbounded; they are in logs and spans.

    Parameters
    ----------
    registry : prometheus_client.CollectorRegistry, optional
        None: the default registry.

    Returns
    -------
    callable
        Stops the export and removes the metrics from the registry.

    Raises
    ------
    ImportError
        If ``prometheus-client`` isn't installed.
    ValueError
        If the registry has these metrics already.
    """
    from prometheus_client import REGISTRY, Counter, Histogram

    place = REGISTRY if registry is None else registry
    about = ("target", "arch")
    events = Counter("progcache_events", "Cache events, by kind.", ("kind", *about), registry=place)
    compiles = Histogram("progcache_compile_seconds", "Compile time, seconds.", about, buckets=_SECONDS, registry=place)
    saved = Counter("progcache_saved_seconds", "Compile time that hits saved, in seconds.", about, registry=place)
    tiers = _Tiers()
    place.register(tiers)

    def listen(event: Event) -> None:
        events.labels(event.kind, event.target_type, event.arch).inc()
        if event.kind == "compile":
            compiles.labels(event.target_type, event.arch).observe(event.seconds)
        elif event.kind == "hit" and event.seconds > 0:
            saved.labels(event.target_type, event.arch).inc(event.seconds)

    unsubscribe = subscribe(listen)
    kept: list[Any] = [events, compiles, saved, tiers]

    def stop() -> None:
        unsubscribe()
        while kept:
            place.unregister(kept.pop())

    return stop


class _Tiers:
    """Collects the counts of the process's open tiers for Prometheus; it opens no tier and sends no requests."""

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        known = _tiers_in_use()
        for name, source, counts in _OF_TIERS:
            family = CounterMetricFamily(f"progcache_tier_{name}", f"Per tier: {counts}.", labels=["tier"])
            for tier in known:
                family.add_metric([tier.name], getattr(tier, source))
            yield family
        gauge = GaugeMetricFamily("progcache_tier_open", "1 while a tier is out of use.", labels=["tier"])
        for tier in known:
            gauge.add_metric([tier.name], float(tier.state != "closed"))
        yield gauge


def _tiers_in_use() -> list[TierStats]:
    import sys

    behind = sys.modules.get("cuda_progcache.store.tiers.behind")
    return [] if behind is None else behind.in_use()


def to_opentelemetry(provider: TracerProvider | None = None) -> Callable[[], None]:
    """Export the cache activity of the current process as OpenTelemetry spans and events.

    A compile is a span ``progcache.compile``, a child of the current span. Everything else is an event of the current
    span: ``progcache.hit``, ``progcache.miss`` with its reasons, and so on. The attributes are ``progcache.name``,
    ``.target``, ``.arch``, ``.digest``, ``.reasons`` and ``.seconds``.

    Parameters
    ----------
    provider : opentelemetry.trace.TracerProvider, optional
        None: the global provider.

    Returns
    -------
    callable
        Stops the export.

    Raises
    ------
    ImportError
        If ``opentelemetry-api`` isn't installed.
    """
    from opentelemetry import trace

    from cuda_progcache import __version__

    tracer = trace.get_tracer("cuda_progcache", __version__, tracer_provider=provider)

    def listen(event: Event) -> None:
        told: dict[str, str | float | list[str]] = {}
        for name, value in (("name", event.name), ("target", event.target_type), ("arch", event.arch)):
            if value:
                told[f"progcache.{name}"] = value
        if event.digest:
            told["progcache.digest"] = event.digest
        if event.reasons:
            told["progcache.reasons"] = list(event.reasons)
        if event.seconds:
            told["progcache.seconds"] = event.seconds
        if event.kind != "compile":
            trace.get_current_span().add_event(f"progcache.{event.kind}", told)
            return
        now = time.time_ns()
        span = tracer.start_span("progcache.compile", attributes=told, start_time=now - int(event.seconds * 1e9))
        span.end(now)

    return subscribe(listen)
