"""A network of namespaces as a diagram in code: public hosts, homes behind NATs, shaped and long lines.

    with Lab() as lab:
        hub = lab.host("hub")
        home = lab.home("home", nat="symmetric", down_mbit=20, up_mbit=5, delay_ms=40)
        subprocess.run([*home.enter, "ping", "-c", "1", hub.address])

        home: 192.168.1.10 --lan-- [ NAT ] --wan-- 11.0.2.1 [ internet ] 11.0.1.1 --wan-- 11.0.1.2 :hub

Every name is a namespace of its own; `internet` routes between them and has no way out of this machine. Addresses are
in 11.0.0.0/8, which libp2p takes for public ones. Rates are token buckets (`tc tbf`), NATs are nftables', delays are a
process that carries packets between two TUN devices (`delay.py`). TCP is controlled by cubic, as nearly all homes' is,
where this machine has it. Needs root.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

#: full-cone: everything that comes in goes to the home's peer. cone: who was written to may answer (port-restricted
#: filtering, one mapping for all). symmetric: another random port for every destination.
Nat = Literal["full-cone", "cone", "symmetric"]

TOOLS = ("ip", "tc", "nft")
_PREFIX = "potluck-"
_WAN, _LAN = "wan", "lan"
_CONGESTION = "cubic"
#: Of a line's bucket: a kernel's large packets (64 KiB) that fit in pass whole, and cost no CPU to be cut.
_BURST_SECONDS, _MIN_BURST_BYTES = 0.01, 32 << 10
_HOME_HOST = "192.168.1.10"
_RULES = """
table ip potluck {{
  chain out {{
    type nat hook postrouting priority 100
    oifname "wan" masquerade {random}
  }}
  chain in {{
    type nat hook prerouting priority -100
    {cone}
  }}
  chain through {{
    type filter hook forward priority 0; policy drop;
    ct state established,related accept
    iifname "lan" accept
    ct status dnat accept
  }}
  chain self {{
    type filter hook input priority 0; policy drop;
    ct state established,related accept
    iifname {{ "lan", "lo" }} accept
  }}
}}
"""


def missing() -> str | None:
    """What this machine lacks, or None."""
    lacking = [tool for tool in TOOLS if shutil.which(tool) is None]
    if lacking:
        return f"{', '.join(lacking)} not found (apt-get install iproute2 nftables)"
    if os.geteuid() != 0:
        return "not root"
    if not Path("/dev/net/tun").exists():
        return "no /dev/net/tun"
    tried = subprocess.run(["unshare", "--net", "nft", "add table ip potluck"], capture_output=True, text=True)
    return f"no namespaces or nftables: {tried.stderr.strip()}" if tried.returncode else None


@dataclass
class Site:
    """A host and the line to it. `namespace` is where its processes run, `edge` where its line ends (its NAT)."""

    name: str
    number: int
    namespace: str
    edge: str
    address: str
    down_mbit: float = 0.0
    up_mbit: float = 0.0
    uplinks: tuple[str, str] = field(default=("", ""))

    @property
    def enter(self) -> list[str]:
        """Begin a command with it to run it there."""
        return ["ip", "netns", "exec", self.namespace]


class Lab:
    """Use as a context manager: namespaces, processes and devices are gone afterwards."""

    def __init__(self) -> None:
        self.sites: dict[str, Site] = {}
        self._tag = f"{_PREFIX}{os.getpid()}-"
        self._internet = f"{self._tag}internet"
        self._namespaces: list[str] = []
        self._delays: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        _remove_leftovers()
        try:
            self._namespace("internet")
            _in(self._internet, "sysctl", "-qw", "net.ipv4.ip_forward=1")
            _nft(self._internet, "table ip count { chain pass { type filter hook forward priority 0; }; }")
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    # ---- the diagram ----------------------------------------------------------------------------------------

    def host(self, name: str, *, down_mbit: float = 0, up_mbit: float = 0, delay_ms: float = 0) -> Site:
        """A host with a public address. `delay_ms` is one way; 0 Mbit/s means no limit."""
        number, namespace = len(self.sites) + 1, self._namespace(name)
        site = Site(name, number, namespace, namespace, f"11.0.{number}.2", down_mbit, up_mbit)
        return self._connect(site, delay_ms)

    def home(self, name: str, *, nat: Nat, down_mbit: float = 0, up_mbit: float = 0, delay_ms: float = 0) -> Site:
        """A host behind a NAT of its own. Its `address` is the NAT's public one."""
        number, namespace = len(self.sites) + 1, self._namespace(name)
        edge = self._namespace(f"{name}-nat")
        site = Site(name, number, namespace, edge, f"11.0.{number}.2", down_mbit, up_mbit)
        _ip("link", "add", "eth", "netns", namespace, "type", "veth", "peer", "name", _LAN, "netns", edge)
        _configure(namespace, "eth", f"{_HOME_HOST}/24")
        _configure(edge, _LAN, "192.168.1.1/24")
        _route(namespace, "192.168.1.1")
        self._connect(site, delay_ms)
        _in(edge, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        cone = f'iifname "wan" dnat to {_HOME_HOST}' if nat == "full-cone" else ""
        _nft(edge, _RULES.format(random="fully-random" if nat == "symmetric" else "", cone=cone))
        return site

    # ---- what happens to it ---------------------------------------------------------------------------------

    def down(self, site: Site) -> None:
        """The line is dead. A NAT forgets what it had mapped."""
        _in(site.edge, "ip", "link", "set", _WAN, "down")

    def up(self, site: Site, *, new_address: bool = False) -> None:
        if new_address:
            old, last = site.address, int(site.address.rsplit(".", 1)[1])
            site.address = f"11.0.{site.number}.{last + 1}"
            _in(site.edge, "ip", "addr", "del", f"{old}/24", "dev", _WAN)
            _in(site.edge, "ip", "addr", "add", f"{site.address}/24", "dev", _WAN)
        _in(site.edge, "ip", "link", "set", _WAN, "up")
        _route(site.edge, f"11.0.{site.number}.1")

    # ---- what is seen ---------------------------------------------------------------------------------------

    def sent(self, site: Site) -> int:
        """Bytes that left a site over its line so far, headers included."""
        return _carried(site.edge, _WAN) if site.up_mbit else _statistics(site.edge, _WAN)["tx"]

    def received(self, site: Site) -> int:
        return _carried(self._internet, f"to{site.number}") if site.down_mbit else _statistics(site.edge, _WAN)["rx"]

    def count(self, one: Site, other: Site) -> None:
        """From now on `direct` knows what goes between two sites without a third."""
        for a, b in ((one, other), (other, one)):
            rule = f"ip saddr 11.0.{a.number}.0/24 ip daddr 11.0.{b.number}.0/24 counter"
            _in(self._internet, "nft", f"add rule ip count pass {rule}")

    def direct(self) -> int:
        """Bytes between the sites that `count` was told of."""
        out = _in(self._internet, "nft", "-j", "list", "table", "ip", "count")
        rules = [item["rule"] for item in json.loads(out)["nftables"] if "rule" in item]
        return sum(part["counter"]["bytes"] for rule in rules for part in rule["expr"] if "counter" in part)

    # ---- how it is made -------------------------------------------------------------------------------------

    def _namespace(self, name: str) -> str:
        namespace = f"{self._tag}{name}"
        _ip("netns", "add", namespace)
        self._namespaces.append(namespace)
        _in(namespace, "ip", "link", "set", "lo", "up")
        return namespace

    def _connect(self, site: Site, delay_ms: float) -> Site:
        """The line between a site and the internet."""
        far = f"to{site.number}"
        if delay_ms:
            self._delay(site, far, delay_ms)
        else:
            _ip("link", "add", _WAN, "netns", site.edge, "type", "veth", "peer", "name", far, "netns", self._internet)
        _configure(self._internet, far, f"11.0.{site.number}.1/24")
        _configure(site.edge, _WAN, f"{site.address}/24")
        _route(site.edge, f"11.0.{site.number}.1")
        for namespace, device, mbit in ((self._internet, far, site.down_mbit), (site.edge, _WAN, site.up_mbit)):
            if mbit:
                burst = max(_MIN_BURST_BYTES, int(_BURST_SECONDS * mbit * 1e6 / 8))
                shape = ("tbf", "rate", f"{mbit}mbit", "burst", str(burst), "latency", "200ms")
                _in(namespace, "tc", "qdisc", "add", "dev", device, "root", *shape)
        self.sites[site.name] = site
        return site

    def _delay(self, site: Site, far: str, delay_ms: float) -> None:
        line = subprocess.Popen(
            [
                sys.executable,
                str(Path(__file__).with_name("delay.py")),
                *(f"/run/netns/{site.edge}", _WAN),
                *(f"/run/netns/{self._internet}", far),
                str(delay_ms),
            ],
            stdout=subprocess.PIPE,
        )
        self._delays.append(line)
        assert line.stdout
        if line.stdout.readline() != b"ready\n":
            raise RuntimeError(f"the delay line of {site.name} did not start")

    def _remove(self) -> None:
        for line in self._delays:
            line.kill()
            line.wait()
            assert line.stdout
            line.stdout.close()
        for namespace in self._namespaces:
            subprocess.run(["ip", "netns", "del", namespace], check=False, capture_output=True)


def _remove_leftovers() -> None:
    """Namespaces of tests that were killed."""
    for name in _ip("netns", "list").split("\n"):
        tag = name.split(" ")[0]
        if tag.startswith(_PREFIX) and not Path(f"/proc/{tag.split('-')[1]}").exists():
            subprocess.run(["ip", "netns", "del", tag], check=False, capture_output=True)


def _configure(namespace: str, device: str, address: str) -> None:
    _in(namespace, "ip", "addr", "add", address, "dev", device)
    _in(namespace, "ip", "link", "set", device, "up")


def _route(namespace: str, gateway: str) -> None:
    known = Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split()
    control = ("congctl", _CONGESTION) if _CONGESTION in known else ()
    _in(namespace, "ip", "route", "replace", "default", "via", gateway, *control)


def _carried(namespace: str, device: str) -> int:
    """Bytes that passed a bucket. Of a large packet it counts every header that it has on a line; devices count one."""
    return int(json.loads(_in(namespace, "tc", "-s", "-j", "qdisc", "show", "dev", device))[0]["bytes"])


def _statistics(namespace: str, device: str) -> dict[str, int]:
    link = json.loads(_in(namespace, "ip", "-j", "-s", "link", "show", "dev", device))[0]["stats64"]
    return {way: int(link[way]["bytes"]) for way in ("tx", "rx")}


def _nft(namespace: str, rules: str) -> None:
    _run(["ip", "netns", "exec", namespace, "nft", "-f", "-"], rules)


def _in(namespace: str, *command: str) -> str:
    return _run(["ip", "netns", "exec", namespace, *command])


def _ip(*arguments: str) -> str:
    return _run(["ip", *arguments])


def _run(command: Sequence[str], text: str | None = None) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
