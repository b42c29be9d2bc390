"""A volunteer's daemon with real peers: it takes over a join, pauses, comes back after deaths, and leaves."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path

import psutil
import pytest

from potluck.errors import UserError
from potluck.peer.control import ask
from potluck.peer.party import Party

from real import potluck, run_party, write_manifest
from volunteer import Volunteer

pytestmark = pytest.mark.slow


def test_a_daemon_takes_over_pauses_comes_back_and_leaves() -> None:
    async def body(party: Party) -> None:
        manifest = write_manifest(party.root, rounds__seconds=5.0, rounds__exchange_seconds=2.0)
        organizer = await party.start("org", "host", str(manifest))
        one = Volunteer(party.root / "v")
        await one.start()
        try:
            home = ("--home", str(one.home.path))
            join = ("join", "--loopback", *home, organizer.status["invite"], "--threads", "1")
            said = await asyncio.to_thread(potluck, *join)
            assert said.returncode == 0 and "handed to the daemon" in said.stdout, said
            shown = await asyncio.to_thread(potluck, "status", *home)
            assert shown.returncode == 0 and "daemon     works" in shown.stdout, shown
            wrong = await asyncio.to_thread(potluck, "join", "potluck:nothing", *home)
            assert wrong.returncode == 4, wrong
            await one.until(lambda run: run["contributed_rounds"] > 0)
            assert psutil.Process(one.process.pid).memory_info().rss < 80e6  # type: ignore[union-attr]
            control, caps = one.home.find_run().control_socket, {"download": None, "disk_quota": 10**9}
            assert await ask(control, "limit", upload=5_000_000, **caps) == {}
            with pytest.raises(UserError, match="positive"):
                await ask(control, "limit", upload=-1, **caps)

            await one.ask("pause")
            assert one.workers() == []
            why = await asyncio.to_thread(potluck, "why", *home)
            assert "paused by you" in why.stdout
            before = (await one.until(lambda run: run["state"] == "paused"))["contributed_rounds"]
            await one.ask("resume")
            run = await one.until(lambda run: run["contributed_rounds"] > before)

            os.kill(run["pid"], signal.SIGKILL)
            killed = run["pid"]
            run = await one.until(lambda run: run["state"] == "working" and run["pid"] not in (None, killed))
            before = run["contributed_rounds"]
            assert run["restarts"] == 1
            await one.until(lambda run: run["contributed_rounds"] > before)

            assert one.process
            one.process.kill()
            await one.process.wait()
            while one.workers():
                await asyncio.sleep(0.1)  # they die with their daemon
            await one.start()
            await one.until(lambda run: run["contributed_rounds"] > 0)

            left = await asyncio.to_thread(potluck, "leave", "--wait", *home)
            assert left.returncode == 0
            async with asyncio.timeout(30):
                while (await one.ask("status"))["runs"]:
                    await asyncio.sleep(0.1)
            assert one.events("daemon.run.left")

            await one.ask("pause")
            assert (await asyncio.to_thread(potluck, *join)).returncode == 0
            assert (await one.until(lambda run: run["state"] == "paused"))["pid"] is None
            left = await asyncio.to_thread(potluck, "leave", *home)
            assert left.returncode == 0 and not (await one.ask("status"))["runs"], left
            one.process.send_signal(signal.SIGINT)
            assert await asyncio.wait_for(one.process.wait(), 20) == 0
        finally:
            await one.stop()
        await party.leave_all([organizer])

    run_party(body)


def test_without_a_daemon_the_commands_say_so(tmp_path: Path) -> None:
    for command in ("pause", "resume", "finish"):
        done = potluck(command, "--home", str(tmp_path), "--json")
        assert done.returncode == 6 and "potluck daemon" in json.loads(done.stdout)["error"]


def test_limits_are_set_shown_and_refused(tmp_path: Path) -> None:
    done = potluck("limits", "set", "schedule=22:00-07:00; sat 0:00-24:00", "upload=2MB", "--home", str(tmp_path))
    assert done.returncode == 0, done.stderr
    shown = json.loads(potluck("limits", "show", "--home", str(tmp_path), "--json").stdout)
    assert shown["schedule"] == ["22:00-07:00", "sat 0:00-24:00"] and shown["upload"] == 2_000_000
    for wrong in ("schedule=late", "upload=1", "load=2", "nothing=1", "battery=perhaps", "threads=two"):
        assert potluck("limits", "set", wrong, "--home", str(tmp_path)).returncode == 2
    assert potluck("limits", "set", "upload=", "--home", str(tmp_path)).returncode == 0
    assert json.loads(potluck("limits", "show", "--home", str(tmp_path), "--json").stdout)["upload"] is None


def test_a_service_is_shown_before_it_is_installed(tmp_path: Path) -> None:
    shown = potluck("service", "install", "--dry-run", "--home", str(tmp_path / "a home"))
    assert shown.returncode == 0 and "ExecStart=" in shown.stdout and f'"{tmp_path}/a home"' in shown.stdout
    assert "enable --now" in shown.stdout
    status = json.loads(potluck("service", "status", "--json", "--home", str(tmp_path / "a home")).stdout)
    assert status["installed"] is False and status["daemon"] is None
