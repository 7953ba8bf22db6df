"""Prometheus metrics of a node, made from its status."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from meshllm.node.status import MeshStatus


def render(status: MeshStatus) -> bytes:
    """The metrics in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Status(status))
    return generate_latest(registry)


class _Status(Collector):
    def __init__(self, status: MeshStatus) -> None:
        self._status = status

    def collect(self) -> Iterable[Metric]:
        yield from self._peers()
        yield from self._engine()
        yield from self._requests()

    def _peers(self) -> Iterable[Metric]:
        sent = CounterMetricFamily("mesh_llm_peer_sent_bytes", "Bytes sent to a peer", labels=["peer"])
        received = CounterMetricFamily("mesh_llm_peer_received_bytes", "Bytes received from a peer", labels=["peer"])
        rtt = GaugeMetricFamily("mesh_llm_peer_rtt_seconds", "Round-trip time to a peer", labels=["peer"])
        alive = GaugeMetricFamily("mesh_llm_nodes", "Nodes of the mesh by state", labels=["state"])
        states: dict[str, int] = {}
        for node in self._status.nodes:
            states[node.state] = states.get(node.state, 0) + 1
            if node.address is None:
                continue
            label = [node.id[:16]]
            sent.add_metric(label, node.bytes_sent)
            received.add_metric(label, node.bytes_received)
            if node.rtt_ms is not None:
                rtt.add_metric(label, node.rtt_ms / 1000)
        for state, count in states.items():
            alive.add_metric([state], count)
        counts = self._status.counts
        elections = CounterMetricFamily("mesh_llm_elections", "Times this node became the host of another group")
        elections.add_metric([], counts.elections)
        failures = CounterMetricFamily("mesh_llm_peer_failures", "Times a peer was found dead")
        failures.add_metric([], counts.failures)
        yield from (sent, received, rtt, alive, elections, failures)

    def _engine(self) -> Iterable[Metric]:
        engine = self._status.engine
        if not engine:
            return
        tokens = CounterMetricFamily("mesh_llm_tokens", "Tokens processed by this node's engine", labels=["kind"])
        tokens.add_metric(["prompt"], engine.tokens.prompt)
        tokens.add_metric(["generated"], engine.tokens.generated)
        restarts = CounterMetricFamily("mesh_llm_engine_restarts", "Restarts of llama-server")
        restarts.add_metric([], engine.restarts)
        waits = CounterMetricFamily("mesh_llm_stage_blocking_waits", "Round trips waited for", labels=["stage"])
        waited = CounterMetricFamily("mesh_llm_stage_wait_seconds", "Time spent in those waits", labels=["stage"])
        for stage in engine.stages:
            if stage.counters:
                waits.add_metric([stage.name], stage.counters.blocking_waits)
                waited.add_metric([stage.name], stage.counters.wait_ns / 1e9)
        yield from (tokens, restarts, waits, waited)

    def _requests(self) -> Iterable[Metric]:
        latencies = self._status.latencies
        for name, text, histogram in (
            ("first_byte", "Time to the first byte of a response", latencies.first_byte),
            ("answer", "Time to the end of a response", latencies.answer),
        ):
            family = HistogramMetricFamily(f"mesh_llm_request_{name}_seconds", text)
            buckets = [(str(bound), count) for bound, count in histogram.buckets]
            family.add_metric([], [*buckets, ("+Inf", histogram.count)], histogram.sum)
            yield family
