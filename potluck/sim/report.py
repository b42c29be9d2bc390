"""A simulation's report as one HTML file with plots, and as JSON."""

from __future__ import annotations

import html
import io
import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from potluck.errors import UserError

_PLOTS = (
    ("loss", "loss (mean over peers)", "loss"),
    ("drift", "drift between replicas (root mean square)", "drift"),
    ("peers", "peers alive, applied, contributing", "peers"),
    ("bytes_median", "bytes sent per peer", "bytes"),
    ("digests", "different states among replicas", "states"),
    ("group", "members of a group (mean)", "members"),
    ("dht_operations", "DHT operations per peer", "operations"),
    ("missed", "rounds missed, by reason", "peers"),
)


@dataclass
class Report:
    """What happened. `rounds`: one row per round, as `potluck simulate` plots them."""

    plan: dict[str, Any]
    rounds: list[dict[str, Any]] = field(default_factory=list)
    missed: dict[str, int] = field(default_factory=dict)
    join_rounds: list[float] = field(default_factory=list)
    heal_rounds: float | None = None
    violations: list[str] = field(default_factory=list)
    #: What each validator found in each round: shares, refusals and what was paid (for the round before), by number.
    scores: list[dict[str, Any]] = field(default_factory=list)
    #: Numbers of peers that lied.
    liars: list[int] = field(default_factory=list)
    #: Of peers that others found lying about segments, by number: who did.
    named: dict[int, set[int]] = field(default_factory=dict)
    #: Most rounds that any peer which no fault struck did not apply, and did not contribute to.
    survivors_missed: int = 0
    survivors_sat_out: int = 0
    interrupted: bool = False
    #: What the plan asked for and could not be done.
    notes: list[str] = field(default_factory=list)
    loss_start: float = math.nan
    loss_end: float = math.nan
    bytes_per_peer_per_round: float = 0.0
    dht_operations_per_peer_per_round: float = 0.0
    dht_bytes_per_peer_per_round: float = 0.0
    peers_seen: int = 0
    trace: str = ""
    events: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_memory_mb: float = 0.0
    #: DHT operations of the last round: (kind, records, calls, bytes, seconds).
    operations: list[tuple[str, int, int, int, float]] = field(default_factory=list)
    trained: str = ""
    replay: str = ""


def to_json(report: Report) -> bytes:
    """Numbers that are not finite become null."""
    return msgspec.json.encode(report)


def figures(report: Report) -> dict[str, Any]:
    """The one line that `potluck simulate --json` ends with."""
    return {
        "name": report.plan["name"],
        "seed": report.plan["seed"],
        "peers": report.peers_seen,
        "rounds": len(report.rounds),
        "rounds_missed_by_survivors": report.survivors_missed,
        "rounds_without_contribution_by_survivors": report.survivors_sat_out,
        "loss_ratio": report.loss_end / report.loss_start if report.loss_start else None,
        "loss_start": report.loss_start,
        "loss_end": report.loss_end,
        "bytes_per_peer_per_round": report.bytes_per_peer_per_round,
        "dht_operations_per_peer_per_round": report.dht_operations_per_peer_per_round,
        "dht_bytes_per_peer_per_round": report.dht_bytes_per_peer_per_round,
        "joined": len(report.join_rounds),
        "join_rounds_median": _median(report.join_rounds),
        "heal_rounds": report.heal_rounds,
        "missed": report.missed,
        "violations": len(report.violations),
        "trained": report.trained,
        "dht": report.plan["dht"],
        "trace": report.trace,
        "seconds": report.seconds,
        "cpu_seconds": report.cpu_seconds,
        "peak_memory_mb": report.peak_memory_mb,
        "credit": credit(report),
        "named": {peer: len(by) for peer, by in sorted(report.named.items())},
        "interrupted": report.interrupted,
        "notes": report.notes,
        "replay": report.replay,
    }


def amounts(report: Report, what: Literal["paid", "earned"], validator: int) -> dict[int, float]:
    """All that a validator's ledger says each peer was paid, or each validator earned, by number."""
    total: dict[int, float] = {}
    for row in report.scores:
        if row["validator"] == validator:
            for peer, amount in row[what].items():
                total[peer] = total.get(peer, 0.0) + amount
    return total


def credit(report: Report) -> dict[int, float]:
    """What the first validator paid each peer, by number, as shares of all. Empty without validators."""
    if not report.scores:
        return {}
    paid = amounts(report, "paid", report.scores[0]["validator"])
    total = math.fsum(paid.values())
    return {peer: round(amount / total, 4) for peer, amount in sorted(paid.items())} if total else {}


def _median(values: list[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None


def usable(folder: Path) -> None:
    """Raises UserError, before the work, if a report could not be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written: {error.strerror}") from None


def write(report: Report, folder: Path) -> tuple[Path, Path]:
    """(HTML file, JSON file). Raises UserError if the folder cannot be written."""
    name = report.plan["name"]
    page, data = folder / f"{name}.html", folder / f"{name}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        data.write_bytes(to_json(report))
        page.write_text(_page(report), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written: {error.strerror}") from None
    return page, data


def _page(report: Report) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(str(key))}</th><td>{html.escape(_text(value))}</td></tr>"
        for key, value in figures(report).items()
    )
    violations = "".join(f"<li>{html.escape(text)}</li>" for text in report.violations) or "<li>none</li>"
    plan = html.escape(msgspec.json.format(msgspec.json.encode(report.plan), indent=2).decode())
    return f"""<!doctype html>
<meta charset="utf-8"><title>{html.escape(report.plan["name"])}</title>
<style>body{{font:15px sans-serif;max-width:60em;margin:2em auto;padding:0 1em}}th{{text-align:left;padding-right:1em}}
pre{{background:#f4f4f4;padding:1em;overflow:auto}}svg{{max-width:100%;height:auto}}</style>
<h1>{html.escape(report.plan["name"])}</h1><p>{html.escape(report.plan["about"])}</p>
<p>Trained: {html.escape(report.trained)}. Replay: <code>{html.escape(report.replay)}</code></p>
<table>{rows}</table><h2>Rounds</h2>{_plots(report)}
<h2>Violations of invariants</h2><ul>{violations}</ul><h2>Plan</h2><pre>{plan}</pre>"""


def _text(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _plots(report: Report) -> str:
    try:
        import matplotlib
    except ImportError:
        return "<p>(no plots: pip install 'potluck[plot]')</p>"
    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(5, 2, figsize=(11, 16), layout="constrained")
    numbers = [row["round"] for row in report.rounds]
    for axis, (key, title, unit) in zip(axes.flat, _PLOTS, strict=False):
        lines = {key: [row[key] for row in report.rounds]}
        if key == "peers":
            lines = {each: [row[each] for row in report.rounds] for each in ("peers", "applied", "contributed")}
        elif key == "missed":
            lines = {why: [row[key].get(why, 0) for row in report.rounds] for why in sorted(report.missed)}
        for label, values in lines.items():
            axis.plot(numbers, values, label=label)
        if len(lines) > 1:
            axis.legend()
        axis.set(title=title, xlabel="round", ylabel=unit)
        for fault in report.plan["fault"]:
            axis.axvline(fault["round"] + fault["at"], color="red", alpha=0.3, linewidth=1)
    joins, weights = axes.flat[len(_PLOTS) :]
    joins.hist(report.join_rounds or [0], bins=20)
    joins.set(title="from arrival to the first contribution", xlabel="rounds", ylabel="peers")
    _plot_weights(weights, report)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return out.getvalue().partition("<svg")[1] + out.getvalue().partition("<svg")[2]


def _plot_weights(axis: Any, report: Report) -> None:
    """What the first validator gave each peer, liars in red."""
    rows = [row for row in report.scores if row["validator"] == report.scores[0]["validator"]]
    if not rows:
        axis.set_axis_off()
        return
    for peer in sorted({peer for row in rows for peer in row["shares"]}):
        color = "red" if peer in report.liars else "steelblue"
        axis.plot(
            [row["round"] for row in rows], [row["shares"].get(peer, 0.0) for row in rows], color=color, alpha=0.6
        )
    axis.set(title="weights that a validator gives (liars in red)", xlabel="round", ylabel="share")
