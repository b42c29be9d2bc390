"""A replica's presence in the directory, every second round; and whether another process has our identity."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Literal

from potluck.dht.directory import Directory
from potluck.dht.records import Replica
from potluck.dht.shards import shard_of
from potluck.errors import IdentityError, PotluckError
from potluck.net.host import PeerId
from potluck.swarm.phases import Round
from potluck.swarm.state import ReplicaState

_TIMEOUT_SECONDS = 5.0
#: A replica is announced in every second round, for four: what it costs the DHT is half of what a commit costs.
ANNOUNCE_EVERY = 2
LASTS_ROUNDS = 4


Role = Literal["worker", "organizer", "validator", "observer"]


class Presence:
    """`taken` resolves when a newer process turns out to train with the same identity."""

    def __init__(
        self, directory: Directory, peer: PeerId, *, role: Role, name: str, session: bytes, emit: Callable[..., None]
    ) -> None:
        self.session = session
        self.addresses: Sequence[str] = ()
        #: Of the replica, as `Replica` defines them.
        self.load = self.throughput = 0.0
        self.moving = self.bound = False
        #: The round in which this process began: what our former self left in the directory is older.
        self.first_round = 0
        self.taken: asyncio.Future[IdentityError] = asyncio.get_running_loop().create_future()
        self._directory, self._peer, self._role, self._name, self._emit = directory, peer, role, name[:64], emit
        self.started = time.time()
        self._announced: int | None = None
        self._shard = 0

    async def announce(
        self, state: ReplicaState, shards: int, now: float, round_seconds: float, every: int = ANNOUNCE_EVERY
    ) -> None:
        """Once in `every` rounds. `now` in UTC seconds."""
        if self._announced is not None and 0 <= state.round - self._announced < every:
            return
        self._announced = state.round
        digest = bytes.fromhex(state.digest)
        self._shard = shard_of(self._peer, 0, shards)
        await self._publish(state.module, state.round, digest, self._shard, now, round_seconds)

    async def announce_coming(self, module: str, round_: Round, now: float, round_seconds: float) -> None:
        """That this peer is on its way to a module: it counts there, though it has no state yet."""
        await self._publish(module, round_, None, 0, now, round_seconds)

    async def withdraw(self, module: str, round_: Round, now: float, round_seconds: float) -> None:
        """That this peer has left a module: nobody is to call it, nor count it there. Until the record expires."""
        self._role, self.moving = "observer", True
        await self._publish(module, round_, None, self._shard, now + round_seconds, round_seconds)

    async def _publish(
        self, module: str, round_: Round, digest: bytes | None, shard: int, now: float, round_seconds: float
    ) -> None:
        record = Replica(
            module=module,
            shard=shard,
            round=round_,
            role=self._role,
            digest=digest,
            load=self.load,
            throughput=self.throughput,
            moving=self.moving,
            bound=self.bound,
            session=self.session,
            started=self.started,
            addresses=list(self.addresses[:4]),
            name=self._name,
        )
        try:
            view = await self._directory.replicas(module, shard, timeout_seconds=_TIMEOUT_SECONDS)
            self._check([signed.record for signed in view.records if signed.peer == self._peer])
            await self._directory.publish(record, now + LASTS_ROUNDS * round_seconds, _TIMEOUT_SECONDS)
        except PotluckError as error:
            self._emit("peer.announce.failed", error=str(error))

    def _check(self, own: Sequence[Replica]) -> None:
        """Of two processes with one identity the newer one ends. Our former self applied at most one round early."""
        for record in own:
            elsewhere = record.session != self.session and record.started < self.started
            if elsewhere and record.round >= self.first_round + 2 and not self.taken.done():
                self.taken.set_result(
                    IdentityError(
                        f"another process trains with this identity (at {', '.join(record.addresses[:1])}): "
                        "stop it, or give this one another --home with an identity of its own"
                    )
                )


def new_session() -> bytes:
    """Tells the processes of one identity apart."""
    return secrets.token_bytes(16)
