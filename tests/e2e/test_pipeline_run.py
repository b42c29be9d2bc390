"""A run whose model is cut into stages, on real peers."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from potluck.peer.control import ask
from potluck.peer.party import Member, Party, counted_microbatches
from potluck.swarm.data import load_corpus

from real import potluck, run_party, short_folder, write_manifest

pytestmark = pytest.mark.slow

STAGES: dict[str, Any] = {
    "model__stages": 2,
    "model__config__tie_word_embeddings": False,
    "pipeline__microbatch": 2,
    "rounds__seconds": 6.0,
    "rounds__exchange_seconds": 2.0,
}


def trained(member: Member) -> int:
    return sum(e["microbatches"] for e in member.events if e.get("event") == "swarm.pipeline.trained")


def test_two_stages_of_two_peers_train_and_a_killed_one_comes_back_to_its_stage() -> None:
    async def body(party: Party) -> None:
        manifest = write_manifest(party.root, **STAGES)
        organizer = await party.start("org", "host", str(manifest), "--stage", "0")
        invite = str(organizer.status["invite"])
        others = await asyncio.gather(*(party.start(f"w{i}", "join", invite, "--stage", str(i % 2)) for i in (1, 2, 3)))
        members = [organizer, *others]
        await party.until("everybody to train", lambda: all(trained(m) >= 4 for m in members), 180)
        status = await ask(organizer.folder.control_socket, "status")
        assert [stage["replicas"] for stage in status["pipeline"]["stages"]] == [2, 2]
        assert status["module"] == "stage.0"

        victim = others[0]
        await party.kill(victim)
        before = {m.name: trained(m) for m in members}
        await party.restart(victim, "join", invite)  # not told which: it has a checkpoint of stage.1
        await party.until("all to go on", lambda: all(trained(m) > before[m.name] + 2 for m in members), 180)
        assert victim.module == "stage.1"
        await party.until(
            "the group to be whole", lambda: any(len(m.last.get("group", ())) == 2 for m in (victim, others[2])), 120
        )
        trainer = await party.start("trainer", "join", invite, "--train-only", "--rounds", "3")
        await party.until("the trainer to leave after its rounds", lambda: trainer.state == "left", 120)
        assert trainer.process and await trainer.process.wait() == 0, trainer.error_line()
        assert trained(trainer) >= 3 and not trainer.applied  # it has no stage to apply rounds to

        model = party.root / "model"
        done = await asyncio.to_thread(potluck, "export", invite, str(model), "--json")
        assert done.returncode == 0, done.stderr
        exported = json.loads(done.stdout)
        done = await asyncio.to_thread(
            potluck, "generate", "def ", "--run", invite, "--tokens", "3", "--temperature", "0", "--json"
        )
        assert done.returncode == 0, done.stderr
        text = json.loads(done.stdout)["text"]
        assert text.startswith("def ") and len(text.encode()) == 7
        done = await asyncio.to_thread(potluck, "export", invite[:60] + "?peer=/ip4/127.0.0.1/tcp/1", str(model) + "2")
        assert done.returncode in (4, 5) and "Traceback" not in done.stderr
        await party.leave_all(members)

        whole = AutoModelForCausalLM.from_pretrained(model)
        assert sum(p.numel() for p in whole.parameters()) == exported["parameters"]
        held_out = load_corpus(organizer.folder.manifest().manifest.data).held_out_batch(4)  # type: ignore[union-attr]
        with torch.inference_mode():
            logits = whole(held_out[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), held_out[:, 1:].flatten())
        assert float(loss) < organizer.applied[0]["loss"] - 1.0  # the stages fit together

        counted = counted_microbatches(members)
        assert counted and max(counted.values()) == 1
        losses = [event["loss"] for event in organizer.applied]
        assert losses[-1] < losses[0] - 0.3

    run_party(body)


@pytest.mark.timeout(480)
def test_a_stage_whose_replicas_all_die_comes_back_from_a_snapshot_with_somebody_who_moves_there() -> None:
    async def body(party: Party) -> None:
        manifest = write_manifest(party.root, **STAGES)
        organizer = await party.start("org", "host", str(manifest))
        invite = str(organizer.status["invite"])
        members = [organizer]
        for number in (1, 2, 3):  # one after another: each goes where it is missed
            await party.until("it to be announced", lambda: bool(members[-1].of("swarm.round.applied")), 60)
            members.append(await party.start(f"w{number}", "join", invite))
        await party.until("everybody to train", lambda: all(m.last and trained(m) >= 12 for m in members), 180)

        def balanced() -> bool:
            """Two and two, and none on its way: on a busy machine somebody may seem slow, and be replaced."""
            ended = {m.name: len(m.of("swarm.move.done")) + len(m.of("swarm.move.failed")) for m in members}
            still = all(len(m.of("swarm.move.started")) == ended[m.name] for m in members)
            return still and sorted(m.module for m in members) == ["stage.0", "stage.0", "stage.1", "stage.1"]

        def keeps(member: Member) -> bool:
            return member.last_of("swarm.snapshot.kept").get("module") not in (None, member.module)

        await party.until(
            "two replicas and two keepers of each stage", lambda: balanced() and all(map(keeps, members)), 120
        )
        lost = next(stage for stage in ("stage.0", "stage.1") if stage != organizer.module)
        dying = [m for m in members if m.module == lost]
        staying = [m for m in members if m.module != lost]
        before = organizer.last_of("swarm.pipeline.trained")
        await asyncio.gather(*map(party.kill, dying))
        rounds = [m.last["round"] for m in staying]
        await party.until("somebody to move", lambda: any(m.module == lost for m in staying), 240)
        assert len([m for m in staying if m.module != lost]) == 1  # the last of a stage is never asked
        count = {m.name: trained(m) for m in staying}
        await party.until("both to train", lambda: all(trained(m) > count[m.name] + 4 for m in staying), 120)
        after = organizer.last_of("swarm.pipeline.trained")
        assert after["loss"] < before["loss"] + 0.3  # not from the beginning
        await party.leave_all(staying)
        for member, first in zip(staying, rounds, strict=True):
            assert member.last["round"] > first

        counted = counted_microbatches(members)
        assert counted and max(counted.values()) == 1

    run_party(body)


def test_what_cannot_be_cut_is_refused_with_the_setting_and_the_fix() -> None:
    with short_folder() as folder:
        manifest = write_manifest(folder, **STAGES)
        manifest.write_text(manifest.read_text().replace("tie_word_embeddings = false", "tie_word_embeddings = true"))
        done = potluck("host", str(manifest), "--home", str(folder / "h"), "--loopback")
        assert done.returncode == 4 and "tie_word_embeddings" in done.stderr
        manifest = write_manifest(folder, **STAGES)
        done = potluck("host", str(manifest), "--home", str(folder / "h"), "--loopback", "--stage", "2")
        assert done.returncode == 2 and "--stage 2" in done.stderr and "0 to 1" in done.stderr
