"""Who is let in, by every way in that a browser, another user or a program on the machine could try."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.peer.home import RunFolder
from potluck.peer.web import guard
from potluck.peer.web.app import create_app
from potluck.peer.web.guard import MAX_BODY_BYTES, Guard

TOKEN = "t" * 43
HOME = "http://127.0.0.1:7770"
BEARER = {"authorization": f"Bearer {TOKEN}"}
COOKIE = {"cookie": f"potluck-7770={TOKEN}"}


def ask(folder: RunFolder, machine: Any, do: Callable[[httpx.AsyncClient], Awaitable[Any]], **options: Any) -> Any:
    async def go() -> Any:
        settings = {"machine": machine, "token": TOKEN} | options
        app = create_app(lambda: [folder], **settings)
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=HOME)
        async with app.router.lifespan_context(app), client:
            return await do(client)

    return asyncio.run(go())


@pytest.mark.parametrize(
    "host, status",
    [
        ("127.0.0.1:7770", 200),
        ("LOCALHOST:7770", 200),
        ("[::1]:7770", 200),
        ("127.0.0.1:7771", 421),
        ("127.0.0.1", 421),
        ("evil.example:7770", 421),
        ("127.0.0.1.evil.example:7770", 421),
        ("127.0.0.1:7770@evil.example", 421),
        ("", 421),
    ],
)
def test_only_loopback_names_with_the_right_port_are_served(
    folder: RunFolder, machine: Any, host: str, status: int
) -> None:
    answer = ask(folder, machine, lambda client: client.get("/api/v1/runs", headers={**BEARER, "host": host}))
    assert answer.status_code == status


@pytest.mark.parametrize("origin, status", [(HOME, 200), ("http://evil.example", 403), ("null", 403), ("file://", 403)])
def test_pages_from_elsewhere_get_nothing(folder: RunFolder, machine: Any, origin: str, status: int) -> None:
    async def do(client: httpx.AsyncClient) -> list[int]:
        read = await client.get("/api/v1/machine", headers={**COOKIE, "origin": origin})
        change = await client.post("/api/v1/machine/pause", headers={**COOKIE, "origin": origin}, json={})
        return [read.status_code, change.status_code]

    assert ask(folder, machine, do) == [status, status]
    assert machine.asked == (["pause"] if status == 200 else [])


def test_all_but_static_files_need_the_token(folder: RunFolder, machine: Any) -> None:
    async def do(client: httpx.AsyncClient) -> None:
        app: Any = client._transport.app  # type: ignore[attr-defined]
        pages = [route.path for route in app.routes if hasattr(route, "path")]
        paths = [*app.openapi()["paths"], *pages]
        assert "/api/v1/machine/limits" in paths and "/metrics" in paths and "/api/v1/openapi.json" in paths
        for path in {path.replace("{run}", folder.run_id).replace("{peer}", machine.peer) for path in paths}:
            for wrong in ({}, {"authorization": "Bearer x"}, {"cookie": "potluck-7770=x"}, {"authorization": TOKEN}):
                answer = await client.get(path, headers=wrong)
                assert answer.status_code == (404 if path.startswith("/static/") else 401), path
        assert (await client.get("/static/style.css")).status_code == 200
        for right in (BEARER, COOKIE, {"cookie": f"other=1; potluck-7770={TOKEN}"}):
            assert (await client.get("/api/v1/runs", headers=right)).status_code == 200

    ask(folder, machine, do)


def test_the_token_in_the_address_becomes_a_cookie_that_scripts_and_other_sites_cannot_use(
    folder: RunFolder, machine: Any
) -> None:
    async def do(client: httpx.AsyncClient) -> None:
        assert (await client.get("/?token=wrong")).status_code == 401
        assert (await client.get("/machine?token=" + TOKEN)).status_code == 401
        answer = await client.get("/?token=" + TOKEN)
        cookie = answer.headers["set-cookie"]
        assert cookie.startswith(f"potluck-7770={TOKEN};") and "HttpOnly" in cookie and "SameSite=Strict" in cookie
        assert TOKEN not in answer.text and answer.headers["referrer-policy"] == "no-referrer"
        assert (await client.get("/machine")).status_code == 200

    ask(folder, machine, do)


def test_a_change_is_a_post_of_json_from_the_page_itself(folder: RunFolder, machine: Any) -> None:
    async def do(client: httpx.AsyncClient) -> None:
        own = {**COOKIE, "origin": HOME}
        url = "/api/v1/machine/pause"
        assert (await client.get(url, headers=own)).status_code == 405
        assert (await client.post(url, headers=COOKIE, json={})).status_code == 403
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
            answer = await client.post(url, headers={**own, "content-type": kind}, content=b"{}")
            assert answer.status_code == 415
        assert machine.asked == []
        assert (await client.post(url, headers=BEARER, json={})).status_code == 200  # a program, which has the token
        assert machine.asked == ["pause"]

    ask(folder, machine, do)


@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_are_bounded_however_they_are_sent(folder: RunFolder, machine: Any, chunked: bool) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(1000):
            yield b" " * 1024

    async def do(client: httpx.AsyncClient) -> int:
        content = pieces() if chunked else b" " * (MAX_BODY_BYTES + 1)
        headers = {**BEARER, "content-type": "application/json"}
        return (await client.post("/api/v1/machine/limits", headers=headers, content=content)).status_code

    assert ask(folder, machine, do) == 413


def test_a_body_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.01)
    status, _ = asyncio.run(direct(path="/", headers={"content-length": "9"}, stuck=True))
    assert status == 408


async def direct(
    *, path: str, headers: dict[str, str] | None = None, stuck: bool = False, token: str | None = None
) -> tuple[int, bool]:
    """(status, whether the application was asked), past any client that tidies addresses up."""
    asked, sent = [], []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        asked.append(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def receive() -> Any:
        await asyncio.sleep(60 if stuck else 0)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    all_headers = {"host": "127.0.0.1:7770"} | (headers or {})
    scope = {
        "type": "http",
        "method": "GET",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "scheme": "http",
        "server": ("127.0.0.1", 7770),
        "headers": [(name.encode(), value.encode()) for name, value in all_headers.items()],
    }
    await Guard(app, token=token, hosts=(), sign_in=b"")(scope, receive, send)
    return sent[0]["status"], bool(asked)


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/static/../token",
            "/static/..%2ftoken",
            "/static/%2e%2e/token",
            "//evil",
            "/a//b",
            "/a\\b",
            "/./a",
            "/a/..",
        ),
        *("/%00", "/static/style.css%00.js", "/" + "a" * 2000, "relative", ""),
    ],
)
def test_path_tricks_never_reach_the_application(path: str) -> None:
    status, asked = asyncio.run(direct(path=path))
    assert status == 404 and not asked


@given(st.text(alphabet="./%2eE\\a:~", max_size=30))
def test_a_path_that_passes_has_no_way_up(path: str) -> None:
    _, asked = asyncio.run(direct(path="/" + path))
    if asked:
        parts = path.split("/")
        assert "%" not in path and "\\" not in path and not {".", ".."} & set(parts)


def test_every_answer_says_what_browsers_must_not_do(folder: RunFolder, machine: Any) -> None:
    async def do(client: httpx.AsyncClient) -> None:
        for path in ("/", "/static/main.js", "/api/v1/runs", "/nothing"):
            headers = (await client.get(path, headers=BEARER)).headers
            policy = headers["content-security-policy"]
            assert "script-src 'self';" in policy and "frame-ancestors 'none'" in policy
            assert "default-src 'none';" in policy and "http" not in policy
            assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
            assert "cache-control" in headers

    ask(folder, machine, do)


def test_a_public_page_is_read_only_and_served_by_its_name(folder: RunFolder) -> None:
    async def do(client: httpx.AsyncClient) -> None:
        public = {"host": "run.example.org"}
        assert (await client.get("/api/v1/runs", headers=public)).json()["machine"] is False
        assert (await client.get("/api/v1/runs", headers={"host": "x.run.example.org"})).status_code == 421
        own = {**public, "origin": "https://run.example.org"}
        assert (await client.get("/api/v1/runs", headers=own)).status_code == 200
        paths = (await client.get("/api/v1/openapi.json")).json()["paths"]
        assert not [path for path, verbs in paths.items() if "machine" in path or set(verbs) != {"get"}]
        assert (await client.post("/api/v1/machine/pause", headers=own, json={})).status_code == 404
        assert (await client.get("/machine")).status_code == 404

    ask(folder, None, do, token=None, hosts=["Run.Example.Org"])


def test_a_machine_is_never_shown_without_a_token(folder: RunFolder, machine: Any) -> None:
    with pytest.raises(ValueError, match="token"):
        create_app(lambda: [folder], machine=machine)


@pytest.mark.parametrize(
    "host, public, own",
    [
        ("203.0.113.7:7780", 200, 421),
        ("203.0.113.7", 200, 421),
        ("[2001:db8::7]:7780", 200, 421),
        ("run.example.org:7780", 421, 421),
        ("203.0.113.7.example.org", 421, 421),
        ("0x7f.1", 421, 421),
        ("[203.0.113.7]", 421, 421),
        ("[::g]", 421, 421),
    ],
)
def test_a_public_page_is_reached_by_bare_addresses_a_machines_own_is_not(
    folder: RunFolder, machine: Any, host: str, public: int, own: int
) -> None:
    get = lambda client: client.get("/api/v1/runs", headers={**BEARER, "host": host})  # noqa: E731
    assert ask(folder, None, get, token=None).status_code == public
    assert ask(folder, machine, get).status_code == own
