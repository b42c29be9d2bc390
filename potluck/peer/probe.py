"""Asks a run's peers what a machine cannot know alone: whether they answer, the time, how it is reached, how fast it
downloads, and where it would be missed.

Nothing of it stays: the libp2p host runs for some seconds, on the ports and from the home that `join` would use, with
its files in a temporary folder. The largest download is a few chunks of what peers serve anyway, the largest upload two
megabytes to a peer that takes them.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import psutil
from blake3 import blake3

from potluck.dht.directory import Directory
from potluck.dht.invite import Invite
from potluck.dht.manifest import Manifest
from potluck.errors import ClockError, NetworkError, PotluckError, RpcError, RpcTimeout
from potluck.net.autonat import DialBack, ask_to_dial_back
from potluck.net.blobs import CHUNK_BYTES, DIGEST_BYTES, BlobId, ChunkList, chunk_count
from potluck.net.clock import METHOD as CLOCK_METHOD
from potluck.net.clock import RunClock
from potluck.net.host import PeerId
from potluck.net.identity import Identity
from potluck.net.line import Endpoint, address_of, endpoint, seen_by, upload_speed
from potluck.net.nat import NatKind, Sighting, kind_of_nat
from potluck.net.rpc import Rpc
from potluck.peer.build import check_memory
from potluck.peer.doctor import gigabytes, settled
from potluck.peer.facts import Dialled, Download, NetworkFacts, Upload
from potluck.peer.hardware import choose_device
from potluck.peer.home import Home, RunFolder
from potluck.peer.node import Node
from potluck.peer.pipeline import READ_SECONDS, choose_stage
from potluck.peer.settings import PeerSettings
from potluck.swarm.aggregate import RULE_NAMES
from potluck.swarm.codecs import CODEC_NAMES
from potluck.swarm.stage import stage_names

#: An AutoNAT peer tries for 15 s; the daemon asks one after its first 15 s, and then takes a relay.
REACH_SECONDS: Final = 40.0
REACH_POLL_SECONDS: Final = 0.5
#: Peers that are asked to dial back: one who can is enough, and each does so three times a minute at most.
REACH_PEERS: Final = 3
#: Peers that are asked at which address they see us.
SIGHTINGS: Final = 8
ROUND_TRIPS: Final = 3
ROUND_TRIP_SECONDS: Final = 3.0
#: A sample of a download; less than a chunk tells nothing about a line.
SAMPLE_CHUNKS: Final = 4
SAMPLE_SECONDS: Final = 10.0
#: Of 32 GiB, the largest state of which a sample is taken.
MAX_LIST_BYTES: Final = 2**20
#: Of those that replicas announced.
MAX_BLOBS: Final = 8

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """What a run's peers told, as far as it came. `module`: the stage that `join` would serve now; None, and `problem`,
    where none fits. `peers`: how many others there are, about."""

    network: NetworkFacts
    manifest: Manifest | None = None
    module: str | None = None
    problem: PotluckError | None = None
    peers: int | None = None


async def ask_run(home: Home, invite: Invite, settings: PeerSettings, tell: Tell) -> Asked:
    """What the invite's peers say, as far as it comes."""
    folder = home.run(invite.run_id)
    with folder.left_alone() as free:
        if not free:
            return Asked(NetworkFacts(taken=True))
        tell("starting the libp2p daemon")
        try:
            async with _host(home, folder, invite, settings) as node:
                return await _ask(node, folder, invite, settings, tell)
        except PotluckError as error:
            return Asked(NetworkFacts(problem=error))


@asynccontextmanager
async def _host(home: Home, folder: RunFolder, invite: Invite, settings: PeerSettings) -> AsyncIterator[Node]:
    """A node as `join` starts it: this home's key, ports of last time, and sockets in the home."""
    sockets = home.path / "s"
    sockets.mkdir(mode=0o700, exist_ok=True)
    try:
        # The name has 8 characters, as that of a run's own folder.
        own_sockets = tempfile.TemporaryDirectory(prefix="", dir=sockets)
        with own_sockets as own, tempfile.TemporaryDirectory(prefix="pl") as name:
            mine = RunFolder(Path(name), folder.run_id)
            mine.sockets = Path(own)
            mine.save_listen(folder.listen())
            key = home.key_path
            identity = Identity.load(key) if key.exists() else Identity.create(Path(name) / key.name)
            ignore = lambda name, **fields: None  # noqa: E731
            async with Node(identity, mine, RunClock(), ignore, settings.network, invite.peers) as node:
                yield node
    finally:
        with suppress(OSError):  # another peer's are in it
            sockets.rmdir()


async def _ask(node: Node, folder: RunFolder, invite: Invite, settings: PeerSettings, tell: Tell) -> Asked:
    tell("dialling the invite's peers")
    remembered = [address for address in folder.peers() if address not in invite.peers]
    results = await node.dial([*invite.peers, *remembered])
    peers = list(dict.fromkeys(result for result in results.values() if not isinstance(result, NetworkError)))
    trips = dict(zip(peers, await asyncio.gather(*(round_trip(node.rpc, peer) for peer in peers)), strict=True))

    def dialled(addresses: Sequence[str]) -> tuple[Dialled, ...]:
        return tuple(_dialled(a, results[a], trips) for a in addresses if a in results)

    listen, announced = settings.network.listen, settings.network.announce
    facts = NetworkFacts(
        invited=dialled(invite.peers),
        remembered=dialled(remembered),
        loopback=all(address.startswith(("/ip4/127.", "/ip6/::1/")) for address in listen),
        announced=announced,
    )
    if not peers:
        return Asked(facts)
    tell("asking peers to dial back, which may take half a minute behind a NAT")
    reaching = asyncio.create_task(reach(node, peers))
    try:
        asked = await _ask_connected(node, folder, invite, settings, facts, peers)
        tell("sending a peer some bytes")
        upload = await _sample_upload(node.rpc, peers)
        dial_backs, addresses = await reaching
        nat = await _kind_of_nat(node, peers, addresses)
    finally:
        reaching.cancel()
        await asyncio.gather(reaching, return_exceptions=True)
    network = replace(asked.network, dial_backs=dial_backs, addresses=addresses, upload=upload, nat=nat)
    return replace(asked, network=network)


async def _sample_upload(rpc: Rpc, peers: Sequence[PeerId]) -> Upload | None:
    """To the first that takes any."""
    for peer in peers[:REACH_PEERS]:
        sent, seconds = await upload_speed(rpc, peer)
        if sent and seconds:
            return Upload(sent, seconds, rpc.upload.rate is not None)
    return None


async def _kind_of_nat(node: Node, peers: Sequence[PeerId], addresses: Sequence[str]) -> NatKind:
    """By what connected peers see. `addresses`: all that our daemon gives out."""
    answers = await asyncio.gather(*(seen_by(node.rpc, peer, ROUND_TRIP_SECONDS) for peer in peers[:SIGHTINGS]))
    leaving = _local_ends(node.host.pid)
    sightings = []
    for peer, seen in zip(peers, answers, strict=False):
        remote = await address_of(node.host, peer)
        if seen is not None and remote is not None:
            sightings.append(Sighting(remote.ip, seen, leaving.get(remote)))
    own = {one.address.partition("%")[0] for each in psutil.net_if_addrs().values() for one in each}
    announced = node.settings.announce
    given = [endpoint(address) for address in addresses if address.partition("/p2p/")[0] not in announced]
    return kind_of_nat(sightings, own, {one.ip for one in given if one is not None and one.ip not in own})


def _local_ends(pid: int | None) -> dict[Endpoint, Endpoint]:
    """Of a process's TCP connections, by the other end."""
    if pid is None:
        return {}
    try:
        found = psutil.Process(pid).net_connections("tcp")
    except psutil.Error:
        return {}
    return {Endpoint(*one.raddr[:2]): Endpoint(*one.laddr[:2]) for one in found if one.raddr and one.laddr}


def _dialled(address: str, result: PeerId | NetworkError, trips: Mapping[PeerId, float | None]) -> Dialled:
    if isinstance(result, NetworkError):
        return Dialled(address, " ".join(str(result).split()).removeprefix(f"cannot connect to {address}: "))
    return Dialled(address, None, trips[result])


async def _ask_connected(
    node: Node, folder: RunFolder, invite: Invite, settings: PeerSettings, facts: NetworkFacts, peers: Sequence[PeerId]
) -> Asked:
    """Clock, manifest and directory, in the order in which a peer that joins needs them."""
    try:
        signed = folder.manifest() or await node.fetch_manifest(invite)
        manifest = signed.manifest
        manifest.check_known(codecs=CODEC_NAMES, rules=RULE_NAMES)
    except PotluckError as error:
        return Asked(replace(facts, manifest_problem=error))
    facts = replace(facts, clock_offset=await node.clock.measure(node.rpc, peers))
    try:
        node.clock.correct(facts.clock_offset or 0.0)
        directory = await node.join_dht(invite.run_id, manifest)
    except ClockError:  # with such a clock every record looks expired: said, and enough
        return Asked(replace(facts, undownloaded="the clock is too far off"), manifest)
    except NetworkError as error:
        return Asked(replace(facts, directory_problem=error), manifest)
    names = stage_names(manifest.model.stages)
    module, problem = names[0], None
    if len(names) > 1:
        try:
            fits = partial(check_memory, manifest, choose_device(settings.device))
            held = folder.held(names)
            module = await choose_stage(directory, node.peer_id, manifest.model, None, held, fits)
        except PotluckError as error:
            problem = error
    download, why = await _sample_run(node.rpc, directory, manifest, module, peers)
    facts = replace(facts, download=download, undownloaded=why)
    others = max(0, round(directory.network_size()) - 1)
    return Asked(facts, manifest, module if problem is None else None, problem, others)


async def round_trip(rpc: Rpc, peer: PeerId) -> float | None:
    """The fastest of a few calls, in seconds; None if there was no answer."""
    took = []
    for _ in range(ROUND_TRIPS):
        began = time.monotonic()
        try:
            await rpc.call(peer, CLOCK_METHOD, timeout_seconds=ROUND_TRIP_SECONDS, max_response_bytes=64)
        except RpcError:
            break
        took.append(time.monotonic() - began)
    return min(took, default=None)


async def reach(node: Node, peers: Sequence[PeerId]) -> tuple[tuple[DialBack, ...], tuple[str, ...]]:
    """Until it is clear how others reach us, or `REACH_SECONDS`: what peers said who were asked to dial back, and the
    addresses that the daemon gives out. Where a dial failed, a relay may still take us."""

    async def addresses() -> tuple[str, ...]:
        return tuple(str(address) for address in await node.host.get_visible_maddrs(latest=True))

    mine = [a.rpartition("/p2p/")[0] for a in await addresses() if "/p2p-circuit" not in a]
    asked = [asyncio.create_task(ask_to_dial_back(node.host, p, mine, REACH_SECONDS)) for p in peers[:REACH_PEERS]]
    deadline = asyncio.get_running_loop().time() + REACH_SECONDS
    try:
        while True:
            await asyncio.wait(asked, timeout=REACH_POLL_SECONDS)
            said = tuple(task.result() for task in asked if task.done())
            seen = await addresses()
            if settled(said, seen, len(asked)) or asyncio.get_running_loop().time() > deadline:
                return said, seen
            if len(said) == len(asked):
                await asyncio.sleep(REACH_POLL_SECONDS)
    finally:
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)


async def _sample_run(
    rpc: Rpc, directory: Directory, manifest: Manifest, module: str, peers: Sequence[PeerId]
) -> tuple[Download | None, str]:
    """From connected peers, of what they serve anyway: the state that replicas announced, or the run's first one."""
    view = await directory.replicas(module, timeout_seconds=READ_SECONDS)
    digests = [one.record.digest.hex() for one in view.records if one.record.digest]
    first = [manifest.model.initial_state] if manifest.model.initial_state else []
    return await sample(rpc, peers, [BlobId(digest) for digest in dict.fromkeys([*digests, *first])])


async def sample(rpc: Rpc, peers: Sequence[PeerId], blobs: Sequence[BlobId]) -> tuple[Download | None, str]:
    """Fetch a few chunks, verified, of what the peers have of these blobs. None, and why, if there is too little."""
    lists = await asyncio.gather(*(_listed(rpc, peer, blobs) for peer in peers))
    holders = [(peer, chunks) for peer, chunks in zip(peers, lists, strict=True) if chunks is not None]
    if not holders:
        return None, "no bootstrap peer has the model's state now"
    whole = [(peer, chunks) for peer, chunks in holders if chunks.size >= CHUNK_BYTES]
    if not whole:
        return None, f"what they serve ({gigabytes(holders[0][1].size)}) is too little to tell"
    wanted = [
        (peer, chunks, index)
        for index in range(SAMPLE_CHUNKS)
        for peer, chunks in whole
        if index < chunks.size // CHUNK_BYTES
    ]
    began = time.monotonic()

    async def get(peer: PeerId, chunks: ChunkList, index: int) -> float | None:
        try:
            reply = await rpc.call(
                peer,
                "blob.get",
                {"id": chunks.blob_id, "index": index},
                timeout_seconds=SAMPLE_SECONDS,
                max_response_bytes=CHUNK_BYTES,
                lane="bulk",
            )
        except RpcError:
            return None
        return time.monotonic() - began if blake3(reply.body).digest() == chunks.digest(index) else None

    answers = await asyncio.gather(*(get(*one) for one in wanted[:SAMPLE_CHUNKS]))
    came = [seconds for seconds in answers if seconds is not None]
    seconds, capped = max(came, default=SAMPLE_SECONDS), rpc.download.rate is not None
    return Download(len(came) * CHUNK_BYTES, seconds, len(whole), capped), ""


async def _listed(rpc: Rpc, peer: PeerId, blobs: Sequence[BlobId]) -> ChunkList | None:
    """The chunk hashes of the first blob that the peer has."""
    for blob in blobs[:MAX_BLOBS]:
        try:
            reply = await rpc.call(
                peer,
                "blob.list",
                {"id": blob},
                timeout_seconds=SAMPLE_SECONDS,
                max_response_bytes=MAX_LIST_BYTES,
                lane="bulk",
            )
        except RpcTimeout:
            return None
        except RpcError:
            continue
        size, digests = reply.head.get("size"), bytes(reply.body)
        if isinstance(size, int) and 0 <= size < 2**62 and len(digests) == chunk_count(size) * DIGEST_BYTES:
            chunks = ChunkList(size, digests)
            if chunks.blob_id == blob:
                return chunks
    return None
