"""A fourth provider, brought by another package: this file is all there is of it; nothing else knows it.

What a package has to say is in `lifelogger.providers.base` and, for the simulation,
`lifelogger.sandbox.provider`; its entry points bring both. See docs/adding-a-provider.md.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from lifelogger import providers
from lifelogger.errors import BadRecord
from lifelogger.providers.base import (
    Endpoints,
    Http,
    Json,
    Page,
    Pool,
    Provider,
    Record,
    Stream,
    Window,
    begun,
    date_there,
    number,
    plain_id,
    shown,
    text,
    utc_offset,
    whole_list,
)
from lifelogger.sandbox import provider as sandbox
from lifelogger.sandbox.calls import Call, Reply, Route, json_reply, route
from lifelogger.sandbox.days import days
from lifelogger.sandbox.ledger import PAGE, READ, TOKEN
from lifelogger.sandbox.people import Activity, Person
from lifelogger.sandbox.server import Sandbox
from lifelogger.settings import known_providers
from tests.conftest import world
from tests.processes import ROOT
from tests.providers.contract import LIFE_DAYS, Contract, Listed
from tests.sandbox.control import Control

SPAN = timedelta(days=90)
"""How much of the past one page holds."""


class Scale(Provider):
    """A cloud of bathroom scales: one list, of what people weigh."""

    name = "scale"
    title = "Scale"
    scopes = ("weighings",)
    streams = (Stream("weighings", "body", scopes=("weighings",)),)

    def pages(self, http: Http, stream: Stream, window: Window) -> Iterator[Page]:
        """Walk back in spans, each read to its end."""
        until = window.until
        while True:
            assert until or window.now
            since = max(window.since, (until or window.now) - SPAN)  # type: ignore[operator]
            query = {"since": int(since.timestamp())}
            if until:
                query["before"] = int(until.timestamp()) + 1
            found = whole_list(
                "weighings",
                lambda more, query=query: http.get("/weighings", **query, **more),  # type: ignore[misc]
                "weighings",
                "next",
                asked_as="cursor",
            )
            yield Page(found, since)
            if since <= window.since:
                return
            until = since

    def record(self, stream: Stream, item: Json) -> Record:
        key = self.external_id(stream, item)
        if key is None:
            raise BadRecord(f"id: not a whole number: {shown(item)}")
        at = begun(item, "at")
        offset = utc_offset(number(item, "offset_s"), "offset_s")
        return Record(
            external_id=key,
            kind=stream.kind,
            ordered_at=at,
            start_at=at,
            utc_offset_s=offset,
            local_date=date_there(at, offset),
            provider_type=text(item, "how"),
            weight_kg=number(item, "kg"),
        )

    def external_id(self, stream: Stream, item: Json) -> str | None:
        value = item.get("id") if isinstance(item, dict) else None
        return str(value) if type(value) is int and 0 < value < 2**63 else None

    def pools(self, settings: Endpoints, connection_id: int, *, token: bool = False) -> tuple[Pool, ...]:
        return (self.pool(settings, "requests", settings.budget, reports=False),)

    def grantee(self, reply: Json) -> str | None:
        return plain_id(reply.get("person"))


class SimulatedScale(sandbox.Provider):
    """How that cloud behaves."""

    name = "scale"
    title = "Scale"
    scopes = ("weighings",)
    streams = ("weighings",)
    activity_stream = ""
    defaults = {"access_token_seconds": 3600, "page_size": 50}  # noqa: RUF012
    pools = {"requests": (60,)}  # noqa: RUF012
    first_limits = {"requests": (200,)}  # noqa: RUF012

    def make_routes(self) -> Sequence[Route]:
        return (
            route(READ, "GET /weighings", self.weighings),
            route(TOKEN, "POST /token", self.token),
            route(TOKEN, "POST /revoke", self.revoke),
            route(PAGE, "GET /authorize", self.authorize),
        )

    def weighings(self, call: Call) -> Reply:
        """Newest first; a cursor is how many were shown."""
        person = self.asker(call, "weighings")
        since, before = int(call.asked("since") or 0), int(call.asked("before") or 2**40)
        span = (datetime.fromtimestamp(at, UTC).date() for at in (since, min(before, call.now + 86_400)))
        first, last = span
        near = self.listed(person, "weighings", first - timedelta(2), last + timedelta(2), call.now)
        found = sorted((each for each in near if since <= each.order < before), key=lambda one: -one.order)
        begin = 0 if call.endless else int(call.asked("cursor") or 0)
        size = self.settings["page_size"]
        more = call.endless or begin + size < len(found)
        page = [each.value for each in found[begin : begin + size]]
        return json_reply(200, {"weighings": page, "next": str(begin + size) if more else None})

    def points(
        self, person: Person, stream: str, first: date, last: date, now: float
    ) -> Iterator[sandbox.Item]:
        for day in days(self.people.seed, person, first, last, now):
            if day.weight is not None:
                at = datetime.fromtimestamp(day.weighed, ZoneInfo(person.timezone))
                value = {
                    "id": day.date.toordinal(),
                    "at": at.isoformat(),
                    "offset_s": int(at.utcoffset().total_seconds()),  # type: ignore[union-attr]
                    "kg": day.weight,
                    "how": "barefoot",
                }
                yield sandbox.Item(f"{day.date}", value, day.weighed)

    def welcome(self, person: Person) -> dict[str, Any]:
        return {"person": person.user_id}

    def item(self, activity: Activity) -> Any:
        raise AssertionError("it has no activities")


# How the package brings them ----------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder as `pip` leaves it: with the metadata of a package whose entry points name the two classes."""
    info = tmp_path / "packages" / "scale-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: scale\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        f"[lifelogger.providers]\nscale = {__name__}:Scale\n\n"
        f"[lifelogger.sandbox]\nscale = {__name__}:SimulatedScale\n"
    )
    monkeypatch.syspath_prepend(info.parent)
    forget_what_was_found()
    yield info.parent
    monkeypatch.undo()
    forget_what_was_found()


def forget_what_was_found() -> None:
    providers.registry.cache_clear()
    known_providers.cache_clear()


def endpoints_at(url: str) -> dict[str, Any]:
    """What the package's documentation tells people to write into their settings."""
    return {
        "enabled": True,
        "client_id": "sandbox",
        "client_secret": "sandbox",
        "api_url": f"{url}/scale",
        "authorize_url": f"{url}/scale/authorize",
        "token_url": f"{url}/scale/token",
        "revoke_url": f"{url}/scale/revoke",
        "budget": ["200/minute"],
    }


class TestContract(Contract):
    provider = Scale()
    lists: Mapping[str, Listed] = {
        "weighings": Listed("GET /weighings", edit={"kg": 17.5}, broken={"kg": "heavy"}),
    }

    @pytest.fixture(scope="class")
    @classmethod
    def sandbox_server(cls) -> Iterator[Sandbox]:
        with world(people=21, history_days=LIFE_DAYS, providers=[SimulatedScale]) as server:
            yield server

    @pytest.fixture
    @classmethod
    def endpoints(cls, sandbox: Control) -> dict[str, Any]:
        return {"scale": endpoints_at(sandbox.url)}

    def small_pages(self, sandbox: Control, monkeypatch: pytest.MonkeyPatch) -> None:
        sandbox.settings("scale", page_size=2)
        monkeypatch.setitem(globals(), "SPAN", timedelta(days=10))


@pytest.mark.slow
def test_every_command_knows_a_provider_that_a_package_brings(package: Path, tmp_path: Path) -> None:
    """In a process of its own, which has heard of it by its entry point alone."""
    settings = tmp_path / "settings.toml"
    table = "\n".join(
        f"{key} = {json.dumps(value)}" for key, value in endpoints_at("http://127.0.0.1:9").items()
    )
    settings.write_text(f"[providers.scale]\n{table}\n")

    here = Path(__file__).parents[__name__.count(".")]  # where a process finds this very module
    path, environ = os.pathsep.join(map(str, (package, ROOT, here))), {"LIFELOGGER_SETTINGS": str(settings)}

    told = json.loads(lifelogger(path, "status", "--json", **environ).stdout)
    settings.write_text(f"[providers.scales]\n{table}\n")
    misspelt = lifelogger(path, "status", **environ)

    assert set(told["providers"]) == {"fitbit", "oura", "scale", "strava"}
    assert misspelt.returncode != 0
    assert "did you mean providers.scale" in misspelt.stderr


def lifelogger(
    path: Path | str, *arguments: str, cwd: Path = ROOT, **environ: str
) -> subprocess.CompletedProcess[str]:
    """A command of the lifelogger that `path` finds."""
    without = {name: value for name, value in os.environ.items() if not name.startswith("LIFELOGGER_")}
    return subprocess.run(
        [sys.executable, "-m", "lifelogger", *arguments],
        cwd=cwd,
        env={**without, "PYTHONPATH": str(path), **environ},
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
    )


@pytest.mark.slow
def test_two_files_and_a_table_are_all_that_a_checkout_needs(tmp_path: Path) -> None:
    """docs/adding-a-provider.md: put in their places, nothing else changed, and people have it."""
    for name in ("lifelogger", "actors"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "scheduler.py", tmp_path)
    (tmp_path / "lifelogger/providers/scale.py").write_text(alone("SPAN", "Scale"))
    (tmp_path / "lifelogger/sandbox/scale.py").write_text(alone("SimulatedScale"))
    table = (ROOT / "docs/adding-a-provider.md").read_text().partition("```toml")[2].partition("```")[0]
    settings = (ROOT / "settings.toml").read_text() + textwrap.dedent(table)
    (tmp_path / "settings.toml").write_text(settings)
    with socket.create_server(("127.0.0.1", 0)) as web, socket.create_server(("127.0.0.1", 0)) as sandbox:
        ports = [str(end.getsockname()[1]) for end in (web, sandbox)]
    environ = {
        "LIFELOGGER_WEB__PORT": ports[0],
        "LIFELOGGER_SANDBOX__PORT": ports[1],
        "LIFELOGGER_SANDBOX__PEOPLE": "4",
        **{f"LIFELOGGER_PROVIDERS__{name}__ENABLED": "false" for name in ("STRAVA", "FITBIT", "OURA")},
    }

    run = lifelogger(tmp_path, "run", "--for", "12s", cwd=tmp_path, **environ)
    told = lifelogger(tmp_path, "status", "--json", cwd=tmp_path, **environ)

    assert run.returncode == 0, run.stderr
    scale = json.loads(told.stdout)["providers"]["scale"]
    assert scale["connections"] > 0
    assert scale["records"] > 0


def alone(*names: str) -> str:
    """Some definitions of this file as a file of their own, with the imports that are not of tests."""
    parts = []
    source = Path(__file__).read_text()
    for node in ast.parse(source).body:
        imports = isinstance(node, ast.Import | ast.ImportFrom)
        text = ast.get_source_segment(source, node) or ""
        own = text.startswith(tuple(f"{word} {name}" for name in names for word in ("class", "def"))) or (
            text.split(" = ")[0] in names
        )
        if (imports and "tests." not in text and "pytest" not in text) or own:
            parts.append(text)
    return "\n".join(parts) + "\n"
