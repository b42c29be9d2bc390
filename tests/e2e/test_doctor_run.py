"""`potluck doctor INVITE` with a real organizer: what it tells, that it leaves nothing behind, and Ctrl-C."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from potluck.net.autonat import ask_to_dial_back
from potluck.net.hosts.go import GoHost
from potluck.net.identity import Identity
from potluck.peer.party import Party

from real import potluck, processes_of, run_party, short_folder, sockets_of, write_manifest

SOMEBODY = "12D3KooWCHA12mx7eyUNJDQNmAoz4n2ds3sLWmpNzPhTgciM4uPR"
#: Larger than a chunk, so that there is something to measure the download with.
WIDE = {"model__config__hidden_size": 128, "model__config__intermediate_size": 512}


def diagnosis(invite: str, home: Path) -> tuple[int, dict[str, Any], dict[str, dict[str, str]]]:
    """Exit code, the whole object, and findings by name."""
    done = potluck("doctor", invite, "--home", str(home), "--loopback", "--json", "--no-benchmark", "--device", "cpu")
    assert "Traceback" not in done.stderr, done.stderr
    said = json.loads(done.stdout)
    return done.returncode, said, {finding["name"]: finding for finding in said["findings"]}


@pytest.mark.slow
def test_doctor_examines_a_run_before_joining_it_and_leaves_nothing() -> None:
    async def body(party: Party) -> None:
        manifest = write_manifest(party.root, model__stages=1, **WIDE)
        organizer = await party.start("org", "host", str(manifest))
        invite, home = organizer.status["invite"], party.root / "new"

        code, said, found = await asyncio.to_thread(diagnosis, invite, home)
        assert code == 0 and said["ok"] is True, found
        assert found["bootstrap peers"]["seen"].startswith("1 of 1 answered; round trip ")
        assert found["reachability"]["seen"] == "this machine only (--loopback)"
        assert "within 0.05 s" in found["clock"]["seen"]
        assert "about 1 peer is in it" in found["run"]["seen"]
        assert " MB/s from one peer" in found["download"]["seen"], found["download"]
        assert " MB/s to one peer" in found["upload"]["seen"], found["upload"]
        assert {"manifest", "model", "data", "disk for this run"} <= found.keys()
        assert said["recommendation"]["role"] == "whole" and "join" in said["recommendation"]["command"]
        assert list(home.iterdir()) == [] and processes_of(home) == []

        code, said, found = await asyncio.to_thread(diagnosis, invite, organizer.home)
        assert code == 2 and "potluck status" in found["network"]["fix"]
        assert organizer.alive and "works here now" in found["running"]["seen"]

        await party.kill(organizer)
        code, said, found = await asyncio.to_thread(diagnosis, invite, home)
        assert code == 6 and said["ok"] is False and said["recommendation"]["role"] == "none"
        assert found["bootstrap peers"]["status"] == "fail" and "0 of 1" in found["bootstrap peers"]["seen"]
        assert "fresh invite" in found["bootstrap peers"]["fix"]
        assert list(home.iterdir()) == [] and processes_of(home) == []

    run_party(body)


@pytest.mark.slow
def test_ctrl_c_while_it_dials_leaves_no_process_and_no_socket() -> None:
    with short_folder() as folder, socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        invite = f"potluck:{'a' * 52}?peer=/ip4/127.0.0.1/tcp/{silent.getsockname()[1]}/p2p/{SOMEBODY}"
        command = [sys.executable, "-m", "potluck", "doctor", invite, "--home", str(folder), "--loopback"]
        for number in (signal.SIGINT, signal.SIGTERM):
            doctor = subprocess.Popen([*command, "--no-benchmark"], stderr=subprocess.PIPE, text=True)
            with silent.accept()[0]:  # the daemon dials, and waits for a word
                assert len(processes_of(folder)) == 2 and sockets_of(folder)
                os.kill(doctor.pid, number)
                _, said = doctor.communicate(timeout=60)
            assert doctor.returncode == 130 and "Traceback" not in said, said
            assert processes_of(folder) == [] and list(folder.iterdir()) == []


def test_a_daemon_is_asked_to_dial_back_and_refuses_on_loopback() -> None:
    async def go(folder: Path) -> None:
        hosts = []
        try:
            for name in ("a", "b"):
                identity = Identity.create(folder / name / "identity.key")
                hosts.append(await GoHost.start(identity, folder / name / "d"))
            asking, asked = hosts
            [address] = await asked.get_visible_maddrs()
            peer = await asking.connect(str(address), 10.0)
            mine = [str(address).rpartition("/p2p/")[0] for address in await asking.get_visible_maddrs()]
            said = await ask_to_dial_back(asking, peer, mine, timeout_seconds=10.0)
            assert (said.outcome, said.text) == ("refused", "refusing to dial peer with blocked observed address")
        finally:
            for host in hosts:
                await host.shutdown()

    with short_folder() as folder:
        asyncio.run(go(folder))
