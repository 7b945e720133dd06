"""Looking for what is wrong: each check is one sentence, and what to do next. Changes nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import redis
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError

from lifelogger import notices, status
from lifelogger.broker import WORKER_NAME
from lifelogger.errors import SettingsError
from lifelogger.runtime import Runtime
from lifelogger.settings import MAIN, path_of
from lifelogger.store import counts
from lifelogger.store.migrate import revisions
from lifelogger.store.models import Connection, Tick

OLD_TICK = timedelta(hours=1)
_NO_TABLES = re.compile('no such (table|column)|(relation|column) "?[^ ]+ does not exist')


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found. `ok` None: nothing is broken, but somebody should know."""

    part: str
    ok: bool | None
    sentence: str


def examine(rt: Runtime) -> Iterator[Finding]:
    """All checks. A part that is down costs its own checks only."""
    yield from _guarded("database", lambda: database(rt))
    yield from _guarded("redis", lambda: redis_server(rt))
    yield from _guarded("security", lambda: security(rt))
    yield from _guarded("providers", lambda: providers(rt))
    yield from _guarded("work", lambda: work(rt))
    yield from _guarded("notify", lambda: notify(rt))


def _guarded(part: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except SQLAlchemyError as error:
        yield Finding(part, False, database_trouble(error))
    except redis.RedisError as error:
        yield Finding(part, False, redis_trouble(error))


def database_trouble(error: SQLAlchemyError) -> str:
    """What is wrong with the database, and what to do."""
    said = first_line(error)
    if _NO_TABLES.search(said):
        return f"The database does not have the tables of this version ({said}): `lifelogger migrate`."
    return f"The database does not answer as it should: {said}. Is database.url right?"


def redis_trouble(error: redis.RedisError) -> str:
    """What is wrong with Redis, and what to do."""
    return f"Redis does not answer: {first_line(error)}. Is redis.url right?"


def first_line(error: BaseException) -> str:
    """What a driver says, without the statement and its parameters that SQLAlchemy adds."""
    said = str(getattr(error, "orig", None) or error).strip() or type(error).__name__
    return said.splitlines()[0][:200].rstrip(".")


def database(rt: Runtime) -> Iterator[Finding]:
    current, newest = revisions(rt.store)
    kind = "SQLite" if rt.store.is_sqlite else "PostgreSQL"
    if current == newest:
        yield Finding("database", True, f"{kind} answers and has the tables of this version.")
    else:
        yield Finding(
            "database",
            False,
            f"{kind} has the tables of {current or 'no version'}, not {newest}: `lifelogger migrate`.",
        )


def redis_server(rt: Runtime) -> Iterator[Finding]:
    info: Any = rt.redis.info()
    yield Finding("redis", True, f"Redis {info.get('redis_version')} answers.")
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        yield Finding(
            "redis",
            None,
            f"Redis may evict queues, locks and budgets (maxmemory-policy {policy}): set noeviction.",
        )
    if not info.get("aof_enabled"):
        yield Finding(
            "redis",
            None,
            "Redis keeps no append-only file: after a restart queues are empty and budgets unknown.",
        )


def security(rt: Runtime) -> Iterator[Finding]:
    with rt.store.read() as db:
        sealed = db.scalar(select(Connection.access_token).limit(1))
    if not rt.settings.security.encryption_keys:
        yield Finding(
            "security",
            None,
            f"Tokens are encrypted with the key in {rt.settings.var}/encryption.key: back it up.",
        )
    if sealed is not None:
        try:
            rt.vault.decrypt(sealed)
        except SettingsError as error:
            yield Finding("security", False, f"{error}.")
        else:
            yield Finding("security", True, "The stored tokens can be decrypted.")


def providers(rt: Runtime) -> Iterator[Finding]:
    if not rt.enabled():
        yield Finding("providers", False, "No provider is enabled: set providers.<name>.enabled.")
    for each in rt.applications():
        if each.provider.name in rt.settings.simulated:
            yield Finding(
                each.path, None, f"{each.title} is simulated by the sandbox, because it has no client_id."
            )
        elif not each.settings.client_secret.get_secret_value():
            table = setting_of(*each.key)
            yield Finding(each.path, False, f"{table}.client_secret is not set: tokens cannot be refreshed.")
        else:
            yield Finding(each.path, True, f"{each.title} has an application of its own.")
        hooks = status.webhook_states(rt)[each.path]
        yield Finding(each.path, hooks["ok"], hooks["sentence"])
        for window in status.budget(rt, *each.key) or []:
            if not window["remaining"] and window["known"]:
                yield Finding(
                    each.path,
                    None,
                    f"{window['used']} of {window['limit']} {window['pool']} are spent "
                    f"until {window['end']:%H:%M} UTC.",
                )

    yield from left_behind(rt)


def left_behind(rt: Runtime) -> Iterator[Finding]:
    """Connections whose application was taken out of the settings."""
    there = {each.key for each in rt.applications()}
    with rt.store.read() as db:
        found = {name: counts.of_applications(db, name) for name in rt.enabled()}
    for provider, numbers in found.items():
        for application, number in numbers.items():
            if (provider, application) not in there:
                yield Finding(
                    path_of(provider, application),
                    False,
                    f"{status.count(number, 'connection')} of an application that is not in the settings: "
                    f"nothing is synced of them until [{setting_of(provider, application)}] is back.",
                )


def setting_of(provider: str, application: str) -> str:
    """The table of an application in the settings."""
    further = "" if application == MAIN else f".applications.{application}"
    return f"providers.{provider}{further}"


def work(rt: Runtime) -> Iterator[Finding]:
    clients: Any = rt.redis.client_list()
    alive = len({each["name"] for each in clients if each["name"].startswith(f"{WORKER_NAME}:")})
    if alive:
        yield Finding("work", True, f"{alive} worker processes are connected.")
    else:
        yield Finding("work", None, "No worker is running: `make worker`.")
    with rt.store.read() as db:
        last = db.scalar(select(func.max(Tick.fired_at)))
        again = db.scalar(select(func.count()).where(Connection.status == "needs_reauth"))
    now = rt.clock()
    if last is None or now - last > OLD_TICK:
        when = f"since {status.moment(last, now)}" if last else "ever"
        yield Finding("work", None, f"No tick has fired {when}: `make periodiq`.")
    else:
        yield Finding("work", True, f"The last tick fired at {status.moment(last, now)}.")
    try:
        notices.hook(rt)
    except SettingsError as wrong:
        yield Finding("work", False, f"{wrong}. The host is not told who has to sign in again.")
    if again:
        yield Finding("work", None, f"{again} connections wait for their people to sign in again.")


def notify(rt: Runtime) -> Iterator[Finding]:
    for each in status.endpoints(rt):
        sentence = f"{each['host']}: {each['sentence']}"
        if each["reason"]:
            yield Finding(
                "notify", False, f"{sentence} Is its address in notify.urls right, and does it answer 2xx?"
            )
        elif each["delivered_at"] is None and each["behind"]:
            yield Finding("notify", None, f"{sentence} Does a worker run (`make worker`)?")
        else:
            yield Finding("notify", True, sentence)
