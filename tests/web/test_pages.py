"""The pages: everything is explained, nothing secret is shown, hostile text stays text."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timedelta
from html import unescape
from typing import Any

import pytest
from dramatiq.brokers.redis import RedisBroker
from fastapi import FastAPI
from sqlalchemy import insert
from starlette.testclient import TestClient

from lifelogger import status, webhooks
from lifelogger.connections import add_user
from lifelogger.runtime import Runtime
from lifelogger.status import moment
from lifelogger.store.models import Endpoint, Tick
from lifelogger.web import render
from lifelogger.web.app import create_app
from tests.live import tuned
from tests.web.people import ACCESS_TOKEN, REFRESH_TOKEN, change, connect, ran, read_stream, recorded

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


def text(page: str) -> str:
    """What a person reads: no tags, single spaces."""
    return " ".join(re.sub(r"<[^>]+>", " ", page).split())


def test_everything_is_explained(client: TestClient, runtime: Runtime) -> None:
    """Promise 12: when it last synced, what it brought, what it cost, why it is waiting and until when."""
    now = runtime.clock()
    last, until = now - timedelta(minutes=10), now + timedelta(hours=2, minutes=1)
    reason = "the day's budget of Strava is spent"
    connection = connect(
        runtime, "ann", last_sync_at=last, next_sync_at=until, wait_reason=reason, news_at=None
    )
    ran(runtime, connection, inserted=3, updated=1, requests=17)
    ran(runtime, connection, outcome="deferred", message=reason, requests=5)
    read_stream(
        runtime, connection, backlog_since=now - timedelta(days=900), backlog_until=now - timedelta(days=90)
    )
    recorded(runtime, connection)

    page = client.get("/users/ann").text
    said = text(page)
    sentence = f"Waiting until {moment(until, now)}: {reason}."
    assert sentence in said.replace("&#39;", "'")
    assert "Last synced 10 minutes ago" in said
    assert f'title="{last.isoformat()}"' in page
    assert "Next sync in 2 hours" in said
    assert f'title="{until.isoformat()}"' in page
    assert "3 new, 1 changed 17 4 seconds" in said
    assert "deferred the day&#39;s budget of Strava is spent nothing new 5 4 seconds" in said
    assert f"history is here back to {now - timedelta(days=90):%Y-%m-%d}" in said
    assert "Holds 1 record" in said

    (connection_said,) = (told := client.get("/api/users/ann").json())["connections"]
    assert connection_said["sentence"] == sentence
    assert connection_said["last_sync_at"] == last.isoformat()
    assert (connection_said["wait_reason"], connection_said["next_sync_at"]) == (reason, until.isoformat())
    assert [(run["inserted"], run["updated"], run["requests"]) for run in told["runs"]] == [
        (0, 0, 5),
        (3, 1, 17),
    ]

    overview = text(client.get("/").text)
    assert f"1 connection waiting 1 until {moment(until, now)}" in overview
    assert "Last synced 10 minutes ago" in overview
    assert "reads, 100 requests per 15 minutes" in overview
    assert "reads, 1,000 requests per day" in overview


def test_the_plan_says_who_is_next_and_why(client: TestClient, runtime: Runtime) -> None:
    due = runtime.clock() + timedelta(minutes=9)
    connect(runtime, EVIL, next_sync_at=due, news_at=None)

    page = client.get("/plan").text

    assert "<script>" not in page
    said = unescape(text(page))
    assert "No tick has reckoned with its budget yet" in said
    assert "There are requests for everybody, every 15 minutes." in said
    assert f'title="{due.isoformat()}"' in page


SENTENCES: list[tuple[dict[str, Any], str]] = [
    (
        {"status": "needs_reauth", "status_reason": "Strava took it back", "next_sync_at": None},
        "Has to sign in again:",
    ),
    ({"claimed_at": timedelta(0), "next_sync_at": timedelta(minutes=9)}, "A sync is on its way since"),
    ({"next_sync_at": timedelta(minutes=9)}, "Up to date; due again at"),
    ({}, "Due: the next tick takes it"),
]


def test_an_import_has_a_bar_and_a_sentence_without_scripts(client: TestClient, runtime: Runtime) -> None:
    now, connection = runtime.clock(), connect(runtime, "ann")
    left = {"backlog_since": now - timedelta(days=100), "backlog_until": now - timedelta(days=25)}
    read_stream(runtime, connection, cursor=now, **left)
    for minutes, days in ((40, 10), (20, 5)):
        ended = now - timedelta(minutes=minutes)
        ran(runtime, connection, started_at=ended, ended_at=ended, history_s=days * 86400, requests=4)

    page = client.get("/users/ann").text

    assert '<progress max="1" value="0.25"' in page
    assert (
        f"The past is here back to {left['backlog_until']:%Y-%m-%d}, and goes back to "
        f"{left['backlog_since']:%Y-%m-%d} (25 %): 0 records for 8 requests. It takes about 10 hours more."
    ) in text(page)
    assert 'http-equiv="refresh"' in page
    assert "Still importing their past: 1 connection." in text(client.get("/").text)


def test_a_round_over_the_past_has_a_sentence(client: TestClient, runtime: Runtime) -> None:
    now = runtime.clock()
    connection = connect(runtime, "ann", news_at=None)
    began, ended = now - timedelta(days=2), now - timedelta(days=31)
    read_stream(
        runtime,
        connection,
        recheck_at=now,
        recheck_began_at=began,
        recheck_until=began - timedelta(days=107),
        recheck_ended_at=ended,
    )
    recorded(runtime, connection, ordered_at=began - timedelta(days=207))

    said = text(client.get("/users/ann").text)

    assert f"is being read again since {began:%Y-%m-%d}: 50 % so far." in said
    assert f"The last round ended on {ended:%Y-%m-%d}." in said
    assert "What is older than 7 days is read again for edits and deletions;" in text(client.get("/").text)


def test_webhooks_in_and_out_say_how_they_stand(
    app: FastAPI, client: TestClient, runtime: Runtime, broker: RedisBroker, visit: Callable[..., TestClient]
) -> None:
    webhooks.note_fault(runtime, "strava", "Strava refused it (403)")
    url = "https://user:hush-password@other.example/hush-path"
    told = tuned(runtime, notify={"urls": (url,)})
    digest = status.digest_of(url)
    then = runtime.clock() + timedelta(minutes=5)
    with runtime.store.write() as db:
        row = {"cursor": 0, "failures": 3, "next_try_at": then, "reason": "refuses it (500)"}
        db.execute(insert(Endpoint).values(digest=digest, created_at=then, **row))

    page = visit(create_app(told, broker)).get("/").text

    assert "Whom we tell of changes" in page
    assert "other.example It refuses it (500), 3 times in a row; tried again at " in text(page)
    assert "The last check of its webhooks failed: Strava refused it (403). `lifelogger webhooks" in text(
        page
    )
    assert "hush" not in page
    assert digest not in page
    assert "Whom we tell of changes" not in client.get("/").text


def test_each_state_is_a_sentence(client: TestClient, runtime: Runtime) -> None:
    now = runtime.clock()
    for values, sentence in SENTENCES:
        moved = {key: now + each if isinstance(each, timedelta) else each for key, each in values.items()}
        connect(runtime, "ann", **moved)
        assert sentence in text(client.get("/users/ann").text)
        assert sentence in text(client.get("/users").text)


def test_no_secret_is_on_any_page(
    client: TestClient, runtime: Runtime, broker: RedisBroker, token: str
) -> None:
    """Promise 10, for the pages, the API and the dashboard."""
    connection = connect(runtime, "ann")
    ran(runtime, connection)
    recorded(runtime, connection)
    client.post("/users/ann/sync")
    key = (runtime.settings.var / "encryption.key").read_text().strip()
    jobs: Any = broker.client.hkeys(f"{runtime.settings.redis.prefix}:now.msgs")
    pages = [
        "/", "/users", "/users/ann", "/runs", "/login", "/nowhere", "/healthz", "/api/status", "/api/users",
        "/api/users/ann", "/api/users/ann/records", "/api/runs", "/api/openapi.json", "/dashboard/",
        "/dashboard/queues/now", f"/dashboard/queues/now/standard/{jobs[0].decode()}",
    ]  # fmt: skip
    assert "sync_user_now" in client.get(pages[-1]).text
    for path in pages:
        shown = client.get(path).text
        for secret in (ACCESS_TOKEN, REFRESH_TOKEN, key, token, "gAAAA"):
            assert secret not in shown, path


def test_hostile_text_stays_text(client: TestClient, runtime: Runtime) -> None:
    soon = runtime.clock() + timedelta(hours=1)
    connection = connect(
        runtime, EVIL, wait_reason=EVIL, next_sync_at=soon, provider_user_id=EVIL, scopes=[EVIL]
    )
    read_stream(runtime, connection, off_reason=EVIL)
    ran(runtime, connection, outcome="failed", message=EVIL, trigger="hook")
    address = f"/users/{render.segment(EVIL)}"
    for path in (
        "/",
        "/users",
        address,
        "/runs",
        f"/users?search={render.segment(EVIL)}",
        "/users?search=zz" + EVIL,
    ):
        reply = client.get(path)
        assert reply.status_code == 200, path
        assert "&lt;script&gt;" in reply.text
        assert "<script" not in reply.text
        assert "<img src=x" not in reply.text


def test_any_id_has_its_page_and_its_button(client: TestClient, runtime: Runtime) -> None:
    ids = ["a/b", "a b", "çé 走", "a%2Fb", "a?b#c", "..x", "ann", "ann/sync", "'", "\\", "😀"]
    for user_id in ids:
        connect(runtime, user_id)
    links = re.findall(r'href="(/users/[^"]+)"', client.get("/users").text)
    assert len(links) == len(ids)
    seen = set()
    for link in links:
        page = client.get(link).text
        seen.add(unescape(re.findall(r"<h1>(.*)</h1>", page)[0]))
        (action,) = re.findall(r'action="(/users/[^"]+)"', page)
        reply = client.post(action)
        assert reply.headers["location"] == f"{link}?asked=1"
        assert "1 connection will look" in client.get(reply.headers["location"]).text
        leaving = re.findall(r'action="(/users/[^"]+)"', client.get(f"{link}/leave").text)
        assert [client.post(action).status_code for action in leaving] == [303, 303]
        assert client.get(link).status_code == 404
    assert seen == set(ids)


def test_sync_now_tells_a_worker(client: TestClient, runtime: Runtime, broker: RedisBroker) -> None:
    connect(runtime, "ann")
    client.post("/users/ann/sync")
    (message,) = broker.client.hvals(f"{runtime.settings.redis.prefix}:now.msgs")
    assert b'"actor_name":"sync_user_now","args":["ann","asked"]' in message


def test_sync_now_says_which_run_it_joins(client: TestClient, runtime: Runtime) -> None:
    ran(runtime, connect(runtime, "ann"), outcome="running", ended_at=None)
    reply = client.post("/users/ann/sync")
    said = text(client.get(reply.headers["location"]).text)
    assert "1 connection will look. A sync that is running now looks again before it ends." in said


def test_the_page_looks_often_while_something_is_about_to_come(client: TestClient, runtime: Runtime) -> None:
    def seconds() -> str:
        return re.findall(r'http-equiv="refresh" content="(\d+)', client.get("/users/ann").text)[0]

    connection = connect(runtime, "ann")  # is due, and somebody waits for it
    assert seconds() == "5"
    change(runtime, connection, next_sync_at=runtime.clock() + timedelta(minutes=10))
    assert seconds() == "30"
    ran(runtime, connection, outcome="running", ended_at=None)
    assert seconds() == "5"


def test_what_was_not_granted_can_be_asked_for_again(client: TestClient, runtime: Runtime) -> None:
    connection = connect(runtime, "ann", scopes=["read"])
    page = client.get("/users/ann").text
    assert "Granted read; not activity:read_all ( connect again )" in text(page)
    assert '<a href="/connect/strava?user=ann&amp;next=%2Fusers%2Fann">connect' in page
    change(runtime, connection, scopes=["read", "https://api.example.com/auth/activity:read_all"])
    assert "Granted read, activity:read_all;" in text(client.get("/users/ann").text)
    change(runtime, connection, scopes=["read", "activity:read_all"])
    assert "connect again" not in text(client.get("/users/ann").text)


@pytest.mark.parametrize("user_id", ["ann", "a/b ü"])
def test_a_user_is_added_on_the_page(client: TestClient, user_id: str) -> None:
    for _ in range(2):  # who is there already is shown
        reply = client.post("/users", data={"user_id": user_id})
        assert reply.status_code == 303
        page = client.get(reply.headers["location"])
        assert f"<h1>{user_id}</h1>" in page.text


@pytest.mark.parametrize("user_id", ["", "a\x00b", "a\n", "\x7f", "x" * 201])
def test_what_cannot_be_an_id_is_refused_in_words(client: TestClient, user_id: str) -> None:
    reply = client.post("/users", data={"user_id": user_id})
    assert reply.status_code == 422
    assert "1 to 200 printable characters" in reply.text


def test_sync_now_says_when_there_is_nothing_to_sync(client: TestClient, runtime: Runtime) -> None:
    add_user(runtime, "ann")
    reply = client.post("/users/ann/sync")
    assert "Nothing can be synced" in client.get(reply.headers["location"]).text


def test_an_unknown_user_is_a_sentence(client: TestClient) -> None:
    for path in ("/users/nobody", "/users/%00", "/users/a/b"):
        reply = client.get(path)
        assert reply.status_code == 404
        assert "There is no such" in reply.text
        assert "nobody" not in reply.text


def test_a_wrong_parameter_is_a_sentence(client: TestClient) -> None:
    for path in ("/runs?before=x", "/runs?before=0", "/users?search=%00", "/users/ann?asked=-1"):
        reply = client.get(path)
        assert reply.status_code == 422
        assert "That cannot be read" in reply.text


def test_users_are_found_by_the_beginning_of_their_id_and_in_pages(
    client: TestClient, runtime: Runtime
) -> None:
    for number in range(60):
        add_user(runtime, f"u{number:02}")
    add_user(runtime, "other%")

    def shown(path: str) -> list[str]:
        return re.findall(r'href="/users/([^"?]+)"', client.get(path).text)

    assert shown("/users?search=other%25") == ["other%25"]
    assert shown("/users?search=%25") == []
    first = shown("/users?search=u")
    assert (first[0], len(first)) == ("u00", 50)
    (onward,) = re.findall(r'href="(/users\?[^"]*after=[^"]+)"', client.get("/users?search=u").text)
    assert shown(onward.replace("&amp;", "&")) == [f"u{number}" for number in range(50, 60)]


def test_the_journal_goes_back_in_pages(client: TestClient, runtime: Runtime) -> None:
    connection = connect(runtime, "ann")
    for number in range(60):
        ran(runtime, connection, requests=number + 1000)
    newest = client.get("/runs").text
    (older,) = re.findall(r'href="(/runs\?before=\d+)"', newest)
    numbers = re.findall(r">1,0(\d\d)<", newest + client.get(older).text)
    assert numbers == [f"{number:02}" for number in reversed(range(60))]


def test_an_empty_table_says_what_will_appear_there(client: TestClient, runtime: Runtime) -> None:
    assert "Each user will appear here" in client.get("/users").text
    assert "will appear here" in client.get("/runs").text
    add_user(runtime, "ann")
    assert "Each account that this user connects will appear here" in client.get("/users/ann").text
    connect(runtime, "ann")
    assert "will appear here with the first sync" in client.get("/users/ann").text


def test_a_simulated_provider_says_so(client: TestClient, runtime: Runtime) -> None:
    assert runtime.settings.simulated
    assert "simulated by the sandbox" in client.get("/").text


def test_it_says_that_nothing_ticks_yet(client: TestClient, runtime: Runtime) -> None:
    assert "No tick has fired yet" in client.get("/").text
    now = runtime.clock()
    with runtime.store.write() as db:
        db.execute(insert(Tick).values(name="sync_active_users", due_at=now, fired_at=now, planned=2))
    page = client.get("/").text
    assert "No tick has fired yet" not in page
    assert "2 syncs planned" in page


def test_a_running_sync_has_neither_end_nor_result(client: TestClient, runtime: Runtime) -> None:
    ran(runtime, connect(runtime, "ann"), outcome="running", ended_at=None)
    assert "running nothing yet 0 –" in text(client.get("/users/ann").text)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "under a second"), (1, "1 second"), (59.9, "59 seconds"), (60, "1 minute"), (3600, "1 hour"),
        (86_400, "24 hours"), (172_800, "2 days"), (40_000_000, "462 days"), (70_000_000, "2 years"),
    ],
)  # fmt: skip
def test_durations_are_as_people_say_them(seconds: float, words: str) -> None:
    assert render.span(seconds) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(900, "15 minutes"), (3600, "hour"), (86_400, "day"), (90, "90 seconds"), (7200, "2 hours")],
)
def test_windows_are_named_by_their_length(seconds: int, words: str) -> None:
    assert render.per(seconds) == words
