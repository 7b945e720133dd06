"""Reading one stream of a connection downwards, and remembering exactly how far.

A *sweep* reads what is new since the last one, and a look-back before that for late uploads, edits
and deletions; then some of the *backlog*, the span that was never read. A first import is nothing
else: a backlog that goes back for years. Whatever ends a sweep (the budget, a dead worker, the end
of the list), what is stored and what is written down agree, page by page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection as Database
from sqlalchemy import bindparam, func, update

from lifelogger.errors import BadRecord
from lifelogger.http import Http
from lifelogger.providers import base
from lifelogger.runtime import Runtime
from lifelogger.store import Prepared, table
from lifelogger.store.models import Stream
from lifelogger.store.pages import Counts, Item, TooDeep, delete_missing, write_items

READ_TO_THE_END_EVERY = timedelta(days=1)
"""How long we believe that nothing older than the oldest record was uploaded since."""


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
    ) -> None:
        self.rt, self.provider, self.http, self.fenced = rt, provider, http, fenced
        self.stream, self.stream_id, self.connection_id = stream, state.id, state.connection_id
        self.began_at, self.ended_at = now, state.ended_at
        self.newer, self.oldest = state.newer, state.oldest
        self.counts = Counts()
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
        self.floor: datetime | None = None
        self.pages: Iterator[base.Page] | None = None
        self.upper: datetime | None = None
        self.present: dict[str, datetime | None] = {}
        """What was shown below `upper`, and where it lies; None: a bad record, somewhere."""
        self.readable = True
        self.since = self.fresh_since

    def read_fresh(self) -> None:
        """Read from the newest down to the look-back's start; further if the last page brings it."""
        joined = self.backlog is not None and self.backlog[1] >= self.fresh_since
        self.since = self.backlog[0] if joined and self.backlog else self.fresh_since
        expect = None if joined else self.newer
        window = base.Window(self.since, None, expect, self._floor(), self.began_at)
        self._begin(window)
        assert self.pages is not None
        for page in self.pages:
            self._store(page)
            if page.reached is not None and self.since < page.reached <= self.fresh_since:
                return  # the fresh part is complete; the same walk goes on as history
        self.pages = None

    def read_history(self) -> Iterator[None]:
        """Read the backlog, a page each time it is asked to go on; what is left stays written down."""
        if self.backlog is None:
            return
        if self.pages is None:
            self.since = self.backlog[0]
            self._begin(base.Window(self.backlog[0], self.backlog[1], now=self.began_at))
        assert self.pages is not None
        for page in self.pages:
            self._store(page)
            yield

    def _begin(self, window: base.Window) -> None:
        self.pages = self.provider.pages(self.http, self.stream, window)
        self.upper, self.present, self.readable = window.until, {}, True

    def _store(self, page: base.Page) -> None:
        """Commit one page with the cursor it earns, or nothing of it."""
        now = self.rt.clock()
        items = [self._item(raw) for raw in page.items]
        self.present.update(
            (item.external_id, item.record.ordered_at if item.record else None)
            for item in items
            if item.external_id is not None
        )
        # An item whose key cannot be read may be any of those that seem to be missing.
        self.readable = self.readable and all(item.external_id is not None for item in items)
        with self.rt.store.write() as db:
            self.fenced(db)
            counts = write_items(self.rt.store, db, self.connection_id, self.stream.name, items, now)
            if page.reached is not None:
                if self.readable:
                    counts.deleted = delete_missing(
                        db,
                        self.connection_id,
                        self.stream.name,
                        since=page.reached,
                        until=self.upper,
                        present=self.present.keys(),
                        now=now,
                    )
                self._advance(db, page.reached, page.end)
        if page.reached is not None:
            # What was shown of the span below need not be shown again.
            below = {key: at for key, at in self.present.items() if at is None or at < page.reached}
            legible = all(item.external_id is not None for item in items)
            self.upper, self.present, self.readable = page.reached, below, legible
        self.counts.add(counts)

    def _item(self, raw: Any) -> Item:
        key = self.provider.external_id(self.stream, raw)
        try:
            return Item(key, raw, self.provider.record(self.stream, raw))
        except BadRecord as bad:
            reason = str(bad)
        except TooDeep as bad:
            raw, reason = None, str(bad)  # it cannot be kept, not even in the quarantine
        return Item(key, raw, reason=reason)

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
        ADVANCE(
            db,
            of=self.stream_id,
            cursor=self.began_at,
            backlog_since=left and left[0],
            backlog_until=left and left[1],
            ended_at=self.began_at if end else None,
        )
        if end or reached <= self.since:
            self.backlog = left

    def _floor(self) -> datetime | None:
        """The oldest record, when the list was read to its end not long ago and nothing is older."""
        ended, now = self.ended_at, self.began_at
        if self.backlog or ended is None or not timedelta(0) <= now - ended < READ_TO_THE_END_EVERY:
            return None
        oldest: datetime | None = self.oldest
        return oldest


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
    )
)
