"""How everything stands, for people and programs: the same words on the page, in the CLI and in the API.

Everything returned is plain: dictionaries of strings, numbers and UTC datetimes, ready for `as_json`.
Nothing here changes anything, and no secret is in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from datetime import date, datetime
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy import func, select

from lifelogger import pacing, progress, webhooks
from lifelogger.budget import Window
from lifelogger.errors import Unavailable
from lifelogger.habits import DAY
from lifelogger.pacing import Pace
from lifelogger.planner import AGAIN
from lifelogger.providers.base import Pool
from lifelogger.runtime import Runtime
from lifelogger.settings import MAIN, Sync
from lifelogger.store import counts, feed
from lifelogger.store.models import Connection, Endpoint, Quarantined, Record, Stream, SyncRun, Tick, User


def overview(rt: Runtime, *, budgets: bool = True) -> dict[str, Any]:
    """What `status --json` and `/api/status` say: totals, the last tick, and each enabled provider.

    `counted_at` is when the numbers were true: now, but for a large store (`store.counts`).
    Without `budgets` Redis is not asked: for who knows that it does not answer, and will not wait.
    """
    now = rt.clock()
    with rt.store.read() as db:
        counted = counts.read(db, now)
        fired = select(Tick.__table__).where(Tick.name != AGAIN).order_by(Tick.fired_at.desc())
        tick = db.execute(fired.limit(1)).first()
        # Chosen by number: joined, SQLite would read all connections in the order of their providers.
        names = frozenset[str]().union(*(progress.wanted(rt, name) for name in rt.enabled()))
        unread = select(Stream.connection_id).where(
            Stream.backlog_until.is_not(None), Stream.off_reason.is_(None), Stream.name.in_(names)
        )
        imports = db.execute(
            select(Connection.provider, func.count())
            .where(Connection.id.in_(unread), Connection.status == "active")
            .group_by(Connection.provider)
        ).all()
        paces = {each.key: pacing.read(db, *each.key) for each in rt.applications()}
    importing = {row[0]: row[1] for row in imports}
    hooks = webhook_states(rt)
    providers = {}
    for name, provider in rt.enabled().items():
        found = counted.providers.get(name, counts.OfProvider())
        providers[name] = {
            "title": provider.title,
            "simulated": name in rt.settings.simulated,
            "connections": found.connections,
            "needs_reauth": found.needs_reauth,
            "importing": importing.get(name, 0),
            "records": found.records,
            "recheck": rechecked(paces[name, MAIN], rt.settings.sync),
            "webhooks": hooks[name],
            "budget": budget(rt, name) if budgets else None,
            "applications": applications(rt, name, found, hooks, paces, budgets),
            "last_sync": found.last_sync,
            "waiting": found.waiting,
            "waits": [asdict(wait) for wait in found.waits],
        }
    return {
        "now": now,
        "counted_at": counted.counted_at,
        "users": counted.users,
        "connections": counted.connections,
        "records": counted.records,
        "quarantined": counted.quarantined,
        "importing": sum(importing.values()),
        "last_tick": tick and dict(tick._mapping),
        "providers": providers,
        "notify": endpoints(rt),
    }


def applications(
    rt: Runtime,
    provider: str,
    found: counts.OfProvider,
    hooks: Mapping[str, Any],
    paces: Mapping[tuple[str, str], Pace],
    budgets: bool = True,
) -> list[dict[str, Any]]:
    """How each application of a provider stands, where there are several; nothing where there is one.

    One that has connections and is not in the settings any more is among them: `budget`, `webhooks` and
    `recheck` are None then.
    """
    there = {each.name: each for each in rt.applications() if each.provider.name == provider}
    names = list(dict.fromkeys((*there, *sorted(found.applications))))
    states = []
    for name in names if len(names) > 1 else ():
        number = found.applications.get(name, 0)
        known = name in there
        sentence = f"{count(number, 'connection')}{'.' if known else f': {NOT_THERE}'}"
        states.append(
            {
                "name": name,
                "connections": number,
                "budget": budget(rt, provider, name) if known and budgets else None,
                "webhooks": hooks[there[name].path] if known else None,
                "recheck": rechecked(paces[provider, name], rt.settings.sync) if known else None,
                "sentence": sentence,
            }
        )
    return states


NOT_THERE = "waiting until it is in the settings again."


def webhook_states(rt: Runtime) -> dict[str, dict[str, Any]]:
    """What we are told without asking, by path of the application; of a main one that is the provider's name.

    `ok` None: nothing, so polling alone brings the news.
    """
    known, found = webhooks.known(rt), {}
    for each_of in rt.applications():
        row, address = known.get(each_of.path, {}), webhooks.callback(rt, *each_of.key)
        topics = each_of.provider.webhook_topics(each_of.settings)
        alive = {
            each["topic"]
            for each in row.get("subscriptions", ())
            if each["callback"] == address
            and not (each["expires_at"] and datetime.fromisoformat(each["expires_at"]) <= rt.clock())
        }
        there = len(alive.intersection(topics))
        state = {
            "wanted": len(topics),
            "subscribed": there,
            **{key: row.get(key) for key in ("checked_at", "heard_at", "fault")},
        }
        which = "" if each_of.name == MAIN else f" --application {each_of.name}"
        mends = f"`lifelogger webhooks subscribe {each_of.provider.name}{which}`"
        ok: bool | None = None
        if not topics:
            sentence = "No webhooks with these settings: docs/webhooks.md says what they need."
        elif address is None:
            sentence = "No webhooks: set web.public_url to where the provider reaches this server."
        elif not row:
            sentence = f"Webhooks were not subscribed to yet: {mends} does, or the scheduler within the hour."
        elif row["fault"]:
            ok = False
            sentence = f"The last check of its webhooks failed: {ended(row['fault'])} {mends} tries again."
        elif there < len(topics):
            ok = False
            sentence = f"Webhooks: {there} of {count(len(topics), 'subscription')}: {mends} mends it."
        else:
            heard = row["heard_at"]
            last = f"the last event came at {moment(heard, rt.clock())}" if heard else "no event has come yet"
            ok, sentence = True, f"Webhooks: {count(len(topics), 'subscription')}, {last}."
        found[each_of.path] = {"ok": ok, **state, "sentence": sentence}
    return found


def endpoints(rt: Runtime) -> list[dict[str, Any]]:
    """How each address of `notify.urls` stands, by its host: the rest may be secret.

    `behind_since` is when the oldest change happened that it was not told of; None: it knows all.
    """
    with rt.store.read() as db:
        newest = feed.newest(db)
        known = {row.digest: row for row in db.execute(select(Endpoint.__table__))}
        oldest = {
            row.digest: feed.first_after(db, row.cursor) for row in known.values() if row.cursor < newest
        }
    found = []
    for url in rt.settings.notify.urls:
        row = known.get(digest_of(url))
        each: dict[str, Any] = {
            "host": urlsplit(url).hostname,
            "delivered_at": row.delivered_at if row else None,
            "behind": row is not None and row.cursor < newest,
            "behind_since": oldest.get(row.digest) if row else None,
            "failures": row.failures if row else 0,
            "next_try_at": row.next_try_at if row else None,
            "reason": row.reason if row else None,
        }
        found.append({**each, "sentence": endpoint_sentence(each, rt.clock())})
    return found


def digest_of(url: str) -> str:
    """How the database knows an address: there may be a password in it."""
    return hashlib.sha256(url.encode()).hexdigest()


def endpoint_sentence(endpoint: Mapping[str, Any], now: datetime) -> str:
    """The state of an address of `notify.urls`, for a person."""
    behind = endpoint["behind_since"]
    since = f" It waits for what changed since {moment(behind, now)}." if behind else ""
    if endpoint["reason"]:
        times = f", {count(endpoint['failures'], 'time')} in a row" if endpoint["failures"] > 1 else ""
        return (
            f"It {endpoint['reason']}{times}; tried again at {moment(endpoint['next_try_at'], now)}.{since}"
        )
    if endpoint["delivered_at"] is None:
        return since.strip() or "It was not told of anything yet."
    return since.strip() or "Up to date."


def budget(rt: Runtime, provider: str, application: str = MAIN) -> list[dict[str, Any]] | None:
    """The windows of a budget, those of the whole application; None: Redis does not answer."""
    pools = rt.application(provider, application).pools
    try:
        return [of_window(window) for window in rt.budget.windows(pools)]
    except Unavailable:
        return None


def of_window(window: Window) -> dict[str, Any]:
    """One window in plain values; `pool` and `seconds` name it."""
    pool: Pool = window.pool
    return {
        "pool": pool.name,
        "seconds": window.seconds,
        "limit": window.limit,
        "used": window.used,
        "remaining": window.remaining,
        "in_flight": window.in_flight,
        "known": window.known,
        "start": window.start,
        "end": window.end,
        "closed_until": window.closed_until,
    }


def users(rt: Runtime, *, after: str = "", limit: int = 50, search: str = "") -> list[dict[str, Any]]:
    """Users by id, those behind `after`, with their connections; `search` is the beginning of an id."""
    query = select(User.id).where(User.id > after).order_by(User.id).limit(limit)
    if search:
        query = query.where(User.id.startswith(search, autoescape=True))
    with rt.store.read() as db:
        found = db.scalars(query).all()
        rows = db.execute(
            select(*CONNECTION).where(Connection.user_id.in_(found)).order_by(Connection.provider)
        ).all()
    mine: dict[str, list[dict[str, Any]]] = {user_id: [] for user_id in found}
    for row in rows:
        mine[row.user_id].append(of_connection(rt, row._mapping))
    return [{"user_id": user_id, "connections": connections} for user_id, connections in mine.items()]


def user(rt: Runtime, user_id: str, *, runs_each: int = 20) -> dict[str, Any] | None:
    """Everything about one user: connections, streams, what they hold, and their last runs; None: unknown."""
    now = rt.clock()
    with rt.store.read() as db:
        row = db.execute(select(User.id, User.created_at).where(User.id == user_id)).one_or_none()
        if row is None:
            return None
        connections = db.execute(
            select(*CONNECTION).where(Connection.user_id == user_id).order_by(Connection.provider)
        ).all()
        found = []
        rounds = progress.rounds(rt, db, connections)
        paces = {each.id: pacing.read(db, each.provider, each.application) for each in connections}
        for connection in connections:
            mine = [table.connection_id == connection.id for table in (Record, Quarantined, Stream)]
            streams = db.execute(select(Stream.__table__).where(mine[2]).order_by(Stream.name)).all()
            held = {
                row[0]: row[1]
                for row in db.execute(
                    select(Record.stream, func.count())
                    .where(mine[0], Record.deleted_at.is_(None))
                    .group_by(Record.stream)
                )
            }
            spans = [progress.span(row, now, rt.settings.sync.history_days) for row in streams]
            one = progress.of_connections(rt, db, [connection], {connection.id: streams}).get(connection.id)
            found.append(
                {
                    **of_connection(rt, connection._mapping),
                    "records": sum(held.values()),
                    "quarantined": db.scalar(select(func.count()).select_from(Quarantined).where(mine[1])),
                    "import": one and {**asdict(one), "sentence": importing(one, connection.status, now)},
                    "recheck": round_of(rt, paces[connection.id], rounds.get(connection.id)),
                    "streams": [
                        {
                            "name": stream.name,
                            "read_at": stream.cursor,
                            "off_reason": stream.off_reason,
                            "history_left_since": stream.backlog_since,
                            "history_left_until": stream.backlog_until,
                            "history_goes_to": each.goes_to,
                            "history_share": each.share,
                            "records": held.get(stream.name, 0),
                        }
                        for stream, each in zip(streams, spans, strict=True)
                    ],
                }
            )
    return {
        "user_id": row.id,
        "created_at": row.created_at,
        "connections": found,
        "runs": runs(rt, user_id=user_id, limit=runs_each),
    }


def runs(
    rt: Runtime, *, user_id: str | None = None, before: int | None = None, limit: int = 50
) -> list[dict[str, Any]]:
    """The journal, newest first: one row for each connection and sync; `before` is the id of one."""
    columns = [column for column in SyncRun.__table__.columns if column.name != "connection_id"]
    query = (
        select(Connection.user_id, Connection.provider, *columns)
        .join_from(SyncRun, Connection, SyncRun.connection_id == Connection.id)
        .order_by(SyncRun.id.desc())
        .limit(limit)
    )
    if user_id is not None:
        query = query.where(Connection.user_id == user_id)
    if before is not None:
        query = query.where(SyncRun.id < before)
    with rt.store.read() as db:
        return [dict(row._mapping) for row in db.execute(query)]


CONNECTION = (
    Connection.id,
    Connection.user_id,
    Connection.provider,
    Connection.application,
    Connection.provider_user_id,
    Connection.status,
    Connection.status_reason,
    Connection.scopes,
    Connection.token_expires_at,
    Connection.next_sync_at,
    Connection.claimed_at,
    Connection.news_at,
    Connection.wait_reason,
    Connection.failures,
    Connection.last_sync_at,
    Connection.created_at,
)
"""The columns of a connection that may be shown: none of them is a secret."""


def of_connection(rt: Runtime, row: Mapping[Any, Any]) -> dict[str, Any]:
    """One connection in plain values, with its state as a sentence."""
    shown = {column.key: row[column.key] for column in CONNECTION if column.key != "id"}
    return {**shown, "sentence": explained(rt, shown, rt.clock())}


def explained(rt: Runtime, connection: Mapping[Any, Any], now: datetime) -> str:
    """The state of a connection under these settings, for a person."""
    left = connection["status"] == "active" and left_behind(rt, connection)
    return left or sentence(connection, now)


def left_behind(rt: Runtime, connection: Mapping[Any, Any]) -> str | None:
    """Why no tick takes a connection under these settings; None: they have its application."""
    try:
        rt.application(connection["provider"], connection["application"])
    except Unavailable as missing:
        return f"Waiting: {missing}. It goes on when that is back."
    return None


def sentence(connection: Mapping[str, Any], now: datetime) -> str:
    """The state of a connection, as docs/architecture.md draws it, for a person."""
    due = connection["next_sync_at"]
    if connection["status"] == "needs_reauth":
        return f"Has to sign in again: {ended(connection['status_reason'])}"
    if connection["wait_reason"] and due is not None and due > now:
        return f"Waiting until {moment(due, now)}: {ended(connection['wait_reason'])}"
    if connection["claimed_at"] is not None and due is not None and due > now:
        return f"A sync is on its way since {moment(connection['claimed_at'], now)}."
    if due is None:
        return "Not polled."
    if due > now:
        return f"Up to date; due again at {moment(due, now)}."
    return "Due: the next tick takes it, as far as the budget goes."


def importing(one: progress.Import, status: str, now: datetime) -> str:
    """How far an import is, for a person."""
    if one.reached is None:
        return f"The past is not imported yet: it goes back to {one.goes_to:%Y-%m-%d}."
    cost = f" for {count(one.requests, 'request')}" if one.requests else ""
    here = (
        f"The past is here back to {one.reached:%Y-%m-%d}, and goes back to {one.goes_to:%Y-%m-%d} "
        f"({percent(one.share)}): {count(one.records, 'record')}{cost}."
    )
    if status != "active":
        return f"{here} It goes on when they have signed in again."
    if one.left_s is None:
        return f"{here} How long it still takes cannot be told yet."
    return f"{here} It takes about {span(one.left_s)} more."


def rechecked(pace: Pace, settings: Sync) -> dict[str, Any]:
    """Whether what is older than the look-back is read again, and how long a round takes (`round_s`).

    It is None where there are none, and before any of a sample of connections has told.
    """
    what, days = older(settings), settings.recheck_days
    if not days:
        sentence, on = f"{what} is not read again: sync.recheck_days is 0.", False
    elif pace.scarce and not settings.recheck_share:
        sentence, on = (
            f"{what} is not read again: polls need all requests, and sync.recheck_share is 0.",
            False,
        )
    else:
        sentence, on = f"{what} is read again for edits and deletions", True
    round_s = max(days * DAY, pace.recheck_s) if on and pace.recheck_s is not None else None
    if round_s is not None:
        sentence += f", all of it in about {span(round_s)}."
    elif on:
        sentence += "; how long that takes cannot be told yet."
    return {"on": on, "round_s": round_s, "sentence": sentence}


def older(settings: Sync) -> str:
    return f"What is older than {count(settings.lookback_days, 'day')}"


def round_of(rt: Runtime, pace: Pace, one: progress.Round | None) -> dict[str, Any]:
    """How far a connection's round is, in plain values and as a sentence."""
    provider = rechecked(pace, rt.settings.sync)
    one = one or progress.Round(None, 1.0, None, None)
    told = rechecking(one, rt.settings.sync, rt.clock()) if provider["on"] else provider["sentence"]
    return {**asdict(one), "sentence": told}


def rechecking(one: progress.Round, settings: Sync, now: datetime) -> str:
    """How far a connection's round is, for a person."""
    what = older(settings)
    if one.began_at is not None:
        here = f"{what} is being read again since {one.began_at:%Y-%m-%d}: {percent(one.share)} so far."
    elif one.due_at is None:
        here = f"{what} is read again once all of it is here."
    elif one.due_at > now:
        here = f"{what} is read again from {one.due_at:%Y-%m-%d} on, as far as requests are left."
    else:
        here = f"{what} is read again as soon as requests are left for it."
    return f"{here} The last round ended on {one.ended_at:%Y-%m-%d}." if one.ended_at else here


def percent(share: float) -> str:
    """A share as people say it; all of it only when it is."""
    return f"{round(share * 10_000) // 100} %"


UNITS = (("year", 31_536_000), ("day", 86_400), ("hour", 3600), ("minute", 60), ("second", 1))


def span(seconds: float) -> str:
    """A duration as people say it, in its largest unit."""
    for unit, length in UNITS:
        # Two days at least: "yesterday" may be anything from a minute to two days.
        if seconds >= (2 * length if unit in ("year", "day") else length):
            return count(int(seconds // length), unit)
    return "under a second"


def count(number: int, noun: str) -> str:
    """`1 record`, `2,000 records`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def brought(run: Mapping[str, Any]) -> str:
    """What a sync, or several together, did to the records: `3 new, 1 changed`, or `nothing new`."""
    words = {"inserted": "new", "updated": "changed", "deleted": "gone", "quarantined": "quarantined"}
    parts = [f"{run[name]:,} {word}" for name, word in words.items() if run[name]]
    return ", ".join(parts) or ("nothing yet" if run.get("outcome") == "running" else "nothing new")


def ended(reason: str) -> str:
    """A reason as the end of a sentence."""
    return f"{reason.rstrip('.')}."


def moment(instant: datetime, now: datetime) -> str:
    """A time as a person reads it: with the date unless it is today's."""
    day = "" if instant.date() == now.date() else f"{instant:%Y-%m-%d} "
    return f"{day}{instant:%H:%M} UTC"


def as_json(value: Any) -> Any:
    """The same with ISO texts for times, for `json.dumps`."""
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, Mapping):
        return {key: as_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(each) for each in value]
    return value
