"""Faults and holds: replies that break, connections that end, requests that stay open."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import requests

from tests.sandbox.conftest import Ask
from tests.sandbox.control import Control, Refused
from tests.sandbox.test_strava_oauth import refresh

ATHLETE, LIST = "/api/v3/athlete", "/api/v3/athlete/activities"
BROKEN = (requests.ConnectionError, requests.exceptions.ChunkedEncodingError)


class Asking(threading.Thread):
    """A request in a thread of its own."""

    def __init__(self, control: Control, path: str, token: str) -> None:
        super().__init__(daemon=True)
        self.url, self.token = f"{control.url}/strava{path}", token
        self.status: int | None = None
        self.start()

    def run(self) -> None:
        headers = {"Authorization": f"Bearer {self.token}"}
        self.status = requests.get(self.url, headers=headers, timeout=20).status_code


def test_a_fault_comes_and_goes(ask: Ask, control: Control, token: str) -> None:
    fault = control.fault("GET /athlete", status=503, skip=1, times=2)

    assert [ask(ATHLETE, token).status_code for _ in range(5)] == [200, 503, 503, 200, 200]

    assert ask(LIST, token).status_code == 200
    assert [(one["id"], one["hits"]) for one in control.faults()] == [(fault, 2)]
    control.clear_faults(fault)
    assert control.faults() == []


def test_a_share_of_the_requests_is_hit(ask: Ask, control: Control, token: str) -> None:
    """By chance, and the same ones each time."""
    control.limits(reads=[1000, 1000], overall=[1000, 1000])

    def hit(**options: Any) -> list[int]:
        fault = control.fault("GET /athlete", status=503, **options)
        broken = [at for at in range(100) if ask(ATHLETE, token).status_code == 503]
        assert control.faults()[0]["hits"] == len(broken)
        control.clear_faults(fault)
        return broken

    some = hit(share=0.2)

    assert 10 <= len(some) <= 30
    assert hit(share=0.2) == some
    assert hit(share=0.2, skip=3)[:5] == [at + 3 for at in some[:5]]
    assert hit(share=0.2, times=2) == some[:2]
    assert hit(share=1) == list(range(100))


@pytest.mark.parametrize("share", [0, 1.5, -1, "half", True])
def test_a_share_is_a_part_of_one(control: Control, share: Any) -> None:
    with pytest.raises(Refused, match="share"):
        control.fault("*", status=500, share=share)


@pytest.mark.parametrize(
    "match", ["*", "GET /*", "GET /athlete*", "GET /athlete/activities", "* /athlete/act*"]
)
def test_patterns_choose_routes(ask: Ask, control: Control, token: str, match: str) -> None:
    control.fault(match, status=500)

    assert ask(LIST, token).status_code == 500
    assert ask("/api/v3/oauth/token", method="POST").status_code == (500 if match == "*" else 401)


def test_a_pattern_can_mean_one_activity(ask: Ask, control: Control, token: str) -> None:
    first, second, *_ = [item["id"] for item in control.truth("alice")]
    control.fault(f"GET /activities/{first}", status=500)

    assert ask(f"/api/v3/activities/{first}", token).status_code == 500
    assert ask(f"/api/v3/activities/{second}", token).status_code == 200


def test_a_fault_can_mean_one_person(ask: Ask, control: Control) -> None:
    alice, bruno = control.connect("alice", "bruno")
    control.fault("*", person="bruno", status=500)

    assert ask(ATHLETE, alice["access_token"]).status_code == 200
    assert ask(ATHLETE, bruno["access_token"]).status_code == 500
    assert refresh(ask, bruno["refresh_token"]).status_code == 500


def test_replies_are_replaced(ask: Ask, control: Control, token: str) -> None:
    control.fault("GET /athlete", times=1, body="<html>", headers={"Content-Type": "text/html"})
    control.fault("GET /athlete", times=1, json=None)
    control.fault("GET /athlete", times=1, redirect="http://127.0.0.1:9/elsewhere")
    control.fault("GET /athlete", times=1, status=204)
    control.fault("GET /athlete", times=1, size=200_000)

    page, null, moved, empty, huge = (ask(ATHLETE, token) for _ in range(5))

    assert (page.status_code, page.text, page.headers["Content-Type"]) == (200, "<html>", "text/html")
    assert null.json() is None
    assert (moved.status_code, moved.headers["Location"]) == (302, "http://127.0.0.1:9/elsewhere")
    assert (empty.status_code, empty.content) == (204, b"")
    assert len(huge.content) == 200_000
    assert len(huge.json()[0]) == 200_000 - 4


def test_headers_change_and_vanish(ask: Ask, control: Control, token: str) -> None:
    control.fault("GET /athlete", headers={"x-ratelimit-limit": "400,4000", "X-RateLimit-Usage": None})

    reply = ask(ATHLETE, token)

    assert reply.json()["username"] == "alice"
    assert reply.headers["X-RateLimit-Limit"] == "400,4000"
    assert "X-RateLimit-Usage" not in reply.headers


@pytest.mark.parametrize("cut", ["before", "middle", "after"])
def test_connections_are_cut(ask: Ask, control: Control, token: str, cut: str) -> None:
    control.fault("GET /athlete", times=1, cut=cut)

    with pytest.raises(BROKEN):
        ask(ATHLETE, token)

    (entry,) = control.ledger()
    assert entry["status"] == (200 if cut == "middle" else 0)
    assert control.summary()["most_in_a_window"]["reads"]["900"] == 1
    assert ask(ATHLETE, token).status_code == 200


def test_a_refresh_can_be_carried_out_and_its_reply_lost(ask: Ask, control: Control) -> None:
    control.settings(rotate="always")
    line = control.connect("alice")[0]
    control.fault("POST /oauth/token", times=1, cut="before")
    with pytest.raises(BROKEN):
        refresh(ask, line["refresh_token"])
    control.clear_faults()
    control.fault("POST /oauth/token", times=1, cut="after")
    with pytest.raises(BROKEN):
        refresh(ask, line["refresh_token"])  # it still was good: the first one was not carried out

    assert refresh(ask, line["refresh_token"]).status_code == 400
    assert control.summary()["refresh_tokens_used_twice"] == 1


def test_a_body_trickles(ask: Ask, control: Control, token: str) -> None:
    control.fault("GET /athlete", trickle=0.001, body="[1,2,3]")
    assert ask(ATHLETE, token).json() == [1, 2, 3]


def test_a_client_does_not_wait_for_ever(ask: Ask, control: Control, token: str) -> None:
    control.fault("GET /athlete", delay=60)
    with pytest.raises(requests.ReadTimeout):
        ask(ATHLETE, token, timeout=0.05)

    control.clear_faults()
    assert ask(ATHLETE, token).status_code == 200
    assert [entry["status"] for entry in control.ledger()] == [0, 200]


def test_a_delay_comes_before_the_true_answer(ask: Ask, control: Control, token: str) -> None:
    control.fault("GET /athlete", delay=0.05)
    assert ask(ATHLETE, token).json()["username"] == "alice"
    (entry,) = control.ledger()
    assert 0.05 <= entry["ended"] - entry["started"] < 5


def test_a_list_never_ends(ask: Ask, control: Control, token: str) -> None:
    control.fault("GET /athlete/activities", endless=True)
    pages = [ask(LIST, token, params={"page": page, "before": 1}).json() for page in (1, 2, 900)]
    assert pages[0] == pages[1] == pages[2] == control.truth("alice")[:30]


def test_a_fault_may_not_count(ask: Ask, control: Control, token: str) -> None:
    control.fault("GET /athlete", times=1, status=502, count=False)
    assert ask(ATHLETE, token).headers["X-RateLimit-Usage"] == "0,0"
    assert ask(ATHLETE, token).headers["X-RateLimit-Usage"] == "1,1"


@pytest.mark.parametrize(
    ("match", "options", "sentence"),
    [
        ("GET /athlete", {}, "a fault does something"),
        ("GET /atlete", {"status": 500}, "fits no route"),
        ("GET /athlete", {"status": 99}, "status: 99"),
        ("GET /athlete", {"cut": "sometimes"}, "cut: 'sometimes'"),
        ("GET /athlete", {"stauts": 500}, "no option 'stauts'"),
        ("GET /athlete", {"status": "500"}, "status: '500' is not int"),
        ("GET /athlete", {"delay": -1}, "less than 0"),
        ("GET /athlete", {"status": 500, "person": "nobody"}, "no person 'nobody'"),
        ("GET /athlete", {"headers": {"Content-Length": "3"}}, "headers"),
        ("GET /athlete", {"headers": {"X": "a\nb"}}, "headers"),
    ],
)
def test_faults_that_make_no_sense(
    control: Control, match: str, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(Refused, match=sentence):
        control.fault(match, **options)
    assert control.faults() == []


def test_a_held_request_waits_and_is_seen_to_overlap(ask: Ask, control: Control, token: str) -> None:
    with control.hold("GET /athlete/activities", person="alice", times=2) as gate:
        asking = [Asking(control, LIST, token) for _ in range(2)]
        gate.wait_until_reached(2)
        assert ask(LIST, token).status_code == 200  # the third is not held, and open beside both
        assert control.summary()["open"] == 2
        assert [entry["status"] for entry in control.ledger()] == [200]
        gate.release()
        for one in asking:
            one.join(10)

    assert [one.status for one in asking] == [200, 200]
    summary = control.summary()
    assert (summary["open"], summary["overlaps"], summary["most_at_once"]) == (0, 3, {"alice": 3})


def test_a_held_request_counts_where_it_came(ask: Ask, control: Control, token: str) -> None:
    with control.hold("GET /athlete") as gate:
        asking = Asking(control, ATHLETE, token)
        gate.wait_until_reached()
        control.step(900)
    asking.join(10)

    assert asking.status == 200
    assert ask(ATHLETE, token).headers["X-ReadRateLimit-Usage"] == "1,2"


def test_a_client_that_leaves_a_hold_is_written_down(ask: Ask, control: Control, token: str) -> None:
    with control.hold("GET /athlete") as gate:
        with pytest.raises(requests.ReadTimeout):
            ask(ATHLETE, token, timeout=0.05)
        gate.wait_until_reached()

    assert [(e["status"], e["person"], e["kind"]) for e in control.ledger()] == [(0, "alice", "read")]
