"""Telling the host application that a person has to sign in again: once, whatever the cause.

The cause is written into the connection by whoever meets it; here is only the telling, in two ways that know
nothing of each other. The change feed has it, which webhook endpoints and consumers follow with cursors of
their own. And `hooks.sign_in_again` in the settings names a callable of the host's, which the worker imports.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pkgutil import resolve_name

from sqlalchemy import literal, select, update

from lifelogger.errors import SettingsError
from lifelogger.runtime import Runtime
from lifelogger.store import feed
from lifelogger.store.models import UNNUMBERED, Connection

log = logging.getLogger(__name__)

MOST_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class SignInNeeded:
    """What the host is told: whose connection it is, and why it is not synced any more."""

    user_id: str
    provider: str
    reason: str


def hook(rt: Runtime) -> Callable[[SignInNeeded], object] | None:
    """The host's callable; None: the settings name none. Raises `SettingsError` when it is not there."""
    name = rt.settings.hooks.sign_in_again
    if not name:
        return None
    try:
        found = resolve_name(name)
    except (ImportError, AttributeError) as error:
        raise SettingsError(f"hooks.sign_in_again = {name!r}: cannot be imported: {error}") from None
    if not callable(found):
        raise SettingsError(f"hooks.sign_in_again = {name!r}: is not callable")
    told: Callable[[SignInNeeded], object] = found
    return told


def publish(rt: Runtime) -> int:
    """Put into the change feed who has to sign in again, or has done so; returns how many that were."""
    with rt.store.read() as db:  # mostly there is nobody, and then no writer has to wait
        if db.execute(select(Connection.id).where(UNNUMBERED).limit(1)).first() is None:
            return 0
    published = 0
    while True:
        with rt.store.write() as db:
            number = feed.number_statuses(db, MOST_AT_ONCE)
        published += number
        if number < MOST_AT_ONCE:
            return published


def tell(rt: Runtime) -> int:
    """Tell of everybody who has to sign in again and was not told of yet; returns of how many the hook was.

    For the hook, each is marked first: two workers never tell of the same. A hook that raises is called again
    at the next round; a worker that is killed within it counts as having told.
    """
    publish(rt)
    try:
        host = hook(rt)
    except SettingsError as wrong:
        log.error("nobody is told who has to sign in again: %s", wrong)
        return 0
    if host is None:
        return 0
    # Written out: a parameter does not tell a database that its partial index fits.
    ended = Connection.status == literal("needs_reauth", literal_execute=True), Connection.told_at.is_(None)
    with rt.store.read() as db:
        waiting = db.scalars(
            select(Connection.id).where(*ended).order_by(Connection.id).limit(MOST_AT_ONCE)
        ).all()
    told = 0
    for connection_id in waiting:
        now = rt.clock()
        with rt.store.write() as db:
            row = db.execute(
                update(Connection)
                .where(Connection.id == connection_id, *ended)
                .values(told_at=now)
                .returning(Connection.user_id, Connection.provider, Connection.status_reason)
            ).one_or_none()
        if row is None:
            continue  # another worker tells of it, or they have signed in meanwhile
        try:
            host(SignInNeeded(row.user_id, row.provider, row.status_reason or ""))
        except Exception:  # whatever the host does: it is told again
            log.exception("connection %s: the hook sign_in_again failed", connection_id)
            _untell(rt, connection_id, now)
        else:
            told += 1
    return told


def _untell(rt: Runtime, connection_id: int, told_at: datetime) -> None:
    with rt.store.write() as db:
        db.execute(
            update(Connection)
            .where(Connection.id == connection_id, Connection.told_at == told_at)
            .values(told_at=None)
        )
