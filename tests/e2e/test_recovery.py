"""What a home machine runs short of for a while."""

from __future__ import annotations

import asyncio
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from potluck.peer.party import Member, Party

from real import run_party, write_manifest
from volunteer import Volunteer

pytestmark = [pytest.mark.slow, pytest.mark.privileged]


async def contributes_again(party: Party, one: Volunteer, organizer: Member) -> None:
    """In a round that begins from now on."""
    peer, since = one.home.identity().peer_id, organizer.last["round"] + 1
    await party.until(
        "its contribution", lambda: any(peer in e["group"] for e in organizer.applied if e["round"] >= since), 120
    )


def small_disk(path: Path) -> bool:
    """Whether `path` is a disk of its own now; only root can make one."""
    path.mkdir()
    try:
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(path)], capture_output=True)
    except FileNotFoundError:
        return False
    return made.returncode == 0


def test_a_disk_that_is_full_for_a_while_costs_only_its_rounds() -> None:
    async def body(party: Party) -> None:
        manifest = write_manifest(party.root, rounds__seconds=5.0, rounds__exchange_seconds=2.0)
        organizer = await party.start("org", "host", str(manifest))
        if not small_disk(party.root / "v"):
            pytest.skip("mounting a small disk needs root")
        one = Volunteer(party.root / "v")
        try:
            await one.start()
            join = ["join", organizer.status["invite"], "--loopback", "--threads", "1", "--device", "cpu"]
            await one.ask("add", arguments=join)
            await one.until(lambda run: run["contributed_rounds"] > 0)

            ballast, before = one.home.path / "ballast", organizer.last["round"]
            with ballast.open("wb") as file, suppress(OSError):
                while True:
                    file.write(bytes(2**20))
                    file.flush()
            await party.until("two rounds", lambda: organizer.last["round"] >= before + 2, 30)
            ballast.unlink()
            await contributes_again(party, one, organizer)
            assert (await one.until(lambda run: run["state"] == "working"))["halvings"] == 0
        finally:
            await one.stop()
            while one.workers():
                await asyncio.sleep(0.1)  # they die with their daemon
            await asyncio.to_thread(subprocess.run, ["umount", "-l", str(one.home.path)], check=False)
        await party.leave_all([organizer])

    run_party(body)
