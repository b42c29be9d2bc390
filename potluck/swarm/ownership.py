"""Whose contribution a blob is: who commits to another's bytes commits to bytes that are not its own.

A blob ends with a mark of its peer, module and round, and is refused as anybody else's. Without it a peer could
commit to what another has committed to, before anybody has the bytes, and nobody could tell whose they are.
"""

from __future__ import annotations

import hashlib
from typing import Final

from potluck.errors import CodecError
from potluck.net.host import PeerId
from potluck.net.wire import Buffer
from potluck.swarm.phases import Round

MARK_BYTES: Final = 16


def _mark(peer: PeerId, module: str, round_: Round) -> bytes:
    named = b"\0".join([b"potluck.contribution.1", module.encode(), round_.to_bytes(8, "big"), peer.encode()])
    return hashlib.sha256(named).digest()[:MARK_BYTES]


def marked(contribution: Buffer, peer: PeerId, module: str, round_: Round) -> tuple[Buffer, Buffer]:
    """A codec's blob as this peer commits to it: two buffers, one behind the other."""
    return contribution, _mark(peer, module, round_)


def owned_by(blob: bytes | memoryview, peer: PeerId, module: str, round_: Round) -> memoryview:
    """The codec's blob within. Raises CodecError if it is another's, or of another module or round."""
    view = memoryview(blob)
    if bytes(view[-MARK_BYTES:]) != _mark(peer, module, round_):
        raise CodecError(f"the contribution is not {peer[-8:]}'s to round {round_} of {module}")
    return view[:-MARK_BYTES]
