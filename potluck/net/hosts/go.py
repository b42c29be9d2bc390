"""The Go host: the libp2p daemon `p2pd` of hivemind's wheel, launched, watched and restarted by us.

hivemind's own launcher leaves the daemon behind when its process is killed, keeps its control sockets in the
shared temporary folder, and hangs when the daemon dies. Here the daemon dies with its parent, its sockets
live in a directory of mode 0700, and when it dies its pending calls fail at once, it is started again on the
same port, every handler is registered again and earlier peers are dialled again; `hivemind.dht.DHTNode` on
this host does not notice. Spec of the control protocol: hivemind/proto/p2pd.proto.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import re
import signal
import socket
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import read_pbmsg_safe, write_pbmsg
from hivemind.proto import p2pd_pb2
from hivemind.utils.multiaddr import Multiaddr

from potluck.errors import DaemonError, NetworkError, PotluckError, UserError
from potluck.net.children import die_with
from potluck.net.host import PeerId, StreamHandler
from potluck.net.identity import Identity

log = logging.getLogger(__name__)

OnEvent = Callable[..., None]

#: `sun_path` has 108 bytes on Linux, one of them the final zero.
_SOCKET_PATH_BYTES = 107
_DAEMON_SOCKET = "p2pd.sock"
#: hivemind appends 11 random characters and ".sock" to this.
_CLIENT_SOCKET = "p2pclient-"
_PID_FILE = "p2pd.pid"
_LOCK_FILE = "lock"
_KILL_AFTER_SECONDS = 3.0
#: For questions that the daemon answers from its memory.
_CONTROL_SECONDS = 10.0
#: A daemon that lived shorter than this died quickly; after so many quick deaths in a row we give up.
_QUICK_DEATH_SECONDS = 30.0
_MAX_QUICK_DEATHS = 5
_REDIAL_SECONDS = 10.0
_REMEMBERED_PEERS = 64


def daemon_binary() -> Path:
    """The p2pd that hosts launch."""
    return Path(str(files("hivemind.hivemind_cli") / "p2pd"))


@dataclass(frozen=True)
class _Settings:
    listen: tuple[str, ...]
    announce: tuple[str, ...]
    trusted_relays: tuple[str, ...]
    relay: bool
    auto_relay: bool
    nat_port_map: bool
    pubsub: bool
    idle_timeout_seconds: float
    max_message_bytes: int
    startup_timeout_seconds: float


class GoHost:
    """A `potluck.net.host.Host` on a p2pd of its own. Make it with `await GoHost.start(...)`.

    `restarts` counts the daemon's restarts; `pid` is the current daemon's.
    """

    peer_id: Any

    def __init__(self, identity: Identity, run_dir: Path, settings: _Settings, on_event: OnEvent | None) -> None:
        self.identity = identity
        self.peer_id = PeerID.from_base58(identity.peer_id)
        self.restarts = 0
        self._run_dir = run_dir
        self._settings = settings
        self._on_event = on_event
        self._listen = settings.listen
        self._lock: int | None = None
        self._child: asyncio.subprocess.Process | None = None
        self._drain: asyncio.Task[None] | None = None
        self._log_tail: deque[str] = deque(maxlen=50)
        # The current attachment; pending while the daemon is being restarted, failed once we gave up.
        self._inner: asyncio.Future[P2P] = asyncio.get_running_loop().create_future()
        self._supervisor: asyncio.Task[None] | None = None
        self._redial: asyncio.Task[None] | None = None
        self._unary: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._streams: dict[str, tuple[StreamHandler, bool]] = {}
        self._known: OrderedDict[str, tuple[str, ...]] = OrderedDict()
        self._closed = False

    @classmethod
    async def start(
        cls,
        identity: Identity,
        run_dir: Path,
        *,
        listen: Sequence[str] = ("/ip4/127.0.0.1/tcp/0",),
        announce: Sequence[str] = (),
        relay: bool = True,
        auto_relay: bool = False,
        trusted_relays: Sequence[str] = (),
        nat_port_map: bool = False,
        pubsub: bool = True,
        idle_timeout_seconds: float = 30.0,
        max_message_bytes: int = 1 << 20,
        startup_timeout_seconds: float = 30.0,
        on_event: OnEvent | None = None,
        last_listen: Sequence[str] = (),
    ) -> GoHost:
        """Launch p2pd and attach to it.

        `run_dir` belongs to this host alone (it is locked): control sockets and the pid file. `listen` and
        `announce` are multiaddresses. `auto_relay` needs `trusted_relays`. `idle_timeout_seconds` is how long
        a p2pd outlives us where the kernel cannot end it with its parent. `last_listen`: what an earlier
        host's `listening` was, taken again where `listen` leaves the ports open and they are free, so that its
        addresses stay good. `on_event(name, **fields)` gets
        net.daemon.died, net.daemon.restarted and net.daemon.failed.
        Raises UserError (settings), NetworkError (a port in use), DaemonError (p2pd does not start).
        """
        if auto_relay and not trusted_relays:
            # p2pd would take the public IPFS network's bootstrap peers as its relays.
            raise UserError("auto_relay needs trusted_relays: addresses of peers that relay for this one")
        settings = _Settings(
            listen=tuple(listen),
            announce=tuple(announce),
            trusted_relays=tuple(trusted_relays),
            relay=relay,
            auto_relay=auto_relay,
            nat_port_map=nat_port_map,
            pubsub=pubsub,
            idle_timeout_seconds=idle_timeout_seconds,
            max_message_bytes=max_message_bytes,
            startup_timeout_seconds=startup_timeout_seconds,
        )
        run_dir = Path(os.path.abspath(run_dir))
        self = cls(identity, run_dir, settings, on_event)
        if _with_ports(listen, last_listen) == tuple(last_listen):
            self._listen = tuple(last_listen)
        try:
            self._prepare_run_dir()
            await self._launch()
        except BaseException:
            await self.shutdown()
            raise
        self._supervisor = asyncio.create_task(self._supervise(), name="GoHost.supervise")
        return self

    @property
    def pid(self) -> int | None:
        """The daemon's process id, or None while there is none."""
        child = self._child
        return child.pid if child is not None and child.returncode is None else None

    # --- Host: everything goes to the current attachment and is remembered for the next

    async def add_protobuf_handler(
        self,
        name: str,
        handler: Callable[..., Any],
        input_protobuf_type: Any,
        *,
        stream_input: bool = False,
        stream_output: bool = False,
        balanced: bool = False,
    ) -> None:
        inner = await self._attached()
        options = {"stream_input": stream_input, "stream_output": stream_output, "balanced": balanced}
        await inner.add_protobuf_handler(name, handler, input_protobuf_type, **options)
        self._unary[name] = ((handler, input_protobuf_type), options)

    async def remove_protobuf_handler(
        self, name: str, *, stream_input: bool = False, stream_output: bool = False
    ) -> None:
        self._unary.pop(name, None)
        inner = await self._attached()
        await inner.remove_protobuf_handler(name, stream_input=stream_input, stream_output=stream_output)

    async def call_protobuf_handler(self, peer_id: Any, name: str, input: Any, output_protobuf_type: Any) -> Any:
        inner = await self._attached()
        return await inner.call_protobuf_handler(peer_id, name, input, output_protobuf_type)

    async def iterate_protobuf_handler(
        self, peer_id: Any, name: str, input: Any, output_protobuf_type: Any
    ) -> AsyncIterator[Any]:
        inner = await self._attached()
        answers: AsyncIterator[Any] = await inner.iterate_protobuf_handler(peer_id, name, input, output_protobuf_type)
        return answers

    async def add_binary_stream_handler(self, name: str, handler: StreamHandler, balanced: bool = False) -> None:
        inner = await self._attached()
        await inner.add_binary_stream_handler(name, handler, balanced=balanced)
        self._streams[name] = (handler, balanced)

    async def call_binary_stream_handler(
        self, peer_id: Any, handler_name: str
    ) -> tuple[Any, asyncio.StreamReader, asyncio.StreamWriter]:
        await self._attached()
        open_stream = p2pd_pb2.StreamOpenRequest(peer=peer_id.to_bytes(), proto=[handler_name])
        request = p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_OPEN, streamOpen=open_stream)
        response, reader, writer = await self.control(request)
        return response.streamInfo, reader, writer

    async def get_visible_maddrs(self, latest: bool = False) -> Sequence[Any]:
        return await self._asked("addresses", lambda daemon: daemon.get_visible_maddrs(latest=latest))

    async def list_peers(self) -> Sequence[Any]:
        peers = await self._asked("peers", lambda daemon: daemon.list_peers())
        for peer in peers:
            self._remember(peer.peer_id.to_base58(), tuple(str(addr) for addr in peer.addrs))
        return peers

    @property
    def listening(self) -> Sequence[str]:
        """`listen`, with the ports that were taken."""
        return self._listen

    async def _asked(self, what: str, ask: Callable[[P2P], Awaitable[Sequence[Any]]]) -> Sequence[Any]:
        try:
            async with asyncio.timeout(_CONTROL_SECONDS):
                return await ask(await self._attached())
        except PotluckError:
            raise
        except Exception as error:  # hivemind's client has many: the daemon is gone or does not answer
            raise DaemonError(f"the libp2p daemon does not list its {what}: {error!r}") from error

    async def connect(self, maddr: str, timeout_seconds: float) -> PeerId:
        """Dial `.../p2p/<peer id>` (or `/p2p/<peer id>` alone, to be found through the libp2p DHT)."""
        try:
            Multiaddr(maddr)
            address, _, peer = maddr.rpartition("/p2p/")
            if not peer or "/" in peer:
                raise ValueError("it does not end in /p2p/<peer id>")
            remote = PeerID.from_base58(peer)
        except ValueError as error:
            raise NetworkError(f"cannot connect to {maddr!r}: not a peer's address: {error}") from error
        await self._connect(remote, (address,) if address else (), timeout_seconds)
        self._remember(peer, (address,) if address else ())
        return PeerId(remote.to_base58())

    async def shutdown(self) -> None:
        """End the daemon, remove its sockets. Idempotent."""
        self._closed = True
        for task in (self._supervisor, self._redial):
            if task is not None and task is not asyncio.current_task():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        await self._detach(DaemonError("the host is shut down"))
        if self._lock is not None:
            self._remove_sockets()
            (self._run_dir / _PID_FILE).unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    # --- the control connection

    async def _attached(self) -> P2P:
        """Waits while the daemon restarts, at most as long as a start may take."""
        if self._inner.done():
            return self._inner.result()
        try:
            async with asyncio.timeout(self._settings.startup_timeout_seconds):
                return await asyncio.shield(self._inner)
        except TimeoutError as error:
            raise DaemonError("the libp2p daemon died and has not come back yet") from error

    async def control(self, request: Any) -> tuple[Any, asyncio.StreamReader, asyncio.StreamWriter]:
        """One request on a control connection of its own, which stays open. Raises NetworkError."""
        try:
            reader, writer = await asyncio.open_unix_connection(self._run_dir / _DAEMON_SOCKET)
        except OSError as error:
            raise DaemonError(f"the libp2p daemon does not answer: {error}") from error
        try:
            await write_pbmsg(writer, request)
            response = p2pd_pb2.Response()
            await read_pbmsg_safe(reader, response)
            if response.type == p2pd_pb2.Response.ERROR:
                raise NetworkError(response.error.msg)
        except (OSError, EOFError) as error:
            writer.close()
            raise DaemonError("the libp2p daemon closed the connection") from error
        except BaseException:
            writer.close()
            raise
        return response, reader, writer

    async def _connect(self, peer: PeerID, addresses: Sequence[str], timeout_seconds: float) -> None:
        target = f"{'' if not addresses else addresses[0]}/p2p/{peer.to_base58()}"
        connect = p2pd_pb2.ConnectRequest(
            peer=peer.to_bytes(),
            addrs=[Multiaddr(address).to_bytes() for address in addresses],
            timeout=max(1, int(timeout_seconds)),
        )
        request = p2pd_pb2.Request(type=p2pd_pb2.Request.CONNECT, connect=connect)
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._attached()
                _, _, writer = await self.control(request)
        except TimeoutError as error:
            raise NetworkError(f"cannot connect to {target}: no answer in {timeout_seconds:g} s") from error
        except DaemonError:
            raise
        except NetworkError as error:
            raise NetworkError(f"cannot connect to {target}: {error}") from error
        writer.close()

    def _remember(self, peer: str, addresses: tuple[str, ...]) -> None:
        self._known[peer] = addresses
        self._known.move_to_end(peer)
        if len(self._known) > _REMEMBERED_PEERS:
            self._known.popitem(last=False)

    # --- the daemon's life

    def _prepare_run_dir(self) -> None:
        """Make the directory, lock it, and end what an earlier start left there."""
        longest = len(os.fsencode(self._run_dir / f"{_CLIENT_SOCKET}{'x' * 11}.sock"))
        if longest > _SOCKET_PATH_BYTES:
            raise UserError(
                f"the path {self._run_dir} is too long for a socket by {longest - _SOCKET_PATH_BYTES} bytes: "
                "choose a shorter one with --home"
            )
        try:
            self._run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._run_dir.chmod(0o700)
            lock = os.open(self._run_dir / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise UserError(f"cannot use {self._run_dir} ({error.strerror}): choose another --home") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise UserError(f"another peer runs in {self._run_dir}: stop it, or choose another --home") from error
        self._lock = lock
        self._end_leftover()
        self._remove_sockets()

    def _end_leftover(self) -> None:
        """Kill an earlier start's p2pd, if the recorded process is one and has our control socket."""
        try:
            pid = int((self._run_dir / _PID_FILE).read_text())
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError):
            return
        if os.path.basename(arguments[0]) == b"p2pd" and os.fsencode(self._listen_flag) in arguments:
            log.warning("net.daemon.leftover_killed pid=%d", pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _remove_sockets(self) -> None:
        for path in (self._run_dir / _DAEMON_SOCKET, *self._run_dir.glob(f"{_CLIENT_SOCKET}*.sock")):
            path.unlink(missing_ok=True)

    @property
    def _listen_flag(self) -> str:
        return f"-listen=/unix{self._run_dir / _DAEMON_SOCKET}"

    def _command(self, listen: Sequence[str]) -> list[str]:
        settings = self._settings
        flags: dict[str, Any] = {
            "id": self.identity.path,
            "hostAddrs": ",".join(listen),
            # Peers find each other's addresses by id through it.
            "dhtServer": 1,
            # Of both kinds of channel p2pd would take Noise, which costs it a quarter more time (decision 24).
            "tls": 1,
            "noise": 0,
            "autonat": 1,
            "connManager": 1,
            "relay": int(settings.relay),
            "autoRelay": int(settings.auto_relay),
            # Otherwise it looks for three minutes for a choice of relays before it takes the one that is there.
            "relayDiscovery": 0,
            "natPortMap": int(settings.nat_port_map),
            "pubsub": int(settings.pubsub),
            "idleTimeout": f"{settings.idle_timeout_seconds:g}s",
            "persistentConnMaxMsgSize": settings.max_message_bytes,
        }
        if settings.announce:
            flags["announceAddrs"] = ",".join(settings.announce)
            # Who says where it can be reached need not wait for others' word: it relays at once.
            flags["forceReachabilityPublic"] = 1
        if settings.trusted_relays:
            flags["trustedRelays"] = ",".join(settings.trusted_relays)
        return [str(daemon_binary()), self._listen_flag, *(f"-{name}={value}" for name, value in flags.items())]

    async def _launch(self) -> None:
        """Start p2pd and attach. The future `_inner` is resolved at the very end."""
        listen = self._listen
        if listen != self._settings.listen and _busy_port(listen) is not None:
            listen = self._settings.listen  # somebody took our ephemeral port meanwhile: take another
        if (busy := _busy_port(listen)) is not None:
            raise NetworkError(f"port {busy} is in use: stop what uses it, or listen on another with --listen")
        self._log_tail.clear()
        self._remove_sockets()
        parent = os.getpid()
        try:
            self._child = await asyncio.create_subprocess_exec(
                *self._command(listen),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env={**os.environ, "GOLOG_LOG_LEVEL": "error"},
                # Not in our process group: Ctrl-C in a terminal is for us, we end the daemon in order.
                start_new_session=True,
                preexec_fn=lambda: die_with(parent),
            )
        except OSError as error:
            raise DaemonError(f"cannot run the libp2p daemon of hivemind's wheel: {error}") from error
        try:
            (self._run_dir / _PID_FILE).write_text(str(self._child.pid))
        except OSError as error:
            raise UserError(f"cannot write {self._run_dir / _PID_FILE}: {error.strerror}; free some space") from None
        ready = asyncio.get_running_loop().create_future()
        self._drain = asyncio.create_task(self._read_output(self._child, ready))
        try:
            async with asyncio.timeout(self._settings.startup_timeout_seconds):
                await ready
                inner = await self._attach()
        except TimeoutError as error:
            seconds = self._settings.startup_timeout_seconds
            raise DaemonError(f"the libp2p daemon was not ready after {seconds:g} s{self._tail()}") from error
        self._listen = _with_ports(listen, [str(maddr) for maddr in inner._visible_maddrs])
        self._inner.set_result(inner)

    async def _attach(self) -> P2P:
        maddr = Multiaddr(f"/unix{self._run_dir / _DAEMON_SOCKET}")
        prefix = f"/unix{self._run_dir}/"
        attachment: Any = type("_Attachment", (P2P,), {"_UNIX_SOCKET_PREFIX": prefix})
        inner: P2P = await attachment.replicate(maddr)
        try:
            control = inner._client.control
            # The daemon hangs up on a longer message, and every pending call with it.
            control.persistent_conn_max_msg_size = self._settings.max_message_bytes
            control._pending_calls = _PendingCalls()
            control._handler_tasks = _HandlerTasks()
            for name, (arguments, options) in self._unary.items():
                await inner.add_protobuf_handler(name, *arguments, **options)
            for name, (handler, balanced) in self._streams.items():
                await inner.add_binary_stream_handler(name, handler, balanced=balanced)
        except BaseException:
            await _close(inner)
            raise
        return inner

    async def _read_output(self, child: asyncio.subprocess.Process, ready: asyncio.Future[None]) -> None:
        assert child.stdout is not None
        while True:
            try:
                line = await child.stdout.readline()
            except ValueError:  # a line beyond the reader's limit, which it has dropped
                continue
            if not line:
                break
            text = line.decode(errors="replace").rstrip()
            self._log_tail.append(text[:1000])
            log.debug("net.daemon.output %s", text)
            if text.startswith("Peer ID:") and not ready.done():
                ready.set_result(None)
        if not ready.done():
            ready.set_exception(DaemonError(f"the libp2p daemon did not start{self._tail()}"))

    def _tail(self) -> str:
        return "".join(f"\n  p2pd: {line}" for line in self._log_tail)

    async def _supervise(self) -> None:
        """Wait for the daemon's death; bring it back; give up when it keeps dying."""
        loop = asyncio.get_running_loop()
        quick_deaths = 0
        while True:
            started_at = loop.time()
            await self._wait_for_death()
            quick_deaths = quick_deaths + 1 if loop.time() - started_at < _QUICK_DEATH_SECONDS else 0
            child = self._child
            await self._detach(DaemonError("the libp2p daemon died during the call"))
            self._inner = loop.create_future()
            code = child.returncode if child is not None else None
            self._emit("net.daemon.died", exit_code=code, output="\n".join(self._log_tail))
            while True:
                if quick_deaths >= _MAX_QUICK_DEATHS:
                    failure = DaemonError(f"the libp2p daemon died {quick_deaths} times in a row{self._tail()}")
                    self._inner.set_exception(failure)
                    self._inner.exception()  # not "never retrieved" if nobody calls
                    self._emit("net.daemon.failed", error=str(failure))
                    return
                await asyncio.sleep(0.1 * 2**quick_deaths)
                try:
                    await self._launch()
                    break
                except Exception as error:  # whatever it was, this task is what brings the daemon back
                    quick_deaths += 1
                    log.warning("net.daemon.restart_failed error=%s", error)
                    await self._end_child()
            self.restarts += 1
            self._emit("net.daemon.restarted", pid=self.pid, restarts=self.restarts)
            self._redial = asyncio.create_task(self._dial_known())

    async def _wait_for_death(self) -> None:
        """The process ended, or hivemind's reader of its connection did: without it all calls hang."""
        assert self._child is not None
        reader = self._inner.result()._client.control._read_task
        exit_ = asyncio.ensure_future(self._child.wait())
        try:
            await asyncio.wait({exit_, reader}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            exit_.cancel()

    async def _dial_known(self) -> None:
        async def dial(peer: str, addresses: tuple[str, ...]) -> None:
            with contextlib.suppress(NetworkError, ValueError):
                await self._connect(PeerID.from_base58(peer), addresses, _REDIAL_SECONDS)

        await asyncio.gather(*(dial(peer, addresses) for peer, addresses in list(self._known.items())))

    async def _detach(self, reason: DaemonError) -> None:
        """End the attachment and the process; pending unary calls fail with `reason`."""
        if self._redial is not None:
            self._redial.cancel()
        if self._inner.done() and self._inner.exception() is None:
            inner = self._inner.result()
            for call in inner._client.control._pending_calls.values():
                if not call.done():
                    call.set_exception(reason)
            await _close(inner)
        if self._closed:
            if self._inner.done():
                self._inner = asyncio.get_running_loop().create_future()
            self._inner.set_exception(reason)
            self._inner.exception()  # not "never retrieved" if nobody calls
        await self._end_child()

    async def _end_child(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            if child.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    child.terminate()
                try:
                    async with asyncio.timeout(_KILL_AFTER_SECONDS):
                        await child.wait()
                except TimeoutError:
                    with contextlib.suppress(ProcessLookupError):
                        child.kill()
            await child.wait()
        if self._drain is not None:
            await self._drain
            self._drain = None

    def _emit(self, name: str, **fields: Any) -> None:
        log.warning("%s %s", name, " ".join(f"{key}={value}" for key, value in fields.items()))
        if self._on_event is not None:
            self._on_event(name, **fields)


class _PendingCalls(dict[Any, "asyncio.Future[Any]"]):
    """hivemind resolves calls that were cancelled a moment ago; its reader dies of the InvalidStateError."""

    def __contains__(self, call_id: object) -> bool:
        call = self.get(call_id)
        return call is not None and not call.done()


class _HandlerTasks(dict[Any, "asyncio.Task[Any]"]):
    """hivemind forgets to remove handlers that were cancelled."""

    def __setitem__(self, call_id: Any, task: asyncio.Task[Any]) -> None:
        super().__setitem__(call_id, task)
        task.add_done_callback(lambda _: self.pop(call_id, None))


async def _close(inner: P2P) -> None:
    control = inner._client.control
    tasks = [task for task in (control._read_task, control._write_task, inner._listen_task) if task is not None]
    await inner.shutdown()
    await asyncio.gather(*tasks, return_exceptions=True)


_ADDRESS = re.compile(r"^/ip([46])/([^/]+)/(tcp|udp)/(\d+)")


def _busy_port(listen: Sequence[str]) -> int | None:
    """The first fixed port that is taken.

    p2pd must not find out: it sets SO_REUSEPORT, so two of them share a port and each gets half the calls.
    """
    for maddr in listen:
        if (match := _ADDRESS.match(maddr)) is None or match[4] == "0":
            continue
        family = socket.AF_INET if match[1] == "4" else socket.AF_INET6
        kind = socket.SOCK_STREAM if match[3] == "tcp" else socket.SOCK_DGRAM
        with socket.socket(family, kind) as probe:
            if match[3] == "tcp":  # past connections in TIME_WAIT do not matter, a listener does
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                probe.bind((match[2], int(match[4])))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    return int(match[4])
                # Anything else (no such interface, no permission) p2pd reports by itself.
    return None


def _with_ports(listen: Sequence[str], visible: Sequence[str]) -> tuple[str, ...]:
    """`listen` with each port 0 replaced by the port that p2pd got, so that addresses outlive a restart."""

    def fixed(maddr: str) -> str:
        wanted = _ADDRESS.match(maddr)
        if wanted is None or wanted[4] != "0":
            return maddr
        for address in visible:
            got = _ADDRESS.match(address)
            if got is not None and got[1] == wanted[1] and got[3] == wanted[3]:
                return f"{maddr[: wanted.start(4)]}{got[4]}{maddr[wanted.end(4) :]}"
        return maddr

    return tuple(fixed(maddr) for maddr in listen)
