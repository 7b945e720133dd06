"""Strava's limits: windows on the clock, per application, told on every reply."""

from __future__ import annotations

from email.utils import parsedate_to_datetime

import requests

from tests.sandbox.conftest import NOW, Ask
from tests.sandbox.control import Control

ATHLETE, TOKEN = "/api/v3/athlete", "/api/v3/oauth/token"
QUARTER = NOW // 900 * 900
EXCEEDED = {
    "message": "Rate Limit Exceeded",
    "errors": [{"resource": "Application", "field": "rate limit", "code": "exceeded"}],
}


def told(reply: requests.Response) -> tuple[str, str]:
    """Usage of reads and overall, as the headers say."""
    return reply.headers["X-ReadRateLimit-Usage"], reply.headers["X-RateLimit-Usage"]


def test_every_reply_tells_limits_usage_and_the_sandboxs_date(ask: Ask, control: Control, token: str) -> None:
    control.connect("bruno", scopes=["read"])
    narrow = control.connect("chiyo", scopes=["read"])[0]["access_token"]
    replies = [
        ask(ATHLETE, token),
        ask("/api/v3/athlete/activities", narrow),
        ask("/api/v3/nothing", token),
        ask(ATHLETE, "0" * 40),
        ask(TOKEN, method="POST", data={"client_id": "sandbox", "client_secret": "sandbox"}),
        ask("/api/v3/athlete/activities?page=0", token),
    ]

    assert [reply.status_code for reply in replies] == [200, 403, 404, 401, 400, 400]
    for reply in replies:
        assert reply.headers["X-ReadRateLimit-Limit"] == "100,1000"
        assert reply.headers["X-RateLimit-Limit"] == "200,2000"
        assert parsedate_to_datetime(reply.headers["Date"]).timestamp() == NOW
    assert [told(reply) for reply in replies] == [
        ("1,1", "1,1"),
        ("2,2", "2,2"),
        ("3,3", "3,3"),
        ("4,4", "4,4"),
        ("4,4", "5,5"),  # tokens are no reads
        ("5,5", "6,6"),
    ]


def test_windows_lie_on_the_clock(ask: Ask, control: Control, token: str) -> None:
    control.set_clock(QUARTER + 899)
    assert told(ask(ATHLETE, token))[0] == "1,1"
    control.set_clock(QUARTER + 900)
    assert told(ask(ATHLETE, token))[0] == "1,2"
    control.set_clock("2026-06-16T00:00:00Z")
    token = control.connect("alice")[0]["access_token"]
    assert told(ask(ATHLETE, token))[0] == "1,1"
    starts = [(w["start"], w["used"]) for w in control.summary()["windows"] if w["pool"] == "reads"]
    assert (QUARTER, 1) in starts
    assert (QUARTER + 900, 1) in starts


def test_over_the_limit_nothing_is_done_and_still_counted(ask: Ask, control: Control, token: str) -> None:
    control.limits(reads=[2, 1000])
    assert [ask(ATHLETE, token).status_code for _ in range(4)] == [200, 200, 429, 429]

    refused = ask(ATHLETE, token)

    assert refused.json() == EXCEEDED
    assert "Retry-After" not in refused.headers
    assert told(refused) == ("5,5", "5,5")
    assert refused.headers["X-ReadRateLimit-Limit"] == "2,1000"
    control.set_clock(QUARTER + 900)
    assert told(ask(ATHLETE, token)) == ("1,6", "1,6")
    assert control.summary()["by_status"] == {"200": 3, "429": 3}


def test_the_day_and_the_overall_limit_refuse_too(ask: Ask, control: Control) -> None:
    line = control.connect("alice")[0]
    form = {
        "client_id": "sandbox",
        "client_secret": "sandbox",
        "grant_type": "refresh_token",
        "refresh_token": line["refresh_token"],
    }
    control.limits(reads=[100, 1])
    assert [ask(ATHLETE, line["access_token"]).status_code for _ in range(2)] == [200, 429]
    assert ask(TOKEN, method="POST", data=form).status_code == 200
    control.limits(overall=[3, 2000])
    assert ask(TOKEN, method="POST", data=form).status_code == 429


def test_applications_have_limits_of_their_own_and_share_them_inside(ask: Ask, control: Control) -> None:
    mine = control.connect("alice")[0]["access_token"]
    other = control.connect("alice", client_id="other", client_secret="x")[0]["access_token"]

    assert control.spend(40) == {"reads": [40, 40], "overall": [40, 40]}
    control.spend(5, pool="overall")

    assert told(ask(ATHLETE, mine)) == ("41,41", "46,46")
    assert told(ask(ATHLETE, other)) == ("1,1", "1,1")
    assert control.summary()["most_in_a_window"] == {
        "overall": {"900": 46, "86400": 46},
        "reads": {"900": 41, "86400": 41},
    }


def test_what_people_see_in_a_browser_costs_nothing(ask: Ask, control: Control) -> None:
    assert "X-RateLimit-Usage" not in ask("/oauth/authorize").headers
    assert control.summary()["windows"] == []


def test_a_request_in_an_applications_own_name_is_counted_for_it(ask: Ask, control: Control) -> None:
    """Whoever signed in last; of one that nobody has heard of, that one pays."""
    control.connect("alice")
    control.connect("alice", client_id="other", client_secret="x")

    for client in ("sandbox", "stranger"):
        ask("/api/v3/push_subscriptions", params={"client_id": client, "client_secret": "sandbox"})

    assert [entry["client"] for entry in control.ledger()] == ["sandbox", "other"]
    assert {(each["client_id"], each["used"]) for each in control.summary()["windows"]} == {
        ("sandbox", 1),
        ("other", 1),
    }
