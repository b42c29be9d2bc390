"""How two peers are connected: what a peer's libp2p daemon says itself."""

from __future__ import annotations

import asyncio

from hivemind.p2p import PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import read_pbmsg_safe, write_pbmsg
from hivemind.proto import p2pd_pb2
from hivemind.utils.multiaddr import Multiaddr

from potluck.peer.party import Member


async def connections(member: Member) -> dict[str, list[str]]:
    """Addresses of its open connections, by peer id. One through a relay has /p2p-circuit in it."""
    [path] = member.home.rglob("p2pd.sock")
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        await write_pbmsg(writer, p2pd_pb2.Request(type=p2pd_pb2.Request.LIST_PEERS))
        response = p2pd_pb2.Response()
        await read_pbmsg_safe(reader, response)
    finally:
        writer.close()
    return {PeerID(peer.id).to_base58(): [str(Multiaddr(address)) for address in peer.addrs] for peer in response.peers}
