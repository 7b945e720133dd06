"""The network as providers get it: one budget for every request, one error for every trouble.

    budget asked ─▶ request (bearer token, time-outs, size limit) ─▶ headers read ─▶ JSON or an error

Errors say what the caller does next (`lifelogger.errors`). They carry neither a query string nor
the exception of `requests` behind them: both can hold a token, and Dramatiq writes tracebacks
to Redis.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NoReturn
from urllib.parse import urlencode, urljoin, urlsplit

import msgspec
import requests
import urllib3
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict

from lifelogger.budget import Budget, Ticket
from lifelogger.errors import AccountRefused, BudgetSpent, LifeloggerError, NotThere, Refused, Unavailable
from lifelogger.providers.base import Json, Pool, Provider, RevokeRequest, http_date
from lifelogger.settings import Http as HttpLimits
from lifelogger.settings import ProviderSettings

log = logging.getLogger(__name__)

NO_PROXY = {"http": "", "https": "", "all": ""}
MOST_HOSTS = 100
"""Hosts that a thread keeps connections to."""
HEADERS = {**requests.utils.default_headers(), "User-Agent": "lifelogger"}
MOST_REDIRECTS = 3
CHUNK = 65536
LONGEST_WAIT = timedelta(days=1)
"""However far in the future a provider wants to be asked again, we try after this."""


class Unauthorised(LifeloggerError):
    """The provider does not know this access token (any more): HTTP 401."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer: its status, its headers and its parsed JSON (None when it had no readable one)."""

    status: int
    headers: Mapping[str, str]
    body: Json
    broken: str | None = None
    """Why the body could not be read, when it could not."""
    retry_at: datetime | None = None
    """When to ask again, of a refusal that told it or whose budget tells it."""


class Http:
    """The requests of one connection during one sync. Not shared between threads."""

    def __init__(
        self,
        provider: Provider,
        settings: ProviderSettings,
        limits: HttpLimits,
        budget: Budget,
        connection_id: int,
        token: str,
        renew: Callable[[str], str],
        clock: Callable[[], datetime],
    ) -> None:
        self.provider = provider
        self.settings = settings
        self.limits = limits
        self.budget = budget
        self.pools = provider.pools(settings, connection_id)
        shared = provider.shared_pools(settings)
        self.own = [pool for pool in self.pools if pool not in shared]
        """Of the pools those that nobody else spends from."""
        self.clock = clock
        self.requests = 0
        """How many requests went out."""
        self.learned = False
        """Whether one of them told a count that nobody knew: others may go now."""
        self.leave: Callable[[], int] = lambda: 0
        """How many requests the next one must leave to others; asked before each."""
        self.leave_share = 0.0
        """The share of each window that it must leave besides."""
        self.pace: float | None = None
        """Set for work that can wait: see `Budget.take`."""
        self._token = token
        self._renew = renew

    def get(self, path: str, **params: str | int) -> Json:
        return self._call("GET", path, params=params)

    def post(self, path: str, body: Json) -> Json:
        return self._call("POST", path, json=body)

    def _call(self, method: str, path: str, **content: Any) -> Json:
        """Send with the token; a 401 renews it once. Raises `Wait`, `SignInAgain`, `Refused`."""
        with contextlib.suppress(Unauthorised):
            return self._follow(method, path, **content)
        self._token = self._renew(self._token)
        try:
            return self._follow(method, path, **content)
        except Unauthorised:
            # Not for the person to mend: a grant that is gone is refused when its token is renewed.
            raise Unavailable(f"{self.provider.title} refuses a token that was just renewed") from None

    def _follow(self, method: str, path: str, **content: Any) -> Json:
        """Send, and follow redirects as long as they stay on the host that may see the token."""
        url = self.settings.api_url + path
        for _ in range(MOST_REDIRECTS + 1):
            reply = self._send(method, url, **content)
            if reply.status not in (301, 302, 303, 307, 308):
                return accepted(self.provider.title, path, reply, self.provider)
            target = on_same_host(url, reply.headers.get("Location", ""))
            if target is None or method != "GET":
                raise Unavailable(f"{self.provider.title} redirects {path} to another host: refused")
            url, content = target, {}
        raise Unavailable(f"{self.provider.title} redirects {path} without end")

    def _send(self, method: str, url: str, **content: Any) -> Reply:
        ticket = self.budget.take(
            self.pools, leave=self.leave(), own=self.own, leave_share=self.leave_share, pace=self.pace
        )
        self.requests += 1
        self.learned = self.learned or ticket.probe
        return exchange(
            self.provider,
            self.budget,
            ticket,
            self.limits,
            self.clock,
            method,
            url,
            headers={"Authorization": f"Bearer {self._token}"},
            **content,
        )


def call_token_endpoint(
    provider: Provider,
    settings: ProviderSettings,
    limits: HttpLimits,
    budget: Budget,
    clock: Callable[[], datetime],
    pools: tuple[Pool, ...],
    form: Mapping[str, str],
    *,
    leave_share: float = 0,
    pace: float | None = None,
) -> Reply:
    """POST a form with the client's credentials to the token endpoint (RFC 6749, 2.3.1).

    `leave_share` and `pace`: see `Budget.take`.
    Returns whatever was answered with a 2xx or 4xx; raises `Wait` on anything that may pass.
    """
    body = {
        "client_id": settings.client_id,
        "client_secret": settings.client_secret.get_secret_value(),
        **form,
    }
    ticket = budget.take(pools, leave_share=leave_share, pace=pace)
    reply = exchange(provider, budget, ticket, limits, clock, "POST", settings.token_url, data=body)
    if reply.status == 429 or reply.status >= 500 or (reply.status < 300 and reply.broken):
        accepted(provider.title, "the token endpoint", reply)
    return reply


def call_revoke_endpoint(
    provider: Provider,
    settings: ProviderSettings,
    limits: HttpLimits,
    budget: Budget,
    clock: Callable[[], datetime],
    request: RevokeRequest,
) -> Reply:
    """POST what ends a grant (RFC 7009). Returns and raises as `call_token_endpoint`."""
    headers = None
    if request.authenticated:
        headers = urllib3.make_headers(
            basic_auth=f"{settings.client_id}:{settings.client_secret.get_secret_value()}"
        )
    ticket = budget.take(provider.pools(settings, 0, token=True))
    with untold():
        reply = exchange(
            provider, budget, ticket, limits, clock, "POST", settings.revoke_url,
            data=request.form, params=request.query, headers=headers,
        )  # fmt: skip
    if reply.status == 429 or reply.status >= 500:
        accepted(provider.title, "the revocation endpoint", reply)
    return reply


@contextlib.contextmanager
def untold() -> Iterator[None]:
    """Nothing of this thread's requests is logged: urllib3 tells every address, and one may be a token."""
    _of_thread.untold = True
    try:
        yield
    finally:
        _of_thread.untold = False


class Untold(logging.Filter):
    """Keeps what happens in `untold` out of a logger."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not getattr(_of_thread, "untold", False)


for _name in ("urllib3.connection", "urllib3.connectionpool"):  # a filter does not hold for what lies beneath
    logging.getLogger(_name).addFilter(Untold())


def exchange(
    provider: Provider,
    budget: Budget,
    ticket: Ticket,
    limits: HttpLimits,
    clock: Callable[[], datetime],
    method: str,
    url: str,
    headers: Mapping[str, str] | None = None,
    **content: Any,
) -> Reply:
    """One request and its answer, told to the budget. Raises `Unavailable` when none came."""
    deadline = time.monotonic() + limits.total_timeout_seconds
    failure: str | None = None
    try:
        request = prepared(method, url, headers or {}, **content)
        with session().send_plainly(request, limits) as response:
            told, status = response.headers, response.status
            body, broken = read_json(response, deadline, limits.max_bytes)
    except urllib3.exceptions.HTTPError as trouble:
        refused = isinstance(trouble, urllib3.exceptions.NewConnectionError)
        late = isinstance(trouble, urllib3.exceptions.TimeoutError) and not refused
        failure = "did not answer in time" if late else "could not be reached, or broke the connection"
    except (requests.RequestException, OSError, ValueError):  # the latter: a token that no header can carry
        failure = "could not be reached, or broke the connection"
    if failure is not None:
        with contextlib.suppress(
            Unavailable
        ):  # the ticket then stays in flight, as it does without an answer
            budget.settle(ticket, answered=False)
        raise Unavailable(f"{provider.title} {failure}")
    now = clock()
    named = set(provider.spent_pools(told)) & {pool.name for pool in ticket.pools}
    limited = status == 429 and (named or True)
    retry_at = provider.retry_at(told, now) if status in (429, 503) else None
    if retry_at is not None:
        retry_at = min(retry_at, now + LONGEST_WAIT)
    try:
        closed_until = budget.settle(
            ticket,
            usage=provider.usage(told),
            date=http_date(told.get("Date", "")),  # the provider's own time of the answer
            limited=limited,
            retry_at=retry_at if limited else None,
        )
    except Unavailable as trouble:  # the reply may hold tokens that come only once: it is not lost for that
        log.warning("%s: a reply was not told to the budget: %s", provider.title, trouble)
        closed_until = None
    return Reply(status, told, body, broken, closed_until or retry_at)


def prepared(
    method: str,
    url: str,
    headers: Mapping[str, str],
    *,
    params: Mapping[str, str | int] | None = None,
    data: Mapping[str, str] | None = None,
    json: Json = None,
) -> requests.PreparedRequest:
    """What to send. `requests` itself takes a quarter of the time of a whole request to put it together."""
    request = requests.PreparedRequest()
    request.method, request.body = method, None
    request.url = f"{url}{'&' if '?' in url else '?'}{urlencode(params)}" if params else url
    fields = {**HEADERS, **headers}
    if json is not None:
        request.body, fields["Content-Type"] = msgspec.json.encode(json), "application/json"
    elif data is not None:
        request.body, fields["Content-Type"] = urlencode(data), "application/x-www-form-urlencoded"
    request.headers = CaseInsensitiveDict(fields)
    return request


def read_json(response: urllib3.BaseHTTPResponse, deadline: float, most: int) -> tuple[Json, str | None]:
    """The parsed body, or why there is none. Reads at most `most` bytes, until `deadline`."""
    received = bytearray()
    try:
        # Whatever has come, not full chunks: a body that trickles in must not outlast the deadline.
        while chunk := response.read1(CHUNK, decode_content=True):
            received += chunk
            if len(received) > most:
                return None, f"its answer is larger than {most} bytes"
            if time.monotonic() > deadline:
                return None, "its answer took too long"
    except (urllib3.exceptions.HTTPError, OSError):
        return None, "its answer broke off"
    try:
        return parse(received), None
    except (ValueError, RecursionError):
        return None, "its answer is not JSON"


def parse(received: bytes | bytearray) -> Json:
    """The value of a JSON text, of which one broken letter or number is one field's fault.

    Nearly every text is well-formed, and is read in a quarter of the time. Raises `ValueError` or
    `RecursionError`.
    """
    try:
        return strict.decode(received)
    except (ValueError, RecursionError):
        text = received.decode("utf-8-sig", "replace")
        return json.loads(text, parse_constant=refuse_constant, parse_float=finite, parse_int=whole)


strict = msgspec.json.Decoder()
"""Numbers keep all their digits, as Python's own do; what no float holds is refused."""


def finite(digits: str) -> float | str:
    """A number beyond all floats stays the text it is: one field's fault, never an Infinity in the store."""
    value = float(digits)
    return value if math.isfinite(value) else digits


def whole(digits: str) -> int | str:
    """A number of more digits than Python reads stays the text it is."""
    try:
        return int(digits)
    except ValueError:
        return digits


def refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def accepted(title: str, what: str, reply: Reply, provider: Provider | None = None) -> Json:
    """The body of a good answer, or the error that fits its status, with what `provider` knows of it."""
    status = reply.status
    if 200 <= status < 300:
        if reply.broken:
            raise Unavailable(f"{title}: {what}: {reply.broken}")
        return reply.body
    if status == 401:
        raise Unauthorised(f"{title}: {what}: not authorised (401)")
    if status == 429:
        raise BudgetSpent(f"{title} says that its request limit is reached (429)", reply.retry_at)
    if status in (408, 425) or status >= 500:
        raise Unavailable(f"{title}: {what}: the server is in trouble ({status})", reply.retry_at)
    words = provider and provider.refusal(status, reply.body)
    refused = NotThere if status in (404, 410) else Refused
    if provider and provider.refuses_account(status, reply.body):
        refused = AccountRefused
    raise refused(f"{title}: {words}" if words else f"{title}: {what}: refused ({status})")


def on_same_host(url: str, location: str) -> str | None:
    """Where a redirect from `url` leads; None when that is another scheme, host or port, or no address."""
    try:
        target = urljoin(url, location)
        here, there = urlsplit(url), urlsplit(target)
        same = (here.scheme, here.hostname, here.port) == (there.scheme, there.hostname, there.port)
    except ValueError:
        return None
    return target if same else None


def is_loopback(url: str) -> bool:
    """Whether an address is on this machine, as the sandbox is: no proxy has anything to do there."""
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


class Session(requests.Session):
    """Leaves redirects to us: even told not to follow one, `requests` reads its whole body and parses it."""

    def __init__(self) -> None:
        super().__init__()
        self.mount("https://", HTTPAdapter(pool_connections=MOST_HOSTS))
        self.mount("http://", HTTPAdapter(pool_connections=MOST_HOSTS))
        self._ways: dict[tuple[str, str], tuple[Any, bool]] = {}

    def get_redirect_target(self, resp: requests.Response) -> None:
        return None

    def send_plainly(self, request: requests.PreparedRequest, limits: HttpLimits) -> urllib3.BaseHTTPResponse:
        """Send as `requests` does, without what it does for browsers; the body is still to be read.

        No cookie, no `.netrc`, no redirect. Raises as `urllib3`.
        """
        assert request.url is not None
        pool, whole = self._way(request.url)
        response: urllib3.BaseHTTPResponse = pool.urlopen(
            request.method or "GET",
            request.url if whole else request.path_url,
            request.body,
            request.headers,
            retries=False,
            redirect=False,
            assert_same_host=False,
            timeout=urllib3.Timeout(connect=limits.connect_timeout_seconds, read=limits.read_timeout_seconds),
            preload_content=False,
            decode_content=False,
        )
        return response

    def _way(self, url: str) -> tuple[Any, bool]:
        """The connections to the host of `url`, and whether they lead to a proxy that wants whole URLs.

        Proxies and certificates are those of the environment, read once for each host.
        """
        parts = urlsplit(url)
        host = (parts.scheme, parts.netloc)
        if host not in self._ways:
            adapter, request = self.get_adapter(url), requests.Request("GET", url).prepare()
            assert isinstance(adapter, HTTPAdapter)
            none = dict(NO_PROXY) if is_loopback(url) else {}
            found = self.merge_environment_settings(url, none, None, None, None)
            verify, cert, proxies = found["verify"], found["cert"], found["proxies"]
            pool = adapter.get_connection_with_tls_context(request, verify, proxies, cert)
            adapter.cert_verify(pool, url, verify, cert)  # type: ignore[no-untyped-call]
            self._ways[host] = pool, adapter.request_url(request, proxies) != request.path_url
        return self._ways[host]


_of_thread = threading.local()


def session() -> Session:
    """The thread's session: it keeps connections alive."""
    found: Session | None = getattr(_of_thread, "session", None)
    if found is None:
        found = _of_thread.session = Session()
    return found
