"""Connecting an account: the OAuth code grant (RFC 6749, 4.1), and how the command line waits for it.

    set_out ─▶ the provider's page, where the person agrees ─▶ come_back

What lies between is the caller's: a web application keeps the `Attempt` (`lifelogger.web.connect`), the
command line waits with a small server on this machine alone (RFC 8252, 7.3) that answers one callback.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import math
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, NoReturn
from urllib.parse import parse_qs, urlsplit

from pydantic import SecretStr, ValidationError
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from lifelogger.connections import Line, save, unknown_application
from lifelogger.errors import LifeloggerError, Refused, SignInAgain
from lifelogger.habits import DAY
from lifelogger.http import Http, call_token_endpoint
from lifelogger.leaving import end_former, revoke_waiting
from lifelogger.providers.base import Grant, shown, split_scopes
from lifelogger.runtime import Application, Runtime
from lifelogger.settings import MAIN
from lifelogger.store import counts
from lifelogger.store.models import Connection

HOST = "127.0.0.1"
PATH = "/callback"
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>lifelogger</title><link rel="icon" href="data:,">
<style>body {{ font: 16px/1.5 system-ui; max-width: 26rem; margin: 12vh auto; padding: 0 1.25rem }}</style>
<p>{}</p></html>
"""


def _same(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode(errors="replace"), expected.encode())


class Callback:
    """Waits for one authorisation to come back. `with` it; `address` is the redirect address."""

    def __init__(self, state: str, port: int = 0) -> None:
        self.query: dict[str, str] = {}
        self._came = threading.Event()
        callback = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                parts = urlsplit(self.path)
                query = {name: values[0] for name, values in parse_qs(parts.query).items()}
                if parts.path != PATH or not _same(query.get("state", ""), state):
                    self.answer(400, "This is not the answer that lifelogger waits for.")
                    return
                agreed = "code" in query and "error" not in query
                done = "Thank you." if agreed else "Nothing was connected."
                self.answer(200, f"{done} You can close this page and go back to the command line.")
                callback.query = query
                callback._came.set()

            def answer(self, status: int, sentence: str) -> None:
                body = PAGE.format(escape(sentence)).encode()
                self.send_response(status)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *details: Any) -> None:
                """Nothing is logged: the address holds the code."""

        try:
            self._server = ThreadingHTTPServer((HOST, port), Handler)
        except OSError as error:
            raise LifeloggerError(f"Cannot listen on {HOST} port {port}: {error.strerror}") from None
        self.address = f"http://{HOST}:{self._server.server_port}{PATH}"

    def __enter__(self) -> Callback:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def wait(self, seconds: float) -> dict[str, str]:
        """The query of the callback. Raises `LifeloggerError` when none comes in time."""
        if not self._came.wait(seconds):
            raise LifeloggerError(
                f"Nobody came back from the provider's page within {seconds:g} s: ask again"
            )
        return self.query


@dataclass(frozen=True, slots=True)
class Attempt:
    """Somebody on their way to a provider's page, and what they have to come back with."""

    user_id: str
    provider: str
    redirect_uri: str
    state: str = field(repr=False)
    verifier: str | None = field(repr=False)
    """The secret of the proof key (RFC 7636), where the provider takes one."""
    application: str = MAIN
    """Whose client id the tokens will be given to."""


class Connected(NamedTuple):
    """What came of an attempt."""

    new: bool
    """False: connected again; the tokens are new, the data and the cursors stayed."""
    missing: list[str]
    """Scopes that were asked for and not granted."""


def set_out(
    rt: Runtime,
    user_id: str,
    provider_name: str,
    redirect_uri: str,
    state: str | None = None,
    application: str | None = None,
) -> tuple[Attempt, str]:
    """Begin to connect a user's account; returns the attempt, and the address to open.

    `application` names one of the provider's; None: see `application_for`. Raises `LifeloggerError` when
    nobody can connect there.
    """
    provider = rt.enabled().get(provider_name)
    if provider is None:
        raise LifeloggerError(
            f"No provider {shown(provider_name)} is enabled: {', '.join(rt.enabled()) or 'none at all'}"
        )
    chosen = application_for(rt, user_id, provider_name, application)
    settings = chosen.settings
    if not settings.client_id:
        raise LifeloggerError(
            f"providers.{provider_name}.client_id is not set: {provider.title} has no application"
        )
    # A grant of theirs that is still to be revoked would take the new one with it, afterwards.
    revoke_waiting(rt, provider_name)
    verifier = secrets.token_urlsafe(48) if provider.pkce else None
    state = state or secrets.token_urlsafe(32)
    attempt = Attempt(user_id, provider_name, redirect_uri, state, verifier, chosen.name)
    address = provider.authorize_address(
        settings,
        redirect_uri=redirect_uri,
        state=attempt.state,
        challenge=challenge_of(verifier) if verifier else None,
    )
    return attempt, address


def application_for(rt: Runtime, user_id: str, provider: str, asked: str | None = None) -> Application:
    """The application to connect a user's account to.

    The one that is asked for, or that they are connected to already: their tokens belong to it. Whoever is
    new goes where there are most requests a day for each connection. Raises `LifeloggerError` when there is
    none of the name, and `Unavailable` when the budgets cannot be read.
    """
    if asked is not None and (unknown := unknown_application(rt, provider, asked)):
        raise LifeloggerError(f"{provider}: the application {unknown}")
    every = {each.name: each for each in rt.applications() if each.provider.name == provider}
    if asked is not None:
        return every[asked]
    if len(every) == 1:
        return every[MAIN]
    mine = select(Connection.application).where(
        Connection.user_id == user_id, Connection.provider == provider
    )
    with rt.store.read() as db:
        connected = db.scalar(mine)
        numbers = counts.of_applications(db, provider)
    if connected in every:
        return every[connected]
    return max(every.values(), key=lambda each: a_day(rt, each) / (numbers.get(each.name, 0) + 1))


def a_day(rt: Runtime, application: Application) -> float:
    """The requests a day that an application may send, by its narrowest window."""
    windows = rt.budget.windows(application.pools)
    return min((window.limit * DAY / window.seconds for window in windows), default=math.inf)


def come_back(rt: Runtime, attempt: Attempt, query: Mapping[str, str]) -> Connected:
    """Store the connection that the query of a callback brings; its `state` was checked.

    Raises `LifeloggerError` with a sentence when the person or the provider refuses, or the account is
    somebody else's.
    """
    provider = rt.providers[attempt.provider]
    if "error" in query or "code" not in query:
        why = query.get("error", "no code came back")
        why = "the person did not agree" if why == "access_denied" else f"{why:.100}"
        raise Refused(f"{provider.title} was not connected: {why}")
    grant = _redeem(rt, attempt, query["code"])
    account = grant.provider_user_id or _account(rt, attempt, grant.access_token)
    told = (grant.scopes, split_scopes(query.get("scope")), provider.scopes)
    scopes = next(scopes for scopes in told if scopes is not None)  # none at all is an answer, too
    if not scopes:
        raise Refused(f"{provider.title} was not connected: nothing was granted")
    try:
        line = Line(
            user_id=attempt.user_id,
            provider=attempt.provider,
            application=attempt.application,
            access_token=SecretStr(grant.access_token),
            refresh_token=SecretStr(grant.refresh_token) if grant.refresh_token else None,
            expires_at=grant.expires_at,
            scopes=list(scopes),
            provider_user_id=account,
        )
    except ValidationError as error:
        fields = ", ".join(str(each["loc"][0]) for each in error.errors())
        raise Refused(f"{provider.title} sent what cannot be stored: {fields}") from None
    try:
        with rt.store.write() as db:
            end_former(rt, db, attempt.user_id, attempt.provider, attempt.application)
            new = save(rt, db, line)
    except IntegrityError:  # erased, or connected by somebody else, in this very moment
        raise Refused(
            f"{provider.title} was not connected: the user or the account changed meanwhile"
        ) from None
    return Connected(new, [scope for scope in provider.scopes if scope not in scopes])


def connect(
    rt: Runtime,
    user_id: str,
    provider_name: str,
    show: Callable[[str], None],
    *,
    application: str | None = None,
    port: int = 0,
    seconds: float = 300,
) -> Connected:
    """Connect from the command line: `show` gets the address to open; returns when the callback has come.

    `application` as in `set_out`. Raises as `set_out` and `come_back`, and when nobody comes back in time.
    """
    state = secrets.token_urlsafe(32)
    with Callback(state, port) as callback:
        attempt, address = set_out(rt, user_id, provider_name, callback.address, state, application)
        show(address)
        query = callback.wait(seconds)
    return come_back(rt, attempt, query)


def challenge_of(verifier: str) -> str:
    """The proof key's challenge (RFC 7636, 4.2)."""
    return base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()


def _account(rt: Runtime, attempt: Attempt, token: str) -> str | None:
    """Whose token it is, for a provider that tells it only when asked."""

    def renew(refused: str) -> NoReturn:
        raise SignInAgain("the provider refuses the token that it has just given")

    of = rt.application(attempt.provider, attempt.application)
    http = Http(of.provider, of.settings, rt.settings.http, rt.budget, 0, token, renew, rt.clock)
    return of.provider.account(http)


def _redeem(rt: Runtime, attempt: Attempt, code: str) -> Grant:
    of = rt.application(attempt.provider, attempt.application)
    provider, settings = of.provider, of.settings
    proof = {} if attempt.verifier is None else {"code_verifier": attempt.verifier}
    reply = call_token_endpoint(
        provider,
        settings,
        rt.settings.http,
        rt.budget,
        rt.clock,
        provider.pools(settings, 0, token=True),
        {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": attempt.redirect_uri,
            **proof,
        },
    )
    if reply.status >= 300:
        raise Refused(
            f"{provider.title} refused the code ({reply.status}): are its client_id and client_secret right?"
        )
    return provider.grant(reply.body, rt.clock())
