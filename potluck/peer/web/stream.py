"""Live events: one poller for all viewers, each event encoded once; a slow viewer skips to the newest state.

Server-sent events after the HTML standard, section 9.2. An event holds a run's whole state, so that nothing is lost by
skipping: what a viewer keeps besides is asked for by round (`RunState.latest`).
"""

from __future__ import annotations

import asyncio
import logging
import time
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Final, NamedTuple, TypeVar

from potluck.dht.manifest import RunId
from potluck.errors import PotluckError
from potluck.peer.home import RunFolder
from potluck.peer.web.watch import Watch

POLL_SECONDS: Final = 0.2
#: Two events of one run are so far apart at least, the more viewers the farther: all of them together get so many a
#: second. And so far at most, while somebody looks: who is silent goes away.
APART_SECONDS: Final = 0.4
VIEWERS_PER_SECOND: Final = 1700
AGAIN_SECONDS: Final = 10.0
#: A comment in between: proxies close what is silent, and who is gone is noticed.
HEARTBEAT_SECONDS: Final = 15.0
RUNS_SECONDS: Final = 3.0
#: So many viewers from one place (`place_of`), that nobody takes the room of all.
VIEWERS_OF_PLACE: Final = 200

log = logging.getLogger(__name__)
T = TypeVar("T")


class Event(NamedTuple):
    """What is sent to each viewer, as it is and compressed. `packed` refers to nothing before it: behind `GZIP`, any
    viewer's events make up one stream after RFC 1952, which has no end."""

    plain: bytes
    packed: bytes

    @classmethod
    def of(cls, data: bytes) -> Event:
        packer = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
        return cls(data, packer.compress(data) + packer.flush(zlib.Z_SYNC_FLUSH))


GZIP: Final = bytes.fromhex("1f8b08000000000000ff")
#: A browser that lost its stream comes again after about so long (milliseconds).
RETRY: Final = Event.of(b"retry: 3000\n\n")
BEAT: Final = Event.of(b": here\n\n")


class Full(Exception):
    """As many viewers as there may be; says which limit it is."""


def place_of(address: str) -> str | None:
    """Who is counted together: an IPv4 address, or the /64 of an IPv6 one, of which each household has all. None is not
    counted: loopback, where a reverse proxy asks for everybody."""
    try:
        ip = ip_address(address.partition("%")[0])
    except ValueError:
        return None  # no network's: a Unix socket, or a test
    if ip.version == 6:
        ip = ip.ipv4_mapped or ip
    if ip.is_loopback:
        return None
    return str(ip) if ip.version == 4 else f"{int(ip) >> 64:x}/64"


@dataclass(eq=False)
class Viewer:
    """Has room for one event: the newest that it was not sent yet."""

    _event: Event | None = None
    _woken: asyncio.Event = field(default_factory=asyncio.Event)
    _closed: bool = False

    def offer(self, event: Event) -> None:
        self._event = event
        self._woken.set()

    def close(self) -> None:
        self._closed = True
        self._woken.set()

    async def events(self) -> AsyncIterator[Event]:
        yield RETRY
        while not self._closed:
            try:
                async with asyncio.timeout(HEARTBEAT_SECONDS):
                    await self._woken.wait()
            except TimeoutError:
                yield BEAT
                continue
            self._woken.clear()
            event, self._event = self._event, None
            if event is not None:
                yield event


@dataclass(eq=False)
class Channel:
    """One run's viewers, and the event that they saw last."""

    watch: Watch
    viewers: set[Viewer] = field(default_factory=set)
    event: Event | None = None
    number: int = 0
    sent: float = 0.0
    dirty: bool = True


class Hub:
    """All runs and all viewers. `run` polls until cancelled; `close` ends every stream.

    Its looks at files have a thread of their own: nothing that is asked besides holds live events up.
    """

    def __init__(
        self,
        runs: Callable[[], Sequence[RunFolder]],
        *,
        invite_of: Callable[[RunId], str | None] = lambda run: None,
        max_viewers: int = 1500,
    ) -> None:
        self._runs, self._invite_of, self._max_viewers = runs, invite_of, max_viewers
        self._channels: dict[str, Channel] = {}
        self._listed = -RUNS_SECONDS
        self._places: Counter[str] = Counter()
        self._thread = ThreadPoolExecutor(1, "potluck-live")
        self._failed: set[tuple[str, type[Exception]]] = set()
        self._closed = False
        self.events_sent = 0

    @property
    def watches(self) -> list[Watch]:
        return [channel.watch for channel in self._channels.values()]

    @property
    def viewers(self) -> int:
        return sum(len(channel.viewers) for channel in self._channels.values())

    def watch(self, run: str) -> Watch | None:
        channel = self._channels.get(run)
        return channel.watch if channel else None

    async def run(self) -> None:
        try:
            while True:
                await self.poll(time.monotonic())
                await asyncio.sleep(POLL_SECONDS)
        finally:
            self.close()
            for watch in self.watches:
                watch.close()
            self._thread.shutdown(wait=False)

    async def poll(self, now: float) -> None:
        """One look at everything. Where it fails (no file can be opened any more, say), the next look tries again."""
        if now - self._listed >= RUNS_SECONDS:
            self._listed = now
            with self._going_on("the list of runs"):
                await self._list()
        for channel in list(self._channels.values()):
            with self._going_on(channel.watch.about.run):
                await self._look(channel, now)

    async def _look(self, channel: Channel, now: float) -> None:
        channel.dirty |= await self._in_thread(channel.watch.look)
        since = now - channel.sent
        apart = max(APART_SECONDS, len(channel.viewers) / VIEWERS_PER_SECOND)
        due = since >= AGAIN_SECONDS or (channel.dirty and since >= apart)
        if channel.viewers and due:
            await self._send(channel, now)

    async def _send(self, channel: Channel, now: float) -> None:
        channel.dirty, channel.sent = False, now
        live = await self._in_thread(channel.watch.live)
        if live is None:
            return
        channel.number += 1
        channel.event = Event.of(b"id: %d\nevent: state\ndata: %b\n\n" % (channel.number, live.encoded.plain))
        for viewer in channel.viewers:
            viewer.offer(channel.event)
        self.events_sent += len(channel.viewers)

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    @contextmanager
    def _going_on(self, what: str) -> Iterator[None]:
        """A look's boundary: live events of all viewers hang on the poller, and whatever it meets must not end it. Each
        kind of failure is logged once."""
        try:
            yield
        except Exception as error:
            if (what, type(error)) not in self._failed:
                self._failed.add((what, type(error)))
                log.exception("no live events of %s for now", what)

    async def _list(self) -> None:
        """New runs; those that are gone end their viewers' streams."""
        known = set(self._channels)
        there, found = await self._in_thread(lambda: self._find(known))
        for run in known - there:
            channel = self._channels.pop(run)
            for viewer in channel.viewers:
                viewer.close()
            channel.watch.close()
        for watch in found:
            self._channels[watch.about.run] = Channel(watch)

    def _find(self, known: set[str]) -> tuple[set[str], list[Watch]]:
        there, found = set(), []
        for folder in self._runs():
            there.add(str(folder.run_id))
            if folder.run_id not in known:
                with suppress(PotluckError):  # a damaged manifest concerns the run alone
                    if signed := folder.manifest():
                        found.append(Watch(folder, signed.manifest, self._invite_of(folder.run_id)))
        return there, found

    @asynccontextmanager
    async def viewing(self, run: str, address: str = "") -> AsyncIterator[Viewer]:
        """`address`: where the viewer comes from. Raises Full, and KeyError for no such run."""
        place = place_of(address)
        if self._closed or self.viewers >= self._max_viewers:
            raise Full("as many viewers as there may be: try again later")
        if place and self._places[place] >= VIEWERS_OF_PLACE:
            raise Full("as many viewers as there may be from one address: try again later")
        channel, viewer = self._channels[run], Viewer()
        first = not channel.viewers
        channel.viewers.add(viewer)
        if place:
            self._places[place] += 1
        try:
            if first:
                with self._going_on(run):
                    await self._send(channel, time.monotonic())
            elif channel.event is not None:  # else it comes with the first one's
                viewer.offer(channel.event)
            yield viewer
        finally:
            channel.viewers.discard(viewer)
            if not channel.viewers:
                channel.event = None
            if place:
                self._places[place] -= 1
                if not self._places[place]:
                    del self._places[place]

    def close(self) -> None:
        self._closed = True
        for channel in self._channels.values():
            for viewer in channel.viewers:
                viewer.close()
