"""The engine: one user's due connections, page by page, into the store.

    begin ─▶ for each connection: sweep each stream, newest first ─▶ finish
    (fence, journal)     request ─▶ page ─▶ store + cursor in one commit     (next_sync_at, journal)

A *sweep* reads what is new since the last one, and a look-back before that for late uploads, edits
and deletions. What it could not finish (the budget ended, the worker died, a first import is long)
stays written down as the stream's backlog, and a later sync goes on there: there is no other state.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection as Database
from sqlalchemy import func, insert, or_, select, update

from lifelogger import runtime as processwide
from lifelogger.errors import BadRecord, LifeloggerError, LockLost, Refused, SignInAgain, Wait
from lifelogger.http import Http
from lifelogger.mutex import Lock
from lifelogger.providers import base
from lifelogger.runtime import Runtime
from lifelogger.store.models import Connection, Record, Stream, SyncRun
from lifelogger.store.pages import Counts, Item, delete_missing, write_items
from lifelogger.tokens import Tokens, needs_reauth

log = logging.getLogger(__name__)

MOST_ROUNDS = 3
"""How often one message may start over because news came while it ran."""
FIRST_RETRY = timedelta(minutes=1)
LONGEST_RETRY = timedelta(hours=6)
REFUSED_FOR = timedelta(days=1)
"""How long a stream that the provider refused is left alone before we ask again."""
READ_TO_THE_END_EVERY = timedelta(days=1)
"""How long we believe that nothing older than the oldest record was uploaded since."""


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

    `trigger` says who wants it: a `tick` takes the connections that are due or claimed, anybody
    else all that are not told to wait. Raises `mutex.Locked` while another sync of the user runs.
    """
    rt = runtime or processwide.runtime()
    done: list[Run] = []
    with rt.mutex.hold(f"sync:{user_id}") as lock:
        for _ in range(MOST_ROUNDS):
            due = begin(rt, user_id, trigger)
            done += [ConnectionSync(rt, lock, connection, trigger).run() for connection in due]
            trigger = "tick"  # from now on only what became due meanwhile: news
            if not due:
                break
    return done


def begin(rt: Runtime, user_id: str, trigger: str) -> list[dict[str, Any]]:
    """Take a new fencing number for each connection to sync, and open its journal row.

    Whoever wrote under an older number is refused from here on.
    """
    now = rt.clock()
    mine = [Connection.user_id == user_id, Connection.status == "active", Connection.provider.in_(list(rt.enabled()))]
    due = or_(Connection.claimed_at.is_not(None), Connection.next_sync_at <= now)
    asked: dict[str, Any] = {}
    if trigger != "tick":
        due = or_(due, Connection.wait_reason.is_(None))
        asked = {"news_at": func.coalesce(Connection.news_at, now)}  # remembered until a sync ends well
    with rt.store.write() as db:
        rows = db.execute(
            update(Connection)
            .where(*mine, due)
            .values(fence=Connection.fence + 1, **asked)
            .returning(
                Connection.id,
                Connection.provider,
                Connection.scopes,
                Connection.fence,
                Connection.news_at,
                Connection.failures,
                Connection.claimed_at,
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
        for row in sorted(rows, key=lambda each: each.id):
            journal = {"connection_id": row.id, "trigger": trigger, "started_at": now, "outcome": "running"}
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
        self.off: list[str] = []

    def run(self) -> Run:
        """Sync, and write down how it ended. Only a lost lock is raised: then nothing may be written."""
        until: datetime | None = None
        try:
            self._pull()
        except LockLost:
            raise
        except SignInAgain as end:
            self.journal.outcome, self.journal.message = "needs_reauth", str(end)
        except Wait as wait:
            # Spent is the ordinary case; trouble raises the back-off's exponent.
            spent = wait.until is not None
            self.journal.outcome, self.journal.message = ("deferred" if spent else "failed"), wait.reason
            until = wait.until or self._back_off()
        except LifeloggerError as trouble:
            log.error("connection %s: %s", self.row["id"], trouble)
            self.journal.outcome, self.journal.message = "failed", str(trouble)
            until = self._back_off()
        except Exception as fault:  # one user's fault must neither stop the others nor be tried at every tick
            log.exception("connection %s: the sync failed", self.row["id"])
            self.journal.outcome, self.journal.message = "failed", f"An unexpected {type(fault).__name__}: see the log."
            until = self._back_off()
        self._finish(until)
        return self.journal

    def _pull(self) -> None:
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
        http.leave_share = rt.settings.schedule.reserve if self.trigger == "tick" and not self.row["news_at"] else 0.0
        sweeps = self._open()
        for sweep in sweeps:
            self._guarded(sweep, sweep.read_fresh)
        # History afterwards, with what the budget leaves after everybody's fresh data.
        http.leave_share = rt.settings.schedule.reserve
        for sweep in sweeps:
            http.leave = outstanding(rt, self.provider.name)
            try:
                self._guarded(sweep, sweep.read_history)
            except Wait as wait:
                log.debug("connection %s: history goes on later: %s", connection_id, wait.reason)
                break

    def _guarded(self, sweep: Sweep, read: Any) -> None:
        """A stream that is refused is switched off for a while and says so; the others go on."""
        try:
            read()
        except Refused as refusal:
            log.warning("connection %s: stream %s: %s", self.row["id"], sweep.stream.name, refusal)
            self.off.append(f"{sweep.stream.name}: {refusal}")
            self._note(sweep.stream, str(refusal), self.rt.clock() + REFUSED_FOR)

    def _open(self) -> list[Sweep]:
        """The sweeps of the streams that are on: their scope was granted, and nothing refused them lately."""
        granted, now = set(self.row["scopes"]), self.row["started_at"]
        with self.rt.store.read() as db:
            query = select(Stream.__table__).where(Stream.connection_id == self.row["id"])
            states = {state.name: state for state in db.execute(query)}
        sweeps = []
        for stream in self.provider.streams:
            state = states.get(stream.name)
            missing = bool(stream.scopes) and granted.isdisjoint(stream.scopes)
            reason = f"not granted: {' or '.join(stream.scopes)}" if missing else None
            if not missing and state and state.off_until and state.off_until > now:
                reason = state.off_reason
            if state is None or state.off_reason != reason:
                state = self._note(stream, reason)
            if reason:
                self.off.append(f"{stream.name}: {reason}")
            else:
                sweeps.append(Sweep(self, stream, state))
        return sweeps

    def _note(self, stream: base.Stream, reason: str | None, until: datetime | None = None) -> Any:
        """Write down whether a stream is on; returns its row."""
        values = {"connection_id": self.row["id"], "name": stream.name, "off_reason": reason, "off_until": until}
        statement = self.rt.store.insert(Stream.__table__).values(values)
        statement = statement.on_conflict_do_update(
            index_elements=["connection_id", "name"], set_={"off_reason": reason, "off_until": until}
        ).returning(Stream.__table__)
        with self.rt.store.write() as db:
            self.fenced(db)
            return db.execute(statement).one()

    def fenced(self, db: Database) -> None:
        """Raise `LockLost` unless this sync is still the newest one of its connection."""
        self.lock.check()
        touched = db.execute(
            update(Connection)
            .where(Connection.id == self.row["id"], Connection.fence == self.row["fence"])
            .values(updated_at=self.rt.clock())
        )
        if touched.rowcount != 1:
            raise LockLost("a newer sync has taken over, or the connection is gone")

    def _back_off(self) -> datetime:
        """When a failed connection is tried again: doubling, with jitter so that not all come at once."""
        wait = min(FIRST_RETRY * 2 ** min(self.row["failures"], 20), LONGEST_RETRY)
        return self.rt.clock() + wait * random.uniform(0.8, 1.2)

    def _finish(self, until: datetime | None) -> None:
        """Close the journal row and say when the connection is next due."""
        now, run = self.rt.clock(), self.journal
        run.requests = self.http.requests if self.http else 0
        run.learned = bool(self.http and self.http.learned)
        if self.off and not run.message:
            run.message = "Not read: " + "; ".join(self.off)
        interval = timedelta(seconds=self.rt.settings.sync.interval_seconds)
        with self.rt.store.write() as db:
            self.fenced(db)
            news = db.scalar(select(Connection.news_at).where(Connection.id == run.connection_id))
            more_news = news is not None and news != self.row["news_at"]
            values: dict[str, Any] = {"claimed_at": None, "wait_reason": None, "updated_at": now}
            if run.outcome == "ok":
                # Due a little before the interval ends: the tick that meets it comes on the minute.
                due = self.row["started_at"] + interval * 0.9
                values |= {"failures": 0, "last_sync_at": now, "next_sync_at": now if more_news else due}
                values |= {} if more_news else {"news_at": None}
            elif run.outcome == "needs_reauth":
                values |= needs_reauth(run.message or "", now)
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
                )
            )


class Sweep:
    """Reading one stream downwards: the fresh part, then the backlog, newest first.

    `cursor` is when the last sweep began and `backlog` the span [since, until) below it that was
    never read. After every page both are true of what is stored, so it can end at any page.
    """

    def __init__(self, sync: ConnectionSync, stream: base.Stream, state: Any) -> None:
        self.sync, self.stream, self.state = sync, stream, state
        settings = sync.rt.settings.sync
        now = sync.row["started_at"]
        if state.cursor is None:
            self.fresh_since = now - timedelta(days=settings.lookback_days)
            self.backlog: tuple[datetime, datetime] | None = (
                now - timedelta(days=settings.history_days),
                self.fresh_since,
            )
        else:
            # A clock that was set back must not make us read less than the look-back.
            self.fresh_since = min(state.cursor, now) - timedelta(days=settings.lookback_days)
            self.backlog = (state.backlog_since, state.backlog_until) if state.backlog_until else None
        self.floor: datetime | None = None
        self.pages: Iterator[base.Page] | None = None
        self.upper: datetime | None = None
        self.present: set[str] = set()
        self.readable = True
        self.since = self.fresh_since

    def read_fresh(self) -> None:
        """Read from the newest down to the look-back's start; further if the last page brings it."""
        joined = self.backlog is not None and self.backlog[1] >= self.fresh_since
        self.since = self.backlog[0] if joined and self.backlog else self.fresh_since
        window = base.Window(self.since, None, None if joined else self._expect(), self._floor())
        self._walk(window, down_to=self.fresh_since)

    def read_history(self) -> None:
        """Read some pages of the backlog; what is left stays written down."""
        if self.backlog is None:
            return
        if self.pages is None:
            self.since = self.backlog[0]
            window = base.Window(self.backlog[0], self.backlog[1])
            self._walk(window, most=self.sync.rt.settings.sync.history_pages)
        else:
            self._go_on(None, self.sync.rt.settings.sync.history_pages)

    def _walk(self, window: base.Window, *, down_to: datetime | None = None, most: int | None = None) -> None:
        assert self.sync.http is not None
        self.pages = self.sync.provider.pages(self.sync.http, self.stream, window)
        self.upper, self.present, self.readable = window.until, set(), True
        self._go_on(down_to, most)

    def _go_on(self, down_to: datetime | None, most: int | None) -> None:
        """Take pages until `down_to` is reached, `most` were read, or there are no more."""
        assert self.pages is not None
        read = 0
        for page in self.pages:
            self._store(page)
            read += 1
            if down_to is not None and page.reached is not None and self.since < page.reached <= down_to:
                return  # the fresh part is complete; the same walk goes on as history
            if most is not None and read >= most and not (page.reached is not None and page.reached <= self.since):
                return
        self.pages = None

    def _store(self, page: base.Page) -> None:
        """Commit one page with the cursor it earns, or nothing of it."""
        sync, now = self.sync, self.sync.rt.clock()
        items = [self._item(raw) for raw in page.items]
        self.present.update(item.external_id for item in items if item.external_id is not None)
        # An item whose key cannot be read may be any of those that seem to be missing.
        self.readable = self.readable and all(item.external_id is not None for item in items)
        with sync.rt.store.write() as db:
            sync.fenced(db)
            counts = write_items(sync.rt.store, db, sync.row["id"], self.stream.name, items, now)
            if page.reached is not None:
                if self.readable:
                    counts.deleted = delete_missing(
                        db,
                        sync.row["id"],
                        self.stream.name,
                        since=page.reached,
                        until=self.upper,
                        present=self.present,
                        now=now,
                    )
                self._advance(db, page.reached, page.end)
        if page.reached is not None:
            self.upper, self.present, self.readable = page.reached, set(), True
        sync.journal.counts.add(counts)

    def _item(self, raw: Any) -> Item:
        try:
            record = self.sync.provider.record(self.stream, raw)
        except BadRecord as bad:
            return Item(self.sync.provider.external_id(self.stream, raw), raw, reason=str(bad))
        return Item(record.external_id, raw, record)

    def _advance(self, db: Database, reached: datetime, end: bool) -> None:
        """Write down what is known now: everything down to `reached`, and what is still to come."""
        if end:
            left: tuple[datetime, datetime] | None = None
        elif reached > self.since:
            lowest = min(self.since, self.backlog[0]) if self.backlog else self.since
            left = (lowest, reached)
        elif self.backlog and self.backlog[0] < reached:
            left = (self.backlog[0], min(self.backlog[1], reached))
        else:
            left = None
        values: dict[str, Any] = {
            "cursor": self.sync.row["started_at"],
            "backlog_since": left and left[0],
            "backlog_until": left and left[1],
        }
        if end:
            values["ended_at"] = self.sync.row["started_at"]
        db.execute(update(Stream).where(Stream.id == self.state.id).values(values))
        if end or reached <= self.since:
            self.backlog = left

    def _expect(self) -> int:
        """How many records of the look-back we hold."""
        with self.sync.rt.store.read() as db:
            query = select(func.count()).where(*self._mine(), Record.ordered_at >= self.fresh_since)
            return db.scalar(query) or 0

    def _floor(self) -> datetime | None:
        """The oldest record, when the list was read to its end not long ago and nothing is older."""
        ended, now = self.state.ended_at, self.sync.row["started_at"]
        if self.backlog or ended is None or not timedelta(0) <= now - ended < READ_TO_THE_END_EVERY:
            return None
        with self.sync.rt.store.read() as db:
            oldest = db.scalar(select(func.min(Record.ordered_at)).where(*self._mine()))
        return oldest

    def _mine(self) -> tuple[Any, ...]:
        return (
            Record.connection_id == self.sync.row["id"],
            Record.stream == self.stream.name,
            Record.deleted_at.is_(None),
        )


def outstanding(rt: Runtime, provider: str) -> int:
    """How many claimed syncs of a provider have yet to send: history leaves them their requests."""
    with rt.store.read() as db:
        claimed = select(func.count()).where(Connection.provider == provider, Connection.claimed_at.is_not(None))
        return (db.scalar(claimed) or 0) * rt.providers[provider].poll_cost

