"""The engine: one user's due connections, page by page, into the store.

begin ─▶ of each connection what is new, then of each some history ─▶ finish
(fence, journal)     request ─▶ page ─▶ store + cursor in one commit     (next_sync_at, journal)

Connections know nothing of each other: each begins, waits, fails and ends for itself.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from typing import Any

from sqlalchemy import Connection as Database
from sqlalchemy import and_, case, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from lifelogger import leaving
from lifelogger import runtime as processwide
from lifelogger.budget import CountUnknown
from lifelogger.connections import LATEST, under_way
from lifelogger.errors import (
    AccountRefused,
    BudgetSpent,
    LifeloggerError,
    LockLost,
    Refused,
    SignInAgain,
    Wait,
)
from lifelogger.http import Http
from lifelogger.mutex import Lock
from lifelogger.providers import base
from lifelogger.runtime import Runtime
from lifelogger.store.models import Connection, Stream, SyncRun
from lifelogger.store.pages import Counts
from lifelogger.sweep import Hint, Sweep
from lifelogger.tokens import Tokens, needs_reauth

log = logging.getLogger(__name__)

MOST_ROUNDS = 3
"""How often one message may start over because news came while it ran."""
FIRST_RETRY = timedelta(minutes=1)
LONGEST_RETRY = timedelta(hours=6)
REFUSED_FOR = timedelta(days=1)
"""How long a stream that the provider refused is left alone before we ask again."""
HINTED_EVERY = timedelta(minutes=1)
"""How often webhooks make us look at a connection at most: what is not signed can come from anybody."""
LEFT_BY_HINTS = 0.5
"""The part of the reserve that hints leave to people: many of them, of many people, may be forged."""
TRIES_OF_NAMED = 3
"""Failures in a row until what webhooks name is suspect: it may be what fails, and be forged."""
LONGEST_HISTORY = timedelta(seconds=20)
"""How long one sync reads on in a connection's past: a worker that does can serve nobody else, and where all
do, who has just connected waits; the user's own news waits for the lock."""


class TakenOver(LifeloggerError):
    """The connection was deleted, or a newer sync has it: its part of this sync ends without a write."""


@dataclass(slots=True)
class Run:
    """What one connection's sync did: its journal row."""

    id: int
    connection_id: int
    provider: str
    outcome: str = "ok"
    message: str | None = None
    requests: int = 0
    counts: Counts = field(default_factory=Counts)
    learned: bool = False
    """Its request told a budget count that nobody knew: what waited for it can be planned now."""


def run(user_id: str, trigger: str = "asked", *, runtime: Runtime | None = None) -> list[Run]:
    """Pull what is new for one user, and return what each connection's sync did.

    `trigger` says who wants it: a `tick` takes the connections that it claimed, a webhook's `news` those
    that it is about, and anybody else all that did not fail. Raises `mutex.Locked` while another sync of
    the user runs.
    """
    rt = runtime or processwide.runtime()
    done: list[Run] = []
    with rt.mutex.hold(f"sync:{user_id}") as lock:
        for _ in range(MOST_ROUNDS):
            lock.check()  # else we would take over from whoever has the user now
            due = begin(rt, user_id, trigger)
            syncs = [ConnectionSync(rt, lock, connection, trigger) for connection in due]
            for each in syncs:  # this morning's run, wherever it was recorded, comes before anybody's years
                each.fresh()
            for each in syncs:
                each.history()
            done += [each.journal for each in syncs]
            trigger = "tick"  # from now on only what became due meanwhile: news
            if not due or any(each.journal.outcome == "interrupted" for each in syncs):
                break  # what has been taken over has its news from whoever took it
    return done


def begin(rt: Runtime, user_id: str, trigger: str) -> list[dict[str, Any]]:
    """Take a new fencing number for each connection to sync, and open its journal row.

    Whoever wrote under an older number is refused from here on. What failed lately comes last: it may take as
    long as a time-out, and the others should not wait for that.
    """
    now = rt.clock()
    turn = now + HINTED_EVERY
    mine = [
        Connection.user_id == user_id,
        Connection.status == "active",
        Connection.provider.in_(list(rt.enabled())),
    ]
    # A tick has claimed what the budgets can serve: what is due at other providers has its own turn.
    its_turn = Connection.next_sync_at <= now
    due = or_(Connection.claimed_at.is_not(None), and_(Connection.news_at.is_not(None), its_turn))
    asked: dict[str, Any] = {}
    if trigger not in ("tick", "news"):
        # What a spent budget deferred is among them: the reserve is for whoever asks, and a no costs nothing.
        due = or_(due, its_turn, Connection.failures == 0)
        # Remembered until a sync ends well.
        asked = {"news_at": func.coalesce(Connection.news_at, now), "news_streams": None}
    with rt.store.write() as db:
        rows = db.execute(
            update(Connection)
            .where(*mine, due)
            .values(
                fence=Connection.fence + 1,
                claimed_at=func.coalesce(Connection.claimed_at, now),
                next_sync_at=now + timedelta(seconds=rt.settings.sync.lease_seconds),
                hint_after=case(
                    (
                        or_(Connection.news_streams.is_(None), Connection.hint_after > turn),
                        Connection.hint_after,
                    ),
                    else_=turn,
                ),
                **asked,
            )
            .returning(
                Connection.id,
                Connection.provider,
                Connection.scopes,
                Connection.fence,
                Connection.news_at,
                Connection.news_streams,
                Connection.news_about,
                Connection.deauthorised_at,
                Connection.failures,
                Connection.claimed_at,
                Connection.last_sync_at,
                Connection.provider_user_id,
            )
        ).all()
        if not rows:
            return []
        db.execute(
            update(SyncRun)
            .where(SyncRun.connection_id.in_([row.id for row in rows]), SyncRun.outcome == "running")
            .values(outcome="interrupted", ended_at=now, message="Its worker stopped before it was done.")
        )
        found = []
        for row in sorted(rows, key=lambda each: (each.failures, each.id)):
            asked_by = trigger if row.news_streams is None else "news"
            journal = {"connection_id": row.id, "trigger": asked_by, "started_at": now, "outcome": "running"}
            run_id = db.scalar(insert(SyncRun).values(journal).returning(SyncRun.id))
            found.append({**row._mapping, "run_id": run_id, "started_at": now})
    return found


class ConnectionSync:
    """One connection's part of a sync."""

    def __init__(self, rt: Runtime, lock: Lock, row: dict[str, Any], trigger: str) -> None:
        self.rt, self.lock, self.row, self.trigger = rt, lock, row, trigger
        self.provider = rt.providers[row["provider"]]
        self.settings = rt.settings.providers[row["provider"]]
        self.journal = Run(row["run_id"], row["id"], row["provider"])
        self.http: Http | None = None
        self.sweeps: list[Sweep] = []
        self.off: list[str] = []
        self.not_granted: set[str] = set()
        self.only: frozenset[str] | None = None
        """The streams that there are hints at, if they alone are read."""
        self.read: dict[str, datetime | None] = {}
        """When each stream that is on was last read, before this sync."""
        self.until: datetime | None = None
        """When it is tried again, of a sync that did not end well."""
        self.ended = False
        self.held = False
        """Whether the budget has no more for history."""

    def fresh(self) -> None:
        """Read what is new, and finish if that was all, or went wrong: nobody's history is waited for.

        Only a lost lock is raised: then nothing may be written.
        """
        self._attempt(self._read_fresh)
        if self.journal.outcome != "ok" or not self.unread:
            self._end()

    def history(self) -> None:
        """Read on in the past, and finish, unless `fresh` did. Raises as `fresh`."""
        if not self.ended:
            self._attempt(self._read_history)
            self._end()

    @property
    def unread(self) -> bool:
        """Whether there is history left to read."""
        return self.only is None and any(sweep.backlog for sweep in self.sweeps)

    def _end(self) -> None:
        self.ended = True
        if self.journal.outcome != "interrupted":
            try:
                self._finish(self.until)
            except TakenOver as end:
                self._leave(end)

    def _leave(self, end: TakenOver) -> None:
        """Write nothing: whoever has the connection now has closed our journal row, or it is gone as well."""
        log.info("connection %s: %s", self.row["id"], end)
        self.journal.outcome, self.journal.message = "interrupted", str(end)

    def _attempt(self, read: Callable[[], None]) -> None:
        """Read, and note what goes wrong: one connection's trouble is not the others'."""
        try:
            read()
        except LockLost:
            raise
        except TakenOver as end:
            self._leave(end)
        except SignInAgain as end:
            self.journal.outcome, self.journal.message = "needs_reauth", str(end)
        except AccountRefused as refusal:  # a tick asks again after a while, a person who says so at once
            self.journal.outcome, self.journal.message = "deferred", str(refusal)
            self.until = self.rt.clock() + REFUSED_FOR
        except Wait as wait:
            # Spent is the ordinary case; trouble raises the back-off's exponent.
            spent = isinstance(wait, BudgetSpent)
            self.journal.outcome, self.journal.message = ("deferred" if spent else "failed"), wait.reason
            self.until = wait.until or self._back_off()
            if isinstance(wait, CountUnknown):
                self.until = self.rt.clock()  # due at once: whoever learns the count has a plan made
        except LifeloggerError as trouble:
            log.error("connection %s: %s", self.row["id"], trouble)
            self.journal.outcome, self.journal.message = "failed", str(trouble)
            self.until = self._back_off()
        except Exception as fault:  # one user's fault must neither stop the others nor be tried at every tick
            log.exception("connection %s: the sync failed", self.row["id"])
            self.journal.outcome, self.journal.message = (
                "failed",
                f"An unexpected {type(fault).__name__}: see the log.",
            )
            self.until = self._back_off()

    def _read_fresh(self) -> None:
        rt, connection_id = self.rt, self.row["id"]
        tokens = Tokens(rt)
        self.http = http = Http(
            self.provider,
            self.settings,
            rt.settings.http,
            rt.budget,
            connection_id,
            tokens.access(connection_id),
            lambda refused: tokens.refresh(connection_id, refused=refused),
            rt.clock,
        )
        http.leave_share = rt.settings.schedule.reserve * self._kept_free()
        self.sweeps = self._open(http)
        about, suspect = self.row["news_about"] or {}, self.row["failures"] >= TRIES_OF_NAMED
        for sweep in self.sweeps:
            hint = Hint.read(about.get(sweep.stream.name, LATEST), all_of_it=self.only is None or suspect)
            self._guarded(sweep, partial(sweep.read_hinted, hint, suspect=suspect))
        if self.only is None:
            self._learn_account(http)

    def _kept_free(self) -> float:
        """How much of the reserve is for others: of what a poll spends all, of what people want nothing."""
        if self.trigger == "asked" or (self.row["news_at"] and self.row["news_streams"] is None):
            return 0.0
        return LEFT_BY_HINTS if self.row["news_at"] else 1.0

    def _learn_account(self, http: Http) -> None:
        """Ask whose account it is, if it was imported without that: no webhook finds it. Once a day."""
        last, now, connection_id = self.row["last_sync_at"], self.row["started_at"], self.row["id"]
        if self.row["provider_user_id"] is not None or (last is not None and last.date() >= now.date()):
            return
        try:
            account = self.provider.account(http)
        except Wait as wait:  # all that is new has been read
            log.info("connection %s: its account is not known yet: %s", connection_id, wait.reason)
            return
        if account is None:
            return
        mine = (Connection.provider == self.row["provider"], Connection.provider_user_id == account)
        try:
            with self.rt.store.write() as db:
                self.fenced(db)
                if db.scalar(select(Connection.id).where(*mine)) is None:
                    here = update(Connection).where(Connection.id == connection_id)
                    db.execute(here.values(provider_user_id=account))
                    return
        except IntegrityError:
            pass  # somebody else was first, and the account is theirs: told as if they had been here already
        log.warning("connection %s: its account is connected to another user as well", connection_id)

    def _read_history(self) -> None:
        """With what the budget leaves after everybody's fresh data, now and for the day, and not for long."""
        assert self.http is not None  # `fresh` went well
        rt, http, deadline = self.rt, self.http, self.rt.clock() + LONGEST_HISTORY
        cost = self.provider.poll_cost(self.settings)
        http.leave_share = rt.settings.schedule.reserve
        http.leave = lambda: max(0, under_way(rt, self.provider.name) - 1) * cost

        def some(sweep: Sweep) -> None:
            for read, _ in enumerate(sweep.read_history(), 1):
                # From the second page on: polls may need all that the pace allows, day after day, and first
                # imports would never end.
                http.pace = rt.settings.sync.interval_seconds
                if read >= rt.settings.sync.history_pages or rt.clock() >= deadline:
                    break

        troubled = False
        for sweep in self.sweeps:
            if rt.clock() >= deadline:
                break
            try:
                self._guarded(sweep, lambda sweep=sweep: some(sweep))
            except Wait as wait:  # what is fresh was read: no failure, but something to tell
                self.journal.message, self.held = f"History goes on later: {wait.reason}", True
                if isinstance(wait, BudgetSpent) or troubled:
                    break
                troubled = True  # with this list, perhaps: the others are not kept waiting for it

    def _guarded(self, sweep: Sweep, read: Any) -> None:
        """A stream that is refused is switched off for a while and says so; the others go on."""
        try:
            read()
        except AccountRefused:
            raise  # of all streams, not of this one
        except Refused as refusal:
            log.warning("connection %s: stream %s: %s", self.row["id"], sweep.stream.name, refusal)
            self.off.append(f"{sweep.stream.name}: {refusal}")
            sweep.backlog = None  # stays written down; of this sync it is no part any more
            self._note(sweep.stream, str(refusal), self.rt.clock() + REFUSED_FOR)

    def _open(self, http: Http) -> list[Sweep]:
        """The sweeps of the streams that are on: their scope was granted, and nothing refused them lately."""
        granted, now = set(self.row["scopes"]), self.row["started_at"]
        with self.rt.store.read() as db:
            query = select(Stream.__table__).where(Stream.connection_id == self.row["id"])
            states = {state.name: state for state in db.execute(query)}
        sweeps = []
        for stream in self.provider.streams:
            if not stream.wanted(self.settings):
                continue
            state = states.get(stream.name)
            missing = bool(stream.scopes) and granted.isdisjoint(stream.scopes)
            reason = f"not granted: {' or '.join(stream.scopes)}" if missing else None
            self.not_granted |= {stream.name} if missing else set()
            if not missing and state and state.off_until and state.off_until > now:
                reason = state.off_reason
            if state is None or state.off_reason != reason:
                state = self._note(stream, reason)
            if reason:
                self.off.append(f"{stream.name}: {reason}")
            else:
                self.read[stream.name] = state.cursor
                sweeps.append(
                    Sweep(
                        self.rt, self.provider, http, stream, state, now, self.fenced,
                        self.row["provider_user_id"],
                    )
                )  # fmt: skip
        hinted = self.row["news_streams"]
        # A poll that is due is not put off by hints: it reads what they name, and the rest.
        if hinted is not None and not (self.trigger == "tick" and self._poll_due() <= now):
            self.only = frozenset(hinted)
            sweeps = [sweep for sweep in sweeps if sweep.stream.name in self.only]
        return sweeps

    def _poll_due(self) -> datetime:
        """When all that is on should have been read again.

        A little before the interval ends: the tick that meets it comes on the minute.
        """
        started: datetime = self.row["started_at"]
        interval = timedelta(seconds=self.rt.settings.sync.interval_seconds)
        return min((at or started - interval for at in self.read.values()), default=started) + interval * 0.9

    def _note(self, stream: base.Stream, reason: str | None, until: datetime | None = None) -> Any:
        """Write down whether a stream is on; returns its row."""
        values = {
            "connection_id": self.row["id"],
            "name": stream.name,
            "off_reason": reason,
            "off_until": until,
        }
        statement = self.rt.store.insert(Stream.__table__).values(values)
        statement = statement.on_conflict_do_update(
            index_elements=["connection_id", "name"], set_={"off_reason": reason, "off_until": until}
        ).returning(Stream.__table__)
        with self.rt.store.write() as db:
            self.fenced(db)
            return db.execute(statement).one()

    def fenced(self, db: Database) -> None:
        """Raise `LockLost` unless the user is still ours, `TakenOver` unless the connection is."""
        self.lock.check()
        touched = db.execute(
            update(Connection)
            .where(Connection.id == self.row["id"], Connection.fence == self.row["fence"])
            .values(updated_at=self.rt.clock())
        )
        if touched.rowcount != 1:
            raise TakenOver("a newer sync has taken over, or the connection is gone")

    def _back_off(self) -> datetime:
        """When a failed connection is tried again: doubling, with jitter so that not all come at once."""
        failures: int = self.row["failures"]
        wait = min(FIRST_RETRY * 2 ** min(failures, 20), LONGEST_RETRY)
        until: datetime = self.rt.clock() + wait * random.uniform(0.8, 1.2)
        return until

    def _finish(self, until: datetime | None) -> None:
        """Close the journal row and say when the connection is next due."""
        now, run = self.rt.clock(), self.journal
        run.requests = self.http.requests if self.http else 0
        run.learned = bool(self.http and self.http.learned)
        for sweep in self.sweeps:
            run.counts.add(sweep.counts)
        if self.off and not run.message:
            run.message = "Not read: " + "; ".join(self.off)
        wanted = [stream for stream in self.provider.streams if stream.wanted(self.settings)]
        told = run.outcome == "needs_reauth"
        if run.outcome == "ok" and len(self.not_granted) == len(wanted):
            run.outcome = "needs_reauth"  # only the person can grant it
        elif run.outcome == "ok" and len(self.off) == len(wanted):
            run.outcome, until = "deferred", now + REFUSED_FOR  # nothing of it could be read
        with self.rt.store.write() as db:
            self.fenced(db)
            news = db.execute(
                select(
                    Connection.news_at,
                    Connection.news_streams,
                    Connection.hint_after,
                    Connection.deauthorised_at,
                ).where(Connection.id == run.connection_id)
            ).one()
            left = False
            more_news = news.news_at is not None and news.news_at != self.row["news_at"]
            values: dict[str, Any] = {"claimed_at": None, "wait_reason": None, "updated_at": now}
            hint_after = news.hint_after
            named = sum(sweep.named for sweep in self.sweeps)
            if named:  # each costs what a look costs, in which the first is where no list was read
                more = named if any(sweep.swept for sweep in self.sweeps) else named - 1
                owed = max(hint_after or self.row["started_at"], self.row["started_at"])
                hint_after = values["hint_after"] = owed + HINTED_EVERY * more
            if run.outcome == "ok":
                # History goes on at the next tick, whenever that is; when the budget is short, with the next
                # poll. That has its own time, however many hints are followed in between.
                soon = self.unread and not self.held
                swept = {sweep.stream.name: self.row["started_at"] for sweep in self.sweeps if sweep.swept}
                self.read |= swept
                due = now + FIRST_RETRY if soon else self._poll_due()
                if more_news:  # hints have to wait for their turn, people have not
                    due = now if news.news_streams is None else max(now, hint_after or now)
                values |= {"failures": 0, "last_sync_at": now, "next_sync_at": due}
                if not more_news:
                    values |= dict.fromkeys(("news_at", "news_streams", "news_about", "deauthorised_at"))
            elif run.outcome == "needs_reauth":
                # News may be that the person has signed in again meanwhile: then nothing is over.
                values |= {} if more_news else needs_reauth(run.message or "", now, told=told)
                left = not more_news and news.deauthorised_at is not None
            else:
                failed = run.outcome == "failed"
                values |= {"next_sync_at": until, "wait_reason": run.message}
                values |= {"failures": self.row["failures"] + 1} if failed else {}
            db.execute(update(Connection).where(Connection.id == run.connection_id).values(values))
            counts = run.counts
            db.execute(
                update(SyncRun)
                .where(SyncRun.id == run.id)
                .values(
                    ended_at=now,
                    outcome=run.outcome,
                    message=run.message,
                    requests=run.requests,
                    inserted=counts.inserted,
                    updated=counts.updated,
                    deleted=counts.deleted,
                    quarantined=counts.quarantined,
                    history_s=sum(sweep.history_s for sweep in self.sweeps),
                )
            )
        if left:  # a webhook said so, and the request that was made to find out has found it so
            leaving.end_deauthorised(self.rt, run.connection_id)
