"""The daemon over workers that are real processes, but no peers: they crash, hang, linger and end as they are told."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest

from potluck.errors import UserError
from potluck.peer import traffic
from potluck.peer.control import ask
from potluck.peer.home import Home
from potluck.peer.limits import Sensed
from potluck.peer.sensors import Sensors
from potluck.peer.supervisor import Supervisor, out_of_memory, wait_seconds

RUN = "a" * 52

#: join DEED ...: does the deed. Says first that it joined, as a peer does.
WORKER = """
import asyncio, json, os, signal, socket, subprocess, sys, time
deed, home = sys.argv[2], sys.argv[sys.argv.index("--home") + 1]
print(json.dumps({"event": "peer.joined", "run": "RUN", "phase": "training"}), flush=True)
with open(os.path.join(home, "started"), "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
if deed == "works":
    for r in range(10**6):
        print(json.dumps({"event": "swarm.round.applied", "round": r, "contributed": True}), flush=True)
        time.sleep(0.05)
elif deed == "lingers":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", home])
    time.sleep(600)
elif deed == "hangs":
    os.makedirs(os.path.join(home, "s", "RUN"[:8]), exist_ok=True)
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.path.join(home, "s", "RUN"[:8], "control.sock"))
    server.listen(64)
    time.sleep(600)
elif deed == "leaves":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    time.sleep(600)
elif deed == "falls":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
    time.sleep(600)
elif deed == "serves":
    path = os.path.join(home, "s", "RUN"[:8], "control.sock")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.exists(path):
        os.unlink(path)
    server, passed = socket.socket(socket.AF_UNIX), 0
    server.bind(path)
    server.listen(64)
    while True:
        client = server.accept()[0]
        asked = json.loads(client.makefile().readline())
        with open(os.path.join(home, "asked"), "a") as file:
            file.write(json.dumps(asked) + "\\n")
        passed += 1000
        client.sendall(json.dumps({"bytes_sent": passed, "bytes_received": 3 * passed}).encode() + b"\\n")
        client.close()
elif deed == "chatters":
    print(5, flush=True)
    print("[1]", flush=True)
    print("[" * 100000, flush=True)
    sys.stderr.write("progress\\r" * 1000000 + "x" * 9000000)
    sys.stderr.flush()
    time.sleep(600)
elif deed == "orphans":
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", home], start_new_session=True)
    print("error: gone", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGABRT)
elif deed == "memory":
    print("RuntimeError: CUDA out of memory", file=sys.stderr)
    sys.exit(1)
else:
    print("error: as it was told", file=sys.stderr)
    sys.exit(int(deed))
""".replace("RUN", RUN)


class Machine(Sensors):
    """What the sensors see is what the test says."""

    def __init__(self) -> None:
        super().__init__()
        self.battery = self.broken = False

    def look(self, limits: Any, ours: Any) -> Sensed:
        if self.broken:
            raise RuntimeError("the sensor fell off")
        return Sensed(datetime.now(), on_battery=self.battery)


@dataclass
class World:
    home: Home
    supervisor: Supervisor
    machine: Machine
    events: list[dict[str, Any]] = field(default_factory=list)

    async def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        return await ask(self.home.daemon_socket, command, 15.0, **arguments)

    async def add(self, *arguments: str) -> None:
        await self.ask("add", arguments=["join", *arguments])

    async def run(self) -> dict[str, Any]:
        found: list[dict[str, Any]] = (await self.ask("status"))["runs"]
        return found[0] if found else {}

    async def until(self, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        while not holds(found := await self.run()):
            await asyncio.sleep(0.03)
        return found

    def named(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == name]

    def started(self) -> list[str]:
        path = self.home.path / "started"
        return path.read_text().splitlines() if path.exists() else []


def play(folder: Path, scene: Callable[[World], Awaitable[None]], **changes: Any) -> World:
    script = folder / "worker.py"
    script.write_text(WORKER)
    home = Home(folder / "h").open()
    (home.path / "runs" / RUN).mkdir(parents=True, exist_ok=True)
    (home.path / "runs" / RUN / "manifest.bin").touch()
    machine = Machine()

    def emit(name: str, **fields: Any) -> None:
        world.events.append({"event": name, **fields})

    supervisor = Supervisor(
        home, emit, sensors=machine, program=(sys.executable, "-S", str(script)), look_seconds=0.03, **changes
    )
    world = World(home, supervisor, machine)

    async def main() -> None:
        running = asyncio.create_task(supervisor.run())
        while not home.daemon_socket.exists():
            assert not running.done(), running.exception()
            await asyncio.sleep(0.01)
        try:
            await asyncio.wait_for(scene(world), 60)
        finally:
            supervisor.stop()
            await running

    asyncio.run(main())
    left = [p for p in psutil.process_iter(["cmdline"]) if str(home.path) in (p.info["cmdline"] or ())]
    assert not [p for p in left if p.status() != psutil.STATUS_ZOMBIE]
    return world


def test_a_run_is_kept_over_a_restart_of_the_daemon_and_works(tmp_path: Path) -> None:
    async def first(world: World) -> None:
        await world.add("works")
        found = await world.until(lambda run: run["contributed_rounds"] > 2)
        assert found["state"] == "working" and found["run"] == RUN and found["pid"]

    async def second(world: World) -> None:
        assert await world.until(lambda run: run["state"] == "working")

    assert play(tmp_path, first).started() == play(tmp_path, second).started()[:1]


def test_a_pause_ends_the_worker_and_all_that_it_started_and_resume_goes_on(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        await world.add("lingers")
        await world.until(lambda run: run["state"] == "working")
        every = psutil.process_iter(["cmdline"])
        children = [p for p in every if str(world.home.path) in (p.info["cmdline"] or ())]
        assert len(children) >= 2
        answer = await world.ask("pause")
        assert not [p for p in children if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        assert answer["rule"] == "you" and not answer["works"]
        assert answer["runs"][0]["state"] == "paused" and answer["runs"][0]["pid"] is None
        await world.ask("resume")
        await world.until(lambda run: run["state"] == "working")
        assert len(world.started()) == 2

    world = play(tmp_path, scene)
    assert [e["rule"] for e in world.named("daemon.paused")] == ["you"]


def test_a_pause_and_a_finish_outlast_the_daemon(tmp_path: Path) -> None:
    async def pausing(world: World) -> None:
        await world.add("works")
        await world.until(lambda run: run["state"] == "working")
        await world.ask("pause")

    async def finishing(world: World) -> None:
        assert (await world.ask("status"))["rule"] == "you"
        await world.ask("finish")
        await world.ask("pause")

    async def resuming(world: World) -> None:
        found = await world.until(lambda run: run["state"] == "stopped")
        assert "resume" in found["reason"] and len(world.started()) == 1
        await world.ask("resume")
        await world.until(lambda run: run["state"] == "working")

    for scene in (pausing, finishing, resuming):
        play(tmp_path, scene)


def test_who_resumes_while_the_last_round_is_completed_is_started_again(tmp_path: Path, monkeypatch: Any) -> None:
    async def leaving(path: Path, command: str, *_: float) -> dict[str, Any]:
        if command == "leave":
            os.kill(world_of[0].supervisor._workers[0].process.pid, signal.SIGTERM)  # type: ignore[union-attr]
            return {"leaving_after_round": 3}
        raise UserError("not asked here")

    world_of: list[World] = []
    monkeypatch.setattr("potluck.peer.supervisor.ask", leaving)

    async def scene(world: World) -> None:
        world_of.append(world)
        await world.add("leaves")
        await world.until(lambda run: run["state"] == "working")
        assert (await world.ask("finish"))["finishing"] == {RUN: 3}
        await world.ask("resume")
        while len(world.started()) < 2:
            await asyncio.sleep(0.02)
        await world.until(lambda run: run["state"] == "working")
        await world.ask("finish")
        await world.until(lambda run: run["state"] == "stopped")

    play(tmp_path, scene)


@pytest.mark.parametrize("again", [False, True])
def test_a_last_round_that_is_lost_by_a_crash_is_not_begun_again_unless_somebody_resumed(
    tmp_path: Path, monkeypatch: Any, again: bool
) -> None:
    async def leaving(path: Path, command: str, *_: float) -> dict[str, Any]:
        if command == "leave":
            return {"leaving_after_round": 3}
        raise UserError("not asked here")

    monkeypatch.setattr("potluck.peer.supervisor.ask", leaving)

    async def scene(world: World) -> None:
        await world.add("falls")
        pid = (await world.until(lambda run: run["state"] == "working"))["pid"]
        await world.ask("finish")
        if again:
            await world.ask("resume")
        os.kill(pid, signal.SIGTERM)
        if again:
            await world.until(lambda run: run["state"] == "working" and run["pid"] != pid)
        else:
            found = await world.until(lambda run: run["state"] == "stopped")
            assert "resume" in found["reason"] and "lost" in found["reason"]
            await asyncio.sleep(0.2)

    assert len(play(tmp_path, scene).started()) == 1 + again


def test_the_same_run_once_more_changes_nothing_and_other_options_begin_anew(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        await world.add("works")
        pid = (await world.until(lambda run: run["state"] == "working"))["pid"]
        assert (await world.ask("add", arguments=["join", "works"]))["had"]
        assert (await world.run())["pid"] == pid
        assert (await world.ask("add", arguments=["join", "works", "--threads", "1"]))["replaced"]
        await world.until(lambda run: run["state"] == "working" and run["pid"] != pid)
        assert len((await world.ask("status"))["runs"]) == 1

    play(tmp_path, scene)


def test_one_run_has_one_entry_whatever_invite_it_is_joined_by(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        for peer in ("1.2.3.4", "5.6.7.8"):
            invite = f"potluck:{RUN}?peer=/ip4/{peer}/tcp/4001/p2p/12D3KooWNpbuDBLkcddYCTJHSYsReZGkm1e4qwZhmav5xFmAUz4p"
            await world.add(invite)
        found = (await world.ask("status"))["runs"]
        assert [one["run"] for one in found] == [RUN] and "5.6.7.8" in found[0]["arguments"][1]
        await world.ask("remove", run=RUN[:4])
        assert not await world.run()

    play(tmp_path, scene)


@pytest.mark.parametrize("text", ["[]", '{"runs": [{"arguments": ["rm", "-rf"]}]}', "{", '{"runs": 3}', "\0"])
def test_a_damaged_list_of_runs_is_refused_by_name(tmp_path: Path, text: str) -> None:
    home = Home(tmp_path / "h").open()
    (home.path / "runs.json").write_text(text)
    with pytest.raises(UserError, match=r"runs\.json .* remove it"):
        asyncio.run(Supervisor(home, lambda *_, **__: None).run())


def test_a_disk_that_takes_nothing_costs_no_run_and_no_daemon(tmp_path: Path, monkeypatch: Any) -> None:
    def full(path: Path, content: bytes) -> None:
        raise UserError("no space left")

    async def scene(world: World) -> None:
        await world.add("works")
        await world.until(lambda run: run["state"] == "working")
        monkeypatch.setattr("potluck.peer.supervisor.write_atomically", full)
        with pytest.raises(UserError, match="no space"):
            await world.add("1")
        await world.ask("pause")
        await world.ask("resume")
        await world.until(lambda run: run["state"] == "working")
        await world.ask("remove")
        assert not await world.run() and world.named("daemon.runs.unsaved")

    play(tmp_path, scene)


def test_a_rule_pauses_by_its_name_and_work_goes_on_when_it_ends(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        await world.add("works")
        await world.until(lambda run: run["state"] == "working")
        world.machine.battery = True
        await world.until(lambda run: run["state"] == "paused")
        assert (await world.ask("status"))["rule"] == "battery"
        world.machine.battery = False
        await world.until(lambda run: run["state"] == "working")
        world.machine.battery = True
        await world.until(lambda run: run["state"] == "paused")
        (world.home.path / "limits.toml").write_text("battery = true")
        await world.until(lambda run: run["state"] == "working")

    play(tmp_path, scene)


def test_wrong_limits_are_told_and_those_before_stay(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        await world.add("works")
        (world.home.path / "limits.toml").write_text("battery = maybe")
        while not world.named("daemon.limits.wrong"):
            await asyncio.sleep(0.02)
        assert (await world.until(lambda run: run["state"] == "working"))["pid"]

    play(tmp_path, scene)


def test_crashes_are_waited_out_longer_each_time_and_wrong_settings_wait_for_you(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        await world.add("1")
        found = await world.until(lambda run: run["restarts"] >= 2 and run["state"] == "waiting")
        assert found["reason"] == "error: as it was told"
        assert [e["seconds"] for e in world.named("daemon.worker.waits")][:2] == [1.0, 2.0]
        await world.ask("remove")
        await world.add("4")
        found = await world.until(lambda run: run and run["state"] == "stopped")
        assert found["reason"].startswith("error: as it was told")
        await world.ask("resume")
        await world.until(lambda run: run["state"] == "stopped" and len(world.named("daemon.worker.started")) >= 4)

    play(tmp_path, scene)


def test_too_little_memory_halves_the_batch_and_is_remembered(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        await world.add("memory")
        await world.until(lambda run: run["restarts"] >= 2)

    world = play(tmp_path, scene)
    assert "--of-daemon 0" in world.started()[0] and "--of-daemon 1" in world.started()[1]
    assert json.loads((world.home.path / "runs.json").read_text())["runs"][0]["halvings"] >= 2


def test_a_worker_that_does_not_answer_is_killed_and_started_again(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("potluck.peer.control.TIMEOUT_SECONDS", 0.1)
    monkeypatch.setattr("potluck.peer.supervisor.ask", lambda path, command, *_: ask(path, command, 0.1))

    async def scene(world: World) -> None:
        await world.add("hangs")
        while len(world.started()) < 2:
            await asyncio.sleep(0.05)
        assert (await world.run())["restarts"] >= 1

    assert play(tmp_path, scene, ask_seconds=0.05).named("daemon.worker.hangs")


def test_a_worker_that_leaves_by_itself_is_forgotten(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        await world.add("0")
        while not world.named("daemon.run.left"):
            await asyncio.sleep(0.02)
        assert not await world.run()

    assert json.loads((play(tmp_path, scene).home.path / "runs.json").read_text())["runs"] == []


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["join"],
        ["leave", "x"],
        ["join", "--json"],
        ["join", "x", "--home=/"],
        ["join", 3],
        ["join", "x" * 5000],
        ["join", "a\0b"],
        ["join", "--name", "x"],
    ],
)
def test_what_is_no_command_of_a_peer_is_refused(tmp_path: Path, arguments: list[Any]) -> None:
    async def scene(world: World) -> None:
        with pytest.raises(UserError):
            await world.ask("add", arguments=arguments)
        with pytest.raises(UserError):
            await world.ask("add", argument="x")
        assert not (await world.ask("status"))["runs"]

    play(tmp_path, scene)


def test_a_second_daemon_is_refused(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        with pytest.raises(UserError, match="a daemon runs"):
            await Supervisor(world.home, lambda *_, **__: None).run()

    play(tmp_path, scene)


def test_waits_double_up_to_five_minutes() -> None:
    assert [wait_seconds(n) for n in (1, 2, 3, 9, 10, 10**6)] == [1.0, 2.0, 4.0, 256.0, 300.0, 300.0]


def test_what_counts_as_out_of_memory() -> None:
    assert out_of_memory(-signal.SIGKILL, []) and out_of_memory(1, ["a", "MemoryError"])
    assert not out_of_memory(1, ["ValueError"]) and not out_of_memory(-signal.SIGSEGV, [])


def test_sent_bytes_count_by_the_month(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        (world.home.path / "limits.toml").write_text("upload_month = 1000000")
        await world.add("works")
        await world.until(lambda run: run["state"] == "working")
        world.supervisor._traffic.add(1_000_000, 5)
        await world.until(lambda run: run["state"] == "paused")
        assert (await world.ask("status"))["rule"] == "upload_month"

    path = play(tmp_path, scene).home.path / "traffic.json"
    (counts,) = json.loads(path.read_text())["months"].values()
    assert counts == [1_000_000, 5]
    path.write_text(json.dumps({"months": {"2020-01": counts}}))

    async def next_month(world: World) -> None:
        await world.until(lambda run: run["state"] == "working")

    play(tmp_path, next_month)


def test_a_clock_that_is_wrong_for_a_while_forgets_no_month(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calendar = ["2026-11"]
    monkeypatch.setattr(traffic, "_month", lambda: calendar[0])
    path = tmp_path / "traffic.json"
    counted = traffic.Traffic(path)
    counted.add(7, 5)
    for calendar[0] in ("1970-01", "2026-12"):
        assert counted.this_month() == (0, 0)
        counted.add(1, 1)
    counted.save()
    calendar[0] = "2026-11"
    assert traffic.Traffic(path).this_month() == (7, 5)
    for calendar[0] in ("2027-01", "2027-02", "2027-03"):
        counted.add(1, 1)
    calendar[0] = "2026-11"
    assert counted.this_month() == (0, 0)
    path.write_text('{"months": {"2026-11": ["many", 1]}}')
    assert traffic.Traffic(path).this_month() == (0, 0)


def test_whatever_a_worker_prints_it_stays_the_daemons(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        await world.add("chatters")
        run = await world.until(lambda run: run["pid"] is not None)
        worker = world.supervisor._workers[0]
        while sum(map(len, worker.words)) < 200:
            assert worker.alive
            await asyncio.sleep(0.03)
        await world.ask("pause")
        assert not psutil.pid_exists(run["pid"])
        await world.until(lambda run: run["state"] == "paused")

    assert not play(tmp_path, scene).named("daemon.run.left")


def test_a_dead_worker_whose_child_holds_its_pipes_is_started_again(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        await world.add("orphans")
        await world.until(lambda run: run["restarts"] >= 1)
        async with asyncio.timeout(5):
            await world.ask("pause")
        for process in psutil.process_iter(["cmdline"]):
            if process.info["cmdline"] and process.info["cmdline"][-1] == str(world.home.path):
                process.kill()

    assert play(tmp_path, scene).named("daemon.worker.ended")[0]["said"] == "error: gone"


def test_a_sensor_that_breaks_does_not_end_the_daemon(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        await world.add("works")
        await world.until(lambda run: run["state"] == "working")
        world.machine.broken = True
        while not world.named("daemon.sensors.failed"):
            await asyncio.sleep(0.03)
        await asyncio.sleep(0.3)
        assert (await world.run())["state"] == "working"
        await world.ask("pause")

    assert len(play(tmp_path, scene).named("daemon.sensors.failed")) == 1


def told(home: Home) -> list[dict[str, Any]]:
    """What a worker that serves was told of its limits."""
    lines = (home.path / "asked").read_text().splitlines()
    return [one["arguments"] for one in map(json.loads, lines) if one["command"] == "limit"]


def option(line: str, name: str) -> str:
    words = line.split()
    return words[words.index(name) + 1]


def test_runs_share_the_machines_limits_and_hear_when_their_share_changes(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        text = f"upload = 100000\ndisk_quota = 9000000\nvram = 4000000000\n[runs.{RUN[:3]}]\ndownload = 30000"
        (world.home.path / "limits.toml").write_text(text)
        while not world.supervisor._limits.upload:
            await asyncio.sleep(0.02)
        await world.add("serves")
        await world.until(lambda run: run["state"] == "working")
        await world.add("lingers")
        while not (world.home.path / "asked").exists() or {
            "upload": 50_000,
            "download": 30_000,
            "disk_quota": 4_500_000,
        } not in told(world.home):
            await asyncio.sleep(0.02)
        while len(world.started()) < 2:
            await asyncio.sleep(0.02)

    lines = play(tmp_path, scene, ask_seconds=0.1).started()
    assert option(lines[0], "--upload-limit") == "100000" and option(lines[1], "--upload-limit") == "50000"
    assert option(lines[1], "--disk-quota") == "4500000" and option(lines[1], "--vram-limit") == "2000000000"


def test_a_changed_cap_reaches_a_worker_that_goes_on(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        await world.add("serves")
        pid = (await world.until(lambda run: run["state"] == "working"))["pid"]
        (world.home.path / "limits.toml").write_text("upload = 70000\ndownload = 80000")
        while not (world.home.path / "asked").exists() or not told(world.home):
            await asyncio.sleep(0.02)
        assert told(world.home)[-1] == {"upload": 70_000, "download": 80_000, "disk_quota": 10**10}
        assert (await world.run())["pid"] == pid

    play(tmp_path, scene)


def test_a_run_that_the_limits_are_not_enough_for_waits_until_they_are(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        (world.home.path / "limits.toml").write_text("upload = 15000")
        while not world.supervisor._limits.upload:
            await asyncio.sleep(0.02)
        await world.add("works")
        await world.until(lambda run: run["state"] == "working")
        await world.add("lingers")
        while (second := (await world.ask("status"))["runs"][1])["state"] != "waiting":
            await asyncio.sleep(0.02)
        assert "upload" in second["reason"] and len(world.started()) == 1
        (world.home.path / "limits.toml").write_text("upload = 20000")
        while (await world.ask("status"))["runs"][1]["state"] != "working":
            await asyncio.sleep(0.02)
        (world.home.path / "limits.toml").write_text("upload = 16000")
        while (second := (await world.ask("status"))["runs"][1])["state"] != "waiting":
            await asyncio.sleep(0.02)
        assert second["pid"] is None and (await world.run())["state"] == "working"

    play(tmp_path, scene)


def test_what_a_worker_received_counts_by_the_month_its_last_seconds_too(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        await world.add("serves")
        while not (await world.ask("status"))["received_this_month"]:
            await asyncio.sleep(0.02)
        before = (await world.ask("status"))["received_this_month"]
        await world.ask("pause")
        assert (await world.ask("status"))["received_this_month"] == before + 3000
        (world.home.path / "limits.toml").write_text("download_month = 1000000")
        world.supervisor._traffic.add(0, 1_000_000)
        await world.ask("resume")
        await world.until(lambda run: run["state"] == "paused")
        assert (await world.ask("status"))["rule"] == "download_month"

    play(tmp_path, scene)


def test_a_worker_that_holds_too_much_memory_begins_again_smaller_and_gives_up_in_the_end(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("potluck.peer.supervisor.held_bytes", lambda pids: 2 * 10**8)
    monkeypatch.setattr("potluck.peer.supervisor.MAX_OVER_MEMORY", 1)

    async def scene(world: World) -> None:
        (world.home.path / "limits.toml").write_text("memory = 100000000")
        await world.add("works")
        found = await world.until(lambda run: run["state"] == "waiting")
        assert "`memory`" in found["reason"] and "micro-batch" in found["reason"] and found["halvings"] == 1
        found = await world.until(lambda run: run["state"] == "stopped")
        assert "raise it" in found["reason"]
        (world.home.path / "limits.toml").write_text("memory = 300000000")
        await world.ask("resume")
        await world.until(lambda run: run["state"] == "working" and run["contributed_rounds"] > 0)

    world = play(tmp_path, scene)
    assert option(world.started()[-1], "--of-daemon") == "2"
    assert len(world.named("daemon.worker.over_memory")) == 2


def test_sensors_of_this_machine_see_our_load_as_ours() -> None:
    sensors = Sensors()
    from potluck.peer.limits import Limits

    first = sensors.look(Limits(), {os.getpid()})
    assert first.load is None
    sum(n * n for n in range(3_000_000))
    second = sensors.look(Limits(programs=["no such program"], idle_minutes=5), {os.getpid()})
    assert second.load is not None and 0 <= second.load <= 1 and second.programs == ()
    assert second.temperature is None or 0 < second.temperature < 150
