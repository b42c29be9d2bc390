"""What kind of NAT a machine is behind, from the addresses at which several peers see it. Pure.

Connections that leave from one local port get one outer address of a NAT that maps by endpoint (RFC 4787, section 4.1):
others can reach it there. A NAT that maps by destination, or takes any port ("symmetric"), gives each its own.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from potluck.net.line import Endpoint

#: RFC 6598: between a provider's NAT and those of its customers.
SHARED: Final = ipaddress.ip_network("100.64.0.0/10")

Mapping = Literal["none", "one", "many", "unknown"]


@dataclass(frozen=True)
class Sighting:
    """One peer's word. `observer`: that peer's own address. `local`: where the connection leaves this machine, None
    where that cannot be told."""

    observer: str
    seen: Endpoint
    local: Endpoint | None


@dataclass(frozen=True)
class NatKind:
    """`mapping`: none: no NAT; one: the same outer address for all peers; many: another for each. `nested`: there is a
    second NAT beyond the router's, such as a provider's own; where nothing shows one, there may be one all the same.
    `why` it is unknown."""

    mapping: Mapping
    nested: bool = False
    why: str = ""


def kind_of_nat(sightings: Sequence[Sighting], own: Collection[str], router: Collection[str] = ()) -> NatKind:
    """`own`: this machine's IP addresses; `router`: what the router calls its outer addresses (UPnP)."""
    outer = [one for one in sightings if _is_public(one.seen.ip)]
    outer = [one for one in outer if "." in one.seen.ip] or outer  # IPv6 has no NATs
    nested = _is_nested({one.seen.ip for one in outer}, own, router)
    if not outer:
        why = "no peer told at which address it sees this machine"
        return NatKind("unknown", nested, "only peers of this network told" if sightings else why)
    if all(one.seen.ip in own for one in outer):
        return NatKind("none", nested)
    by_port: dict[int, dict[str, Endpoint]] = {}
    for one in outer:
        if one.local is not None and _is_public(one.observer):
            by_port.setdefault(one.local.port, {})[one.observer] = one.seen
    most = max(by_port.values(), key=len, default={})
    if len(most) < 2:
        return NatKind("unknown", nested, "it takes two peers at two public addresses to tell")
    return NatKind("one" if len(set(most.values())) == 1 else "many", nested)


def _is_nested(seen: Collection[str], own: Collection[str], router: Collection[str]) -> bool:
    """The router's outer address is no public one, or not the one that others see."""
    if any(_is_shared(ip) for ip in (*router, *own)):
        return True
    return bool(seen) and any(ip not in seen and "." in ip for ip in router)


def _is_shared(ip: str) -> bool:
    try:
        address = ipaddress.ip_address(ip)
    except ValueError:
        return False
    return address.version == 4 and address in SHARED


def _is_public(ip: str) -> bool:
    try:
        return ipaddress.ip_address(ip).is_global
    except ValueError:
        return False
