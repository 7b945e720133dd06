"""The migrations and the models say the same, on both databases, with rows in the tables."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import column, insert, inspect, select, table

from lifelogger.store import Store
from lifelogger.store.migrate import FOLDER, downgrade, revisions, upgrade
from lifelogger.store.models import Base, Connection, Pace, SyncRun, User, Webhook

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)


@pytest.fixture
def store(database_url: str) -> Any:
    store = Store(database_url)
    yield store
    store.close()


def test_head_equals_the_models(store: Store) -> None:
    upgrade(store)

    with store.read() as db:
        context = MigrationContext.configure(db, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
        assert [name for name in inspect(db).get_table_names() if name != "alembic_version"] != []


def test_down_and_up_again_with_rows(store: Store) -> None:
    upgrade(store)
    put_a_connection(store, "ann")
    for revision in reversed(ordered_revisions()):
        downgrade(store, previous(revision))
    with store.read() as db:
        assert [name for name in inspect(db).get_table_names() if name != "alembic_version"] == []

    upgrade(store)
    put_a_connection(store, "ann")

    with store.read() as db:
        assert db.scalars(select(Connection.user_id)).all() == ["ann"]


def test_upgrading_twice_changes_nothing(store: Store) -> None:
    upgrade(store)
    put_a_connection(store, "ann")
    upgrade(store)

    current, newest = revisions(store)
    assert current == newest is not None
    with store.read() as db:
        assert db.scalars(select(User.id)).all() == ["ann"]


def test_nothing_is_lost_on_the_way_up_or_down(store: Store) -> None:
    """A table that is made anew would take what hangs on it along."""
    upgrade(store, "0002")
    put_a_connection(store, "ann")
    with store.write() as db:
        db.execute(
            insert(SyncRun).values(
                connection_id=select(Connection.id).scalar_subquery(),
                trigger="tick",
                started_at=NOW,
                outcome="ok",
            )
        )

    for go in (upgrade, lambda store: downgrade(store, "0002"), upgrade):
        go(store)
        with store.read() as db:
            assert db.scalars(select(Connection.user_id)).all() == ["ann"]
            assert db.scalars(select(SyncRun.outcome)).all() == ["ok"]


def test_what_there_was_belongs_to_the_main_application(store: Store) -> None:
    """An upgrade forgets neither whose a connection is, nor what its price was, nor what is subscribed to."""
    upgrade(store, "0009")
    put_a_connection(store, "ann")
    price = {"price": 2.5, "rate": 1.0, "wanted": 3.0, "offered": 4.0, "longest_s": 5.0, "deaf": True}
    pace = {"provider": "strava", **price, "curve": [1.0] * 24, "heard_at": NOW, "priced_at": NOW}
    hook = {"provider": "oura", "subscriptions": [{"id": "1"}], "checked_at": NOW, "fault": "none answers"}
    with store.write() as db:
        for model, row in ((Pace, pace), (Webhook, hook)):
            then = table(model.__tablename__, *(column(name, getattr(model, name).type) for name in row))
            db.execute(insert(then).values(row))

    def kept() -> list[dict[str, object]]:
        with store.read() as db:
            found = [dict(db.execute(select(*columns)).mappings().one()) for columns in wanted]
        return found

    wanted = [[getattr(Pace, name) for name in pace], [getattr(Webhook, name) for name in hook]]
    for go in (upgrade, lambda store: downgrade(store, "0009"), upgrade):
        go(store)
        assert kept() == [pace, hook]

    with store.read() as db:
        whose = [db.scalars(select(model.application)).all() for model in (Connection, Pace, Webhook)]
    assert whose == [["main"]] * 3


def ordered_revisions() -> list[str]:
    scripts = ScriptDirectory(str(FOLDER))
    return [script.revision for script in reversed(list(scripts.walk_revisions()))]


def previous(revision: str) -> str:
    down = ScriptDirectory(str(FOLDER)).get_revision(revision).down_revision
    return str(down) if down else "base"


def put_a_connection(store: Store, user_id: str) -> None:
    with store.write() as db:
        db.execute(insert(User).values(id=user_id, created_at=NOW))
        db.execute(
            insert(Connection).values(
                user_id=user_id,
                provider="strava",
                status="active",
                scopes=["read"],
                access_token=b"sealed",
                token_expires_at=NOW,
                created_at=NOW,
                updated_at=NOW,
                fence=0,
                failures=0,
            )
        )
