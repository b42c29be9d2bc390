"""`/metrics` for Prometheus. Labels hold run ids, modules and rules, never what peers call themselves.

`docs/grafana-dashboard.json` draws these; a test compares the names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from potluck.peer.web.models import RunState

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def exposition(states: Sequence[RunState], daemon: Mapping[str, Any] | None, viewers: int, events: int) -> bytes:
    """`daemon`: its status, on its own page."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Of(states, daemon, viewers, events))
    return generate_latest(registry)


class _Of(Collector):
    def __init__(self, states: Sequence[RunState], daemon: Mapping[str, Any] | None, viewers: int, events: int) -> None:
        self._states, self._daemon, self._viewers, self._events = states, daemon, viewers, events

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("potluck_viewers", "Pages that follow live events.", value=self._viewers)
        yield CounterMetricFamily("potluck_events", "Live events handed to viewers.", value=self._events)
        yield from self._of_runs()
        if self._daemon is not None:
            yield from self._of_daemon(self._daemon)

    def _of_runs(self) -> Iterator[Metric]:
        named = ["run", "name"]
        round_ = GaugeMetricFamily("potluck_run_round", "Latest round that was heard of.", labels=named)
        loss = GaugeMetricFamily("potluck_run_loss", "Median held-out loss, nats per token.", labels=named)
        speed = GaugeMetricFamily("potluck_run_tokens_per_second", "Sum over all peers.", labels=named)
        peers = GaugeMetricFamily("potluck_run_peers", "Peers that were heard just now.", labels=[*named, "role"])
        heard = GaugeMetricFamily("potluck_run_heard", "When a peer was last heard, Unix seconds.", labels=named)
        replicas = GaugeMetricFamily("potluck_module_replicas", "Live replicas.", labels=["run", "module"])
        load = GaugeMetricFamily("potluck_module_load", "Mean load of its replicas.", labels=["run", "module"])
        for state in self._states:
            labels = [state.run, state.name]
            speed.add_metric(labels, state.tokens_per_second)
            for role in ("worker", "organizer", "validator", "observer"):
                peers.add_metric([*labels, role], state.roles.get(role, 0))
            for family, value in ((round_, state.round), (loss, state.loss), (heard, state.heard_at)):
                if value is not None:
                    family.add_metric(labels, value)
            for module in state.modules:
                replicas.add_metric([state.run, module.module], module.replicas)
                load.add_metric([state.run, module.module], module.load)
        yield from (round_, loss, speed, peers, heard, replicas, load)

    def _of_daemon(self, daemon: Mapping[str, Any]) -> Iterator[Metric]:
        yield GaugeMetricFamily("potluck_daemon_works", "1 while the limits allow work.", value=float(daemon["works"]))
        rule = GaugeMetricFamily("potluck_daemon_paused_by", "1 for the rule that pauses it.", labels=["rule"])
        if daemon["rule"]:
            rule.add_metric([daemon["rule"]], 1.0)
        yield rule
        for name, what in (("sent", "Sent"), ("received", "Received")):
            count = daemon[f"{name}_this_month"]
            yield GaugeMetricFamily(f"potluck_daemon_{name}_bytes", f"{what} in this calendar month.", value=count)
        working = GaugeMetricFamily("potluck_worker_working", "1 while the run's worker works.", labels=["run"])
        restarts = CounterMetricFamily("potluck_worker_restarts", "After crashes and hangs.", labels=["run"])
        rounds = CounterMetricFamily("potluck_worker_contributed_rounds", "Rounds that counted.", labels=["run"])
        for run in daemon["runs"]:
            labels = [run["run"] or ""]
            working.add_metric(labels, float(run["state"] == "working"))
            restarts.add_metric(labels, run["restarts"])
            rounds.add_metric(labels, run["contributed_rounds"])
        yield from (working, restarts, rounds)
