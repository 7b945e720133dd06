"""Leaving: a connection or a whole user goes, the grant is ended at its provider, and a receipt stays.

    one transaction: rows deleted, receipt written, tokens put aside ─▶ scrub ─▶ revoke, or try again later

The transaction is the end: a sync that runs is fenced by it and stops before its next write, whatever the
provider says. What the provider is asked afterwards needs the tokens alone, so nothing else is kept.
"""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Table, delete, func, insert, literal, or_, select, update
from sqlalchemy import Connection as Database

from lifelogger.errors import LifeloggerError, SignInAgain, Unavailable, Wait
from lifelogger.http import call_revoke_endpoint
from lifelogger.mutex import Locked
from lifelogger.providers.base import Grant
from lifelogger.runtime import Runtime
from lifelogger.store import feed
from lifelogger.store.models import Base, Connection, Receipt, Revocation, User
from lifelogger.tokens import NEARLY_EXPIRED, Held, Tokens

log = logging.getLogger(__name__)

FIRST_RETRY = timedelta(minutes=1)
LONGEST_RETRY = timedelta(hours=6)
LEASE = timedelta(minutes=5)
"""How long one attempt may take before another worker may make the next."""
GIVE_UP_AFTER = timedelta(days=7)
"""How long tokens are kept for a provider that does not end their grant."""
MOST_AT_ONCE = 500
MOST_WHILE_SOMEBODY_WAITS = 5

SENTENCES = {
    None: "There was no authorisation left to revoke.",
    "pending": "Its authorisation is revoked as soon as the provider answers.",
    "done": "Its authorisation was revoked at the provider.",
    "given_up": "The provider did not revoke its authorisation: it can be removed in the account there.",
    "not_offered": "The provider has no revocation: its authorisation can be removed in the account there.",
}
"""The states of `Receipt.revocation` for a person."""


def disconnect(rt: Runtime, user_id: str, provider: str) -> dict[str, Any]:
    """End one connection and delete all that came of it; returns the receipt.

    Raises `LifeloggerError` when there is no such connection.
    """
    with rt.store.write() as db:
        number = _leave(
            rt, db, "disconnected", Connection.user_id == user_id, Connection.provider == provider
        )
        if number is None:
            raise LifeloggerError(f"{user_id} is not connected to {provider!r}")
    return _settle(rt, number)


def erase(rt: Runtime, user_id: str) -> dict[str, Any]:
    """Delete a user with every connection and all that came of them; returns the receipt.

    Raises `LifeloggerError` when there is no such user.
    """
    with rt.store.write() as db:
        # Whoever connects an account of theirs at this moment waits for us, or is deleted with them.
        if db.scalar(select(User.id).where(User.id == user_id).with_for_update()) is None:
            raise LifeloggerError(f"There is no user {user_id!r}: `lifelogger user list` shows all")
        number = _leave(rt, db, "erased", Connection.user_id == user_id)
        feed.mark_erased(db, user_id, None, rt.clock())
        if number is None:
            number = _number()
            _write_receipt(rt, db, number, "erased", None, {}, None)
        db.execute(delete(User).where(User.id == user_id))
    return _settle(rt, number)


def end_deauthorised(rt: Runtime, connection_id: int | None = None) -> list[dict[str, Any]]:
    """The person ended the authorisation at the provider: delete all that came of it; returns the receipts.

    Of one connection or all for which a webhook said so (which anybody could have sent), and whose grant
    the provider has refused since. One whose end is older, or was told by no provider, is asked about here:
    somebody who has to sign in again has not left for that.
    """
    # Written out: a parameter does not tell a database that its partial index fits.
    again = Connection.status == literal("needs_reauth", literal_execute=True)
    ended = [again, Connection.deauthorised_at.is_not(None)]
    if connection_id is not None:
        ended.append(Connection.id == connection_id)
    refused_since = Connection.status_at > Connection.deauthorised_at
    refused_since = func.coalesce(refused_since, False).label("refused_since")  # ended before that was kept
    with rt.store.read() as db:
        found = db.execute(select(Connection.id, refused_since).where(*ended)).all()
    numbers = []
    for each in found:
        if not each.refused_since and not _is_gone_there(rt, each.id):
            continue
        with rt.store.write() as db:
            numbers.append(_leave(rt, db, "deauthorised", *ended, Connection.id == each.id))
    return [_settle(rt, number) for number in numbers if number is not None]


def end_former(rt: Runtime, db: Database, user_id: str, provider: str, application: str) -> None:
    """Have the grant revoked that a connection has with another application than this.

    In the transaction that brings a new one. The connection and its data stay.
    """
    mine = (Connection.user_id == user_id, Connection.provider == provider)
    row = db.execute(
        select(Connection.__table__).where(*mine, Connection.application != application).with_for_update()
    ).first()
    if row is not None:
        _put_aside(rt, db, row, _write_receipt(rt, db, _number(), "moved", provider, {}, "pending"))


def _is_gone_there(rt: Runtime, connection_id: int) -> bool:
    """Whether the provider says that a grant is gone; else nobody has left, and that is written down."""
    try:
        if Tokens(rt).has_ended(connection_id):
            return True
    except Wait as wait:
        log.info("connection %s: whether it was ended is asked again: %s", connection_id, wait.reason)
        return False
    with rt.store.write() as db:
        db.execute(update(Connection).where(Connection.id == connection_id).values(deauthorised_at=None))
    return False


def receipt(rt: Runtime, number: str) -> dict[str, Any] | None:
    """What a receipt says, in plain values; None when there is none of that number."""
    with rt.store.read() as db:
        rows = db.execute(
            select(Receipt.__table__).where(Receipt.number == number).order_by(Receipt.id)
        ).all()
    if not rows:
        return None
    return {
        "receipt": number,
        "kind": rows[0].kind,
        "at": rows[0].created_at,
        "connections": [
            {
                "provider": row.provider,
                "deleted": row.deleted,
                "revocation": row.revocation,
                "sentence": SENTENCES[row.revocation],
            }
            for row in rows
            if row.provider is not None
        ],
    }


# The transaction -------------------------------------------------------------------------------------


def dependents() -> list[Table]:
    """The tables whose rows belong to a connection."""
    connections = Connection.__table__
    return [
        table
        for table in reversed(Base.metadata.sorted_tables)
        if any(key.column.table is connections for key in table.foreign_keys)
    ]


def _leave(rt: Runtime, db: Database, kind: str, *which: ColumnElement[bool]) -> str | None:
    """Delete connections with all that hangs on them; returns the receipt's number, None: there were none."""
    gone = db.execute(
        # Taken first, and with a new fence: a page that is being written is waited for, and is the last one.
        update(Connection)
        .where(*which)
        .values(fence=Connection.fence + 1)
        .returning(
            Connection.id,
            Connection.user_id,
            Connection.provider,
            Connection.application,
            Connection.access_token,
            Connection.refresh_token,
            Connection.token_expires_at,
            Connection.refreshing_until,
        )
    ).all()
    number = _number()
    for row in sorted(gone, key=lambda each: each.provider):
        if kind != "erased":  # then the whole user is marked, once
            feed.mark_erased(db, row.user_id, row.provider, rt.clock())
        deleted = {
            table.name: db.execute(delete(table).where(table.c.connection_id == row.id)).rowcount
            for table in dependents()
        }
        db.execute(delete(Connection).where(Connection.id == row.id))
        ended = kind == "deauthorised"
        receipt_id = _write_receipt(rt, db, number, kind, row.provider, deleted, None if ended else "pending")
        _put_aside(rt, db, row, receipt_id)
    return number if gone else None


def _number() -> str:
    return secrets.token_hex(8)


def _write_receipt(
    rt: Runtime,
    db: Database,
    number: str,
    kind: str,
    provider: str | None,
    deleted: dict[str, int],
    revocation: str | None,
) -> int:
    values = {
        "number": number,
        "kind": kind,
        "provider": provider,
        "deleted": deleted,
        "revocation": revocation,
        "created_at": rt.clock(),
    }
    return db.execute(insert(Receipt).values(values).returning(Receipt.id)).scalar_one()


def _put_aside(rt: Runtime, db: Database, row: Any, receipt_id: int) -> None:
    """Keep the tokens until the provider has ended their grant, and Redis has forgotten newer ones."""
    now = rt.clock()
    db.execute(
        insert(Revocation).values(
            receipt_id=receipt_id,
            provider=row.provider,
            application=row.application,
            connection_id=row.id,
            access_token=row.access_token,
            refresh_token=row.refresh_token,
            token_expires_at=row.token_expires_at,
            attempts=0,
            # A refresh under way brings the tokens that count, and leaves them in Redis.
            next_attempt_at=max(now, row.refreshing_until or now),
            created_at=now,
        )
    )


def _settle(rt: Runtime, number: str) -> dict[str, Any]:
    """What follows the transaction: may be late, and is never lost."""
    rt.store.scrub()  # at once: a provider may take its time
    with rt.store.read() as db:
        mine = select(Receipt.id).where(Receipt.number == number)
        waiting = db.scalars(select(Revocation.id).where(Revocation.receipt_id.in_(mine))).all()
    for revocation_id in waiting:
        _attempt(rt, revocation_id)
    rt.store.scrub()
    found = receipt(rt, number)
    assert found is not None  # it was committed
    return found


# Revoking --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Grip:
    """A revocation that this worker attempts now, as its row is."""

    id: int
    receipt_id: int
    held: Held
    attempts: int
    created_at: datetime
    number: str
    revocation: str | None


def revoke_waiting(rt: Runtime, provider: str | None = None) -> int:
    """Try again what is due, the longest waiting first; returns how many were settled.

    For who waits to connect at one `provider`: the last few of it, also those that failed and are not due.
    A provider that does not answer an application is left alone by it for this round.
    """
    query = select(Revocation.id, Revocation.provider, Revocation.application)
    due = Revocation.next_attempt_at <= rt.clock()
    if provider is None:
        query = query.where(due).order_by(Revocation.next_attempt_at).limit(MOST_AT_ONCE)
    else:
        query = query.where(Revocation.provider == provider, or_(due, Revocation.attempts > 0))
        query = query.order_by(Revocation.id.desc()).limit(MOST_WHILE_SOMEBODY_WAITS)
    with rt.store.read() as db:
        waiting = db.execute(query).all()
    settled, away = 0, set()
    for row in waiting:
        whose = (row.provider, row.application)
        if whose not in away:
            done = _attempt(rt, row.id, at_once=provider is not None)
            settled += done
            away |= set() if done else {whose}
    if waiting or provider is None:  # every round: a reader may have kept what was deleted in the last one
        rt.store.scrub()
    return settled


def _attempt(rt: Runtime, revocation_id: int, *, at_once: bool = False) -> bool:
    """Try once, unless somebody else does; whether that settled it. If not, it is written down for later."""
    try:
        with rt.mutex.hold(f"revoke:{revocation_id}"):  # `at_once` does not see who has taken it
            grip = _take(rt, revocation_id, at_once)
            return False if grip is None else _ask(rt, grip)
    except (Locked, Unavailable):  # the latter: Redis is away, where newer tokens may wait
        return False


def _ask(rt: Runtime, grip: Grip) -> bool:
    """Ask the provider once; whether that settled it."""
    trouble: LifeloggerError | None = None
    try:
        outcome = _revoke(rt, grip)
    except LifeloggerError as error:
        trouble = error
    except Exception as fault:  # one person's must not keep the others' waiting
        log.exception("receipt %s: the revocation failed", grip.number)
        trouble = Unavailable(f"an unexpected {type(fault).__name__}")
    if trouble is not None:
        if rt.clock() - grip.created_at < GIVE_UP_AFTER:
            log.info("receipt %s: not revoked yet: %s", grip.number, trouble)
            _put_off(rt, grip, trouble.until if isinstance(trouble, Wait) else None)
            return False
        log.warning("receipt %s: given up after %d attempts: %s", grip.number, grip.attempts + 1, trouble)
        outcome = "given_up"
    with rt.store.write() as db:
        db.execute(delete(Revocation).where(Revocation.id == grip.id))
        if grip.revocation is not None:
            db.execute(update(Receipt).where(Receipt.id == grip.receipt_id).values(revocation=outcome))
    return True


def _put_off(rt: Runtime, grip: Grip, until: datetime | None) -> None:
    """Write down when the next attempt is due: when the provider says, or later each time."""
    wait = min(FIRST_RETRY * 2 ** min(grip.attempts, 20), LONGEST_RETRY)
    later = {"attempts": grip.attempts + 1, "next_attempt_at": until or rt.clock() + wait}
    with rt.store.write() as db:
        db.execute(update(Revocation).where(Revocation.id == grip.id).values(later))


def _take(rt: Runtime, revocation_id: int, at_once: bool) -> Grip | None:
    """Take a revocation for one attempt; None when it is not due, or another worker has it."""
    now = rt.clock()
    due = [] if at_once else [Revocation.next_attempt_at <= now]
    with rt.store.write() as db:
        row = db.execute(
            update(Revocation)
            .where(Revocation.id == revocation_id, *due)
            .values(next_attempt_at=now + LEASE)
            .returning(*Revocation.__table__.columns)
        ).one_or_none()
        if row is None:
            return None
        said = db.execute(
            select(Receipt.number, Receipt.revocation).where(Receipt.id == row.receipt_id)
        ).one()
    held = Held(
        row.connection_id, row.provider, row.application, row.access_token, row.refresh_token,
        row.token_expires_at, None,
    )  # fmt: skip
    return Grip(row.id, row.receipt_id, held, row.attempts, row.created_at, said.number, said.revocation)


def _revoke(rt: Runtime, grip: Grip) -> str:
    """End the grant; how that went. Raises `LifeloggerError` when it has to be tried again."""
    tokens, held = Tokens(rt), grip.held

    def keep(grant: Grant) -> None:
        nonlocal held
        held = _keep(rt, grip, held, grant)

    tokens.end_escrow(held, keep)
    provider, settings = rt.providers.get(held.provider), rt.settings.providers.get(held.provider)
    if grip.revocation is None:
        return "done"  # ended by the person, at the provider
    if provider is None or settings is None or not settings.revoke_url:
        return "not_offered"
    settings = rt.application(held.provider, held.application).settings
    renewed = False
    if provider.revokes_access and held.token_expires_at - NEARLY_EXPIRED <= rt.clock():
        try:
            keep(tokens.ask(held))
        except SignInAgain:
            return "done"  # the grant has ended by itself
        renewed = True
    refresh = rt.vault.decrypt(held.refresh_token) if held.refresh_token else None
    request = provider.revocation(rt.vault.decrypt(held.access_token), refresh)
    reply = call_revoke_endpoint(provider, settings, rt.settings.http, rt.budget, rt.clock, request)
    if provider.revokes_access and reply.status == 401 and not renewed:  # it may have ended before its time
        try:
            keep(tokens.ask(held))
        except SignInAgain:
            return "done"
        raise Unavailable(f"{provider.title} did not know the token; there is a new one")
    if not provider.is_revoked(reply.status, reply.body):
        raise Unavailable(f"{provider.title} refused to revoke it ({reply.status})")
    return "done"


def _keep(rt: Runtime, grip: Grip, held: Held, grant: Grant) -> Held:
    """A newer pair takes the place of the one that was put aside, before anything is done with it."""
    newer = held._replace(
        access_token=rt.vault.encrypt(grant.access_token),
        refresh_token=rt.vault.encrypt(grant.refresh_token) if grant.refresh_token else None,
        token_expires_at=grant.expires_at,
    )
    with rt.store.write() as db:
        db.execute(
            update(Revocation)
            .where(Revocation.id == grip.id)
            .values(
                access_token=newer.access_token,
                refresh_token=newer.refresh_token,
                token_expires_at=newer.token_expires_at,
            )
        )
    return newer
