"""A peer's network stack for one run: host, RPC, blobs, DHT and directory, assembled and kept connected."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Self

from hivemind.dht.node import DHTNode

from potluck.dht.care import dial, keep_connected
from potluck.dht.directory import Directory
from potluck.dht.invite import Invite
from potluck.dht.manifest import MAX_MANIFEST_BYTES, Manifest, RunId, SignedManifest
from potluck.dht.node import start_dht, stop_dht
from potluck.errors import DaemonError, ManifestError, NetworkError, PotluckError, RpcError, UserError
from potluck.net.blobs import BlobService, BlobStore
from potluck.net.clock import RunClock
from potluck.net.host import PeerId
from potluck.net.hosts.go import GoHost
from potluck.net.identity import Identity
from potluck.net.line import LineService
from potluck.net.rpc import Reply, Rpc
from potluck.peer.home import RunFolder
from potluck.swarm.slice_board import SliceBoard

Emit = Callable[..., None]

MANIFEST_METHOD = "manifest.get"
MANIFEST_SECONDS = 10.0
DIRECTORY_SECONDS = 30.0


@dataclass(frozen=True)
class NetworkSettings:
    """`listen`, `announce`: multiaddrs. `upload`, `download`: bytes per second, None for no cap. `disk_quota`:
    bytes."""

    listen: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0",)
    announce: tuple[str, ...] = ()
    disk_quota: int = 10 * 2**30
    upload: float | None = None
    download: float | None = None
    nat_port_map: bool = True


@dataclass
class Node:
    """Use as a context manager; everything it started ends with it."""

    identity: Identity
    folder: RunFolder
    clock: RunClock
    emit: Emit
    settings: NetworkSettings = field(default_factory=NetworkSettings)
    #: Peers that may relay for this one if it turns out to be behind a NAT.
    relays: tuple[str, ...] = ()

    host: GoHost = field(init=False)
    rpc: Rpc = field(init=False)
    store: BlobStore = field(init=False)
    slices: SliceBoard = field(init=False)
    _dht: DHTNode | None = field(init=False, default=None)
    _manifest: SignedManifest | None = field(init=False, default=None)
    _stack: AsyncExitStack = field(init=False, default_factory=AsyncExitStack)
    _daemon_failed: asyncio.Event = field(init=False, default_factory=asyncio.Event)

    async def __aenter__(self) -> Self:
        try:
            self.host = await GoHost.start(
                self.identity,
                self.folder.sockets / "d",
                listen=self.settings.listen,
                announce=self.settings.announce,
                nat_port_map=self.settings.nat_port_map,
                auto_relay=bool(self.relays) and self.settings.nat_port_map,
                trusted_relays=self.relays if self.settings.nat_port_map else (),
                on_event=self._on_daemon_event,
                last_listen=self.folder.listen(),
            )
            self._stack.push_async_callback(self.host.shutdown)
            self.folder.save_listen(self.host.listening)
            self.rpc = Rpc(self.host, upload=self.settings.upload, download=self.settings.download)
            await self.rpc.start()
            self._stack.push_async_callback(self.rpc.close)
            self.store = BlobStore(self.folder.blobs, self.settings.disk_quota, clock=self.clock.now)
            BlobService(self.rpc, self.store)
            self.slices = SliceBoard(self.rpc)
            LineService(self.rpc)
            self.rpc.register(MANIFEST_METHOD, self._serve_manifest, max_request_bytes=256)
            self.clock.serve(self.rpc)
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *exc: Any) -> None:
        await self._stack.aclose()

    @property
    def started(self) -> bool:
        return hasattr(self, "store")

    @property
    def peer_id(self) -> PeerId:
        return self.identity.peer_id

    def _on_daemon_event(self, name: str, **fields: Any) -> None:
        self.emit(name, **fields)
        if name == "net.daemon.failed":
            self._daemon_failed.set()

    async def until_daemon_fails(self) -> None:
        """Returns never, or raises DaemonError once the host has given up restarting its daemon."""
        await self._daemon_failed.wait()
        raise DaemonError("the libp2p daemon keeps dying: see the events log, free memory, then start again")

    async def limit(self, upload: int | None, download: int | None, disk_quota: int | None) -> dict[str, Any]:
        """Caps from now on, bytes per second and bytes; None for none. Raises UserError before there is anything to
        limit."""
        if not self.started:
            raise UserError("the network is just starting: ask again")
        if not all(value is None or (isinstance(value, int) and value > 0) for value in (upload, download, disk_quota)):
            raise UserError("limits are positive numbers of bytes")
        self.rpc.upload.rate, self.rpc.download.rate = upload, download
        self.store.quota_bytes = disk_quota or self.settings.disk_quota
        return {}

    # ---- connections ----------------------------------------------------------------------------------------

    async def dial(self, addresses: Sequence[str]) -> dict[str, PeerId | NetworkError]:
        """Connect to all at once. Per address: the peer id, or why it failed."""
        return await dial(self.host, addresses)

    async def connected(self) -> list[PeerId]:
        return [PeerId(info.peer_id.to_base58()) for info in await self.host.list_peers()]

    async def addresses(self) -> list[str]:
        """Where others may reach us; loopback only if there is nothing else."""
        found = [str(a) for a in await self.host.get_visible_maddrs(latest=True)]
        public = [a for a in found if not a.startswith(("/ip4/127.", "/ip6/::1"))]
        return [a for a in (public or found) if "/p2p-circuit" not in a or not public][:8]

    async def keep_connected(self) -> None:
        """Forever: see `dht/care.py`."""
        await keep_connected(self.host, self.folder, lambda: self._dht, self.emit)

    # ---- manifest -------------------------------------------------------------------------------------------

    def publish_manifest(self, signed: SignedManifest) -> None:
        self._manifest = signed

    async def fetch_manifest(self, invite: Invite) -> SignedManifest:
        """From any connected peer; checked against the invite's run id. Raises NetworkError or ManifestError."""

        async def ask(peer: PeerId) -> SignedManifest:
            reply = await self.rpc.call(
                peer,
                MANIFEST_METHOD,
                {"run": invite.run_id},
                timeout_seconds=MANIFEST_SECONDS,
                max_response_bytes=MAX_MANIFEST_BYTES,
            )
            return SignedManifest.decode(bytes(reply.body), invite.run_id)

        asked = [asyncio.create_task(ask(peer)) for peer in await self.connected()]
        failures: list[PotluckError] = []
        try:
            for answer in asyncio.as_completed(asked):
                try:
                    return await answer
                except (RpcError, ManifestError) as error:
                    failures.append(error)
        finally:
            for task in asked:
                task.cancel()
        manifest_errors = [e for e in failures if isinstance(e, ManifestError)]
        if manifest_errors:
            raise manifest_errors[0]
        raise NetworkError(
            "no peer of this invite gave the run's manifest: "
            + ("; ".join(map(str, failures)) or "nobody is connected")
            + ". Ask for a fresh invite (`potluck status` of anyone in the run prints one)"
        )

    async def _serve_manifest(self, peer: PeerId, head: dict[str, Any], body: memoryview) -> Reply:
        if self._manifest is None or head.get("run") != self._manifest.run_id:
            raise ManifestError("this peer does not take part in that run")
        return Reply({}, self._manifest.envelope)

    # ---- directory ------------------------------------------------------------------------------------------

    async def join_dht(self, run_id: RunId, manifest: Manifest) -> Directory:
        """Raises NetworkError if it does not open in time."""
        rounds = manifest.rounds
        try:
            async with asyncio.timeout(DIRECTORY_SECONDS):
                node = await start_dht(
                    self.host,
                    run_id,
                    initial_peers=await self.connected(),
                    max_ahead_seconds=(rounds.retain + 3) * rounds.seconds + 60,
                    wait_timeout_seconds=min(3.0, max(0.5, rounds.exchange_seconds / 4)),
                    clock=self.clock.now,
                    validators=manifest.incentives.trust.keys(),
                )
        except TimeoutError:
            raise NetworkError(f"the run's directory did not open within {DIRECTORY_SECONDS:.0f} s") from None
        self._dht = node
        self._stack.push_async_callback(stop_dht, node)
        return Directory(node, self.identity, run_id, clock=self.clock.now)
