"""`potluck monitor`: pages about a run, for anybody with its invite."""

from __future__ import annotations

import asyncio
import json
import signal
from typing import Annotated, Any

import typer

from potluck.cli.options import HomeOption, JsonOption, LoopbackOption
from potluck.dht.invite import Invite

#: What is said to people besides where the page is.
TOLD = {
    "monitor.away": "the page shows what was heard before",
    "net.daemon.died": "the libp2p daemon died; it is being started again",
    "net.daemon.restarted": "the libp2p daemon runs again",
    "peer.history.unwritten": "what is heard cannot be kept (is the disk full?)",
    "peer.ledger.unfetched": "a validator's ledger could not be fetched",
}


def monitor(
    invite: Annotated[str, typer.Argument(help="potluck:<run id>?peer=<address>&...")],
    listen: Annotated[
        str,
        typer.Option(
            "--listen",
            help="Address of the page; 0.0.0.0 shows it to everybody who reaches this machine, at its IP address; "
            "where a name stands for that, `--allow-host` must give it.",
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Its port; 0 takes any free one.")] = 7780,
    allow_host: Annotated[
        list[str] | None,
        typer.Option("--allow-host", help="A name that the page is reached by, e.g. of a reverse proxy (repeatable)."),
    ] = None,
    home: HomeOption = None,
    loopback: LoopbackOption = False,
    as_json: JsonOption = False,
) -> None:
    """Watch a run in a browser: who is there, how the loss falls, who contributed what.

    It takes no part in the run, and keeps what it heard in the home's folder `monitors`. Everybody who reaches the page
    may look; nobody can change anything there.

    Example:  potluck monitor 'potluck:abc...?peer=/ip4/203.0.113.7/tcp/4001/p2p/12D3KooW...'

    Example:  potluck monitor 'potluck:abc...' --port 80 --listen 0.0.0.0 --allow-host run.example.org
    """
    parsed = Invite.parse(invite)
    import uvloop

    from potluck.peer.events import EventLog
    from potluck.peer.home import default_home
    from potluck.peer.monitor import monitor as watch
    from potluck.peer.monitor import monitor_folder
    from potluck.peer.node import NetworkSettings
    from potluck.peer.visitor import Visitor
    from potluck.peer.web.app import MAX_VIEWERS, create_app
    from potluck.peer.web.serve import room_for_viewers, serve

    folder = monitor_folder(home or default_home(), parsed)
    network = NetworkSettings(
        listen=("/ip4/127.0.0.1/tcp/0" if loopback else "/ip4/0.0.0.0/tcp/0",), nat_port_map=False
    )

    def say(event: dict[str, Any]) -> None:
        if as_json:
            print(json.dumps(event), flush=True)
        elif event["event"] in TOLD:
            print(f"{TOLD[event['event']]}: {event['error']}" if "error" in event else TOLD[event["event"]], flush=True)

    def joined(visitor: Visitor) -> None:
        log.emit("monitor.joined", run=folder.run_id, run_name=visitor.manifest.name)
        if not as_json:
            print(f"watching run {visitor.manifest.name} ({folder.run_id[:8]}); Ctrl-C ends", flush=True)

    async def go() -> None:
        me = asyncio.current_task()
        assert me is not None
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, me.cancel)
        viewers = min(MAX_VIEWERS, room_for_viewers())
        app = create_app(lambda: [folder], hosts=allow_host or (), invites={folder.run_id: invite}, max_viewers=viewers)
        try:
            async with serve(app, listen, port) as url:
                log.emit("monitor.listening", url=url)
                if not as_json:
                    print(f"page: {url}{_elsewhere(url, listen, allow_host or [])}", flush=True)
                await watch(folder, parsed, network, log.emit, joined)
        except asyncio.CancelledError:
            pass  # asked to end

    log = EventLog(folder.events_path)
    log.subscribe(say)
    try:
        uvloop.run(go())
    finally:
        log.close()


def _elsewhere(url: str, listen: str, names: list[str]) -> str:
    """Where else the page is than at `url`."""
    port = url.rpartition(":")[2]
    everywhere = f", and port {port} of every address of this machine" if listen in ("0.0.0.0", "::") else ""
    by_name = f", or by the name {' or '.join(names)}" if names else ""
    if everywhere and not names:
        by_name = "; by a name only with `--allow-host` and that name"
    return everywhere + by_name
