"""The demo: a public run in small. Real processes, each with its own libp2p daemon, on loopback.

An organizer and three workers train a byte-level Llama. On the way a fourth worker joins late, one is killed with -9
and comes back, and the organizer is killed for good: the run goes on. Everything told at the end is read off the
peers' own events, and off the ledger of a validator, where there is one.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from potluck.dht.template import template_toml
from potluck.errors import LedgerError
from potluck.incentives.audit import Audit
from potluck.incentives.entries import CreditEntry, RoundEntry
from potluck.incentives.ledger import Ledger, verify_file
from potluck.incentives.report import Row, leaderboard
from potluck.net.host import PeerId
from potluck.peer.export import Source, export_run
from potluck.peer.home import Home
from potluck.peer.party import JOIN_SECONDS, Event, Member, Party, counted_microbatches, overhead_share
from potluck.peer.validating import audit_rounds
from potluck.swarm.model import count_parameters

#: The validator's name, and its home's.
VALIDATOR: Final = "validator"
#: Credit paid per round and module.
EMISSION: Final = 100.0
SCORED: Final = "incentives.round.scored"


@dataclass(frozen=True)
class Script:
    """What happens when: numbers of rounds, each counted from the event before it."""

    round_seconds: float
    exchange_seconds: float
    steps: int
    together: int
    after_late_join: int
    after_comeback: int
    without_organizer: int
    stages: int = 1
    validate: bool = False

    @property
    def total_steps(self) -> int:
        """About as many as the run will do, for the learning rate's schedule."""
        rounds = self.together + self.after_late_join + self.after_comeback + self.without_organizer
        return self.steps * (rounds + 6)


FULL = Script(5.0, 1.6, 12, together=4, after_late_join=6, after_comeback=6, without_organizer=12)
FAST = Script(4.0, 1.4, 8, together=1, after_late_join=2, after_comeback=1, without_organizer=3)


def of_stages(script: Script, stages: int) -> Script:
    """The same with a pipeline: two peers to a stage, so rounds that leave each some time."""
    return replace(script, stages=stages, round_seconds=2 * script.round_seconds, exchange_seconds=2.5)


def validated(script: Script) -> Script:
    """The same with a validator. It judges while the next round is trained: rounds that leave it some time."""
    return replace(script, validate=True, round_seconds=script.round_seconds + 4.0, exchange_seconds=2.5)


@dataclass(frozen=True)
class Cast:
    """Who had which part, and what was noted on the way."""

    organizer: Member
    victim: Member
    late: Member
    victim_rounds_before: int
    organizer_died_at: int


class Demo:
    """Runs the script, and exports the model to `out`. `on_change` is called whenever a peer said something, `say` with
    each thing that happens. `board`: the leaderboard at the end, with the peers' names."""

    def __init__(
        self, root: Path, out: Path, script: Script, on_change: Callable[[], None], say: Callable[[str], None]
    ) -> None:
        self.root, self.out, self.script, self.say = root, out, script, say
        self.party = Party(root, on_change)
        self.board: list[tuple[str, Row]] = []

    @property
    def members(self) -> list[Member]:
        return self.party.members

    @property
    def validator(self) -> Member | None:
        return next((member for member in self.members if member.name == VALIDATOR), None)

    @property
    def trainers(self) -> list[Member]:
        return [member for member in self.members if member.name != VALIDATOR]

    async def run(self) -> dict[str, Any]:
        """The demo's figures. Raises NetworkError if a peer cannot join or the swarm stands still."""
        async with self.party:
            return self._figures(await self._act())

    async def _act(self) -> Cast:
        script, party = self.script, self.party
        manifest = self.root / "demo.toml"
        # Its identity exists before the run does: the manifest names whom it trusts.
        validator = Home(self.root / VALIDATOR).open().identity().peer_id if script.validate else None
        manifest.write_text(template_toml("demo", "demo", _settings(script, validator)))
        organizer = await party.start("organizer", "host", str(manifest), *self._stage(0))
        invite = str(organizer.status["invite"])
        count = 3 if script.stages == 1 else 2 * script.stages - 1
        starting = [party.start(f"worker-{i}", "join", invite, *self._stage(i)) for i in range(1, count + 1)]
        if validator:
            starting.append(party.start(VALIDATOR, "validate", invite))
        workers = (await asyncio.gather(*starting))[:count]
        scored = "; a validator scores what each contributes" if validator else ""
        self.say(f"the organizer and {count} workers train together{scored}")

        await self._rounds(script.together)
        self.say("another worker joins late")
        late = await party.start("latecomer", "join", invite, wait=False)  # with stages, it finds its own

        await self._rounds(script.after_late_join)
        victim = workers[1]
        await party.kill(victim)
        self.say(f"{victim.name} is killed with -9; it comes back with the same home")
        before = len(victim.applied)
        await party.restart(victim, "join", invite, wait=False)
        await self._until("the latecomer to contribute", lambda: _first_contribution(late) is not None)
        await self._until(f"{victim.name} to come back", lambda: len(victim.applied) > before)

        await self._rounds(script.after_comeback)
        if self.validator:
            await self._until("the validator to pay for a round", lambda: self._paid(0))
        await party.kill(organizer)
        organizer.state = "dead for good"
        self.say("the organizer is killed for good: the run goes on")

        await self._rounds(script.without_organizer)
        if self.validator:
            since = organizer.last["round"] + 1
            await self._until("the validator to pay for a round without the organizer", lambda: self._paid(since))
        run = str(workers[0].status["invite"]) if script.stages > 1 else None
        await export_run(await Source.of(run, workers[0].home), self.out)
        self.say(f"the model is exported{' from all stages' if script.stages > 1 else ''}")
        await party.leave_all([m for m in self.members if m is not organizer])
        self.say("all have left")
        return Cast(organizer, victim, late, before, organizer.last["round"])

    def _stage(self, number: int) -> list[str]:
        return ["--stage", str(number % self.script.stages)] if self.script.stages > 1 else []

    def _paid(self, since: int) -> bool:
        """Whether in every module some round from `since` on was paid: that is done along with the next one scored."""
        assert self.validator
        scored: dict[str, int] = {}
        paid = set[str]()
        for event in self.validator.of(SCORED):
            if event["paid"] and scored.get(event["module"], -1) >= since:
                paid.add(event["module"])
            scored[event["module"]] = event["round"]
        return len(paid) == self.script.stages

    async def _rounds(self, count: int) -> None:
        """Let so many rounds pass, and go into the next one's training.

        A kill in the middle of the exchange is what the fault tests are for.
        """
        number = max(m.last.get("round", -1) for m in self.members) + count
        await self._until(f"round {number}", lambda: max(m.last.get("round", -1) for m in self.members) >= number)
        await asyncio.sleep(0.25 * self.script.round_seconds)

    async def _until(self, what: str, condition: Callable[[], bool]) -> None:
        await self.party.until(what, condition, 20 * self.script.round_seconds + JOIN_SECONDS)

    def _figures(self, cast: Cast) -> dict[str, Any]:
        rounds = [event for member in self.trainers for event in member.applied]
        digests: dict[tuple[int, str], set[str]] = defaultdict(set)
        losses: dict[int, list[float]] = defaultdict(list)
        for member in self.trainers:
            for event in member.applied:
                digests[event["round"], event.get("module", "stage.0")].add(event["digest"])
                losses[event["round"]].append(event["loss"])
        disagreeing = sorted({number for (number, _), seen in digests.items() if len(seen) > 1})
        curve = [sum(values) / len(values) for _, values in sorted(losses.items())]
        first_late = _first_contribution(cast.late)
        outlived = [m for m in self.trainers if m.last.get("round", -1) > cast.organizer_died_at + 1]
        parameters = self._parameters(cast.organizer)
        return {
            "loss_start": round(curve[0], 4),
            "loss_end": round(curve[-1], 4),
            "rounds": max(losses) + 1,
            "peers": len(self.trainers),
            "digests_agree": not disagreeing,
            "bytes_per_param_per_round": round(sum(e["bytes_received"] for e in rounds) / len(rounds) / parameters, 4),
            "late_join_seconds": round(first_late["seen"] - cast.late.started, 1) if first_late else None,
            "recovered": len(cast.victim.applied) > cast.victim_rounds_before,
            "survived_organizer": len(outlived) == len(self.trainers) - 1,
            "parameters": parameters,
            "rounds_disagreeing": disagreeing,
            "overhead_share": round(overhead_share(rounds), 4),
            "loss_curve": [round(value, 4) for value in curve],
            **(self._pipeline() if self.script.stages > 1 else {}),
            **(self._credit(self.validator) if self.validator else {}),
        }

    def _credit(self, validator: Member) -> dict[str, Any]:
        """What the validator's ledger says, and whether it holds: in both its forms, and when a round is done again."""
        names = {member.status.get("peer"): member.name for member in self.trainers}
        portable = self.out.with_name("validator.ledger")
        with Ledger.read(validator.folder.ledger) as ledger:
            ledger.export(portable)
            rows, size = leaderboard(ledger.entries()), ledger.size
            audited = self._audit(validator, ledger)
        self.board = [(names.get(row.peer, row.peer), row) for row in rows]
        try:
            verified = verify_file(validator.folder.ledger) == verify_file(portable)
        except LedgerError as error:
            self.say(f"the ledger does not verify: {error}")
            verified = False
        return {
            "ledger_entries": size,
            "ledger_verified": verified,
            "ledger_audited": audited,
            "credit": {row.peer: round(row.share, 6) for row in rows},
        }

    def _audit(self, validator: Member, ledger: Ledger) -> bool:
        """Score the last round that was paid in all modules once more."""
        rounds, paid = set[tuple[str, int]](), set[tuple[str, int]]()
        for entry in ledger.entries():
            if isinstance(entry, RoundEntry):
                rounds.add((entry.module, entry.round))
            elif isinstance(entry, CreditEntry) and entry.paid:
                paid.add((entry.module, entry.round))
        counts = Counter(number for _, number in rounds & paid)
        late = max((number for number, modules in counts.items() if modules == self.script.stages), default=None)
        if late is None:
            self.say("no round was paid in all modules")
            return False
        found: list[Audit] = []
        try:
            audit_rounds(validator.folder, ledger, None, "cpu", None, [late], found.append)
        except LedgerError as error:
            self.say(f"round {late} cannot be scored again: {error}")
            return False
        for difference in (text for one in found for text in one.differences):
            self.say(f"round {late}, scored again: {difference}")
        return all(not one.differences for one in found)

    def _pipeline(self) -> dict[str, Any]:
        trained = [e for m in self.members for e in m.events if e.get("event") == "swarm.pipeline.trained"]
        return {
            "stages": self.script.stages,
            "microbatches": sum(event["microbatches"] for event in trained),
            **{name: sum(_total(m, name) for m in self.members) for name in ("resends", "thrown_away", "half_counted")},
            "microbatches_counted_twice": sum(1 for times in counted_microbatches(self.members).values() if times > 1),
        }

    def _parameters(self, member: Member) -> int:
        signed = member.folder.manifest()
        assert signed
        return count_parameters(signed.manifest.model)


def _settings(script: Script, validator: PeerId | None) -> dict[str, Any]:
    pipeline = {
        "model.stages": script.stages,
        "model.config.tie_word_embeddings": False,  # the embedding and the head lie on different peers
        "pipeline.microbatch": 4,
    }
    scores = {"incentives.validators": [validator], "incentives.emission": EMISSION}
    return {
        **(pipeline if script.stages > 1 else {}),
        **(scores if validator else {}),
        "rounds.seconds": script.round_seconds,
        "rounds.exchange_seconds": script.exchange_seconds,
        "rounds.steps": script.steps,
        "training.total_steps": script.total_steps,
    }


def _total(member: Member, name: str) -> int:
    """Of a trainer's counter, which begins anew with each of the member's processes."""
    total = last = 0
    for event in member.of("swarm.pipeline.trained"):
        total += event[name] - last if event[name] >= last else event[name]
        last = event[name]
    return total


def _first_contribution(member: Member) -> Event | None:
    return next((event for event in member.applied if event["contributed"]), None)
