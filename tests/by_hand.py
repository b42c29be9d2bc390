"""A round as a follower applies it, made by hand: with real blobs, commits and a real next state."""

from __future__ import annotations

from collections.abc import Mapping

from potluck.dht.records import Commit
from potluck.net.blobs import BlobStore
from potluck.net.host import PeerId
from potluck.swarm.aggregate import aggregate
from potluck.swarm.codecs import Codec
from potluck.swarm.follower import Applied
from potluck.swarm.layout import Flat
from potluck.swarm.outer import OuterStep
from potluck.swarm.ownership import marked
from potluck.swarm.phases import Round
from potluck.swarm.pull import View
from potluck.swarm.state import ReplicaState, witness


def applied(
    before: ReplicaState,
    deltas: Mapping[PeerId, Flat],
    store: BlobStore,
    codec: Codec,
    outer: OuterStep,
    *,
    tokens: int,
    clip: bool = True,
) -> Applied:
    """All weigh the same."""
    view = View()
    for peer, delta in deltas.items():
        blob = codec.encode(delta, before.layout)
        ref = store.put(*marked(blob, peer, before.module, before.round))
        view.contributions[peer] = codec.decode(blob, before.layout)
        view.commits[peer] = Commit(
            module=before.module,
            round=before.round,
            shard=0,
            blob=ref.id,
            size=ref.size,
            tokens=tokens,
            steps=1,
            loss_before=1.0,
            loss_after=1.0,
            digest=before.digest,
            witness=witness(before.theta, before.digest, peer),
            replicas_estimate=float(len(deltas)),
            session=bytes(16),
            committed_at=0.0,
        )
    weights = dict.fromkeys(deltas, 1 / len(deltas))
    update = aggregate(view.contributions, weights, before.layout, clip=clip)
    update = codec.update_of(update, before.layout)
    theta, velocity = outer.apply(before.theta, before.velocity, update, before.round)
    history = before.history + len(deltas)
    after = ReplicaState(before.module, before.layout, Round(before.round + 1), theta, velocity, history)
    return Applied(before.round, before, view, weights, False, after, 1)
