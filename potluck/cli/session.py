"""Runs a peer in the foreground: signals, live display, machine-readable events. Shared by `host` and `join`."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potluck.cli.display import PlainPeer
from potluck.cli.live_panel import LivePeer
from potluck.cli.options import parse_bytes
from potluck.errors import UserError

if TYPE_CHECKING:
    from potluck.peer.node import NetworkSettings
    from potluck.peer.worker import Peer, Run

#: Ctrl-C and SIGTERM end the process within five seconds, whatever a step or the network does.
EXIT_SECONDS = 4.5
#: Exit code of an interrupt: of a peer before it had joined, or of an end that had to be forced.
INTERRUPTED = 130
#: Bytes per second.
MIN_RATE = 10_000
MIN_QUOTA = 1_000_000


def run_peer(
    open_run: Callable[[Peer], Awaitable[Run]],
    *,
    home: Path | None,
    name: str,
    device: str,
    threads: int | None,
    data: str | None,
    stage: int | None,
    train_only: bool = False,
    validate: bool = False,
    archive: str = "20GB",
    listen: list[str] | None,
    announce: list[str] | None,
    disk_quota: str,
    upload_limit: str | None,
    download_limit: str | None = None,
    vram_limit: str | None = None,
    rounds: int | None,
    loopback: bool,
    telemetry: bool = True,
    halvings: int = 0,
    as_json: bool,
) -> None:
    """Train, or validate, until the run is left. Errors of the peer propagate."""
    check_network_options(listen, announce, disk_quota, upload_limit, download_limit)
    from potluck.peer.home import default_home

    home = home or default_home()
    _end_while_loading(home)
    vram = parse_bytes("--vram-limit", vram_limit) if vram_limit else None
    if not as_json and sys.stderr.isatty():
        print("loading...", file=sys.stderr)
    import uvloop

    from potluck.peer.worker import PeerSettings

    network = network_settings(listen, announce, disk_quota, upload_limit, loopback, download_limit)
    if train_only and stage is not None:
        raise UserError("--train-only and --stage exclude each other: who only trains serves no stage")
    from potluck.peer.hardware import default_threads

    settings = PeerSettings(
        name=name,
        device=device,
        threads=threads or default_threads(),
        data=data,
        stage=stage,
        train_only=train_only,
        validate=validate,
        archive_bytes=parse_bytes("--archive", archive),
        telemetry=telemetry,
        halvings=halvings,
        network=network,
    )
    if vram is not None:
        from potluck.peer.hardware import cap_gpu_memory, choose_device

        cap_gpu_memory(choose_device(device), vram)
    uvloop.run(_session(open_run, home, settings, rounds, as_json))


def _end_while_loading(home: Path) -> None:
    """Ctrl-C and SIGTERM until the session listens for them: nothing is open yet."""

    def end(number: int, frame: object) -> None:
        _say(_before_joining(home))
        os._exit(INTERRUPTED)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)


def _say(text: str) -> None:
    """To whoever still listens: an end must not wait for that."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _before_joining(home: Path) -> str:
    return f"interrupted before it had joined: nothing is lost, {home} keeps what it has; the same command begins again"


def check_network_options(
    listen: list[str] | None,
    announce: list[str] | None,
    disk_quota: str,
    upload_limit: str | None,
    download_limit: str | None = None,
) -> tuple[int, int | None, int | None]:
    """(disk quota in bytes, caps on what is sent and received in bytes per second). Raises UserError that names the
    option."""
    quota = parse_bytes("--disk-quota", disk_quota)
    upload = parse_bytes("--upload-limit", upload_limit) if upload_limit is not None else None
    download = parse_bytes("--download-limit", download_limit) if download_limit is not None else None
    if quota < MIN_QUOTA:
        raise UserError(f"--disk-quota {disk_quota!r}: at least 1MB; contributions need some room")
    for option, given in (("--listen", listen), ("--announce", announce)):
        for address in given or []:
            if not address.startswith(("/ip4/", "/ip6/", "/dns")):
                raise UserError(f"{option} {address!r}: give a multiaddr like /ip4/0.0.0.0/tcp/4001")
    if upload is not None and upload < MIN_RATE:
        raise UserError(f"--upload-limit {upload_limit!r}: at least 10KB; a peer that serves nothing cannot contribute")
    if download is not None and download < MIN_RATE:
        raise UserError(f"--download-limit {download_limit!r}: at least 10KB; a peer must hear of the others' work")
    return quota, upload, download


def network_settings(
    listen: list[str] | None,
    announce: list[str] | None,
    disk_quota: str,
    upload_limit: str | None,
    loopback: bool,
    download_limit: str | None = None,
) -> NetworkSettings:
    """From the options that `host`, `join`, `validate` and `doctor` share. Raises UserError that names the option."""
    quota, upload, download = check_network_options(listen, announce, disk_quota, upload_limit, download_limit)
    from potluck.peer.node import NetworkSettings

    return NetworkSettings(
        listen=tuple(listen or (["/ip4/127.0.0.1/tcp/0"] if loopback else ["/ip4/0.0.0.0/tcp/0"])),
        announce=tuple(announce or ()),
        disk_quota=quota,
        upload=upload,
        download=download,
        nat_port_map=not loopback,
    )


async def _session(
    open_run: Callable[[Peer], Awaitable[Run]],
    home: Path,
    settings: Any,
    rounds: int | None,
    as_json: bool,
) -> None:
    from potluck.peer.worker import Peer

    display = PlainPeer(as_json) if as_json or not sys.stdout.isatty() else LivePeer()
    me, stopping = asyncio.current_task(), False
    assert me is not None
    run: Run | None = None

    def on_signal() -> None:
        nonlocal stopping
        if stopping:
            os._exit(INTERRUPTED)
        stopping = True
        _force_exit_later()
        if run is not None:
            run.stop()
        else:
            me.cancel()
            _say(_before_joining(home))

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    try:
        with display:
            async with Peer.open(home, replace(settings, on_event=display.on_event)) as peer:
                run = await open_run(peer)
                display.on_joined(await run.status())
                async for _ in run.rounds(rounds):
                    pass
                display.on_left(run)
    except asyncio.CancelledError:
        if not stopping:
            raise
    if stopping:
        # All of ours is closed; a step or a build that still runs in a thread must not hold up the end.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0 if run is not None else INTERRUPTED)


def _force_exit_later() -> None:
    def force() -> None:
        _say("a step or a connection did not end in time: forced to stop")
        os._exit(INTERRUPTED)

    timer = threading.Timer(EXIT_SECONDS, force)
    timer.daemon = True
    timer.start()
