"""The change feed as outgoing webhooks, signed as Standard Webhooks says (standardwebhooks.com).

    endpoint's cursor ─▶ page of changes ─▶ POST, signed ─▶ 2xx: the cursor goes on, the next page
                                                        └▶ else: written down when it is tried again

In order and at least once: the cursor moves only after an answer, so whoever dies in between sends a page
again, under the same id. One page after the other, so an endpoint that fails is not overtaken by itself, and
one page of each endpoint in turn, so that none waits long for another.

Whoever syncs wakes it, and a tick makes good what was missed. Which address it is, is the operator's choice;
redirects are refused, because where they lead is not. No address, payload or answer is written to a log.
"""

from __future__ import annotations

import json
import logging
import random
import secrets
import time
from base64 import b64encode
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import requests
from sqlalchemy import select, update
from standardwebhooks import Webhook

from lifelogger import __version__, client, notices
from lifelogger.http import Session, untold
from lifelogger.runtime import Runtime
from lifelogger.status import as_json, digest_of
from lifelogger.store import feed
from lifelogger.store.models import Endpoint

log = logging.getLogger(__name__)

RECORDS = "records.changed"
CONNECTIONS = {"sign_in_again": "connection.sign_in_again", "signed_in": "connection.signed_in"}
"""The type of a message by the action of its only change; a page of all others is `RECORDS`."""
PAGE = 50
"""Changes in one request."""
FIRST_RETRY = timedelta(minutes=1)
LONGEST_RETRY = timedelta(hours=6)
CONNECT_SECONDS = 5
READ_SECONDS = 15
MOST_SECONDS = 240.0
"""How long one delivery of everything goes on before it leaves the rest to the next tick."""


def new_secret() -> str:
    """A secret to sign with, as `notify.secrets` takes it."""
    return "whsec_" + b64encode(secrets.token_bytes(32)).decode()


def deliver(rt: Runtime) -> None:
    """Send what each endpoint has not had yet, as far as they take it."""
    if rt.settings.notify.urls:
        notices.publish(rt)
    until = time.monotonic() + MOST_SECONDS
    with Session() as session, untold():  # an address may hold a secret
        session.trust_env = False  # no .netrc, no proxy: they are for other addresses
        waiting = list(rt.settings.notify.urls)
        while waiting and time.monotonic() < until:
            waiting = [url for url in waiting if _next_page(rt, session, url)]


def _next_page(rt: Runtime, session: Session, url: str) -> bool:
    """Send one page to one endpoint; whether there may be more to send now."""
    row = _endpoint(rt, url)
    if row.next_try_at is not None and row.next_try_at > rt.clock():
        return False
    try:
        page = _page(rt, str(row.cursor))
    except client.CursorUnknown:
        # The database is an older one than that cursor's: all of it once more is better than a gap.
        log.warning("%s gets every record again: the database is from before its last change", _host(url))
        return _advance(rt, row, 0)
    if not page.changes:
        if page.next != str(row.cursor):
            _advance(rt, row, int(page.next))
        return False
    with rt.store.write() as db:  # so that one which holds us up until we are ended does not come first again
        db.execute(
            update(Endpoint)
            .where(Endpoint.digest == row.digest)
            .values(next_try_at=rt.clock() + FIRST_RETRY, reason="has not answered yet")
        )
    trouble, after = _send(rt, session, url, row, page)
    if trouble is None:
        return _advance(rt, row, int(page.next), delivered_at=rt.clock())
    _fail(rt, url, row, trouble, after)
    return False


def _page(rt: Runtime, cursor: str) -> client.Changes:
    """The next changes that go into one message: many of records, or one of a connection.

    Raises `CursorUnknown`.
    """
    alike, page = PAGE, client.Changes([], cursor)
    while len(page.changes) != alike:
        page = client.changes(cursor, limit=alike, connections=True, runtime=rt)
        others = (at for at, each in enumerate(page.changes) if each["action"] in CONNECTIONS)
        alike = max(1, next(others, len(page.changes))) if page.changes else 0
    return page


def _endpoint(rt: Runtime, url: str) -> Any:
    """The row of an endpoint. One that is new hears of what changes from now on, not of all the past."""
    digest = digest_of(url)
    with rt.store.read() as db:
        row = db.execute(select(Endpoint.__table__).where(Endpoint.digest == digest)).one_or_none()
    if row is not None:
        return row
    with rt.store.write() as db:
        new = {"digest": digest, "cursor": feed.newest(db), "failures": 0, "created_at": rt.clock()}
        db.execute(rt.store.insert(Endpoint.__table__).values(new).on_conflict_do_nothing())
        return db.execute(select(Endpoint.__table__).where(Endpoint.digest == digest)).one()


def _send(
    rt: Runtime, session: Session, url: str, row: Any, page: client.Changes
) -> tuple[str | None, timedelta | None]:
    """What went wrong, if anything, and how long the endpoint wants to be left alone."""
    # The same id means the same span of the feed. A page sent again may have lost what changed meanwhile,
    # which comes later, but never has more: so who drops it as a double has missed nothing.
    name = f"msg_{row.digest[:12]}_{row.cursor}_{page.next}"
    body = json.dumps(as_json(_payload(page)), separators=(",", ":"))
    try:
        reply = session.post(
            url,
            data=body.encode("ascii"),
            headers=_headers(rt.settings.notify.signing_secrets, name, rt.clock(), body),
            timeout=(CONNECT_SECONDS, READ_SECONDS),
            allow_redirects=False,
            stream=True,  # what it answers is nothing to us
        )
    except requests.RequestException as error:
        return f"does not answer ({type(error).__name__})", None
    with reply:
        if 200 <= reply.status_code < 300:
            return None, None
        wait = reply.headers.get("retry-after", "")
        asked = (
            timedelta(seconds=int(wait)) if wait.isascii() and wait.isdecimal() and len(wait) < 7 else None
        )
        what = "redirects, which is refused" if 300 <= reply.status_code < 400 else "refuses it"
        return f"{what} ({reply.status_code})", asked


def _payload(page: client.Changes) -> dict[str, Any]:
    first = page.changes[0]
    if first["action"] in CONNECTIONS:
        told = {"user_id": first["user_id"], "provider": first["provider"], "reason": first["reason"]}
        kind = CONNECTIONS[first["action"]]
        return {"type": kind, "timestamp": first["at"], "data": {**told, "next": page.next}}
    changes = [
        {**each, "record": each["record"] and {k: v for k, v in each["record"].items() if k != "raw"}}
        for each in page.changes
    ]
    return {
        "type": RECORDS,
        "timestamp": page.changes[-1]["at"],
        "data": {"changes": changes, "next": page.next},
    }


def _headers(keys: Sequence[str], name: str, now: datetime, body: str) -> dict[str, str]:
    """Signed with every secret, so that a new one can be tried before the old one goes."""
    return {
        "content-type": "application/json",
        "user-agent": f"lifelogger/{__version__}",
        "webhook-id": name,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": " ".join(Webhook(key).sign(name, now, body) for key in keys),
    }


def _advance(rt: Runtime, row: Any, cursor: int, **values: Any) -> bool:
    """Write down what the endpoint has; False: somebody else has done so."""
    values |= {"cursor": cursor, "failures": 0, "next_try_at": None, "reason": None}
    mine = (Endpoint.digest == row.digest, Endpoint.cursor == row.cursor)
    with rt.store.write() as db:
        return db.execute(update(Endpoint).where(*mine).values(values)).rowcount == 1


def _fail(rt: Runtime, url: str, row: Any, trouble: str, asked: timedelta | None) -> None:
    """Write down when it is tried again: doubling, with jitter, and not before the endpoint wants it."""
    wait = min(FIRST_RETRY * 2 ** min(row.failures, 20), LONGEST_RETRY) * random.uniform(0.8, 1.2)
    wait = min(max(wait, asked or wait), LONGEST_RETRY * 1.2)
    mine = (Endpoint.digest == row.digest, Endpoint.cursor == row.cursor)
    values = {"failures": row.failures + 1, "next_try_at": rt.clock() + wait, "reason": trouble}
    with rt.store.write() as db:
        db.execute(update(Endpoint).where(*mine).values(values))
    log.warning("%s %s: tried again in %d s", _host(url), trouble, wait.total_seconds())


def _host(url: str) -> str:
    return f"The webhook endpoint at {urlsplit(url).hostname}"
