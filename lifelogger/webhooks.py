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

from lifelogger.connections import note_hint
from lifelogger.errors import LifeloggerError, Refused
from lifelogger.http import Unauthorised, accepted, exchange
from lifelogger.providers.base import Call, Event, Heard, Json, Known, Provider, Subscription, shown
from lifelogger.runtime import Runtime
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


def hear(rt: Runtime, name: str, call: Call) -> tuple[Heard, list[str]]:
    """Write down what a call means; returns that, and the users whose sync shall be sent for.

    Raises `NoWebhooks` and `Forged`; then nothing was written.
    """
    provider = listening(rt, name)
    settings = rt.settings.providers[name]
    now = rt.clock()
    with rt.store.read() as db:
        row = db.execute(select(Webhook.__table__).where(Webhook.provider == name)).first()
    ids = frozenset(str(each["id"]) for each in row.subscriptions) if row else frozenset()
    heard = provider.webhook(settings, call, Known(now, ids, row.keys if row else None))
    if not heard.events:
        return heard, []
    with rt.store.write() as db:
        if heard.signature is not None:
            digest = hashlib.sha256(f"{name} {heard.signature}".encode(errors="replace")).hexdigest()
            first = db.execute(
                rt.store.insert(WebhookCall.__table__)
                .values(digest=digest, received_at=now)
                .on_conflict_do_nothing()
            )
            if first.rowcount != 1:
                return heard, []  # sent twice, or caught by somebody and sent again
        every = tuple(stream.name for stream in provider.streams)
        users = [note_hint(db, name, events, now) for events in together(heard.events, every)]
        if row and (row.heard_at is None or now - row.heard_at >= HEARD_EVERY):
            db.execute(update(Webhook).where(Webhook.provider == name).values(heard_at=now))
    return heard, [user for user in users if user is not None]


def listening(rt: Runtime, name: str) -> Provider:
    """The provider of that name. Raises `NoWebhooks`."""
    provider = rt.enabled().get(name)
    if provider is None:
        raise NoWebhooks(f"no provider {shown(name)} is switched on")
    if not provider.webhook_topics(rt.settings.providers[name]):
        raise NoWebhooks(f"{provider.title} has no webhooks, or none with these settings")
    return provider


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


def callback(rt: Runtime, name: str) -> str | None:
    """Where a provider shall send its events; None: it cannot reach us.

    A simulated one is on this machine, and finds us without a public address.
    """
    web = rt.settings.web
    here = f"http://[{web.host}]:{web.port}" if ":" in web.host else f"http://{web.host}:{web.port}"
    base = web.public_url or (here if name in rt.settings.simulated else "")
    return f"{base}/webhooks/{name}" if base else None


def keep_all(rt: Runtime) -> None:
    """Make, renew and repair the subscriptions of every provider that can reach us."""
    for name, provider in rt.enabled().items():
        if callback(rt, name) and provider.webhook_topics(rt.settings.providers[name]):
            try:
                keep(rt, name)
            except LifeloggerError as trouble:  # is written down; polling goes on
                log.warning("%s: its webhooks could not be checked: %s", name, trouble)


def keep(rt: Runtime, name: str, *, take_over: bool = False) -> list[Subscription]:
    """Make what is missing, renew what ends soon, end what is not wanted; returns what there is then.

    Where an application has one subscription only and it goes to another address, it is left alone unless
    we are told to `take_over`: it may be that of another installation. Raises `NoWebhooks`, `Wait` and
    `Refused`.
    """
    provider, settings = listening(rt, name), rt.settings.providers[name]
    address = callback(rt, name)
    if address is None:
        raise NoWebhooks("set web.public_url: the address under which the provider reaches this server")
    ask, now = Asker(rt, provider), rt.clock()
    try:
        keys = provider.webhook_keys(ask, settings)
        found = provider.subscriptions(ask, settings)
        save(rt, name, [each for each in found if each.callback == address], keys)
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
                    log.info("%s: the subscription to %s could not be renewed", name, each.topic)
        for topic in missing:
            provider.subscribe(ask, settings, topic, address)
            changed = True
        if changed:
            found = provider.subscriptions(ask, settings)
        mine = [each for each in found if each.callback == address]
        save(rt, name, mine, keys)
    except LifeloggerError as trouble:
        note_fault(rt, name, str(trouble))
        raise
    return mine


def remove(rt: Runtime, name: str) -> int:
    """End our subscriptions; returns how many there were. Raises as `keep`."""
    provider, settings, address = listening(rt, name), rt.settings.providers[name], callback(rt, name)
    ask = Asker(rt, provider)
    mine = [each for each in provider.subscriptions(ask, settings) if each.callback == address]
    for each in mine:
        provider.unsubscribe(ask, settings, each)
    save(rt, name, [], None)
    return len(mine)


def known(rt: Runtime) -> dict[str, dict[str, Any]]:
    """What the last check of each provider found, by name."""
    with rt.store.read() as db:
        rows = db.execute(select(Webhook.__table__).order_by(Webhook.provider))
        return {row.provider: dict(row._mapping) for row in rows}


def save(rt: Runtime, name: str, found: list[Subscription], keys: Json) -> None:
    told = [
        {
            "id": each.id,
            "topic": each.topic,
            "callback": each.callback,
            "expires_at": each.expires_at.isoformat() if each.expires_at else None,
        }
        for each in found
    ]
    put(rt, name, {"subscriptions": told, "keys": keys, "checked_at": rt.clock(), "fault": None})


def note_fault(rt: Runtime, name: str, fault: str) -> None:
    """The last check did not end well; what was known before stays."""
    put(rt, name, {"checked_at": rt.clock(), "fault": fault})


def put(rt: Runtime, name: str, values: dict[str, Any]) -> None:
    row = {"provider": name, "subscriptions": [], **values}
    statement = rt.store.insert(Webhook.__table__).values(row)
    with rt.store.write() as db:
        db.execute(statement.on_conflict_do_update(index_elements=["provider"], set_=values))


class Asker:
    """Requests in the application's own name. They spend from what all connections share."""

    def __init__(self, rt: Runtime, provider: Provider) -> None:
        self.rt, self.provider = rt, provider
        self.settings = rt.settings.providers[provider.name]

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
        rt, provider = self.rt, self.provider
        ticket = rt.budget.take(provider.shared_pools(self.settings))
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
