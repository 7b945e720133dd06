"""Years of somebody's life at each provider: what is changed far back in them arrives within a round."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import pytest

from lifelogger import sync
from lifelogger.runtime import Runtime
from lifelogger.sandbox.server import Sandbox
from lifelogger.store.models import Record, Stream
from tests.conftest import world
from tests.live import NOON, begin_rounds, change, connect, rows, ticked, tuned
from tests.providers import test_fitbit, test_oura, test_strava
from tests.providers.contract import in_order
from tests.sandbox.control import Control

QUARTER = 900
LISTS: dict[str, Mapping[str, Any]] = {
    "strava": test_strava.TestContract.lists,
    "fitbit": test_fitbit.TestContract.lists,
    "oura": test_oura.TestContract.lists,
}


@pytest.fixture(scope="module")
def sandbox_server() -> Iterator[Sandbox]:
    with world(people=1, history_days=760) as server:
        yield server


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("provider", LISTS)
def test_edits_and_deletions_of_years_ago_arrive_within_a_round(
    live: Runtime, sandbox: Control, provider: str
) -> None:
    """Promise 6; at the documented cost: a poll's, and that of the first import once more."""
    live = tuned(live, sync={"history_days": 780})
    about = live.providers[provider]
    streams = [stream for stream in about.streams if not stream.optional]
    connect(live, sandbox, "alice", provider=provider)
    imported = until(live, sandbox, lambda row: row.cursor is not None and row.backlog_until is None)
    changed = {}
    for stream in streams:
        items = sandbox.items("alice", stream.name, provider=provider)
        old = [
            each["key"] for each in items
            if about.record(stream, each["item"]).ordered_at < NOON - timedelta(days=730)
        ]  # fmt: skip
        changed[stream.name] = old[:2]
        sandbox.change_item(
            "alice", stream.name, old[0], provider=provider, fields=LISTS[provider][stream.name].edit
        )
        sandbox.change_item("alice", stream.name, old[1], provider=provider, deleted=True)
    begin_rounds(live, "alice")

    runs = until(live, sandbox, lambda row: row.recheck_ended_at is not None)

    kept: dict[str, list[Any]] = {stream.name: [] for stream in streams}
    for row in rows(live, Record.__table__, "alice"):
        if row.deleted_at is None:
            kept[row.stream].append(row.raw)
    for stream in streams:
        there = [each["item"] for each in sandbox.items("alice", stream.name, provider=provider)]
        assert in_order(there) == in_order(kept[stream.name]), stream.name
    assert sum(run.counts.deleted for run in runs) == len(streams)
    cost = about.poll_cost(live.settings.providers[provider])
    spent, first = ([run.requests - cost for run in each] for each in (runs, imported))
    assert sum(spent) <= sum(first) + len(streams)


def until(live: Runtime, sandbox: Control, done: Any) -> list[sync.Run]:
    """Ticks until each stream is."""
    runs: list[sync.Run] = []
    while not runs or not all(map(done, rows(live, Stream.__table__, "alice"))):
        sandbox.step(QUARTER)
        change(live, "alice", next_sync_at=live.clock())
        runs += ticked(live, "alice")
        assert runs[-1].outcome == "ok", runs[-1].message
        assert len(runs) < 100
    return runs
