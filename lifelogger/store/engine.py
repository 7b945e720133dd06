"""One database, SQLite or PostgreSQL, and the two ways to talk to it: `read` and `write`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.schema import Table

BUSY_SECONDS = 30
CONNECT_SECONDS = 5
"""How long PostgreSQL may take to answer at first; a host that swallows packets would take minutes."""
GONE_SECONDS = 30
"""After that the two ends of a line that broke give each other up. A machine that is cut off within a
transaction holds its locks so long, that of the change feed among them, for which every writer waits;
PostgreSQL's own patience is two hours. No transaction of ours is idle for a fraction of it."""


class Store:
    """Short transactions only: never keep one open while HTTP runs.

    Errors do not show the parameters of their statement: people's data is among them.
    """

    def __init__(self, url: str) -> None:
        self.url = make_url(url)
        if self.url.drivername == "postgresql":
            self.url = self.url.set(drivername="postgresql+psycopg")
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self.engine = sqlite_engine(self.url.database or "") if self.is_sqlite else postgres_engine(self.url)
        # Without `preserve_rowcount` an INSERT tells none on PostgreSQL: who comes first would not know it.
        self._writing = self.engine.execution_options(writes=True, preserve_rowcount=True)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that only reads."""
        with self.engine.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that writes: committed at the end of the block, undone by any error."""
        with self._writing.begin() as connection:
            yield connection

    def insert(self, table: Any) -> Any:
        """The dialect's INSERT, which has `on_conflict_do_…` on both databases."""
        assert isinstance(table, Table)
        return sqlite.insert(table) if self.is_sqlite else postgresql.insert(table)

    def scrub(self) -> bool:
        """Let nothing that was deleted outlive it in SQLite's log; False while others still read from there.

        PostgreSQL keeps dead rows until its own VACUUM, so there is nothing to do here.
        """
        if not self.is_sqlite:
            return True
        raw = self.engine.raw_connection()
        try:
            busy, _, _ = raw.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        finally:
            raw.close()
        return not busy

    def close(self) -> None:
        self.engine.dispose()


def postgres_engine(url: URL) -> Engine:
    """PostgreSQL, where both ends notice that a line is broken; what the URL says of that wins.

    The server's end is told by statements: PgBouncer refuses who asks for it in `options`.
    """
    idle, interval, count = GONE_SECONDS // 2, GONE_SECONDS // 6, 3
    arguments = {
        "connect_timeout": CONNECT_SECONDS,
        "tcp_user_timeout": GONE_SECONDS * 1000,
        "keepalives_idle": idle,
        "keepalives_interval": interval,
        "keepalives_count": count,
    }
    session = {
        "idle_in_transaction_session_timeout": f"'{GONE_SECONDS}s'",
        "tcp_user_timeout": f"'{GONE_SECONDS}s'",
        "tcp_keepalives_idle": idle,
        "tcp_keepalives_interval": interval,
        "tcp_keepalives_count": count,
    }
    engine = create_engine(
        url, pool_size=16, max_overflow=16, pool_pre_ping=True, isolation_level="READ COMMITTED",
        connect_args={name: value for name, value in arguments.items() if name not in url.query},
        hide_parameters=True,
    )  # fmt: skip

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, record: Any) -> None:
        if "options" not in url.query:
            connection.execute("; ".join(f"SET {name} = {value}" for name, value in session.items()))
            connection.commit()  # what is set in a transaction is undone with it

    return engine


def sqlite_engine(path: str) -> Engine:
    """SQLite for several processes: WAL, waiting for locks, writers that begin as writers.

    A deferred transaction that turns into a writer fails at once when another one wrote meanwhile,
    whatever the time-out, so writers take the lock at their start (sqlite.org/lang_transaction.html).
    """
    if path and path != ":memory:":
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": BUSY_SECONDS}, hide_parameters=True)

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # we say BEGIN ourselves, below
        # What is deleted is overwritten: a page that is free again would keep somebody's data for years.
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON", "secure_delete=ON"):
            connection.execute(f"PRAGMA {pragma}").close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine
