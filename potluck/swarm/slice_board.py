"""`slices.told`: what this peer aggregated in a round, for those who ask; they wait until it is there."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Any, Final

from potluck.errors import NetworkError, ProtocolError
from potluck.net.host import PeerId
from potluck.net.rpc import Reply, Rpc
from potluck.swarm.slices import Aggregated, parse_aggregated

METHOD: Final = "slices.told"
#: A million segments' worth of numbers, and names of a thousand members.
MAX_ANSWER_BYTES: Final = 1 << 20
#: Rounds of all modules that are remembered.
MOST_KEPT: Final = 256

Key = tuple[str, int]


class NothingTold(NetworkError):
    """This peer has aggregated nothing for that round."""


class SliceBoard:
    """One for all modules of a peer."""

    def __init__(self, rpc: Rpc) -> None:
        self._rpc = rpc
        self._told: OrderedDict[Key, asyncio.Future[bytes]] = OrderedDict()
        rpc.register(METHOD, self._answer, max_request_bytes=0)

    def begin(self, module: str, round_: int) -> None:
        """Those who ask about this round are to wait."""
        self._told.setdefault((module, round_), asyncio.get_running_loop().create_future())
        while len(self._told) > MOST_KEPT:
            self._told.popitem(last=False)[1].cancel()

    def tell(self, module: str, round_: int, told: Aggregated | None) -> None:
        """None: there is nothing to tell, and no use in waiting."""
        waited = self._told.get((module, round_))
        if waited is None or waited.done():
            return
        if told is not None:
            waited.set_result(told.encode())
        else:
            del self._told[module, round_]
            waited.cancel()

    async def ask(self, peer: PeerId, module: str, round_: int, timeout_seconds: float) -> Aggregated:
        """What `peer` says, as soon as it can say it. Raises NetworkError or ProtocolError."""
        reply = await self._rpc.call(
            peer,
            METHOD,
            {"module": module, "round": round_},
            timeout_seconds=timeout_seconds,
            max_response_bytes=MAX_ANSWER_BYTES,
        )
        return parse_aggregated(memoryview(reply.body))

    async def _answer(self, peer: PeerId, head: dict[str, Any], body: memoryview) -> Reply:
        module, round_ = head.get("module"), head.get("round")
        if not isinstance(module, str) or not isinstance(round_, int):
            raise ProtocolError(f"{METHOD} without a module and a round")
        waited = self._told.get((module, round_))
        if waited is None:
            raise NothingTold(f"nothing was aggregated for round {round_} of {module} here")
        try:
            return Reply({}, await asyncio.shield(waited))
        except asyncio.CancelledError:
            if waited.cancelled():
                raise NothingTold(f"nothing was aggregated for round {round_} of {module} here") from None
            raise
