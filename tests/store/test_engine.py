"""The two ways to talk to a database: all or nothing, several writers at once, instants that stay."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import bindparam, delete, func, insert, inspect, literal, select, text, update
from sqlalchemy.exc import IntegrityError, StatementError

from lifelogger.store import Prepared, Store, engine, table
from lifelogger.store.models import Connection, Feed, Tick, User, Utc
from tests.conftest import make_tables
from tests.servers import PostgresServer

NOW = datetime(2026, 11, 24, 12, 30, 15, 123456, tzinfo=UTC)


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    store = Store(database_url)
    make_tables(store)
    yield store
    store.close()


def add(store: Store, user_id: str) -> None:
    with store.write() as db:
        db.execute(insert(User).values(id=user_id, created_at=NOW))


def users(store: Store) -> list[str]:
    with store.read() as db:
        return list(db.scalars(select(User.id).order_by(User.id)))


# All or nothing ---------------------------------------------------------------------------------------------


def test_a_write_is_committed_at_the_end_of_the_block(store: Store) -> None:
    add(store, "ann")

    assert users(store) == ["ann"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_any_error_undoes_the_whole_write(store: Store, error: type[BaseException]) -> None:
    add(store, "ann")

    def fail() -> None:
        with store.write() as db:
            db.execute(insert(User).values(id="bob", created_at=NOW))
            db.execute(delete(User).where(User.id == "ann"))
            raise error

    with pytest.raises(error):
        fail()
    assert users(store) == ["ann"]


def test_a_refused_statement_undoes_what_came_before_it(store: Store) -> None:
    add(store, "ann")

    def fail() -> None:
        with store.write() as db:
            db.execute(insert(User).values(id="bob", created_at=NOW))
            db.execute(insert(User).values(id="ann", created_at=NOW))

    with pytest.raises(IntegrityError):
        fail()
    assert users(store) == ["ann"]
    add(store, "carl")  # the connection is usable again


def connection_of(user_id: str) -> dict[str, object]:
    return {
        "user_id": user_id,
        "provider": "strava",
        "status": "active",
        "scopes": [],
        "access_token": b"sealed",
        "token_expires_at": NOW,
        "created_at": NOW,
        "updated_at": NOW,
    }


def test_a_connection_needs_its_user_and_goes_with_it(store: Store) -> None:
    with pytest.raises(IntegrityError), store.write() as db:
        db.execute(insert(Connection).values(connection_of("nobody")))

    add(store, "ann")
    with store.write() as db:
        db.execute(insert(Connection).values(connection_of("ann")))
    with store.write() as db:
        db.execute(delete(User))

    with store.read() as db:
        assert db.scalar(select(func.count()).select_from(Connection)) == 0


@pytest.mark.parametrize(("user_id", "account"), [("ann", "8"), ("bob", "7")])
def test_a_place_and_an_account_are_taken_once(store: Store, user_id: str, account: str) -> None:
    for each in ("ann", "bob"):
        add(store, each)
    with store.write() as db:
        db.execute(insert(Connection).values({**connection_of("ann"), "provider_user_id": "7"}))

    with pytest.raises(IntegrityError), store.write() as db:
        db.execute(insert(Connection).values({**connection_of(user_id), "provider_user_id": account}))


def test_an_insert_tells_whether_it_came_first(store: Store) -> None:
    """What the tick that fires once stands on; by default psycopg's cursor has forgotten it by then."""
    ann = store.insert(User.__table__).values(id="ann", created_at=NOW).on_conflict_do_nothing()

    with store.write() as db:
        assert db.execute(ann).rowcount == 1
        assert db.execute(ann).rowcount == 0


# Prepared statements ----------------------------------------------------------------------------------------

JOIN = Prepared(insert(table(User)).values(id=bindparam("of"), created_at=bindparam("now")))
JOINED = Prepared(
    select(User.id, User.created_at).where(User.id != "zoe", User.created_at <= bindparam("until"))
)


def test_a_prepared_statement_converts_as_any_other_does(store: Store) -> None:
    there = NOW.astimezone(timezone(timedelta(hours=5, minutes=45)))
    with store.write() as db:
        assert JOIN(db, of="ann", now=there) == []
        JOIN(db, of="zoe", now=there)
        JOIN(db, of="late", now=NOW + timedelta(seconds=1))

    with store.read() as db:
        [row] = JOINED(db, until=there)
    assert (row.id, row.created_at, row.created_at.tzinfo) == ("ann", NOW, UTC)


def test_a_prepared_statement_fails_as_any_other_does(store: Store) -> None:
    add(store, "ann")

    def fail() -> None:
        with store.write() as db:
            JOIN(db, of="bob", now=NOW)
            JOIN(db, of="ann", now=NOW)

    with pytest.raises(IntegrityError) as refused:
        fail()
    assert "2026" not in str(refused.value)  # no parameters: people's data is among them
    with pytest.raises(ValueError, match="an instant without an offset"), store.write() as db:
        JOIN(db, of="carl", now=NOW.replace(tzinfo=None))
    assert users(store) == ["ann"]


def test_a_connection_whose_server_went_is_not_used_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    if store.is_sqlite:
        pytest.skip("a file does not go away")
    add(store, "ann")
    others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = :pid"
    with store.read() as db:
        pid = db.scalar(text("SELECT pg_backend_pid()"))
    other = Store(store.url.render_as_string(hide_password=False))
    with other.read() as db:
        db.execute(text(others), {"pid": pid})
    other.close()

    monkeypatch.setattr(engine, "IDLE_SECONDS", 0.0)
    assert users(store) == ["ann"]


# Several at once --------------------------------------------------------------------------------------------


def test_writers_in_threads_wait_for_each_other(store: Store) -> None:
    """Each reads before it writes, which fails at once on SQLite when the write lock comes only then."""
    add(store, "0")
    threads, rounds = 4, 10
    together = threading.Barrier(threads, timeout=10)

    def write() -> None:
        together.wait()
        for _ in range(rounds):
            with store.write() as db:
                if store.is_sqlite:
                    number = db.scalar(select(func.max(User.id)))
                else:
                    number = db.scalar(select(User.id).with_for_update())
                db.execute(update(User).values(id=str(int(number) + 1).zfill(4)))

    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(write) for _ in range(threads)]:
            done.result()

    assert users(store) == [str(threads * rounds).zfill(4)]


PROGRAM = """
import sys
from datetime import datetime, UTC
from sqlalchemy import func, insert, select
from lifelogger.store import Prepared, Store, engine, table
from lifelogger.store.models import Base, User
store = Store(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for number in range(20):
    with store.write() as db:
        count = db.scalar(select(func.count()).select_from(User))
        db.execute(insert(User).values(id=f"{sys.argv[2]} {number} {count}", created_at=datetime.now(UTC)))
"""


def test_writers_in_processes_wait_for_each_other(tmp_path: Path) -> None:
    """On SQLite, where they share a file: each sees what the others wrote before it."""
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    store = Store(url)
    make_tables(store)
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, url, str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"

    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    for child in children:
        child.communicate(timeout=30)

    assert [child.returncode for child in children] == [0, 0]
    assert sorted(int(user_id.split()[-1]) for user_id in users(store)) == list(range(40))
    store.close()


def test_readers_do_not_wait_for_a_writer(store: Store) -> None:
    add(store, "ann")

    with store.write() as db:
        db.execute(insert(User).values(id="bob", created_at=NOW))
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(users, store).result(timeout=5) == ["ann"]

    assert users(store) == ["ann", "bob"]


def test_sqlite_is_set_up_for_several_processes(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 'made' / 'here.db'}")

    with store.read() as db:
        pragmas = {
            name: db.scalar(text(f"PRAGMA {name}"))
            for name in ("journal_mode", "foreign_keys", "busy_timeout")
        }

    assert pragmas == {"journal_mode": "wal", "foreign_keys": 1, "busy_timeout": 30_000}
    store.close()


# Instants ---------------------------------------------------------------------------------------------------


def test_an_instant_comes_back_as_utc_to_the_microsecond(store: Store) -> None:
    there = NOW.astimezone(timezone(timedelta(hours=5, minutes=45)))
    with store.write() as db:
        db.execute(insert(User).values(id="ann", created_at=there))

    with store.read() as db:
        back = db.scalar(select(User.created_at))

    assert back == NOW
    assert back is not None
    assert back.tzinfo is UTC


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    instants=st.lists(
        st.datetimes(  # of any zone, from 1900 to 9999
            NOW.replace(tzinfo=None, year=1900),
            NOW.replace(tzinfo=None, year=9999),
            timezones=st.timezones(),
        ).map(lambda instant: instant.astimezone(UTC)),
        min_size=2,
        max_size=8,
        unique=True,
    )
)
def test_instants_are_ordered_as_they_passed(store: Store, instants: list[datetime]) -> None:
    """SQLite compares them as texts."""
    with store.write() as db:
        db.execute(delete(Tick))
        db.execute(insert(Tick), [{"name": "any", "due_at": each, "fired_at": each} for each in instants])

    middle = sorted(instants)[len(instants) // 2]
    with store.read() as db:
        assert list(db.scalars(select(Tick.due_at).order_by(Tick.due_at))) == sorted(instants)
        later = db.scalars(select(Tick.due_at).where(Tick.due_at >= middle).order_by(Tick.due_at))
        assert list(later) == [each for each in sorted(instants) if each >= middle]


def test_an_instant_without_an_offset_is_refused(store: Store) -> None:
    naive = NOW.replace(tzinfo=None)

    with pytest.raises(StatementError, match="an instant without an offset"), store.write() as db:
        db.execute(insert(User).values(id="ann", created_at=naive))
    with pytest.raises(StatementError, match="an instant without an offset"), store.read() as db:
        db.execute(select(User.id).where(User.created_at > naive))
    assert users(store) == []


def test_no_instant_is_no_instant(store: Store) -> None:
    with store.read() as db:
        assert db.scalar(select(literal(None, Utc()))) is None


# A line that breaks -----------------------------------------------------------------------------------------


def test_both_ends_of_a_broken_line_give_up(postgres_server: PostgresServer) -> None:
    """A machine that is cut off within a transaction would hold its locks for PostgreSQL's two hours."""
    store = Store(postgres_server.emptied("test"))

    with store.read() as db:
        assert db.scalar(text("SHOW idle_in_transaction_session_timeout")) == "30s"
        raw = db.connection.driver_connection
        assert raw is not None
        ours = raw.info.get_parameters()
    store.close()

    assert {key: ours[key] for key in ("tcp_user_timeout", "keepalives_idle", "keepalives_interval")} == {
        "tcp_user_timeout": "30000",
        "keepalives_idle": "15",
        "keepalives_interval": "5",
    }


def test_nothing_is_asked_for_at_the_start_that_a_pooler_refuses(postgres_server: PostgresServer) -> None:
    """PgBouncer ends a connection that begins with `options`; what is set later holds for its session."""
    store = Store(postgres_server.emptied("test"))

    with store.read() as db:
        raw = db.connection.driver_connection
        assert raw is not None
        assert "options" not in raw.info.get_parameters()
    with store.read() as db:  # nor is it undone with the transaction that it came in
        assert db.scalar(text("SHOW idle_in_transaction_session_timeout")) == "30s"
    store.close()


def test_what_the_url_says_of_it_wins(postgres_server: PostgresServer) -> None:
    own = "options=-c%20idle_in_transaction_session_timeout%3D7s&tcp_user_timeout=9000"
    store = Store(f"{postgres_server.emptied('test')}&{own}")

    with store.read() as db:
        assert db.scalar(text("SHOW idle_in_transaction_session_timeout")) == "7s"
        raw = db.connection.driver_connection
        assert raw is not None
        assert raw.info.get_parameters()["tcp_user_timeout"] == "9000"
    store.close()


@pytest.mark.parametrize("alter", [False, True])
def test_tables_that_are_kept_from_one_test_to_the_next_are_as_at_first(
    postgres_server: PostgresServer, alter: bool
) -> None:
    """What every test on PostgreSQL relies on: `PostgresServer.emptied` and `make_tables`."""
    seen = []
    for _ in range(3):
        store = Store(postgres_server.emptied("test"))
        assert inspect(store.engine).get_table_names() == []
        make_tables(store)
        with store.write() as db:
            columns = {each["name"] for each in inspect(db).get_columns("users")}
            first = db.scalar(text("SELECT nextval(pg_get_serial_sequence('api_keys', 'id'))"))
            seen.append((columns, first, db.scalar(select(Feed.newest)), users(store)))
            db.execute(update(Feed).values(newest=7))
            if alter:
                db.execute(text("ALTER TABLE users ADD COLUMN more integer"))
        add(store, "ann")
        store.close()

    assert seen == [(seen[0][0], 1, 0, [])] * 3
