from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.dht.invite import Invite
from potluck.errors import ManifestError

from dht_world import RUN, identity

PEER = identity(0).peer_id
ADDRESS = f"/ip4/127.0.0.1/tcp/4001/p2p/{PEER}"
GOOD = f"potluck:{RUN}?peer={ADDRESS}"

hosts = st.one_of(
    st.ip_addresses(v=4).map(lambda ip: f"/ip4/{ip}"),
    st.ip_addresses(v=6).map(lambda ip: f"/ip6/{ip}"),
    st.just("/dns4/example.org"),
)
addresses = st.builds(
    lambda host, port, end: f"{host}{port}{end}",
    hosts,
    st.integers(0, 65535).flatmap(lambda port: st.sampled_from([f"/tcp/{port}", f"/udp/{port}/quic-v1"])),
    st.sampled_from([f"/p2p/{PEER}", f"/p2p/{identity(1).peer_id}/p2p-circuit/p2p/{PEER}"]),
)


@given(st.lists(addresses, max_size=16, unique=True))
def test_an_invite_reads_back(peers) -> None:
    invite = Invite(RUN, tuple(peers))
    assert Invite.parse(str(invite)) == invite


@pytest.mark.parametrize(
    "pasted",
    [f" {GOOD}\n", f'"{GOOD}"', f"<{GOOD}>", f"`{GOOD}`", f"“{GOOD}”", GOOD[:70] + "\n  " + GOOD[70:],
     GOOD.replace("potluck:", "Potluck:"), GOOD.replace("potluck:", "potluck://"),
     GOOD.replace("/", "%2F")],
)  # fmt: skip
def test_what_chat_programs_do_to_an_invite_is_undone(pasted) -> None:
    assert Invite.parse(pasted) == Invite(RUN, (ADDRESS,))


def test_slashes_stay_readable() -> None:
    assert str(Invite(RUN, (ADDRESS,))) == GOOD


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "starts with"),
        ("https://example.org", "starts with"),
        ("potluck:" + "a" * 51, "52 characters"),
        ("potluck:" + "0" * 52, "52 characters"),
        (f"potluck:{RUN}?peer=hello", "not a multiaddr"),
        (f"potluck:{RUN}?peer=/ip4/300.0.0.1/tcp/1/p2p/{PEER}", "bad value after /ip4/"),
        (f"potluck:{RUN}?peer=/ip4/127.0.0.1/tcp/99999/p2p/{PEER}", "bad value after /tcp/"),
        (f"potluck:{RUN}?peer=/ip4/127.0.0.1/tcp/1", "does not end in /p2p/"),
        (f"potluck:{RUN}?peer=/ip4/127.0.0.1/tcp/1/p2p/{PEER[:-3]}", "bad value after /p2p/"),
        (f"potluck:{RUN}?peer=/ip4/127.0.0.1/tcp/1/p2p/{PEER}/tcp", "bad value after /tcp/"),
        (f"potluck:{RUN}?peer=/shell/rm/p2p/{PEER}", "'shell' is unknown"),
        (f"potluck:{RUN}?pier={ADDRESS}", "'pier'"),
        (f"potluck:{RUN}?peer=/{'a' * 300}", "300|301"),
        ("potluck:" + "a" * 9000, "9008 characters"),
    ],
)
def test_each_corruption_gets_its_own_line(text, expected) -> None:
    with pytest.raises(ManifestError, match=expected) as caught:
        Invite.parse(text)
    assert "\n" not in str(caught.value)


def test_too_many_peers_are_refused() -> None:
    peers = "&".join(f"peer=/ip4/10.0.0.1/tcp/{port}/p2p/{PEER}" for port in range(17))
    with pytest.raises(ManifestError, match="17 peers, allowed 16"):
        Invite.parse(f"potluck:{RUN}?{peers}")


@given(st.data())
def test_mutated_text_raises_nothing_but_manifest_errors(data) -> None:
    position = data.draw(st.integers(0, len(GOOD) - 1))
    text = GOOD[:position] + data.draw(st.text(max_size=5)) + GOOD[position + 1 :]
    try:
        Invite.parse(text)
    except ManifestError:
        pass
