"""Promise 7 at its source: whatever Strava sends is a record, or a `BadRecord`, and nothing else."""

from __future__ import annotations

import contextlib
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lifelogger.errors import BadRecord, Unavailable
from lifelogger.providers.base import Record, Window
from lifelogger.providers.strava import Strava

STRAVA = Strava()
ACTIVITIES = STRAVA.streams[0]
NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)

# Of the API reference, `SummaryActivity`.
REAL: dict[str, Any] = {
    "resource_state": 2,
    "athlete": {"id": 134815, "resource_state": 1},
    "name": "Happy Friday",
    "distance": 24931.4,
    "moving_time": 4500,
    "elapsed_time": 4500,
    "total_elevation_gain": 0,
    "type": "Ride",
    "sport_type": "MountainBikeRide",
    "workout_type": None,
    "id": 154504250376823,
    "external_id": "garmin_push_12345678987654321",
    "upload_id": 987654321234567891234,
    "start_date": "2018-05-02T12:15:09Z",
    "start_date_local": "2018-05-02T05:15:09Z",
    "timezone": "(GMT-08:00) America/Los_Angeles",
    "utc_offset": -25200,
    "start_latlng": None,
    "location_city": None,
    "kudos_count": 3,
    "trainer": True,
    "map": {"id": "a12345678987654321", "summary_polyline": None, "resource_state": 2},
    "gear_id": "b12345678987654321",
    "average_speed": 5.54,
    "max_speed": 11,
    "average_cadence": 67.1,
    "kilojoules": 788.7,
    "device_watts": True,
    "has_heartrate": True,
    "average_heartrate": 140.3,
    "max_heartrate": 178,
}
READ = [
    "id",
    "start_date",
    "sport_type",
    "type",
    "elapsed_time",
    "moving_time",
    "utc_offset",
    "kilojoules",
    "distance",
    "total_elevation_gain",
    "average_heartrate",
    "max_heartrate",
    "name",
]
"""The fields that `record` looks at: the rest cannot hurt it."""

texts = st.text(st.characters(codec=None), max_size=30)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=15,
)
odd_values = (
    anything
    | st.sampled_from(
        [0, -1, -0.0, 1e-320, 1e308, float("inf"), 2**63, -(2**63), 10**400, 253402300799, 253402300800]
    )
    | st.sampled_from(
        ["0001-01-01T00:00:00+05:00", "2026-W48-2T12:00Z", "9999-12-31T23:59:59-12:00", "20261124"]
    )
    | st.datetimes(max_value=NOW.replace(tzinfo=None, year=9000)).map(lambda moment: f"{moment.isoformat()}Z")
    | st.sampled_from(["\x00", "\ud800", "x" * 10_000, "[" * 1000])
)


def check(item: Any) -> Record | None:
    """The record of an item if it has one; what must hold of it does."""
    key = STRAVA.external_id(ACTIVITIES, item)
    reason = ""
    try:
        record = STRAVA.record(ACTIVITIES, item)
    except BadRecord as bad:
        reason = str(bad)
    if reason:
        assert len(reason) < 200
        assert reason.isprintable()
        return None
    assert record.external_id == key == str(item["id"])
    assert record.ordered_at.utcoffset() == timedelta(0)
    assert record.ordered_at.year > 1970
    assert record.end_at is None or record.end_at >= record.ordered_at
    for text in (record.title, record.type, record.provider_type):
        assert text is None or (len(text) <= 500 and "\x00" not in text)
        (text or "").encode()  # no lone surrogate, which no database takes
    assert "\\u0000" not in json.dumps([record.title, record.provider_type])
    return record


@given(field=st.sampled_from(sorted(set(REAL) - set(READ))), value=anything)
def test_fields_that_we_do_not_read_cannot_hurt(field: str, value: Any) -> None:
    assert check({**REAL, field: value}) == check(REAL)


@given(gone=st.sets(st.sampled_from([field for field in READ if field not in ("id", "start_date")])))
def test_only_the_key_and_the_start_are_needed(gone: set[str]) -> None:
    record = check({key: value for key, value in REAL.items() if key not in gone})

    assert record is not None
    assert record.title == (None if "name" in gone else "Happy Friday")


class Replies:
    """Answers each request with the next reply, then with an empty list."""

    def __init__(self, replies: list[Any]) -> None:
        self.replies = iter(replies)

    def get(self, path: str, **params: Any) -> Any:
        return next(self.replies, [])

    def post(self, path: str, body: Any) -> Any:
        raise AssertionError("the list is read with GET")


items = odd_values | odd_values.map(lambda value: {**REAL, "start_date": value})


@settings(deadline=None)
@given(replies=st.lists(st.lists(items, max_size=4) | anything, max_size=4))
@example(replies=[[{**REAL, "start_date": "2018-05-02T12:15:09Z"}, None, "x"], [[]]])
def test_a_walk_over_any_replies_ends_and_says_how_far_it_got(replies: list[Any]) -> None:
    window = Window(NOW - timedelta(days=7), expect=0)
    pages = []

    with contextlib.suppress(Unavailable):  # "is not a list"
        pages += STRAVA.pages(Replies(replies), ACTIVITIES, window)
        assert pages[-1].reached is not None
        assert pages[-1].reached <= window.since

    reached = [page.reached for page in pages if page.reached is not None]
    assert reached == sorted(reached, reverse=True)


@given(reply=anything | st.dictionaries(st.sampled_from(["errors", "error", "athlete"]), anything))
def test_any_refusal_of_a_refresh_can_be_read(reply: Any) -> None:
    assert STRAVA.grant_is_dead(400, reply) in (True, False)


@given(
    changes=st.dictionaries(
        st.sampled_from(["access_token", "refresh_token", "expires_in", "scope", "athlete"]), anything
    )
)
def test_any_token_reply_is_a_grant_or_not_one(changes: dict[str, Any]) -> None:
    reply = {"access_token": "a", "refresh_token": "r", "expires_at": 1900000000, "athlete": {"id": 1}}

    try:
        grant = STRAVA.grant({**reply, **changes}, NOW)
    except Unavailable:
        return
    assert grant.expires_at == datetime.fromtimestamp(1900000000, UTC)
    assert grant.access_token == changes.get("access_token", "a")


@pytest.mark.parametrize("replies", [None, [], 5, "token", {"access_token": "a"}, {"access_token": ""}])
def test_what_is_no_token_reply_leaves_the_old_tokens(replies: Any) -> None:
    with pytest.raises(Unavailable):
        STRAVA.grant(replies, NOW)


@given(
    headers=st.dictionaries(
        st.sampled_from(
            [f"X-{prefix}RateLimit-{what}" for prefix in ("", "Read") for what in ("Limit", "Usage")]
            + ["Retry-After"]
        ),
        st.text(st.characters(codec="latin-1"), max_size=20)
        | st.sampled_from(["100,1000", "-1,5", "1,2,3", ","]),
    )
)
def test_any_headers_can_be_read(headers: dict[str, str]) -> None:
    for usage in STRAVA.usage(headers).values():
        assert min(usage.limits + usage.used) >= 0
    STRAVA.retry_at(headers, NOW)


# Extremes --------------------------------------------------------------------------------------------------

LAST = {**REAL, "start_date": "9999-12-31T23:59:59Z", "elapsed_time": None, "utc_offset": None}
DEEP: list[Any] = []
for _ in range(3000):  # deeper than `json` writes
    DEEP = [DEEP]


@pytest.mark.parametrize("change", [{"elapsed_time": 60}, {"utc_offset": 3600}])
def test_an_activity_at_the_end_of_time(change: dict[str, Any]) -> None:
    """Whatever is added to its start lies beyond what a date can be."""
    check({**LAST, **change})


def test_a_walk_over_an_activity_at_the_end_of_time() -> None:
    pages = list(STRAVA.pages(Replies([[LAST]]), ACTIVITIES, Window(NOW)))

    assert pages[-1].end


# Known faults, reported: who mends one deletes its mark.


@pytest.mark.parametrize("field", ["id", "start_date", "name", "distance"])
def test_a_value_that_is_nested_deeply(field: str) -> None:
    check({**REAL, field: DEEP})


def test_a_grant_for_ever() -> None:
    with pytest.raises(Unavailable):
        STRAVA.grant({"access_token": "a", "refresh_token": "r", "expires_in": 10**18}, NOW)


def test_a_header_of_many_digits() -> None:
    assert STRAVA.usage({"X-RateLimit-Limit": "1" * 5000 + ",2", "X-RateLimit-Usage": "1,2"}) == {}
