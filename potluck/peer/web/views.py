"""From what was heard to what is shown. Pure: data in, models out."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from potluck.dht.manifest import Manifest, RunId
from potluck.peer.history import Heard, PeerPoint, Point
from potluck.peer.intervals import lasting_seconds
from potluck.peer.web.models import Curve, Module, Peer, Replica, RunState, Said

#: Rounds that each live event repeats.
LATEST: Final = 8
#: Replicas that the pipeline map shows, of all modules together; of one module at least one.
SHOWN: Final = 48


@dataclass(frozen=True)
class About:
    """What a page needs of a run's manifest."""

    run: RunId
    name: str
    family: str
    round_seconds: float
    modules: tuple[str, ...]
    validators: tuple[str, ...]

    @classmethod
    def of(cls, run: RunId, manifest: Manifest) -> About:
        stages = tuple(f"stage.{n}" for n in range(manifest.model.stages))
        validators = manifest.incentives.validators
        return cls(run, manifest.name, manifest.model.family, manifest.rounds.seconds, stages, validators)


def clean(text: str) -> str:
    """A stranger's text without what turns, hides or breaks lines."""
    return "".join(sign for sign in text if sign.isprintable()).strip()


def here(peers: Sequence[Heard], round_seconds: float, now: float) -> list[Heard]:
    """Those that were heard just now."""
    recent = sum(now - peer.last <= 3600 for peer in peers)
    return [peer for peer in peers if now - peer.last <= lasting_seconds(round_seconds, recent)]


def curve_of(points: Sequence[Point], every: int = 1) -> Curve:
    return Curve(
        every=every,
        round=[point.round for point in points],
        at=[round(point.at, 3) for point in points],
        loss=[point.loss for point in points],
        tokens_per_second=[round(point.tokens_per_second, 3) for point in points],
        peers=[point.peers for point in points],
    )


def modules_of(peers: Sequence[Heard], names: Sequence[str]) -> list[Module]:
    """Every module of the run, those without a replica too, and others that were heard of."""
    at: defaultdict[str, list[Heard]] = defaultdict(list)
    for peer in peers:
        if peer.latest.module is not None and peer.latest.role in ("worker", "organizer"):
            at[peer.latest.module].append(peer)
    odd = sorted(at.keys() - set(names))[: max(0, SHOWN - len(names))]
    shown = max(1, SHOWN // max(1, len(names) + len(odd)))
    return [_module(name, at.get(name, []), shown) for name in (*names, *odd)]


def _module(name: str, peers: Sequence[Heard], shown: int) -> Module:
    busiest = sorted(peers, key=lambda peer: (-peer.latest.load, -peer.latest.tokens_per_second, peer.peer))
    return Module(
        module=name,
        replicas=len(peers),
        load=sum(peer.latest.load for peer in peers) / max(1, len(peers)),
        tokens_per_second=sum(peer.latest.tokens_per_second for peer in peers),
        shown=[
            Replica(
                peer=peer.peer,
                name=clean(peer.latest.name),
                role=peer.latest.role,
                phase=clean(peer.latest.phase),
                load=peer.latest.load,
                tokens_per_second=peer.latest.tokens_per_second,
            )
            for peer in busiest[:shown]
        ],
    )


def run_state(
    about: About, points: Sequence[Point], peers: Sequence[Heard], now: float, ledgers: int, invite: str | None
) -> RunState:
    """`points`: the last rounds, the oldest first; `peers`: all that were ever heard."""
    present = here(peers, about.round_seconds, now)
    modules = modules_of(present, about.modules)
    last = points[-1] if points else None
    # The newest round has only just begun to be told: its sum is not whole yet.
    whole = points[-2] if len(points) > 1 else last
    return RunState(
        run=about.run,
        name=about.name,
        round=last.round if last else None,
        loss=next((point.loss for point in reversed(points) if point.loss is not None), None),
        tokens_per_second=whole.tokens_per_second if whole and present else 0.0,
        peers=len(present),
        heard_at=max((peer.last for peer in peers), default=None),
        now=now,
        round_seconds=about.round_seconds,
        family=about.family,
        roles=dict(Counter(peer.latest.role for peer in present)),
        modules=modules,
        unserved=[module.module for module in modules if not module.replicas] if present else [],
        latest=curve_of(points[-LATEST:]),
        validators=list(about.validators),
        ledgers=ledgers,
        invite=invite,
    )


def peer_view(heard: Heard, is_here: bool, now: float) -> Peer:
    beat = heard.latest
    return Peer(
        peer=heard.peer,
        name=clean(beat.name),
        role=beat.role,
        module=beat.module,
        phase=clean(beat.phase),
        version=clean(beat.version),
        round=beat.round,
        loss=beat.loss,
        load=beat.load,
        tokens_per_second=beat.tokens_per_second,
        contributed=beat.contributed,
        here=is_here,
        first=heard.first,
        last=heard.last,
        uptime=uptime(heard, now),
    )


def uptime(heard: Heard, now: float) -> float:
    """From 0 to 1; 1 for who has only just come."""
    since = now - heard.first
    return min(1.0, max(0.0, heard.present / since)) if since > 60 else 1.0


def said_by(points: Sequence[PeerPoint]) -> Said:
    return Said(
        round=[point.round for point in points],
        at=[round(point.at, 3) for point in points],
        module=[point.module for point in points],
        loss=[point.loss for point in points],
        tokens_per_second=[point.tokens_per_second for point in points],
        contributed=[point.contributed for point in points],
    )
