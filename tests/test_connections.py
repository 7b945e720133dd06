"""Connecting people: what an import takes and refuses, connecting again, and noting that there is news."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import func, insert, select, update

from lifelogger.connections import (
    AccountTaken,
    Imported,
    ImportRefused,
    Line,
    add_user,
    import_lines,
    note_news,
    save,
)
from lifelogger.runtime import Runtime, build
from lifelogger.settings import Settings
from lifelogger.store.models import Base, Connection, Record, User
from tests.conftest import make_tables

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
ACCESS, REFRESH = "hush-access-token", "hush-refresh-token"


@pytest.fixture
def rt(runtime: Runtime) -> Runtime:
    return at(runtime, NOW)


@pytest.fixture
def small(settings_env: Callable[..., Settings], redis_url: str, tmp_path: Path) -> Iterator[Runtime]:
    """On SQLite only: for what is decided before a database is asked."""
    built = build(
        settings_env(database={"url": f"sqlite:///{tmp_path / 'test.db'}"}, redis={"url": redis_url})
    )
    make_tables(built.store)
    yield at(built, NOW)
    built.close()


def at(rt: Runtime, now: datetime) -> Runtime:
    return dataclasses.replace(rt, clock=lambda: now)


def line(user_id: Any = "ann", **more: Any) -> str:
    given = {
        "user_id": user_id,
        "provider": "strava",
        "access_token": ACCESS,
        "refresh_token": REFRESH,
        "expires_at": 1900000000,
        "scopes": ["read", "activity:read_all"],
        **more,
    }
    return json.dumps({key: value for key, value in given.items() if value is not ...})


def stored(rt: Runtime) -> list[dict[str, Any]]:
    with rt.store.read() as db:
        query = select(Connection.__table__).order_by(Connection.user_id)
        return [dict(row._mapping) for row in db.execute(query)]


def faults(rt: Runtime, *lines: str) -> list[str]:
    with pytest.raises(ImportRefused) as caught:
        import_lines(rt, lines)
    assert str(caught.value) == "\n".join(caught.value.faults)
    return caught.value.faults


def change(rt: Runtime, **values: Any) -> None:
    with rt.store.write() as db:
        db.execute(update(Connection).values(**values))


# What is stored ---------------------------------------------------------------------------------------------


def test_a_line_becomes_a_connection_that_is_due_at_once_and_has_news(rt: Runtime) -> None:
    assert import_lines(rt, [line(provider_user_id="77")]) == Imported(added=1, replaced=0)

    [row] = stored(rt)
    assert (row["user_id"], row["provider"], row["provider_user_id"]) == ("ann", "strava", "77")
    assert (row["status"], row["next_sync_at"], row["news_at"], row["claimed_at"]) == (
        "active",
        NOW,
        NOW,
        None,
    )
    assert row["scopes"] == ["read", "activity:read_all"]
    assert rt.vault.decrypt(row["access_token"]) == ACCESS
    assert rt.vault.decrypt(row["refresh_token"]) == REFRESH
    assert row["token_expires_at"] == datetime(2030, 3, 17, 17, 46, 40, tzinfo=UTC)


def test_empty_lines_are_nothing(rt: Runtime) -> None:
    assert import_lines(rt, ["", "  \n", line() + "\n", "\t"]) == Imported(added=1, replaced=0)
    assert import_lines(rt, []) == Imported(added=0, replaced=0)


@pytest.mark.parametrize(
    "expires_at",
    [1900000000, 1900000000.0, "1900000000", "2030-03-17T17:46:40Z", "2030-03-17T19:46:40+02:00"],
)
def test_a_time_is_epoch_seconds_or_iso(small: Runtime, expires_at: Any) -> None:
    import_lines(small, [line(expires_at=expires_at)])

    assert stored(small)[0]["token_expires_at"] == datetime(2030, 3, 17, 17, 46, 40, tzinfo=UTC)


@pytest.mark.parametrize(
    "scopes", ["read,activity:read_all", "read activity:read_all", ["read", "activity:read_all"]]
)
def test_scopes_are_a_list_or_as_the_provider_writes_them(small: Runtime, scopes: Any) -> None:
    import_lines(small, [line(scopes=scopes)])

    assert stored(small)[0]["scopes"] == ["read", "activity:read_all"]


@pytest.mark.parametrize("scopes", [..., [], ""])
def test_without_scopes_all_that_we_ask_for_count_as_granted(small: Runtime, scopes: Any) -> None:
    import_lines(small, [line(scopes=scopes)])

    assert stored(small)[0]["scopes"] == list(small.providers["strava"].scopes)


@pytest.mark.parametrize("refresh_token", [..., None, ""])
def test_a_refresh_token_may_be_missing(small: Runtime, refresh_token: Any) -> None:
    import_lines(small, [line(refresh_token=refresh_token)])

    assert stored(small)[0]["refresh_token"] is None


def test_an_account_may_be_a_number(small: Runtime) -> None:
    import_lines(small, [line(provider_user_id=134815)])

    assert stored(small)[0]["provider_user_id"] == "134815"


def test_tokens_are_unreadable_in_the_database(rt: Runtime, tmp_path: Path) -> None:
    """Promise 10, in every column of every table, and in SQLite's own files."""
    import_lines(rt, [line(provider_user_id="77")])

    with rt.store.read() as db:
        tables = [db.execute(select(table)).all() for table in Base.metadata.sorted_tables]
    written = repr(tables).encode() + b"".join(path.read_bytes() for path in tmp_path.glob("test.db*"))
    assert b"77" in written
    assert rt.store.is_sqlite == (b"SQLite format 3" in written)
    for secret in (ACCESS, REFRESH):
        assert secret.encode() not in written


# What is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        ({"user_id": ...}, "user_id: Field required"),
        ({"user_id": ""}, "user_id: String should have at least 1 character"),
        ({"user_id": "x" * 201}, "user_id: String should have at most 200 characters"),
        ({"user_id": "a\nb"}, "user_id: String should match"),
        ({"user_id": "a\x00b"}, "user_id: String should match"),
        ({"user_id": "a\x9b2Jb"}, "user_id: String should match"),
        ({"user_id": 7}, "user_id: Input should be a valid string"),
        ({"provider": ...}, "provider: Field required"),
        ({"provider": "strafa"}, 'provider: "strafa" is none of fitbit, oura, strava'),
        ({"provider": "Strava"}, 'provider: "Strava" is none of fitbit, oura, strava'),
        ({"provider": "s" * 10_000}, 'provider: "sssss'),
        ({"access_token": ...}, "access_token: Field required"),
        ({"access_token": ""}, "access_token: "),
        ({"access_token": 5}, "access_token: Input should be a valid string"),
        ({"access_token": "hush\nhush"}, "access_token: Value error, a token is printable ASCII"),
        ({"access_token": "hush\x00"}, "access_token: Value error, a token is printable ASCII"),
        ({"access_token": "hush ü"}, "access_token: Value error, a token is printable ASCII"),
        ({"access_token": "hush" * 10_000}, "access_token: "),
        ({"refresh_token": "hush\r\nhush"}, "refresh_token: Value error, a token is printable ASCII"),
        ({"expires_at": ...}, "expires_at: Field required"),
        ({"expires_at": None}, "expires_at: Input should be a valid datetime"),
        ({"expires_at": "soon"}, "expires_at: Input should be a valid datetime"),
        ({"expires_at": True}, "expires_at: Input should be a valid datetime"),
        ({"expires_at": "2030-03-17T17:46:40"}, "expires_at: Value error, an ISO time needs an offset"),
        ({"expires_at": 10**30}, "expires_at: Input should be a valid datetime"),
        ({"expires_at": "9999-12-31T23:59:59-12:00"}, "expires_at: Value error, out of range"),
        ({"expires_at": "0001-01-01T00:00:00+12:00"}, "expires_at: Value error, out of range"),
        ({"scopes": 5}, "scopes: Input should be a valid array"),
        ({"scopes": [5]}, "scopes.0: Input should be a valid string"),
        ({"provider_user_id": "x" * 201}, "provider_user_id: String should have at most 200 characters"),
        ({"provider_user_id": "7\x00"}, "provider_user_id: String should match"),
        ({"provider_user_id": ""}, "provider_user_id: String should"),
        ({"provider_user_id": 1.5}, "provider_user_id: Input should be a valid string"),
        ({"provider_user_id": True}, "provider_user_id: Input should be a valid string"),
        ({"user": "ann"}, '"user": Extra inputs are not permitted'),
        ({"a\n\x1b[2J" + "b" * 10_000: 1}, '"a\\n\\u001b[2Jbbb'),
    ],
)
def test_a_fault_is_named_with_its_line_and_nothing_is_written(
    small: Runtime, wrong: dict[str, Any], fault: str
) -> None:
    [told] = faults(small, line("bob"), "", line(**wrong))

    assert told.startswith(f"line 3: {fault}")
    assert len(told) < 200
    assert told.isprintable()
    assert "hush" not in told
    assert stored(small) == []
    assert not count(small, User)


def count(rt: Runtime, table: Any) -> int:
    with rt.store.read() as db:
        return db.scalar(select(func.count()).select_from(table)) or 0


@pytest.mark.parametrize(
    "hostile",
    [
        "user_id,provider,access_token",
        "{" + line()[1:-1],
        "null",
        "[]",
        '"ann"',
        "\x00",
        "\udcff",
        "[" * 5_000 + "]" * 5_000,
        '{"user_id":' * 5_000,
        line().replace("1900000000", "9" * 5_000),
        line().replace("1900000000", "NaN"),
        line("\ud800"),
        "x" * 1_000_000,
    ],
)
def test_what_is_not_a_line_is_told_in_a_line(small: Runtime, hostile: str) -> None:
    told = faults(small, line("bob"), hostile)

    assert all(each.startswith("line 2: ") and len(each) < 200 for each in told)
    assert stored(small) == []


def test_all_faults_of_all_lines_are_told_at_once(small: Runtime) -> None:
    told = faults(small, line(user_id="", expires_at="soon"), line("bob"), "none", line("carl", provider="x"))

    assert [each.split(": ")[:2] for each in told] == [
        ["line 1", "user_id"],
        ["line 1", "expires_at"],
        ["line 3", "line"],
        ["line 4", "provider"],
    ]


def test_a_user_or_an_account_may_stand_in_a_file_once(rt: Runtime) -> None:
    assert faults(
        rt,
        line("ann", provider_user_id="1"),
        line("ann", provider_user_id="2"),
        line("bob", provider_user_id=1),
    ) == [
        "line 2: ann is connected to strava by line 1 already",
        "line 3: 1 is connected to strava by line 1 already",
    ]
    assert stored(rt) == []


def test_an_account_of_another_user_is_refused(rt: Runtime) -> None:
    import_lines(rt, [line("ann", provider_user_id="77")])

    [told] = faults(rt, line("carl"), line("bob", provider_user_id="77"))

    assert told == "line 2: user bob: the strava account 77 is connected to another user"
    assert [row["user_id"] for row in stored(rt)] == ["ann"]


def test_so_it_is_when_somebody_came_between_the_check_and_the_write(rt: Runtime) -> None:
    import_lines(rt, [line("ann", provider_user_id="77")])

    with pytest.raises(AccountTaken, match="connected to another user"), rt.store.write() as db:
        save(rt, db, Line.model_validate_json(line("bob", provider_user_id="77")))

    assert not add_user(rt, "ann")
    assert add_user(rt, "bob"), "bob was undone with it"


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    hostile=st.text(max_size=40)
    | st.dictionaries(
        st.sampled_from([*Line.model_fields, "more"]),
        st.none()
        | st.integers()
        | st.floats()
        | st.text(max_size=20)
        | st.lists(st.text(max_size=5), max_size=3),
    ).map(lambda given: json.dumps({**json.loads(line()), **given}))
)
def test_whatever_a_line_says_it_is_stored_or_refused(rt: Runtime, hostile: str) -> None:
    refused: list[str] = []
    try:
        import_lines(rt, [hostile, "", ""])
    except ImportRefused as refusal:
        refused = refusal.faults

    assert all(fault.startswith("line 1: ") and "hush" not in fault for fault in refused)


# Users ------------------------------------------------------------------------------------------------------


def test_a_user_is_added_once(rt: Runtime) -> None:
    assert add_user(rt, "ann")
    assert not add_user(rt, "ann")

    import_lines(rt, [line("ann")])
    assert count(rt, User) == 1


# Connecting again -------------------------------------------------------------------------------------------


def test_connecting_again_replaces_the_tokens_and_keeps_the_data(rt: Runtime) -> None:
    import_lines(rt, [line(provider_user_id="77")])
    [before] = stored(rt)
    change(
        rt,
        status="needs_reauth",
        status_reason="Strava has ended the authorisation",
        next_sync_at=None,
        wait_reason="any",
        failures=7,
        fence=5,
        claimed_at=NOW,
        refreshing_until=NOW,
        last_sync_at=NOW,
    )
    with rt.store.write() as db:
        values = {
            "connection_id": before["id"],
            "stream": "activities",
            "external_id": "1",
            "kind": "activity",
            "change": 1,
        }
        db.execute(insert(Record).values(**values, ordered_at=NOW, created_at=NOW, updated_at=NOW))
    later = at(rt, NOW + timedelta(days=1))

    assert import_lines(later, [line(access_token="new", expires_at=2000000000)]) == Imported(0, replaced=1)

    [after] = stored(rt)
    assert rt.vault.decrypt(after["access_token"]) == "new"
    assert after["token_expires_at"].year == 2033
    assert (after["status"], after["status_reason"], after["wait_reason"]) == ("active", None, None)
    assert (after["failures"], after["claimed_at"], after["refreshing_until"]) == (0, None, None)
    assert after["next_sync_at"] == after["news_at"] == NOW + timedelta(days=1)
    assert (after["id"], after["provider_user_id"], after["fence"]) == (before["id"], "77", 5)
    assert (after["created_at"], after["last_sync_at"]) == (NOW, NOW)
    assert count(rt, Record) == 1


def test_connecting_again_touches_nobody_else(rt: Runtime) -> None:
    import_lines(rt, [line("ann"), line("bob")])
    before = stored(rt)[1]

    import_lines(at(rt, NOW + timedelta(days=1)), [line("ann", access_token="new")])

    assert stored(rt)[1] == before


# News -------------------------------------------------------------------------------------------------------

LATER = NOW + timedelta(hours=1)


def noted(rt: Runtime, **values: Any) -> dict[str, Any]:
    """The connection of `ann` after news of her at NOW; `values` is how it stood before."""
    import_lines(rt, [line("ann"), line("bob")])
    change(rt, **{"next_sync_at": LATER, "news_at": None, **values})
    note_news(rt, "ann")
    [row, other] = stored(rt)
    assert other["news_at"] == values.get("news_at"), "Bob has no news"
    return row


def test_news_make_an_idle_connection_due(rt: Runtime) -> None:
    row = noted(rt)

    assert (row["news_at"], row["next_sync_at"]) == (NOW, NOW)


def test_a_connection_that_failed_keeps_its_time(rt: Runtime) -> None:
    """Its provider is down: news do not change that."""
    row = noted(rt, failures=1, wait_reason="Strava did not answer in time")

    assert (row["news_at"], row["next_sync_at"]) == (NOW, LATER)


def test_a_connection_whose_budget_was_spent_may_have_it_for_news(rt: Runtime) -> None:
    """What is held for others is held for whoever asks; when nothing is, asking costs nothing."""
    row = noted(rt, wait_reason="strava reads: 801 of 1000 requests used; the last 199 are held for others")

    assert (row["news_at"], row["next_sync_at"]) == (NOW, NOW)


def test_a_claimed_connection_is_not_planned_twice(rt: Runtime) -> None:
    """Its sync looks for news when it ends."""
    row = noted(rt, claimed_at=NOW - timedelta(seconds=5))

    assert (row["news_at"], row["next_sync_at"]) == (NOW, LATER)


def test_a_connection_that_is_due_keeps_its_place_in_the_row(rt: Runtime) -> None:
    row = noted(rt, next_sync_at=NOW - timedelta(minutes=5))

    assert row["next_sync_at"] == NOW - timedelta(minutes=5)


def test_news_of_whoever_has_to_sign_in_again_are_not_noted(rt: Runtime) -> None:
    row = noted(rt, status="needs_reauth", next_sync_at=None)

    assert (row["news_at"], row["next_sync_at"]) == (None, None)


def test_it_tells_how_many_connections_will_look(rt: Runtime) -> None:
    import_lines(rt, [line("ann"), line("bob")])

    assert note_news(rt, "ann") == 1
    assert note_news(rt, "nobody") == 0

    change(rt, status="needs_reauth")
    assert note_news(rt, "ann") == 0


def test_one_of_a_provider_that_is_switched_off_does_not_look(rt: Runtime) -> None:
    import_lines(rt, [line("ann")])
    off = rt.settings.providers["strava"].model_copy(update={"enabled": False})
    without = dataclasses.replace(rt, settings=rt.settings.model_copy(update={"providers": {"strava": off}}))

    assert note_news(without, "ann") == 0


def test_a_user_does_not_change_accounts_by_connecting_again(runtime: Runtime) -> None:
    """Their records and cursors would be taken for those of one person."""
    import_lines(runtime, [line("ann", provider_user_id="1")])

    with pytest.raises(ImportRefused, match="connected to another strava account, 1"):
        import_lines(runtime, [line("ann", provider_user_id="2")])

    assert import_lines(runtime, [line("ann", provider_user_id="1")]).replaced == 1
