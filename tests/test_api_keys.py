"""API keys: shown once, stored hashed, found at once, gone when removed."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import delete, select

from lifelogger import api_keys
from lifelogger.connections import add_user
from lifelogger.errors import LifeloggerError
from lifelogger.runtime import Runtime
from lifelogger.store.models import ApiKey, User

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)


@pytest.fixture
def rt(runtime: Runtime) -> Runtime:
    rt = replace(runtime, clock=lambda: NOW)
    add_user(rt, "ann")
    return rt


def test_a_key_is_found_by_what_was_shown(rt: Runtime) -> None:
    key = api_keys.add(rt, "assistant", ["read:records", "sync"], "ann")

    found = api_keys.find(rt, key)

    assert found == api_keys.Key("assistant", frozenset({"read:records", "sync"}), "ann", NOW, None)
    assert key.startswith(api_keys.PREFIX)
    assert len(key) > 43, "256 bits"


def test_the_key_itself_is_nowhere(rt: Runtime) -> None:
    key = api_keys.add(rt, "assistant", ["sync"])

    with rt.store.read() as db:
        [row] = db.execute(select(ApiKey.__table__)).all()
    assert key.removeprefix(api_keys.PREFIX) not in repr(row)
    assert row.digest == api_keys.digest_of(key)


@pytest.mark.parametrize("wrong", ["", "llk_", "llk_x", "\ud800", "é", "x" * 10_000])
def test_what_is_no_key_finds_none(rt: Runtime, wrong: str) -> None:
    key = api_keys.add(rt, "assistant", ["sync"])

    for each in (wrong, key + wrong[:1] if wrong else key[:-1], key.upper()):
        assert api_keys.find(rt, each) is None


def test_its_last_use_is_written_down_once_a_minute(rt: Runtime) -> None:
    key = api_keys.add(rt, "assistant", ["sync"])

    def used(seconds: int) -> datetime | None:
        api_keys.find(replace(rt, clock=lambda: NOW + timedelta(seconds=seconds)), key)
        [found] = api_keys.listed(rt)
        return found.last_used_at

    assert [used(0), used(59), used(60)] == [NOW, NOW, NOW + timedelta(minutes=1)]


def test_a_removed_key_is_gone(rt: Runtime) -> None:
    key = api_keys.add(rt, "assistant", ["sync"])

    assert api_keys.remove(rt, "assistant")

    assert api_keys.find(rt, key) is None
    assert not api_keys.remove(rt, "assistant")
    assert api_keys.listed(rt) == []


def test_the_keys_of_an_erased_user_go_with_them(rt: Runtime) -> None:
    """Or they would open the data of whoever gets that id next."""
    hers, all_of_them = api_keys.add(rt, "hers", ["sync"], "ann"), api_keys.add(rt, "all", ["sync"])

    with rt.store.write() as db:
        db.execute(delete(User))

    assert api_keys.find(rt, hers) is None
    assert api_keys.find(rt, all_of_them) is not None


@pytest.mark.parametrize(
    ("name", "scopes", "user_id", "sentence"),
    [
        ("taken", ["sync"], None, "There is a key 'taken' already"),
        ("new", [], None, "needs scopes out of read:records, read:status, sync"),
        ("new", ["sync", "write"], None, "needs scopes out of"),
        ("new", ["sync"], "nobody", "There is no user 'nobody'"),
        ("", ["sync"], None, "1 to 100 printable"),
        ("a\nb", ["sync"], None, "1 to 100 printable"),
        ("x" * 101, ["sync"], None, "1 to 100 printable"),
    ],
)
def test_a_wrong_wish_is_refused(
    rt: Runtime, name: str, scopes: list[str], user_id: str | None, sentence: str
) -> None:
    api_keys.add(rt, "taken", ["sync"])

    with pytest.raises(LifeloggerError, match=sentence):
        api_keys.add(rt, name, scopes, user_id)

    assert len(api_keys.listed(rt)) == 1
