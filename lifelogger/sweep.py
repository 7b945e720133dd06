"""Reading one stream of a connection downwards, and remembering exactly how far.

A *sweep* reads what is new since the last one, and a look-back before that for late uploads, edits
and deletions; then some of the *backlog*, the span that was never read. A first import is nothing
else: a backlog that goes back for years. Whatever ends a sweep (the budget, a dead worker, the end
of the list), what is stored and what is written down agree, page by page.

A *round* reads what lies below the look-back again, for edits and deletions that nobody told of: a
backlog too, but one of which all is here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from sqlalchemy import Connection as Database
from sqlalchemy import bindparam, func, select, update

from lifelogger.connections import MOST_NAMED
from lifelogger.errors import AccountRefused, BadRecord, Refused, Unavailable
from lifelogger.http import Http
from lifelogger.providers import base
from lifelogger.runtime import Runtime
from lifelogger.store import Bound, Prepared, table
from lifelogger.store.models import Record, Stream
from lifelogger.store.pages import Counts, Item, TooDeep, delete_missing, empty, look, write_items

log = logging.getLogger(__name__)

READ_TO_THE_END_EVERY = timedelta(days=1)
"""How long we believe that nothing older than the oldest record was uploaded since."""
GOLDEN = (5**0.5 - 1) / 2
"""Its multiples spread evenly over [0, 1), however many there are: so first rounds spread over time."""
NAMED_EVERY = timedelta(days=1)
"""So long after the last round began may webhooks that name too much begin another: anybody can send them."""
Note = Callable[[datetime, bool], Bound]
"""Tells what writes down how far a walk has come (`Page.reached`, `Page.end`)."""


@dataclass(frozen=True, slots=True)
class Hint:
    """Where in a stream webhooks say that there is news: `connections.narrowed`."""

    items: tuple[str, ...] = ()
    span: tuple[datetime, datetime] | None = None
    latest: bool = True
    more: bool = False
    """More items were named than these."""

    @classmethod
    def read(cls, about: Mapping[str, Any], *, all_of_it: bool) -> Hint:
        """As it is stored; `all_of_it`: what a poll reads is read besides, whatever it says."""
        since, until = (datetime.fromtimestamp(each, UTC) for each in about.get("span", (0, 0)))
        span = (since, until) if "span" in about else None
        items, latest = tuple(about.get("items", ())), about.get("latest", False)
        return cls(items, span, all_of_it or latest, latest and len(items) >= MOST_NAMED)


class Sweep:
    """One stream's sweep: `read_fresh`, then `read_history`, each newest first.

    The row's `cursor` is when the last sweep began, and its backlog the span [since, until) below
    that which was never read. `fenced` raises in a transaction that must not write any more.
    """

    def __init__(
        self,
        rt: Runtime,
        provider: base.Provider,
        http: Http,
        stream: base.Stream,
        state: Any,
        now: datetime,
        fenced: Callable[[Database], None],
        owner: str | None = None,
    ) -> None:
        self.rt, self.provider, self.http, self.fenced, self.owner = rt, provider, http, fenced, owner
        self.stream, self.stream_id, self.connection_id = stream, state.id, state.connection_id
        self.began_at, self.ended_at = now, state.ended_at
        self.newer, self.oldest = state.newer, state.oldest
        self.recheck_at, self.recheck_until = state.recheck_at, state.recheck_until
        self.recheck_began_at = state.recheck_began_at
        self.recheck_pause = timedelta(0)
        self.counts = Counts()
        self.never_read = state.cursor is None
        self.swept = False
        """Whether what a poll reads was asked for, and not only what webhooks named."""
        self.named = 0
        """How many items were asked for because webhooks named them."""
        settings = rt.settings.sync
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
        self._left_at_first = _seconds(self.backlog)
        self.history_s = 0.0
        """How much of the backlog it has read, in seconds of the past."""
        self.floor: datetime | None = None
        self.pages: Iterator[base.Page] | None = None
        self.upper: datetime | None = None
        self.present: dict[str, datetime | None] = {}
        """What was shown below `upper`, and where it lies; None: a bad record, somewhere."""
        self.readable = True
        self.note: Note | None = None
        self.unwritten: Bound | None = None
        """What the end of the sync is to write down: how far a page came that is not worth a transaction."""
        self.since = self.fresh_since

    def read_hinted(self, hint: Hint, *, suspect: bool = False) -> None:
        """Read what webhooks name, with the fewest requests that bring it.

        That is the list as a poll reads it, except for what is known to lie below it. Of the rest each item
        costs a request, and so does what the list should have shown and did not: it was recorded long ago.
        What is `suspect` is asked for behind the list, and given up when it fails there.
        """
        places, span = self._places(hint.items), hint.span
        below = [key for key in hint.items if key in places and places[key] < self.fresh_since]
        others = [key for key in hint.items if key not in below]
        oldest = self.began_at - timedelta(days=self.rt.settings.sync.history_days)
        if span is not None and span[1] <= oldest:
            span = None  # so old that nothing is kept of it
        apart = span is not None and (suspect or span[1] <= self.fresh_since)
        if hint.latest or others or self.never_read or (span is not None and not apart):
            if span is not None and not apart:
                unread = self.backlog[1] if self.backlog else oldest  # below that it is read as history
                self.fresh_since = min(self.fresh_since, max(span[0], oldest, unread))
                self.newer = self._count()
            self.read_fresh()
            shown = self._places(others)  # or concluded to be gone: that leaves its place
            others = [key for key in others if key not in shown]
        named = [partial(self._read_item, key) for key in (*below, *others)]
        if span is not None and apart:
            named.insert(0, partial(self._read_span, max(span[0], oldest), span[1]))
        for read in named:
            try:
                read()
            except Unavailable as trouble:
                if not suspect:
                    raise
                log.warning("connection %s: given up, as named: %s", self.connection_id, trouble)
        if hint.more:
            self._begin_soon()

    def _read_item(self, key: str) -> None:
        """Ask for one item. A refusal is of it alone: whoever is not signed can name what is not ours."""
        self.named += 1
        try:
            raw = self.provider.item(self.http, self.stream, key, self.owner)
        except AccountRefused:
            raise
        except Refused as refusal:
            log.info("connection %s: %s %s: %s", self.connection_id, self.stream.name, key, refusal)
            return
        if raw is None:
            self._gone(key)
        elif self.provider.external_id(self.stream, raw) == key:
            self._store(base.Page([raw], None))
        else:
            raise Unavailable(f"{self.provider.title} sent another item than it was asked for")

    def _read_span(self, since: datetime, until: datetime) -> None:
        """Read a span below the look-back again; how far the stream has been read stays as it is."""
        self._begin(base.Window(since, until, now=self.began_at), None)
        pages, self.pages = self.pages, None  # history begins anew, however this ends
        assert pages is not None
        for page in pages:
            self._store(page)

    def _gone(self, key: str) -> None:
        """Empty an item that the provider no longer has, and nothing else that lies in the same instant."""
        at = self._places([key]).get(key)
        if at is None:
            return
        beside = select(Record.external_id).where(
            *self._mine(), Record.ordered_at == at, Record.external_id != key
        )
        with self.rt.store.write() as db:
            self.fenced(db)
            deleted = delete_missing(
                db,
                self.connection_id,
                self.stream.name,
                since=at,
                until=at + timedelta.resolution,
                present=set(db.scalars(beside)),
                now=self.rt.clock(),
            )
        self.counts.deleted += deleted

    def _places(self, keys: Collection[str]) -> dict[str, datetime]:
        """Where in the stream these items lie or, when they are gone, lay; of the others nothing."""
        if not keys:
            return {}
        query = select(Record.external_id, Record.ordered_at).where(
            Record.connection_id == self.connection_id,
            Record.stream == self.stream.name,
            Record.external_id.in_(keys),
        )
        with self.rt.store.read() as db:
            return {row.external_id: row.ordered_at for row in db.execute(query)}

    def read_fresh(self) -> None:
        """Read from the newest down to the look-back's start; further if the last page brings it."""
        self.swept = True
        joined = self.backlog is not None and self.backlog[1] >= self.fresh_since
        self.since = self.backlog[0] if joined and self.backlog else self.fresh_since
        expect = None if joined else self.newer
        window = base.Window(self.since, None, expect, self._floor(), self.began_at)
        self._begin(window, self._advance)
        assert self.pages is not None
        for page in self.pages:
            self._store(page, later=True)
            if page.reached is not None and self.since < page.reached <= self.fresh_since:
                return  # the fresh part is complete; the same walk goes on as history
        self.pages = None

    def read_history(self) -> Iterator[None]:
        """Read the backlog, a page each time it is asked to go on; what is left stays written down."""
        if self.backlog is None:
            return
        if self.pages is None:
            self.since = self.backlog[0]
            self._begin(base.Window(self.backlog[0], self.backlog[1], now=self.began_at), self._advance)
        assert self.pages is not None
        for page in self.pages:
            self._store(page)
            yield

    @property
    def recheck_due(self) -> bool:
        """Whether a round may go on or begin: only where nothing is left that was never read."""
        return self.backlog is None and self.recheck_at is not None and self.recheck_at <= self.began_at

    def recheck(self, pause: timedelta, *, thrifty: bool) -> Iterator[None]:
        """Read on in the round, or begin one, a page or so each time it is asked to go on.

        It comes after `read_fresh`, which has shown what lies above. It goes down to the oldest record, and
        at least as far as history does; `thrifty`: the oldest is taken for the end without a request that
        shows it. After each page the next is due after a `pause`.
        """
        settings, self.recheck_pause = self.rt.settings.sync, pause
        depth = self.began_at - timedelta(days=settings.history_days)
        self.since = min(depth, self.oldest or depth)
        if self.recheck_until is None:  # whole seconds: lists are asked for those
            self.recheck_until = datetime.fromtimestamp(math.ceil(self.fresh_since.timestamp()), UTC)
            self.recheck_began_at = self.began_at
        top = self.recheck_until
        if top <= self.since:
            with self.rt.store.write() as db:
                self.fenced(db)
                self._go_round(top, True)(db)
            return
        floor = self.oldest if thrifty else None
        self._begin(base.Window(self.since, top, floor=floor, now=self.began_at), self._go_round)
        assert self.pages is not None
        for page in self.pages:
            self._store(page)
            if self.recheck_until is None or self.recheck_until < top:  # else nothing is gained yet
                yield

    def _begin_soon(self) -> None:
        """Let a round begin with the next poll: of what webhooks named, it alone finds all."""
        began_at = self.recheck_began_at
        lately = began_at is not None and began_at > self.began_at - NAMED_EVERY
        if not lately and self.recheck_until is None and self.recheck_at is not None:
            with self.rt.store.write() as db:
                self.fenced(db)
                self._round(min(self.recheck_at, self.began_at), None)(db)

    def put_off(self, until: datetime) -> None:
        """Let the round rest: it met trouble where it is."""
        with self.rt.store.write() as db:
            self.fenced(db)
            self._round(until, None)(db)

    def _go_round(self, reached: datetime, end: bool) -> Bound:
        """How far the round is, and when it goes on or the next begins."""
        now = self.rt.clock()
        done = end or reached <= self.since
        self.recheck_until = None if done else reached
        next_round = self.recheck_began_at + timedelta(days=self.rt.settings.sync.recheck_days)
        return self._round(max(now + self.recheck_pause, next_round if done else now), now if done else None)

    def _round(self, at: datetime, ended_at: datetime | None) -> Bound:
        self.recheck_at = at
        return RECHECKED.bind(
            of=self.stream_id,
            recheck_at=at,
            recheck_until=self.recheck_until,
            recheck_began_at=self.recheck_began_at,
            recheck_ended_at=ended_at,
        )

    def _first_round(self) -> datetime | None:
        """When the first round may begin: a connection has its own time, so that not all begin at once."""
        days = self.rt.settings.sync.recheck_days
        if self.recheck_at is not None or not days:
            return None
        return self.began_at + timedelta(days=days * (self.connection_id * GOLDEN % 1))

    def _begin(self, window: base.Window, note: Note | None) -> None:
        self.pages = self.provider.pages(self.http, self.stream, window)
        self.upper, self.present, self.readable, self.note = window.until, {}, True, note

    def _store(self, page: base.Page, *, later: bool = False) -> None:
        """Commit one page with the place it earns, or nothing of it.

        With `later` the place that a page without news earns is left `unwritten`.
        """
        now, store = self.rt.clock(), self.rt.store
        items = [self._item(raw) for raw in page.items]
        keys = [item.external_id for item in items]
        with store.read() as db:  # nobody writes here but us, or `fenced` raises below
            held = look(db, self.connection_id, self.stream.name, keys, page.reached, self.upper)
        for item in items:
            if held.has(item):
                at = held.known[str(item.external_id)].ordered_at
            else:
                self._read(item)
                at = item.record.ordered_at if item.record else None
            if item.external_id is not None:
                self.present[item.external_id] = at
        # An item whose key cannot be read may be any of those that seem to be missing.
        self.readable = self.readable and None not in keys
        gone: list[int] = []
        if page.reached is not None and self.readable:
            gone = [row.id for row in held.others if row.external_id not in self.present]
        note = partial(self.note, page.reached, page.end) if self.note and page.reached is not None else None
        news = bool(gone) or not all(map(held.has, items)) or (held.quarantined and bool(items))
        if later and not news and note is not None:
            self.unwritten = note()
        elif news or note is not None:
            with store.write() as db:
                self.fenced(db)
                if self.unwritten is not None:
                    self.unwritten(db)
                counts = write_items(store, db, self.connection_id, self.stream.name, items, now, held)
                counts.deleted = empty(db, gone, now)
                if note is not None:
                    note()(db)
            self.counts.add(counts)
            self.unwritten = None
        if page.reached is not None:
            # What was shown of the span below need not be shown again.
            below = {key: at for key, at in self.present.items() if at is None or at < page.reached}
            self.upper, self.present, self.readable = page.reached, below, None not in keys

    def _item(self, raw: Any) -> Item:
        key = self.provider.external_id(self.stream, raw)
        try:
            return Item(key, raw)
        except TooDeep as bad:  # it cannot be kept, not even in the quarantine
            return Item(key, None, reason=str(bad))

    def _read(self, item: Item) -> None:
        """Normalise an item, or note why it cannot be."""
        if item.reason is None:
            try:
                item.record = self.provider.record(self.stream, item.raw)
            except BadRecord as bad:
                item.reason = str(bad)

    def _advance(self, reached: datetime, end: bool) -> Bound:
        """What is known now: everything down to `reached`, and what is still to come."""
        if end:
            left: tuple[datetime, datetime] | None = None
        elif reached > self.since:
            lowest = min(self.since, self.backlog[0]) if self.backlog else self.since
            left = (lowest, reached)
        elif self.backlog and self.backlog[0] < reached:
            left = (self.backlog[0], min(self.backlog[1], reached))
        else:
            left = None
        self.history_s = max(0.0, self._left_at_first - _seconds(left))
        if end or reached <= self.since:
            self.backlog = left
        return ADVANCE.bind(
            of=self.stream_id,
            cursor=self.began_at,
            backlog_since=left and left[0],
            backlog_until=left and left[1],
            ended_at=self.began_at if end else None,
            recheck_at=None if left else self._first_round(),
        )

    def _floor(self) -> datetime | None:
        """The oldest record, when the list was read to its end not long ago and nothing is older."""
        ended, now = self.ended_at, self.began_at
        if self.backlog or ended is None or not timedelta(0) <= now - ended < READ_TO_THE_END_EVERY:
            return None
        oldest: datetime | None = self.oldest
        return oldest

    def _count(self) -> int:
        """How many records of the look-back we hold."""
        with self.rt.store.read() as db:
            query = select(func.count()).where(*self._mine(), Record.ordered_at >= self.fresh_since)
            return db.scalar(query) or 0

    def _mine(self) -> tuple[Any, ...]:
        return (
            Record.connection_id == self.connection_id,
            Record.stream == self.stream.name,
            Record.deleted_at.is_(None),
        )


def _seconds(span: tuple[datetime, datetime] | None) -> float:
    return (span[1] - span[0]).total_seconds() if span else 0.0


# Built once: to build a statement takes as long as to run it.
ADVANCE = Prepared(
    update(table(Stream))
    .where(Stream.__table__.c.id == bindparam("of"))
    .values(
        cursor=bindparam("cursor"),
        backlog_since=bindparam("backlog_since"),
        backlog_until=bindparam("backlog_until"),
        ended_at=func.coalesce(
            bindparam("ended_at", type_=Stream.ended_at.type), Stream.__table__.c.ended_at
        ),
        recheck_at=func.coalesce(
            Stream.__table__.c.recheck_at, bindparam("recheck_at", type_=Stream.recheck_at.type)
        ),
    )
)
RECHECKED = Prepared(
    update(table(Stream))
    .where(Stream.__table__.c.id == bindparam("of"))
    .values(
        recheck_at=bindparam("recheck_at"),
        recheck_until=bindparam("recheck_until"),
        recheck_began_at=bindparam("recheck_began_at"),
        recheck_ended_at=func.coalesce(
            bindparam("recheck_ended_at", type_=Stream.recheck_ended_at.type),
            Stream.__table__.c.recheck_ended_at,
        ),
    )
)
