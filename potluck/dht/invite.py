"""The invite: `potluck:<run id>?peer=<multiaddr>&peer=...`. Whoever holds it can join.

It names the run by hash, so it needs no secrecy and no signature: a manifest that is not the run's is
refused, and the peers in it are only the first ones to ask.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final
from urllib.parse import quote, unquote

from potluck.dht.manifest import RunId, parse_run_id
from potluck.errors import ManifestError

MAX_PEERS: Final = 16
MAX_ADDRESS_CHARACTERS: Final = 256
MAX_INVITE_CHARACTERS: Final = 8192

_SCHEME: Final = "potluck:"
#: What chat programs and shells put around a pasted link.
_WRAPPING: Final = " \t\r\n\"'`<>()[]\u200b\u200e\u200f\u2028\ufeff\u00a0“”‘’«»"


@lru_cache(maxsize=8192)
def is_address(text: str) -> bool:
    """Whether an invite could name it."""
    try:
        _check_address(text)
    except ManifestError:
        return False
    return "/p2p-circuit" not in text


@dataclass(frozen=True, slots=True)
class Invite:
    """A run and addresses (`.../p2p/<peer id>`) of peers that may know it."""

    run_id: RunId
    peers: tuple[str, ...]

    def __post_init__(self) -> None:
        parse_run_id(self.run_id)
        if len(self.peers) > MAX_PEERS:
            raise ManifestError(f"the invite names {len(self.peers)} peers, allowed {MAX_PEERS}")
        for address in self.peers:
            _check_address(address)

    def __str__(self) -> str:
        peers = "&".join("peer=" + quote(address, safe="/:") for address in self.peers)
        return f"{_SCHEME}{self.run_id}?{peers}" if peers else f"{_SCHEME}{self.run_id}"

    @classmethod
    def parse(cls, text: str) -> Invite:
        """Raises ManifestError with one clear line for whatever is wrong."""
        if len(text) > MAX_INVITE_CHARACTERS:
            raise ManifestError(f"the invite has {len(text)} characters, allowed {MAX_INVITE_CHARACTERS}")
        # Mail and chat wrap long links: no part of an invite contains white space.
        text = "".join(text.strip(_WRAPPING).split())
        if text[: len(_SCHEME)].lower() != _SCHEME:
            raise ManifestError(f"an invite starts with {_SCHEME!r}; this one starts with {text[:20]!r}")
        run_id, _, query = text[len(_SCHEME) :].partition("?")
        peers: list[str] = []
        for field in filter(None, query.replace("&amp;", "&").split("&")):
            name, _, value = field.partition("=")
            if name != "peer":
                raise ManifestError(f"the invite holds {name[:20]!r}, allowed is only peer=ADDRESS: copy it again")
            peers.append(unquote(value))
        return cls(parse_run_id(run_id.removeprefix("//").rstrip("/")), tuple(dict.fromkeys(peers)))


def _check_address(address: str) -> None:
    """A multiaddr that ends in the peer's id, in the forms that our hosts dial.

    Checked by hand, not with a multiaddr library: those of hivemind and py-libp2p cost a second's import
    each.
    """
    if len(address) > MAX_ADDRESS_CHARACTERS:
        raise ManifestError(f"a peer's address has {len(address)} characters, allowed {MAX_ADDRESS_CHARACTERS}")
    shown = repr(address[:80])
    root, *parts = address.split("/")
    if root or not parts:
        raise ManifestError(f"the invite's peer {shown} is not a multiaddr: it should start with /ip4/ or /dns/")
    words = iter(parts)
    last = ""
    for last in words:
        if last in _BARE_WORDS:
            continue
        value = next(words, None)
        check = _VALUE_CHECKS.get(last)
        if check is None:
            raise ManifestError(f"the invite's peer {shown} is not a multiaddr: {last[:20]!r} is unknown")
        if value is None or not check(value):
            raise ManifestError(f"the invite's peer {shown} is not a multiaddr: bad value after /{last}/")
    if last != "p2p":
        raise ManifestError(f"the invite's peer {shown} does not end in /p2p/PEER-ID: copy the whole invite")


def _is_ip(version: int) -> Callable[[str], bool]:
    def check(text: str) -> bool:
        try:
            return ipaddress.ip_address(text).version == version
        except ValueError:
            return False

    return check


def _matches(pattern: str) -> Callable[[str], bool]:
    return lambda text: re.fullmatch(pattern, text) is not None


def _is_port(text: str) -> bool:
    return re.fullmatch(r"[0-9]{1,5}", text) is not None and int(text) < 65536


_is_name = _matches(r"[A-Za-z0-9_]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")
_BARE_WORDS: Final = frozenset({"quic", "quic-v1", "ws", "wss", "tls", "noise", "webtransport", "p2p-circuit"})
_VALUE_CHECKS: Final[dict[str, Callable[[str], bool]]] = {
    "ip4": _is_ip(4),
    "ip6": _is_ip(6),
    **dict.fromkeys(("dns", "dns4", "dns6", "dnsaddr"), _is_name),
    "tcp": _is_port,
    "udp": _is_port,
    "certhash": _matches(r"[A-Za-z0-9_-]{1,128}"),
    "p2p": _matches(r"12D3KooW[1-9A-HJ-NP-Za-km-z]{44}"),
}
