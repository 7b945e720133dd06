"""What is Oura's own: spans of days read to their last token, and documents of a day or a night."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from typing import Any
from urllib.parse import urlencode

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lifelogger.errors import BadRecord, Refused, Unavailable
from lifelogger.providers import oura
from lifelogger.providers.base import MOST_REPLIES, Record, Window
from lifelogger.providers.oura import MARGIN, SERIES_SPAN, SPAN, Oura
from tests.providers.contract import NOVEL, Contract, Listed
from tests.sandbox.control import Control
from tests.sandbox.openapi import SPEC

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
OURA = Oura()
STREAMS = {stream.name: stream for stream in OURA.streams if not stream.optional}
HEART = next(stream for stream in OURA.streams if stream.optional)
every = pytest.mark.parametrize("name", STREAMS)

NIGHT: dict[str, Any] = {
    "id": "8f9a5221-639e-4a85-81cb-4065ef23f979",
    "average_breath": 12.625,
    "average_heart_rate": 4.25,
    "average_hrv": 117,
    "awake_time": 4800,
    "bedtime_end": "2026-10-25T08:30:00.000+01:00",
    "bedtime_start": "2026-10-24T23:30:00.000+02:00",
    "day": "2026-10-25",
    "deep_sleep_duration": 4170,
    "light_sleep_duration": 10140,
    "low_battery_alert": False,
    "lowest_heart_rate": 48,
    "period": 0,
    "rem_sleep_duration": 16890,
    "time_in_bed": 36000,
    "total_sleep_duration": 31200,
    "type": "long_sleep",
}
WORKOUT: dict[str, Any] = {
    "id": "w1",
    "activity": "cycling",
    "calories": 300.5,
    "day": "2026-11-23",
    "distance": 13500.5,
    "end_datetime": "2026-11-24T00:30:00.000-11:00",
    "intensity": "moderate",
    "label": None,
    "source": "manual",
    "start_datetime": "2026-11-23T23:30:00.000-11:00",
}
SESSION: dict[str, Any] = {
    "id": "s1",
    "day": "2026-11-24",
    "end_datetime": "2026-11-24T21:10:00+14:00",
    "start_datetime": "2026-11-24T21:00:00+14:00",
    "type": "meditation",
}
ACTIVITY: dict[str, Any] = {
    "id": "a1",
    "day": "2026-11-24",
    "score": 82,
    "steps": 3342,
    "active_calories": 222,
    "total_calories": 2500,
    "equivalent_walking_distance": 3806,
    "timestamp": "2026-11-24T04:00:00-08:00",
}
SATURATION: dict[str, Any] = {"id": "o1", "day": "2026-11-24", "spo2_percentage": {"average": 97.5}}
SCORE: dict[str, Any] = {"id": "r1", "day": "2026-11-24", "score": 77, "contributors": {}}
DOCUMENTS = {
    "daily_activity": ACTIVITY,
    "daily_readiness": SCORE,
    "daily_sleep": SCORE,
    "daily_spo2": SATURATION,
    "sleep": NIGHT,
    "workout": WORKOUT,
    "session": SESSION,
}


class Cloud:
    """Collections as documented: inclusive days, so many documents a page, and a token for the next."""

    def __init__(self, *items: dict[str, Any], size: int = 1000) -> None:
        self.items, self.size = items, size
        self.asked: list[dict[str, Any]] = []

    def get(self, path: str, **params: Any) -> Any:
        assert (
            SPEC.refuses("GET", f"{path}?{'&'.join(f'{key}={value}' for key, value in params.items())}")
            is None
        )
        self.asked.append(params)
        found = [one for one in self.items if params["start_date"] <= one["day"] <= params["end_date"]]
        begin = int(params.get("next_token", 0))
        more = begin + self.size < len(found)
        return {
            "data": found[begin : begin + self.size],
            "next_token": str(begin + self.size) if more else None,
        }

    def post(self, path: str, body: Any) -> Any:
        raise AssertionError("collections are read with GET")


def read(name: str, window: Window, *items: dict[str, Any], **of: Any) -> tuple[list[Any], list[Any]]:
    """The pages of a window, and what was asked for them."""
    cloud = Cloud(*items, **of)
    return list(OURA.pages(cloud, STREAMS[name], window)), cloud.asked


def on(*days: date | str) -> list[dict[str, Any]]:
    return [{**SCORE, "id": f"{day}", "day": f"{day}"} for day in days]


class Settings:
    suffix = ""
    client_id, authorize_url = "id", "https://cloud.ouraring.com/oauth/authorize"
    budget, overall_budget, user_budget = ("5000/5 minutes",), (), ()
    extra_streams: tuple[str, ...] = ()


WEEK = Window(NOW - timedelta(days=7), now=NOW)


SAMPLE: dict[str, Any] = {
    "timestamp": "2026-11-24T11:55:00.000Z",
    "timestamp_unix": 1795521300000,
    "bpm": 61,
    "source": "awake",
}


# Pages -----------------------------------------------------------------------------------------------


@every
def test_a_poll_is_one_request_for_days_through_tomorrow_wherever_the_person_is(name: str) -> None:
    """In UTC+14 it may be the 25th by now, and tomorrow the 26th."""
    pages, asked = read(name, WEEK)

    assert asked == [{"start_date": "2026-11-15", "end_date": "2026-11-26"}]
    assert [page.reached for page in pages] == [WEEK.since]


def test_a_span_is_one_page_however_many_tokens_it_takes() -> None:
    items = on(*(f"2026-11-{day:02}" for day in range(16, 25)))

    pages, asked = read("daily_sleep", WEEK, *items, size=2)

    assert [page.items for page in pages] == [items]
    assert [query.get("next_token") for query in asked] == [None, "2", "4", "6", "8"]
    assert {(query["start_date"], query["end_date"]) for query in asked} == {("2026-11-15", "2026-11-26")}


def test_history_is_read_backwards_without_a_gap() -> None:
    since = NOW - 3.5 * SPAN
    items = on(*((NOW - timedelta(days=age)).date() for age in range(320)))

    pages, asked = read("daily_sleep", Window(since, until=NOW), *items)

    assert [page.reached for page in pages] == [NOW - SPAN, NOW - 2 * SPAN, NOW - 3 * SPAN, since]
    lower = NOW
    for page, query in zip(pages, asked, strict=True):
        assert query["end_date"] == (lower + MARGIN).date().isoformat()
        shown = {item["day"] for item in page.items}
        inside = {
            item["day"]
            for item in items
            if page.reached <= OURA.record(STREAMS["daily_sleep"], item).ordered_at < lower
        }
        assert inside <= shown
        lower = page.reached


@settings(max_examples=300)
@given(
    since=st.integers(0, 60 * 24 * 7),
    into=st.integers(0, 60 * 24 * 3),
    more=st.integers(1, 60 * 24 * 3),
    zone=st.integers(-12 * 4, 14 * 4),
    length=st.integers(0, 16 * 60),
)
def test_whatever_lies_in_a_window_is_in_the_days_that_are_asked_for(
    since: int, into: int, more: int, zone: int, length: int
) -> None:
    """In all zones, and for whichever day Oura may count a night, a late nap or a workout to."""
    begin = NOW + timedelta(minutes=since)
    begun = begin + timedelta(minutes=into)
    window = Window(begin, until=begun + timedelta(minutes=more))
    local = begun + timedelta(minutes=15 * zone)
    woken = local + timedelta(minutes=length)
    night = woken.date() + timedelta(days=woken.hour >= 18) if length < 180 else woken.date()
    workout = (local - timedelta(hours=4)).date()

    _, asked = read("sleep", window)

    for day in (night, workout, local.date()):
        assert any(query["start_date"] <= day.isoformat() <= query["end_date"] for query in asked)


def test_a_deleted_sleep_is_left_out() -> None:
    nights = [{**NIGHT, "id": kind, "type": kind} for kind in ("long_sleep", "deleted", "rest")]

    (page,), _ = read(
        "sleep", Window(datetime(2026, 10, 24, tzinfo=UTC), now=datetime(2026, 10, 26, tzinfo=UTC)), *nights
    )

    assert [item["id"] for item in page.items] == ["long_sleep", "rest"]


@pytest.mark.parametrize(
    "reply", [[], None, "", {}, {"data": None, "next_token": None}, {"data": [], "next_token": 7}]
)
def test_what_is_no_page_is_trouble_that_may_pass(reply: Any) -> None:
    class Odd(Cloud):
        def get(self, path: str, **params: Any) -> Any:
            return reply

    with pytest.raises(Unavailable, match="not a list"):
        list(OURA.pages(Odd(), STREAMS["sleep"], WEEK))


def test_a_window_without_an_end_needs_to_know_the_time() -> None:
    with pytest.raises(ValueError, match="an end, or a now"):
        read("sleep", Window(NOW - timedelta(days=7)))


def test_a_collection_without_end_is_given_up() -> None:
    class Endless(Cloud):
        def get(self, path: str, **params: Any) -> Any:
            self.asked.append(params)
            return {"data": [], "next_token": "again"}

    cloud = Endless()
    with pytest.raises(Unavailable, match="does not end"):
        list(OURA.pages(cloud, STREAMS["sleep"], WEEK))
    assert len(cloud.asked) == MOST_REPLIES


def test_a_poll_costs_one_request_for_each_collection() -> None:
    """And one more for each that the settings add."""

    class More(Settings):
        extra_streams = ("heartrate",)

    assert OURA.poll_cost(Settings()) == len(STREAMS) == 7
    assert OURA.poll_cost(More()) == 8
    assert all(SPEC.operation("GET", f"/v2/usercollection/{name}") for name in STREAMS)


# Records ---------------------------------------------------------------------------------------------


def told(record: Record) -> dict[str, Any]:
    """What a record says."""
    fields = {name: getattr(record, name) for name in record.__dataclass_fields__}
    return {name: value for name, value in fields.items() if value is not None}


def test_a_night_over_the_end_of_summer_time() -> None:
    assert told(OURA.record(STREAMS["sleep"], NIGHT)) == {
        "external_id": NIGHT["id"],
        "kind": "sleep",
        "ordered_at": datetime(2026, 10, 24, 21, 30, tzinfo=UTC),
        "start_at": datetime(2026, 10, 24, 21, 30, tzinfo=UTC),
        "end_at": datetime(2026, 10, 25, 7, 30, tzinfo=UTC),
        "utc_offset_s": 7200,
        "local_date": date(2026, 10, 25),
        "provider_type": "long_sleep",
        "is_main_sleep": True,
        "duration_s": 36000,
        "asleep_s": 31200,
        "awake_s": 4800,
        "light_sleep_s": 10140,
        "deep_sleep_s": 4170,
        "rem_sleep_s": 16890,
        "heart_rate_avg_bpm": 4.25,
        "heart_rate_min_bpm": 48,
        "hrv_rmssd_ms": 117,
        "breaths_per_min": 12.625,
    }


@pytest.mark.parametrize(
    ("kind", "main"),
    [
        ("long_sleep", True),
        ("sleep", False),
        ("late_nap", False),
        ("rest", None),
        ("new", None),
        (None, None),
    ],
)
def test_main_sleep_or_nap(kind: str | None, main: bool | None) -> None:
    record = OURA.record(STREAMS["sleep"], {**NIGHT, "type": kind})

    assert (record.is_main_sleep, record.provider_type) == (main, kind)


def test_a_workout_and_a_session() -> None:
    workout = OURA.record(STREAMS["workout"], WORKOUT)
    session = OURA.record(STREAMS["session"], SESSION)

    assert told(workout) == {
        "external_id": "w1",
        "kind": "activity",
        "ordered_at": datetime(2026, 11, 24, 10, 30, tzinfo=UTC),
        "start_at": datetime(2026, 11, 24, 10, 30, tzinfo=UTC),
        "end_at": datetime(2026, 11, 24, 11, 30, tzinfo=UTC),
        "utc_offset_s": -39600,
        "local_date": date(2026, 11, 23),
        "type": "cycling",
        "provider_type": "cycling",
        "duration_s": 3600,
        "distance_m": 13500.5,
        "energy_j": 300.5 * 4184,
    }
    assert (session.type, session.provider_type, session.duration_s) == ("meditation", "meditation", 600)
    assert session.start_at == datetime(2026, 11, 24, 7, tzinfo=UTC)
    assert session.energy_j is None


def test_a_word_that_is_not_known_stays_beside_ours() -> None:
    record = OURA.record(STREAMS["workout"], {**WORKOUT, "activity": "quidditch", "label": "Cup\x00 final"})

    assert (record.type, record.provider_type, record.title) == ("other", "quidditch", "Cup final")


def test_days_have_a_date_and_no_instant() -> None:
    """Nor a distance: an equivalent of the energy was not walked."""
    activity = OURA.record(STREAMS["daily_activity"], ACTIVITY)
    score = OURA.record(STREAMS["daily_readiness"], SCORE)
    saturation = OURA.record(STREAMS["daily_spo2"], SATURATION)
    unmeasured = OURA.record(STREAMS["daily_spo2"], {**SATURATION, "spo2_percentage": None})

    day = {"kind": "day", "ordered_at": datetime(2026, 11, 24, tzinfo=UTC), "local_date": date(2026, 11, 24)}
    assert told(activity) == {
        **day,
        "external_id": "a1",
        "steps": 3342,
        "energy_j": 2500 * 4184,
        "active_energy_j": 222 * 4184,
        "score_pct": 82,
    }
    assert told(score) == {**day, "external_id": "r1", "score_pct": 77}
    assert told(saturation) == {**day, "external_id": "o1", "spo2_avg_pct": 97.5}
    assert told(unmeasured) == {**day, "external_id": "o1"}


def test_a_time_in_utc_tells_no_offset() -> None:
    item = {**SESSION, "start_datetime": "2026-11-24T21:00:00Z", "end_datetime": "2026-11-24T21:10:00Z"}

    assert OURA.record(STREAMS["session"], item).utc_offset_s is None


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        *((name, {"id": odd}) for name in STREAMS for odd in (None, "", 7, "a b", "x" * 201, "\ud800")),
        *(
            (name, {"day": odd})
            for name in STREAMS
            for odd in (None, 7, "20261124", "2026-02-30", "2026-W48-2")
        ),
        ("daily_activity", {"steps": 2**31}),
        ("daily_activity", {"steps": -1}),
        ("daily_activity", {"total_calories": "many"}),
        ("daily_spo2", {"spo2_percentage": 97}),
        ("sleep", {"bedtime_start": "2026-10-24T23:30:00"}),
        ("sleep", {"bedtime_start": "2026-10-26T23:30:00+02:00"}),
        ("sleep", {"type": ["long_sleep"]}),
        ("workout", {"end_datetime": None}),
        ("workout", {"distance": 1e300}),
        ("session", {"start_datetime": "0001-01-01T00:00:00+00:00"}),
    ],
)
def test_what_cannot_be_is_a_bad_record_and_nothing_else(name: str, fault: dict[str, Any]) -> None:
    with pytest.raises(BadRecord):
        OURA.record(STREAMS[name], DOCUMENTS[name] | fault)


# Heart rate, which is an option ----------------------------------------------------------------------


def test_heart_rate_is_asked_for_by_instants() -> None:
    class Series(Cloud):
        def get(self, path: str, **params: Any) -> Any:
            assert SPEC.refuses("GET", f"{path}?{urlencode(params)}") is None
            self.asked.append(params)
            return {"data": [SAMPLE]}

    cloud = Series()
    pages = list(OURA.pages(cloud, HEART, Window(NOW - 1.5 * SERIES_SPAN, now=NOW)))

    assert [page.reached for page in pages] == [NOW - SERIES_SPAN, NOW - 1.5 * SERIES_SPAN]
    assert cloud.asked[0] == {
        "start_datetime": "2026-10-25T11:59:59Z",
        "end_datetime": "2026-11-24T12:00:01Z",
    }


def test_a_sample_is_known_by_its_instant_and_source() -> None:
    assert told(OURA.record(HEART, SAMPLE)) == {
        "external_id": "2026-11-24T11:55:00+00:00/awake",
        "kind": "body",
        "ordered_at": datetime(2026, 11, 24, 11, 55, tzinfo=UTC),
        "start_at": datetime(2026, 11, 24, 11, 55, tzinfo=UTC),
        "provider_type": "awake",
        "heart_rate_avg_bpm": 61,
    }


@pytest.mark.parametrize(
    "fault", [{"timestamp": None}, {"bpm": "high"}, {"source": ["a", "b"]}, {"source": "\x00"}]
)
def test_a_sample_that_cannot_be(fault: dict[str, Any]) -> None:
    with pytest.raises(BadRecord):
        OURA.record(HEART, SAMPLE | fault)


texts = st.text(st.characters(codec=None), max_size=30)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=10,
)
odd_values = (
    anything
    | st.sampled_from([0, -1, 1e308, float("inf"), 2**31, 2**63, 10**400, "\x00", "\ud800", "x" * 10_000])
    | st.sampled_from(
        [
            "0001-01-01T00:00:00+05:00",
            "9999-12-31T23:59:59-12:00",
            "2026-11-24T00:00:00+23:59:59.5",
            "0000-01-01",
        ]
    )
    | st.datetimes().map(lambda moment: f"{moment.isoformat()}+14:00")
    | st.dates().map(date.isoformat)
)


@settings(max_examples=200, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(sorted(SAMPLE)), odd_values, max_size=3))
def test_any_sample_is_a_record_or_a_bad_one(changes: dict[str, Any]) -> None:
    with contextlib.suppress(BadRecord):
        record = OURA.record(HEART, SAMPLE | changes)
        assert record.external_id == OURA.external_id(HEART, SAMPLE | changes)
        json.dumps(record.provider_type, ensure_ascii=False).encode()


def check(name: str, item: Any) -> None:
    key = OURA.external_id(STREAMS[name], item)
    with contextlib.suppress(BadRecord):
        record = OURA.record(STREAMS[name], item)
        assert record.external_id == key
        assert record.ordered_at.utcoffset() == timedelta(0)
        assert record.local_date is not None
        assert record.steps is None or 0 <= record.steps < 2**31
        assert record.utc_offset_s is None or abs(record.utc_offset_s) < 86400
        assert record.end_at is None or record.start_at is None or record.end_at >= record.start_at
        json.dumps([record.title, record.type, record.provider_type], ensure_ascii=False).encode()


# Limits and grants -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "30", "X-RateLimit-Reset": "1"}, 30),
        ({"X-RateLimit-Reset": str(int(NOW.timestamp()) + 200)}, 200),
        ({"X-RateLimit-Reset": "1"}, 0),
        ({"X-RateLimit-Reset": "soon"}, None),
        ({"X-RateLimit-Reset": "9" * 30}, None),
        ({}, None),
    ],
)
def test_when_to_ask_again(headers: dict[str, str], seconds: int | None) -> None:
    assert OURA.retry_at(headers, NOW) == (None if seconds is None else NOW + timedelta(seconds=seconds))


def test_a_request_spends_from_the_tokens_limit_and_the_applications() -> None:
    """How large the former is, is not told: it has no window until the settings say so."""
    user, requests = OURA.pools(Settings(), 7)

    assert (user.key, user.limits) == ("oura:id:user:7", ())
    assert (requests.key, requests.limits) == ("oura:id:requests", ("5000/5 minutes",))
    assert OURA.shared_pools(Settings()) == OURA.pools(Settings(), 7, token=True) == (requests,)


@pytest.mark.parametrize(
    ("tier", "pools"),
    [
        ("token", ("user",)),
        ("per-access-token", ("user",)),
        ("ACCESS_TOKEN", ("user",)),
        ("application", ()),
        ("all tokens of the app", ()),
        ("2", ()),
        ("", ()),
        (None, ()),
    ],
)
def test_a_tier_named_like_the_tokens_layer_closes_that_one_and_any_other_word_all(
    tier: str | None, pools: tuple[str, ...]
) -> None:
    """The words are not documented, the layers' names are: "per-access-token", "per-application"."""
    headers = {"Retry-After": "30", "X-RateLimit-Limit": "60", "X-RateLimit-Window": "60"}

    assert OURA.spent_pools({**headers, **({"X-RateLimit-Tier": tier} if tier is not None else {})}) == pools


def test_a_403_is_told_in_words_and_other_refusals_as_they_are() -> None:
    assert "subscription has ended" in (OURA.refusal(403, {"detail": "no"}) or "")
    assert not OURA.refuses_account(403, {"detail": "no"})
    assert OURA.refusal(400, None) is None


@pytest.mark.parametrize(
    ("reply", "account"),
    [({"id": "8f9a-5221", "email": "a@b.example"}, "8f9a-5221"), ({"id": 7}, None), ([], None), (None, None)],
)
def test_whose_account_it_is(reply: Any, account: str | None) -> None:
    class Person(Cloud):
        def get(self, path: str, **params: Any) -> Any:
            assert SPEC.refuses("GET", path) is None
            return reply

    class Shut(Cloud):
        def get(self, path: str, **params: Any) -> Any:
            raise Refused("403")

    assert OURA.account(Person()) == account
    assert OURA.account(Shut()) is None


def test_a_grant_that_is_gone() -> None:
    assert OURA.grant_is_dead(400, {"error": "invalid_grant"})
    assert not OURA.grant_is_dead(401, {"error": "invalid_client"})


def test_what_we_ask_for_is_what_the_streams_need_and_the_document_has() -> None:
    flow = SPEC.document["components"]["securitySchemes"]["OAuth2"]["flows"]["authorizationCode"]

    assert {*OURA.scopes, *HEART.scopes} <= flow["scopes"].keys()
    assert all({*OURA.scopes} & {*stream.scopes} for stream in STREAMS.values())
    assert not {*OURA.scopes} & {*HEART.scopes}


# The contract ------------------------------------------------------------------------------------------


def listed(name: str, *, edit: Any, broken: Any, **novel: Any) -> Listed:
    return Listed(f"GET /{name}", edit=edit, broken=broken, novel={**NOVEL, **novel})


@pytest.mark.slow  # ten lists a sync: the engine is held to it by the others in `make test`
class TestContract(Contract):
    provider = OURA
    lists: Mapping[str, Listed] = {
        "daily_activity": listed("daily_activity", edit={"steps": 17}, broken={"steps": "many"}),
        "daily_readiness": listed("daily_readiness", edit={"score": 17}, broken={"score": "high"}),
        "daily_sleep": listed("daily_sleep", edit={"score": 17}, broken={"score": "high"}),
        "daily_spo2": listed(
            "daily_spo2", edit={"spo2_percentage": {"average": 17.5}}, broken={"spo2_percentage": 7}
        ),
        "sleep": listed("sleep", edit={"average_hrv": 17}, broken={"average_hrv": "high"}, type="dreams"),
        "workout": listed(
            "workout", edit={"label": "Renamed"}, broken={"calories": "many"}, activity="moonwalk"
        ),
        "session": listed(
            "session", edit={"mood": "bad"}, broken={"end_datetime": "later"}, type="levitation"
        ),
    }

    def small_pages(self, sandbox: Control, monkeypatch: pytest.MonkeyPatch) -> None:
        sandbox.settings(provider="oura", page_size=5)
        monkeypatch.setattr(oura, "SPAN", timedelta(days=10))
