"""The network as providers get it: the budget around each request, an error for each trouble, no token."""

from __future__ import annotations

import gzip
import json
import logging
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import requests
import urllib3
from hypothesis import example, given
from hypothesis import strategies as st

from lifelogger import http as module
from lifelogger.budget import Budget
from lifelogger.errors import (
    AccountRefused,
    BudgetSpent,
    LifeloggerError,
    NotThere,
    Refused,
    SignInAgain,
    Unavailable,
    Wait,
)
from lifelogger.http import LONGEST_WAIT, MOST_REDIRECTS, Http, call_token_endpoint, read_json
from lifelogger.providers.base import Usage, http_date
from lifelogger.providers.strava import Strava
from lifelogger.settings import Settings
from tests.conftest import pointed_at
from tests.live import LIST, NOON, TOKEN
from tests.sandbox.control import Control

PATH = "/athlete/activities"
SECRET = "secret-access-token"
STRAVA = Strava()


class Client:
    """Requests of one person to the sandbox or to another server, with what they need."""

    def __init__(self, settings: Settings, budget: Budget, clock: Callable[[], datetime]) -> None:
        self.settings, self.budget, self.clock = settings, budget, clock
        self.renewed: list[str] = []

    def http(self, token: str = SECRET, renew: Callable[[str], str] | None = None, **limits: Any) -> Http:
        return Http(
            STRAVA,
            self.settings.providers["strava"],
            self.settings.http.model_copy(update=limits),
            self.budget,
            1,
            token,
            renew or self.refuse,
            self.clock,
        )

    def refuse(self, refused: str) -> str:
        self.renewed.append(refused)
        raise SignInAgain("no")

    def get(self, *, token: str = SECRET, **limits: Any) -> Any:
        return self.http(token, **limits).get(PATH, page=1, per_page=2)

    def call_token_endpoint(self) -> Any:
        strava = self.settings.providers["strava"]
        form = {"grant_type": "refresh_token", "refresh_token": "secret-refresh-token"}
        pools = STRAVA.pools(strava, 1, token=True)
        return call_token_endpoint(STRAVA, strava, self.settings.http, self.budget, self.clock, pools, form)

    def windows(self) -> list[int]:
        pools = STRAVA.pools(self.settings.providers["strava"], 1)
        return [window.used for window in self.budget.windows(pools)]


@pytest.fixture
def client(sandbox: Control, redis_url: str, settings_env: Callable[..., Settings]) -> Client:
    """A client of the sandbox, whose clock and the budget's stand at noon."""
    sandbox.freeze(NOON)
    settings = settings_env(redis={"url": redis_url}, providers=pointed_at(sandbox))
    return Client(
        settings,
        Budget(redis_url, clock=sandbox.now),
        lambda: datetime.fromtimestamp(sandbox.now(), UTC),
    )


@pytest.fixture
def alice(sandbox: Control) -> str:
    """Her access token."""
    return str(sandbox.connect("alice")[0]["access_token"])


class Listener:
    """A server that answers as told, and remembers the requests and the connections that came."""

    def __init__(self) -> None:
        self.status, self.headers, self.body = 200, {}, b"[]"
        self.seen: list[dict[str, str]] = []
        self.connections: set[Any] = set()
        listener = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                listener.seen.append({"path": self.path, **dict(self.headers.items())})
                listener.connections.add(self.client_address)
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.send_response(listener.status)
                for name, value in {"Content-Length": str(len(listener.body)), **listener.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(listener.body)

            do_POST = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that leaves early
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def listener() -> Iterator[Listener]:
    made = Listener()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def elsewhere(listener: Listener, redis_url: str, settings_env: Callable[..., Settings]) -> Client:
    """A client whose provider is the listener."""
    urls = {"api_url": listener.url, "token_url": f"{listener.url}/token", "authorize_url": listener.url}
    settings = settings_env(
        redis={"url": redis_url}, providers={"strava": {"client_id": "me", "client_secret": "mine", **urls}}
    )
    return Client(settings, Budget(redis_url), lambda: datetime.now(UTC))


# The budget around each request ----------------------------------------------------------------------


def test_no_request_goes_out_that_the_budget_refuses(sandbox: Control, client: Client, alice: str) -> None:
    """Promise 3: the provider never sees it, and nobody counts it."""
    sandbox.limits(reads=(1, 1000))
    http = client.http(alice)
    http.get(PATH)

    with pytest.raises(BudgetSpent) as caught:
        http.get(PATH)

    assert caught.value.until == NOON.replace(minute=15) + timedelta(seconds=1)
    assert len(sandbox.ledger()) == 1
    assert http.requests == 1


def test_a_reply_corrects_what_was_counted(sandbox: Control, client: Client, alice: str) -> None:
    """Promise 3: what others spent shows in the headers."""
    sandbox.spend(41)

    client.get(token=alice)

    assert client.windows() == [42, 42, 42, 42]


def test_redis_down_means_no_request(sandbox: Control, client: Client, alice: str, redis_server: Any) -> None:
    """Promise 3: what cannot be counted is not sent."""
    redis_server.stop()

    with pytest.raises(Unavailable, match="none is sent"):
        client.get(token=alice)

    assert sandbox.ledger() == []


def test_redis_away_after_the_reply_loses_nothing(
    client: Client, alice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 5: the reply may hold tokens that come only once."""
    monkeypatch.setattr(client.budget, "settle", Mock(side_effect=Unavailable("Redis is away")))

    items = client.get(token=alice)

    assert len(items) == 2


# Errors by what the caller does next -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (400, Refused),
        (403, Refused),
        (404, NotThere),
        (410, NotThere),
        (408, Unavailable),
        (425, Unavailable),
        (429, BudgetSpent),
        (500, Unavailable),
        (503, Unavailable),
    ],
)
def test_a_status_is_the_error_that_says_what_to_do(
    sandbox: Control, client: Client, alice: str, code: int, error: type[LifeloggerError]
) -> None:
    """errors.py: again later, give this up, or wait until a time."""
    sandbox.fault(LIST, status=code)

    with pytest.raises(error) as caught:
        client.get(token=alice)

    assert type(caught.value) is error
    assert str(code) in str(caught.value)
    if isinstance(caught.value, BudgetSpent):
        assert caught.value.until is not None
        assert caught.value.until >= NOON.replace(minute=15)


@pytest.mark.parametrize(
    ("named", "closed"),
    [
        ((), {"reads", "overall"}),
        (("reads",), {"reads"}),
        (("another's",), {"reads", "overall"}),
    ],
)
def test_a_429_closes_the_pools_that_it_is_about(
    elsewhere: Client, listener: Listener, named: tuple[str, ...], closed: set[str]
) -> None:
    """Promise 3: one person's limit is not everybody's; where a reply does not tell, all are closed."""

    class Telling(Strava):
        def spent_pools(self, headers: Mapping[str, str]) -> tuple[str, ...]:
            return named if headers["X-Tier"] == "told" else ()

    listener.status, listener.headers = 429, {"X-Tier": "told", "Retry-After": "600"}
    http = elsewhere.http()
    http.provider = Telling()

    with pytest.raises(BudgetSpent) as caught:
        http.get(PATH)

    windows = elsewhere.budget.windows(http.pools)
    assert {window.pool.name for window in windows if window.closed_until} == closed
    assert caught.value.until is not None
    assert caught.value.until > datetime.now(UTC) + timedelta(minutes=9)


def test_a_refusal_of_the_account_is_an_error_of_its_own(elsewhere: Client, listener: Listener) -> None:
    """errors.py: nothing else is to be asked of it. In the provider's words, as any refusal."""

    class Telling(Strava):
        def refusal(self, status: int, reply: Any) -> str | None:
            return f"{status}: {reply['why']}"

        def refuses_account(self, status: int, reply: Any) -> bool:
            return bool(reply["why"] == "closed")

    found = []
    for why in ("closed", "not this"):
        listener.status, listener.body = 400, json.dumps({"why": why}).encode()
        http = elsewhere.http()
        http.provider = Telling()
        with pytest.raises(Refused) as caught:
            http.get(PATH)
        found.append((type(caught.value), str(caught.value)))

    assert found == [(AccountRefused, "Strava: 400: closed"), (Refused, "Strava: 400: not this")]


def test_a_401_renews_once_and_then_waits(sandbox: Control, client: Client, alice: str) -> None:
    """Promise 5: only a refused renewal is terminal; this may be the provider's fault."""
    renew = Mock(return_value=alice)
    mended = client.http("dead", renew).get(PATH, per_page=1)
    hopeless = client.http("dead", Mock(return_value="dead, too"))

    with pytest.raises(Unavailable, match="just renewed"):
        hopeless.get(PATH)
    with pytest.raises(SignInAgain) as caught:
        client.get(token="dead")

    assert caught.value.__context__ is None
    assert client.renewed == ["dead"]
    assert len(mended) == 1
    renew.assert_called_once_with("dead")
    assert hopeless.requests == 2


@pytest.mark.parametrize(
    ("told", "seconds"),
    [
        ("3000", 3000),
        ("999999", 86400),
        (format_datetime(NOON + timedelta(hours=1), usegmt=True), 3600),
        ("soon", None),
        ("-5", None),
        ("9" * 40, None),
    ],
)
def test_retry_after_is_believed_but_not_for_ever(
    sandbox: Control, client: Client, alice: str, told: str, seconds: int | None
) -> None:
    """Promise 12: at most a day, and nothing that is neither a number of seconds nor a date."""
    sandbox.fault(LIST, status=503, headers={"Retry-After": told}, times=1)
    sandbox.fault(LIST, status=429, headers={"Retry-After": told}, times=1)

    waits = []
    for _ in range(2):
        with pytest.raises(Wait) as caught:
            client.get(token=alice)
        waits.append(caught.value.until and caught.value.until - NOON)

    assert waits[0] == (None if seconds is None else timedelta(seconds=seconds))
    assert waits[1] is not None
    assert timedelta(minutes=13) <= waits[1] <= LONGEST_WAIT + timedelta(seconds=2)
    if seconds is not None:
        assert abs(waits[1] - timedelta(seconds=seconds)) <= timedelta(seconds=2)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"delay": 3}, "in time"),
        ({"trickle": 0.03}, "took too long"),
        ({"size": 200_000}, "larger than"),
        ({"cut": "before"}, "broke the connection"),
        ({"cut": "middle"}, "broke off"),
        ({"body": "[{"}, "not JSON"),
        ({"body": "[NaN]"}, "not JSON"),
        ({"body": "[-Infinity]"}, "not JSON"),
        ({"body": "[" * 100_000}, "not JSON"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_reply_that_is_late_huge_or_broken_is_unavailable(
    sandbox: Control, client: Client, alice: str, fault: dict[str, Any], words: str
) -> None:
    """Promise 12: with the reason in words; promise 10: and nothing from below."""
    sandbox.fault(LIST, **fault)
    limits = {"read_timeout_seconds": 0.3, "total_timeout_seconds": 0.4, "max_bytes": 150_000}

    with pytest.raises(Unavailable, match=words) as caught:
        client.get(token=alice, **limits)

    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def test_a_server_that_is_not_there_is_unavailable(elsewhere: Client, listener: Listener) -> None:
    """Promise 12: the connection is refused, and the time-out for that is its own."""
    listener.server.server_close()

    with pytest.raises(Unavailable, match="could not be reached"):
        elsewhere.get()


def test_a_small_reply_that_unpacks_to_a_huge_one_is_cut(elsewhere: Client, listener: Listener) -> None:
    """Promise 7's kin: 100 MB of nothing in 100 kB never come to be."""
    listener.body = gzip.compress(b"[" + b" " * 100_000_000 + b"]", compresslevel=1)
    listener.headers = {"Content-Encoding": "gzip"}

    with pytest.raises(Unavailable, match="larger than 1000000 bytes"):
        elsewhere.get(max_bytes=1_000_000)


def test_a_packed_reply_is_unpacked(elsewhere: Client, listener: Listener) -> None:
    listener.body = gzip.compress(json.dumps([{"id": number} for number in range(50_000)]).encode())
    listener.headers = {"Content-Encoding": "gzip"}

    assert len(elsewhere.get()) == 50_000


def test_a_number_beyond_all_floats_stays_what_it_was(elsewhere: Client, listener: Listener) -> None:
    """Promise 7: one field's fault; an Infinity would make JSON that nobody can read."""
    listener.body = b'[{"id": 9007199254740993, "distance": 1e999, "other": -1.5e-3}]'

    assert elsewhere.get() == [{"id": 9007199254740993, "distance": "1e999", "other": -0.0015}]


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
), st.booleans())  # fmt: skip
@example([987654321234567891234, -(2**63) - 1, 2**64, -0.0, 5e-324, 1.7976931348623157e308], True)
@example(["a\x00b", "\ud800", "\U0001f600", {"": []}], True)
def test_a_reply_is_read_as_python_reads_it(value: Any, ascii_only: bool) -> None:
    """Promise 7: to the last digit, whichever of the two parsers reads it."""
    text = json.dumps(value, ensure_ascii=ascii_only)

    assert repr(module.parse(text.encode(errors="replace"))) == repr(
        json.loads(text.encode(errors="replace"))
    )


# One connection for many requests, one person in each ------------------------------------------------


def test_many_requests_of_a_thread_use_one_connection(elsewhere: Client, listener: Listener) -> None:
    """A TLS handshake for each request would cost more than the request."""

    def work() -> None:
        # Not through `Http`: without usage headers the budget lets only one request out at a time.
        for _ in range(4):
            module.session().get(listener.url).content  # noqa: B018

    for thread in [threading.Thread(target=work) for _ in range(2)]:
        thread.start()
        thread.join()
    elsewhere.get()
    elsewhere.http("another token").get(PATH)

    assert len(listener.seen) == 10
    assert len(listener.connections) == 3


def test_cookies_do_not_travel_from_one_person_to_the_next(elsewhere: Client, listener: Listener) -> None:
    """Promise 10: a session cookie of Alice's would be Alice."""
    listener.headers = {"Set-Cookie": "session=alice; Path=/"}

    elsewhere.get(token="alice")
    elsewhere.get(token="bruno")

    assert [seen.get("Cookie") for seen in listener.seen] == [None, None]
    assert [seen["Authorization"] for seen in listener.seen] == ["Bearer alice", "Bearer bruno"]


def test_a_netrc_replaces_no_token(
    elsewhere: Client, listener: Listener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 10: neither the person's, nor does it add itself to a token call."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password of-the-machine\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    listener.body = b"{}"

    elsewhere.get()
    elsewhere.call_token_endpoint()

    assert [seen.get("Authorization") for seen in listener.seen] == [f"Bearer {SECRET}", None]
    assert requests.utils.get_netrc_auth(listener.url) is not None  # it would have been used


# Redirects -------------------------------------------------------------------------------------------


def test_a_redirect_to_another_host_is_refused(
    sandbox: Control, client: Client, alice: str, listener: Listener
) -> None:
    """Promise 10: the token is not for whoever stands there."""
    for target in (
        f"{listener.url}/x",
        f"//127.0.0.1:{listener.server.server_port}/",
        "http://[::1",
        "ftp://x",
    ):
        sandbox.fault(LIST, redirect=target, times=1)

        with pytest.raises(Unavailable, match="another host"):
            client.get(token=alice)

    sandbox.fault(TOKEN, redirect=listener.url, times=1)
    assert client.call_token_endpoint().status == 302
    assert listener.seen == []


def test_a_redirect_on_the_same_host_is_followed_and_counted(
    sandbox: Control, client: Client, alice: str
) -> None:
    """Promise 3: each hop asks the budget, with the token, and there is an end to it."""
    sandbox.fault(LIST, redirect="/strava/api/v3/athlete/activities?per_page=3", times=1)
    http = client.http(alice)
    items = http.get(PATH, per_page=1)
    followed = http.requests
    sandbox.fault(LIST, redirect="?again")

    with pytest.raises(Unavailable, match="without end"):
        http.get(PATH)

    assert (len(items), followed) == (3, 2)
    assert http.requests == followed + MOST_REDIRECTS + 1 == len(sandbox.ledger())
    assert client.windows()[0] == http.requests


def test_the_body_of_a_redirect_is_bounded_like_any_other(
    sandbox: Control, client: Client, alice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`requests` would read it to its end before it says that there is a redirect."""
    sandbox.fault(LIST, redirect="/elsewhere", size=50_000_000, times=1)
    raw_read, received = urllib3.HTTPResponse._raw_read, []

    def counted(reply: urllib3.HTTPResponse, *args: Any, **kwargs: Any) -> bytes:
        received.append(raw_read(reply, *args, **kwargs))
        return received[-1]

    monkeypatch.setattr(urllib3.HTTPResponse, "_raw_read", counted)
    with pytest.raises(Refused, match="404"):
        client.get(token=alice, max_bytes=1000)

    assert 1000 < sum(map(len, received)) < 1_000_000


def test_a_post_is_not_redirected(elsewhere: Client, listener: Listener) -> None:
    listener.status, listener.headers = 307, {"Location": "/other"}

    with pytest.raises(Unavailable):
        elsewhere.http().post("/x", {"a": 1})

    assert len(listener.seen) == 1


# What is told ----------------------------------------------------------------------------------------


def test_no_error_holds_a_token_a_query_or_a_cause(sandbox: Control, client: Client, alice: str) -> None:
    """Promise 10: Dramatiq writes tracebacks to Redis, and the dashboard shows them."""
    faults: list[dict[str, Any]] = [
        {"status": 403},
        {"status": 500},
        {"status": 429, "headers": {"Retry-After": "1"}},
        {"cut": "before"},
        {"cut": "middle"},
        {"body": alice},
        {"redirect": f"http://elsewhere.test/?token={alice}"},
        {"redirect": f"?token={alice}"},
    ]
    told, query = [], "query-of-mine"
    dead = "-".join(("dead", "token"))  # not as it stands here: a traceback shows our own lines, too
    for fault in faults:
        # A 429 closes the budget until its Retry-After, the last redirect repeats itself.
        sandbox.fault(LIST, times=None if str(fault.get("redirect", "")).startswith("?") else 1, **fault)
        with pytest.raises(LifeloggerError) as caught:
            client.http(alice).get(PATH, note=query)
        told.append((caught.value, "".join(traceback.format_exception(caught.value))))
        sandbox.step(900)
    sandbox.clear_faults()
    with pytest.raises(Unavailable) as caught:
        client.http(dead, Mock(return_value=dead)).get(PATH, note=query)
    told.append((caught.value, "".join(traceback.format_exception(caught.value))))

    assert len(told) == 9
    for error, trace in told:
        assert error.__cause__ is None
        assert error.__context__ is None or error.__suppress_context__
        assert not any(word in trace for word in (alice, query, dead))


def test_a_token_that_no_header_can_carry_is_told_from_a_mistake(client: Client) -> None:
    """Promise 10: imported with a euro sign or a line end in it."""
    for token in ("secret€", "secret\nX-Evil: 1"):
        with pytest.raises(Unavailable) as caught:
            client.get(token=token)

        assert "ecret" not in "".join(traceback.format_exception(caught.value))


def test_a_session_or_a_client_shows_no_token(client: Client) -> None:
    http = client.http()

    assert SECRET not in repr(http) + repr(vars(http)["provider"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Tue, 24 Nov 2026 12:02:00 GMT", NOON),
        ("Tue, 24 Nov 2026 12:02:00 -0000", NOON),
        ("Tuesday, 24-Nov-26 12:02:00 GMT", NOON),
        ("", None),
        ("noon", None),
        ("Tue, 24 Nov 99999 12:02:00 GMT", None),
        ("Tue, 24 Nov 99999999999999999999999 12:02:00 GMT", None),
        ("Tue, 24 Nov 2026 12:02:00 +9999999", None),
    ],
)
def test_the_date_of_a_reply_is_read_or_left(text: str, expected: datetime | None) -> None:
    """Promise 3: the provider's clock is learned from it; a broken one is none."""
    assert http_date(text) == expected


def test_usage_headers_that_are_no_numbers_are_none(sandbox: Control, client: Client, alice: str) -> None:
    """Promise 3: a reply is not lost for what its headers say."""
    sandbox.fault(LIST, headers={"X-ReadRateLimit-Usage": "many,too", "Date": "noon"})

    assert len(client.get(token=alice)) == 2
    assert STRAVA.usage({"X-RateLimit-Limit": "1,2", "X-RateLimit-Usage": "3, 4"}) == {
        "overall": Usage((1, 2), (3, 4))
    }


def test_a_proxy_has_nothing_to_do_on_this_machine(
    client: Client, alice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`make run` on a machine that reaches the internet through a proxy."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")

    assert client.http(alice).get(PATH, per_page=1)


def test_a_proxy_of_the_environment_is_asked_for_other_machines(
    elsewhere: Client, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only way out of many networks; with its own password, which is not the person's."""
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, listener.url.replace("//", "//me:proxy@"))
    strava = elsewhere.settings.providers["strava"]
    elsewhere.settings.providers["strava"] = strava.model_copy(update={"api_url": "http://cloud.test/v3"})

    elsewhere.get()

    [seen] = listener.seen
    assert seen["path"].partition("?")[0] == f"http://cloud.test/v3{PATH}"
    assert seen["Host"] == "cloud.test"
    assert seen["Authorization"] == f"Bearer {SECRET}"
    assert seen["Proxy-Authorization"] == "Basic bWU6cHJveHk="


def test_bytes_that_are_no_utf8_are_read_as_far_as_they_go() -> None:
    response = Mock(read1=Mock(side_effect=[b'["Jos\xe9"]', b""]))

    assert read_json(response, time.monotonic() + 60, 1000) == (["Jos\ufffd"], None)


def test_an_address_with_a_token_is_not_logged_even_when_a_reply_cannot_be_read(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Promise 10: urllib3 warns of broken headers, with the address."""
    caplog.set_level(logging.DEBUG)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nno header\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/revoke"
        with module.untold(), module.session().post(url, params={"token": SECRET}, timeout=5) as reply:
            assert reply.status_code == 200

    assert SECRET not in caplog.text
