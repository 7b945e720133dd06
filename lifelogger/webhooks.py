"""Webhooks: what a provider's calls mean for whom, and the subscriptions that make it call.

    call ─▶ believed? ─▶ written down (`news_at`, its streams) ─▶ answered ─▶ a message, if Redis is there

What is its own about a provider (handshakes, signatures, where subscriptions are made) is in its module.
Receiving asks nobody but the database; keeping subscriptions asks the provider, with no transaction open.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import select, update

from lifelogger.connections import note_hint, unknown_application
from lifelogger.errors import LifeloggerError, Refused
from lifelogger.http import Unauthorised, accepted, exchange
from lifelogger.providers.base import Call, Event, Heard, Json, Known, Subscription, shown
from lifelogger.runtime import Application, Runtime
from lifelogger.settings import MAIN, path_of
from lifelogger.store import journal
from lifelogger.store.models import Webhook, WebhookCall

log = logging.getLogger(__name__)

RENEW_BEFORE = timedelta(days=2)
"""A subscription is renewed when no more of its time is left: dozens of checks may fail until it ends."""
CALLS_KEPT = timedelta(days=8)
"""How long a signed call is known again. The longest that a provider tries is a week."""

HEARD_EVERY = timedelta(minutes=1)
"""How exactly it is kept when an event last came: they would all wait for one row otherwise."""


class NoWebhooks(LifeloggerError):
    """This provider has no webhooks here; the message says why."""


# Receiving -----------------------------------------------------------------------------------------


def hear(rt: Runtime, name: str, call: Call, application: str = MAIN) -> tuple[Heard, list[str]]:
    """Write down what a call to an application means; returns that, and the users who shall be synced.

    Raises `NoWebhooks` and `Forged`; then nothing was written.
    """
    listener = listening(rt, name, application)
    provider, now = listener.provider, rt.clock()
    its = Webhook.provider == name, Webhook.application == application
    with rt.store.read() as db:
        row = db.execute(select(Webhook.__table__).where(*its)).first()
    ids = frozenset(str(each["id"]) for each in row.subscriptions) if row else frozenset()
    heard = provider.webhook(listener.settings, call, Known(now, ids, row.keys if row else None))
    if not heard.events:
        return heard, []
    with rt.store.write() as db:
        if heard.signature is not None:
            signed = f"{listener.path} {heard.signature}"
            digest = hashlib.sha256(signed.encode(errors="replace")).hexdigest()
            first = db.execute(
                rt.store.insert(WebhookCall.__table__)
                .values(digest=digest, received_at=now)
                .on_conflict_do_nothing()
            )
            if first.rowcount != 1:
                return heard, []  # sent twice, or caught by somebody and sent again
        every = tuple(stream.name for stream in provider.streams)
        users = [note_hint(db, name, events, now, application) for events in together(heard.events, every)]
        if row and (row.heard_at is None or now - row.heard_at >= HEARD_EVERY):
            db.execute(update(Webhook).where(*its).values(heard_at=now))
    return heard, [user for user in users if user is not None]


def listening(rt: Runtime, name: str, application: str = MAIN) -> Application:
    """The application of those names. Raises `NoWebhooks`."""
    if name not in rt.enabled():
        raise NoWebhooks(f"no provider {shown(name)} is switched on")
    if unknown := unknown_application(rt, name, application):
        raise NoWebhooks(f"{name}: the application {unknown}")
    found = rt.application(name, application)
    if not found.provider.webhook_topics(found.settings):
        raise NoWebhooks(f"{found.title} has no webhooks, or none with these settings")
    return found


def together(events: tuple[Event, ...], every: tuple[str, ...]) -> list[list[Event]]:
    """The events of each owner, in the same order whoever sends: rows are locked one after the other.

    One that names no stream is of `every` one: even so it is a hint, not a person's wish.
    """
    found: dict[str, list[Event]] = {}
    for event in events:
        found.setdefault(event.owner, []).append(replace(event, streams=event.streams or every))
    return [found[owner] for owner in sorted(found)]


def forget_calls(rt: Runtime) -> None:
    """Delete what need not be known again."""
    journal.forget_rows(rt.store, WebhookCall.received_at, rt.clock() - CALLS_KEPT)


# Subscriptions -------------------------------------------------------------------------------------


def callback(rt: Runtime, name: str, application: str = MAIN) -> str | None:
    """Where a provider shall send the events of an application; None: it cannot reach us.

    A simulated one is on this machine, and finds us without a public address.
    """
    web = rt.settings.web
    here = f"http://[{web.host}]:{web.port}" if ":" in web.host else f"http://{web.host}:{web.port}"
    base = web.public_url or (here if name in rt.settings.simulated else "")
    return f"{base}/webhooks/{path_of(name, application)}" if base else None


def keep_all(rt: Runtime) -> None:
    """Make, renew and repair the subscriptions of every application whose provider can reach us."""
    for each in rt.applications():
        if callback(rt, *each.key) and each.provider.webhook_topics(each.settings):
            try:
                keep(rt, *each.key)
            except LifeloggerError as trouble:  # is written down; polling goes on
                log.warning("%s: its webhooks could not be checked: %s", each.path, trouble)


def keep(rt: Runtime, name: str, application: str = MAIN, *, take_over: bool = False) -> list[Subscription]:
    """Make what is missing, renew what ends soon, end what is not wanted; returns what there is then.

    Where an application has one subscription only and it goes to another address, it is left alone unless
    we are told to `take_over`: it may be that of another installation. Raises `NoWebhooks`, `Wait` and
    `Refused`.
    """
    mine = listening(rt, name, application)
    provider, settings, address = mine.provider, mine.settings, callback(rt, name, application)
    if address is None:
        raise NoWebhooks("set web.public_url: the address under which the provider reaches this server")
    ask, now = Asker(rt, mine), rt.clock()
    try:
        keys = provider.webhook_keys(ask, settings)
        found = provider.subscriptions(ask, settings)
        save(rt, name, [each for each in found if each.callback == address], keys, application)
        changed = False
        if take_over and provider.one_subscription:
            for each in found:
                if each.callback != address:
                    provider.unsubscribe(ask, settings, each)
        missing = list(provider.webhook_topics(settings))
        for each in found:
            if each.callback != address:
                continue
            if each.topic not in missing:
                provider.unsubscribe(ask, settings, each)
                changed = True
            elif each.expires_at is None or each.expires_at - now > RENEW_BEFORE:
                missing.remove(each.topic)
            else:
                changed = True
                try:
                    provider.renew(ask, settings, each)
                    missing.remove(each.topic)
                except Refused:  # it is over already: a new one takes its place
                    log.info("%s: the subscription to %s could not be renewed", mine.path, each.topic)
        for topic in missing:
            provider.subscribe(ask, settings, topic, address)
            changed = True
        if changed:
            found = provider.subscriptions(ask, settings)
        ours = [each for each in found if each.callback == address]
        save(rt, name, ours, keys, application)
    except LifeloggerError as trouble:
        note_fault(rt, name, str(trouble), application)
        raise
    return ours


def remove(rt: Runtime, name: str, application: str = MAIN) -> int:
    """End our subscriptions; returns how many there were. Raises as `keep`."""
    mine = listening(rt, name, application)
    provider, settings, address = mine.provider, mine.settings, callback(rt, name, application)
    ask = Asker(rt, mine)
    ours = [each for each in provider.subscriptions(ask, settings) if each.callback == address]
    for each in ours:
        provider.unsubscribe(ask, settings, each)
    save(rt, name, [], None, application)
    return len(ours)


def known(rt: Runtime) -> dict[str, dict[str, Any]]:
    """What the last check found of each application's, by its path: of a main one the provider's name."""
    with rt.store.read() as db:
        rows = db.execute(select(Webhook.__table__).order_by(Webhook.provider, Webhook.application))
        return {path_of(row.provider, row.application): dict(row._mapping) for row in rows}


def save(rt: Runtime, name: str, found: list[Subscription], keys: Json, application: str = MAIN) -> None:
    told = [
        {
            "id": each.id,
            "topic": each.topic,
            "callback": each.callback,
            "expires_at": each.expires_at.isoformat() if each.expires_at else None,
        }
        for each in found
    ]
    values = {"subscriptions": told, "keys": keys, "checked_at": rt.clock(), "fault": None}
    put(rt, name, application, values)


def note_fault(rt: Runtime, name: str, fault: str, application: str = MAIN) -> None:
    """The last check did not end well; what was known before stays."""
    put(rt, name, application, {"checked_at": rt.clock(), "fault": fault})


def put(rt: Runtime, name: str, application: str, values: dict[str, Any]) -> None:
    row = {"provider": name, "application": application, "subscriptions": [], **values}
    statement = rt.store.insert(Webhook.__table__).values(row)
    with rt.store.write() as db:
        db.execute(statement.on_conflict_do_update(index_elements=["provider", "application"], set_=values))


class Asker:
    """Requests in the application's own name. They spend from what all connections share."""

    def __init__(self, rt: Runtime, application: Application) -> None:
        self.rt, self.application = rt, application

    @property
    def now(self) -> datetime:
        return self.rt.clock()

    def __call__(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        params: Mapping[str, str] | None = None,
        data: Mapping[str, str] | None = None,
        json: Json = None,
    ) -> Json:
        rt, provider = self.rt, self.application.provider
        ticket = rt.budget.take(self.application.pools)
        content: dict[str, Any] = {"headers": headers, "params": params, "data": data, "json": json}
        reply = exchange(provider, rt.budget, ticket, rt.settings.http, rt.clock, method, url, **content)
        if 200 <= reply.status < 300 and method == "DELETE":
            return None  # mostly without a body
        try:
            return accepted(provider.title, "its webhooks", reply, provider)
        except Unauthorised:
            raise Refused(
                f"{provider.title}: its webhooks: the application is not authorised (401)"
            ) from None
