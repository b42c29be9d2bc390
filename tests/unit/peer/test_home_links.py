"""A home's account: taken in, accepted, revoked, rotated; and nothing is lost wherever that is interrupted."""

from __future__ import annotations

import asyncio
import fcntl
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from potluck.dht.records import MAX_LINKS, Links, Record
from potluck.errors import IdentityError, NetworkError, StateError, UserError
from potluck.net.host import PeerId
from potluck.net.identity import Identity
from potluck.net.links import End, Link
from potluck.peer import links
from potluck.peer.home import Home
from potluck.peer.links import LinkNotes, accept, check_rotatable, end, next_key_path, offer, rotate, show_links

NOW = 1_700_000_000.0


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home").open()


@pytest.fixture
def laptop(tmp_path: Path) -> Home:
    return Home(tmp_path / "laptop").open()


def joined(home: Home, laptop: Home, now: float = NOW) -> Link:
    """The laptop counts for the home."""
    made, new = accept(laptop, laptop.identity(), offer(home, home.identity(), laptop.identity().peer_id, now))
    assert isinstance(made, Link) and new
    return made


def account_of(home: Home) -> str:
    return LinkNotes.load(home).book.account_of(home.identity().peer_id)


def test_a_machine_counts_for_the_account_that_took_it_in(home: Home, laptop: Home) -> None:
    made = joined(home, laptop)
    made.check()
    assert account_of(laptop) == home.identity().peer_id and account_of(home) == home.identity().peer_id
    assert [one.peer for one in LinkNotes.load(home).open_offers()] == [laptop.identity().peer_id]
    assert LinkNotes.load(laptop).shown(laptop.identity().peer_id) == [made]


def test_to_accept_again_is_safe_and_another_account_must_let_go_first(
    tmp_path: Path, home: Home, laptop: Home
) -> None:
    made = offer(home, home.identity(), laptop.identity().peer_id, NOW)
    link, new = accept(laptop, laptop.identity(), made)
    assert new and accept(laptop, laptop.identity(), made) == (link, False)
    other = Home(tmp_path / "other").open()
    elsewhere = offer(other, other.identity(), laptop.identity().peer_id, NOW + 5)
    with pytest.raises(IdentityError, match="potluck identity revoke"):
        accept(laptop, laptop.identity(), elsewhere)
    ended, known = end(home, home.identity(), laptop.identity().peer_id, NOW + 1)
    assert known
    accept(laptop, laptop.identity(), ended)
    accept(laptop, laptop.identity(), elsewhere)
    assert account_of(laptop) == other.identity().peer_id
    assert LinkNotes.load(home).open_offers() == []


def test_what_is_said_later_is_newer_whatever_the_clock_says(home: Home, laptop: Home) -> None:
    link = joined(home, laptop, NOW)
    ended, _ = end(home, home.identity(), laptop.identity().peer_id, NOW - 1e6)
    again = joined(home, laptop, NOW - 2e6)  # where nobody heard of the end
    assert link.made_at < ended.made_at < again.made_at
    accept(laptop, laptop.identity(), ended)
    assert LinkNotes.load(laptop).book.link_of(laptop.identity().peer_id) == again


def test_what_ends_nothing_is_said(home: Home, laptop: Home) -> None:
    peer = home.identity().peer_id
    with pytest.raises(IdentityError, match="own key"):
        end(home, home.identity(), peer, NOW)
    with pytest.raises(IdentityError, match="not a"):
        end(home, home.identity(), PeerId("12D3KooWnobody"), NOW)
    _, known = end(home, home.identity(), laptop.identity().peer_id, NOW)
    assert not known
    rotate(home, home.identity(), NOW)
    with pytest.raises(IdentityError, match="had before"):
        end(home, home.identity(), peer, NOW)


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"links": [{"statement": "gift"}]}', b"x" * (2**20 + 1)])
def test_damaged_notes_are_named_and_not_overwritten(content: bytes, home: Home, laptop: Home) -> None:
    (home.path / "links.json").write_bytes(content)
    with pytest.raises(StateError, match="cannot be used"):
        offer(home, home.identity(), laptop.identity().peer_id, NOW)
    assert (home.path / "links.json").read_bytes() == content


# ---- rotation -----------------------------------------------------------------------------------------------


def test_a_rotated_home_has_a_new_key_that_the_old_one_counts_for(home: Home, laptop: Home) -> None:
    joined(home, laptop)
    old = home.identity()
    new, link = rotate(home, old, NOW)
    assert home.identity().peer_id == new.peer_id != old.peer_id and new.path == home.key_path
    kept = Identity.load(links.retired_path(home, old.peer_id))
    assert kept.seed == old.seed and stat.S_IMODE(kept.path.stat().st_mode) == 0o600
    assert (link.peer, link.account) == (old.peer_id, new.peer_id) and not next_key_path(home).exists()
    assert LinkNotes.load(home).shown(new.peer_id) == [link]
    newer, _ = rotate(home, new, NOW)  # in the same second
    assert LinkNotes.load(home).book.account_of(old.peer_id) == newer.peer_id
    # the machine learns it from the line, and the new key ends what the first one began
    for one in LinkNotes.load(home).links:
        accept(laptop, laptop.identity(), one)
    assert account_of(laptop) == newer.peer_id
    ended, known = end(home, newer, laptop.identity().peer_id, NOW)
    accept(laptop, laptop.identity(), ended)
    assert known and account_of(laptop) == laptop.identity().peer_id


class Crash(BaseException):
    pass


def interrupted(home: Home, when: int) -> bool:
    """A rotation whose process dies before its `when`th change to the disk; False if there are fewer."""
    steps = iter(range(1000))

    def dying(real: Any) -> Any:
        def step(*arguments: Any, **named: Any) -> Any:
            if next(steps) >= when:
                raise Crash
            return real(*arguments, **named)

        return step

    with pytest.MonkeyPatch.context() as patch:
        for name in ("link", "fsync", "replace", "rename", "unlink", "mkdir"):
            patch.setattr(os, name, dying(getattr(os, name)))
        try:
            rotate(home, Identity.load(home.key_path), NOW)
        except Crash:
            return True
    return False


def test_a_rotation_loses_nothing_wherever_it_is_interrupted(tmp_path: Path) -> None:
    for when in range(100):
        home = Home(tmp_path / str(when)).open()
        old = home.identity()
        if not interrupted(home, when):
            break
        here, account = Identity.load(home.key_path), account_of_key(home, old)
        if here.peer_id != old.peer_id:  # it was done, but for what comes behind it
            assert Identity.load(links.retired_path(home, old.peer_id)).seed == old.seed and account == here.peer_id
            continue
        if account != old.peer_id:  # others may know of the new key already
            assert Identity.load(next_key_path(home)).peer_id == account
        check_rotatable(home, here)
        new, link = rotate(home, here, NOW + 9)
        assert home.identity().peer_id == link.account == new.peer_id == account_of_key(home, old)
        assert account in (old.peer_id, new.peer_id)
        assert Identity.load(links.retired_path(home, old.peer_id)).seed == old.seed
    assert 8 <= when < 99, "the interruptions did not hit"


def account_of_key(home: Home, key: Identity) -> str:
    return LinkNotes.load(home).book.account_of(key.peer_id)


def test_nothing_is_rotated_under_a_running_peer_nor_the_key_of_a_machine_of_an_account(
    home: Home, laptop: Home
) -> None:
    with (home.path / "daemon.lock").open("w") as lock:
        home.identity()
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is running"):
            check_rotatable(home, home.identity())
    check_rotatable(home, home.identity())
    joined(home, laptop)
    with pytest.raises(IdentityError, match=f"counts for account {home.identity().peer_id}"):
        check_rotatable(laptop, laptop.identity())


# ---- in a run -----------------------------------------------------------------------------------------------


class Board:
    """A directory that remembers what was published."""

    def __init__(self) -> None:
        self.published: list[tuple[Record, float]] = []
        self.broken = 0

    async def publish(self, record: Record, expires_at: float, timeout_seconds: float) -> bool:
        if self.broken:
            self.broken -= 1
            raise NetworkError("nobody there")
        self.published.append((record, expires_at))
        return True


def test_what_a_home_keeps_is_shown_and_what_it_takes_in_meanwhile_too(home: Home, laptop: Home) -> None:
    board, said = Board(), list[str]()
    board.broken = 1
    peer = laptop.identity().peer_id

    async def go() -> None:
        emit = lambda name, **fields: said.append(name)  # noqa: E731
        showing = asyncio.create_task(show_links(laptop, board, peer, 0.001, lambda: NOW, emit))
        try:
            await asyncio.sleep(0.01)
            assert board.published == [] and not showing.done()
            link = joined(home, laptop)
            while not board.published:
                await asyncio.sleep(0.001)
            assert board.published[0] == (Links(peer=peer, links=[link]), NOW + 0.004)
            assert said == ["peer.links.failed"]
            (laptop.path / "links.json").write_text("{")
            while len(said) < 2:
                await asyncio.sleep(0.001)
        finally:
            showing.cancel()
            await asyncio.gather(showing, return_exceptions=True)

    asyncio.run(go())


def test_a_record_has_the_peers_own_statements_and_the_newest_of_the_others(home: Home, laptop: Home) -> None:
    own, notes = joined(home, laptop), LinkNotes()
    strangers: list[Link | End] = []
    for number in range(MAX_LINKS + 2):
        other = Home(home.path / str(number)).open()
        strangers.append(joined(home, other, NOW + 1 + number))
    notes.links = [own, *strangers]
    assert notes.shown(laptop.identity().peer_id) == [own, *strangers[:-MAX_LINKS:-1]]


def test_an_account_costs_a_command_neither_torch_nor_hivemind(home: Home) -> None:
    import subprocess

    code = "import sys, potluck.peer.links; sys.exit(any(name in sys.modules for name in ('torch', 'hivemind')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
