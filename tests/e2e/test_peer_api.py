"""The Python API, in one process with real libp2p daemons: `Peer.open`, `host`, `join`, `rounds`."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from potluck.peer import build
from potluck.peer.node import NetworkSettings
from potluck.peer.worker import Peer, PeerSettings

from real import short_folder, write_manifest

LOOPBACK = PeerSettings(
    device="cpu", threads=1, network=NetworkSettings(listen=("/ip4/127.0.0.1/tcp/0",), nat_port_map=False)
)


def test_rounds_can_be_iterated_and_left() -> None:
    async def go(folder: Path) -> None:
        async with Peer.open(folder / "a", LOOPBACK) as peer:
            run = await peer.host(write_manifest(folder, rounds__seconds=3.0, rounds__exchange_seconds=1.0))
            seen = [report.round async for report in run.rounds(at_most=2)]
            assert len(seen) == 2 and seen[1] == seen[0] + 1
            assert run.phase == "left"

    with short_folder() as folder:
        asyncio.run(go(folder))


def test_a_peer_whose_seed_gives_other_weights_downloads_theta_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another PyTorch may draw other bits from the seed; here the organizer's are shifted on purpose."""
    ours = build.state_of

    def shifted(module: object, manifest: object, name: str = "stage.0") -> object:
        state = ours(module, manifest, name)  # type: ignore[arg-type]
        other = dataclasses.replace(state, theta=state.theta + np.float32(0.5))
        _ = other.digest
        return other

    async def go(folder: Path) -> None:
        async with Peer.open(folder / "a", LOOPBACK) as organizer, Peer.open(folder / "b", LOOPBACK) as joiner:
            monkeypatch.setattr(build, "state_of", shifted)
            hosted = await organizer.host(write_manifest(folder, rounds__seconds=60.0))
            training = asyncio.create_task(hosted.train())
            while hosted.seat is None or hosted.seat.replica.state is None:
                await asyncio.sleep(0.05)
            monkeypatch.setattr(build, "state_of", ours)
            joined = await joiner.join(await hosted.invite())
            assert joined.seat is not None
            wanted = hosted.manifest.model.initial_state
            assert joined.seat.parts.theta_0.digest != wanted
            state, genuine = await joined.seat.starting_state()
            assert not genuine and state.digest != wanted
            assert (await joined.seat.download_theta_0()).digest == wanted
            hosted.stop()
            await training

    with short_folder() as folder:
        asyncio.run(go(folder))
