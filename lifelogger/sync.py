"""The engine: one user's due connections, page by page, into the store.

begin ─▶ of each connection what is new, then of each some history ─▶ finish
(fence, journal)     request ─▶ page ─▶ store + cursor in one commit     (next_sync_at, journal)

Connections know nothing of each other: each begins, waits, fails and ends for itself.
"""

from __future__ import annotations

import logging
import math
import random
from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cache, partial
from typing import Any

from sqlalchemy import Connection as Database
from sqlalchemy import (
    Interval,
    Text,
    and_,
    bindparam,
    case,
    exists,
    false,
    func,
    insert,
    literal,
    or_,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import aliased

from lifelogger import leaving, pacing, recheck
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
from lifelogger.habits import DAY, Habits
from lifelogger.http import Http
from lifelogger.mutex import Lock
from lifelogger.providers import base
from lifelogger.runtime import Runtime
from lifelogger.store import Prepared, run_together, table
from lifelogger.store.models import Connection, Pace, Record, Stream, SyncRun
from lifelogger.store.pages import ENDLESS, Counts
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
RECHECK_RESTS = timedelta(days=1)
"""How long a round rests that met trouble: it may be of one old page, and each try costs a request."""


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
            trigger = "tick"  # from now on only what became due meanwhile
            if any(each.journal.outcome == "interrupted" for each in syncs):
                break  # what has been taken over has its news from whoever took it
            if not any(each.more for each in syncs):
                break
    return done


def begin(rt: Runtime, user_id: str, trigger: str) -> list[dict[str, Any]]:
    """Take a new fencing number for each connection to sync, and open its journal row.

    Whoever wrote under an older number is refused from here on. What failed lately comes last: it may take as
    long as a time-out, and the others should not wait for that.
    """
    now = rt.clock()
    lookback = timedelta(days=rt.settings.sync.lookback_days)
    values: dict[str, Any] = {
        "user": user_id,
        "by": trigger,
        "now": now,
        "lease_ends": now + timedelta(seconds=rt.settings.sync.lease_seconds),
        "hint_after": now + HINTED_EVERY,
        "lookback": lookback,
    }
    applications = tuple(each.key for each in rt.applications())
    take = take_in_steps if rt.store.is_sqlite else take_at_once
    with rt.store.at_once() as db:
        taken = take(db, applications, asked=trigger not in ("tick", "news"), **values)
    opened = [
        {
            **row._asdict(),
            "run_id": run_id,
            "started_at": now,
            "since": since_when(row, now, lookback),
            "states": {state.name: state for state in states},
        }
        for row, run_id, states in taken
    ]
    return sorted(opened, key=lambda each: (each["failures"], each["id"]))


def since_when(row: Any, now: datetime, lookback: timedelta) -> datetime:
    """About where the look-back of each stream begins."""
    last: datetime = row.last_sync_at or now
    return min(now, last) - lookback


Taken = Sequence[tuple[Any, int, Sequence[Any]]]
"""Of each connection its row, its journal row's number, and its streams."""


def take_at_once(
    db: Database, applications: tuple[tuple[str, str], ...], asked: bool, **values: Any
) -> Taken:
    """One statement takes the connections, opens the journal and reads the streams."""
    taken: dict[int, tuple[Any, int, list[Any]]] = {}
    for row in taking_at_once(applications, asked)(db, **values):
        state: Any = OF_STREAM(*row[-len(OF_STREAM._fields) :])
        if row.id not in taken:
            taken[row.id] = row, row.run_id, []
            if row.unended:
                INTERRUPTED(db, of=row.id, now=values["now"], run=row.run_id)
        if state.id is not None:
            taken[row.id][2].append(state)
    return list(taken.values())


def take_in_steps(
    db: Database,
    applications: tuple[tuple[str, str], ...],
    asked: bool,
    *,
    lookback: timedelta,
    **values: Any,
) -> Taken:
    """The same for SQLite, whose WITH cannot write, and which is asked without a round trip."""
    taken, now = [], values["now"]
    for row in taking(applications, asked)(db, **values):
        by = values["by"] if row.news_streams is None else "news"
        [(unended,)] = UNENDED(db, of=row.id)
        [(run_id,)] = BEGUN(db, of=row.id, by=by, now=now)
        if unended:
            INTERRUPTED(db, of=row.id, now=now, run=run_id)
        taken.append((row, run_id, STREAMS(db, of=row.id, since=since_when(row, now, lookback))))
    return taken


# Statements are built once: to build one takes as long as to run it.

COUNTED = ("requests", "inserted", "updated", "deleted", "quarantined")


@cache
def taking(applications: tuple[tuple[str, str], ...], asked: bool) -> Prepared:
    """The statement that takes a user's connections: those that are due, and if `asked` all that can be."""
    return Prepared(_taking(applications, asked))


def _taking(applications: tuple[tuple[str, str], ...], asked: bool) -> Any:
    of, now = Connection.__table__.c, bindparam("now", type_=Connection.next_sync_at.type)
    turn = bindparam("hint_after", type_=Connection.hint_after.type)
    # A tick has claimed what the budgets can serve: what is due at other providers has its own turn.
    its_turn = of.next_sync_at <= now
    served = (and_(of.provider == provider, of.application == name) for provider, name in applications)
    enabled = or_(false(), *served)
    due = or_(of.claimed_at.is_not(None), and_(of.news_at.is_not(None), its_turn))
    wish: dict[str, Any] = {}
    if asked:
        # What a spent budget deferred is among them: the reserve is for whoever asks, and a no costs nothing.
        due = or_(due, its_turn, of.failures == 0)
        # Remembered until a sync ends well.
        wish = {"news_at": func.coalesce(of.news_at, now), "news_streams": None}
    return (
        update(table(Connection))
        .where(of.user_id == bindparam("user"), of.status == "active", enabled, due)
        .values(
            fence=of.fence + 1,
            claimed_at=func.coalesce(of.claimed_at, now),
            next_sync_at=bindparam("lease_ends"),
            hint_after=case(
                (or_(of.news_streams.is_(None), of.hint_after > turn), of.hint_after), else_=turn
            ),
            **wish,
        )
        .returning(
            of.id,
            of.provider,
            of.application,
            of.scopes,
            of.fence,
            of.access_token,
            of.token_expires_at,
            of.news_at,
            of.news_streams,
            of.news_about,
            of.deauthorised_at,
            of.failures,
            of.claimed_at,
            of.last_sync_at,
            of.provider_user_id,
        )
    )


@cache
def taking_at_once(applications: tuple[tuple[str, str], ...], asked: bool) -> Prepared:
    """The statement of `take_at_once`: a row for each stream, without one if there is none yet."""
    taken = _taking(applications, asked).cte("taken")
    now = bindparam("now", type_=SyncRun.started_at.type)
    by = case((taken.c.news_streams.is_(None), bindparam("by", type_=Text)), else_="news")
    zeros = dict.fromkeys(COUNTED, literal(0))
    opened = {"connection_id": taken.c.id, "trigger": by, "started_at": now, "outcome": literal("running")}
    opened |= zeros
    begun = (
        insert(table(SyncRun))
        .from_select(list(opened), select(*(what.label(name) for name, what in opened.items())))
        .returning(SyncRun.__table__.c.id, SyncRun.__table__.c.connection_id)
        .cte("begun")
    )
    last = func.coalesce(taken.c.last_sync_at, now)
    since = func.least(now, last, type_=now.type) - bindparam("lookback", type_=Interval)
    whole = taken.join(begun, begun.c.connection_id == taken.c.id)
    whole = whole.outerjoin(Stream.__table__, Stream.connection_id == taken.c.id)
    named = (each.label(f"stream_{each.name}") for each in _streams(since))
    unended = _unended(taken.c.id).label("unended")
    return Prepared(select(*taken.c, begun.c.id.label("run_id"), unended, *named).select_from(whole))


def _unended(connection_id: Any) -> Any:
    """Whether a connection's last sync was never ended: if any was not, that one was not."""
    newest = select(SyncRun.outcome).where(SyncRun.connection_id == connection_id)
    return newest.order_by(SyncRun.id.desc()).limit(1).scalar_subquery() == "running"


UNENDED = Prepared(select(_unended(bindparam("of")).label("unended")))


def _journal() -> tuple[Any, Any, Any]:
    """What closes the row of a sync that was never heard of, what opens one, and what closes it."""
    of = SyncRun.__table__.c
    interrupted = (
        update(table(SyncRun))
        .where(of.connection_id == bindparam("of"), of.outcome == "running", of.id < bindparam("run"))
        .values(
            outcome="interrupted",
            ended_at=bindparam("now"),
            message="Its worker stopped before it was done.",
        )
    )
    begun = insert(table(SyncRun)).values(
        connection_id=bindparam("of"),
        trigger=bindparam("by"),
        started_at=bindparam("now"),
        outcome="running",
        **dict.fromkeys(COUNTED, 0),
    )
    names = ("ended_at", "outcome", "message", "history_s", *COUNTED)
    ended = (
        update(table(SyncRun))
        .where(of.id == bindparam("run"))
        .values({name: bindparam(name) for name in names})
    )
    return Prepared(interrupted), Prepared(begun.returning(of.id)), Prepared(ended)


INTERRUPTED, BEGUN, ENDED = _journal()


def _streams(since: Any) -> tuple[Any, ...]:
    """Of a stream its columns, how many records it has since then, and its oldest one."""
    mine = (
        Record.connection_id == Stream.connection_id,
        Record.stream == Stream.name,
        Record.deleted_at.is_(None),
    )
    lookback = (Record.ordered_at >= since, Record.ordered_at < ENDLESS)
    newer = select(func.count()).where(*mine, *lookback).scalar_subquery()
    oldest = select(func.min(Record.ordered_at)).where(*mine).scalar_subquery()
    return (*Stream.__table__.c, newer.label("newer"), oldest.label("oldest"))


OF_STREAM: Any = namedtuple("State", [each.name for each in _streams(ENDLESS)])  # type: ignore[misc]
STREAMS = Prepared(select(*_streams(bindparam("since"))).where(Stream.connection_id == bindparam("of")))
OURS = Prepared(
    select(Connection.id)
    .where(Connection.id == bindparam("of"), Connection.fence == bindparam("fence"))
    .with_for_update(key_share=True)
)
"""Locks the row of a connection that is still ours."""


def _news() -> Any:
    """The news of such a row, and whether something else of the user is due."""
    other = aliased(Connection)
    due = and_(other.news_at.is_not(None), other.next_sync_at <= bindparam("now"))
    waits = exists().where(
        other.user_id == Connection.user_id,
        other.id != Connection.id,
        other.status == "active",
        or_(other.claimed_at.is_not(None), due),
    )
    found = select(
        Connection.news_at,
        Connection.news_streams,
        Connection.hint_after,
        Connection.deauthorised_at,
        Connection.habits,
        *pacing.COLUMNS,
        waits.label("others"),
    )
    ours = Connection.id == bindparam("of"), Connection.fence == bindparam("fence")
    its = and_(Pace.provider == Connection.provider, Pace.application == Connection.application)
    paced = found.outerjoin(Pace, its).where(*ours)
    return paced.with_for_update(key_share=True, of=Connection)


OUR_NEWS = Prepared(_news())


@cache
def noting(is_sqlite: bool) -> Prepared:
    """The statement that writes down whether a stream is on."""
    off = {"off_reason": bindparam("reason"), "off_until": bindparam("until", type_=Stream.off_until.type)}
    into: Any = sqlite.insert if is_sqlite else postgresql.insert
    noted = into(table(Stream)).values(connection_id=bindparam("of"), name=bindparam("stream"), **off)
    return Prepared(noted.on_conflict_do_update(index_elements=["connection_id", "name"], set_=off))


@cache
def changing(names: frozenset[str]) -> Prepared:
    """The statement that sets these columns of a connection."""
    return Prepared(
        update(table(Connection))
        .where(Connection.__table__.c.id == bindparam("of"))
        .values({name: bindparam(f"new_{name}") for name in names})
    )


class ConnectionSync:
    """One connection's part of a sync."""

    def __init__(self, rt: Runtime, lock: Lock, row: dict[str, Any], trigger: str) -> None:
        self.rt, self.lock, self.row, self.trigger = rt, lock, row, trigger
        self.application = rt.application(row["provider"], row["application"])
        self.provider, self.settings = self.application.provider, self.application.settings
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
        self.a_day: int | None = None
        """How many requests a day has, if that one is spent."""
        self.ended = False
        self.more = False
        """Whether something of the user became due meanwhile, whose message found the lock taken."""
        self.held = False
        """Whether the budget has no more for history."""

    def fresh(self) -> None:
        """Read what is new, and finish if that was all, or went wrong: nobody's history is waited for.

        Only a lost lock is raised: then nothing may be written.
        """
        self._attempt(self._read_fresh)
        if self.journal.outcome != "ok" or not (self.unread or self.rechecks):
            self._end()

    def history(self) -> None:
        """Read on in the past, or some of it again, and finish, unless `fresh` did. Raises as `fresh`."""
        if not self.ended:
            self._attempt(self._read_history if self.unread else self._recheck)
            self._end()

    @property
    def unread(self) -> bool:
        """Whether there is history left to read."""
        return self.only is None and any(sweep.backlog for sweep in self.sweeps)

    @property
    def rechecks(self) -> list[Sweep]:
        """The streams whose rounds may go on or begin, which waits longest first: a tick's work alone."""
        if self.trigger != "tick" or self.only is not None or not self.rt.settings.sync.recheck_days:
            return []
        due = [sweep for sweep in self.sweeps if sweep.recheck_due]
        return sorted(due, key=lambda sweep: sweep.recheck_at or self.row["started_at"])

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
            self.a_day = wait.a_day if isinstance(wait, BudgetSpent) else None
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
        tokens, name = Tokens(rt), self.application.name
        self.http = http = Http(
            self.provider,
            self.settings,
            rt.settings.http,
            rt.budget,
            connection_id,
            tokens.usable(connection_id, self.row["access_token"], self.row["token_expires_at"], of=name),
            lambda refused: tokens.refresh(connection_id, refused=refused, of=name),
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
        http.leave = lambda: max(0, under_way(rt, *self.application.key) - 1) * cost

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

    def _recheck(self) -> None:
        """Read some of what is older than the look-back again, if requests are left for it.

        What is new has been read, so nothing here makes the sync another than it was.
        """
        http, spare, read, deadline = self.http, self._spare(), 0, self.rt.clock() + LONGEST_HISTORY
        assert http is not None  # `fresh` went well
        if spare is None:
            return
        before = http.requests
        for sweep in self.rechecks:
            try:
                for _ in sweep.recheck(spare.pause, thrifty=spare.turn is not None):
                    read += 1
                    if read == spare.pages or self.rt.clock() >= deadline:
                        break
            except BudgetSpent as wait:
                log.debug("connection %s: no round now: %s", self.row["id"], wait.reason)
                break
            except (LockLost, TakenOver, SignInAgain):
                raise
            except Exception as trouble:
                fault = not isinstance(trouble, LifeloggerError)
                log.warning("connection %s: its round rests: %s", self.row["id"], trouble, exc_info=fault)
                why = "see the log" if fault else str(trouble)
                self.journal.message = f"What is older is read again later: {why}"
                sweep.put_off(self.rt.clock() + RECHECK_RESTS)
                break
            if read == spare.pages or self.rt.clock() >= deadline:
                break
        if read and not self.off and not self.journal.message:
            self.journal.message = f"Read {read} page{'' if read == 1 else 's'} of what is older again."
        if spare.turn is not None and http.requests - before != 1:
            with self.rt.store.write() as db:
                spent = spare.turn * (http.requests - before)
                recheck.charge_turn(db, *self.application.key, self.rt.clock() + spent)

    def _spare(self) -> recheck.Spare | None:
        """What others leave for rounds; None: nothing.

        Where there are requests for everybody, it is what the windows have left of their paced part when all
        that is claimed, and the polls of one more tick, are served. Where polls use the whole day nothing is
        ever left: there all connections take turns, a page each, so often that it comes to a share of it.
        """
        rt, settings, http = self.rt, self.rt.settings, self.http
        assert http is not None
        cost, polls = self.provider.poll_cost(self.settings), 0
        with rt.store.read() as db:
            pace = pacing.read(db, *self.application.key)
        if pace.scarce:
            now, turn = rt.clock(), recheck.turn(pace.offered, settings.sync.recheck_share)
            if turn is None:
                return None
            with rt.store.write() as db:
                if not recheck.take_turn(db, *self.application.key, now, now + turn):
                    return None
            turns = max(1.0, pace.connections) * len(self.sweeps)
            spare = recheck.Spare(1, turn, recheck.of_seconds(turn.total_seconds() * turns))
        else:
            http.pace = settings.sync.interval_seconds
            polls = math.ceil(pace.wanted * settings.sync.interval_seconds / DAY)
            spare = recheck.Spare(settings.sync.history_pages)
        http.leave_share = settings.schedule.reserve
        http.leave = lambda: max(0, under_way(rt, *self.application.key) - 1) * cost + polls
        return spare

    def _guarded(self, sweep: Sweep, read: Any) -> None:
        """A stream that is refused is switched off for a while and says so; the others go on."""
        try:
            read()
        except AccountRefused:
            raise  # of all streams, not of this one
        except Refused as refusal:
            log.warning("connection %s: stream %s: %s", self.row["id"], sweep.stream.name, refusal)
            self.off.append(f"{sweep.stream.name}: {refusal}")
            # They stay written down; of this sync they are no part any more.
            sweep.backlog = sweep.recheck_at = None
            self._note(sweep.stream, str(refusal), self.rt.clock() + REFUSED_FOR)

    def _open(self, http: Http) -> list[Sweep]:
        """The sweeps of the streams that are on: their scope was granted, and nothing refused them lately."""
        granted, now = set(self.row["scopes"]), self.row["started_at"]
        states, sweeps = self.row["states"], []
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
        """When all that is on may be read again.

        A little before the interval ends: the tick that meets it comes on the minute.
        """
        return self._looked_at() + pacing.interval(self.rt) * 0.9

    def _looked_at(self) -> datetime:
        """Since when nothing that is on was left unread."""
        started: datetime = self.row["started_at"]
        never = started - pacing.interval(self.rt)
        return min((at or never for at in self.read.values()), default=started)

    def _note(self, stream: base.Stream, reason: str | None, until: datetime | None = None) -> Any:
        """Write down whether a stream is on; returns its row."""
        note = noting(self.rt.store.is_sqlite)
        with self.rt.store.write() as db:
            self.fenced(db)
            note(db, of=self.row["id"], stream=stream.name, reason=reason, until=until)
            states = STREAMS(db, of=self.row["id"], since=self.row["since"])
        return next(state for state in states if state.name == stream.name)

    def fenced(self, db: Database, look: Prepared = OURS, **values: Any) -> Any:
        """Raise `LockLost` unless the user is still ours, `TakenOver` unless the connection is.

        Nobody can take it over until this transaction ends. Returns what `look` reads of it.
        """
        self.lock.check()
        ours = look(db, of=self.row["id"], fence=self.row["fence"], **values)
        if not ours:
            raise TakenOver("a newer sync has taken over, or the connection is gone")
        return ours[0]

    def _back_off(self) -> datetime:
        """When a failed connection is tried again: doubling, with jitter so that not all come at once."""
        failures: int = self.row["failures"]
        wait = min(FIRST_RETRY * 2 ** min(failures, 20), LONGEST_RETRY)
        until: datetime = self.rt.clock() + wait * random.uniform(0.8, 1.2)
        return until

    def _learned(self, db: Database, packed: bytes | None, now: datetime) -> Habits:
        """The person's habits, with when what this sync brought may have reached the provider.

        A record that ended after the last look came when it ended. One that ended before it, and would have
        been seen, came late: some time between the looks.
        """
        habits = Habits.unpack(packed) or pacing.unknown(self.row["started_at"])
        brought = [(sweep, record) for sweep in self.sweeps for record in sweep.counts.new]
        arrivals, news = [], 0
        for sweep, record in brought:
            at, looked_at = record.end_at or record.ordered_at, self.read.get(sweep.stream.name)
            # A first look, and one into the past, finds what nobody could have announced.
            if looked_at is not None and at >= sweep.fresh_since:
                news += 1
                at = at if at >= looked_at else looked_at + (now - looked_at) / 2
            arrivals.append(at.timestamp())
        newest = max((record for _, record in brought), key=lambda record: record.ordered_at, default=None)
        if newest is not None and newest.utc_offset_s is not None:
            habits.offset_s = newest.utc_offset_s
        habits.learn(arrivals, now.timestamp())
        hinted = self.row["news_streams"] is not None
        if news and (hinted or self.row["news_at"] is None):  # what somebody asked for says nothing
            habits.heard(news, announced=hinted)
        if news and hinted:
            pacing.heard(db, self.journal.provider, now, self.application.name)
        return habits

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
            news = self.fenced(db, OUR_NEWS, now=now)
            left, writes = False, [sweep.unwritten for sweep in self.sweeps if sweep.unwritten]
            more_news = news.news_at is not None and news.news_at != self.row["news_at"]
            # What waited for a count that somebody else was asking for is due already: it may be known now.
            self.more = more_news or news.others or (until is not None and until <= now)
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
                habits = self._learned(db, news.habits, now)
                swept = {sweep.stream.name: self.row["started_at"] for sweep in self.sweeps if sweep.swept}
                self.read |= swept
                best = pacing.next_poll(pacing.of(news), habits, self._looked_at(), pacing.interval(self.rt))
                due = now + FIRST_RETRY if soon else best
                if more_news:  # hints have to wait for their turn, people have not
                    due = now if news.news_streams is None else max(now, hint_after or now)
                values |= {"failures": 0, "last_sync_at": now, "next_sync_at": due, "habits": habits.pack()}
                if not more_news:
                    values |= dict.fromkeys(("news_at", "news_streams", "news_about", "deauthorised_at"))
            elif run.outcome == "needs_reauth":
                # News may be that the person has signed in again meanwhile: then nothing is over.
                values |= {} if more_news else needs_reauth(run.message or "", now, told=told)
                left = not more_news and news.deauthorised_at is not None
            else:
                failed = run.outcome == "failed"
                hinted = self.row["news_streams"] is not None and self.row["deauthorised_at"] is None
                if hinted and until is not None and self.a_day is not None:
                    most = math.ceil(pacing.LATE_SHARE * self.a_day / self.provider.poll_cost(self.settings))
                    opens, until = until, pacing.morning(db, *self.application.key, until, most)
                    if until > opens:
                        run.message = (
                            f"{run.message}; so many wait for the next day that this has to wait longer"
                        )
                values |= {"next_sync_at": until, "wait_reason": run.message}
                values |= {"failures": self.row["failures"] + 1} if failed else {}
            if run.outcome == "needs_reauth":  # rare, and depends on what the row says
                db.execute(update(Connection).where(Connection.id == run.connection_id).values(values))
            else:
                new = {f"new_{name}": value for name, value in values.items()}
                writes.append(changing(frozenset(values)).bind(of=run.connection_id, **new))
            counts = run.counts
            ended = ENDED.bind(
                run=run.id,
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
            run_together(db, [*writes, ended])
        if left:  # a webhook said so, and the request that was made to find out has found it so
            leaving.end_deauthorised(self.rt, run.connection_id)
