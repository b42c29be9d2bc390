"""What Prometheus reads, and that the dashboard draws exactly that."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from potluck.peer.home import RunFolder
from potluck.peer.web.metrics import exposition
from potluck.peer.web.watch import Watch

DASHBOARD = Path(__file__).parents[4] / "docs" / "grafana-dashboard.json"


def told(folder: RunFolder, machine: Any) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    signed = folder.manifest()
    assert signed
    watch = Watch(folder, signed.manifest, None)
    watch.look()
    text = exposition([watch.state()], asyncio.run(machine.status()) if machine else None, 3, 70).decode()
    watch.close()
    assert "onerror" not in text and "attic" not in text, "what peers call themselves is no label"
    return {
        sample.name: {tuple(sorted(other.labels.items())): other.value for other in family.samples}
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_say_how_run_and_machine_are(folder: RunFolder, machine: Any) -> None:
    found = told(folder, machine)
    run = (("name", "small-llama"), ("run", folder.run_id))
    assert found["potluck_run_round"][run] == 59
    assert 2 < found["potluck_run_loss"][run] < 3.5
    assert found["potluck_run_peers"][(run[0], ("role", "organizer"), run[1])] == 1
    assert found["potluck_module_replicas"][(("module", "stage.1"), ("run", folder.run_id))] == 3
    assert found["potluck_viewers"][()] == 3 and found["potluck_events_total"][()] == 70
    assert found["potluck_daemon_works"][()] == 1 and found["potluck_daemon_sent_bytes"][()] == 5e6
    assert found["potluck_worker_restarts_total"][(("run", folder.run_id),)] == 1
    machine.paused = True
    assert told(folder, machine)["potluck_daemon_paused_by"][(("rule", "you"),)] == 1
    assert not any(name.startswith(("potluck_daemon", "potluck_worker")) for name in told(folder, None))


def test_the_dashboard_draws_exactly_the_metrics_that_there_are(folder: RunFolder, machine: Any) -> None:
    machine.paused = True
    dashboard = json.loads(DASHBOARD.read_text())
    drawn = {
        name
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
        for name in re.findall(r"potluck_\w+", target["expr"])
    }
    assert drawn == set(told(folder, machine))
