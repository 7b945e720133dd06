"""Connecting from a web application: a router that it mounts in one line.

    app.include_router(connect.router(user=signed_in), prefix="/accounts")

`GET /accounts/PROVIDER?next=/settings` sends the signed-in user to the provider, `/accounts/callback` is
where the provider sends them back: register that address there. `signed_in` is a FastAPI dependency that says
who asks. Where there are several applications, `application=NAME` in the query chooses one, or else
`connecting.application_for` does.

The state of an attempt is good once, for ten minutes, and for the browser alone that began; it waits in
Redis, encrypted. OAuth itself is in `lifelogger.connecting`.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from dramatiq.errors import BrokerConnectionError
from fastapi import APIRouter, Depends, Query, Request
from redis import RedisError
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response

from lifelogger import client, connecting
from lifelogger.connecting import Attempt
from lifelogger.connections import AccountTaken
from lifelogger.errors import LifeloggerError, Refused, Wait
from lifelogger.http import is_loopback
from lifelogger.runtime import Runtime
from lifelogger.runtime import runtime as processwide
from lifelogger.web.login import local
from lifelogger.web.render import page

log = logging.getLogger(__name__)

COOKIE = "lifelogger_connect"
SECONDS = 600
"""How long somebody may take at the provider's page."""
TOO_LATE = (
    "This answer came too late, was used already, or belongs to another browser. Nothing was connected: "
    "begin again."
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the person is told."""

    status: int
    title: str
    sentence: str
    next: str
    """Where they wanted to go on: a path of this application."""


def told(request: Request, outcome: Outcome) -> Response:
    """The outcome as a page of its own, which belongs into any application."""
    return page("told.html", outcome.status, **asdict(outcome))


def router(
    user: Callable[..., Any],
    *,
    returning: Callable[..., Any] | None = None,
    base_url: str = "",
    tell: Callable[[Request, Outcome], Response] = told,
    runtime: Runtime | None = None,
) -> APIRouter:
    """Two routes: `/{provider}`, where the signed-in user sets out, and `/callback`.

    `user` is a dependency that returns the id of whoever is signed in, or raises. It is asked again when they
    come back: an account of somebody else who has signed in meanwhile is not connected. `returning` may take
    its place there; where it returns None, the browser's cookie alone counts.

    `base_url` is where browsers reach the application that the router is in, by default `web.public_url`. The
    redirect address begins with it and never with a `Host` header, but for a browser on this machine.

    `tell` answers with whatever is not plain success: a refusal, a partial grant, a provider that is down.
    After success the person goes on to `next`, a path of the application.
    """
    routes = APIRouter(include_in_schema=False)

    @routes.get("/callback")
    def come_back(request: Request, who: Any = Depends(returning or user)) -> Response:
        rt = runtime or processwide()
        query = dict(request.query_params)
        try:
            found = take(rt, query.get("state", ""), request.cookies.get(COOKIE, ""))
        except RedisError:
            return tell(request, Outcome(503, "Not now", REDIS_AWAY, "/"))
        if found is None:
            return tell(request, Outcome(400, "Nothing was connected", TOO_LATE, "/"))
        attempt, next = found
        if who is not None and who != attempt.user_id:
            sentence = "Somebody else has signed in here meanwhile. Nothing was connected: begin again."
            return tell(request, Outcome(403, "Nothing was connected", sentence, next))
        title = rt.providers[attempt.provider].title
        try:
            done = connecting.come_back(rt, attempt, query)
        except LifeloggerError as error:
            return tell(request, refusal(title, error, next))
        begin_import(rt, attempt.user_id)
        if done.missing:
            sentence = (
                f"{title} is connected, but this was not granted: {', '.join(done.missing)}. "
                "What needs it is not synced; whoever connects again is asked again."
            )
            return tell(request, Outcome(200, "Connected in part", sentence, next))
        return RedirectResponse(next, 303)

    @routes.get("/{provider}")
    def set_out(
        request: Request,
        provider: str,
        next: Annotated[str, Query(max_length=2000)] = "/",
        application: Annotated[str | None, Query(max_length=50)] = None,
        who: Any = Depends(user),
    ) -> Response:
        if not isinstance(who, str) or not who:
            raise HTTPException(401, "Nobody is signed in.")
        if request.headers.get("sec-fetch-site", "none") == "cross-site":
            raise HTTPException(403, "Another site cannot connect an account here: begin on our own page.")
        rt = runtime or processwide()
        next = local(next)
        try:
            home = base_url or rt.settings.web.public_url or loopback(request)
            callback = home.rstrip("/") + beside(request)
            attempt, address = connecting.set_out(rt, who, provider, callback, application=application)
        except LifeloggerError as error:
            return tell(request, refusal("The account", error, next))
        browser = request.cookies.get(COOKIE, "")
        browser = browser if len(browser) == len(secrets.token_urlsafe(32)) else secrets.token_urlsafe(32)
        try:
            keep(rt, attempt, browser, next)
        except RedisError:
            return tell(request, Outcome(503, "Not now", REDIS_AWAY, next))
        response = RedirectResponse(address, 303, {"cache-control": "no-store"})
        # `Lax`: the cookie has to come along when the provider's page sends the browser back.
        response.set_cookie(
            COOKIE, browser, max_age=SECONDS, httponly=True, samesite="lax", secure=home.startswith("https:")
        )
        return response

    return routes


REDIS_AWAY = "Redis does not answer, so nobody can be connected now. Try again in a minute."


def refusal(title: str, error: LifeloggerError, next: str) -> Outcome:
    """Why nothing was connected, in words."""
    if isinstance(error, AccountTaken):
        return Outcome(409, "Nothing was connected", f"{title} was not connected: {error}.", next)
    if isinstance(error, Wait):
        return Outcome(503, "Not now", f"{title} was not connected: {error}. Try again later.", next)
    return Outcome(400 if isinstance(error, Refused) else 404, "Nothing was connected", f"{error}.", next)


def begin_import(rt: Runtime, user_id: str) -> None:
    """Let a worker look at once. The connection is due already: without a broker, the next tick takes it."""
    try:
        client.request_sync(user_id, runtime=rt)
    except (RedisError, BrokerConnectionError):
        log.warning("Redis is away: a first import waits for the next tick")


def loopback(request: Request) -> str:
    """The address that a browser on this machine used. Raises `LifeloggerError` for any other."""
    home = str(request.base_url)
    if not is_loopback(home):
        raise Refused("web.public_url is not set, so providers do not know where to send people back")
    return home


def beside(request: Request) -> str:
    """The path of the callback, which lies beside that of the request, within the application."""
    path = request.url.path.removeprefix(request.scope.get("root_path", ""))
    return path.rsplit("/", 1)[0] + "/callback"


# Attempts under way ----------------------------------------------------------------------------------


def keep(rt: Runtime, attempt: Attempt, browser: str, next: str) -> None:
    """Remember an attempt of one browser. Raises `RedisError`."""
    kept = json.dumps({"attempt": asdict(attempt), "browser": digest(browser), "next": next})
    rt.redis.set(key_of(rt, attempt.state), rt.vault.encrypt(kept), ex=SECONDS)


def take(rt: Runtime, state: str, browser: str) -> tuple[Attempt, str] | None:
    """The attempt of a state, and where to go on; None unless it is this browser's. It is good once."""
    sealed: Any = rt.redis.getdel(key_of(rt, state))
    if sealed is None:
        return None
    kept = json.loads(rt.vault.decrypt(sealed))
    if not hmac.compare_digest(kept["browser"], digest(browser)):
        return None
    return Attempt(**kept["attempt"]), kept["next"]


def key_of(rt: Runtime, state: str) -> str:
    """Where an attempt waits: whoever reads Redis learns no state."""
    return f"{rt.settings.redis.prefix}:connect:{digest(state)}"


def digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()
