"""Outgoing webhooks: signed, in order, at least once, tried again at a time that is written down."""

from __future__ import annotations

import json
import logging
import random
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType
from typing import Any

import pytest
import requests
from sqlalchemy import delete, select, update
from standardwebhooks import Webhook, WebhookVerificationError

from lifelogger import client, doctor, leaving, notices, notify, status
from lifelogger.connections import import_lines
from lifelogger.runtime import Runtime
from lifelogger.status import as_json
from lifelogger.store import feed
from lifelogger.store.models import Endpoint, Record
from lifelogger.tokens import needs_reauth
from tests.live import change, tuned
from tests.test_changes import NOW, erase, item, lose, write

SECRET, OLD_SECRET = notify.new_secret(), notify.new_secret()
PASSWORD = "recognisable-password"


@dataclass
class Receiver:
    """Another application: what it was sent, and what it answers next (200, if nothing is said)."""

    url: str = ""
    got: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    answers: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    meanwhile: Callable[[], None] = lambda: None
    """What happens before it answers."""

    @property
    def ids(self) -> list[str]:
        return [headers["webhook-id"] for headers, _ in self.got]

    @property
    def changes(self) -> list[dict[str, Any]]:
        return [change for _, body in self.got for change in json.loads(body)["data"]["changes"]]


@pytest.fixture
def serve() -> Iterator[Callable[[], Receiver]]:
    servers = []

    def start() -> Receiver:
        receiver = Receiver()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.got.append(({name.lower(): value for name, value in self.headers.items()}, body))
                receiver.meanwhile()
                status, headers = receiver.answers.pop(0) if receiver.answers else (200, {})
                self.send_response(status)
                for name, value in {"content-length": "0", **headers}.items():
                    self.send_header(name, value)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        receiver.url = f"http://user:{PASSWORD}@127.0.0.1:{server.server_port}/hook"
        return receiver

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def receiver(serve: Callable[[], Receiver]) -> Receiver:
    return serve()


@pytest.fixture
def now() -> list[datetime]:
    """The clock: its only item."""
    return [datetime.now(UTC)]


@pytest.fixture
def rt(runtime: Runtime, receiver: Receiver, now: list[datetime]) -> Runtime:
    """With two people who are connected, and one endpoint that hears of what comes."""
    rt = pointed_at(replace(runtime, clock=lambda: now[0]), receiver)
    lines = [
        {"user_id": person, "provider": "strava", "access_token": "a", "expires_at": 1900000000}
        for person in ("ann", "bob")
    ]
    import_lines(rt, map(json.dumps, lines))
    notify.deliver(rt)
    return rt


def pointed_at(rt: Runtime, *receivers: Receiver, secrets: tuple[str, ...] = (SECRET,)) -> Runtime:
    section = type(rt.settings.notify)(urls=[each.url for each in receivers], secrets=secrets)
    return tuned(rt, notify=section.__dict__)


def row(rt: Runtime) -> Any:
    with rt.store.read() as db:
        return db.execute(select(Endpoint.__table__)).one()


# What is sent -----------------------------------------------------------------------------------------------


def test_what_changed_is_sent_as_the_feed_has_it_without_the_payloads(
    rt: Runtime, receiver: Receiver
) -> None:
    write(rt, "ann", item(1), item(2))
    lose(rt, "ann", "2")
    erase(rt, "bob")

    notify.deliver(rt)

    expected = as_json(client.changes(runtime=rt).changes)
    for each in expected:
        if each["record"]:
            del each["record"]["raw"]
    assert receiver.changes == expected
    assert [change["action"] for change in expected] == ["upsert", "delete", "erase"]


def test_it_is_a_standard_webhook(rt: Runtime, receiver: Receiver) -> None:
    """Their own library is the judge: the id, the time and every byte of the body are signed."""
    write(rt, "ann", item(1))

    notify.deliver(rt)

    [(headers, body)] = receiver.got
    told = Webhook(SECRET).verify(body, headers)
    assert (told["type"], told["data"]["next"]) == ("records.changed", client.newest_cursor(runtime=rt))
    assert told["timestamp"] == told["data"]["changes"][-1]["at"]
    assert headers["content-type"] == "application/json"
    assert "authorization" in headers, "the address has a password"
    forged = [
        (Webhook(OLD_SECRET), headers, body),
        (Webhook(SECRET), headers, body + b" "),
        (Webhook(SECRET), {**headers, "webhook-id": "msg_other"}, body),
    ]
    for judge, theirs, sent in forged:
        with pytest.raises(WebhookVerificationError):
            judge.verify(sent, theirs)


def test_every_secret_signs_so_that_one_can_be_replaced(rt: Runtime, receiver: Receiver) -> None:
    write(rt, "ann", item(1))

    notify.deliver(pointed_at(rt, receiver, secrets=(SECRET, OLD_SECRET)))

    [(headers, body)] = receiver.got
    for secret in (SECRET, OLD_SECRET):
        Webhook(secret).verify(body, headers)


def test_a_new_endpoint_hears_of_what_comes_and_not_of_the_past(
    rt: Runtime, receiver: Receiver, serve: Callable[[], Receiver]
) -> None:
    write(rt, "ann", item(1))
    another = serve()

    notify.deliver(pointed_at(rt, another))
    assert another.got == []

    write(rt, "ann", item(2))
    notify.deliver(pointed_at(rt, another))
    assert [change["external_id"] for change in another.changes] == ["2"]


def test_nothing_new_is_no_request(rt: Runtime, receiver: Receiver) -> None:
    write(rt, "ann", item(1))
    notify.deliver(rt)

    notify.deliver(rt)
    write(rt, "ann", item(1))
    notify.deliver(rt)

    assert len(receiver.got) == 1


def test_many_changes_come_in_pages_and_in_order(rt: Runtime, receiver: Receiver) -> None:
    write(rt, "ann", *map(item, range(120)))
    receiver.meanwhile = lambda: None if len(receiver.got) > 1 else write(rt, "bob", item(7))

    notify.deliver(rt)

    assert [len(json.loads(body)["data"]["changes"]) for _, body in receiver.got] == [50, 50, 21]
    assert [change["external_id"] for change in receiver.changes] == [*map(str, range(120)), "7"]


# At least once ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [500, 503, 400, 410, 300, 302, 308])
def test_a_refusal_is_tried_again_when_its_time_has_come(
    rt: Runtime, receiver: Receiver, now: list[datetime], status: int
) -> None:
    write(rt, "ann", item(1))
    receiver.answers = [(status, {"location": "/elsewhere"})]

    notify.deliver(rt)
    notify.deliver(rt)
    assert len(receiver.got) == 1, "its time has not come, and nobody follows it elsewhere"
    assert row(rt).failures == 1
    assert str(status) in row(rt).reason

    now[0] = row(rt).next_try_at
    notify.deliver(rt)

    assert len(receiver.got) == 2
    assert receiver.ids[0] == receiver.ids[1], "it is the same message"
    assert (row(rt).failures, row(rt).next_try_at, row(rt).reason) == (0, None, None)
    assert row(rt).delivered_at == now[0]


def test_who_does_not_answer_is_tried_later_and_later_but_for_ever(
    rt: Runtime, receiver: Receiver, now: list[datetime], monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(*_: Any, **__: Any) -> None:
        raise requests.ConnectionError(f"http://user:{PASSWORD}@127.0.0.1/")

    write(rt, "ann", item(1))
    monkeypatch.setattr(random, "uniform", lambda low, high: 1.0)
    with monkeypatch.context() as away:
        away.setattr(notify.Session, "post", nobody)
        waits = []
        for _ in range(12):
            notify.deliver(rt)
            waits.append((row(rt).next_try_at - now[0]) / timedelta(minutes=1))
            now[0] = row(rt).next_try_at
    notify.deliver(rt)

    assert waits == [1, 2, 4, 8, 16, 32, 64, 128, 256, 360, 360, 360]
    assert [change["external_id"] for change in receiver.changes] == ["1"]


@pytest.mark.parametrize(
    ("wait", "minutes"), [("600", 10), ("1", 1), ("99999999", 1), ("soon", 1), ("999999", 432)]
)
def test_who_says_when_is_not_asked_before(
    rt: Runtime,
    receiver: Receiver,
    now: list[datetime],
    monkeypatch: pytest.MonkeyPatch,
    wait: str,
    minutes: int,
) -> None:
    """Within reason: an endpoint cannot put itself to sleep for days."""
    monkeypatch.setattr(random, "uniform", lambda low, high: 1.0)
    write(rt, "ann", item(1))
    receiver.answers = [(429, {"retry-after": wait})]

    notify.deliver(rt)

    assert row(rt).next_try_at - now[0] == timedelta(minutes=minutes)


def test_who_dies_before_it_is_written_down_sends_the_same_message_again(
    rt: Runtime, receiver: Receiver, now: list[datetime], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A minute later: who held us up until we were ended shall not come first again."""

    def dies(*_: Any, **__: Any) -> bool:
        raise KeyboardInterrupt

    write(rt, "ann", item(1))
    with monkeypatch.context() as killed:
        killed.setattr(notify, "_advance", dies)
        with pytest.raises(KeyboardInterrupt):
            notify.deliver(rt)
    notify.deliver(rt)
    assert len(receiver.ids) == 1
    now[0] += timedelta(minutes=1)
    notify.deliver(rt)

    assert receiver.ids[0] == receiver.ids[1]
    assert receiver.got[0][1] == receiver.got[1][1]


def test_what_comes_in_between_makes_it_another_message(
    rt: Runtime, receiver: Receiver, now: list[datetime]
) -> None:
    """Or who drops a double would drop what is new in it."""
    write(rt, "ann", item(1))
    receiver.answers = [(500, {})]
    notify.deliver(rt)
    write(rt, "ann", item(2))

    now[0] = row(rt).next_try_at
    notify.deliver(rt)

    assert len(set(receiver.ids)) == 2


def test_an_endpoint_that_fails_keeps_no_other_waiting(
    rt: Runtime, receiver: Receiver, serve: Callable[[], Receiver]
) -> None:
    another = serve()
    both = pointed_at(rt, receiver, another)
    notify.deliver(both)
    write(rt, "ann", *map(item, range(60)))
    receiver.answers = [(500, {})]

    notify.deliver(both)

    assert (len(receiver.got), len(another.got)) == (1, 2)


def test_two_at_once_send_twice_but_leave_nothing_out(rt: Runtime, receiver: Receiver) -> None:
    """The lock keeps them apart; should it be lost, the cursor goes forward only."""
    write(rt, "ann", *map(item, range(60)))
    rushed = [False]

    def another() -> None:
        if not rushed[0]:
            rushed[0] = True
            notify.deliver(rt)

    receiver.meanwhile = another
    notify.deliver(rt)

    assert {change["external_id"] for change in receiver.changes} == set(map(str, range(60)))
    assert str(row(rt).cursor) == client.newest_cursor(runtime=rt)


def test_after_a_restored_backup_everything_is_told_once_more(rt: Runtime, receiver: Receiver) -> None:
    write(rt, "ann", item(1))
    with rt.store.write() as db:
        db.execute(update(Endpoint).values(cursor=1000))

    notify.deliver(rt)

    assert [change["external_id"] for change in receiver.changes] == ["1"]


def test_what_was_erased_before_it_was_told_is_told_as_an_erasure_only(
    rt: Runtime, receiver: Receiver
) -> None:
    write(rt, "ann", item(1))
    with rt.store.write() as db:
        feed.mark_erased(db, "ann", None, rt.clock())
        db.execute(delete(Record))

    notify.deliver(rt)

    assert [(change["action"], change["user_id"]) for change in receiver.changes] == [("erase", "ann")]


# Signing in again -------------------------------------------------------------------------------------------


def end(rt: Runtime, person: str, reason: str = "Strava has ended the authorisation") -> None:
    """A sync finds that the person has to sign in again."""
    change(rt, person, **needs_reauth(reason, rt.clock()))


def sign_in(rt: Runtime, person: str) -> None:
    line = {"user_id": person, "provider": "strava", "access_token": "b", "expires_at": 1900000000}
    import_lines(rt, [json.dumps(line)])


def bodies(receiver: Receiver) -> list[dict[str, Any]]:
    return [json.loads(body) for _, body in receiver.got]


def test_who_has_to_sign_in_again_is_a_message_of_its_own_in_its_place(
    rt: Runtime, receiver: Receiver, now: list[datetime]
) -> None:
    write(rt, "ann", item(1), item(2))
    end(rt, "bob")
    notices.publish(rt)
    write(rt, "ann", item(3))

    notify.deliver(rt)

    first, notice, last = bodies(receiver)
    assert [each["external_id"] for each in first["data"]["changes"]] == ["1", "2"]
    assert [each["external_id"] for each in last["data"]["changes"]] == ["3"]
    assert notice == {
        "type": "connection.sign_in_again",
        "timestamp": now[0].isoformat(),
        "data": {
            "user_id": "bob",
            "provider": "strava",
            "reason": "Strava has ended the authorisation",
            "next": str(int(first["data"]["next"]) + 1),
        },
    }
    assert len(set(receiver.ids)) == 3
    for headers, body in receiver.got:
        Webhook(SECRET).verify(body, headers)


def test_it_is_told_once_to_each_endpoint_for_each_time(
    rt: Runtime, receiver: Receiver, serve: Callable[[], Receiver]
) -> None:
    another = serve()
    both = pointed_at(rt, receiver, another)
    notify.deliver(both)
    for _ in range(2):
        end(rt, "ann")
        for _ in range(3):
            notify.deliver(both)
        sign_in(rt, "ann")
        notify.deliver(both)

    for each in (receiver, another):
        assert [body["type"] for body in bodies(each)] == [
            "connection.sign_in_again",
            "connection.signed_in",
        ] * 2


@pytest.mark.parametrize("dies", ["before it is sent", "before it is written down"])
def test_a_crash_neither_loses_it_nor_has_the_hook_called_twice(
    rt: Runtime,
    receiver: Receiver,
    now: list[datetime],
    monkeypatch: pytest.MonkeyPatch,
    dies: str,
) -> None:
    """The hook and the endpoints have a mark each."""
    told: list[notices.SignInNeeded] = []
    host = ModuleType("host_of_this_test")
    host.tell = told.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "host_of_this_test", host)
    hooked = tuned(rt, hooks={"sign_in_again": "host_of_this_test:tell"})
    end(rt, "ann")
    notices.tell(hooked)

    def killed(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as dying:
        if dies == "before it is sent":
            dying.setattr(notify.Session, "post", killed)
        else:
            dying.setattr(notify, "_advance", killed)
        with pytest.raises(KeyboardInterrupt):
            notify.deliver(hooked)
    now[0] += timedelta(minutes=1)
    notify.deliver(hooked)
    notices.tell(hooked)
    notify.deliver(hooked)

    assert len(told) == 1
    assert {body["type"] for body in bodies(receiver)} == {"connection.sign_in_again"}
    assert len(receiver.got) == (1 if dies == "before it is sent" else 2)
    assert len(set(receiver.ids)) == 1, "it is the same message"


def test_who_has_signed_in_before_it_could_be_told_is_not_told_to(
    rt: Runtime, receiver: Receiver, now: list[datetime]
) -> None:
    end(rt, "ann")
    receiver.answers = [(500, {})]
    notify.deliver(rt)
    sign_in(rt, "ann")
    now[0] = row(rt).next_try_at
    notify.deliver(rt)

    assert [body["type"] for body in bodies(receiver)] == [
        "connection.sign_in_again",
        "connection.signed_in",
    ]
    assert receiver.ids[0] != receiver.ids[1]


def test_who_was_erased_is_not_told_of(rt: Runtime, receiver: Receiver) -> None:
    end(rt, "ann")
    notices.publish(rt)
    leaving.erase(rt, "ann")

    notify.deliver(rt)

    assert [(each["action"], each["user_id"]) for each in receiver.changes] == [("erase", "ann")]


def test_a_change_in_between_does_not_mix_the_messages(
    rt: Runtime, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page is read again up to the notice, and a record of it has gone behind the notice meanwhile."""
    write(rt, "ann", item(1), item(2))
    end(rt, "bob")
    notices.publish(rt)
    changes, meanwhile = client.changes, [lambda: write(rt, "ann", item(2, "Evening"))]

    def later(*arguments: Any, **options: Any) -> client.Changes:
        page = changes(*arguments, **options)
        if meanwhile:
            meanwhile.pop()()
        return page

    monkeypatch.setattr(client, "changes", later)
    notify.deliver(rt)

    assert [body["type"] for body in bodies(receiver)] == [
        "records.changed",
        "connection.sign_in_again",
        "records.changed",
    ]
    assert [each["external_id"] for body in bodies(receiver)[::2] for each in body["data"]["changes"]] == [
        "1",
        "2",
    ]


# What is told of it -----------------------------------------------------------------------------------------


def test_no_log_and_no_row_has_the_address_or_a_persons_data(
    rt: Runtime, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lifelogger")
    write(rt, "ann", item(1, "recognisable title"))
    receiver.answers = [(500, {})]

    notify.deliver(rt)

    assert "127.0.0.1 refuses it (500): tried again in" in caplog.text
    for text in (caplog.text, repr(row(rt)), repr(rt.settings.notify), repr(status.endpoints(rt))):
        for secret in (PASSWORD, "/hook", "recognisable title", "ann", SECRET):
            assert secret not in text


def test_how_each_endpoint_stands(rt: Runtime, receiver: Receiver, now: list[datetime]) -> None:
    write(rt, "ann", item(1))
    [before] = status.endpoints(rt)
    notify.deliver(rt)
    [after] = status.endpoints(rt)

    assert (before["behind"], before["behind_since"], before["delivered_at"]) == (True, NOW, None)
    assert after == {
        "host": "127.0.0.1",
        "delivered_at": now[0],
        "behind": False,
        "behind_since": None,
        "failures": 0,
        "next_try_at": None,
        "reason": None,
        "sentence": "Up to date.",
    }


def test_an_endpoint_in_trouble_says_so_without_its_address(
    rt: Runtime, receiver: Receiver, now: list[datetime]
) -> None:
    write(rt, "ann", item(1))
    receiver.answers = [(500, {}), (500, {})]
    for _ in range(2):
        notify.deliver(rt)
        now[0] = row(rt).next_try_at

    [told] = status.overview(rt)["notify"]

    again = status.moment(now[0], now[0])
    since = status.moment(NOW, now[0])
    assert told["sentence"] == (
        f"It refuses it (500), 2 times in a row; tried again at {again}. "
        f"It waits for what changed since {since}."
    )
    [found] = list(doctor.notify(rt))
    assert found.ok is False
    assert found.sentence == (
        f"127.0.0.1: {told['sentence']} Is its address in notify.urls right, and does it answer 2xx?"
    )
    for text in (repr(told), repr(found)):
        assert PASSWORD not in text
        assert "/hook" not in text
