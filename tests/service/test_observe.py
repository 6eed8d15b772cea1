# SPDX-License-Identifier: Apache-2.0
"""Metrics and spans, in the libraries that read them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cuda_progcache import FileStreamProgramCache, Program, ProgramOptions, events
from cuda_progcache.service.observe import to_opentelemetry, to_prometheus
from cuda_progcache.store.tiers import behind

SOURCE = 'extern "C" __global__ void observed(int *a) { *a = 1; }'
ABOUT = {"target": "cubin", "arch": "sm_80"}


def compiled(cache):
    return Program(SOURCE, "c++", ProgramOptions(arch="sm_80", name="observed.cu")).compiled("cubin", cache=cache)


def test_prometheus_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(behind, "_opened", {})
    prometheus = pytest.importorskip("prometheus_client")
    registry = prometheus.CollectorRegistry()
    stop = to_prometheus(registry)
    with FileStreamProgramCache(tmp_path, tiers=["redis://127.0.0.1:1?mode=ro&connect_timeout=0.1"]) as cache:
        with pytest.warns(match="redis"):
            compiled(cache)
        for _ in range(2):
            assert compiled(cache).hit

    def value(name, **labels):
        return registry.get_sample_value(name, labels)

    assert value("progcache_events_total", kind="hit", **ABOUT) == 2
    assert value("progcache_events_total", kind="miss", **ABOUT) == 1
    assert value("progcache_compile_seconds_count", **ABOUT) == 1
    took = value("progcache_compile_seconds_sum", **ABOUT)
    assert took > 0
    assert value("progcache_saved_seconds_total", **ABOUT) == pytest.approx(2 * took)
    # Only a hit saves time, and one of a program whose compile wasn't timed has none to tell.
    for kind, arch, seconds in (("hit", "sm_90", 0.0), ("miss", "sm_100", 1.0)):
        events.emit(events.Event(kind, "k", "cubin", arch, "", seconds=seconds))
        assert value("progcache_events_total", kind=kind, target="cubin", arch=arch) == 1
        assert value("progcache_saved_seconds_total", target="cubin", arch=arch) is None
    tier = "redis://127.0.0.1:1"
    assert value("progcache_tier_errors_total", tier=tier) >= 1
    assert value("progcache_tier_hits_total", tier=tier) == 0
    text = prometheus.generate_latest(registry).decode()
    assert "observed" not in text
    stop()
    stop()
    compiled(cache)
    assert prometheus.generate_latest(registry) == b""
    to_prometheus(registry)()  # and can be begun again


def test_opentelemetry_has_compiles_as_spans_and_the_rest_as_events(tmp_path):
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    stop = to_opentelemetry(provider)
    with (
        FileStreamProgramCache(tmp_path) as cache,
        provider.get_tracer("test").start_as_current_span("request"),
    ):
        for _ in range(2):
            compiled(cache)
    stop()
    compiled(cache)
    compile_, request = exporter.get_finished_spans()
    assert (compile_.name, compile_.parent.span_id) == ("progcache.compile", request.context.span_id)
    assert compile_.attributes["progcache.name"] == "observed.cu"
    assert compile_.end_time - compile_.start_time == pytest.approx(compile_.attributes["progcache.seconds"] * 1e9)
    told = {event.name: dict(event.attributes) for event in request.events}
    assert set(told) >= {"progcache.miss", "progcache.hit"}
    assert told["progcache.miss"]["progcache.reasons"] == ("first compile of this program",)
    assert told["progcache.hit"]["progcache.digest"] == told["progcache.miss"]["progcache.digest"]


def test_nothing_is_imported_for_them_until_they_are_asked_for():
    script = (
        "import sys, cuda_progcache.service.observe\n"
        "print([name for name in sys.modules if name.split('.')[0] in {'prometheus_client', 'opentelemetry'}])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_listener_that_stopped_is_gone():
    prometheus = pytest.importorskip("prometheus_client")
    before = list(events._subscribers)
    to_prometheus(prometheus.CollectorRegistry())()
    assert events._subscribers == before
