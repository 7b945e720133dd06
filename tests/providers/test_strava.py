"""What is Strava's own: the walk over a list whose short pages may have successors."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from lifelogger.errors import BadRecord, Unavailable
from lifelogger.providers import strava
from lifelogger.providers.base import Usage, Window
from lifelogger.providers.strava import Strava
from tests.providers.contract import NOVEL, Contract, Listed
from tests.sandbox.control import Control

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
STRAVA = Strava()
ACTIVITIES = STRAVA.streams[0]


class List:
    """The athlete's list as documented: newest first, sliced into pages, then thinned out."""

    def __init__(self, *ages_in_days: float, hidden: set[int] = frozenset()) -> None:  # type: ignore[assignment]
        self.items = [
            activity(number, NOW - timedelta(days=age)) for number, age in enumerate(ages_in_days, 1)
        ]
        self.hidden = hidden
        self.asked: list[dict[str, Any]] = []

    def get(self, path: str, **params: Any) -> Any:
        assert path == "/athlete/activities"
        self.asked.append(params)
        listed = sorted(self.items, key=lambda each: str(each["start_date"]), reverse=True)
        if "before" in params:
            listed = [each for each in listed if began(each) < params["before"]]
        first = (params["page"] - 1) * params["per_page"]
        return [each for each in listed[first : first + params["per_page"]] if each["id"] not in self.hidden]

    def post(self, path: str, body: Any) -> Any:
        raise AssertionError("the list is read with GET")


def activity(number: int, start: datetime, **more: Any) -> dict[str, Any]:
    return {"id": number, "start_date": start.strftime("%Y-%m-%dT%H:%M:%SZ"), "sport_type": "Run", **more}


def began(item: dict[str, Any]) -> float:
    return datetime.fromisoformat(item["start_date"]).timestamp()


def read(http: List, window: Window) -> list[int]:
    return [item["id"] for page in STRAVA.pages(http, ACTIVITIES, window) for item in page.items]


def week(**more: Any) -> Window:
    return Window(NOW - timedelta(days=7), **more)


def test_a_poll_without_news_is_one_request() -> None:
    http = List(1, 3, 9, 40)

    assert read(http, week(expect=2)) == [1, 2, 3, 4]
    assert len(http.asked) == 1


def test_a_short_page_is_not_taken_for_the_last() -> None:
    http = List(*range(30), hidden=set(range(1, 15)))

    pages = list(STRAVA.pages(http, ACTIVITIES, Window(NOW - timedelta(days=100), expect=5)))

    assert {item["id"] for page in pages for item in page.items} == set(range(15, 31))
    assert pages[-1].end


def test_someone_whose_first_activity_lies_in_the_look_back_costs_one_request_too() -> None:
    http = List(1, 3)

    assert read(http, week(expect=2, floor=NOW - timedelta(days=3))) == [1, 2]
    assert len(http.asked) == 1


def test_activities_that_start_in_the_same_second_are_all_read_across_a_page_border() -> None:
    http = List(*[1.0] * 30, 2, 20)

    assert set(read(http, week(expect=0))) == set(range(1, 33))


def test_an_upload_between_two_pages_shifts_nothing() -> None:
    http = List(*[day / 10 for day in range(1, 31)], 40)
    pages = STRAVA.pages(http, ACTIVITIES, week(expect=0))
    seen = [item["id"] for item in next(pages).items]

    http.items.append(activity(99, NOW))
    http.items = [item for item in http.items if item["id"] != 2]
    seen += [item["id"] for page in pages for item in page.items]

    assert set(seen) >= set(range(1, 32))


def test_a_list_without_end_is_given_up() -> None:
    class Endless(List):
        def get(self, path: str, **params: Any) -> Any:
            self.asked.append(params)
            return [activity(7, NOW)]

    http = Endless()
    with pytest.raises(Unavailable, match="does not end"):
        read(http, week())
    assert len(http.asked) < 100


def test_a_date_that_no_activity_has_does_not_end_the_walk() -> None:
    http = List(1, 2, 3)
    http.items[1]["start_date"] = "0001-01-01T00:00:00Z"

    pages = list(STRAVA.pages(http, ACTIVITIES, week()))

    assert pages[0].reached == NOW - timedelta(days=3) + timedelta(seconds=1)


def test_what_the_reply_says_is_stored_in_si_units_and_the_rest_is_null() -> None:
    item = activity(
        2**40,
        datetime(2026, 11, 23, 23, 30, tzinfo=UTC),
        utc_offset=3600,
        elapsed_time=3600,
        moving_time=3500,
        distance=10_000.5,
        kilojoules=500.0,
        name="Before\x00 midnight",
    )
    record = STRAVA.record(ACTIVITIES, item)

    assert record.external_id == str(2**40)
    assert (record.type, record.provider_type) == ("running", "Run")
    assert record.local_date is not None
    assert record.local_date.isoformat() == "2026-11-24"
    assert record.end_at == datetime(2026, 11, 24, 0, 30, tzinfo=UTC)
    assert (record.distance_m, record.work_j, record.energy_j) == (10_000.5, 500_000, None)
    assert record.title == "Before midnight"
    assert record.heart_rate_avg_bpm is None


def test_a_new_sport_is_kept_under_its_own_name() -> None:
    record = STRAVA.record(ACTIVITIES, activity(1, NOW, sport_type="Quidditch"))

    assert (record.type, record.provider_type) == ("other", "Quidditch")


@pytest.mark.parametrize(
    "fault",
    [
        {"id": "1"},
        {"id": True},
        {"id": None},
        {"start_date": "yesterday"},
        {"start_date": "2026-11-24T12:00:00"},
        {"start_date": None},
        {"distance": "far"},
        {"distance": 1e300},
        {"elapsed_time": -1},
        {"utc_offset": 10**9},
        {"name": ["a"]},
    ],
)
def test_a_wrong_type_is_a_bad_record_and_nothing_else(fault: dict[str, Any]) -> None:
    with pytest.raises(BadRecord):
        STRAVA.record(ACTIVITIES, activity(1, NOW) | fault)


def test_usage_headers() -> None:
    assert STRAVA.usage(
        {
            "X-RateLimit-Limit": "200,2000",
            "X-RateLimit-Usage": "12,345",
            "X-ReadRateLimit-Limit": "100,1000",
            "X-ReadRateLimit-Usage": "11,300",
        }
    ) == {"reads": Usage((100, 1000), (11, 300)), "overall": Usage((200, 2000), (12, 345))}
    assert STRAVA.usage({"X-ReadRateLimit-Limit": "a,b", "X-ReadRateLimit-Usage": "1"}) == {}


def test_a_dead_refresh_token_is_told_from_other_refusals() -> None:
    dead = {"errors": [{"resource": "RefreshToken", "field": "refresh_token", "code": "invalid"}]}

    assert STRAVA.grant_is_dead(400, dead)
    assert not STRAVA.grant_is_dead(400, {"errors": [{"resource": "Application", "code": "invalid"}]})
    assert not STRAVA.grant_is_dead(500, dead)


# The contract ------------------------------------------------------------------------------------------


class TestContract(Contract):
    provider = Strava()
    lists: Mapping[str, Listed] = {
        "activities": Listed(
            "GET /athlete/activities",
            edit={"name": "Renamed"},
            broken={"distance": "far"},
            novel={**NOVEL, "sport_type": "Moonwalk"},
        ),
    }

    def small_pages(self, sandbox: Control, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(strava, "LARGEST_PAGE", 5)
