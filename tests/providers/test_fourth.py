"""A fourth provider, brought by another package: this file is all there is of it; nothing else knows it.

What a package has to say is in `lifelogger.providers.base` and, for the simulation,
`lifelogger.sandbox.provider`; its entry points bring both. See docs/adding-a-provider.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
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
    providers.registry.cache_clear()
    yield info.parent
    monkeypatch.undo()
    providers.registry.cache_clear()


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


def test_every_command_knows_a_provider_that_a_package_brings(package: Path, tmp_path: Path) -> None:
    """In a process of its own, which has heard of it by its entry point alone."""
    settings = tmp_path / "settings.toml"
    table = "\n".join(
        f"{key} = {json.dumps(value)}" for key, value in endpoints_at("http://127.0.0.1:9").items()
    )
    settings.write_text(f"[providers.scale]\n{table}\n")

    told = json.loads(lifelogger(package, settings, "status", "--json").stdout)
    settings.write_text(f"[providers.scales]\n{table}\n")
    misspelt = lifelogger(package, settings, "status")

    assert set(told["providers"]) == {"fitbit", "oura", "scale", "strava"}
    assert misspelt.returncode != 0
    assert "did you mean providers.scale" in misspelt.stderr


def lifelogger(package: Path, settings: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    here = Path(__file__).parents[__name__.count(".")]  # where a process finds this very module
    path = os.pathsep.join(map(str, (package, ROOT, here)))
    return subprocess.run(
        [sys.executable, "-m", "lifelogger", *arguments],
        env={**os.environ, "PYTHONPATH": path, "LIFELOGGER_SETTINGS": str(settings)},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
