"""Keeping authorisations alive: no refresh token is lost, none is used twice.

A refresh token may be good for one use only, and the answer that replaces it comes once. So:

1. one refresh at a time: a conditional UPDATE takes the row for a while and is committed. It also
   writes the token columns (with what they hold), which proves that they can be written;
2. the row is read again in that statement: somebody else may have refreshed meanwhile;
3. the provider is asked, with no transaction open;
4. the new pair goes to Redis (encrypted) at once, then into the row, and only then is it used. If
   the row cannot be written after all, the pair waits in Redis for the next attempt.

What nobody can promise: a process that is killed between the provider's answer and its arrival here, or a
connection that breaks there, loses a pair which only the provider knows. The next attempt then finds a dead
token, and the person has to sign in again.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from itertools import chain, zip_longest
from typing import Any, NamedTuple

from redis.exceptions import RedisError
from sqlalchemy import case, func, literal, or_, select, update
from sqlalchemy.exc import DBAPIError

from lifelogger.errors import BudgetSpent, LifeloggerError, SignInAgain, Unavailable
from lifelogger.http import call_token_endpoint
from lifelogger.mutex import Locked
from lifelogger.providers.base import Grant, instant
from lifelogger.runtime import Runtime
from lifelogger.settings import path_of
from lifelogger.store.models import Connection, Revocation

log = logging.getLogger(__name__)

LEASE = timedelta(seconds=120)
"""How long a refresh may take before another worker may try: above the HTTP time-out."""
NEARLY_EXPIRED = timedelta(seconds=60)
LEFT_AHEAD = 0.5
"""The share of the budget that refreshing ahead of time leaves: a sync refreshes for itself when it must."""
ESCROW_SECONDS = 30 * 86400
WRITE_ATTEMPTS = 3
LONGEST_ROUND = timedelta(minutes=4)
MOST_AT_ONCE = 500
"""Connections of a provider that one firing of the periodic refresh takes, the next to expire first."""
MOST_TROUBLE = 3
"""Refreshes that may fail one after the other before a provider is left to the next firing."""


class Held(NamedTuple):
    """A connection taken for a refresh, as its row was then; tokens are encrypted."""

    id: int
    provider: str
    application: str
    access_token: bytes
    refresh_token: bytes | None
    token_expires_at: datetime
    refreshing_until: datetime | None


class Tokens:
    """The access tokens of all connections."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def access(self, connection_id: int) -> str:
        """A usable access token, refreshed first when it is about to expire."""
        with self.runtime.store.read() as db:
            row = db.execute(
                select(Connection.access_token, Connection.token_expires_at).where(
                    Connection.id == connection_id
                )
            ).one_or_none()
        if row is None:
            raise SignInAgain("the connection is gone")
        return self.usable(connection_id, row.access_token, row.token_expires_at)

    def usable(
        self, connection_id: int, sealed: bytes, expires_at: datetime, *, of: str | None = None
    ) -> str:
        """The same of a row that was read already; `of` as in `refresh`."""
        if expires_at - NEARLY_EXPIRED > self.runtime.clock():
            return self.runtime.vault.decrypt(sealed)
        return self.refresh(connection_id, margin=NEARLY_EXPIRED, of=of)

    def refresh(
        self,
        connection_id: int,
        *,
        margin: timedelta = NEARLY_EXPIRED,
        refused: str | None = None,
        ahead: bool = False,
        of: str | None = None,
    ) -> str:
        """Return an access token good for longer than `margin`, asking the provider if need be.

        `refused` is a token that the provider just answered with 401: it counts as expired. `ahead` says
        that nobody waits for it yet, so it leaves the budget to those who do. `of` is the application whose
        budget its requests will be counted in: the connection may have moved to another meanwhile.

        Raises:
            SignInAgain: the provider ended the authorisation; the connection now says so.
            Wait: it may work later; nothing was lost.
        """
        runtime = self.runtime
        row = self._take(connection_id)
        try:
            if of not in (None, row.application):
                raise Unavailable("it was connected to another application meanwhile")
            current = runtime.vault.decrypt(row.access_token)
            if current != refused and row.token_expires_at - margin > runtime.clock():
                self._give_back(row)
                return current
            found = self._from_escrow(row)
            grant = found or self.ask(row, ahead)
        except SignInAgain as end:
            self._end(row, str(end), told=row.refresh_token is not None or refused is not None)
            raise
        except BaseException:
            self._give_back(row)
            raise
        token = self._keep(row, grant)
        if found and (token == refused or found.expires_at - NEARLY_EXPIRED <= runtime.clock()):
            # It waited for too long.
            return self.refresh(connection_id, margin=margin, refused=refused, ahead=ahead, of=of)
        return token

    def has_ended(self, connection_id: int) -> bool:
        """Ask whether the authorisation of a connection that is not synced any more is gone at its provider.

        False: it lives, or there is nothing to ask with. What comes of asking is kept. Raises `Wait`.
        """
        columns = (getattr(Connection, name) for name in Held._fields)
        with self.runtime.store.read() as db:
            row = db.execute(
                select(*columns).where(Connection.id == connection_id, Connection.status != "active")
            ).one_or_none()
        if row is None or row.refresh_token is None:
            return False
        held = Held(*row)
        try:
            grant = self._from_escrow(held) or self.ask(held, ahead=True)
        except SignInAgain:
            return True
        self._keep(held, grant)
        return False

    def _take(self, connection_id: int) -> Held:
        """Take the row for a refresh, and read it. Raises `Unavailable` while somebody else has it."""
        now = self.runtime.clock()
        statement = (
            update(Connection)
            .where(
                Connection.id == connection_id,
                Connection.status == "active",
                or_(Connection.refreshing_until.is_(None), Connection.refreshing_until < now),
            )
            .values(
                refreshing_until=now + LEASE,
                access_token=Connection.access_token,
                refresh_token=Connection.refresh_token,
                token_expires_at=Connection.token_expires_at,
            )
            .returning(
                Connection.id,
                Connection.provider,
                Connection.application,
                Connection.access_token,
                Connection.refresh_token,
                Connection.token_expires_at,
                Connection.refreshing_until,
            )
        )
        try:
            with self.runtime.store.write() as db:
                row = db.execute(statement).one_or_none()
        except DBAPIError:
            raise Unavailable("the database cannot be written now, so no token is refreshed") from None
        if row is not None:
            return Held(*row)
        with self.runtime.store.read() as db:
            held = db.execute(
                select(Connection.status, Connection.refreshing_until).where(Connection.id == connection_id)
            ).one_or_none()
        if held is not None and held.status == "active":
            raise Unavailable("its tokens are being refreshed by another worker", held.refreshing_until)
        raise SignInAgain("the connection waits for the person to sign in again")

    def _give_back(self, row: Held) -> None:
        """End our own lease, and no other's."""
        with self.runtime.store.write() as db:
            db.execute(
                update(Connection)
                .where(Connection.id == row.id, Connection.refreshing_until == row.refreshing_until)
                .values(refreshing_until=None)
            )

    def ask(self, row: Held, ahead: bool = False) -> Grant:
        """Spend the refresh token. Raises `SignInAgain` when the provider says that it is dead."""
        runtime = self.runtime
        application = runtime.application(row.provider, row.application)
        provider, settings = application.provider, application.settings
        if row.refresh_token is None:
            raise SignInAgain(f"{provider.title} gave no refresh token, and the access token has ended")
        spent = runtime.vault.decrypt(row.refresh_token)
        reply = call_token_endpoint(
            provider,
            settings,
            runtime.settings.http,
            runtime.budget,
            runtime.clock,
            provider.pools(settings, row.id, token=True),
            {"grant_type": "refresh_token", "refresh_token": spent},
            leave_share=LEFT_AHEAD if ahead else 0,
            pace=runtime.settings.sync.interval_seconds if ahead else None,
        )
        if reply.status >= 300:
            if provider.grant_is_dead(reply.status, reply.body):
                raise SignInAgain(f"{provider.title} has ended the authorisation")
            raise Unavailable(f"{provider.title} refused to refresh the tokens ({reply.status})")
        grant = provider.grant(reply.body, runtime.clock())
        # A provider that sends no new refresh token means the old one to go on.
        return grant if grant.refresh_token else replace(grant, refresh_token=spent)

    def _keep(self, row: Held, grant: Grant) -> str:
        """Commit the new pair: first to Redis, then to the row it replaces, whatever it takes."""
        self._to_escrow(row, grant)
        for attempt in range(1, WRITE_ATTEMPTS + 1):
            try:
                if not self._commit(row, grant):
                    # Signed in again, or encrypted anew: the next attempt looks at the escrow.
                    raise Unavailable("its tokens were replaced while they were refreshed")
                break
            except DBAPIError:
                log.error(
                    "connection %s: the refreshed tokens could not be stored (attempt %d)", row.id, attempt
                )
        else:
            raise Unavailable("the database refused the refreshed tokens; they wait in Redis, encrypted")
        try:
            self.runtime.redis.delete(self._escrow_key(row.id))
        except RedisError:
            log.debug("connection %s: its escrow stays until it expires", row.id)
        return grant.access_token

    def _commit(self, row: Held, grant: Grant) -> bool:
        """Replace the pair that was spent, and no other: somebody may have signed in meanwhile."""
        vault, now = self.runtime.vault, self.runtime.clock()
        values: dict[str, Any] = {
            "access_token": vault.encrypt(grant.access_token),
            "refresh_token": vault.encrypt(grant.refresh_token) if grant.refresh_token else None,
            "token_expires_at": grant.expires_at,
            "refreshing_until": None,
            "updated_at": now,
        }
        if grant.scopes:
            values["scopes"] = list(grant.scopes)
        with self.runtime.store.write() as db:
            done = db.execute(
                update(Connection)
                .where(Connection.id == row.id, Connection.refresh_token == row.refresh_token)
                .values(values)
            )
        return done.rowcount == 1

    def _end(self, row: Held, reason: str, *, told: bool) -> None:
        """Stop all polling of a connection whose authorisation is gone, unless it was renewed meanwhile.

        `told`: as `needs_reauth`.
        """
        with self.runtime.store.write() as db:
            db.execute(
                update(Connection)
                .where(
                    Connection.id == row.id, Connection.refresh_token.is_not_distinct_from(row.refresh_token)
                )
                .values(needs_reauth(reason, self.runtime.clock(), told=told))
            )

    # Escrow: a pair on its way from the provider to the row.

    def _escrow_key(self, connection_id: int) -> str:
        return f"{self.runtime.settings.redis.prefix}:escrow:{connection_id}"

    def _to_escrow(self, row: Held, grant: Grant) -> None:
        assert row.refresh_token is not None  # it was spent for this grant
        pair = {
            "replaces": self.runtime.vault.decrypt(row.refresh_token),
            "access_token": grant.access_token,
            "refresh_token": grant.refresh_token,
            "expires_at": grant.expires_at.isoformat(),
            "scopes": grant.scopes,
        }
        try:
            sealed = self.runtime.vault.encrypt(json.dumps(pair))
            self.runtime.redis.set(self._escrow_key(row.id), sealed, ex=ESCROW_SECONDS)
        except RedisError:
            log.warning("connection %s: Redis is away; its new tokens go to the database only", row.id)

    def rotate_escrow(self, connection_id: int) -> None:
        """Encrypt a pair that waits in Redis with the first key again. Raises `Unavailable`."""
        key, server = self._escrow_key(connection_id), self.runtime.redis
        try:
            sealed: Any = server.get(key)
            if sealed is not None:
                server.set(key, self.runtime.vault.rotate(sealed), keepttl=True, xx=True)
        except RedisError:
            raise Unavailable(
                "Redis does not answer, where refreshed tokens may wait: rotate again"
            ) from None

    def _from_escrow(self, row: Held) -> Grant | None:
        """A pair that an earlier refresh received for this very row and could not store."""
        try:
            sealed: Any = self.runtime.redis.get(self._escrow_key(row.id))
        except RedisError:
            return None
        return self._unsealed(row, sealed)

    def _unsealed(self, row: Held, sealed: Any) -> Grant | None:
        """The pair of an escrow if it replaces what the row has."""
        if sealed is None:
            return None
        vault = self.runtime.vault
        pair = json.loads(vault.decrypt(sealed))
        if row.refresh_token is None or pair["replaces"] != vault.decrypt(row.refresh_token):
            return None
        row_has = vault.decrypt(row.access_token), vault.decrypt(row.refresh_token)
        if row_has == (pair["access_token"], pair["refresh_token"]):
            return None  # it did reach the row, and only its removal from Redis failed
        log.info("connection %s: tokens of an interrupted refresh found", row.id)
        scopes = tuple(pair["scopes"]) if pair["scopes"] else None
        return Grant(pair["access_token"], pair["refresh_token"], instant(pair["expires_at"]), scopes)

    def end_escrow(self, row: Held, keep: Callable[[Grant], None]) -> None:
        """`keep` a pair that waits in Redis for a connection that is gone, and forget it there.

        Raises `Unavailable` when Redis is away: a pair may be there.
        """
        key = self._escrow_key(row.id)
        try:
            found = self._unsealed(row, self.runtime.redis.get(key))
            if found is not None:
                keep(found)
            if found is not None or not self._has_others(row.id):
                self.runtime.redis.delete(key)
        except RedisError:
            raise Unavailable("Redis does not answer, where refreshed tokens may wait") from None

    def _has_others(self, connection_id: int) -> bool:
        """Whether what waits under this number may be of another grant than the one that is revoked.

        A connection that moved to another application has it still, or left it with a grant of its own to
        be revoked; and SQLite gives the number of its newest row again when it is gone.
        """
        waiting = select(func.count()).where(Revocation.connection_id == connection_id)
        with self.runtime.store.read() as db:
            there = db.scalar(select(Connection.id).where(Connection.id == connection_id))
            return there is not None or (db.scalar(waiting) or 0) > 1

    # The periodic part.

    def refresh_expiring(self) -> dict[str, int]:
        """Refresh what expires within the margin; return how many ended in which way.

        A connection whose sync runs is left alone: that sync refreshes when it needs to. What there is no
        budget or time for is left to the next firing. Applications take turns, and one whose provider does
        not answer is given up soon: it takes no time from the others.
        """
        margin = timedelta(seconds=self.runtime.settings.sync.refresh_margin_seconds)
        outcomes = {"refreshed": 0, "busy": 0, "needs_reauth": 0, "later": 0}
        began, spent, trouble = self.runtime.clock(), set[str](), Counter[str]()
        for connection_id, user_id, path in self.expiring(began + margin):
            over = path in spent or trouble[path] >= MOST_TROUBLE
            if over or self.runtime.clock() - began > LONGEST_ROUND:
                outcomes["later"] += 1
                continue
            try:
                with self.runtime.mutex.hold(f"sync:{user_id}"):
                    self.refresh(connection_id, margin=margin, ahead=True)
                outcomes["refreshed"] += 1
                trouble[path] = 0
            except BudgetSpent as full:
                log.info("%s: no more tokens are refreshed ahead of time: %s", path, full)
                spent.add(path)
                outcomes["later"] += 1
            except Locked:
                outcomes["busy"] += 1
            except SignInAgain as end:
                log.warning("connection %s: %s", connection_id, end)
                outcomes["needs_reauth"] += 1
            except LifeloggerError as refusal:
                log.warning("connection %s: %s", connection_id, refusal)
                trouble[path] += 1
                outcomes["later"] += 1
            except Exception:  # one connection's fault must not cost the others their tokens
                log.exception("connection %s: its tokens were not refreshed", connection_id)
                outcomes["later"] += 1
        return outcomes

    def expiring(self, before: datetime) -> list[tuple[int, str, str]]:
        """(connection, user, path of the application) of what expires before an instant.

        Of each application the first to expire comes first, and the applications take turns.
        """
        query = (
            select(Connection.id, Connection.user_id, Connection.provider, Connection.application)
            .where(
                # Written out: a parameter does not tell a database that its partial index fits.
                Connection.status == literal("active", literal_execute=True),
                Connection.token_expires_at < before,
            )
            .order_by(Connection.token_expires_at)
            .limit(MOST_AT_ONCE)
        )
        with self.runtime.store.read() as db:
            lines = [
                db.execute(
                    query.where(Connection.provider == provider, Connection.application == application)
                ).all()
                for provider, application in (each.key for each in self.runtime.applications())
            ]
        turns = chain.from_iterable(zip_longest(*lines))
        return [
            (row.id, row.user_id, path_of(row.provider, row.application)) for row in turns if row is not None
        ]


def needs_reauth(reason: str, now: datetime, *, told: bool = True) -> dict[str, Any]:
    """The columns of a connection that waits for its person to sign in again: it is not polled.

    Not `told` by the provider, it is no answer to a webhook that said that the person has left.
    """
    works = Connection.status == "active"  # one end may be met twice, and is one change
    left = Connection.deauthorised_at
    unanswered = {} if told else {"deauthorised_at": case((left.is_not(None), now), else_=left)}
    return unanswered | {
        "status_at": case((works, now), else_=Connection.status_at),
        "status_change": case((works, None), else_=Connection.status_change),
        "status": "needs_reauth",
        "status_reason": reason,
        "next_sync_at": None,
        "claimed_at": None,
        "wait_reason": None,
        "refreshing_until": None,
        "updated_at": now,
    }


def rotate_keys(runtime: Runtime) -> int:
    """Encrypt every stored token with the first key again; return how many connections there were.

    A connection whose tokens are being refreshed is left to that refresh, which uses the first key. A pair
    that waits in Redis is encrypted again, too, and so is what is still to be revoked.
    """
    done, last = 0, 0
    tokens = Tokens(runtime)
    while True:
        with runtime.store.write() as db:
            rows = db.execute(
                select(Connection.id, Connection.access_token, Connection.refresh_token)
                .where(
                    Connection.id > last,
                    or_(Connection.refreshing_until.is_(None), Connection.refreshing_until < runtime.clock()),
                )
                .order_by(Connection.id)
                .limit(200)
                .with_for_update()
            ).all()
            for row in rows:
                db.execute(
                    update(Connection)
                    .where(Connection.id == row.id)
                    .values(
                        access_token=runtime.vault.rotate(row.access_token),
                        refresh_token=runtime.vault.rotate(row.refresh_token) if row.refresh_token else None,
                    )
                )
        for row in rows:
            tokens.rotate_escrow(row.id)
        if not rows:
            break
        done, last = done + len(rows), rows[-1].id
    with runtime.store.write() as db:
        tokens_of = select(Revocation.id, Revocation.access_token, Revocation.refresh_token)
        for row in db.execute(tokens_of.with_for_update()).all():
            db.execute(
                update(Revocation)
                .where(Revocation.id == row.id)
                .values(
                    access_token=runtime.vault.rotate(row.access_token),
                    refresh_token=runtime.vault.rotate(row.refresh_token) if row.refresh_token else None,
                )
            )
    return done
