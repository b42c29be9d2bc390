"""The demo: a public run in small. Real processes, each with its own libp2p daemon, on loopback.

An organizer and three workers train a byte-level Llama. On the way a fourth worker joins late, one is killed with -9
and comes back, and the organizer is killed for good: the run goes on. Everything told at the end is read off the
peers' own events.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from potluck.dht.template import template_toml
from potluck.peer.export import Source, export_run
from potluck.peer.party import JOIN_SECONDS, Event, Member, Party, counted_microbatches, overhead_share
from potluck.swarm.model import count_parameters


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
    each thing that happens."""

    def __init__(
        self, root: Path, out: Path, script: Script, on_change: Callable[[], None], say: Callable[[str], None]
    ) -> None:
        self.root, self.out, self.script, self.say = root, out, script, say
        self.party = Party(root, on_change)

    @property
    def members(self) -> list[Member]:
        return self.party.members

    async def run(self) -> dict[str, Any]:
        """The demo's figures. Raises NetworkError if a peer cannot join or the swarm stands still."""
        async with self.party:
            return self._figures(await self._act())

    async def _act(self) -> Cast:
        script, party = self.script, self.party
        manifest = self.root / "demo.toml"
        manifest.write_text(template_toml("demo", "demo", _settings(script)))
        organizer = await party.start("organizer", "host", str(manifest), *self._stage(0))
        invite = str(organizer.status["invite"])
        count = 3 if script.stages == 1 else 2 * script.stages - 1
        workers = await asyncio.gather(
            *(party.start(f"worker-{i}", "join", invite, *self._stage(i)) for i in range(1, count + 1))
        )
        self.say(f"the organizer and {count} workers train together")

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
        await party.kill(organizer)
        organizer.state = "dead for good"
        self.say("the organizer is killed for good: the run goes on")

        await self._rounds(script.without_organizer)
        if script.stages > 1:
            source = await Source.of(workers[0].status["invite"], workers[0].home)
        else:
            source = await Source.of(None, workers[0].home)
        await export_run(source, self.out)
        self.say(f"the model is exported{' from all stages' if script.stages > 1 else ''}")
        await party.leave_all([m for m in self.members if m is not organizer])
        self.say("all have left")
        return Cast(organizer, victim, late, before, organizer.last["round"])

    def _stage(self, number: int) -> list[str]:
        return ["--stage", str(number % self.script.stages)] if self.script.stages > 1 else []

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
        rounds = [event for member in self.members for event in member.applied]
        digests: dict[tuple[int, str], set[str]] = defaultdict(set)
        losses: dict[int, list[float]] = defaultdict(list)
        for member in self.members:
            for event in member.applied:
                digests[event["round"], event.get("module", "stage.0")].add(event["digest"])
                losses[event["round"]].append(event["loss"])
        disagreeing = sorted({number for (number, _), seen in digests.items() if len(seen) > 1})
        curve = [sum(values) / len(values) for _, values in sorted(losses.items())]
        first_late = _first_contribution(cast.late)
        outlived = [m for m in self.members if m.last.get("round", -1) > cast.organizer_died_at + 1]
        parameters = self._parameters(cast.organizer)
        return {
            "loss_start": round(curve[0], 4),
            "loss_end": round(curve[-1], 4),
            "rounds": max(losses) + 1,
            "peers": len(self.members),
            "digests_agree": not disagreeing,
            "bytes_per_param_per_round": round(sum(e["bytes_received"] for e in rounds) / len(rounds) / parameters, 4),
            "late_join_seconds": round(first_late["seen"] - cast.late.started, 1) if first_late else None,
            "recovered": len(cast.victim.applied) > cast.victim_rounds_before,
            "survived_organizer": len(outlived) == len(self.members) - 1,
            "parameters": parameters,
            "rounds_disagreeing": disagreeing,
            "overhead_share": round(overhead_share(rounds), 4),
            "loss_curve": [round(value, 4) for value in curve],
            **(self._pipeline() if self.script.stages > 1 else {}),
        }

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


def _settings(script: Script) -> dict[str, Any]:
    pipeline = {
        "model.stages": script.stages,
        "model.config.tie_word_embeddings": False,  # the embedding and the head lie on different peers
        "pipeline.microbatch": 4,
    }
    return {
        **(pipeline if script.stages > 1 else {}),
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
