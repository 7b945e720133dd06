"""The sandbox in a simulation: people who live as it says, and requests without a wire on its clock."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from lifelogger.sandbox.app import App
from lifelogger.sandbox.clock import Clock
from lifelogger.sandbox.people import FIRST_ADDED_KEY, Activity
from lifelogger.sandbox.strava import Strava
from lifelogger.sandbox.world import World
from tests.sandbox.conftest import NOW

LIST = "/strava/api/v3/athlete/activities"


class TwoRuns:
    """One that is there, and one that comes in an hour."""

    def until(self, moment: float) -> list[Activity]:
        return [
            Activity(FIRST_ADDED_KEY + number, 0, NOW - 7200 + number * 60, 1800, "Run", uploaded, False)
            for number, uploaded in enumerate((NOW - 3600, NOW + 3600))
        ]


@pytest.fixture
def world() -> Iterator[World]:
    clock = Clock()
    clock.freeze(NOW)
    made = World(people=2, history_days=30, clock=clock, providers=[Strava])
    made.people.lead(made.people.all[0], TwoRuns())
    yield made
    made.close()


def scope(world: World, path: str = LIST, method: str = "GET") -> dict[str, Any]:
    alice = world.providers["strava"].connect(world.people.all[0], "sandbox", None)
    bearer = f"Bearer {alice['access_token']}".encode()
    return {
        "method": method,
        "path": path,
        "query_string": b"per_page=5",
        "headers": [(b"authorization", bearer)],
    }


def test_a_person_leads_the_life_that_is_given(world: World) -> None:
    app, asked = App(world), scope(world)

    def shown() -> list[int]:
        return [each["id"] for each in json.loads(app.ask(asked)[0].body)]

    assert shown() == [FIRST_ADDED_KEY]
    world.clock.step(3600)
    assert shown() == [FIRST_ADDED_KEY + 1, FIRST_ADDED_KEY]


def test_a_request_without_a_wire_is_counted_and_written_down(world: World) -> None:
    app, asked = App(world), scope(world)
    world.providers["strava"].limit({"reads": [1, 1000]})

    replies = [app.ask(asked) for _ in range(2)]

    assert [reply.status for reply, _ in replies] == [200, 429]
    assert [headers["X-ReadRateLimit-Usage"] for _, headers in replies] == ["1,1", "2,2"]
    assert replies[0][1]["Date"] == "Mon, 15 Jun 2026 12:07:30 GMT"
    entries = world.ledger.requests()
    assert [(each.person, each.status, each.at) for each in entries] == [
        ("alice", 200, NOW),
        ("alice", 429, NOW),
    ]
    assert not world.ledger.open


def test_what_has_to_call_somebody_needs_a_wire(world: World) -> None:
    asked = scope(world, "/strava/api/v3/push_subscriptions", "POST")
    body = b"client_id=sandbox&client_secret=x&verify_token=y&callback_url=http://127.0.0.1:1/"

    with pytest.raises(RuntimeError, match="needs a wire"):
        App(world).ask(asked, body)
