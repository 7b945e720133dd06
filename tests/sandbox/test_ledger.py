"""The ledger: what was asked, by whose token, and how it ended."""

from __future__ import annotations

from lifelogger.sandbox.ledger import READ, Entry, Ledger
from lifelogger.sandbox.state import State
from tests.sandbox.conftest import NOW, Ask
from tests.sandbox.control import Control


def entry(person: str, started: float, ended: float) -> Entry:
    return Entry(
        0, "strava", "sandbox", person, READ, "GET /x", "GET", "/x", "", 200, started, started, ended
    )


def test_a_request_is_written_down_without_its_secrets(ask: Ask, control: Control, token: str) -> None:
    ask("/api/v3/athlete/activities", token, params={"page": 1, "code": "secret"})

    (found,) = control.ledger()

    assert found["started"] <= found["ended"]
    del found["id"], found["started"], found["ended"]
    assert found == {
        "provider": "strava",
        "client": "sandbox",
        "person": "alice",
        "kind": "read",
        "route": "GET /athlete/activities",
        "method": "GET",
        "path": "/api/v3/athlete/activities",
        "query": "page=1&code=***",
        "status": 200,
        "at": NOW,
        "usage": "reads 1,1 overall 1,1",
        "note": "",
    }


def test_entries_are_chosen(ask: Ask, control: Control) -> None:
    alice, bruno = (line["access_token"] for line in control.connect("alice", "bruno"))
    ask("/api/v3/athlete", alice)
    ask("/api/v3/athlete", bruno)
    ask("/api/v3/nothing", alice)
    ask("/api/v3/oauth/token", method="POST")

    first, second, *_ = control.ledger()
    assert len(control.ledger()) == 4
    assert len(control.ledger(after=first["id"])) == 3
    assert control.ledger(limit=1) == [first]
    assert control.ledger(person="bruno") == [second]
    assert [e["status"] for e in control.ledger(status="404,401")] == [404, 401]
    assert len(control.ledger(kind="token")) == 1
    assert len(control.ledger(route="GET /athlete")) == 2


def test_the_summary_counts(ask: Ask, control: Control, token: str) -> None:
    ask("/api/v3/athlete", token)
    ask("/api/v3/nothing", token)

    summary = control.summary()

    assert (summary["requests"], summary["unexpected"]) == (2, 1)
    assert summary["by_status"] == {"200": 1, "404": 1}
    assert summary["by_route"] == {"GET /athlete": 1, "": 1}
    day = next(w for w in summary["windows"] if w["seconds"] == 86_400 and w["pool"] == "reads")
    assert day == {
        "provider": "strava",
        "client_id": "sandbox",
        "pool": "reads",
        "seconds": 86_400,
        "start": NOW // 86_400 * 86_400,
        "used": 2,
        "limit": 1000,
    }


def test_control_requests_are_not_written_down(control: Control) -> None:
    control.people()
    assert control.summary()["requests"] == 0


def test_overlaps_are_pairs_of_one_person() -> None:
    ledger = Ledger(State())
    spans = [("a", 0, 10), ("a", 1, 2), ("a", 3, 4), ("b", 0, 10), ("a", 10, 11)]
    for person, started, ended in spans:
        one = entry(person, started, ended)
        ledger.begin(one)
        with ledger.state:
            ledger.end(one, ended)

    pairs = [((x.started, x.ended), (y.started, y.ended)) for x, y in ledger.overlaps()]
    assert pairs == [((0, 10), (1, 2)), ((0, 10), (3, 4))]
    assert ledger.most_at_once() == {"a": 2, "b": 1}
