"""The engine against a simulated Fitbit: what is imported, what a poll costs, what is read again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import date, timedelta
from typing import Any

import pytest
import requests

from lifelogger import sync
from lifelogger.providers.fitbit import Fitbit
from lifelogger.runtime import Runtime
from lifelogger.store.models import Record, Stream
from tests.live import connect as connect_any
from tests.live import rows, tuned
from tests.sandbox.control import Control

QUARTER = 900
RECONCILE = "GET /dataTypes/{type}/dataPoints:reconcile"
ROLL_UP = "POST /dataTypes/{type}/dataPoints:dailyRollUp"
ONCE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
"""For what no database has a part in."""

STREAMS = [stream.name for stream in Fitbit.streams]
ROLLED_UP = ("steps", "distance", "total-calories", "heart-rate")


def connect(live: Runtime, sandbox: Control, *people: str, **grant: Any) -> list[dict[str, Any]]:
    return connect_any(live, sandbox, *people, provider="fitbit", **grant)


def imported(live: Runtime, sandbox: Control, user_id: str) -> None:
    """Sync until the past is there; the sandbox knows some ninety days of it."""
    short = tuned(live, sync={"history_days": 120})
    for _ in range(5):
        (run,) = sync.run(user_id, runtime=short)
        assert run.outcome == "ok", run.message
        sandbox.step(QUARTER)
        if all(row.backlog_until is None for row in rows(live, Stream.__table__, user_id)):
            return
    raise AssertionError("the import does not end")


def told(sandbox: Control, token: str, name: str) -> list[Any]:
    """Every point of a data type, asked for in another way than we do: in the smallest spans there are."""
    url = f"{sandbox.url}/fitbit/v4/users/me/dataTypes/{name}/dataPoints"
    headers, found = {"Authorization": f"Bearer {token}"}, []
    if name not in ROLLED_UP:
        query = {}
        while True:
            reply = requests.get(url, query, headers=headers, timeout=20).json()
            found += reply.get("dataPoints", [])
            if "nextPageToken" not in reply:
                return found
            query = {"pageToken": reply["nextPageToken"]}
    day = date(2026, 8, 1)
    while day < date(2026, 11, 27):
        ends = [
            {"date": {"year": each.year, "month": each.month, "day": each.day}}
            for each in (day, day + timedelta(14))
        ]
        body: dict[str, Any] = {"range": {"start": ends[0], "end": ends[1]}, "pageSize": 9}
        while body:
            reply = requests.post(f"{url}:dailyRollUp", json=body, headers=headers, timeout=20).json()
            found += [point for point in reply.get("rollupDataPoints", []) if len(point) > 2]
            body = {**body, "pageToken": reply["nextPageToken"]} if "nextPageToken" in reply else {}
        day += timedelta(14)
    return found


def stored(live: Runtime, user_id: str, stream: str) -> list[Any]:
    """The payloads of a stream, in an order that does not matter."""
    table = Record.__table__
    there = [row for row in rows(live, table, user_id) if row.stream == stream and row.deleted_at is None]
    return in_order(row.raw for row in there)


def in_order(items: Iterator[Any] | list[Any]) -> list[Any]:
    return sorted(items, key=lambda item: json.dumps(item, sort_keys=True))


def records(live: Runtime, user_id: str, stream: str) -> list[Any]:
    found = [row for row in rows(live, Record.__table__, user_id) if row.stream == stream]
    return sorted(found, key=lambda row: row.ordered_at)


@pytest.mark.parametrize("order", ["descending", "ascending"])
def test_a_first_import_stores_exactly_what_is_there(live: Runtime, sandbox: Control, order: str) -> None:
    """Promise 6: every point of every type once, whatever the order in which Google lists them."""
    sandbox.settings("fitbit", order=order)
    (line,) = connect(live, sandbox, "alice")

    imported(live, sandbox, "alice")

    for name in STREAMS:
        assert stored(live, "alice", name) == in_order(told(sandbox, line["access_token"], name)), name
        assert stored(live, "alice", name), name
