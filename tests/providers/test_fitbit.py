"""What is Fitbit's own: spans, filters, and how Google writes numbers, times and days."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import strategies as st

from lifelogger.errors import BadRecord, Unavailable
from lifelogger.providers import fitbit
from lifelogger.providers.base import MOST_REPLIES, Window
from lifelogger.providers.fitbit import SOURCES, TYPES, Fitbit
from tests.providers.contract import NOVEL, Contract, Listed
from tests.sandbox.control import Control
from tests.sandbox.google_health import spec

NOW = datetime(2026, 11, 24, 12, 30, 15, 250_000, tzinfo=UTC)
FITBIT = Fitbit()
STREAMS = {stream.name: stream for stream in FITBIT.streams}
SAMPLES = "heart-rate-samples"
POINTS = "/v4/users/me/dataTypes/{}/dataPoints:{}"


class Cloud:
    """Replies in turn, empty ones after them, and what was asked."""

    def __init__(self, *replies: Any) -> None:
        self.replies = list(replies)
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def get(self, path: str, **params: Any) -> Any:
        self.asked.append((path, params))
        return self.replies.pop(0) if self.replies else {}

    def post(self, path: str, body: Any) -> Any:
        return self.get(path, **body)


def walk(cloud: Cloud, name: str, window: Window) -> list[datetime | None]:
    return [page.reached for page in FITBIT.pages(cloud, STREAMS[name], window)]


def week(**more: Any) -> Window:
    return Window(NOW - timedelta(days=7), now=NOW, **more)


def day(year: int, month: int, number: int) -> dict[str, Any]:
    return {"date": {"year": year, "month": month, "day": number}}


# Asking -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in SOURCES if name != SAMPLES])
def test_a_poll_is_one_request_of_each_stream(name: str) -> None:
    cloud = Cloud()

    assert walk(cloud, name, week()) == [NOW - timedelta(days=7)]
    assert len(cloud.asked) == 1 == STREAMS[name].poll_cost


def test_samples_are_read_day_by_day() -> None:
    """Thousands a day: none but the newest span is without an end, and a poll costs one for each day."""
    cloud, since = Cloud(), NOW - timedelta(days=7, minutes=15)

    reached = walk(cloud, SAMPLES, Window(since, now=NOW))

    assert reached == [*(NOW - timedelta(days=age) for age in range(1, 8)), since]
    assert len(cloud.asked) == 8 == STREAMS[SAMPLES].poll_cost
    assert {path for path, _ in cloud.asked} == {POINTS.format("heart-rate", "reconcile")}
    time = "heart_rate.sample_time.physical_time"
    assert [query["filter"] for _, query in cloud.asked[:2]] == [
        f'{time} >= "2026-11-23T12:30:15Z"',
        f'{time} >= "2026-11-22T12:30:15Z" AND {time} < "2026-11-23T12:30:16Z"',
    ]
    assert all(query["pageSize"] == 10_000 for _, query in cloud.asked)


@pytest.mark.parametrize(
    ("name", "filter_"),
    [
        ("exercise", 'exercise.interval.civil_start_time >= "2026-11-17T00:30:15"'),
        ("sleep", 'sleep.interval.end_time >= "2026-11-17T12:30:15Z"'),
        ("daily-resting-heart-rate", 'daily_resting_heart_rate.date >= "2026-11-17"'),
        ("weight", 'weight.sample_time.physical_time >= "2026-11-17T12:30:15Z"'),
    ],
)
def test_the_newest_span_has_no_end(name: str, filter_: str) -> None:
    """Nothing says what time it is where people are; what they typed in for tomorrow comes, too."""
    cloud = Cloud()

    walk(cloud, name, week())

    assert cloud.asked == [
        (POINTS.format(name, "reconcile"), {"filter": filter_, "pageSize": SOURCES[name].size})
    ]


@pytest.mark.parametrize(
    ("name", "filter_"),
    [
        (
            "exercise",
            'exercise.interval.civil_start_time >= "2026-11-17T00:30:15" '
            'AND exercise.interval.civil_start_time < "2026-11-25T02:30:16"',
        ),
        (
            "sleep",
            'sleep.interval.end_time >= "2026-11-17T12:30:15Z" '
            'AND sleep.interval.end_time < "2026-11-26T12:30:16Z"',
        ),
        (
            "daily-resting-heart-rate",
            'daily_resting_heart_rate.date >= "2026-11-17" AND daily_resting_heart_rate.date < "2026-11-25"',
        ),
        (
            "weight",
            'weight.sample_time.physical_time >= "2026-11-17T12:30:15Z" '
            'AND weight.sample_time.physical_time < "2026-11-24T12:30:16Z"',
        ),
    ],
)
def test_an_older_span_has_both_ends_and_room_for_every_zone(name: str, filter_: str) -> None:
    """Civil times run from UTC-12 to UTC+14; a sleep is found by its end, up to two days after its start."""
    cloud = Cloud()

    walk(cloud, name, week(until=NOW))

    assert [query["filter"] for _, query in cloud.asked] == [filter_]


@pytest.mark.parametrize("name", [name for name, source in SOURCES.items() if source.shape == "rollup"])
@pytest.mark.parametrize("now", [NOW, NOW.replace(hour=0, minute=0, second=0, microsecond=0)])
def test_roll_ups_ask_for_no_more_days_than_they_may(name: str, now: datetime) -> None:
    """And leave none out: each span begins where the next newer one has its last day, or before."""
    cloud, since = Cloud(), now - timedelta(days=400)

    walk(cloud, name, Window(since, now=now))

    spans = [(made(query["range"]["start"]), made(query["range"]["end"])) for _, query in cloud.asked]
    assert all(0 < (end - first).days <= SOURCES[name].span for first, end in spans)
    assert all(spec.faults("DailyRollUpDataPointsRequest", query) == [] for _, query in cloud.asked)
    assert spans[0][1] > (now + timedelta(hours=14)).date()
    assert spans[-1][0] == since.date()
    assert all(newer[0] <= older[1] for newer, older in pairwise(spans))
    assert len(spans) <= 400 // SOURCES[name].span + 2


def made(civil: dict[str, Any]) -> date:
    return date(**civil["date"])


@pytest.mark.parametrize("name", ["exercise", "steps"])
def test_a_span_is_read_to_its_last_page_and_yielded_as_one(name: str) -> None:
    list_ = "dataPoints" if name == "exercise" else "rollupDataPoints"
    point = {"exercise": {"n": 1}, "steps": {"countSum": "1"}}
    cloud = Cloud({list_: [point], "nextPageToken": "more"}, {list_: [point], "nextPageToken": ""})

    (page,) = FITBIT.pages(cloud, STREAMS[name], week())

    assert list(page.items) == [point, point]
    assert ["pageToken" in query for _, query in cloud.asked] == [False, True]


def test_a_list_that_never_ends_is_given_up() -> None:
    class Endless(Cloud):
        def get(self, path: str, **params: Any) -> Any:
            super().get(path, **params)
            return {"nextPageToken": "again"}

    cloud = Endless()
    with pytest.raises(Unavailable, match="does not end"):
        walk(cloud, "sleep", week())
    assert len(cloud.asked) == MOST_REPLIES


@pytest.mark.parametrize("reply", [[], None, {"dataPoints": {}}, {"nextPageToken": 7}])
def test_what_is_no_list_is_not_taken_for_an_empty_one(reply: Any) -> None:
    with pytest.raises(Unavailable, match="not a list"):
        walk(Cloud(reply), "sleep", week())


def test_a_day_about_which_nothing_is_known_is_no_item() -> None:
    empty, known = {"civilStartTime": day(2026, 11, 20)}, {"steps": {"countSum": "5"}}

    (page,) = FITBIT.pages(Cloud({"rollupDataPoints": [empty, known]}), STREAMS["steps"], week())

    assert list(page.items) == [known]


# Records ----------------------------------------------------------------------------------------------

INTERVAL = {
    "startTime": "2026-11-24T04:50:00Z",
    "startUtcOffset": "-39600s",
    "endTime": "2026-11-24T05:50:00.500Z",
    "endUtcOffset": "-39600s",
}
RUN = {
    "dataPointName": "users/12345/dataTypes/exercise/dataPoints/a1b2-c3",
    "exercise": {
        "interval": INTERVAL,
        "exerciseType": "RUNNING",
        "displayName": "Run",
        "activeDuration": "3500.5s",
        "metricsSummary": {
            "distanceMillimeters": 10123456.0,
            "elevationGainMillimeters": 12300.0,
            "caloriesKcal": 500.5,
            "averageHeartRateBeatsPerMinute": "141",
            "steps": "9500",
        },
    },
}


def test_an_exercise() -> None:
    record = FITBIT.record(STREAMS["exercise"], RUN)

    assert (record.external_id, record.kind, record.title) == ("a1b2-c3", "activity", "Run")
    assert record.ordered_at == record.start_at == datetime(2026, 11, 24, 4, 50, tzinfo=UTC)
    assert (record.duration_s, record.moving_s) == (3600.5, 3500.5)
    assert (record.utc_offset_s, record.local_date) == (-39600, date(2026, 11, 23))
    assert (record.type, record.provider_type) == ("running", "RUNNING")
    assert (record.distance_m, record.elevation_gain_m) == (10123.456, 12.3)
    assert (record.energy_j, record.heart_rate_avg_bpm, record.steps) == (2094092, 141, 9500)
    assert record.heart_rate_max_bpm is None


def test_a_night() -> None:
    """Its civil date is that of waking up, as told; what is not told is null."""
    item = {
        "dataPointName": "users/me/dataTypes/sleep/dataPoints/n-1",
        "sleep": {
            "interval": {**INTERVAL, "civilEndTime": day(2026, 11, 23)},
            "type": "STAGES",
            "metadata": {"mainSleep": True},
            "summary": {
                "minutesAsleep": "50",
                "minutesAwake": "10",
                "stagesSummary": [
                    {"type": "LIGHT", "minutes": "30"},
                    {"type": "DEEP", "minutes": "20"},
                ],
            },
        },
    }

    record = FITBIT.record(STREAMS["sleep"], item)

    assert (record.local_date, record.is_main_sleep, record.provider_type) == (
        date(2026, 11, 23),
        True,
        "STAGES",
    )
    assert (record.asleep_s, record.awake_s) == (3000, 600)
    assert (record.light_sleep_s, record.deep_sleep_s, record.rem_sleep_s) == (1800, 1200, None)
    assert record.type is None


@pytest.mark.parametrize(
    ("metadata", "main"),
    [({"nap": True}, False), ({"mainSleep": False}, False), ({"processed": True}, None), (None, None)],
)
def test_a_nap_is_no_main_sleep_and_silence_is_null(metadata: Any, main: bool | None) -> None:
    item = {"sleep": {"interval": INTERVAL, "metadata": metadata}}

    assert FITBIT.record(STREAMS["sleep"], item).is_main_sleep is main


@pytest.mark.parametrize(
    ("name", "value", "column", "expected"),
    [
        ("steps", {"countSum": "12345"}, "steps", 12345),
        ("distance", {"millimetersSum": "8123456"}, "distance_m", 8123.456),
        ("total-calories", {"kcalSum": 2100.5}, "energy_j", 8788492),
        ("heart-rate", {"beatsPerMinuteAvg": 71.5}, "heart_rate_avg_bpm", 71.5),
        ("heart-rate", {"beatsPerMinuteMax": 151.0}, "heart_rate_max_bpm", 151),
        ("heart-rate", {"beatsPerMinuteMin": 48.0}, "heart_rate_min_bpm", 48),
        ("daily-resting-heart-rate", {"beatsPerMinute": "52"}, "heart_rate_resting_bpm", 52),
        (
            "daily-heart-rate-variability",
            {"averageHeartRateVariabilityMilliseconds": 41.5},
            "hrv_rmssd_ms",
            41.5,
        ),
        ("daily-oxygen-saturation", {"averagePercentage": 96.5}, "spo2_avg_pct", 96.5),
    ],
)
def test_a_day(name: str, value: dict[str, Any], column: str, expected: float) -> None:
    """By its civil date, in the unit of the column; the other columns are null."""
    first, *rest = name.split("-")
    point = first + "".join(word.title() for word in rest)
    if SOURCES[name].shape == "rollup":
        item: dict[str, Any] = {"civilStartTime": day(2026, 11, 24), point: value}
    else:
        item = {point: {**day(2026, 11, 24), **value}}

    record = FITBIT.record(STREAMS[name], item)

    assert (record.external_id, record.kind) == ("2026-11-24", "day")
    assert (record.local_date, record.ordered_at) == (date(2026, 11, 24), datetime(2026, 11, 24, tzinfo=UTC))
    assert getattr(record, column) == expected
    measured = ("steps", "distance_m", "energy_j", "heart_rate_avg_bpm", "hrv_rmssd_ms", "spo2_avg_pct")
    assert all(getattr(record, other) is None for other in measured if other != column)
    assert record.start_at is None


def weighed(**more: Any) -> dict[str, Any]:
    sample = {"physicalTime": "2026-11-24T06:10:00Z", "utcOffset": "50400s"}
    return {"weight": {"sampleTime": sample, "weightGrams": 71250.0}, **more}


def test_a_weight_has_no_name_and_a_stable_key() -> None:
    record = FITBIT.record(STREAMS["weight"], weighed())

    assert (record.weight_kg, record.kind) == (71.25, "body")
    assert (record.local_date, record.utc_offset_s) == (date(2026, 11, 24), 50400)
    assert record.external_id == FITBIT.record(STREAMS["weight"], weighed()).external_id
    assert len(record.external_id) <= 200


def beat(**more: Any) -> dict[str, Any]:
    time = {"physicalTime": "2026-11-24T06:10:05Z", "utcOffset": "-39600s"}
    return {"heartRate": {"sampleTime": time, "beatsPerMinute": "61", **more}}


def test_a_heart_rate_sample_is_a_measurement_of_its_moment() -> None:
    """Beside the day's averages, which are of the same data type and another stream."""
    record = FITBIT.record(STREAMS[SAMPLES], beat(metadata={"motionContext": "SEDENTARY"}))

    assert (record.kind, record.heart_rate_avg_bpm, record.weight_kg) == ("body", 61, None)
    assert record.ordered_at == record.start_at == datetime(2026, 11, 24, 6, 10, 5, tzinfo=UTC)
    assert (record.utc_offset_s, record.local_date) == (-39600, date(2026, 11, 23))
    assert (record.heart_rate_max_bpm, record.heart_rate_min_bpm, record.end_at) == (None, None, None)


def test_a_heart_rate_sample_has_no_name_and_a_stable_key() -> None:
    """Its value may be corrected; its moment makes it what it is."""
    samples = STREAMS[SAMPLES]
    later = beat(sampleTime={"physicalTime": "2026-11-24T06:10:10Z", "utcOffset": "0s"})

    assert FITBIT.external_id(samples, beat()) == FITBIT.external_id(samples, beat(beatsPerMinute="62"))
    assert FITBIT.external_id(samples, beat()) != FITBIT.external_id(samples, later)


def test_two_sources_of_one_moment_are_two_points() -> None:
    keys = {
        FITBIT.external_id(STREAMS["weight"], weighed(**more))
        for more in ({}, {"dataSource": {"platform": "FITBIT"}}, {"dataSource": {"platform": "NEST"}})
    }

    assert len(keys) == 3
    assert None not in keys


def test_a_session_without_a_name_is_known_by_its_interval() -> None:
    unnamed = {"exercise": RUN["exercise"], "dataPointName": ""}
    same = {"exercise": {**RUN["exercise"], "displayName": "Renamed"}}  # type: ignore[dict-item]

    assert FITBIT.external_id(STREAMS["exercise"], unnamed) == FITBIT.external_id(STREAMS["exercise"], same)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"interval": {**INTERVAL, "startTime": "yesterday"}}, "startTime"),
        ({"interval": {**INTERVAL, "endTime": "2026-11-23T00:00:00Z"}}, "endTime"),
        ({"interval": {**INTERVAL, "startUtcOffset": "7200"}}, "startUtcOffset"),
        ({"interval": None}, "interval"),
        ({"activeDuration": 7}, "activeDuration"),
        ({"metricsSummary": {"steps": "1.5"}}, "steps"),
        ({"metricsSummary": {"steps": "-1"}}, "steps"),
        ({"metricsSummary": {"distanceMillimeters": "NaN"}}, "distanceMillimeters"),
        ({"metricsSummary": []}, "metricsSummary"),
    ],
)
def test_a_bad_field_is_named(change: dict[str, Any], field: str) -> None:
    item = {**RUN, "exercise": {**RUN["exercise"], **change}}  # type: ignore[dict-item]

    with pytest.raises(BadRecord, match=f"^{field}"):
        FITBIT.record(STREAMS["exercise"], item)
    assert FITBIT.external_id(STREAMS["exercise"], item) == "a1b2-c3"


def test_an_unknown_type_is_other_and_kept() -> None:
    item = {**RUN, "exercise": {**RUN["exercise"], "exerciseType": "UNICYCLING"}}  # type: ignore[dict-item]

    record = FITBIT.record(STREAMS["exercise"], item)

    assert (record.type, record.provider_type) == ("other", "UNICYCLING")


def test_our_words_are_googles_words() -> None:
    known = spec.document["schemas"]["Exercise"]["properties"]["exerciseType"]["enum"]

    assert TYPES.keys() <= set(known)


# Whatever comes ---------------------------------------------------------------------------------------

LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.sampled_from(["12", "3600s", "2026-11-24T04:50:00Z", "0001-01-01T00:00:00+23:59", "1e999s"])
)  # fmt: skip
NAMES = st.sampled_from(
    [
        "exercise", "sleep", "steps", "weight", "heartRate", "dailyRestingHeartRate", "interval", "startTime",
        "endTime", "startUtcOffset", "civilStartTime", "civilEndTime", "date", "year", "month", "day",
        "metricsSummary", "summary", "metadata", "stagesSummary", "type", "minutes", "countSum", "sampleTime",
        "physicalTime", "weightGrams", "dataPointName", "dataSource", "displayName", "beatsPerMinute",
    ]
)  # fmt: skip
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(max_size=5), inner, max_size=6)
    ),
    max_leaves=25,
)


# Who pays, and what is refused ------------------------------------------------------------------------


class Settings:
    suffix = ""
    client_id, authorize_url = "id", "https://accounts.google.com/o/oauth2/v2/auth"
    budget, overall_budget, user_budget = ("120000/minute",), (), ("300/minute",)
    extra_streams: tuple[str, ...] = ()


def test_samples_cost_what_they_add_and_need_no_scope_more() -> None:
    class More(Settings):
        extra_streams = (SAMPLES,)

    address = {"redirect_uri": "http://localhost/", "state": "s"}

    assert (FITBIT.poll_cost(Settings()), FITBIT.poll_cost(More())) == (10, 18)
    assert FITBIT.authorize_address(More(), **address) == FITBIT.authorize_address(Settings(), **address)


def test_nothing_tells_which_limit_a_429_is_about() -> None:
    """docs/providers/fitbit.md: no header does, and what the body says of it is not documented."""
    assert FITBIT.spent_pools({"Retry-After": "30"}) == ()


def test_a_request_spends_from_the_persons_limit_and_the_projects() -> None:
    user, project = FITBIT.pools(Settings(), 7)

    assert (user.key, user.limits) == ("fitbit:id:user:7", ("300/minute",))
    assert (project.key, project.limits) == ("fitbit:id:project", ("120000/minute",))
    assert FITBIT.shared_pools(Settings()) == (project,)
    assert FITBIT.pools(Settings(), 7, token=True) == (project,)
    address = FITBIT.authorize_address(Settings(), redirect_uri="http://localhost/", state="s")
    assert "access_type=offline&prompt=consent&include_granted_scopes=true" in address


@pytest.mark.parametrize(
    "reply",
    [
        None,
        [],
        {"error": "invalid_grant"},
        {"error": {"details": 7}},
        {"error": {"details": [{"reason": {}}]}},
    ],
)
def test_an_ordinary_refusal_says_nothing(reply: Any) -> None:
    assert FITBIT.refusal(400, reply) is None
    assert not FITBIT.refuses_account(400, reply)


def test_an_account_without_a_profile_is_told_in_words() -> None:
    reply = {"error": {"status": "FAILED_PRECONDITION", "details": [{"reason": "ACCOUNT_NOT_LINKED"}]}}

    assert "no Fitbit profile" in (FITBIT.refusal(400, reply) or "")
    assert FITBIT.refuses_account(400, reply)


# The contract ------------------------------------------------------------------------------------------


def told(name: str, *, edit: Any, broken: Any, **novel: Any) -> Listed:
    """The list of a data type; changes are those of the point's own part."""
    source = SOURCES[name]
    method, verb = ("POST", "dailyRollUp") if source.shape == "rollup" else ("GET", "reconcile")
    return Listed(
        f"{method} /dataTypes/{source.type}/dataPoints:{verb}",
        edit={source.field: edit},
        broken={source.field: broken},
        novel={**NOVEL, source.field: {**NOVEL, **novel}},
    )


@pytest.mark.slow  # ten lists a sync: the engine is held to it by the others in `make test`
class TestContract(Contract):
    provider = FITBIT
    lists: Mapping[str, Listed] = {
        "exercise": told(
            "exercise",
            edit={"displayName": "Renamed"},
            broken={"activeDuration": "long"},
            exerciseType="MOONWALK",
        ),
        "sleep": told(
            "sleep",
            edit={"summary": {"minutesAsleep": "17"}},
            broken={"summary": {"minutesAsleep": "long"}},
            type="DREAMS",
        ),
        "steps": told("steps", edit={"countSum": "17"}, broken={"countSum": "many"}),
        "distance": told("distance", edit={"millimetersSum": "17"}, broken={"millimetersSum": "far"}),
        "total-calories": told("total-calories", edit={"kcalSum": 17}, broken={"kcalSum": "much"}),
        "heart-rate": told(
            "heart-rate", edit={"beatsPerMinuteAvg": 61}, broken={"beatsPerMinuteAvg": "fast"}
        ),
        "daily-resting-heart-rate": told(
            "daily-resting-heart-rate", edit={"beatsPerMinute": "17"}, broken={"beatsPerMinute": "slow"}
        ),
        "daily-heart-rate-variability": told(
            "daily-heart-rate-variability",
            edit={"averageHeartRateVariabilityMilliseconds": 17},
            broken={"averageHeartRateVariabilityMilliseconds": "high"},
        ),
        "daily-oxygen-saturation": told(
            "daily-oxygen-saturation", edit={"averagePercentage": 17}, broken={"averagePercentage": "much"}
        ),
        "weight": told("weight", edit={"weightGrams": 17_000}, broken={"weightGrams": "heavy"}),
    }

    def small_pages(self, sandbox: Control, monkeypatch: pytest.MonkeyPatch) -> None:
        small = {name: replace(source, size=5, span=min(source.span, 10)) for name, source in SOURCES.items()}
        monkeypatch.setattr(fitbit, "SOURCES", small)
