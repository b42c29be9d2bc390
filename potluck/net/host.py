"""The seam to libp2p: the part of `hivemind.p2p.P2P` that Potluck and hivemind's DHT use.

Anything that has these methods is a host: hivemind's `DHTNode` and our RPC run on it unchanged.
Spec: the libp2p daemon control protocol in hivemind's dialect (`p2pd.proto`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, NewType, Protocol, runtime_checkable

#: A peer's name everywhere in Potluck: the base58 text of its libp2p peer id ("12D3KooW..."),
#: which embeds the Ed25519 public key.
PeerId = NewType("PeerId", str)

#: (stream_info, reader, writer); `stream_info.peer_id` is a hivemind `PeerID`, `.to_base58()` gives our `PeerId`.
StreamHandler = Callable[[Any, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@runtime_checkable
class Host(Protocol):
    """A libp2p host. `peer_id` here is a hivemind `PeerID` object, as hivemind's DHT wants it."""

    peer_id: Any

    async def add_protobuf_handler(
        self,
        name: str,
        handler: Callable[..., Any],
        input_protobuf_type: Any,
        *,
        stream_input: bool = False,
        stream_output: bool = False,
        balanced: bool = False,
    ) -> None: ...

    async def remove_protobuf_handler(
        self, name: str, *, stream_input: bool = False, stream_output: bool = False
    ) -> None: ...

    async def call_protobuf_handler(self, peer_id: Any, name: str, input: Any, output_protobuf_type: Any) -> Any: ...

    async def iterate_protobuf_handler(
        self, peer_id: Any, name: str, input: Any, output_protobuf_type: Any
    ) -> AsyncIterator[Any]: ...

    async def add_binary_stream_handler(self, name: str, handler: StreamHandler, balanced: bool = False) -> None: ...

    async def call_binary_stream_handler(
        self, peer_id: Any, handler_name: str
    ) -> tuple[Any, asyncio.StreamReader, asyncio.StreamWriter]: ...

    async def get_visible_maddrs(self, latest: bool = False) -> Sequence[Any]:
        """Addresses at which others may reach this host, each ending in `/p2p/<peer id>`."""
        ...

    async def list_peers(self) -> Sequence[Any]:
        """Peers with a live connection: objects with `peer_id` and `addrs`."""
        ...

    async def connect(self, maddr: str, timeout_seconds: float) -> PeerId:
        """Dial `.../p2p/<peer id>`. Raises NetworkError that says why; a retry is safe."""
        ...

    async def shutdown(self) -> None: ...
