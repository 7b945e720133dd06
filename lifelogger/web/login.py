"""Who may come in: the login token, sessions, API keys, and the guard in front of everything.

The guard is closed by default: what is not listed in `OPEN` needs a session, or on the API the token itself
or a key. What a key may do there is for `web.access` to say. Sessions are signed with a key that comes from
the token, so a new token ends them all.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import threading
from collections import deque
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Annotated
from urllib.parse import quote, urlencode, urlsplit

from fastapi import APIRouter, Form, Request
from itsdangerous import BadData, URLSafeSerializer
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lifelogger import api_keys
from lifelogger.crypto import made_once
from lifelogger.errors import LifeloggerError, SettingsError
from lifelogger.settings import Settings, Web
from lifelogger.web.health import DATABASE_SENTENCE, DATABASE_TROUBLE
from lifelogger.web.render import explain, is_api, page

COOKIE = "lifelogger_session"
SESSION = timedelta(hours=12)
OPEN = frozenset({"/login", "/healthz", "/static/style.css", "/static/icon.svg"})
"""What anybody may see: none of it tells about users, connections or settings."""
CALLED = "/webhooks/"
"""Where providers call, who have no session with us: each call proves itself."""
OUTWARDS = "/connect/"
"""Where a browser is sent on to a provider."""
SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
MOST_BYTES = 64 * 1024
"""The longest body that is read."""
ATTEMPT_SPAN = timedelta(minutes=5)
MOST_ATTEMPTS = 10
"""Wrong tokens from one address within `ATTEMPT_SPAN`, after which even the right one is refused."""
MOST_ATTEMPTS_OF_ALL = 100
"""The same from all addresses together: whoever has many must not have many tries."""
POLICY = "default-src 'none'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
HEADERS = {
    "content-security-policy": f"{POLICY}; style-src 'self'; img-src 'self'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    # `no-referrer` would make browsers send `Origin: null` with our own forms.
    "referrer-policy": "same-origin",
    "cache-control": "no-store",
}
"""Sent with every answer that does not say otherwise."""


def login_token(settings: Settings) -> tuple[str, bool]:
    """The login token, and whether it was made just now: whoever gets True prints it, once.

    It is `security.login_token`, or made on first use in `var/login.token`. Raises `SettingsError` when
    that file is empty.
    """
    if settings.security.login_token:
        return settings.security.login_token.get_secret_value(), False
    path = settings.var / "login.token"
    token, made = made_once(path, lambda: secrets.token_urlsafe(32).encode())
    if not token:
        raise SettingsError(f"{path} is empty: delete it, and a new login token is made")
    return token, made


class TooManyAttempts(LifeloggerError):
    """Too many wrong tokens came lately: none is looked at now."""


class Attempts:
    """The failures of the last minutes, by address."""

    def __init__(self, clock: Callable[[], datetime]) -> None:
        self._clock = clock
        self._failures: deque[tuple[datetime, str]] = deque()

    def too_many(self, address: str) -> bool:
        now = self._clock()
        while self._failures and self._failures[0][0] <= now - ATTEMPT_SPAN:
            self._failures.popleft()
        mine = sum(each == address for _, each in self._failures)
        return mine >= MOST_ATTEMPTS or len(self._failures) >= MOST_ATTEMPTS_OF_ALL

    def note(self, address: str) -> None:
        self._failures.append((self._clock(), address))


class Door:
    """The token, the sessions it opened, and the wrong tokens and keys of the last minutes; all in memory."""

    def __init__(self, token: str, clock: Callable[[], datetime]) -> None:
        self._token = token.encode()
        self._clock = clock
        self._sessions = URLSafeSerializer(
            self._token,
            salt=COOKIE,
            signer_kwargs={"key_derivation": "hmac", "digest_method": hashlib.sha256},
        )
        self._ended: dict[str, float] = {}
        self._attempts, self._strangers = Attempts(clock), Attempts(clock)
        self._lock = threading.Lock()

    def admits(self, token: str, address: str) -> bool:
        """Whether `token` is the login token. Raises `TooManyAttempts`."""
        with self._lock:
            if self._attempts.too_many(address):
                raise TooManyAttempts("Too many wrong login tokens: wait five minutes, then try again.")
            right = hmac.compare_digest(token.encode(errors="surrogatepass"), self._token)
            if not right:
                self._attempts.note(address)
            return right

    def refuse_key(self, address: str) -> None:
        """Note a key that nobody knows. Raises `TooManyAttempts`.

        A right key is let in whatever others try: it cannot be guessed, and whoever tried many wrong ones,
        or a program with an old one behind the same proxy, would lock everybody out.
        """
        with self._lock:
            if self._strangers.too_many(address):
                raise TooManyAttempts("Too many unknown API keys: wait five minutes, then try again.")
            self._strangers.note(address)

    def open(self) -> str:
        """A new session, as the value of its cookie."""
        until = (self._clock() + SESSION).timestamp()
        return str(self._sessions.dumps({"id": secrets.token_urlsafe(12), "until": until}))

    def knows(self, cookie: str) -> bool:
        """Whether the cookie is of a session that goes on."""
        session = self._session(cookie)
        return session is not None and session[0] not in self._ended

    def end(self, cookie: str) -> None:
        """End a session, for this process; a restarted one knows it until its time is over."""
        now = self._clock().timestamp()
        with self._lock:
            self._ended = {name: until for name, until in self._ended.items() if until > now}
            if (session := self._session(cookie)) is not None:
                self._ended[session[0]] = session[1]

    def _session(self, cookie: str) -> tuple[str, float] | None:
        try:
            found = self._sessions.loads(cookie)
        except BadData:
            return None
        name, until = str(found["id"]), float(found["until"])
        return (name, until) if until > self._clock().timestamp() else None


class Guard:
    """Stands before the whole application, with what is mounted in it, and adds the headers to every answer.

    Requests must name a host we know, or a page elsewhere could point its own name at this machine (DNS
    rebinding): `web.host`, localhost and the loopback addresses. When `web.host` means every address
    (`0.0.0.0`, `::`) any name is taken, since the settings do not say which ones are ours; whoever comes
    under a foreign name has no cookie there, so what is lost is a second wall, not the login.

    Paths stay percent-encoded for the routes, so that a user id with a slash is one segment.
    """

    def __init__(
        self, app: ASGIApp, door: Door, web: Web, find_key: Callable[[str], api_keys.Key | None]
    ) -> None:
        self.app, self.door, self.find_key = app, door, find_key
        any_host = web.host in ("0.0.0.0", "::") and not web.names
        public = hostname(web.public_url.partition("://")[2]) or "localhost"
        known = {web.host, public, *web.names, "localhost", "127.0.0.1", "::1"}
        self.hosts = None if any_host else {name.lower() for name in known}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        raw: bytes = scope.get("raw_path") or quote(scope["path"]).encode()
        scope["path"] = raw.decode("latin-1")

        async def secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        request = Request(scope)
        await (await self.refusal(request) or self.app)(scope, receive, secured)

    async def refusal(self, request: Request) -> Response | None:
        """Why a request is not let through; None: it is."""
        path, bearer = request.scope["path"], self.bearer(request)
        name = hostname(request.headers.get("host", ""))
        if not name or (self.hosts is not None and name not in self.hosts):
            return explain(
                request, 400, "This server does not go by that name. See web.names in the settings."
            )
        if "transfer-encoding" in request.headers or content_length(request) > MOST_BYTES:
            return explain(
                request, 413, f"A request may bring {MOST_BYTES // 1024} kB, and says how much it has."
            )
        if path.startswith(CALLED):
            return None
        if request.method not in SAFE and bearer is None and not same_origin(request):
            return explain(request, 403, "This did not come from our own pages, so nothing was done.")
        if path in OPEN:
            return None
        if bearer is not None:
            try:
                if bearer.startswith(api_keys.PREFIX):
                    if await self.has_key(request, bearer):
                        return None
                elif self.door.admits(bearer, address(request)):
                    return None
            except TooManyAttempts as refused:
                return explain(request, 429, str(refused), RETRY)
            except DATABASE_TROUBLE:
                return explain(request, 503, DATABASE_SENTENCE, {"retry-after": "5"})
        elif self.door.knows(request.cookies.get(COOKIE, "")):
            return None
        if is_api(path):
            sentence = "Log in, or send an API key or the login token as `Authorization: Bearer …`."
            return explain(request, 401, sentence, {"www-authenticate": "Bearer"})
        query = request.scope["query_string"].decode("latin-1")
        here = f"{path}?{query}" if query else path
        wanted = {"next": here} if request.method == "GET" and here != "/" else {}
        return RedirectResponse("/login" + (f"?{urlencode(wanted)}" if wanted else ""), 303)

    async def has_key(self, request: Request, bearer: str) -> bool:
        """Whether there is such a key; `web.access` finds it in the state of the request."""
        key = await run_in_threadpool(self.find_key, bearer)
        if key is None:
            self.door.refuse_key(address(request))
        request.state.key = key
        return key is not None

    @staticmethod
    def bearer(request: Request) -> str | None:
        """The token that an API call brings; whoever brings one is judged by it alone."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not is_api(request.scope["path"]):
            return None
        return token.strip().encode("latin-1").decode(errors="surrogateescape")


RETRY = {"retry-after": str(int(ATTEMPT_SPAN.total_seconds()))}


def address(request: HTTPConnection) -> str:
    return request.client.host if request.client else ""


def content_length(request: HTTPConnection) -> int:
    text = request.headers.get("content-length", "0")
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else MOST_BYTES + 1


def hostname(netloc: str) -> str | None:
    """The name in a `Host` header, without port and brackets; None: it has none."""
    try:
        return urlsplit(f"//{netloc}").hostname
    except ValueError:
        return None


def same_origin(request: HTTPConnection) -> bool:
    """Whether a browser says that our own page sent this: every browser of today says one or the other.

    `Sec-Fetch-Site` is the browser's own judgement, and right even behind a proxy that ends TLS. Without it
    `Origin` must name the host asked for; http may not speak for https.
    """
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return site == "same-origin"
    scheme, _, origin = request.headers.get("origin", "").lower().partition("://")
    schemes = ("https",) if request.scope["scheme"] == "https" else ("http", "https")
    return scheme in schemes and origin == request.headers.get("host", "").lower()


def local(target: str) -> str:
    """`target` if it is a path of ours, else the front page.

    Browsers take `//host`, `/\\host` and `/<tab>/host` for other hosts.
    """
    ours = target.startswith("/") and not target.startswith("//")
    return target if ours and "\\" not in target and min(target) > " " else "/"


router = APIRouter(include_in_schema=False)


@router.get("/login")
def ask(request: Request, next: str = "/") -> Response:
    """The page with the form."""
    return page("login.html", next=local(next), wrong=False, signed_in=False)


@router.post("/login")
def enter(
    request: Request, token: Annotated[str, Form()] = "", next: Annotated[str, Form()] = "/"
) -> Response:
    """Open a session for the right token.

    The cookie is `SameSite=Lax`: with `Strict` a link from a chat or a mail would end at the login although
    one is logged in. What changes anything is kept to our own pages by the guard, not by the cookie.
    """
    door: Door = request.app.state.door
    try:
        right = door.admits(token.strip(), address(request))
    except TooManyAttempts as refused:
        return explain(request, 429, str(refused), RETRY)
    if not right:
        return page("login.html", 403, next=local(next), wrong=True, signed_in=False)
    response: Response = RedirectResponse(local(next), 303)
    if local(next).startswith(OUTWARDS):
        # Chromium holds `form-action` against each redirect that follows a form, and stays here silently.
        response = page("going_on.html", next=local(next), refresh=0, refresh_to=local(next))
    response.set_cookie(
        COOKIE,
        door.open(),
        max_age=int(SESSION.total_seconds()),
        httponly=True,
        samesite="lax",
        secure=request.url.scheme == "https",
    )
    return response


@router.post("/logout")
def leave(request: Request) -> Response:
    """End the session."""
    door: Door = request.app.state.door
    door.end(request.cookies.get(COOKIE, ""))
    response = RedirectResponse("/login", 303)
    response.delete_cookie(COOKIE, httponly=True, samesite="lax")
    return response
