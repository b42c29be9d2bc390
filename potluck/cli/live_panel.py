"""What a foreground peer shows on a terminal: a panel that is redrawn in place."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from potluck.cli.display import Event, event_line, spark_line

if TYPE_CHECKING:
    from potluck.peer.worker import Run


class LivePeer:
    """Who I am, the invite, the loss curve, the last rounds."""

    def __init__(self) -> None:
        self._console = Console()
        self._live = Live(console=self._console, refresh_per_second=4)
        self._losses: list[float] = []
        self._lines: deque[str] = deque(maxlen=12)
        self._head = Text("")

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._live.__exit__(None, None, None)

    def on_joined(self, status: Event) -> None:
        # Printed above the panel, so that it can be selected and copied.
        self._console.print(f"invite others:\n  potluck join '{status['invite']}'\n", soft_wrap=True, highlight=False)
        self._head = Text(f"run {status['run_name']} ({status['run'][:8]})   peer {status['peer']}", style="bold")
        self._draw()

    def on_event(self, event: Event) -> None:
        if event["event"] == "swarm.round.applied":
            self._losses.append(event["loss"])
        if line := event_line(event):
            if event["event"] in ("swarm.state.progress", "data.read") and self._lines and "█" in self._lines[-1]:
                self._lines.pop()  # a bar moves; it does not scroll
            self._lines.append(line)
            self._draw()

    def on_left(self, run: Run) -> None:
        self._console.print(f"left the run; the checkpoint stays in {run.folder.path}", soft_wrap=True)

    def _draw(self) -> None:
        body = Table.grid()
        for line in self._lines:
            body.add_row(Text(line, overflow="ellipsis", no_wrap=True))
        width = max(10, self._console.width - 30)
        curve = spark_line(self._losses[-width:])
        first_last = f"loss {self._losses[0]:.3f} → {self._losses[-1]:.3f}  " if self._losses else ""
        self._live.update(Group(self._head, Text(first_last + curve, style="cyan"), body))
