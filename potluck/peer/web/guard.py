"""Who may ask, and how: checked before any of the application runs.

- The Host must be ours: else another name for 127.0.0.1 (DNS rebinding) would make any web site a local one. A public
  page is also answered under any bare IP address: no name that somebody could bind again stands behind one, and whoever
  reaches the page may read all of it.
- An Origin, where a browser sends one, must be the page's own.
- On a daemon's page everything but static files needs its token: as `Authorization: Bearer`, or as the cookie that
  `/?token=...` sets. It keeps out other users of the machine, who can reach loopback too.
- Changes are POSTs of JSON, from the page itself where a cookie vouches for them.
- Bodies are bounded, read before the application is asked, and paths are plain.
- Every answer says that it is not to be framed, sniffed, or mixed with anything from elsewhere.
"""

from __future__ import annotations

import asyncio
import hmac
import re
from collections.abc import Collection
from http.cookies import CookieError, SimpleCookie
from ipaddress import ip_address
from typing import Final
from urllib.parse import parse_qsl

import msgspec
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES: Final = 64 * 1024
MAX_PATH_CHARACTERS: Final = 1024
BODY_SECONDS: Final = 10.0
LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "[::1]"})
STATIC: Final = "/static/"

#: Nothing is loaded from elsewhere, no script stands in a page. Plotly's script makes style elements: these are let.
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; style-src-elem 'self' 'unsafe-inline'; "
    "style-src-attr 'none'; img-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)
_HEADERS: Final = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=(), payment=(), usb=()"),
)
_HOST: Final = re.compile(r"(?P<name>\[[0-9a-f:]+\]|[a-z0-9.-]+)(:(?P<port>\d{1,5}))?")
#: No escapes: no id of ours needs one. No empty parts, no dots alone, no backslashes.
_PATH: Final = re.compile(r"/|(/(?!\.{1,2}(/|$))[A-Za-z0-9._~:@+-]+)+/?")


class Refused(Exception):
    def __init__(self, status: int, detail: str, **headers: str) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers


class Guard:
    """ASGI middleware. `token` None: everybody may read, nobody change. `hosts`: public names, on any port."""

    def __init__(self, app: ASGIApp, *, token: str | None, hosts: Collection[str], sign_in: bytes) -> None:
        self._app, self._token, self._sign_in = app, token, sign_in
        self._hosts = frozenset(name.lower() for name in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # a websocket: never accepted
        send = _with_headers(send)
        headers = Headers(scope=scope)
        try:
            host = self._check_host(headers, _port_of(scope))
            _check_path(scope)
            self._check_origin(scope, headers, host)
            if self._token is not None and not scope["path"].startswith(STATIC):
                if (cookie := self._new_cookie(scope)) is not None:
                    await _answer(send, 200, _ENTER, b"text/html; charset=utf-8", {"set-cookie": cookie})
                    return
                self._check_token(scope, headers)
            body = await _read_body(scope, headers, receive)
        except Refused as refused:
            page = refused.status == 401 and "text/html" in headers.get("accept", "")
            detail = self._sign_in if page else msgspec.json.encode({"detail": refused.detail})
            kind = b"text/html; charset=utf-8" if page else b"application/json"
            await _answer(send, refused.status, detail, kind, refused.headers)
            return
        await self._app(scope, _replay(body, receive), send)

    def _check_host(self, headers: Headers, port: int | None) -> str:
        given = headers.getlist("host")
        host = given[0].lower() if len(given) == 1 else ""
        match = _HOST.fullmatch(host)
        if match and match["name"] in self._hosts:
            return host
        if match and match["name"] in LOOPBACK and (port is None or int(match["port"] or 80) == port):
            return host
        if match and self._token is None and _is_address(match["name"]):
            return host
        raise Refused(
            421,
            "not served under this name: open the address that `potluck page` or the monitor prints, or start the "
            "monitor with `--allow-host` and the name",
        )

    def _check_origin(self, scope: Scope, headers: Headers, host: str) -> None:
        for origin in headers.getlist("origin"):
            if origin.lower() not in (f"http://{host}", f"https://{host}"):
                raise Refused(403, "asked for by a page from elsewhere")
        if scope["method"] != "POST":
            return
        by_bearer = headers.get("authorization", "").lower().startswith("bearer ")
        if not by_bearer and self._token is not None and "origin" not in headers:
            raise Refused(403, "a change must say which page it comes from, or bear the token itself")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refused(415, "send application/json")

    def _check_token(self, scope: Scope, headers: Headers) -> None:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        candidates = [given.strip()] if scheme.lower() == "bearer" else []
        name = cookie_name(scope)
        try:
            cookies = [
                cookie[name].value for line in headers.getlist("cookie") if name in (cookie := SimpleCookie(line))
            ]
        except CookieError:
            cookies = []
        if not any(self._is_token(one) for one in candidates + cookies):
            raise Refused(401, "the token is missing or wrong: `potluck page` opens this page", **_CHALLENGE)

    def _new_cookie(self, scope: Scope) -> str | None:
        """For `/?token=...`: what the browser shall keep. Raises Refused if the token is wrong."""
        if scope["path"] != "/" or scope["method"] != "GET" or b"token=" not in scope["query_string"]:
            return None
        given = dict(parse_qsl(scope["query_string"].decode("latin-1")[:1024])).get("token", "")
        if not self._is_token(given):
            raise Refused(401, "this token is not this daemon's: `potluck page` opens this page", **_CHALLENGE)
        return f"{cookie_name(scope)}={given}; Path=/; HttpOnly; SameSite=Strict; Max-Age=31536000"

    def _is_token(self, given: str) -> bool:
        return self._token is not None and hmac.compare_digest(given.encode(), self._token.encode())


def _is_address(name: str) -> bool:
    try:
        return ip_address(name.strip("[]")).version == (6 if name.startswith("[") else 4)
    except ValueError:
        return False


_CHALLENGE: Final = {"www-authenticate": "Bearer"}
#: A redirect would still count as coming from where the link was, and a strict cookie not be sent along: the page goes
#: on by itself, and leaves no token in the address or the history.
_ENTER: Final = (
    b'<!doctype html><html lang="en"><title>Potluck</title><meta http-equiv="refresh" content="2; url=/">'
    b'<script src="/static/enter.js"></script><p><a href="/">Go on</a></p></html>'
)


def cookie_name(scope: Scope) -> str:
    """Cookies are shared by all ports of a host: each daemon has a name of its own."""
    return f"potluck-{_port_of(scope) or 0}"


def _port_of(scope: Scope) -> int | None:
    server = scope.get("server")
    return server[1] if server else None


def _check_path(scope: Scope) -> None:
    raw = scope.get("raw_path")
    path = raw.decode("latin-1") if raw is not None else scope["path"]
    if len(scope["query_string"]) > MAX_PATH_CHARACTERS:
        raise Refused(400, "too long a question")
    if len(path) > MAX_PATH_CHARACTERS or not _PATH.fullmatch(path):
        raise Refused(404, "there is no such page")


async def _read_body(scope: Scope, headers: Headers, receive: Receive) -> bytes:
    """All of it, however it is sent."""
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length[:20]) > MAX_BODY_BYTES:
        raise Refused(413, f"more than {MAX_BODY_BYTES} bytes")
    if length == "0" and "transfer-encoding" not in headers:
        return b""
    body: bytes = b""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refused(400, "gone before it was all said")
                body += message.get("body", b"")
                if len(body) > MAX_BODY_BYTES:
                    raise Refused(413, f"more than {MAX_BODY_BYTES} bytes", connection="close")
                if not message.get("more_body"):
                    return body
    except TimeoutError:
        raise Refused(408, f"not sent within {BODY_SECONDS:.0f} s", connection="close") from None


def _replay(body: bytes, receive: Receive) -> Receive:
    told = False

    async def again() -> Message:
        nonlocal told
        if told:
            return await receive()  # a disconnect, when it comes
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            given = {name.lower() for name, _ in message["headers"]}
            added = [*_HEADERS] if b"cache-control" in given else [*_HEADERS, (b"cache-control", b"no-store")]
            message = {**message, "headers": [*message["headers"], *added]}
        await send(message)

    return sending


async def _answer(send: Send, status: int, body: bytes, kind: bytes, headers: dict[str, str]) -> None:
    given = [(name.encode(), value.encode()) for name, value in headers.items()]
    start = [(b"content-type", kind), (b"content-length", str(len(body)).encode()), *given]
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": body})
