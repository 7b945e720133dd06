"""What holds of every provider: each rule of `lifelogger/providers/base.py`, and what the engine does by it.

A provider's test file subclasses `Contract` and says what is its own: how its lists are called, and what an
edit, a novelty and a fault look like in its words. The suite then runs against its sandbox, on both
databases:

    class TestContract(Contract):
        provider = Strava()
        lists = {"activities": Listed("GET /athlete/activities", edit={"name": "Renamed"}, …)}
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from queue import Queue
from typing import Any, ClassVar
from zoneinfo import ZoneInfo

import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lifelogger import sync
from lifelogger.connecting import connect as connect_account
from lifelogger.errors import BadRecord, LifeloggerError
from lifelogger.http import Http
from lifelogger.providers import base
from lifelogger.providers.base import Page, Provider, Record, Stream, Window
from lifelogger.runtime import Runtime
from lifelogger.store import models
from lifelogger.store.pages import VALUES
from tests.live import (
    NOON,
    begin_rounds,
    change,
    connection,
    in_background,
    journal,
    quarantined,
    rows,
    ticked,
    tuned,
)
from tests.live import connect as connect_at
from tests.sandbox.control import Control

QUARTER, HOUR, DAY = 900, 3600, 86_400
LIFE_DAYS = 45
"""So long the people of this world have lived."""
AT_ONCE = {"history_days": 50, "lookback_days": 50}
"""All of their lives lies in the look-back: one sync reads it, and sees whatever is changed of it."""
BY_AND_BY = {"history_days": 50, "lookback_days": 15}
"""They have a past, which is read as history."""
LAST_WEEK = {"lookback_days": 7}
NOVEL = {"brand_new": {"deep": [1, None, "x"]}}
"""A field that nobody has heard of."""

BROKEN_REPLIES: tuple[dict[str, Any], ...] = (
    {"status": 500},
    {"status": 503, "headers": {"Retry-After": "120"}},
    {"status": 408},
    {"cut": "before"},
    {"cut": "middle"},
    {"cut": "after"},
    {"body": "{"},
    {"body": "[NaN]"},
    {"body": ""},
    {"json": 7},
    {"json": "a text"},
    {"json": None},
    {"json": True},
    {"size": 600_000},
    {"redirect": "https://example.org/"},
)
NO_ITEMS: tuple[Any, ...] = (None, 7, "x", [], {}, [[[]]], {"id": {"a": 1}})


@dataclass(frozen=True)
class Listed:
    """One stream's list, and what can be done to an item of it, in the provider's words."""

    route: str
    """As the sandbox calls it."""
    edit: Mapping[str, Any]
    """Fields that say something else than before."""
    broken: Mapping[str, Any]
    """Fields with which an item is no record, though its key can be read."""
    novel: Mapping[str, Any] = field(default_factory=lambda: NOVEL)
    """Fields and words that nobody has heard of."""


class Contract(ABC):
    """The suite. What a subclass says of its provider:"""

    provider: ClassVar[Provider]
    lists: ClassVar[Mapping[str, Listed]]
    """By stream; those that are off without the settings' word need not be there."""

    @abstractmethod
    def small_pages(self, sandbox: Control, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make pages so short that the look-back has several."""

    # What the tests below have in common

    @pytest.fixture(autouse=True)
    def _a_short_life(self, live: Runtime, sandbox: Control) -> None:
        self.sandbox = sandbox
        self.live = tuned(live, sync=AT_ONCE)

    @property
    def streams(self) -> list[Stream]:
        return [stream for stream in self.provider.streams if not stream.optional]

    @property
    def cost(self) -> int:
        """The documented cost of a poll without news, in requests."""
        return self.provider.poll_cost(self.live.settings.providers[self.provider.name])

    def some(self, cases: Sequence[Any]) -> Sequence[Any]:
        """All where a poll is one request; each third where it is many, and all with the slow tests."""
        return cases if self.cost == 1 else cases[::3]

    def connect(self, *people: str, **grant: Any) -> list[dict[str, Any]]:
        return connect_at(self.live, self.sandbox, *people, provider=self.provider.name, **grant)

    def truth(self, person: str = "alice", stream: str | None = None) -> dict[str, list[Any]]:
        """What there is at the provider, by stream, in an order that does not matter."""
        names = [stream] if stream else [each.name for each in self.streams]
        return {name: in_order(each["item"] for each in self.items(name, person)) for name in names}

    def items(self, stream: str, person: str = "alice") -> list[dict[str, Any]]:
        """The items of one stream with the sandbox's keys, newest first."""
        return self.sandbox.items(person, stream, provider=self.provider.name)

    def alter(self, stream: str, key: str, **how: Any) -> None:
        self.sandbox.change_item("alice", stream, key, provider=self.provider.name, **how)

    def stored(self, person: str = "alice") -> dict[str, list[Any]]:
        """What the store has, in the same form."""
        found: dict[str, list[Any]] = {stream.name: [] for stream in self.streams}
        for row in rows(self.live, models.Record.__table__, person):
            if row.deleted_at is None:
                found.setdefault(row.stream, []).append(row.raw)
        return {name: in_order(items) for name, items in found.items()}

    def records(self, person: str = "alice") -> list[Any]:
        return rows(self.live, models.Record.__table__, person)

    def synced(self, person: str = "alice", live: Runtime | None = None) -> sync.Run:
        (run,) = sync.run(person, runtime=live or self.live)
        return run

    def imported(self, person: str = "alice") -> list[sync.Run]:
        """Sync until there is no history left to read."""
        runs = []
        for _ in range(8):
            runs.append(self.synced(person))
            assert runs[-1].outcome == "ok", runs[-1].message
            if self.all_read(person):
                return runs
            self.sandbox.step(QUARTER)
        raise AssertionError("the import does not end")

    def all_read(self, person: str = "alice") -> bool:
        return all(row.backlog_until is None for row in rows(self.live, models.Stream.__table__, person))

    def fault(self, **what: Any) -> int:
        """Break requests of this provider's API; by default the first list."""
        what = {"match": self.lists[self.streams[0].name].route, **what}
        return self.sandbox.fault(what.pop("match"), provider=self.provider.name, **what)

    def asked(self, **filters: Any) -> list[dict[str, Any]]:
        """The requests of our application to the API, oldest first."""
        return self.sandbox.ledger(provider=self.provider.name, kind="read", **filters)

    def http(self, token: str) -> Http:
        """The network as a provider has it in a sync."""

        def renew(refused: str) -> str:
            raise AssertionError("the token was refused")

        settings = self.live.settings
        name = self.provider.name
        return Http(
            self.provider,
            settings.providers[name],
            settings.http,
            self.live.budget,
            connection(self.live, "alice").id,
            token,
            renew,
            self.live.clock,
        )

    def pages_of(self, token: str, stream: Stream, since: datetime, until: datetime | None) -> list[Page]:
        window = Window(since, until, now=self.live.clock())
        return list(self.provider.pages(self.http(token), stream, window))

    def placed(self, stream: Stream, items: Iterable[Any]) -> dict[str | None, datetime]:
        """Where items lie, by their keys."""
        return {
            self.provider.external_id(stream, item): self.provider.record(stream, item).ordered_at
            for item in items
        }

    # What a provider says of itself

    def test_its_streams_have_names_kinds_and_scopes_of_their_own(self) -> None:
        names = [stream.name for stream in self.provider.streams]
        wanted = {scope for stream in self.streams for scope in stream.scopes}

        assert len(set(names)) == len(names) > 0
        assert all(stream.kind in ("activity", "sleep", "day", "body") for stream in self.provider.streams)
        assert set(self.provider.scopes) & wanted or not wanted
        assert set(self.lists) >= {stream.name for stream in self.streams}
        for stream in self.streams:
            assert not stream.scopes or set(stream.scopes) & set(self.provider.scopes), stream.name

    def test_its_pools_are_its_own_and_counted_per_application(self) -> None:
        settings = self.live.settings.providers[self.provider.name]
        for token in (False, True):
            for pool in self.provider.pools(settings, 7, token=token):
                assert pool.key.startswith(f"{self.provider.name}:{settings.client_id}:"), pool
        assert any(pool.limits for pool in self.provider.pools(settings, 7))
        assert set(self.provider.shared_pools(settings)) <= set(self.provider.pools(settings, 7))

    # Pages

    def test_a_window_is_shown_from_the_newest_down_to_its_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """`pages`: all that lies at or above `reached` has been shown then, and the last page is down."""
        self.small_pages(self.sandbox, monkeypatch)
        (line,) = self.connect("alice")
        since = NOON - timedelta(days=15)
        for stream in self.streams:
            there = self.placed(stream, self.truth("alice", stream.name)[stream.name])
            shown: set[str | None] = set()
            levels = []
            for page in self.pages_of(line["access_token"], stream, since, None):
                shown |= {self.provider.external_id(stream, item) for item in page.items}
                if page.reached is not None:
                    levels.append(page.reached)
                    assert {key for key, at in there.items() if at >= page.reached} <= shown, stream.name
            assert levels == sorted(levels, reverse=True)
            assert levels[-1] <= since
            assert shown <= there.keys()

    def test_a_walk_can_be_taken_up_below_any_page(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A window that ends where a page had reached goes on exactly there: nothing falls between."""
        self.small_pages(self.sandbox, monkeypatch)
        (line,) = self.connect("alice")
        since = NOON - timedelta(days=40)
        for stream in self.streams:
            there = self.placed(stream, self.truth("alice", stream.name)[stream.name])
            whole = self.pages_of(line["access_token"], stream, since, None)
            shown: set[str | None] = set()
            for page in whole[:-1]:
                shown |= {self.provider.external_id(stream, item) for item in page.items}
                if page.reached is None:
                    continue
                below = self.pages_of(line["access_token"], stream, since, page.reached)
                rest = {self.provider.external_id(stream, item) for each in below for item in each.items}
                assert {key for key, at in there.items() if at >= since} <= shown | rest, stream.name
                assert below[-1].reached is not None
                assert below[-1].reached <= since

    def test_an_item_that_is_asked_for_is_as_the_list_has_it(self) -> None:
        """`item`: else whichever of both comes next is taken for an edit. What is not there is None."""
        if type(self.provider).item is Provider.item:
            pytest.skip(f"{self.provider.title}'s webhooks name no items")
        (line,) = self.connect("alice")
        http, owner = self.http(line["access_token"]), line["provider_user_id"]
        for stream in self.streams:
            item, gone = (each["item"] for each in self.items(stream.name)[-2:])
            key = self.provider.external_id(stream, item)
            assert key is not None
            assert self.provider.item(http, stream, key, owner) == item, stream.name

            missing = self.provider.external_id(stream, gone)
            assert missing is not None
            self.alter(stream.name, self.items(stream.name)[-1]["key"], deleted=True)
            assert self.provider.item(http, stream, missing, owner) is None, stream.name

    def test_a_first_import_stores_exactly_what_is_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Promise 6: every item of every list once, over many pages, its payload equal in meaning."""
        self.live = tuned(self.live, sync=BY_AND_BY)
        self.small_pages(self.sandbox, monkeypatch)
        self.connect("alice")

        runs = self.imported()

        assert self.stored() == self.truth()
        assert all(self.stored().values())
        assert quarantined(self.live, "alice") == []
        assert sum(run.requests for run in runs) > 2 * len(self.streams)
        assert sum(run.counts.inserted for run in runs) == len(self.records())

    @pytest.mark.slow
    @pytest.mark.parametrize("broken", [{"status": 500}, {"cut": "after"}], ids=["500", "cut"])
    def test_an_import_goes_on_wherever_it_broke_off(
        self, monkeypatch: pytest.MonkeyPatch, broken: dict[str, Any]
    ) -> None:
        """Promise 6: after each request in turn, and what was stored before stays."""
        self.live = tuned(self.live, sync=BY_AND_BY)
        self.small_pages(self.sandbox, monkeypatch)
        self.connect("alice")
        requests_in_all = sum(run.requests for run in self.imported())
        for after in range(1, requests_in_all, 1 + requests_in_all // 5):
            forget(self.live, "alice")
            id_ = self.fault(match="*", skip=after, times=1, **broken)
            run = self.synced()
            for _ in range(8):
                kept = {row.external_id for row in self.records()}
                self.sandbox.step(QUARTER)
                run = self.synced()
                assert kept <= {row.external_id for row in self.records()}
                if all(
                    row.backlog_until is None for row in rows(self.live, models.Stream.__table__, "alice")
                ):
                    break
            assert run.outcome == "ok", run.message
            assert self.stored() == self.truth(), after
            self.sandbox.clear_faults(id_)

    def test_two_syncs_in_a_row_change_nothing(self) -> None:
        """Promise 6, and the documented cost of a poll without news: as the ledger has it, not our count."""
        self.live = tuned(self.live, sync=LAST_WEEK)
        self.connect("alice")
        self.imported()
        before, asked = self.records(), len(self.asked())

        run = self.synced()

        assert self.records() == before
        assert (run.outcome, run.counts) == ("ok", type(run.counts)())
        assert run.requests == len(self.asked()) - asked == self.cost

    def test_it_asks_only_for_what_the_specification_has(self) -> None:
        """The sandbox notes every request that is not in the provider's own document."""
        self.connect("alice")
        self.imported()

        assert {entry["note"] for entry in self.asked()} == {""}

    # Late, edited, deleted

    def test_late_edited_and_deleted_items_arrive(self) -> None:
        """Promise 6: in every stream, anywhere in the look-back; a deleted one leaves an empty row."""
        self.connect("alice")
        since = NOON - timedelta(days=15)
        chosen: dict[str, list[str]] = {}
        for stream in self.streams:
            near = [
                each["key"] for each in self.items(stream.name)
                if self.provider.record(stream, each["item"]).ordered_at >= since
            ]  # fmt: skip
            assert len(near) >= 3, f"too few of {stream.name} in the look-back for this test"
            chosen[stream.name] = [near[len(near) - 1], near[len(near) // 2], near[0]]
            self.alter(stream.name, near[-1], deleted=True)
        self.imported()
        before = {(row.stream, row.external_id) for row in self.records()}
        for name, (late, edited, deleted) in chosen.items():
            self.alter(name, late, deleted=False)
            self.alter(name, edited, fields=self.lists[name].edit)
            self.alter(name, deleted, deleted=True)

        run = self.synced()

        assert self.stored() == self.truth()
        many = len(self.streams)
        assert (run.counts.inserted, run.counts.updated, run.counts.deleted) == (many, many, many)
        gone = [row for row in self.records() if row.deleted_at is not None]
        assert sorted(row.stream for row in gone) == sorted(chosen)
        for row in gone:
            assert (row.stream, row.external_id) in before
            assert {row._mapping[name] for name in VALUES if name not in ("kind", "ordered_at")} == {None}
            assert row.raw is None

    def test_what_comes_back_is_there_again(self) -> None:
        self.connect("alice")
        self.imported()
        name = self.streams[0].name
        key = self.items(name)[0]["key"]
        self.alter(name, key, deleted=True)
        self.synced()
        self.alter(name, key, deleted=False)

        self.synced()

        assert self.stored() == self.truth()
        assert [row for row in self.records() if row.deleted_at is not None] == []

    def test_a_list_that_broke_off_concludes_no_deletion(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Promise 6: what a page that never came would have shown is not taken for deleted."""
        self.small_pages(self.sandbox, monkeypatch)
        self.connect("alice")
        self.imported()
        before = self.stored()
        for skip in (0, 1):
            self.sandbox.step(QUARTER)
            id_ = self.fault(status=500, skip=skip)
            run = self.synced()
            self.sandbox.clear_faults(id_)

            assert run.counts.deleted == 0
            assert self.stored() == before

    def test_outside_the_look_back_nothing_is_taken_for_deleted(self) -> None:
        """What is older than the look-back is not listed by a poll, and stays."""
        self.live = tuned(self.live, sync=BY_AND_BY)
        self.connect("alice")
        self.imported()
        before = self.stored()
        self.live = tuned(self.live, sync={"lookback_days": 2})

        run = self.synced()

        assert (run.outcome, run.counts.deleted) == ("ok", 0)
        assert self.stored() == before

    def test_old_edits_and_deletions_arrive_within_a_round(self) -> None:
        """Promise 6, beyond the look-back: in every stream, at the cost of its pages."""
        self.arrive_within_a_round(pages=10)

    @pytest.mark.slow
    def test_a_round_goes_on_below_any_page(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """One short page at each tick."""
        self.small_pages(self.sandbox, monkeypatch)
        self.arrive_within_a_round(pages=1)

    def arrive_within_a_round(self, pages: int) -> None:
        self.live = tuned(self.live, sync={"history_days": 50, "lookback_days": 2, "history_pages": pages})
        self.connect("alice")
        self.imported_at_leisure()
        for stream in self.streams:
            old = [
                each["key"] for each in self.items(stream.name)
                if self.provider.record(stream, each["item"]).ordered_at < NOON - timedelta(days=4)
            ]  # fmt: skip
            assert len(old) >= 3, f"too few of {stream.name} before the look-back for this test"
            self.alter(stream.name, old[-1], fields=self.lists[stream.name].edit)
            self.alter(stream.name, old[0], fields=self.lists[stream.name].edit)
            self.alter(stream.name, old[len(old) // 2], deleted=True)
        self.sandbox.step(QUARTER)
        (poll,) = ticked(self.live, "alice")
        unseen = [name for name, items in self.truth().items() if self.stored()[name] != items]
        begin_rounds(self.live, "alice")

        runs = self.rounds()
        self.sandbox.step(QUARTER)
        (after,) = ticked(self.live, "alice")

        assert (poll.counts.deleted, unseen) == (0, [stream.name for stream in self.streams])
        assert self.stored() == self.truth()
        assert sum(run.counts.deleted for run in runs) == len(self.streams)
        assert {run.outcome for run in runs} == {"ok"}
        assert sum(run.requests for run in runs) >= len(runs) * self.cost + len(self.streams)
        assert (poll.requests, after.requests) == (self.cost, self.cost), "other polls cost what they did"

    def imported_at_leisure(self) -> None:
        for _ in range(60):
            assert self.synced().outcome == "ok"
            if self.all_read():
                return
            self.sandbox.step(QUARTER)
        raise AssertionError("the import does not end")

    def rounds(self) -> list[sync.Run]:
        """Ticks until each stream's round is over."""
        runs = []
        for _ in range(60):
            self.sandbox.step(QUARTER)
            runs += ticked(self.live, "alice")
            if all(row.recheck_ended_at for row in rows(self.live, models.Stream.__table__, "alice")):
                return runs
        raise AssertionError("the round does not end")

    # What is wrong with an item

    def test_unknown_fields_and_words_are_kept_and_never_fatal(self) -> None:
        """Promise 7 has nothing to do: a provider may add to its API whenever it likes."""
        self.connect("alice")
        for name, listed in self.lists.items():
            for each in self.items(name)[:2]:
                self.alter(name, each["key"], fields=listed.novel)

        self.imported()

        assert self.stored() == self.truth()
        assert quarantined(self.live, "alice") == []
        assert "brand_new" in json.dumps(self.stored())

    def test_one_bad_item_costs_one_record(self) -> None:
        """Promise 7: of every list; it is kept aside with its reason, and leaves when it is good again."""
        self.connect("alice")
        victims = {name: self.items(name)[1] for name in self.lists}
        for name, good in victims.items():
            self.alter(name, good["key"], fields=self.lists[name].broken)

        self.imported()
        aside = quarantined(self.live, "alice")
        stored = self.stored()
        told = self.truth()
        for name, good in victims.items():
            self.alter(name, good["key"], raw=good["item"])
        self.synced()

        assert sorted(each.stream for each in aside) == sorted(victims)
        for each in aside:
            assert each.reason
            assert each.external_id
            assert each.payload in told[each.stream]
            assert in_order([*stored[each.stream], each.payload]) == told[each.stream]
        assert quarantined(self.live, "alice") == []
        assert self.stored() == self.truth()

    def test_a_bad_item_that_was_good_is_not_taken_for_deleted(self) -> None:
        self.connect("alice")
        self.imported()
        name = self.streams[0].name
        key = self.items(name)[1]["key"]
        self.alter(name, key, fields=self.lists[name].broken)

        run = self.synced()

        assert (run.counts.deleted, run.counts.quarantined) == (0, 1)

    def test_an_item_that_is_none_costs_nothing_but_itself(self) -> None:
        self.costs_nothing_but_itself(self.some(NO_ITEMS))

    @pytest.mark.slow
    def test_each_item_that_is_none_costs_nothing_but_itself(self) -> None:
        self.costs_nothing_but_itself(NO_ITEMS)

    def costs_nothing_but_itself(self, items: Sequence[Any]) -> None:
        self.connect("alice")
        name = self.streams[0].name
        victim = self.items(name)[1]
        self.imported()
        self.live = tuned(self.live, sync=LAST_WEEK)
        rest = in_order(each["item"] for each in self.items(name) if each["key"] != victim["key"])
        for raw in items:
            self.alter(name, victim["key"], raw=raw)

            run = self.synced()

            assert run.outcome == "ok", raw
            stored = self.stored()[name]
            assert stored in (rest, in_order([*rest, victim["item"]])), raw
            assert raw in [aside.payload for aside in quarantined(self.live, "alice")], raw

    # What is wrong with a reply

    def test_a_broken_reply_is_tried_again_later_and_costs_nothing_that_is_stored(self) -> None:
        """Promise 12: failed with a reason and a time; whole the next time."""
        self.is_tried_again_later(self.some(BROKEN_REPLIES))

    @pytest.mark.slow
    def test_each_broken_reply_is_tried_again_later_and_costs_nothing_that_is_stored(self) -> None:
        self.is_tried_again_later(BROKEN_REPLIES)

    def is_tried_again_later(self, replies: Sequence[dict[str, Any]]) -> None:
        self.live = tuned(self.live, http={"max_bytes": 500_000})
        self.connect("alice")
        self.imported()
        self.live = tuned(self.live, sync=LAST_WEEK)
        for broken in replies:
            before = self.stored()
            self.sandbox.step(QUARTER)
            self.fault(times=1, **broken)

            (failed,) = ticked(self.live, "alice")

            waiting = connection(self.live, "alice")
            assert (failed.outcome, waiting.failures, failed.counts.deleted) == ("failed", 1, 0), broken
            assert waiting.wait_reason == failed.message == journal(self.live, "alice")[-1].message
            assert timedelta(0) < waiting.next_sync_at - self.live.clock() < timedelta(seconds=QUARTER)
            assert self.stored() == before, broken
            self.sandbox.step(QUARTER)
            (mended,) = ticked(self.live, "alice")
            assert (mended.outcome, connection(self.live, "alice").failures) == ("ok", 0), broken
            assert self.stored() == self.truth(), broken

    def test_a_list_without_end_is_given_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A fault of the cloud must cost neither a worker nor everybody's requests."""
        self.small_pages(self.sandbox, monkeypatch)
        monkeypatch.setattr(base, "MOST_REPLIES", 12)
        self.connect("alice")
        self.fault(endless=True)

        run = self.synced()

        assert run.outcome == "failed"
        assert "does not end" in (run.message or "")

    # What is refused

    def test_a_429_is_believed(self) -> None:
        """Promise 3: deferred and no failure, and nobody asks again before the time that it told."""
        self.connect("alice")
        self.fault(status=429, headers={"Retry-After": "200"}, times=1)

        run = self.synced()
        waiting = connection(self.live, "alice")
        again = self.synced()

        assert (run.outcome, waiting.failures) == ("deferred", 0)
        assert waiting.next_sync_at >= NOON + timedelta(seconds=200)
        assert (again.outcome, again.requests, len(self.asked())) == ("deferred", 0, 1)
        self.sandbox.step(QUARTER)
        self.imported()
        assert self.stored() == self.truth()

    def test_a_spent_budget_is_no_request(self) -> None:
        """Promise 3: our own count is asked before the provider is."""
        self.connect("alice")
        name, every = self.provider.name, self.live.settings.providers
        small = {
            which: tuple(re.sub(r"^\d+", "20", limit) for limit in getattr(every[name], which))
            for which in ("budget", "overall_budget", "user_budget")
        }
        settings = every[name].model_copy(update=small)
        everything = self.live.settings.model_copy(update={"providers": {**every, name: settings}})
        self.live = dataclasses.replace(self.live, settings=everything)
        pools = self.provider.pools(settings, connection(self.live, "alice").id)
        self.spend_all(pools)

        run = self.synced()

        assert (run.outcome, run.requests, self.asked()) == ("deferred", 0, [])
        assert connection(self.live, "alice").next_sync_at > self.live.clock()

    def spend_all(self, pools: tuple[Any, ...]) -> None:
        """Make requests until the budget says no."""
        for _ in range(100):
            try:
                self.live.budget.settle(self.live.budget.take(pools), usage={})
            except LifeloggerError:
                return
        raise AssertionError("the budget has no end")

    @pytest.mark.parametrize("code", [403, 404])
    def test_a_refused_stream_is_off_and_says_so_and_is_tried_a_day_later(self, code: int) -> None:
        """Promise 12: no fault to retry each quarter of an hour, and not for ever; other streams go on."""
        self.connect("alice")
        self.fault(status=code, times=1)

        run = self.synced()
        off = [row for row in rows(self.live, models.Stream.__table__, "alice") if row.off_reason]
        self.sandbox.step(QUARTER)
        quiet = self.synced()
        self.sandbox.step(DAY)
        self.imported()

        assert run.outcome == ("ok" if len(self.streams) > 1 else "deferred")
        assert [row.name for row in off] == [self.streams[0].name]
        assert str(code) in off[0].off_reason
        assert off[0].off_reason in (run.message or "")
        assert quiet.message == run.message
        assert self.stored() == self.truth()

    def test_a_scope_that_was_not_granted_costs_its_streams_only(self) -> None:
        """Nothing is asked for in vain; granted later, it is read."""
        for scope in self.provider.scopes:
            forget(self.live, "alice", connection_too=True)
            self.connect("alice", scopes=[scope])
            before = len(self.asked())
            readable = {stream.name for stream in self.streams if not stream.scopes or scope in stream.scopes}

            run = self.synced()

            missing = {stream.name for stream in self.streams} - readable
            assert all(f"{name}: not granted" in (run.message or "") for name in missing)
            assert {row.stream for row in self.records()} == readable
            assert {entry["status"] for entry in self.asked()[before:]} <= {200}
            states = {row.name: row.off_reason for row in rows(self.live, models.Stream.__table__, "alice")}
            assert {name for name, reason in states.items() if reason} == missing
        self.connect("alice")
        self.sandbox.step(QUARTER)

        self.imported()

        assert self.stored() == self.truth()

    # Tokens

    def test_an_access_token_that_ends_is_renewed_and_the_sync_goes_on(self) -> None:
        """Known by its time, or by a 401 that nobody expected."""
        self.connect("alice")
        self.synced()
        self.sandbox.step(10 * DAY)
        by_time = self.synced()
        self.sandbox.expire("alice", provider=self.provider.name)
        by_answer = self.synced()

        assert (by_time.outcome, by_answer.outcome) == ("ok", "ok")
        assert self.sandbox.summary()["refresh_tokens_used_twice"] == 0
        assert {entry["status"] for entry in self.sandbox.ledger(provider=self.provider.name)} == {200, 401}

    def test_tokens_that_last_a_minute_and_a_half_do(self) -> None:
        self.sandbox.settings(self.provider.name, access_token_seconds=90)
        self.connect("alice")
        for _ in range(3):
            self.sandbox.step(QUARTER)
            assert self.synced().outcome == "ok"
        self.imported()

        assert self.stored() == self.truth()
        assert {entry["status"] for entry in self.asked()} == {200}

    def test_a_token_that_is_refused_though_new_is_trouble_and_no_end(self) -> None:
        """A cloud out of order must not ask a thousand people to sign in again."""
        self.connect("alice")
        for listed in self.lists.values():
            self.fault(match=listed.route, status=401)

        run = self.synced()

        assert run.outcome == "failed"
        assert connection(self.live, "alice").status == "active"

    def test_an_authorisation_that_was_taken_back_is_over(self) -> None:
        """Promise 5: polling stops, the data stays; whoever signs in again goes on where it was."""
        self.connect("alice")
        self.imported()
        before = self.stored()
        self.sandbox.revoke("alice", provider=self.provider.name)
        self.sandbox.step(QUARTER)

        (run,) = ticked(self.live, "alice")
        asked = len(self.asked())
        self.sandbox.step(QUARTER)
        silent = ticked(self.live, "alice")

        assert (run.outcome, connection(self.live, "alice").status) == ("needs_reauth", "needs_reauth")
        assert (silent, len(self.asked())) == ([], asked)
        assert self.stored() == before
        self.connect("alice")
        self.imported()
        assert self.stored() == self.truth()

    def test_a_person_connects_on_the_providers_page(self) -> None:
        """The whole code grant: state, redirect address, scopes, whose account it is."""
        shown: Queue[str] = Queue()
        connecting = in_background(connect_account, self.live, "zoe", self.provider.name, shown.put)
        requests.get(f"{shown.get(timeout=20)}&person=alice", timeout=20)

        assert connecting.result(20) == (True, [])
        row = connection(self.live, "zoe")
        (known,) = self.sandbox.connect("alice", provider=self.provider.name, client_id="referee")
        assert row.provider_user_id == known["provider_user_id"]
        assert set(row.scopes) >= set(self.provider.scopes)
        assert self.synced("zoe").counts.inserted > 0

    # Where people live

    @pytest.mark.parametrize(
        ("person", "now"),
        [
            ("tala", "2026-11-24T10:55:00Z"),  # UTC-11, before midnight
            ("tala", "2026-11-24T11:05:00Z"),  # and after it
            ("uma", "2026-11-24T09:55:00Z"),  # UTC+14, before midnight
            ("uma", "2026-11-24T10:05:00Z"),
            ("alice", "2026-10-25T00:30:00Z"),  # Berlin: the hour between two and three, for the first time
            pytest.param("alice", "2026-10-25T01:30:00Z", marks=pytest.mark.slow),  # and for the second
            pytest.param("alice", "2026-11-24T23:59:00Z", marks=pytest.mark.slow),
            pytest.param("alice", "2026-11-25T00:01:00Z", marks=pytest.mark.slow),
        ],
    )
    def test_whatever_the_clock_says_where_somebody_is(self, person: str, now: str) -> None:
        """From UTC-11 to UTC+14, on both sides of midnight there and in UTC; over a change of the clocks."""
        self.sandbox.freeze(now)
        zone = self.zone_of(person)
        self.connect(person)

        self.imported(person)

        assert self.stored(person) == self.truth(person)
        for row in self.records(person):
            if row.start_at is not None and row.utc_offset_s is not None:
                assert row.start_at.astimezone(zone).utcoffset() == timedelta(seconds=row.utc_offset_s)
            if row.kind == "activity" and row.local_date:
                assert row.local_date == row.start_at.astimezone(zone).date()
            if row.kind == "day":
                assert (row.start_at, row.utc_offset_s) == (None, None)
                assert row.ordered_at == datetime.combine(row.local_date, datetime.min.time(), UTC)
                assert row.local_date <= datetime.fromtimestamp(self.sandbox.now(), zone).date()

    def test_a_day_that_grows_is_read_again(self) -> None:
        """What a civil day says changes until it ends, and some hours longer."""
        if not any(stream.kind == "day" for stream in self.streams):
            pytest.skip("it has no days")
        self.sandbox.freeze("2026-11-24T09:00:00Z")
        self.connect("alice")
        self.imported()
        before = {(row.stream, row.external_id): row.raw for row in self.records()}
        self.sandbox.step(8 * HOUR)

        run = self.synced()

        assert run.counts.updated > 0
        assert self.stored() == self.truth()
        changed = [
            row for row in self.records()
            if before.get((row.stream, row.external_id), row.raw) != row.raw
        ]  # fmt: skip
        assert len(changed) == run.counts.updated

    def test_an_item_dated_in_the_future_hides_nothing(self) -> None:
        """A watch with a wrong date must not push a cursor past now."""
        self.connect("alice")
        self.imported()
        if any(stream.kind == "activity" for stream in self.streams):
            for start in (NOON + timedelta(days=1), NOON - timedelta(hours=2)):
                self.sandbox.add("alice", start=start, uploaded=NOON, provider=self.provider.name)
                self.synced()
        self.sandbox.step(QUARTER)

        self.synced()

        assert self.stored() == self.truth()

    def zone_of(self, person: str) -> ZoneInfo:
        (found,) = [each for each in self.sandbox.people() if each["user_id"] == person]
        return ZoneInfo(found["timezone"])

    # Hostile items

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_whatever_is_changed_in_an_item_it_is_a_record_or_a_bad_one(self, data: st.DataObject) -> None:
        """`record` raises nothing but `BadRecord`, and agrees with `external_id`."""
        stream = data.draw(st.sampled_from(self.streams))
        item = copy.deepcopy(data.draw(st.sampled_from(self.samples()[stream.name])))
        for _ in range(data.draw(st.integers(0, 3))):
            item = mutated(item, data)
        before = copy.deepcopy(item)

        check(self.provider, stream, item)

        assert item == before, "an item must come to the store as it was sent"

    @given(item=st.deferred(lambda: ANYTHING), data=st.data())
    def test_any_json_is_a_record_or_a_bad_one(self, item: Any, data: st.DataObject) -> None:
        check(self.provider, data.draw(st.sampled_from(self.streams)), item)

    _samples: ClassVar[dict[str, dict[str, list[Any]]]] = {}

    def samples(self) -> dict[str, list[Any]]:
        """Some real items of each stream, asked for once."""
        name = type(self).__qualname__ + type(self).__module__
        if name not in self._samples:
            self._samples[name] = {
                stream.name: [each["item"] for each in self.items(stream.name)[:6]] for stream in self.streams
            }
        return self._samples[name]


# Helpers ----------------------------------------------------------------------------------------------


def in_order(items: Iterable[Any]) -> list[Any]:
    return sorted(items, key=lambda item: json.dumps(item, sort_keys=True))


def forget(live: Runtime, user_id: str, *, connection_too: bool = False) -> None:
    """As if nothing had ever been read of a user."""
    with live.store.write() as db:
        mine = models.Connection.user_id == user_id
        ids = [row.id for row in db.execute(models.Connection.__table__.select().where(mine))]
        for table in (models.Record, models.Stream, models.Quarantined, models.SyncRun):
            db.execute(table.__table__.delete().where(table.connection_id.in_(ids)))
        if connection_too:
            db.execute(models.Connection.__table__.delete().where(mine))
    if not connection_too:
        change(live, user_id, next_sync_at=live.clock(), failures=0, last_sync_at=None)


TEXTS = st.text(st.characters(codec=None), max_size=20)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
ODD = st.one_of(
    ANYTHING,
    st.sampled_from(
        [0, -1, -0.0, 1e-320, 1e308, float("inf"), 2**31, 2**63, -(2**63), 10**400, 253402300800]
    ),
    st.sampled_from(["", "7", "-1", "9" * 400, "1e5", "\x00", "\ud800", "x" * 10_000, "[" * 1000]),
    st.sampled_from(
        [
            "0001-01-01T00:00:00+05:00",
            "9999-12-31T23:59:59-12:00",
            "2026-11-24",
            "2026-13-45",
            "2026-W48-2T12:00Z",
            "-99999999999s",
        ]
    ),
)


def mutated(item: Any, data: st.DataObject) -> Any:
    """An item in which one value, at any depth, is gone or something else."""
    if not isinstance(item, dict | list) or not item or data.draw(st.integers(0, 3)) == 0:
        return data.draw(ODD)
    key = data.draw(st.sampled_from(sorted(item) if isinstance(item, dict) else list(range(len(item)))))
    if data.draw(st.integers(0, 4)) == 0:
        del item[key]
    else:
        item[key] = mutated(item[key], data)
    return item


def check(provider: Provider, stream: Stream, item: Any) -> Record | None:
    """The record of an item if it is one; what must hold of it does."""
    key = provider.external_id(stream, item)
    assert key is None or (0 < len(key) <= 255 and key.isprintable())
    reason = None
    try:
        record = provider.record(stream, item)
    except BadRecord as bad:
        reason = str(bad)
    if reason is not None:
        assert 0 < len(reason) < 300
        assert reason.isprintable()
        return None
    assert record.external_id == key
    assert record.kind == stream.kind
    assert record.ordered_at.utcoffset() == timedelta(0)
    assert 1970 < record.ordered_at.year < 3000
    assert record.end_at is None or record.start_at is None or record.end_at >= record.start_at
    for each in dataclasses.fields(record):
        value = getattr(record, each.name)
        if isinstance(value, str):
            value.encode()  # no lone surrogate, which no database takes
            assert len(value) <= 500
            assert "\x00" not in value
        elif isinstance(value, datetime):
            assert value.utcoffset() == timedelta(0), each.name
        elif isinstance(value, float):
            assert math.isfinite(value), each.name
        elif isinstance(value, int) and not isinstance(value, bool):
            assert -(2**31) <= value < 2**31, each.name
        else:
            assert value is None or isinstance(value, bool | date), each.name
    return record
