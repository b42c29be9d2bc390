"""The pages of a real daemon in a real browser: what they show, a pause, and whether everybody can use them."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Page, Request, Route, expect, sync_playwright
from sample_run import NAMES, peer, write_run

from potluck.dht.records import Heartbeat, Signed
from potluck.peer.history import History
from potluck.peer.home import RunFolder
from potluck.peer.limits import read_limits

from real import potluck, processes_of, short_folder

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="needs a browser: apt-get install chromium"),
]
PHONE, DESK = (390, 844), (1280, 900)
expect.set_options(timeout=20_000)
RULES = ("wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice")


@dataclass
class Site:
    """A volunteer's home with a daemon, and a browser."""

    home: Path
    run: RunFolder
    url: str
    token: str
    browser: Browser

    @property
    def path(self) -> str:
        return f"/runs/{self.run.run_id}"


@dataclass
class Visit:
    """A browser's window, and all that went wrong in it. `elsewhere`: what it asked other hosts for."""

    site: Site
    context: BrowserContext
    page: Page
    errors: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)

    def on_request(self, request: Request) -> None:
        parts = urlsplit(request.url)
        if parts.scheme not in ("data", "blob") and f"{parts.scheme}://{parts.netloc}" != self.site.url:
            self.elsewhere.append(request.url)

    def enter(self, path: str = "/") -> Page:
        """With the cookie that the token once set."""
        name = f"potluck-{urlsplit(self.site.url).port}"
        self.context.add_cookies([{"name": name, "value": self.site.token, "url": self.site.url}])
        self.page.goto(self.site.url + path)
        return self.page


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with short_folder() as folder, sync_playwright() as playwright:
        home = folder / "home"
        run = write_run(home, time.time(), rounds=60, peers=10, stages=2)
        entry = {"arguments": ["join", f"potluck:{run.run_id}", "--loopback", "--threads", "1"]}
        (home / "runs.json").write_text(json.dumps({"runs": [entry], "paused": True}))
        command = (sys.executable, "-m", "potluck", "daemon", "--home", str(home), "--port", "0", "--json")
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        daemon = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=few_files)
        try:
            assert daemon.stdout
            told = json.loads(next(line for line in daemon.stdout if '"daemon.page"' in line))
            shown = potluck("page", "--no-open", "--home", str(home))
            assert shown.stdout.startswith(f"{told['url']}/?token="), shown
            yield Site(home, run, told["url"], shown.stdout.strip().partition("token=")[2], browser)
        finally:
            browser.close()
            daemon.terminate()
            assert daemon.wait(20) == 0


def few_files() -> None:
    """As many systems have it: the daemon may take more, and must say so."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


@pytest.fixture
def visit(site: Site) -> Iterator[Visit]:
    found = opened(site)
    yield found
    found.context.close()
    assert found.errors == [] and found.elsewhere == []


def opened(site: Site, size: tuple[int, int] = DESK, dark: bool = False) -> Visit:
    context = site.browser.new_context(
        viewport={"width": size[0], "height": size[1]},
        is_mobile=size == PHONE,
        color_scheme="dark" if dark else "light",
        reduced_motion="reduce",
    )
    visit = Visit(site, context, context.new_page())
    visit.page.on("console", lambda said: visit.errors.append(said.text) if said.type in ("error", "warning") else None)
    visit.page.on("pageerror", lambda error: visit.errors.append(str(error)))
    visit.page.on("dialog", lambda dialog: visit.errors.append(f"a dialog: {dialog.message}"))
    visit.page.on("request", visit.on_request)
    return visit


def until(holds: Callable[[], bool]) -> None:
    ends = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.05)


def violations(page: Page) -> list[str]:
    """What axe finds against WCAG 2.2 A and AA, contrast included, and its best practices."""
    told = Axe().run(page, options={"runOnly": {"type": "tag", "values": list(RULES)}}).response
    assert len(told["passes"]) > 5
    return [f"{one['id']}: {node['html'][:200]}" for one in told["violations"] for node in one["nodes"]]


def test_without_the_token_there_is_only_the_door(visit: Visit) -> None:
    page = visit.page
    page.goto(f"{visit.site.url}/machine")
    expect(page.locator("h1")).to_have_text("This page is its owner's")
    expect(page.locator("nav a")).to_have_count(0)
    assert violations(page) == []
    page.get_by_label("Or paste the token here").fill("wrong")
    page.get_by_role("button", name="Open").click()
    expect(page.locator("h1")).to_have_text("This page is its owner's")
    page.get_by_label("Or paste the token here").fill(visit.site.token)
    page.get_by_role("button", name="Open").click()
    expect(page.locator("h1")).to_have_text("small-llama")
    assert visit.site.token not in page.url and page.evaluate("document.cookie") == "", "no script can read the token"
    (cookie,) = visit.context.cookies()
    assert cookie["httpOnly"] and cookie["sameSite"] == "Strict"
    assert [error for error in visit.errors if "401" not in error] == []
    visit.errors.clear()


def test_a_run_shows_its_curves_and_follows_it_live(visit: Visit) -> None:
    page = visit.enter()
    expect(page.locator(".chart .main-svg").nth(2)).to_be_attached()
    expect(page.locator(".map h3")).to_have_text(["stage.0", "stage.1"])
    chart = page.get_by_role("img", name="Loss. From")
    assert "nats per token; " in (chart.get_attribute("aria-label") or "")
    page.get_by_text("As a table").first.click()
    expect(page.locator("details[open] tbody tr").nth(10)).to_be_visible()
    expect(page.locator("#live")).to_have_text("live")

    history, now = History.write(visit.site.run.history), time.time()
    told = Heartbeat(module="stage.0", round=60, loss=1.2345, name="newcomer", started=now, sent_at=now)
    history.hear([Signed(told, peer(40), now + 60)], now)
    history.close()
    expect(page.locator(".tile", has_text="Loss")).to_contain_text("1.2345")
    expect(page.locator(".tile", has_text="Round")).to_contain_text("60")


def test_a_fetch_that_fails_once_does_not_freeze_the_page(visit: Visit) -> None:
    page, came = visit.page, []
    page.route(f"**/api/v1{visit.site.path}/events", lambda route: later_state(visit.site, route, len(came)))
    page.route(f"**/api/v1{visit.site.path}/curve", lambda route: came.append(route) or curve(route, len(came)))
    visit.enter(visit.site.path)
    expect(page.locator(".tile", has_text="Loss")).to_contain_text("1.0003")
    assert [error for error in visit.errors if "ERR_FAILED" not in error] == []
    # One may be at work now: what it meets when the page closes would be the next test's error.
    page.unroute_all(behavior="ignoreErrors")
    visit.errors.clear()


def curve(route: Route, number: int) -> None:
    """The one that the page begins with; the next one fails."""
    route.abort() if number == 2 else route.continue_()


def later_state(site: Site, route: Route, number: int) -> None:
    """So many rounds later that the page must ask for the curve. Its loss says how often it had asked before."""
    state = route.fetch(url=f"{site.url}/api/v1{site.path}").json()
    state["latest"]["round"] = [round_ + 100 for round_ in state["latest"]["round"]]
    state["loss"] = 1 + min(number, 3) / 10_000
    event = f"retry: 50\nevent: state\ndata: {json.dumps(state)}\n\n"
    route.fulfill(status=200, content_type="text/event-stream", body=event)


def test_the_leaderboard_shows_hostile_names_as_they_are(visit: Visit) -> None:
    page = visit.enter(f"{visit.site.path}/contributors")
    expect(page.get_by_text("ledger verified")).to_be_visible()
    for name in (NAMES[6], NAMES[8]):
        expect(page.locator("tbody").get_by_text(name, exact=True)).to_be_visible()
    expect(page.locator(".chart .main-svg").first).to_be_attached()
    expect(page.locator(".legend")).to_contain_text(NAMES[6][:20])
    expect(page.locator("main img, main b")).to_have_count(0)
    page.locator(".chart").hover()


def test_a_peers_scores_come_with_reason_and_proof(visit: Visit) -> None:
    page = visit.enter(f"{visit.site.path}/peers/{peer(5)}")
    expect(page.get_by_text("25 proofs checked")).to_be_visible()
    expect(page.locator(".why", has_text="it was found not to train")).to_be_visible()
    expect(page.locator("tbody tr summary", has_text="✓ entry")).to_have_count(25)
    expect(page.get_by_text("a copy of another contribution").first).to_be_visible()


def test_my_machine_pauses_by_keyboard_goes_on_and_takes_limits(visit: Visit) -> None:
    home, page = visit.site.home, visit.enter("/machine")
    state = page.locator(".state h2")
    expect(state).to_have_text("Paused by you")
    page.get_by_role("button", name="Resume").click()
    expect(state).to_have_text("Working")
    page.locator("h1").click()
    for _ in range(20):  # with nothing but Tab
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent") == "Pause":
            break
    page.keyboard.press("Enter")
    expect(state).to_have_text("Paused by you")
    told = json.loads(potluck("status", "--home", str(home), "--json").stdout.splitlines()[0])
    assert told["daemon"]["rule"] == "you"
    assert [process for process in processes_of(home) if "join" in process.cmdline()] == []
    expect(page.locator(".run .chip")).to_have_text("‖paused")

    page.get_by_role("switch", name="Work on battery").press("Space")
    until(lambda: read_limits(home).battery)
    hours = page.get_by_label("Hours")
    hours.fill("late")
    hours.press("Tab")
    expect(page.locator(".wrong", has_text="give times like")).to_be_visible()
    assert len(visit.errors) == 1 and "400" in visit.errors.pop()
    hours.fill("00:00-24:00")
    hours.press("Tab")
    until(lambda: read_limits(home).schedule == ["00:00-24:00"])
    page.get_by_label("Hottest").press("ArrowLeft")
    until(lambda: read_limits(home).temperature == 89)


@pytest.mark.parametrize("size, dark", [(DESK, False), (PHONE, True)], ids=["desk-light", "phone-dark"])
def test_every_page_is_accessible_and_fits(site: Site, size: tuple[int, int], dark: bool) -> None:
    visit = opened(site, size, dark)
    visit.enter("/api")
    for path in ("", "/contributors", f"/peers/{peer(8)}", "/machine", "/api"):
        page = visit.page
        page.goto(site.url + (path if path in ("/machine", "/api") else site.path + path))
        expect(page.locator("main .card:visible").first).to_be_visible()
        if page.locator(".chart").count():
            expect(page.locator(".chart .main-svg").first).to_be_attached()
        assert violations(page) == [], path
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0], path
    visit.context.close()
    assert visit.errors == [] and visit.elsewhere == []


def test_a_run_that_is_not_here_says_so(visit: Visit) -> None:
    page = visit.enter()
    page.goto(f"{visit.site.url}/runs/{'a' * 52}")
    expect(page.locator("main")).to_contain_text("no such run")
    page.goto(f"{visit.site.url}/nothing")
    expect(page.locator("main")).to_contain_text("there is no such page")
    assert [error for error in visit.errors if "404" not in error] == []
    visit.errors.clear()


def test_what_the_daemon_serves_is_light(site: Site) -> None:
    """After all pages were looked at, whichever test comes first: below the 80 MB that a daemon may take."""
    visit = opened(site)
    for path in ("/contributors", f"/peers/{peer(3)}"):
        visit.enter(site.path + path)
        expect(visit.page.locator(".chart .main-svg").first).to_be_attached()
    visit.context.close()
    (daemon,) = [process for process in processes_of(site.home) if "daemon" in process.cmdline()]
    loaded: Any = [mapped.path for mapped in daemon.memory_maps()]
    assert not [path for path in loaded if "torch" in path or "grpc" in path]
    assert daemon.memory_info().rss < 80e6
    assert daemon.rlimit(resource.RLIMIT_NOFILE)[0] > 256
