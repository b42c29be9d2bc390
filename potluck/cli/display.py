"""What a foreground peer says: plain lines, or JSON lines with `--json`; on a terminal there is `live_panel.py`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from potluck.peer.worker import Run

Event = dict[str, Any]

_SPARKS = "▁▂▃▄▅▆▇█"


def megabytes(count: float) -> str:
    return f"{count / 1e6:.2f} MB"


def printable(text: str) -> str:
    """A name that somebody chose, for a terminal: without controls and marks of direction."""
    return "".join(c for c in text if c.isprintable() or c == "\u200d")


def spark_line(values: list[float]) -> str:
    """A one-line plot of the last values."""
    if not values:
        return ""
    low, high = min(values), max(values)
    scale = (len(_SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_SPARKS[round((v - low) * scale)] for v in values)


def sat_out_line(event: Event) -> str:
    why = {
        "too_late": "not done before the commit deadline",
        "nothing": "nothing was trained in it (a local step must fit in what rounds.seconds leaves for training)",
        "not_stored": "the commit was not stored in time",
        "disk_full": "the disk has no room for its contribution",
        "cap_too_low": "nobody could fetch its contribution in time under the upload cap",
        "committed_before": "an earlier process of this peer committed to it already",
        "diverged": "the local steps gave values that are not finite (is training.learning_rate too high?)",
    }
    return f"round {event['round']} is sat out: {why.get(event['reason'], event['reason'])}"


def round_line(event: Event) -> str:
    """One round in one line."""
    from potluck.peer.events import counted

    group = len(event["group"])
    alone = (
        f" the only replica of {event['module']}" if "module" in event else " TRAINING ALONE: no other peer contributed"
    )
    note = alone if event["alone"] else ""
    if event["missing"]:
        note += f" ({len(event['missing'])} missing)"
    if not counted(event["contribution_bytes"], event["contributed"]):
        note += " (your contribution did not count: others did not have it in time)"
    if not event["agree"]:
        note += " (digests differ: state reloaded or drift averaged)"
    if event.get("beside"):
        note += f" ({event['utilization']:.0%} of the time in steps)"
    rate = event["tokens"] / max(1e-9, event["seconds"]["train"])
    return (
        f"round {event['round']:>5}  loss {event['loss']:.4f}  {rate:>8,.0f} tokens/s  "
        f"up {megabytes(event['bytes_sent'])}  down {megabytes(event['bytes_received'])}  group of {group}{note}"
    )


def event_line(event: Event) -> str | None:
    """One line for the events that people want to read; None for the others."""
    match event["event"]:
        case "swarm.round.applied":
            return round_line(event)
        case "swarm.state.fetching":
            size = megabytes(event["bytes"])
            return f"downloading the group's state: {size} from {event['holders']} peers"
        case "swarm.state.progress":
            return f"  {_bar(event['bytes'] / event['of'])} of {megabytes(event['of'])}"
        case "data.read" if event["of"]:
            return f"  reading data  {_bar(event['bytes'] / event['of'])}"
        case "swarm.state.loaded":
            took = f"from {event['donors']} peers in {event['seconds']:.1f} s"
            return f"loaded the state of round {event['round']} {took}"
        case "swarm.state.failed":
            return f"the group's state could not be loaded: {event['error']}"
        case "swarm.join.alone":
            if event["round"] == 0:
                return "nobody is ahead: training begins with round 0"
            return f"nobody gave the run's state: training goes on alone from round {event['from_round']}'s"
        case "swarm.round.skipped":
            return sat_out_line(event)
        case "swarm.pipeline.trained" if event["microbatches"]:
            loss = "" if event["loss"] is None else f", loss {event['loss']:.4f}"
            return f"round {event['round']:>5}  {event['microbatches']} microbatches trained through the stages{loss}"
        case "swarm.pipeline.waiting" if event["missing"]:
            return f"nobody serves {' and '.join(event['missing'])}: nothing is trained until somebody does"
        case "incentives.round.scored":
            best = sorted(event["shares"].items(), key=lambda item: -item[1])[:3]
            top = ", ".join(f"..{peer[-6:]} {100 * share:.0f} %" for peer, share in best)
            refused = f", {len(event['refused'])} refused" if event["refused"] else ""
            module = "" if event["module"] == "stage.0" else f" of {event['module']}"
            return (
                f"round {event['round']:>5}{module} scored: loss {-event['drop']:+.4f}, {len(event['shares'])} "
                f"peers ({top}){refused}, {event['ledger_size']} entries"
            )
        case "incentives.validator.untrusted":
            return (
                f"WARNING: this run trusts {event['validators']} validators, and not this peer: its scores count for "
                f"nobody (the organizer names them in incentives.validators)"
            )
        case "incentives.weights.late":
            return f"WARNING: the weights of round {event['round']} came too late to count: is this machine too slow?"
        case "incentives.round.unscored":
            return f"round {event['round']:>5} is not scored: it is over for too long"
        case "incentives.weights.failed":
            return f"WARNING: the weights of round {event['round']} could not be published: {event['error']}"
        case "swarm.weights.stale" if event["age_rounds"] >= 2:
            return (
                f"no validator was heard for {event['age_rounds']} rounds: weights fade to equal "
                f"({100 * event['faded']:.0f} %)"
            )
        case "swarm.move.started":
            return f"this peer is missed more in {event['module']}: taking over its state, then leaving {event['left']}"
        case "swarm.move.done":
            return f"moved from {event['left']} to {event['module']}"
        case "swarm.move.failed":
            return f"moving to {event['module']} failed: {event['error']}"
        case "peer.clock.corrected":
            return f"this machine's clock is {abs(event['seconds']):.1f} s off its peers: corrected for this run"
        case "peer.checkpoint.loaded":
            return f"resuming from the checkpoint of round {event['round']}"
        case "peer.cap.too_low" | "peer.disk.full":
            return str(event["error"])
        case "peer.checkpoint.failed":
            return f"WARNING: {event['error']}"
        case "swarm.residual.dropped":
            return f"error feedback dropped: {event['reason']}"
        case "net.bootstrap.unreachable":
            return "no known peer answers: starting from this home's own copy of the run"
        case "peer.run.new":
            new, old = event["run"][:8], event["other"][:8]
            return (
                f"a new run, {new}: its manifest is not that of run {old} of the same name, which this home started "
                f"before; to go on with {old}, undo what was changed in the manifest, and host it again"
            )
        case "net.daemon.died":
            return "the libp2p daemon died: restarting it"
    return None


def _bar(part: float) -> str:
    return f"{'█' * round(20 * part):<20} {100 * part:3.0f} %"


@contextmanager
def progress_bar(what: str, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """On stderr, if that is a terminal. Gives a function that hears (bytes done, bytes in all)."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class PlainPeer:
    """Lines on stdout: JSON for machines, else text."""

    def __init__(self, as_json: bool) -> None:
        self._json = as_json

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: Any) -> None:
        pass

    def on_joined(self, status: Event) -> None:
        if self._json:
            self.on_event({"event": "peer.joined", **status})
        else:
            print(f"run {status['run_name']} ({status['run'][:8]})  peer {status['peer']}")
            print(f"invite others:\n  potluck join '{status['invite']}'", flush=True)

    def on_event(self, event: Event) -> None:
        if self._json:
            from potluck.peer.events import encode_event

            sys.stdout.write(encode_event(event).decode() + "\n")
        elif line := event_line(event):
            print(line)
        sys.stdout.flush()

    def on_left(self, run: Run) -> None:
        if self._json:
            self.on_event({"event": "peer.left", "run": run.run_id})
        else:
            print(f"left the run; the checkpoint stays in {run.folder.path}", flush=True)
