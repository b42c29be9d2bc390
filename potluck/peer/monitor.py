"""The monitor: hears a run without taking part, and keeps what it heard for its pages.

It has an identity and a folder of its own inside the home (`monitors/`), so that a peer of this home may run beside it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Final

from potluck.dht.invite import Invite
from potluck.errors import NetworkError
from potluck.net.identity import Identity
from potluck.peer.build import rules_of
from potluck.peer.home import Home, RunFolder
from potluck.peer.ledger_copies import AGAIN_SECONDS, LedgerCopies
from potluck.peer.node import NetworkSettings
from potluck.peer.telemetry import Telemetry
from potluck.peer.visitor import Visitor, observe

Emit = Callable[..., None]

#: How often the ledgers' copies are brought up to date.
LEDGER_SECONDS: Final = 2 * AGAIN_SECONDS
#: Between two tries to reach a run of which nobody answers.
AWAY_SECONDS: Final = 15.0


def monitor_folder(home: Path, invite: Invite) -> RunFolder:
    """Where the monitor of a run keeps what it heard."""
    return Home(home / "monitors").open().run(invite.run_id)


async def monitor(
    folder: RunFolder, invite: Invite, network: NetworkSettings, emit: Emit, ready: Callable[[Visitor], None]
) -> None:
    """Hear the run until cancelled; `ready` is called whenever it has joined. A run that was watched before is waited
    for while nobody of it answers. Raises NetworkError, ManifestError, ClockError, or UserError if another monitor of
    this home watches the run."""
    with folder.locked():
        identity = Identity.load_or_create(folder.path.parent.parent / "identity.key")
        while True:
            addresses = list(dict.fromkeys([*invite.peers, *folder.peers()]))
            try:
                async with observe(folder, identity, addresses, folder.manifest(), network=network, emit=emit) as one:
                    folder.save_manifest(one.signed)
                    ready(one)
                    await _hear(one, emit)
            except* NetworkError as errors:
                if folder.is_new:
                    raise errors.exceptions[0] from None
                emit("monitor.away", error=f"nobody of the run answers; next try in {AWAY_SECONDS:.0f} s")
            await asyncio.sleep(AWAY_SECONDS)


async def _hear(visitor: Visitor, emit: Emit) -> None:
    around = visitor.around
    node, clock = around.node, around.clock
    telemetry = Telemetry(
        node.host.control,
        around.run_id,
        around.folder.history,
        clock=rules_of(around.manifest).clock,
        now=clock.now,
        emit=emit,
    )
    copies = LedgerCopies(around)
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(node.keep_connected())
            tasks.create_task(clock.keep_checked(node.rpc, node.connected, emit))
            tasks.create_task(node.until_daemon_fails())
            tasks.create_task(telemetry.run())
            tasks.create_task(_keep(copies))
    finally:
        await copies.close()


async def _keep(copies: LedgerCopies) -> None:
    while True:
        copies.refresh()
        await asyncio.sleep(LEDGER_SECONDS)
